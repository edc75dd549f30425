"""Runs of the real scripts in child processes that are made to suffer.

A child is forked from a process that has everything imported, so that a run of a tiny model takes a second and hundreds
of faults take minutes. `Faults` counts what a run writes and lets one of those writes fail, or kills the process there.
"""

import atexit
import builtins
import io
import multiprocessing.util
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib.figure  # noqa: F401  (and what else a run imports later, so that a child need not)
import sklearn.datasets
import sklearn.model_selection  # noqa: F401
import torch
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import cifar_main
import utils
from checkpoints.files import load_checkpoint
from training import run_log, signals
from training.run_log import read_json_lines

ROOT = Path(__file__).resolve().parents[2]

# A model of a few thousand parameters on digits, everything that draws random numbers switched on. 11 steps an epoch.
AUGMENTED = (
    "--data_set DIGITS --embed_dim 24 --depth 3 --num_heads 3 --num_reg 2 --cls_pos 2 --reg_pos 1 --patch_size 8 "
    "--device cpu --num_threads 1 --batch_size 64 --aug trivial --drop_path 0.2 --ema 0.9 --repeats 0.5 --epochs 3 "
    "--save_steps 2 --lr 2e-3 --deterministic"
).split()


TWO_EPOCHS = [*AUGMENTED, "--epochs", "2"]


class Child:
    """`main(argv)` as the command line of a script, in a child of this process that has everything imported.

    Args:
        before: called in the child first.
        cwd: where the child works.
        ends: whether the child ends as an interpreter does, with what is registered for that; or at once.
    """

    def __init__(self, argv, main=cifar_main.main, before=None, cwd=None, ends=False):
        self.out, self.err = (os.memfd_create(name) for name in ("out", "err"))
        self.code = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            if cwd is not None:
                os.chdir(cwd)
            _be_a_script(argv, main, before, self.out, self.err, ends)

    def printed(self) -> list[str]:
        """Standard output and standard error so far."""
        return [os.pread(handle, os.fstat(handle).st_size, 0).decode() for handle in (self.out, self.err)]

    def until(self, words, seconds=120):
        """Wait for a line of standard output that begins with `words`."""
        end = time.monotonic() + seconds
        while not any(line.startswith(words) for line in self.printed()[0].splitlines()):
            assert not self._has_ended() and time.monotonic() < end, self.printed()
            time.sleep(0.01)

    def kill(self, number=signal.SIGKILL, group=False):
        """Send a signal to the child, or to all processes of its group."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def end(self, seconds=120) -> tuple[int, str, str]:
        """Wait for its end: (exit status as a shell has it, standard output, standard error)."""
        end = time.monotonic() + seconds
        while not self._has_ended():
            if time.monotonic() > end:
                self.kill(group=True)
                raise AssertionError(("it does not end", *self.printed()))
            time.sleep(0.005)
        printed = self.printed()
        for handle in (self.out, self.err):
            os.close(handle)
        return 128 - self.code if self.code < 0 else self.code, *printed

    def _has_ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None


def run(argv, main=cifar_main.main, before=None, kill_after=None, number=signal.SIGKILL, **kwargs):
    """`Child(...).end()`. `kill_after`: seconds until the signal `number` is sent."""
    child = Child(argv, main, before, **kwargs)
    if kill_after is not None:
        time.sleep(kill_after)
        child.kill(number)
    return child.end(120)


def script(name):
    """A `main` that runs a file as `python NAME` does."""

    def main(argv):
        sys.argv = [str(ROOT / name), *argv]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return main


def torchrun(processes, main, restarts=0, every=0.02):
    """A `main` that runs `main(argv)` in several processes: by torchrun's own agent, which forks them here.

    `every`: seconds between its looks at them; one that has failed is the end of the others.
    """

    def rank(argv):
        _default_signals()
        try:
            utils.run_script(main, argv)
        finally:  # as an interpreter does
            atexit._run_exitfuncs()

    def launch(argv):
        dynamic_rendezvous.get_method_name = lambda depth=0: "a method"  # for its log; it searches all modules for it
        config = LaunchConfig(
            1, 1, processes, run_id="forked", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts,
            monitor_interval=every, start_method="fork",
        )  # fmt: skip
        elastic_launch(config, rank)(argv)

    return launch


def dies(rank, step):
    """`cifar_main.main`; the process `rank` is killed at that step, unless it was started again."""

    def main(argv):
        if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (str(rank), "0"):
            agreed, calls = signals.StopSignals.agreed, []

            def killed(stop, wait=False):
                calls.append(1)
                if len(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return agreed(stop, wait)

            signals.StopSignals.agreed = killed
        cifar_main.main(argv)

    return main


def children_of(pid) -> list[int]:
    """Processes that a process has started, in their order."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:  # it has ended
                continue
            if int(parent) == pid:
                found.append(int(folder.name))
    return sorted(found)


def _default_signals():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _be_a_script(argv, main, before, out, err, ends):
    """The rest of the child's life."""
    status = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w"), write_through=True) for n in (1, 2))
        _default_signals()
        atexit._clear()  # what this process is to do at its end, such as removing folders, is none of the child's
        atexit.register(multiprocessing.util._exit_function)
        torch.set_num_threads(1)
        if before is not None:
            before()
        utils.run_script(main, [str(arg) for arg in argv])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        status = 1 if isinstance(error, Exception) else status
    if ends:
        threading._shutdown()
        atexit._run_exitfuncs()
    os._exit(status)


def light_curves():
    """In a child: training curves that are a few bytes, since drawing them takes longer than training a tiny model."""

    def plot_curves(epochs, folder):
        utils.write_atomically(Path(folder) / "training_curves.png", lambda file: file.write(b"%d" % len(epochs)))

    run_log.plot_curves = plot_curves


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
