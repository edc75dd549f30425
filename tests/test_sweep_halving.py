"""position_sweep.py --halving: which positions fall, by logs written by hand, and small sweeps on digits."""

import json
import os
import signal
import threading
import time

import pytest
import torch

import forked
import position_sweep
from checkpoints.files import load_checkpoint
from sweep import cells, halving, measures, pages, results
from sweep.cells import GridCell
from test_sweep import RECIPE, epochs_of, record, records_in, sweep
from training import loop, run_folder
from utils import RunFailed

GRID = [*RECIPE, *"--cls_pos 0 1 2 none --reg_pos 0 --num_reg 1 --seeds 0 1 --epochs 4".split()]
HALVING = [*GRID, *"--halving --eta 2".split()]  # 3 positions and 0/0: one of them is trained whole


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(measures, "IMAGES", 16)
    monkeypatch.setattr(position_sweep.pages, "draw_sweep", lambda *_: None)
    monkeypatch.setattr(position_sweep.explorer, "write_explorer", lambda *_: None)


def begun(folder, *argv):
    args = position_sweep.parse([*HALVING, *argv, "--output_dir", str(folder)])
    return cells.grid(args), args


def log(cell, args, *values):
    """Held-out accuracies of the first epochs, or (accuracy, loss)."""
    folder = cells.folder_of(cell, args)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [value if isinstance(value, tuple) else (value, 1.0) for value in values]
    lines = [{"args": {}}, *({"epoch": i, "val_top1": a, "val_loss": b} for i, (a, b) in enumerate(pairs, 1))]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_rungs_by_hand(tmp_path):
    """18 positions, one of them 0/0: 17 // 3 = 5 and 17 // 9 = 1 stay after epochs 12 / 9 and 12 / 3."""
    argv = "--depth 6 --cls_pos 0 1 2 3 4 5 --reg_pos 0 1 2 --epochs 12 --eta 3 --warmup_epochs".split()
    assert halving.rungs(*begun(tmp_path, *argv, "1.2")) == [(2, 5), (4, 1), (12, 1)]
    assert halving.rungs(*begun(tmp_path, *argv, "2")) == [(4, 5), (12, 5)]  # epoch 2 only ends the warm-up
    assert halving.rungs(*begun(tmp_path, *argv, "0", "--epochs", "3")) == [(1, 5), (3, 5)]  # none of 1/3 epoch


def test_what_cannot_be_halved(tmp_path, capsys):
    for argv, words in (
        (["--eta", "4"], "it takes 4 positions beside 0/0 (--eta), there are 3"), (["--epochs", "1"], "--epochs"),
        (["--warmup_epochs", "2"], "as --warmup_epochs"), (["--shard", "0/2"], "--shard"), (["--mix"], "--mix"),
        (["--max_steps", "3"], "--max_steps"), (["--eta", "1"], "--eta"),
    ):  # fmt: skip
        err = sweep(capsys, tmp_path / "out", *HALVING, *argv, status=2)
        assert words in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out/cells/*"))


def where(now):
    return now.rung, now.epochs, len(now.todo), [(row["cls_pos"], row["rung"]) for row in now.fell]


def test_a_position_stands_or_falls_with_all_its_seeds(tmp_path):
    """By the mean over seeds of the best epoch so far: 30, 35 and 32.5; 0/0 is the worst and stays."""
    grid, args = begun(tmp_path)
    assert where(halving.standing(grid, args)) == (1, 2, 8, [])
    assert halving.standing(grid, args).share == pytest.approx((4 * 2 + 2 * 2) / (4 * 4))
    values = {0: ([1, 2], [2, 1]), 1: ([0, 50], [0, 10]), 2: ([35, 0], [0, 35, 99]), None: ([65, 60], [0, 0])}
    for cell in grid:
        log(cell, args, *values[cell.cls_pos][cell.seed])
    now = halving.standing(grid, args)  # epoch 3 counts for nothing
    assert where(now) == (2, 4, 4, [(1, 1), (None, 1)]) and {cell.cls_pos for cell in now.todo} == {0, 2}
    assert now.fell[0]["val_top1"]["mean"] == 30 and now.fell[0]["epochs"] == 2 and now.share == 1 / 2
    bar = position_sweep.tqdm(total=8, disable=True)
    position_sweep.show_finished(bar, grid, args)
    assert (bar.n, bar.total) == (0, 4)
    log(grid[0], args, 1)  # as by a damaged checkpoint: that cell is trained again before anything is decided
    assert where(halving.standing(grid, args)) == (1, 2, 1, [])


def test_of_equal_accuracies_the_lower_loss_stays_and_failed_cells_fall(tmp_path):
    grid, args = begun(tmp_path)
    for cell in grid:
        log(cell, args, (50, 9), (50, {0: 1, 1: 2, 2: 0.5, None: 3}[cell.cls_pos]))
    assert where(halving.standing(grid, args))[3] == [(1, 1), (None, 1)]
    failed = [cell for cell in grid if cell.cls_pos in (0, 2) and cell.seed == 1]
    for cell in failed:
        log(cell, args, 90)
    now = halving.standing(grid, args, failed)
    assert where(now) == (2, 4, 3, [(2, 1), (None, 1)]) and now.fell[0]["val_top1"] is None  # 0/0 stays
    assert {cell.key for cell in now.left} == {GridCell(0, 0, 1, 0).key, GridCell(1, 0, 1, 0).key}


def dies_in_epoch(number):
    work, calls = loop.train_one_epoch, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return work(*args, **kwargs)

    return dies


def weights(folder, name):
    return load_checkpoint(folder / "cells" / name / "model.pth")["model"]


def test_survivors_are_cells_that_were_never_stopped(tmp_path, capsys, monkeypatch):
    """Interrupted in both rungs; each survivor, its weights and figures are those of a sweep without halving."""
    argv = [*HALVING, "--output_dir", str(tmp_path / "halved")]
    for number in (
        6,
        15,
    ):  # 6: in the 3rd of the 8 cells of rung 1. 15: after the other 11 epochs, in the 2nd of rung 2
        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_one_epoch", dies_in_epoch(number))
            with pytest.raises(KeyboardInterrupt):
                position_sweep.main(argv)
    assert "rung 2" in capsys.readouterr().out and len(records_in(tmp_path / "halved")) == 1
    out = sweep(capsys, tmp_path / "halved", *HALVING)
    assert "rung 2: 2 positions up to epoch 4; 2 fell" in out and "rung 1" not in out
    there = records_in(tmp_path / "halved")
    epochs = epochs_of(tmp_path / "halved")
    assert len(there) == 4 and sorted(epochs.values()) == [2] * 4 + [4] * 4
    sweep(capsys, tmp_path / "whole", *GRID)
    whole, timed = records_in(tmp_path / "whole"), ("images_per_s", "train_seconds", "measure_seconds")
    for name, one in there.items():
        here, other = weights(tmp_path / "halved", name), weights(tmp_path / "whole", name)
        assert here.keys() == other.keys() and all(torch.equal(here[key], other[key]) for key in here)
        assert one | dict.fromkeys(timed) == whole[name] | dict.fromkeys(timed)
    # Without --halving, the same folder is trained to its end.
    assert "note:" not in sweep(capsys, tmp_path / "halved", *GRID)
    hits = [
        {name: one["test_hits"] for name, one in found.items()} for found in (records_in(tmp_path / "halved"), whole)
    ]
    assert hits[0] == hits[1] and len(hits[0]) == 8


def test_two_processes_share_the_rungs(tmp_path, capsys):
    """Each waits for the other's cells of a rung; both end, and the same positions fell as in one process."""
    both = [forked.Child([*HALVING, "--output_dir", tmp_path / "two"], position_sweep.main) for _ in range(2)]
    ends = [worker.end(240) for worker in both]
    assert [status for status, _, _ in ends] == [0, 0], ends
    sweep(capsys, tmp_path / "one", *HALVING)
    assert epochs_of(tmp_path / "two") == epochs_of(tmp_path / "one")
    assert records_in(tmp_path / "two").keys() == records_in(tmp_path / "one").keys()
    assert all("rung 2" in out for _, out, _ in ends)


def test_a_process_that_waits_for_others_can_be_stopped(tmp_path):
    """Another one, here this one, holds a cell of rung 1 for ever."""
    grid, args = begun(tmp_path)

    def main(argv):
        threading.Thread(target=stop_when_it_waits, args=(os.getpid(),), daemon=True).start()
        position_sweep.main([*argv, "--output_dir", str(tmp_path)])

    def stop_when_it_waits(process):
        while not all(cells.reached(cell, args, 2) for cell in grid[1:]):
            time.sleep(0.1)
        time.sleep(0.3)
        os.kill(process, signal.SIGTERM)

    with run_folder.locked(cells.folder_of(grid[0], args)):
        status, out, err = forked.run(HALVING, main)
    assert status == 143 and position_sweep.SAVED in err and "rung 2" not in out, out + err
    assert not records_in(tmp_path) and where(halving.standing(grid, args))[:3] == (1, 2, 1)


def test_a_cell_that_fails_takes_its_position_out(tmp_path, capsys, monkeypatch):
    work = cells.train_from_flags

    def fails(args, *rest):
        if args.cls_pos == 1 and args.seed == 1:
            raise RunFailed("epoch 1/4: the loss is nan")
        return work(args, *rest)

    monkeypatch.setattr(cells, "train_from_flags", fails)
    err = sweep(capsys, tmp_path, *HALVING, status=1)
    assert "1 cell failed, see above: cls1_reg0_x1_seed1" in err
    assert len(records_in(tmp_path)) == 4 and not any("cls1" in name for name in records_in(tmp_path))


def test_the_tables_name_the_rung_and_the_verdict_counts_all_positions(tmp_path, capsys):
    out = sweep(capsys, tmp_path, *HALVING, "--dry_run")
    assert "halving: there stay 1 position after epoch 2, and they are trained up to epoch 4, as is 0/0" in out
    out = sweep(capsys, tmp_path, *HALVING)
    assert "8 cells, 0 to do" in sweep(capsys, tmp_path, *HALVING, "--dry_run")
    written = json.loads((tmp_path / "results.json").read_text())
    fell = written["halving"]["fell"]
    assert len(written["groups"]) == 2 and written["comparisons"] == 3 and len(fell) == 2
    for row in fell:
        held_out = results.mean_and_sd(row["val_top1"])
        cls = "none" if row["cls_pos"] is None else row["cls_pos"]
        assert f"| {cls} | 1 | 0 | 1 | 2 | {held_out} |" in out and (row["rung"], row["epochs"]) == (1, 2)
    assert "The verdict is on those that were" in (tmp_path / "results.md").read_text()
    summary = results.summarise(results.collect(tmp_path), halved=written["halving"])
    words = [text.get_text() for text in pages.heat_maps(summary, "")[0].axes[0].texts]
    assert len(words) == 4 and words.count("fell at\nrung 1") == 2


def test_intervals_are_corrected_for_all_that_began():
    records = [record(cls, 0, 4, s, 80 + 5 * cls) for cls in (0, 2) for s in (0, 1, 2)]
    names = ("cls_pos", "reg_pos", "num_reg")
    halved = {"fell": [], "eta": 3, "rungs": [], "positions": [dict(zip(names, (c, 0, 4))) for c in range(6)]}
    found = [results.summarise(records, halved=one) for one in (None, halved)]
    assert [summary["comparisons"] for summary in found] == [1, 5]
    low = [next(row["against_0_0"]["low"] for row in one["groups"] if row["cls_pos"]) for one in found]
    assert low[1] < low[0] and "corrected for 5 comparisons" in found[1]["verdict"]
