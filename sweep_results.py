"""What the finished cells of a sweep say: tables, and statistics that admit what seeds alone would do.

Groups are cells that differ only in their seed. The best one is chosen on held-out training images; what it reaches is
told on the test images. Differences between groups are taken seed by seed, with Student's t.
"""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
from scipy import stats

import utils
from sweep_cells import read_record

COLUMNS = (
    "cls_pos", "reg_pos", "num_reg", "seed", "val_top1", "test_top1", "test_top5", "test_loss", "params", "flops",
    "images_per_s", "artefact_share", "cls_to_patches", "cls_to_registers", "cls_to_itself", "best_epoch", "repeats",
    "train_seconds", "test_images", "artefacts_begin_at",
)  # fmt: skip
LEVEL = 0.05  # of intervals and verdicts


def collect(folder) -> list[dict]:
    """The records of all finished cells in `folder`, in the order of the grid."""
    records = [read_record(file) for file in Path(folder).glob("cells/*/result.json")]
    return sorted(records, key=lambda r: (r["num_reg"], place(r["cls_pos"]), place(r["reg_pos"]), r["seed"]))


def place(position) -> float:
    """To sort by: no token comes last."""
    return math.inf if position is None else position


def key_of(record) -> tuple:
    """(cls_pos, reg_pos, num_reg): what all seeds of a group share."""
    return record["cls_pos"], record["reg_pos"], record["num_reg"]


def grouped(records) -> dict[tuple, dict[int, dict]]:
    """{key: {seed: record}}"""
    groups = {}
    for record in records:
        groups.setdefault(key_of(record), {})[record["seed"]] = record
    return groups


def mean_of(values) -> dict:
    """`mean_of` the differences of two groups, seed by seed, with "p" (two-sided); None if no seed is in both."""
    values, n = np.asarray(values, float), len(values)
    mean, sd = float(values.mean()), float(values.std(ddof=1)) if n > 1 else None
    half = None if sd is None else float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * sd / math.sqrt(n)
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"n": n, "mean": mean, "sd": sd, "low": low, "high": high}


def paired(group, baseline, figure="test_top1") -> dict | None:
    """`mean_of` the differences of two groups, seed by seed, and "p" (two-sided); None without a common seed."""
    seeds = sorted(group.keys() & baseline.keys())
    if not seeds:
        return None
    found = mean_of([group[s][figure] - baseline[s][figure] for s in seeds])
    p = None
    if found["sd"] == 0:
        p = float(found["mean"] == 0)
    elif found["sd"] is not None:
        p = 2 * float(stats.t.sf(abs(found["mean"]) * math.sqrt(found["n"]) / found["sd"], found["n"] - 1))
    return found | {"seeds": seeds, "p": p}


def baseline_of(key) -> tuple:
    """The usual model: all tokens from the first block on, as many registers."""
    return 0, 0 if key[2] else None, key[2]


def summarise(records) -> dict:
    """Every group's figures, the best one, and what is to be said of it."""
    groups = grouped(records)
    rows = []
    for key, group in groups.items():
        base = groups.get(baseline_of(key))
        rows.append({
            "cls_pos": key[0], "reg_pos": key[1], "num_reg": key[2], "seeds": sorted(group),
            "val_top1": mean_of([r["val_top1"] for r in group.values()]),
            "test_top1": mean_of([r["test_top1"] for r in group.values()]),
            "against_0_0": paired(group, base) if base and key != baseline_of(key) else None,
            **{name: _mean(group, name) for name in COLUMNS[8:15]},
        })  # fmt: skip
    if not rows:
        return {"groups": [], "best": None, "verdict": "No cell is finished."}
    most = max(row["val_top1"]["n"] for row in rows)  # a mean of fewer seeds would win by its luck
    best = max((row for row in rows if row["val_top1"]["n"] == most), key=lambda row: row["val_top1"]["mean"])
    return {"groups": rows, "best": {name: best[name] for name in COLUMNS[:3]}, "verdict": verdict(best, rows)}


def _mean(group, name):
    values = [r[name] for r in group.values()]
    return None if None in values else float(np.mean(values))


def verdict(best, rows) -> str:
    """Whether the best cell is better than 0/0 beyond what seeds do.

    The best of many cells looks better than it is, since its luck was chosen with it: p is multiplied by the number of
    cells that could have been the best (Bonferroni).
    """
    tested = best["test_top1"]
    words = f"Best on the held-out images: {label(best)}, {told(tested)}% of the test images ({_seeds(tested['n'])})."
    if (best["cls_pos"], best["reg_pos"], best["num_reg"]) == baseline_of((0, 0, best["num_reg"])):
        return f"{words} No cell with tokens that enter later is better."
    against = best["against_0_0"]
    if against is None:
        return f"{words} There is no 0/0 cell with as many registers and a common seed to compare it with."
    difference = f"{words} That is {against['mean']:+.2f} points against 0/0"
    if against["n"] < 2:
        return f"{difference}, of one seed: it cannot be told from the noise between seeds; add --seeds."
    p = min(1.0, against["p"] * (len(rows) - 1))
    interval = f"95 % interval {against['low']:+.2f} to {against['high']:+.2f}, paired over {_seeds(against['n'])}"
    corrected = f"p = {p:.2g} after correction for the choice among {len(rows)} cells"
    if p >= LEVEL:
        return f"{difference} ({interval}): no difference beyond seed noise ({corrected})."
    which = "better" if against["mean"] > 0 else "worse"
    return f"{difference} ({interval}): {which} beyond seed noise ({corrected})."


def label(row) -> str:
    cls = "no CLS" if row["cls_pos"] is None else f"CLS at {row['cls_pos']}"
    return f"{cls}, {row['num_reg']} registers at {row['reg_pos']}" if row["num_reg"] else f"{cls}, no registers"


def told(sample) -> str:
    """Mean and standard deviation, as words."""
    return f"{sample['mean']:.2f}" + ("" if sample["sd"] is None else f" ± {sample['sd']:.2f}")


def _seeds(n) -> str:
    return f"{n} seed" if n == 1 else f"{n} seeds"


def margins(records, along) -> dict[int, dict]:
    """{num_reg: {position: `mean_of` over seeds}}: means over the other position, of seeds that have all of the cells.

    Args:
        along: "cls_pos" or "reg_pos".
    """
    other, found = {"cls_pos": "reg_pos", "reg_pos": "cls_pos"}[along], {}
    for count in sorted({r["num_reg"] for r in records}):
        mine = [r for r in records if r["num_reg"] == count]
        xs = sorted({r[along] for r in mine}, key=place)
        ys = {r[other] for r in mine}
        there = {(r[along], r[other], r["seed"]): r["test_top1"] for r in mine}
        whole = [s for s in sorted({r["seed"] for r in mine}) if all((x, y, s) in there for x in xs for y in ys)]
        if whole:
            found[count] = {x: mean_of([np.mean([there[x, y, s] for y in ys]) for s in whole]) for x in xs}
    return found


# Files ------------------------------------------------------------------------------------------------------------


def write_tables(folder, about: dict) -> dict:
    """results.csv (a line a cell), results.json (with the statistics) and results.md; returns the statistics."""
    folder, records = Path(folder), collect(folder)
    summary = summarise(records)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(record | {"cls_pos": _word(record["cls_pos"])} for record in records)
    everything = json.dumps({"about": about, "cells": records, **summary}, indent=1)
    for name, text in (("csv", lines.getvalue()), ("json", everything), ("md", markdown(summary))):
        utils.write_atomically(folder / f"results.{name}", lambda file, text=text: file.write(text.encode()))
    return summary


def markdown(summary) -> str:
    """A table for a README: a line a group, the best in bold."""
    heads = (
        "CLS at", "registers", "at", "seeds", "held-out %", "test %", "against 0/0 (95 % interval)", "MFLOPs",
        "images/s", "artefacts", "CLS to registers",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in summary["groups"]:
        is_best = all(row[name] == value for name, value in summary["best"].items())
        cells = [
            _word(row["cls_pos"]), str(row["num_reg"]), "-" if row["reg_pos"] is None else str(row["reg_pos"]),
            str(len(row["seeds"])), f"{row['val_top1']['mean']:.2f}", told(row["test_top1"]),
            _difference(row["against_0_0"]), f"{row['flops'] / 1e6:.2f}", f"{row['images_per_s']:.0f}",
            f"{row['artefact_share']:.2f} %",
            "-" if row["cls_to_registers"] is None else f"{row['cls_to_registers']:.1f} %",
        ]  # fmt: skip
        lines.append("| " + " | ".join(f"**{cell}**" if is_best else cell for cell in cells) + " |")
    return "\n".join([*lines, "", summary["verdict"], ""])


def _word(position) -> str:
    return "none" if position is None else str(position)


def _difference(against) -> str:
    if against is None:
        return "-"
    interval = "" if against["low"] is None else f" ({against['low']:+.2f} to {against['high']:+.2f})"
    return f"{against['mean']:+.2f}{interval}"
