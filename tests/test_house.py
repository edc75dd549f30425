"""Imports run down only, floor by floor, and never in a circle; see docs/ARCHITECTURE.md."""

import graphlib

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
