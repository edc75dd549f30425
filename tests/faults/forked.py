"""Runs of the real scripts in child processes that are made to suffer.

A child is forked from a process that has everything imported, so that a run of a tiny model takes a second and hundreds
of faults take minutes. `Faults` counts what a run writes and lets one of those writes fail, or kills the process there.
"""

import builtins
import io
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib.figure  # noqa: F401  (and what else a run imports later, so that a child need not)
import sklearn.datasets
import sklearn.model_selection  # noqa: F401
import torch

import cifar_main
import utils
from checkpoints.files import load_checkpoint
from training.run_log import read_json_lines

# A model of a few thousand parameters on digits, everything that draws random numbers switched on. 11 steps an epoch.
TINY = (
    "--data_set DIGITS --embed_dim 24 --depth 3 --num_heads 3 --num_reg 2 --cls_pos 2 --reg_pos 1 --patch_size 8 "
    "--device cpu --num_threads 1 --batch_size 64 --aug trivial --drop_path 0.2 --ema 0.9 --repeats 0.5 --epochs 3 "
    "--save_steps 2 --lr 2e-3 --deterministic"
).split()


def run(argv, main=cifar_main.main, before=None, kill_after=None, number=signal.SIGKILL):
    """(exit status as a shell has it, standard output, standard error) of `main(argv)` in a child of this process.

    `before()` is called in the child. `kill_after`: seconds until the signal `number` is sent.
    """
    out, err = (os.memfd_create(name) for name in ("out", "err"))
    child = os.fork()
    if child == 0:
        _be_a_script(argv, main, before, out, err)
    if kill_after is not None:
        time.sleep(kill_after)
        with suppress(ProcessLookupError):
            os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = []
    for handle in (out, err):
        os.lseek(handle, 0, os.SEEK_SET)
        with os.fdopen(handle, "rb") as file:
            said.append(file.read().decode())
    return 128 - code if code < 0 else code, *said


def _be_a_script(argv, main, before, out, err):
    """The rest of the child's life."""
    status = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w"), write_through=True) for n in (1, 2))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        torch.set_num_threads(1)
        if before is not None:
            before()
        utils.run_script(main, [str(arg) for arg in argv])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    os._exit(status)


def light_curves():
    """In a child: training curves that are a few bytes, since drawing them takes longer than training a tiny model."""

    def plot_curves(epochs, folder):
        utils.write_atomically(Path(folder) / "training_curves.png", lambda file: file.write(b"%d" % len(epochs)))

    plot_curves = plot_curves


class Faults:
    """Counts everything that a script does to files it writes; at number `at` that fails, as `how` says.

    Called in the child, as `before` of `run`. `how`: 'kill' (SIGKILL) or a number of an OSError, such as errno.ENOSPC;
    a write is half done then. `log`: a file that gets a line for each action. Only paths below `folder` count.
    """

    def __init__(self, folder, at=None, how="kill", log=None):
        self.folder, self.at, self.how, self.log, self.count = str(folder), at, how, log, 0

    def __call__(self):
        light_curves()
        for name in ("replace", "unlink", "fsync"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        self.open, faults = builtins.open, self

        class Written(io.FileIO):
            def write(self, data):
                if faults.strikes("write", self.name):
                    super().write(bytes(data)[: len(data) // 2])
                    faults.fail(self.name)
                return super().write(data)

        def open_(path, mode="r", *args, **kwargs):
            written = isinstance(path, (str, os.PathLike)) and set(mode) & set("wax") and self._counts(path)
            if not written or "opener" in kwargs:  # tempfile's, of a file without a name
                return self.open(path, mode, *args, **kwargs)
            if self.strikes("open", path):
                self.fail(path)
            file = io.BufferedWriter(Written(path, mode.replace("b", "").replace("t", "")), 2**16)
            return file if "b" in mode else io.TextIOWrapper(file)

        builtins.open = io.open = open_  # pathlib calls the second one

    def _counted(self, name, function):
        def called(path, *args, **kwargs):
            if (name == "fsync" or self._counts(path)) and self.strikes(name, path):
                self.fail(path)
            return function(path, *args, **kwargs)

        return called

    def _counts(self, path):
        return os.path.abspath(path).startswith(self.folder)

    def strikes(self, what, path) -> bool:
        self.count += 1
        if self.log:
            with self.open(self.log, "a") as file:
                file.write(f"{what} {Path(str(path)).name}\n")
        return self.count == self.at

    def fail(self, path):
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.how, os.strerror(self.how), str(path))


TIMES = ("seconds", "images_per_s", "data_wait", "memory_mib")  # of a log; the rest is a function of the seed


def ending(folder) -> dict:
    """All of a finished run that must be the same whatever happened to it: weights, states, log, best weights."""
    last, best = (load_checkpoint(Path(folder) / name) for name in ("checkpoint.pth", "model.pth"))
    log = read_json_lines(Path(folder) / "log.txt")
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in log if "epoch" in record]
    states = [{"random": process["random"]} for process in last["processes"]]
    return {
        "model": last["model"], "ema": last["ema"], "optimizer": last["optimizer"], "states": states,
        "step": last["step"], "epoch": last["epoch"], "best model": best["model"], "best epoch": best["epoch"],
        "log": records,
    }  # fmt: skip


def differences(one, other, path="") -> list[str]:
    """Names of what is not the same in two nested structures, bit for bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other)) for d in differences(*pair, f"{path}/{i}")]
    return [] if one == other else [path]
