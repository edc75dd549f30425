"""Does the causal depth curve of a model with CLS from block 0 on predict where CLS can enter in training?

Predicted for CLS at k: minus the top-1 that the cell with CLS at 0 (same registers, same seed) loses where CLS is
replaced by its initial token at the output of block k - 1. Measured: the accuracy of the cell that was trained with CLS
at k minus that of the same cell.

Both have the accuracy of the cell with CLS at 0 in them, which would correlate them by its noise alone. So deviations
from the mean over the positions k beside the same cell are correlated.
"""

import numpy as np
from scipy import stats

from inspection.bootstrap import bootstrap
from sweep.cells import AXES, DESIGN, hits_of
from utils import counted

MIN_CELLS, MIN_POSITIONS = 4, 3  # two positions of one cell always lie on a line
RESAMPLES = 2000
ENDS = (0.025, 0.975)


def predictions(records) -> dict:
    """All cells with CLS after block 0 beside what the curve predicts for them, and how the two correlate.

    Returns:
        {"cells": [{"predicted", "measured": points, "predicted_interval", "measured_interval": 95 % over images or
        None, and the positions}], "pearson", "spearman": {"value", "low", "high"} or None, "verdict": words}.
    """
    of_key = {(r["cls_pos"], *_beside(r)): r for r in records}
    cells = [
        _cell(record, of_key[(0, *beside)]) for (cls, *beside), record in of_key.items()
        if cls and cls <= len(of_key.get((0, *beside), {}).get("causal_cost") or ())
    ]  # fmt: skip
    judged = [cell for cell in cells if sum(_beside(cell) == _beside(other) for other in cells) > 1]
    found = {"cells": cells, "pearson": None, "spearman": None}
    lacks = _why_not(judged)
    if not lacks:
        found |= correlations(judged)
    return found | {"verdict": _verdict(found, judged, lacks) if cells else ""}


def _beside(record) -> tuple:
    return *(record.get(name, DESIGN.get(name)) for name in AXES[1:]), record["seed"]


def _cell(late, base) -> dict:
    """`base`: the cell with CLS at 0."""
    at = late["cls_pos"] - 1
    hits, low_high = [hits_of(late), hits_of(base)], base["causal_cost_interval"][at]
    paired = all(h is not None for h in hits) and late["test_images"] == base["test_images"]
    return dict(zip((*AXES[1:], "seed"), _beside(late))) | {
        "cls_pos": late["cls_pos"],
        "predicted": -base["causal_cost"][at], "predicted_interval": [-end for end in low_high[::-1]],
        "measured": late["test_top1"] - base["test_top1"],
        "measured_interval": bootstrap(100 * np.subtract(*hits, dtype=np.int8)).tolist() if paired else None,
    }  # fmt: skip


def _why_not(cells) -> str | None:
    positions = {cell["cls_pos"] for cell in cells}
    if len(cells) < MIN_CELLS or len(positions) < MIN_POSITIONS:
        there = f"{counted(len(cells), 'such cell')} at {counted(len(positions), 'position')}"
        return (
            f"it takes {MIN_CELLS} cells with CLS after block 0, at {MIN_POSITIONS} positions, two or more for each "
            f"cell with CLS at 0; there are {there}; add some to --cls_pos"
        )
    if min(np.ptp(_deviations(cells), axis=1)) < 1e-9:
        return "the curve, or the accuracy, is the same at all positions"
    return None


def _deviations(cells) -> np.ndarray:
    """(2, n): predicted and measured, minus their means over the cells beside the same cell with CLS at 0."""
    _, group = np.unique([str(_beside(cell)) for cell in cells], return_inverse=True)
    values = np.array([[cell["predicted"], cell["measured"]] for cell in cells]).T
    return np.array([v - (np.bincount(group, v) / np.bincount(group))[group] for v in values])


def correlations(cells) -> dict:
    """Pearson's and Spearman's coefficients, with 95 % intervals over seeds and positions of CLS.

    Seeds and positions are both drawn again, and a cell counts as often as its seed times as often as its position:
    Owen (2007), "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2). To draw cells is to take those of one
    position for independent: in simulated grids without any relation, 4 of 10 such intervals were without 0.
    """
    values, chance = _deviations(cells), np.random.default_rng(0)
    weights = np.ones((RESAMPLES, len(cells)))
    for name in ("seed", "cls_pos"):
        _, place = np.unique([cell[name] for cell in cells], return_inverse=True)
        count = place.max() + 1
        weights *= chance.multinomial(count, np.full(count, 1 / count), RESAMPLES)[:, place]
    found = {}
    for name, (x, y) in (("pearson", values), ("spearman", stats.rankdata(values.round(9), axis=1))):
        low, high = np.nanquantile(correlation(x, y, weights), ENDS)
        found[name] = {"value": float(correlation(x, y, np.ones(len(x)))), "low": float(low), "high": float(high)}
    return found


def correlation(x, y, weights) -> np.ndarray:
    """(n,), (n,), (..., n) -> (...): Pearson's coefficient of weighted pairs; NaN where x or y does not vary."""
    with np.errstate(invalid="ignore"):
        weights = weights / weights.sum(axis=-1, keepdims=True)
    x, y = (values - (weights @ values)[..., None] for values in (x, y))
    xx, yy, xy = ((weights * product).sum(axis=-1) for product in (x * x, y * y, x * y))
    return np.divide(xy, np.sqrt(xx * yy), where=np.minimum(xx, yy) > 1e-12, out=np.full_like(xy, np.nan))


def _verdict(found, cells, lacks) -> str:
    question = "Does the causal curve of the model with CLS at 0 predict where CLS can enter?"
    if lacks:
        return f"{question} It cannot be judged: {lacks}."
    low, high = found["spearman"]["low"], found["spearman"]["high"]
    answer = "Yes, in its order." if low > 0 else "No: in the opposite order." if high < 0 else "Not beyond noise."
    words = (
        "{} {value:+.2f} ({low:+.2f} to {high:+.2f})".format(n.title(), **found[n]) for n in ("spearman", "pearson")
    )
    seeds, positions = (len({cell[name] for cell in cells}) for name in ("seed", "cls_pos"))
    return (
        f"{question} {answer} Correlation of predicted and measured change (95 % interval over seeds and positions): "
        f"{', '.join(words)}; {len(cells)} cells, {counted(seeds, 'seed')}, {positions} positions of CLS."
    )
