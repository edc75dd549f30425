"""Tables of the finished cells of a sweep, and intervals that cover the noise of seeds and of test images.

Groups are cells that differ only in their seed. The best one is chosen on held-out training images; its accuracy is
that on the test images. Groups are compared seed by seed and image by image.
"""

import json
import math
from pathlib import Path

import numpy as np
from scipy import stats

import utils
from sweep.cells import AXES, DESIGN, describe_design, describe_positions, describe_registers, hits_of, read_record
from sweep.measures import PRIMARY, TITLES
from sweep.prediction import predictions
from training.run_log import write_csv
from utils import counted, flag_value

COLUMNS = (
    "cls_pos", "reg_pos", "num_reg", "seed", "val_top1", "test_top1", "test_top5", "test_loss", "params", "flops",
    "images_per_s", "artefact_share", "cls_to_patches", "cls_to_registers", "cls_to_itself", "best_epoch", "repeats",
    "train_seconds", "test_images", "artefacts_begin_at", "causal_depth", "causal_depth_low", "causal_depth_high",
    "sinks_on_cls", "sinks_on_registers", "sinks_on_patches", "hit_ratio", "corloc", "knn_iou", *DESIGN,
)  # fmt: skip
COLUMNS += tuple(name for name in TITLES if name not in COLUMNS)
JUDGED = ("hit_ratio", "corloc", "knn_iou")  # by boxes and masks
MEANS = "params", "cls_to_patches", "cls_to_itself", *(n for n in TITLES if not n.startswith(("val_", "test_")))
LEVEL = 0.05  # family-wise, of all intervals of a table
MIN_SEEDS = 3  # for an interval: the variance of two values is too uncertain
TIED = 1e-9  # points of held-out accuracy
TIES_NAMED = 3  # in the verdict; results.json has all


def collect(folder) -> list[dict]:
    """The records of all finished cells in `folder`, in the order of the grid."""
    records = [read_record(file) for file in Path(folder).glob("cells/*/result.json")]

    def place(record):  # ordinary designs first
        count, *design = panel_of(record)
        words = describe_design(*design)
        return count, len(words), words, *map(absent_last, key_of(record)[:2]), record["seed"]

    return sorted(records, key=place)


def in_order(positions) -> list:
    """Each once, an absent token last."""
    return sorted(set(positions), key=absent_last)


def absent_last(position) -> float:
    """A sort key."""
    return math.inf if position is None else position


def key_of(record) -> tuple:
    """The values of `AXES` of a cell or a group."""
    return tuple(record.get(name, DESIGN.get(name)) for name in AXES)


def panel_of(record) -> tuple:
    """All of these but the positions: the number of registers and the design."""
    return key_of(record)[2:]


def panel_name(panel) -> str:
    count, *design = panel
    return ", ".join([describe_registers(count), *describe_design(*design)])


def grouped(records) -> dict[tuple, dict[int, dict]]:
    """{key: {seed: record}}"""
    groups = {}
    for record in records:
        groups.setdefault(key_of(record), {})[record["seed"]] = record
    return groups


def mean_of(values) -> dict:
    """{"n", "mean", "sd"}: "sd" is None for a single value."""
    values = np.asarray(values, float)
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"n": len(values), "mean": float(values.mean()), "sd": sd}


def half_width(values, least, largest, comparisons=1) -> np.ndarray:
    """Half the width of a confidence interval for means over seeds and test images, both of which are samples.

    For normal seed and image effects it covers with at least 1 - LEVEL / comparisons, whatever their variances are
    (Banerjee 1960, "On confidence interval for two-means problem based on separate estimates of variances"). The
    approximation of Welch and Satterthwaite does not: with 3 seeds, up to a fifth of simulated sweeps of equal cells
    had an interval without 0.

    Args:
        values: (..., S, n), of S >= 2 seeds and n images.
        least, largest: bounds of a value. One more image with each of them counts in the variance (compare Agresti
            and Min 2005), so that it is never 0.
        comparisons: number of intervals that must hold together (Bonferroni).

    Returns:
        (...), in the unit of `values`.
    """
    seeds, images = values.shape[-2:]
    by_seed, by_image = values.mean(-1), values.mean(-2)
    by_image = np.concatenate([by_image, np.broadcast_to((least, largest), (*by_image.shape[:-1], 2))], -1)
    variances = by_seed.var(-1, ddof=1) / seeds, by_image.var(-1, ddof=1) / images
    t = stats.t.isf(LEVEL / comparisons / 2, [seeds - 1, images + 1])
    return np.sqrt(t[0] ** 2 * variances[0] + t[1] ** 2 * variances[1])


def paired(group, baseline, comparisons=1, measure="accuracy") -> dict | None:
    """The difference of two groups in points of test accuracy, or in another of `PRIMARY`; None without a common seed.

    The interval of accuracy is over seeds and test images, that of others over seeds alone (Student's t).

    Returns:
        `mean_of` the differences, seed by seed, "seeds", and the interval "low" to "high", which holds together with
        those of all `comparisons`. Without an interval, both are None and "lacks" is the reason.
    """
    seeds = sorted(having(group, measure).keys() & having(baseline, measure).keys())
    if not seeds:
        return None
    name, _ = PRIMARY[measure]
    found = mean_of([group[s][name] - baseline[s][name] for s in seeds]) | {"seeds": seeds}
    lacks = _why_no_interval([*(group[s] for s in seeds), *(baseline[s] for s in seeds)], len(seeds), measure)
    if lacks:
        return found | {"low": None, "high": None, "lacks": lacks}
    if measure != "accuracy":
        half = stats.t.isf(LEVEL / comparisons / 2, len(seeds) - 1) * found["sd"] / math.sqrt(len(seeds))
        return found | {"low": found["mean"] - half, "high": found["mean"] + half, "lacks": None}
    hits = [np.array([hits_of(one[s]) for s in seeds], np.float32) for one in (group, baseline)]
    return found | _interval(found["mean"], hits[0] - hits[1], -1, comparisons) | {"lacks": None}


def _interval(mean, hits, least, comparisons=1) -> dict:
    half = 100 * float(half_width(hits, least, 1, comparisons))
    return {"low": mean - half, "high": mean + half}


def having(group, measure) -> dict[int, dict]:
    """The records of a group that have the measure; those of an earlier revision may lack it."""
    return {seed: record for seed, record in group.items() if record.get(PRIMARY[measure][0]) is not None}


def _why_no_interval(records, seeds, measure="accuracy") -> str | None:
    """The reason why these records have no interval; None if they have one."""
    if seeds < MIN_SEEDS:
        return f"it needs {MIN_SEEDS} common seeds, there are {seeds}; add {MIN_SEEDS - seeds} to --seeds"
    if measure != "accuracy":
        return None
    if any(hits_of(record) is None for record in records):
        return (
            "it needs the hits on each test image, which cells of an earlier revision lack; train them again, "
            "in another --output_dir"
        )
    if len({record["test_images"] for record in records}) > 1:
        return "the cells were tested on different images; train them again, in another --output_dir"
    return None


def baseline_of(key) -> tuple:
    """The standard model: all tokens from block 0 on, and as many registers."""
    return 0, 0 if key[2] else None, key[2], *DESIGN.values()


def summarise(records, measure="accuracy", halved=None) -> dict:
    """Results of every group, the best one, those that tie with it, and the verdict on a measure of `PRIMARY`.

    `halved`: see `halving.about`. What survived did so partly by its luck, so all positions count as comparisons.
    """
    groups, (name, _) = grouped(records), PRIMARY[measure]
    others = {key: groups[baseline_of(key)] for key in groups if baseline_of(key) in groups.keys() - {key}}
    began = [*groups, *map(key_of, halved["positions"] if halved else ())]
    comparisons = len({key for key in began if baseline_of(key) in groups.keys() - {key}})
    rows = []
    for key, group in groups.items():
        rows.append({
            **dict(zip(AXES, key)), "seeds": sorted(group),
            "val_top1": mean_of([r["val_top1"] for r in group.values()]),
            "test_top1": mean_of([r["test_top1"] for r in group.values()]),
            "primary": mean_of([r[name] for r in having(group, measure).values()]) if having(group, measure) else None,
            "against_0_0": paired(group, others[key], comparisons, measure) if key in others else None,
            **{name: _mean(group, name) for name in MEANS},
        })  # fmt: skip
    found = {
        "measure": measure,
        "groups": rows,
        "best": None,
        "tied": [],
        "comparisons": comparisons,
        "halving": halved,
    }
    if not any(row["primary"] for row in rows):
        lacks = f"No finished cell has {measure}: they are of an earlier revision." if rows else "No cell is finished."
        return found | {"verdict": lacks}
    best, *tied = best_of(rows, measure)
    return found | {
        "best": position_of(best), "tied": list(map(position_of, tied)),
        "verdict": verdict(best, tied, comparisons, measure),
    }  # fmt: skip


def best_of(rows, measure="accuracy") -> list[dict]:
    """The row that is best, then those that are as good but need more FLOPs.

    In accuracy, that on the held-out images. Other measures are of the test images: their best one is partly the
    luckiest, which the intervals allow for, as they hold together for all cells.
    """
    name, sign = ("val_top1", 1) if measure == "accuracy" else ("primary", PRIMARY[measure][1])
    rows = [row for row in rows if row[name]]
    most = max(row[name]["n"] for row in rows)  # a mean of fewer seeds would win by its luck
    rows = [row for row in rows if row[name]["n"] == most]
    highest = max(sign * row[name]["mean"] for row in rows)
    return sorted((row for row in rows if sign * row[name]["mean"] >= highest - TIED), key=lambda row: row["flops"])


def position_of(row) -> dict:
    """What makes it, without what is as by default."""
    found = dict(zip(AXES, key_of(row)))
    return {name: value for name, value in found.items() if name not in DESIGN or value != DESIGN[name]}


def _mean(group, name):
    values = [r.get(name) for r in group.values()]  # cells of an earlier revision lack some
    return None if None in values else float(np.mean(values))


def verdict(best, tied, comparisons, measure="accuracy") -> str:
    """Whether the best cell is better than 0/0 beyond the noise of seeds and, in accuracy, of test images.

    The best of many cells is partly the luckiest: its interval is one of those that hold together for all cells.
    """
    of_images, sign = measure == "accuracy", PRIMARY[measure][1]
    where = "on the held-out images" if of_images else f"by {measure} ({'more' if sign > 0 else 'less'} is better)"
    words = f"Best {where}: {label(best)}"
    if tied:
        more = f"; and {len(tied) - TIES_NAMED} more" if len(tied) > TIES_NAMED else ""
        named = "; ".join(map(label, tied[:TIES_NAMED]))
        words += f" (tied with {named}{more}: the one with the fewest FLOPs is taken)"
    words += f", {mean_and_sd(best['primary'])}{'% of the test images' if of_images else ''}"
    words += f" ({counted(best['primary']['n'], 'seed')})."
    if key_of(best) == baseline_of(key_of(best)):
        return f"{words} No cell with tokens that enter later is better there."
    against = best["against_0_0"]
    if against is None:
        return f"{words} There is no 0/0 cell with as many registers and a common seed to compare it with."
    difference = f"{words} That is {against['mean']:+.2f}{' points' if of_images else ''} against 0/0"
    if against["lacks"]:
        return f"{difference}; no verdict: {against['lacks']}."
    noise = "seed and image noise" if of_images else "seed noise"
    interval = (
        f"95 % interval {against['low']:+.2f} to {against['high']:+.2f} over {counted(against['n'], 'seed')}"
        f"{' and the test images' if of_images else ''}, corrected for {counted(comparisons, 'comparison')}"
    )
    if against["low"] <= 0 <= against["high"]:
        return f"{difference} ({interval}): no difference beyond {noise}."
    return f"{difference} ({interval}): {'better' if sign * against['mean'] > 0 else 'worse'} beyond {noise}."


def label(row) -> str:
    return describe_positions(*key_of(row))


def mean_and_sd(sample) -> str:
    """'93.00 ± 3.61'"""
    return f"{sample['mean']:.2f}" + ("" if sample["sd"] is None else f" ± {sample['sd']:.2f}")


def margins(records, along) -> dict[tuple, dict]:
    """Mean test accuracy over the other position, of the seeds that have all cells.

    Args:
        along: "cls_pos" or "reg_pos".

    Returns:
        {panel: {position: `mean_of` over seeds, and the interval "low" to "high", None where `paired` has none}}.
    """
    other, found = {"cls_pos": "reg_pos", "reg_pos": "cls_pos"}[along], {}
    for panel in dict.fromkeys(map(panel_of, records)):
        mine = [r for r in records if panel_of(r) == panel]
        xs = in_order(r[along] for r in mine)
        ys = {r[other] for r in mine}
        there = {(r[along], r[other], r["seed"]): r for r in mine}
        whole = [s for s in sorted({r["seed"] for r in mine}) if all((x, y, s) in there for x in xs for y in ys)]
        if whole:
            found[panel] = {x: _margin([[there[x, y, s] for y in ys] for s in whole]) for x in xs}
    return found


def _margin(by_seed: list[list[dict]]) -> dict:
    point = mean_of([np.mean([r["test_top1"] for r in one]) for one in by_seed])
    if _why_no_interval([r for one in by_seed for r in one], len(by_seed)):
        return point | {"low": None, "high": None}
    hits = np.array([np.mean([hits_of(r) for r in one], 0) for one in by_seed])  # (S, n)
    return point | _interval(point["mean"], hits, 0)


def write_tables(folder, about: dict, measure="accuracy", halved=None) -> dict:
    """Write results.csv (a line per cell), results.json (with the statistics) and .md; returns the statistics."""
    folder, records = Path(folder), collect(folder)
    summary = summarise(records, measure, halved) | {"prediction": predictions(records)}
    write_csv(folder / "results.csv", COLUMNS, [r | {"cls_pos": flag_value(r["cls_pos"])} for r in records])
    utils.write_text(folder / "results.json", json.dumps({"about": about, "cells": records, **summary}, indent=1))
    utils.write_text(folder / "results.md", markdown(summary))
    return summary


def markdown(summary) -> str:
    """A table: a line per group, the best in bold."""
    measure, other = summary["measure"], summary["measure"] != "accuracy"
    judged = any(row["corloc"] is not None for row in summary["groups"])  # by boxes and masks
    heads = (
        "CLS at", "registers", "at", "seeds", "held-out %", "test %", *([measure] if other else ()),
        "against 0/0 (95 % interval)", "MFLOPs", "images/s", "artefacts", "CLS to registers", "CLS harmless until",
        "sinks: CLS, registers, patches", *(["hit ratio, CorLoc, kNN IoU"] if judged else ()),
    )  # fmt: skip
    rows = []
    for row in summary["groups"]:
        primary = [mean_and_sd(row["primary"]) if row["primary"] else "-"] if other else []
        rows.append([
            *_where(row), str(len(row["seeds"])), f"{row['val_top1']['mean']:.2f}", mean_and_sd(row["test_top1"]),
            *primary, _difference(row["against_0_0"]), f"{row['flops'] / 1e6:.2f}", f"{row['images_per_s']:.0f}",
            f"{row['artefact_share']:.2f} %", _number(row["cls_to_registers"], " %"), _number(row["causal_depth"]),
            ", ".join(_number(row[f"sinks_on_{kind}"], " %") for kind in ("cls", "registers", "patches")),
            *([", ".join(_number(row[name], " %") for name in JUDGED)] if judged else ()),
        ])  # fmt: skip
        if position_of(row) == summary["best"]:
            rows[-1] = [f"**{cell}**" for cell in rows[-1]]
    n = summary["comparisons"]
    together = f"all {n} comparisons together" if n > 1 else "the one comparison"
    note = (
        f"Intervals: of {measure}, 95 % for {together}, over seeds"
        f"{'' if other else ' and test images'}, paired; from {MIN_SEEDS} common seeds on. All other measures are "
        "exploratory."
    )
    parts = [*([note, ""] if summary["comparisons"] else []), summary["verdict"], ""]
    more = [*_fell(summary["halving"]), *_predicted(summary.get("prediction"))]
    return "\n".join([*_table(heads, rows), "", *parts, *more])


def _table(heads, rows) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]


def _fell(halved) -> list[str]:
    """Lines: the positions that were not trained whole, and where they fell."""
    if not halved or not halved["fell"]:
        return []
    heads = ("CLS at", "registers", "at", "fell at rung", "after epoch", "held-out % so far")
    rows = []
    for row in halved["fell"]:
        held_out = "failed" if row["val_top1"] is None else mean_and_sd(row["val_top1"])
        rows.append([*_where(row), str(row["rung"]), str(row["epochs"]), held_out])
    last = len(halved["rungs"])
    note = (
        f"Successive halving, {last} rungs, about one of {halved['eta']} positions survives each: these were not "
        "trained whole. The verdict is on those that were; its intervals are corrected for all of the grid."
    )
    return [*_table(heads, rows), "", note, ""]


def _where(row) -> list[str]:
    """Words for three columns."""
    reg, design = row["reg_pos"], describe_design(*key_of(row)[3:])
    return [", ".join([flag_value(row["cls_pos"]), *design]), str(row["num_reg"]), "-" if reg is None else str(reg)]


def _predicted(prediction) -> list[str]:
    """Lines: what the causal curve predicts at each position, means over seeds, and the verdict on that."""
    if not prediction or not prediction["cells"]:
        return []
    heads = ("CLS at", "registers", "at", "seeds", "predicted change", "measured change (points of test top-1)")
    rows = []
    for group in grouped(prediction["cells"]).values():
        means = (np.mean([cell[name] for cell in group.values()]) for name in ("predicted", "measured"))
        rows.append([*_where(next(iter(group.values()))), str(len(group)), *(f"{value:+.2f}" for value in means)])
    return [*_table(heads, rows), "", prediction["verdict"], ""]


def _number(value, unit="") -> str:
    return "-" if value is None else f"{value:.1f}{unit}"


def _difference(against) -> str:
    if against is None:
        return "-"
    interval = "" if against["low"] is None else f" ({against['low']:+.2f} to {against['high']:+.2f})"
    return f"{against['mean']:+.2f}{interval}"
