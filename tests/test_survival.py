"""Runs that are killed, stopped, starved of disk, started twice or fed with numbers that are none.

The same faults in large numbers: make faults (tests/faults/).
"""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

import cifar_main
import faults
import visualize_attention
from checkpoints.files import load_checkpoint
from forked import AUGMENTED, Child, Faults, children_of, light_curves, torchrun
from runs import ROOT
from training import loop


def whole(row):
    assert row.survived == row.injected > 0, row


def test_killed_at_random_moments(tmp_path):
    whole(faults.soak(tmp_path, 4, seed=1))


@pytest.mark.parametrize(("how", "each"), [("kill", 31), (errno.ENOSPC, 61)])
def test_killed_or_refused_while_writing(tmp_path, how, each):
    whole(faults.at_every_write(tmp_path, how, each))


def test_sigterm_of_a_process(tmp_path, expected):
    """Status 128 + the number, a whole checkpoint in the middle of an epoch, and the same end."""
    whole(faults.a_signal(tmp_path, signal.SIGTERM, expected))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_signals(tmp_path, expected, number):
    def before():
        light_curves()
        work, calls = loop.TrainingState.checkpoint, []

        def checkpoint(state):
            calls.append(1)
            if len(calls) == 2:  # while it saves step 4: the step after it is taken, then the run ends
                os.kill(os.getpid(), number)
            return work(state)

        loop.TrainingState.checkpoint = checkpoint

    status, out, err = faults.run([*AUGMENTED, "--model_path", tmp_path / "model.pth"], before=before)
    assert status == 128 + number and "epoch 0, and 5 batches" in err and "--resume resumes it" in err, out + err
    assert faults.resume(tmp_path, AUGMENTED, expected) == []


@pytest.mark.parametrize(
    ("main", "more"),
    [
        (visualize_attention.main, ["--layer_num", "2"]), (visualize_attention.main, ["--format", "html"]),
    ],
)  # fmt: skip
def test_what_looks_at_models_writes_whole_files_or_none(trained, tmp_path, main, more):
    """A full disk at each third of what is written: one line with a path, nothing half written."""
    argv, log = ["--model_path", trained / "model.pth", "--device", "cpu", *more, "--output_dir"], tmp_path / "actions"
    assert faults.run([*argv, tmp_path / "all"], main, Faults(tmp_path / "all", log=log))[0] == 0
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "all").iterdir()}
    count = len(log.read_text().splitlines())
    for at in range(1, count, -(-count // 3)):
        folder = tmp_path / str(at)
        status, out, err = faults.run([*argv, folder], main, Faults(folder, at, errno.ENOSPC))
        if status:
            assert status in (1, 2) and len(err.splitlines()) == 1 and str(folder) in err, out + err
            assert "No space left on device" in err
        for file in folder.iterdir() if folder.exists() else ():
            assert abs(file.stat().st_size - sizes[file.name]) < 200, file  # but for dates


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    code = "import time, signal, os; from training.signals import StopSignals\n"
    code += "with StopSignals():\n os.kill(os.getpid(), 2); print('noted'); os.kill(os.getpid(), 2); print('never')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (130, "") or (done.returncode, done.stdout.strip()) == (
        130,
        "noted",
    )
    assert "the last checkpoint is undamaged" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_in_validation_ends_the_run_before_the_next_epoch(tmp_path, expected):
    """The epoch is not trained again: it is validated when the run is resumed."""

    def before():
        light_curves()
        work = loop.evaluate

        def evaluate(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return work(*args, **kwargs)

        loop.evaluate = evaluate

    status, out, err = faults.run([*AUGMENTED, "--model_path", tmp_path / "model.pth"], before=before)
    assert status == 143 and "epoch 1/3" not in out and "epoch 0, and 10 batches" in err, out + err
    assert faults.resume(tmp_path, AUGMENTED, expected) == []


@pytest.mark.parametrize("processes", [2, 3])  # from 3 on, the order of a sum of gradients shows
def test_torchrun_starts_killed_processes_again(tmp_path, processes):
    whole(faults.ranks(tmp_path, processes, (1, 5)))


def test_a_signal_to_one_process_stops_all(tmp_path):
    """Both save the same step; the run resumes in as many processes, not in another number of them."""
    argv = [
        *AUGMENTED,
        *"--batch_size 32 --epochs 50 --save_steps 1000".split(),
        "--model_path",
        tmp_path / "model.pth",
    ]
    job = Child(argv, torchrun(2, cifar_main.main))
    job.until("epoch 1/")
    start = time.monotonic()
    os.kill(children_of(job.pid)[1], signal.SIGTERM)
    _, _, err = job.end()
    assert time.monotonic() - start < 60
    assert err.count("stopped by SIGTERM") >= 2 and "exitcode  : 143" in err
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth")
    assert checkpoint["batch"] > 0 and len(checkpoint["processes"]) == 2
    status, _, err = faults.run([*argv, "--resume"])
    assert status == 2 and "processes was 2, is now 1" in err


def test_the_newest_checkpoint_is_damaged(tmp_path, expected):
    whole(faults.damaged_newest(tmp_path, expected, shares=(0, 5, 9)))
