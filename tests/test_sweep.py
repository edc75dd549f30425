"""position_sweep.py: the statistics against figures by hand, and whole sweeps of tiny models on digits."""

import csv
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import cifar_main
import forked
import position_sweep
import utils
from checkpoints.files import load_checkpoint
from runs import TINY, noise, run, shell, tiny
from sweep import cells, results
from sweep.cells import GridCell
from tokens.layout import MODES
from training import loop, slurm
from training.run_log import read_json_lines
from utils import BadInput

RECIPE = [*TINY[: TINY.index("--num_reg")], *TINY[TINY.index("--num_reg") + 2 :], "--data_set", "DIGITS"]
RECIPE += "--epochs 2 --repeats 0.1 --batch_size 32 --lr 2e-3 --mixup 0 --cutmix 0 --amp off".split()
FOUR = [*RECIPE, *"--cls_pos 0 2 --reg_pos 0 1 --num_reg 1 --seeds 3".split()]


def sweep(capsys, folder, *argv, status=0):
    done, out, err = run(position_sweep.main, [*argv, "--output_dir", folder], capsys)
    assert done == status, out + err
    return out if status == 0 else err


def records_in(folder):
    return {file.parent.name: json.loads(file.read_text()) for file in folder.glob("cells/*/result.json")}


def epochs_of(folder):
    return {file.parent.name: len([r for r in read_json_lines(file) if "epoch" in r])
            for file in folder.glob("cells/*/log.txt")}  # fmt: skip


PANEL = (4, *cells.DESIGN.values())  # the panel of 4 registers
IMAGES = 400  # a quarter of a point each


def record(cls, reg, count, seed, test, val=None, hits=None):
    """`test` % of the test images are hits, the first ones, if `hits` are not given."""
    hits = np.arange(IMAGES) < round(test * IMAGES / 100) if hits is None else hits
    test = 100 * float(np.mean(hits))
    return {
        "cls_pos": cls, "reg_pos": reg, "num_reg": count, "seed": seed, "val_top1": test if val is None else val,
        "test_top1": test, "flops": 1000 - (cls or 0), "params": 10, "images_per_s": 5.0, "artefact_share": 0.0,
        "cls_to_patches": 90.0, "cls_to_registers": None, "cls_to_itself": 10.0, "test_images": len(hits),
        "test_hits": cells.packed(hits),
    }  # fmt: skip


# Statistics -------------------------------------------------------------------------------------------------------


def test_cells_that_are_the_same_model_are_one():
    args = position_sweep.parse("--cls_pos 0 2 none --reg_pos 0 2 --num_reg 0 4 --seeds 0 1".split())
    found = cells.grid(args)
    assert len(found) == len({cell.name for cell in found}) == 2 * (3 + 3 * 2)
    assert GridCell(2, None, 0, 1) in found and GridCell(None, 2, 4, 0) in found
    assert [cell.name for cell in found[:3]] == ["cls0_x0_seed0", "cls2_x0_seed0", "clsnone_x0_seed0"]


def test_means_and_intervals_by_hand():
    """90, 92, 97: mean 93, deviations -3, -1, 4, variance 26 / 2."""
    assert results.mean_of([90, 92, 97]) == {"n": 3, "mean": 93, "sd": 13**0.5}
    assert results.mean_of([5]) == {"n": 1, "mean": 5, "sd": None}
    differences = np.array([[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, -1, 0]])  # 3 seeds, 4 images
    seeds = stats.ttest_1samp(differences.mean(1), 0).confidence_interval(0.99)
    images = np.var([2 / 3, 0, -1 / 3, 1 / 3, -1, 1], ddof=1) / 4  # one more image each way
    half = (((seeds.high - seeds.low) / 2) ** 2 + stats.t.ppf(0.995, 5) ** 2 * images) ** 0.5
    assert results.half_width(differences, -1, 1, comparisons=5) == pytest.approx(half)


def test_paired_differences():
    late = {s: record(2, 0, 1, s, test) for s, test in ((0, 91), (1, 94), (2, 98), (7, 0))}
    base = {s: record(0, 0, 1, s, test) for s, test in ((0, 90), (1, 92), (2, 95), (9, 0))}
    found = results.paired(late, base)  # 1, 2, 3; the seeds that only one has are left out
    assert (found["seeds"], found["mean"], found["sd"]) == ([0, 1, 2], pytest.approx(2), pytest.approx(1))
    differences = np.array([cells.hits_of(late[s]) ^ cells.hits_of(base[s]) for s in (0, 1, 2)])
    half = 100 * results.half_width(differences, -1, 1)
    assert [found["low"], found["high"]] == pytest.approx([2 - half, 2 + half]) and half > 2.4841  # of seeds alone
    wider = results.paired(late, base, comparisons=11)
    assert wider["high"] > found["high"] and wider["mean"] == found["mean"]
    assert results.paired({1: late[1]}, {2: base[2]}) is None
    del late[7], late[2]
    assert "add 1 to --seeds" in results.paired(late, base)["lacks"]


def test_hits_as_text():
    hits = np.random.default_rng(0).random(361) < 0.5
    text = json.loads(json.dumps(cells.packed(hits)))
    assert np.array_equal(cells.hits_of({"test_images": 361, "test_hits": text}), hits) and len(text) < 70
    assert cells.hits_of({"test_images": 361}) is None
    for count, wrong in ((352, text), (370, text), (361, text[:-4]), (361, 3), (0, ""), (361.0, text)):
        with pytest.raises(ValueError, match="test_hits"):
            cells.hits_of({"test_images": count, "test_hits": wrong})


def summary_of(*groups):
    """`groups`: (cls_pos, test accuracies) or (cls_pos, test, held-out accuracies)."""
    records = []
    for cls, tests, *vals in groups:
        records += [record(cls, 0, 4, s, t, v) for s, (t, v) in enumerate(zip(tests, vals[0] if vals else tests))]
    return results.summarise(records)


def test_the_verdict():
    clear = summary_of((0, [80.0, 81.0, 82.0]), (2, [95.0, 96.25, 97.0]), (4, [70.0, 70.0, 70.0]))
    assert clear["best"] == {"cls_pos": 2, "reg_pos": 0, "num_reg": 4} and clear["comparisons"] == 2
    assert "+15.08 points against 0/0" in clear["verdict"] and "corrected for 2 comparisons" in clear["verdict"]
    assert "better beyond seed and image noise" in clear["verdict"]
    noise = summary_of((0, [90.0, 95.0, 92.0]), (2, [93.0, 92.0, 94.0]))
    assert "no difference beyond seed and image noise" in noise["verdict"]
    # enough for one comparison, but it was the best of six
    close = [(0, [80.0, 81.0, 82.0]), (2, [82.0, 83.5, 84.0])]
    assert "better beyond" in summary_of(*close)["verdict"]
    others = [(cls, [50.0, 50.0, 50.0]) for cls in (3, 4, 5, 6)]
    assert "no difference beyond" in summary_of(*close, *others)["verdict"]
    assert "No cell with tokens that enter later is better" in summary_of((0, [90, 91]), (2, [80, 81]))["verdict"]
    assert "no 0/0 cell" in summary_of((1, [90, 92]), (2, [95, 96]))["verdict"]


def test_the_table_and_the_verdict_have_one_interval():
    summary = summary_of((0, [80.0, 81.0, 82.0]), (2, [95.0, 96.25, 97.0]), (4, [70.0, 70.0, 70.0]))
    found = next(row["against_0_0"] for row in summary["groups"] if row["cls_pos"] == 2)
    low, high = f"{found['low']:+.2f}", f"{found['high']:+.2f}"
    assert f"{low} to {high}" in summary["verdict"] and f"({low} to {high})" in results.markdown(summary)
    assert "95 % for all 2 comparisons together, over seeds and test images" in results.markdown(summary)


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_or_two_seeds_give_no_verdict(seeds):
    """One image better with each seed: the differences have no variance at all."""
    summary = summary_of((0, [90.0] * seeds), (2, [90.25] * seeds))
    assert f"+0.25 points against 0/0; no verdict: it needs 3 common seeds, there are {seeds}" in summary["verdict"]
    assert f"add {3 - seeds} to --seeds" in summary["verdict"] and "beyond" not in summary["verdict"]
    assert "| +0.25 |" in results.markdown(summary).replace("*", "")
    three = summary_of((0, [90.0] * 3), (2, [90.25] * 3))["verdict"]
    assert "no difference beyond seed and image noise" in three and "+0.25 to +0.25" not in three


def test_cells_without_hits_give_no_verdict():
    """Those that an earlier revision finished, and those that were tested on other images."""
    records = [record(cls, 0, 4, s, 80 + 5 * cls) for cls in (0, 2) for s in (0, 1, 2)]
    assert "better beyond" in results.summarise(records)["verdict"]
    fewer = [record(0, 0, 4, 0, 0, hits=np.arange(8) < 5), *records[1:]]
    assert "no verdict: the cells were tested on different images" in results.summarise(fewer)["verdict"]
    del records[0]["test_hits"]
    found = results.summarise(records)
    assert "no verdict: it needs the hits on each test image" in found["verdict"] and "+10.00" in found["verdict"]
    assert results.margins(records, "cls_pos")[PANEL][0]["low"] is None


def test_the_best_cell_is_chosen_on_held_out_images():
    found = summary_of((0, [90, 90], [80, 80]), (2, [99, 99], [70, 70]), (4, [60, 60], [95, 95]))
    assert found["best"]["cls_pos"] == 4 and "60.00" in found["verdict"]


def test_the_best_cell_is_one_of_those_with_most_seeds():
    found = summary_of((0, [90, 91]), (2, [92, 93]), (4, [99]))
    assert found["best"]["cls_pos"] == 2


def test_a_tie_is_named_and_fewer_flops_win():
    """0.1 + 0.2 is not 0.3, but as good."""
    found = summary_of((0, [90, 90], [0.3, 0]), (2, [99, 99], [0.1, 0.2]), (4, [60, 60], [0, 0.3]), (5, [9, 9], [0, 0]))
    assert found["best"]["cls_pos"] == 4 and [row["cls_pos"] for row in found["tied"]] == [2, 0]
    assert (
        "CLS at 4, 4 registers at 0 (tied with CLS at 2, 4 registers at 0; CLS at 0, 4 registers at 0: the one with "
        "the fewest FLOPs is taken), 60.00" in found["verdict"]
    )
    many = summary_of(*((cls, [90, 90]) for cls in range(6)))
    assert len(many["tied"]) == 5 and "CLS at 2, 4 registers at 0; and 2 more: the one" in many["verdict"]
    assert "tied" not in summary_of((0, [90, 90]), (2, [99, 99]))["verdict"]


def simulated(rng, seeds, better=0.0, cells=6, images=360):
    """The records of a grid of equal cells, or of one that is better by `better` in its logits.

    Logits of a hit: how easy an image is, for all cells and for each; how lucky a seed is, for all cells and for each,
    on test and held-out images alike. A third of the grids have little of a kind, a third much.
    """
    of_image, of_seed = rng.choice((0, 0.5, 2), 2)
    logits = rng.normal(3, 2, images) + rng.normal(0, of_image, (cells, 1, images))
    luck = rng.normal(0, 0.3, (seeds, 1)) + rng.normal(0, of_seed / 4, (cells, seeds, 1))
    luck[1] += better
    hits = rng.random((cells, seeds, images)) < 1 / (1 + np.exp(-logits - luck))
    held_out = hits.mean(-1) + luck[..., 0] / 20 + rng.normal(0, 0.02, (cells, seeds))
    return [record(c, 0, 4, s, 0, 100 * held_out[c, s], hits[c, s]) for c in range(cells) for s in range(seeds)]


def found_different(summary):
    """Whether the verdict, or an interval of the table, says that cells differ."""
    rows = [row["against_0_0"] for row in summary["groups"] if row["against_0_0"]]
    outside = any(row["low"] is not None and not row["low"] <= 0 <= row["high"] for row in rows)
    return outside or "better beyond" in summary["verdict"] or "worse beyond" in summary["verdict"]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_of_1000_grids_of_equal_cells_few_are_found_different(seeds):
    rng = np.random.default_rng(seeds)
    false = sum(found_different(results.summarise(simulated(rng, seeds))) for _ in range(1000))
    assert false <= (0 if seeds < 3 else 50)


def test_a_difference_is_found():
    """Accuracies of about 84 and 94 %, 5 seeds: most sweeps say so, and of the right cell."""
    rng = np.random.default_rng(0)
    verdicts = [results.summarise(simulated(rng, 5, better=2.5))["verdict"] for _ in range(100)]
    right = [v for v in verdicts if "images: CLS at 1," in v and "better beyond seed and image noise" in v]
    assert len(right) >= 80 and not any("worse beyond" in v for v in verdicts)


def test_margins():
    """Seed 1 lacks a cell, so it does not count."""
    tests = {(0, 0): 10, (0, 2): 20, (4, 0): 30, (4, 2): 60}
    every = [record(c, r, 4, s, t + s) for (c, r), t in tests.items() for s in (0, 1, 2)]
    records = [r for r in every if (r["cls_pos"], r["reg_pos"], r["seed"]) != (4, 2, 1)]
    found = results.margins(records, "cls_pos")[PANEL]
    assert {x: (point["n"], point["mean"], point["low"]) for x, point in found.items()} == {
        0: (2, pytest.approx(16), None), 4: (2, pytest.approx(46), None)
    }  # fmt: skip
    found = results.margins(records, "reg_pos")[PANEL]
    assert {x: point["mean"] for x, point in found.items()} == {0: pytest.approx(21), 2: pytest.approx(41)}
    point = results.margins(every, "cls_pos")[PANEL][0]  # of three seeds, there are intervals
    hits = [[np.arange(IMAGES) < 4 * (t + s) for t in (10, 20)] for s in (0, 1, 2)]
    half = 100 * results.half_width(np.mean(hits, 1), 0, 1)
    assert [point["low"], point["high"]] == pytest.approx([16 - half, 16 + half])


# Sweeps -----------------------------------------------------------------------------------------------------------


def dies_in_the_second_cell():
    """In its second epoch."""
    work, calls = loop.train_one_epoch, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*args, **kwargs)

    loop.train_one_epoch = dies


def test_a_killed_sweep_resumes_and_each_cell_is_a_run_of_cifar_main(tmp_path, capsys):
    """Two by two; killed in the second cell. Afterwards every weight is that of cifar_main.py, bit for bit."""
    folder = tmp_path / "sweep"
    killed = forked.run([*FOUR, "--output_dir", folder], position_sweep.main, dies_in_the_second_cell)
    assert killed[0] == 128 + signal.SIGKILL, killed
    assert list(records_in(folder)) == ["cls0_reg0_x1_seed3"]
    assert epochs_of(folder) == {"cls0_reg0_x1_seed3": 2, "cls0_reg1_x1_seed3": 1}
    listed = sweep(capsys, folder, *FOUR, "--dry_run")
    assert listed.count("to do  ") == 3 and "finished" in listed and "4 cells, 3 to do: less than 1 min" in listed
    out = sweep(capsys, folder, *FOUR)
    assert "resuming after epoch 1" in out and "finished CLS at 0, 1 register at 1, seed 3; 2 of 4 cells left" in out
    assert epochs_of(folder) == dict.fromkeys(records_in(folder), 2) and len(records_in(folder)) == 4
    assert "epoch 1/2" not in sweep(capsys, folder, *FOUR)  # nothing is left to do
    for cls, reg in ((0, 1), (2, 0)):
        argv = [*RECIPE, "--cls_pos", cls, "--reg_pos", reg, "--num_reg", 1, "--seed", 3]
        status, out, err = run(cifar_main.main, [*argv, "--model_path", tmp_path / f"{cls}{reg}/m.pth"], capsys)
        assert status == 0, err
        cell = f"cls{cls}_reg{reg}_x1_seed3"
        files = folder / "cells" / cell / "model.pth", tmp_path / f"{cls}{reg}/m.pth"
        there, here = (load_checkpoint(file)["model"] for file in files)
        assert all(torch.equal(there[name], here[name]) for name in here) and there.keys() == here.keys()
        assert f"Test accuracy: {records_in(folder)[cell]['test_top1']:.2f}%" in out
    check_files(folder)


def check_files(folder):
    from pypdf import PdfReader

    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    found = records_in(folder)
    assert [(r["cls_pos"], r["reg_pos"], r["num_reg"], r["seed"]) for r in rows] == [
        ("0", "0", "1", "3"), ("0", "1", "1", "3"), ("2", "0", "1", "3"), ("2", "1", "1", "3")
    ]  # fmt: skip
    for row in rows:
        cell = found[f"cls{row['cls_pos']}_reg{row['reg_pos']}_x1_seed3"]
        assert float(row["test_top1"]) == cell["test_top1"] and int(row["flops"]) == cell["flops"] > 0
        shares = [float(row[f"cls_to_{kind}"]) for kind in ("patches", "registers", "itself")]
        assert sum(shares) == pytest.approx(100, abs=1e-3)
    everything = json.loads((folder / "results.json").read_text())
    assert len(everything["cells"]) == len(everything["groups"]) == 4
    assert everything["verdict"] in (folder / "results.md").read_text()
    text = [" ".join(page.extract_text().split()) for page in PdfReader(folder / "sweep.pdf").pages]
    for row in rows:
        assert f"{float(row['test_top1']):.2f}" in text[0]
    assert "One position at a time" in text[1] and "MFLOPs of a forward pass" in text[2]
    assert (folder / "sweep.png").stat().st_size > 10_000
    assert not list(folder.glob("cells/*/checkpoint.pth"))


def test_two_workers_on_one_folder_do_each_cell_once(tmp_path):
    argv = [*FOUR, "--output_dir", tmp_path, "--epochs", "3", "--repeats", "0.5"]
    both = [forked.Child(argv, forked.script("position_sweep.py")) for _ in range(2)]
    ends = [worker.end(240) for worker in both]
    assert [status for status, _, _ in ends] == [0, 0], ends
    said = [out for _, out, _ in ends]
    assert all("Test accuracy" in out for out in said)  # both had something to do
    assert sum(out.count("Test accuracy") for out in said) == 4
    assert len(records_in(tmp_path)) == 4 and set(epochs_of(tmp_path).values()) == {3}
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 4


def test_shards_and_submitit(tmp_path, capsys, monkeypatch):
    """A shard by hand; the other cell by a job of the local executor; two jobs take a shard each."""
    pytest.importorskip("submitit")
    argv = [*RECIPE, *"--epochs 1 --cls_pos 0 1 --reg_pos 0 --num_reg 0 --seeds 0".split()]
    sweep(capsys, tmp_path, *argv, "--shard", "1/2")
    assert set(records_in(tmp_path)) == {"cls1_x0_seed0"}
    submitted = "--launcher submitit --cluster local --jobs".split()
    out = sweep(capsys, tmp_path, *argv, *submitted, "1")
    assert set(records_in(tmp_path)) == {"cls0_x0_seed0", "cls1_x0_seed0"} and "Best on the held-out images" in out
    (said,) = (tmp_path / "submitit").glob("*_log.out")
    assert said.read_text().count("Test accuracy") == 1
    given = []
    executor = SimpleNamespace(
        map_array=lambda task, parts: given.extend([*task.command, *part] for part in parts) or []
    )
    monkeypatch.setattr(slurm, "executor", lambda *_, **__: executor)
    sweep(capsys, tmp_path, *argv, *submitted, "2")
    assert [command[-2:] for command in given] == [["--shard", "0/2"], ["--shard", "1/2"]]
    assert not any("--launcher" in command or "--jobs" in command for command in given)


def test_the_seconds_that_are_left_by_hand(tmp_path):
    """Two of four cells are finished: 6 and 10 s for each FLOP of training, and 3 s of measuring, of one of them."""
    args = position_sweep.parse([*FOUR, "--repeats", "1", "--output_dir", str(tmp_path)])
    grid = cells.grid(args)
    for cell, rate, more in ((grid[0], 6, {"measure_seconds": 3}), (grid[1], 10, {})):
        folder = cells.folder_of(cell, args)
        folder.mkdir(parents=True)
        work = {"flops": 10, "repeats": 2, "train_seconds": 20 * rate}
        one = record(cell.cls_pos, cell.reg_pos, 1, 3, 90) | {"best_epoch": 1, "test_top5": 99, "test_loss": 0.5} | more
        (folder / "result.json").write_text(json.dumps(one | work | {"artefacts_begin_at": None}))
    work = sum(cells.flops(cell, args) for cell in grid[2:])
    assert cells.seconds_left(grid, args, None, None) == work * 8 + 2 * 1.5


@pytest.fixture
def processes(monkeypatch):
    """What the processes of a sweep would be started with: (arguments, environment); `test_workers_of_a_sweep_...`
    starts them."""
    processes, ended = [], subprocess.CompletedProcess([], 0)
    ended.poll, ended.terminate, ended.wait = (lambda: 0), (lambda: None), (lambda: 0)
    monkeypatch.setattr(subprocess, "Popen", lambda argv, env=None, **_: processes.append((argv, env)) or ended)
    monkeypatch.setattr(position_sweep, "settings", lambda *_: {})  # which asks git, by a process
    return processes


def test_a_process_for_each_gpu(tmp_path, capsys, monkeypatch, processes):
    """Of those that the job was given."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-5a,7")
    argv = [*RECIPE, *"--epochs 1 --cls_pos 0 1 --reg_pos 0 --num_reg 0 --seeds 0".split()]
    sweep(capsys, tmp_path, *argv, "--gpus", "2")
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in processes] == ["4", "GPU-5a"]
    assert sorted(file.name for file in (tmp_path / "workers").iterdir()) == ["gpu0.log", "gpu1.log"]


def test_processes_that_share_the_cores(tmp_path, capsys, monkeypatch, processes):
    """Each is given its share of the threads, and takes cells as those of --gpus do."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    at = RECIPE.index("--num_threads")
    argv = [*RECIPE[:at], *RECIPE[at + 2 :], *"--cls_pos 0 1 --reg_pos 0 --num_reg 0 --seeds 0 --workers 2".split()]
    sweep(capsys, tmp_path, *argv)
    given = [argv for argv, _ in processes]
    assert len(given) == 2 and all(one[-2:] == ["--num_threads", "2"] and "--workers" not in one for one in given)
    assert sorted(file.name for file in (tmp_path / "workers").iterdir()) == ["worker0.log", "worker1.log"]


def test_gpus_that_a_process_may_use(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for listed, names in (("4,5", ["4", "5"]), ("MIG-1/2, 3", ["MIG-1/2", "3"]), ("0,1,-1,2", ["0", "1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert position_sweep.visible_gpus() == names
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    status, _, err = run(position_sweep.main, ["--gpus", "3"], capsys)
    assert status == 2 and "--gpus 3: there are 2 GPUs (CUDA_VISIBLE_DEVICES=4,5)" in err
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert position_sweep.visible_gpus() == ["0", "1"]


def test_workers_of_a_sweep_that_is_stopped_save_and_end(tmp_path):
    """SIGTERM to the process that only waits; the workers would train for minutes."""

    def two_gpus():
        torch.cuda.device_count = lambda: 2
        os.environ["CUDA_VISIBLE_DEVICES"] = "4,5"

    argv = [*RECIPE, *"--epochs 3000 --cls_pos 0 1 --reg_pos 0 --num_reg 0 --seeds 0 --gpus 2 --output_dir".split()]

    def main(_):
        two_gpus()
        threading.Thread(target=stop_when_both_train, args=(os.getpid(),), daemon=True).start()
        position_sweep.main([*argv, str(tmp_path)])

    def stop_when_both_train(process):
        while len(list(tmp_path.glob("cells/*/checkpoint.pth"))) < 2:
            time.sleep(0.1)
        os.kill(process, signal.SIGTERM)

    status, out, err = forked.run([], main)
    assert status == 143 and "the same command resumes" in err, out + err
    for log in sorted(tmp_path.glob("workers/*.log")):
        assert "stopped by SIGTERM: its progress is saved; the same command resumes" in log.read_text()
    assert not list(tmp_path.glob("cells/*/running.json"))


def test_surgery_and_equal_flops(tmp_path, trained, capsys):
    """Each cell begins with the trained weights, and late cells go through more images for the same FLOPs."""
    argv = [*RECIPE, *"--cls_pos 0 2 --reg_pos 0 --num_reg 1 2 --seeds 0 --epochs 1 --lr 1e-9".split()]
    out = sweep(capsys, tmp_path, *argv, "--from", trained / "model.pth", "--equal_flops")
    assert out.count("--finetune: loaded") == 4
    first = load_checkpoint(trained / "model.pth")["model"]["cls_token"]
    for name, cell in records_in(tmp_path).items():
        weights = load_checkpoint(tmp_path / "cells" / name / "model.pth")["model"]
        torch.testing.assert_close(weights["cls_token"], first, atol=1e-5, rtol=0)
        base = next(c for c in records_in(tmp_path).values() if c["cls_pos"] == 0 and c["num_reg"] == cell["num_reg"])
        assert cell["repeats"] * cell["flops"] == pytest.approx(0.1 * base["flops"])
        assert (cell["repeats"] > 0.1) == (cell["cls_pos"] == 2)


def test_other_settings_are_refused_unless_mixed(tmp_path, capsys, monkeypatch):
    one = [*RECIPE, *"--cls_pos 0 --reg_pos 0 --num_reg 0 --seeds 0 --epochs 1".split()]
    sweep(capsys, tmp_path, *one)
    for change, words in (
        (["--epochs", "2"], "epochs was 1, is now 2"), (["--lr", "1e-2"], "lr was 0.002, is now 0.01"),
        (["--val_size", "100"], "data: images was"), (["--depth", "2"], "depth was 3, is now 2"),
    ):  # fmt: skip
        err = sweep(capsys, tmp_path, *one, *change, status=2)
        assert words in err and "--mix" in err and err.count("\n") == 1
    monkeypatch.setattr(cells, "git_revision", lambda: "another")
    assert "code was" in sweep(capsys, tmp_path, *one, status=2)
    assert "Test accuracy" not in sweep(capsys, tmp_path, *one, "--mix")  # finished is finished
    sweep(capsys, tmp_path, *one, "--cls_pos", "0", "1", "--mix")
    assert len(records_in(tmp_path)) == 2


def test_an_unfinished_cell_of_other_settings_begins_anew(tmp_path, capsys):
    one = [*RECIPE, *"--cls_pos 0 --reg_pos 0 --num_reg 0 --seeds 0".split()]
    sweep(capsys, tmp_path, *one)
    folder = tmp_path / "cells" / "cls0_x0_seed0"
    (folder / "result.json").unlink()
    (folder / "model.pth").rename(folder / "checkpoint.pth")  # nothing to resume from, if it were tried
    sweep(capsys, tmp_path, *one, "--lr", "1e-3", "--mix")
    assert epochs_of(tmp_path) == {"cls0_x0_seed0": 2} and len(records_in(tmp_path)) == 1


ONE = [*RECIPE, *"--cls_pos 0 --reg_pos 0 --num_reg 0 --seeds 0".split()]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A sweep of one cell, killed after the first of its two epochs."""
    folder, work, calls = tmp_path_factory.mktemp("begun"), loop.train_one_epoch, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_one_epoch", dies)
        with pytest.raises(KeyboardInterrupt):
            position_sweep.main([*ONE, "--output_dir", str(folder)])
    return folder


@pytest.mark.parametrize("damaged", ["checkpoint.pth", "model.pth"])
def test_a_damaged_cell_is_trained_from_its_beginning(tmp_path, capsys, begun, damaged):
    """No checkpoint, or none of the best weights so far. What is damaged can still be looked at."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    cell = tmp_path / "cells" / "cls0_x0_seed0"
    os.truncate(cell / damaged, 9000)
    out = sweep(capsys, tmp_path, *ONE)
    assert f"{damaged} is no checkpoint, or a damaged one" in out and "epoch 1/2" in out
    assert "cls0_x0_seed0 cannot be resumed; it is trained from its beginning" in out
    assert "is tried" not in out and "--" not in out.partition("Best on")[0].replace("|---", "")
    assert (cell / "checkpoint.damaged").exists() == (damaged == "checkpoint.pth")
    assert epochs_of(tmp_path) == {"cls0_x0_seed0": 2} and len(records_in(tmp_path)) == 1


def test_a_damaged_cell_resumes_from_the_checkpoint_before(tmp_path, capsys, begun):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    cell = tmp_path / "cells" / "cls0_x0_seed0"
    (cell / "checkpoint.pth").rename(cell / "checkpoint_1.pth")
    (cell / "checkpoint.pth").write_bytes(b"nothing")
    out = sweep(capsys, tmp_path, *ONE)
    assert "it is checkpoint.damaged now, and checkpoint_1.pth is tried" in out
    assert "epoch 1/2" not in out and "cannot be resumed" not in out and len(records_in(tmp_path)) == 1


def test_a_checkpoint_that_is_none_of_the_cell_is_refused_without_flags_of_other_scripts(tmp_path, capsys, begun):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "cells" / "cls0_x0_seed0" / "checkpoint.pth"
    saved = load_checkpoint(newest)
    for change, words in (
        ({"step": -1}, "is damaged"), ({"data": saved["data"] | {"name": "another"}}, "differs: name is another"),
        ({"optimizer": None}, "is damaged"),
    ):  # fmt: skip
        torch.save(saved | change, newest)
        err = sweep(capsys, tmp_path, *ONE, status=2)
        assert words in err and "move that file away" in err and err.count("\n") == 1
        assert not re.search("--resume|--overwrite|--model_path|give another checkpoint", err) and newest.is_file()
    newest.unlink()
    assert "epoch 1/2" in sweep(capsys, tmp_path, *ONE)


def test_a_damaged_result_is_refused_and_one_of_an_earlier_revision_is_not(tmp_path, capsys):
    sweep(capsys, tmp_path, *ONE, "--epochs", "1")
    file = tmp_path / "cells" / "cls0_x0_seed0" / "result.json"
    record = json.loads(file.read_text())
    assert 100 * np.mean(cells.hits_of(record)) == pytest.approx(record["test_top1"])
    file.write_text(json.dumps(record | {"test_hits": cells.packed(~cells.hits_of(record))}))
    err = sweep(capsys, tmp_path, *ONE, "--epochs", "1", status=2)
    assert "test_hits missing or wrong" in err and f"remove {file.parent}" in err
    del record["test_hits"]
    file.write_text(json.dumps(record))
    assert "Best on the held-out images" in sweep(capsys, tmp_path, *ONE, "--epochs", "1")


def test_a_cell_leaves_nothing_in_the_memory(tmp_path, capsys, monkeypatch):
    """Its images are on the GPU, and something, such as a frame that an error keeps, may hold them in a circle."""
    left, alive = [], []

    class Images:
        pass

    def trains(*_):
        alive.append([there for there in left if there() is not None])
        images = Images()
        images.circle = images
        left.append(weakref.ref(images))
        raise utils.RunFailed("planted")

    monkeypatch.setattr(cells, "train_from_flags", trains)
    monkeypatch.setattr(position_sweep, "start", lambda args: torch.device("meta"))
    gc.disable()
    try:
        sweep(capsys, tmp_path, *FOUR, status=1)
    finally:
        gc.enable()
    assert alive == [[]] * 4


def test_a_cell_whose_loss_is_not_finite_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    work = cells.train_from_flags

    def fails(args, *rest):
        if args.cls_pos == 0:
            raise utils.RunFailed("epoch 1/2: the loss is nan")
        return work(args, *rest)

    monkeypatch.setattr(cells, "train_from_flags", fails)
    argv = [*RECIPE, *"--cls_pos 0 1 --reg_pos 0 --num_reg 0 --seeds 0".split()]
    assert "1 cell failed, see above: cls0_x0_seed0" in sweep(capsys, tmp_path, *argv, status=1)
    assert list(records_in(tmp_path)) == ["cls1_x0_seed0"]
    monkeypatch.undo()
    sweep(capsys, tmp_path, *argv)
    assert len(records_in(tmp_path)) == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cls_pos", "0", "7"], "CLS at 7"), (["--reg_pos", "none"], "--reg_pos"), (["--seeds"], "--seeds"),
        (["--val_size", "0"], "held-out"), (["--shard", "4/4"], "--shard"), (["--shard", "x"], "--shard"),
        (["--gpus", "9"], "--gpus 9: there are 0 GPUs"), (["--from", "no.pth"], "no.pth"),
        (["--epochs", "0"], "--epochs"), (["--gpus", "2", "--device", "cuda:1"], "cuda:1 is one GPU"),
        (["--launcher", "submitit", "--shard", "0/2"], "not allowed with"), (["--data_path", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, capsys, argv, words):
    err = sweep(capsys, tmp_path / "out", *argv, status=2)
    assert words in err and err.count("\n") == 1 and "Traceback" not in err
    assert not list(tmp_path.glob("out/cells/*"))


def test_the_script_says_its_defaults(tmp_path):
    out, _ = shell("position_sweep.py", "--dry_run", "--device", "cpu", cwd=tmp_path)
    assert len(re.findall(r"^to do", out, re.M)) == 18 and "18 cells, 18 to do: about" in out
    assert np.all([word in out for word in ("CLS at 4, 4 registers at 2, seed 1", "MFLOPs")])


# Designs ----------------------------------------------------------------------------------------------------------

DESIGNS = [*TINY, *"--data_set DIGITS --cls_pos 0 2 none --reg_pos 0 --num_reg 0 2 --seeds 0 --reg_end none 2".split(),
           *"--cls_mode token reader --reg_mode token reader --class_attention 0 2".split()]  # fmt: skip


def test_a_grid_of_designs(capsys):
    """Equal models once, none that cannot be, and what is as by default not in names of folders."""
    args = position_sweep.parse(DESIGNS)
    found = cells.grid(args)
    assert "combinations left out, as in CLS at 2" in capsys.readouterr().out  # CLS at 2 of 3 blocks, class attention 2
    names = {cell.name for cell in found}
    assert len(names) == len(found) and {"cls0_x0_seed0", "clsnone_reg0_x2_seed0"} <= names
    assert {"cls0_x0_clsreader_ca2_seed0", "cls2_reg0_x2_end2_seed0"} <= names
    assert not any("clsnone" in name and ("reader" in name or "ca2" in name) for name in names)
    for cell in found:
        model = cells.model_of(cell, args)
        assert model.model_args.get("reg_end") == cell.reg_end
        assert model.model_args.get("class_attention", 0) == cell.class_attention
    for wrong, words in ((["--reg_pos", "9"], "reg_pos 9"), (["--reg_end", "2", "9"], "leaves at 1..3, not at 9")):
        with pytest.raises(BadInput, match=words):
            cells.grid(position_sweep.parse([*DESIGNS, *wrong]))
    with pytest.raises(BadInput, match="no cell of this grid can be a model"):
        cells.grid(position_sweep.parse([*DESIGNS, *"--cls_pos 2 --num_reg 0 --class_attention 3".split()]))


def test_equal_designs_are_one():
    """Registers that leave after the last block; a mode of CLS where no other token attends to anything."""
    argv = [*DESIGNS, *"--cls_pos 1 2 none --num_reg 2 --reg_end none 3 --reg_mode token --class_attention 0 1".split()]
    found = [cell.name for cell in cells.grid(position_sweep.parse(argv))]
    of_2 = ["cls2_reg0_x2", "cls2_reg0_x2_ca1", "cls2_reg0_x2_clsreader"]
    assert [name.removesuffix("_seed0") for name in found if "cls1" not in name] == [*of_2, "clsnone_reg0_x2"]
    one, other = (tiny(cls_pos=2, class_attention=2, cls_mode=mode, num_register_tokens=1) for mode in MODES)
    torch.testing.assert_close(one(noise(one)), other(noise(one)))


def test_cells_of_designs_are_trained_and_compared(tmp_path, capsys):
    argv = [*TINY, *"--data_set DIGITS --cls_pos 0 --reg_pos 0 --num_reg 2 --seeds 0 --cls_mode token reader".split()]
    argv += "--class_attention 0 1 --reg_end none 2 --repeats 0.1 --epochs 1 --mixup 0 --cutmix 0".split()
    status, out, err = run(position_sweep.main, [*argv, "--output_dir", tmp_path], capsys)
    assert status == 0 and "| 0, CLS only reads, class attention in the last 1 | 2 | 0 |" in out, err
    records = results.collect(tmp_path)
    assert len(records) == 8 and len({results.key_of(r) for r in records}) == 8
    summary = json.loads((tmp_path / "results.json").read_text())
    base = [row for row in summary["groups"] if row["against_0_0"] is None]
    assert len(base) == 1 and (base[0]["cls_mode"], base[0]["reg_end"], base[0]["class_attention"]) == (
        "token",
        None,
        0,
    )
    assert (tmp_path / "sweep.html").is_file() and (tmp_path / "sweep.pdf").is_file()
