"""Imports run down only, floor by floor, and never in a circle; see docs/ARCHITECTURE.md."""

import graphlib
import re

import house


def test_imports_run_down():
    upwards = [f"{room} -> {other}" for room, other in house.imports() if house.floor_of(room) > house.floor_of(other)]
    assert not upwards


def test_no_circle():
    below = {}
    for room, other in house.imports():
        below.setdefault(room, set()).add(other)
    assert set(graphlib.TopologicalSorter(below).static_order()) <= house.rooms().keys()


def test_every_room_has_a_floor():
    assert {"training.loop", "inspection.pages", "utils"} < house.rooms().keys()
    for room in house.rooms():
        house.floor_of(room)


def test_a_newcomer_reads_one_evening():
    """The files of "Read in this order" and their lines, rounded; 2,500 are an evening."""
    text = (house.ROOT / "docs/ARCHITECTURE.md").read_text().partition("## Read in this order")[2].partition("\n## ")[0]
    said = {house.ROOT / name: int(lines) for name, lines in re.findall(r"^\| `(.*)` \| (\d+) \|", text, re.M)}
    assert len(said) == 10 and sum(map(house.lines, said)) <= 2500
    wrong = {file.name: house.lines(file) for file in said if abs(house.lines(file) - said[file]) > 20}
    assert not wrong, "correct these lines in docs/ARCHITECTURE.md"
