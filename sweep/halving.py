"""`--halving`: successive halving over the positions of a grid that is too large to train whole.

Each rung trains the positions that are left up to an epoch of the whole schedule, and the best of them by held-out
accuracy, a mean over seeds, reach the next rung. Survivors resume from their checkpoints, so their results are those
of cells that were never stopped. Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and
hyperparameter optimization" (arXiv 1502.07943); the rungs are those of Hyperband (1603.06560).

Which positions fell is a function of the grid and of the cells' logs and is kept nowhere else, so that a process may
be stopped at any time, and others may join.
"""

import time
from dataclasses import dataclass
from math import ceil

import numpy as np

from sweep.cells import AXES, GridCell, folder_of, reached
from sweep.results import baseline_of, mean_of
from training import signals
from training.run_log import read_json_lines, selection_key
from utils import BadInput, counted, say


@dataclass(frozen=True)
class Standing:
    """Where a grid stands: cells train up to epoch `epochs` in rung `rung`, counted from 1."""

    rung: int
    epochs: int
    todo: list[GridCell]  # have not reached it
    left: list[GridCell]  # of the positions that did not fall
    fell: list[dict]  # positions, "rung", "epochs", and "val_top1": `mean_of` over seeds, None if a cell failed
    share: float  # of the epochs of all `left`, if they were trained whole, that this rung and the next ones take


def rungs(cells, args) -> list[tuple[int, int]]:
    """(epoch, positions that survive it) of each rung, without 0/0, which always survives; the last one is whole.

    Raises BadInput where nothing can be halved.
    """
    count, last = len({cell.key for cell in cells if not _is_baseline(cell.key)}), 0
    budgets = [args.epochs]
    while args.eta ** (last + 1) <= count:
        epochs = ceil(args.epochs / args.eta ** (last + 1))
        if epochs <= args.warmup_epochs or epochs == budgets[0]:
            break
        budgets.insert(0, epochs)
        last += 1
    if not last:
        raise BadInput(
            f"--halving has no rung here: it takes {args.eta} positions beside 0/0 (--eta), there are {count}, and "
            f"{args.eta} times as many --epochs as --warmup_epochs; leave it out"
        )
    return [(epochs, count // args.eta ** min(rung, last)) for rung, epochs in enumerate(budgets, 1)]


def _is_baseline(key) -> bool:
    return key == baseline_of(key)


def standing(cells, args, failed=()) -> Standing:
    """Where the grid stands. A position with a cell in `failed` falls at the next rung."""
    keys, fell, plan = list(dict.fromkeys(cell.key for cell in cells)), [], rungs(cells, args)
    for rung, (epochs, count) in enumerate(plan, 1):
        left = [cell for cell in cells if cell.key in keys]
        todo = [cell for cell in left if cell not in failed and not reached(cell, args, epochs)]
        if todo or rung == len(plan):
            break
        scores = {key: [_held_out(cell, args, epochs) for cell in left if cell.key == key] for key in keys}
        means = {key: np.mean(one, axis=0).round(9) for key, one in scores.items() if None not in one}
        ranked = sorted((key for key in means if not _is_baseline(key)), key=lambda key: tuple(-means[key]))
        stay = {*ranked[:count], *filter(_is_baseline, keys)}
        for key in (key for key in keys if key not in stay):
            held_out = mean_of([top1 for top1, _ in scores[key]]) if key in means else None
            fell.append({**dict(zip(AXES, key)), "rung": rung, "epochs": epochs, "val_top1": held_out})
        keys = [key for key in keys if key in stay]
    return Standing(rung, epochs, todo, left, fell, _share(plan, rung, keys))


def _held_out(cell, args, epochs) -> tuple[float, float] | None:
    """Held-out accuracy and minus the loss of the best epoch until that one, chosen as the weights of a cell are."""
    records = read_json_lines(folder_of(cell, args) / "log.txt") if reached(cell, args, epochs) else []
    found = [selection_key(r) for r in records if r.get("epoch", epochs + 1) <= epochs]
    return max(found, default=None)


def _share(plan, rung, keys) -> float:
    always, count, work = sum(map(_is_baseline, keys)), len(keys), 0
    before = plan[rung - 2][0] if rung > 1 else 0
    for epochs, survive in plan[rung - 1 :]:
        work, before, count = work + count * (epochs - before), epochs, survive + always
    return work / max(len(keys) * plan[-1][0], 1)


def run_halving(cells, args, train) -> tuple[list[GridCell], list[GridCell]]:
    """Train the cells rung by rung, and wait where other processes are training some of a rung.

    `train(cells, epochs)`, and what is returned: as of `run_cells`.
    """
    failed, before = [], 0
    while True:
        now = standing(cells, args, failed)
        if now.rung != before:
            before, positions = now.rung, len({cell.key for cell in now.left})
            say(f"rung {now.rung}: {counted(positions, 'position')} up to epoch {now.epochs}; {len(now.fell)} fell")
        busy, more = train(now.todo, now.epochs)
        failed += more
        if now.epochs == args.epochs:
            return busy, failed
        if busy:
            with signals.signals_raise("between two cells"):
                time.sleep(1)


def about(cells, args) -> dict | None:
    """What `results.summarise` needs: all positions of the grid, and those that fell; None without --halving."""
    if not args.halving:
        return None
    positions = [dict(zip(AXES, key)) for key in dict.fromkeys(cell.key for cell in cells)]
    return {"eta": args.eta, "rungs": rungs(cells, args), "positions": positions, "fell": standing(cells, args).fell}
