"""position_sweep.py: the statistics against figures by hand, and whole sweeps of tiny models on digits."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from scipy import stats

import cifar_main
import forked
import position_sweep
import sweep_cells
import sweep_results
import utils
from conftest import ROOT, TINY, run, shell
from sweep_cells import GridCell

RECIPE = [*TINY[: TINY.index("--num_reg")], *TINY[TINY.index("--num_reg") + 2 :], "--data_set", "DIGITS"]
RECIPE += "--epochs 2 --repeats 0.1 --batch_size 32 --lr 2e-3 --mixup 0 --cutmix 0 --amp off".split()
FOUR = [*RECIPE, *"--cls_pos 0 2 --reg_pos 0 1 --num_reg 1 --seeds 3".split()]


def sweep(capsys, folder, *argv, status=0):
    done, out, err = run(position_sweep.main, [*argv, "--output_dir", folder], capsys)
    assert done == status, out + err
    return out if status == 0 else err


def results(folder):
    return {file.parent.name: json.loads(file.read_text()) for file in folder.glob("cells/*/result.json")}


def epochs_of(folder):
    return {file.parent.name: len([r for r in utils.read_json_lines(file) if "epoch" in r])
            for file in folder.glob("cells/*/log.txt")}  # fmt: skip


def record(cls, reg, count, seed, test, val=None):
    return {
        "cls_pos": cls, "reg_pos": reg, "num_reg": count, "seed": seed, "val_top1": test if val is None else val,
        "test_top1": test, "flops": 1000 - (cls or 0), "params": 10, "images_per_s": 5.0, "artefact_share": 0.0,
        "cls_to_patches": 90.0, "cls_to_registers": None, "cls_to_itself": 10.0,
    }  # fmt: skip


# Statistics -------------------------------------------------------------------------------------------------------


def test_cells_that_are_the_same_model_are_one():
    args = position_sweep.parse("--cls_pos 0 2 none --reg_pos 0 2 --num_reg 0 4 --seeds 0 1".split())
    cells = sweep_cells.grid(args)
    assert len(cells) == len({cell.name for cell in cells}) == 2 * (3 + 3 * 2)
    assert GridCell(2, None, 0, 1) in cells and GridCell(None, 2, 4, 0) in cells
    assert [cell.name for cell in cells[:3]] == ["cls0_x0_seed0", "cls2_x0_seed0", "clsnone_x0_seed0"]


def test_means_and_paired_differences_by_hand():
    """90, 92, 97: mean 93, deviations -3, -1, 4, variance 26 / 2; Student's t for 2 degrees of freedom is 4.3027."""
    found = sweep_results.mean_of([90, 92, 97])
    half = 4.302653 * 13**0.5 / 3**0.5
    assert (found["n"], found["mean"]) == (3, 93)
    assert [found[k] for k in ("sd", "low", "high")] == pytest.approx([13**0.5, 93 - half, 93 + half])
    assert sweep_results.mean_of([5]) == {"n": 1, "mean": 5, "sd": None, "low": None, "high": None}
    late = {s: record(2, 0, 1, s, test) for s, test in ((0, 91), (1, 94), (2, 98), (7, 0))}
    base = {s: record(0, 0, 1, s, test) for s, test in ((0, 90), (1, 92), (2, 95), (9, 0))}
    found = sweep_results.paired(late, base)  # 1, 2, 3; the seeds that only one has are left out
    assert (found["seeds"], found["mean"], found["sd"]) == ([0, 1, 2], 2, 1)
    assert found["p"] == pytest.approx(stats.ttest_rel([91, 94, 98], [90, 92, 95]).pvalue)
    assert sweep_results.paired({1: late[1]}, {2: base[2]}) is None
    assert sweep_results.paired({1: late[1]}, base)["p"] is None


def summary_of(*groups):
    """`groups`: (cls_pos, test accuracies) or (cls_pos, test, held-out accuracies)."""
    records = []
    for cls, tests, *vals in groups:
        records += [record(cls, 0, 4, s, t, v) for s, (t, v) in enumerate(zip(tests, vals[0] if vals else tests))]
    return sweep_results.summarise(records)


def test_the_verdict():
    clear = summary_of((0, [90.0, 91.0, 92.0]), (2, [95.0, 96.1, 97.0]), (4, [80.0, 80.0, 80.0]))
    assert clear["best"] == {"cls_pos": 2, "reg_pos": 0, "num_reg": 4}
    assert "+5.03 points against 0/0" in clear["verdict"] and "better beyond seed noise" in clear["verdict"]
    noise = summary_of((0, [90.0, 95.0, 92.0]), (2, [93.0, 92.0, 94.0]))
    assert "no difference beyond seed noise" in noise["verdict"]
    # p = 0.03 for one comparison, but it was the best of six
    close = [(0, [90.0, 91.0, 92.0]), (2, [91.0, 92.4, 92.9])]
    assert "better beyond" in summary_of(*close)["verdict"]
    others = [(cls, [50.0, 50.0, 50.0]) for cls in (3, 4, 5, 6)]
    assert "no difference beyond" in summary_of(*close, *others)["verdict"]
    assert "No cell with tokens that enter later is better" in summary_of((0, [90, 91]), (2, [80, 81]))["verdict"]
    assert "of one seed" in summary_of((0, [90]), (2, [95]))["verdict"]
    assert "no 0/0 cell" in summary_of((1, [90, 92]), (2, [95, 96]))["verdict"]


def test_the_best_cell_is_chosen_on_held_out_images():
    found = summary_of((0, [90, 90], [80, 80]), (2, [99, 99], [70, 70]), (4, [60, 60], [95, 95]))
    assert found["best"]["cls_pos"] == 4 and "60.00" in found["verdict"]


def test_the_best_cell_is_one_of_those_with_most_seeds():
    found = summary_of((0, [90, 91]), (2, [92, 93]), (4, [99]))
    assert found["best"]["cls_pos"] == 2


def test_margins():
    """Seed 1 lacks a cell, so it does not count."""
    tests = {(0, 0): 10, (0, 2): 20, (4, 0): 30, (4, 2): 60}
    records = [record(c, r, 4, s, t + s) for (c, r), t in tests.items() for s in (0, 1, 2) if (c, r, s) != (4, 2, 1)]
    found = sweep_results.margins(records, "cls_pos")[4]
    assert {x: (point["n"], point["mean"]) for x, point in found.items()} == {0: (2, 16), 4: (2, 46)}
    found = sweep_results.margins(records, "reg_pos")[4]
    assert {x: point["mean"] for x, point in found.items()} == {0: 21, 2: 41}


# Sweeps -----------------------------------------------------------------------------------------------------------


DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import cifar_train, position_sweep
train_one_epoch, calls = cifar_train.train_one_epoch, []
def dies(*args, **kwargs):
    calls.append(1)
    if len(calls) == 4:  # in the second epoch of the second cell
        os.kill(os.getpid(), signal.SIGKILL)
    return train_one_epoch(*args, **kwargs)
cifar_train.train_one_epoch = dies
position_sweep.main(sys.argv[1:])
"""


def test_a_killed_sweep_goes_on_and_each_cell_is_a_run_of_cifar_main(tmp_path, capsys):
    """Two by two; killed in the second cell. Afterwards every weight is that of cifar_main.py, bit for bit."""
    folder = tmp_path / "sweep"
    killed = [sys.executable, "-c", DIES.format(root=str(ROOT)), *FOUR, "--output_dir", str(folder)]
    done = subprocess.run(killed, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(results(folder)) == ["cls0_reg0_x1_seed3"]
    assert epochs_of(folder) == {"cls0_reg0_x1_seed3": 2, "cls0_reg1_x1_seed3": 1}
    listed = sweep(capsys, folder, *FOUR, "--dry_run")
    assert listed.count("to do  ") == 3 and "finished" in listed and "4 cells, 3 to do: about < 1 min" in listed
    out = sweep(capsys, folder, *FOUR)
    assert "going on after epoch 1" in out and "finished CLS at 0, 1 registers at 1, seed 3; 2 of 4 cells left" in out
    assert epochs_of(folder) == dict.fromkeys(results(folder), 2) and len(results(folder)) == 4
    assert "epoch 1/2" not in sweep(capsys, folder, *FOUR)  # nothing is left to do
    for cls, reg in ((0, 1), (2, 0)):
        argv = [*RECIPE, "--cls_pos", cls, "--reg_pos", reg, "--num_reg", 1, "--seed", 3]
        status, out, err = run(cifar_main.main, [*argv, "--model_path", tmp_path / f"{cls}{reg}/m.pth"], capsys)
        assert status == 0, err
        cell = f"cls{cls}_reg{reg}_x1_seed3"
        files = folder / "cells" / cell / "model.pth", tmp_path / f"{cls}{reg}/m.pth"
        there, here = (utils.load_checkpoint(file)["model"] for file in files)
        assert all(torch.equal(there[name], here[name]) for name in here) and there.keys() == here.keys()
        assert f"Test accuracy: {results(folder)[cell]['test_top1']:.2f}%" in out
    check_files(folder)


def check_files(folder):
    from pypdf import PdfReader

    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    found = results(folder)
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
    command = [sys.executable, str(ROOT / "position_sweep.py"), *FOUR, "--output_dir", str(tmp_path)]
    command += ["--epochs", "3", "--repeats", "0.5"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [worker.communicate(timeout=240)[0] for worker in both]
    assert [worker.returncode for worker in both] == [0, 0]
    assert all("Test accuracy" in out for out in said)  # both had something to do
    assert sum(out.count("Test accuracy") for out in said) == 4
    assert len(results(tmp_path)) == 4 and set(epochs_of(tmp_path).values()) == {3}
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 4


def test_shards_and_submitit(tmp_path, capsys):
    """Two jobs of the local executor, a shard each."""
    pytest.importorskip("submitit")
    argv = [*RECIPE, *"--epochs 1 --cls_pos 0 1 --reg_pos 0 --num_reg 0 --seeds 0".split()]
    out = sweep(capsys, tmp_path, *argv, *"--launcher submitit --cluster local --jobs 2".split())
    assert set(results(tmp_path)) == {"cls0_x0_seed0", "cls1_x0_seed0"} and "Best on the held-out images" in out
    said = [file.read_text() for file in sorted((tmp_path / "submitit").glob("*_log.out"))]
    assert [text.count("Test accuracy") for text in said] == [1, 1]


def test_a_process_for_each_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    argv = [*RECIPE, *"--epochs 1 --cls_pos 0 1 --reg_pos 0 --num_reg 0 --seeds 0".split()]
    sweep(capsys, tmp_path, *argv, "--gpus", "2")
    assert len(results(tmp_path)) == 2
    said = "".join(file.read_text() for file in sorted((tmp_path / "workers").glob("gpu?.log")))
    assert said.count("Test accuracy") == 2


def test_workers_of_a_sweep_that_is_stopped_save_and_end(tmp_path):
    """SIGTERM to the process that only waits; the workers would train for minutes."""

    def two_gpus():
        torch.cuda.device_count = lambda: 2

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
    assert status == 143 and "the same command goes on" in err, out + err
    for log in sorted(tmp_path.glob("workers/*.log")):
        assert "stopped by SIGTERM: what was trained is saved; the same command goes on" in log.read_text()
    assert not list(tmp_path.glob("cells/*/running.json"))


def test_surgery_and_equal_flops(tmp_path, trained, capsys):
    """Each cell begins with the trained weights, and late cells go through more images for the same FLOPs."""
    argv = [*RECIPE, *"--cls_pos 0 2 --reg_pos 0 --num_reg 1 2 --seeds 0 --epochs 1 --lr 1e-9".split()]
    out = sweep(capsys, tmp_path, *argv, "--from", trained / "model.pth", "--equal_flops")
    assert out.count("--finetune: loaded") == 4
    first = utils.load_checkpoint(trained / "model.pth")["model"]["cls_token"]
    for name, cell in results(tmp_path).items():
        weights = utils.load_checkpoint(tmp_path / "cells" / name / "model.pth")["model"]
        torch.testing.assert_close(weights["cls_token"], first, atol=1e-5, rtol=0)
        base = next(c for c in results(tmp_path).values() if c["cls_pos"] == 0 and c["num_reg"] == cell["num_reg"])
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
    monkeypatch.setattr(utils, "environment", lambda: {"git": "another"})
    assert "code was" in sweep(capsys, tmp_path, *one, status=2)
    assert "Test accuracy" not in sweep(capsys, tmp_path, *one, "--mix")  # finished is finished
    sweep(capsys, tmp_path, *one, "--cls_pos", "0", "1", "--mix")
    assert len(results(tmp_path)) == 2


def test_an_unfinished_cell_of_other_settings_begins_anew(tmp_path, capsys):
    one = [*RECIPE, *"--cls_pos 0 --reg_pos 0 --num_reg 0 --seeds 0".split()]
    sweep(capsys, tmp_path, *one)
    folder = tmp_path / "cells" / "cls0_x0_seed0"
    (folder / "result.json").unlink()
    (folder / "model.pth").rename(folder / "checkpoint.pth")  # nothing to resume from, if it were tried
    sweep(capsys, tmp_path, *one, "--lr", "1e-3", "--mix")
    assert epochs_of(tmp_path) == {"cls0_x0_seed0": 2} and len(results(tmp_path)) == 1


def test_a_cell_whose_loss_is_not_finite_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    work = sweep_cells.train_from_flags

    def fails(args, *rest):
        if args.cls_pos == 0:
            raise utils.RunFailed("epoch 1/2: the loss is nan")
        return work(args, *rest)

    monkeypatch.setattr(sweep_cells, "train_from_flags", fails)
    argv = [*RECIPE, *"--cls_pos 0 1 --reg_pos 0 --num_reg 0 --seeds 0".split()]
    assert "1 cells failed, see above: cls0_x0_seed0" in sweep(capsys, tmp_path, *argv, status=1)
    assert list(results(tmp_path)) == ["cls1_x0_seed0"]
    monkeypatch.undo()
    sweep(capsys, tmp_path, *argv)
    assert len(results(tmp_path)) == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cls_pos", "0", "7"], "CLS at 7"), (["--reg_pos", "none"], "--reg_pos"), (["--seeds"], "--seeds"),
        (["--val_size", "0"], "held-out"), (["--shard", "4/4"], "--shard"), (["--shard", "x"], "--shard"),
        (["--gpus", "9"], "--gpus 9: there are 0 GPUs"), (["--from", "no.pth"], "no.pth"),
        (["--epochs", "0"], "--epochs"),
        (["--launcher", "submitit", "--shard", "0/2"], "give one of them"), (["--data_path", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, capsys, argv, words):
    err = sweep(capsys, tmp_path / "out", *argv, status=2)
    assert words in err and err.count("\n") == 1 and "Traceback" not in err
    assert not list(tmp_path.glob("out/cells/*"))


def test_the_script_says_its_defaults(tmp_path):
    out = shell("position_sweep.py", "--dry_run", "--device", "cpu", cwd=tmp_path).stdout
    assert len(re.findall(r"^to do", out, re.M)) == 12 and "12 cells, 12 to do: about" in out
    assert np.all([word in out for word in ("CLS at 4, 4 registers at 2, seed 1", "MFLOPs")])
