"""How a run ends early and loses nothing: signals are answered between two steps, by all processes at the same one.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2 (SLURM's and submitit's warning before a time limit) let the step end, the
run save, and exit with the conventional status, 128 + the signal's number. A second SIGINT ends the process at once.
"""

import os
import signal
from contextlib import contextmanager

import torch
import torch.distributed as dist

from loading.workers import SIGNALS
from utils import Stopped, world_size


class StopSignals:
    """`with StopSignals() as stop`: signals are only noted. `stop.agreed()`, between two steps, is whether one came.

    Processes of a job may get it at different times, or only one of them: they tell each other, by Gloo, so that no GPU
    is waited for, and without waiting: the answer to one call is what all of them knew at the call before.
    """

    def __enter__(self):
        self.noted, self.pending = 0, None
        several = world_size() > 1
        self.group = dist.new_group(backend="gloo") if several and dist.get_backend() != "gloo" else None
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.noted and kind is not None and not issubclass(kind, Stopped):
            signal.raise_signal(self.noted)  # the run is failing, and was asked to end: torchrun waits for that

    def _note(self, number, _):
        if number == signal.SIGINT and self.noted == number:
            os.write(2, b"ended at once; the last checkpoint is undamaged\n")
            os._exit(128 + number)
        self.noted = number

    def agreed(self, wait=False) -> int:
        """The signal's number, or 0: the same in every process. Each of them calls this equally often.

        `wait`: for what all processes know now.
        """
        if world_size() == 1:
            return self.noted
        known = self._answer()
        number = torch.tensor(self.noted)
        self.pending = dist.all_reduce(number, dist.ReduceOp.MAX, self.group, async_op=True), number
        return max(known, self._answer()) if wait else known

    def _answer(self) -> int:
        if self.pending is None:
            return 0
        work, number = self.pending
        work.wait()
        self.pending = None
        return int(number)


@contextmanager
def signals_raise(message):
    """A signal is a `Stopped` with this message at once: for a process that only waits for others."""

    def stop(number, _):
        raise Stopped(number, message)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
