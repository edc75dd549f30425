"""Worker processes that ignore signals, and end with the main process, however that ends."""

import atexit
import multiprocessing
import signal
import threading
import weakref
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

from torch.utils.data import DataLoader

from utils import BadInput

SIGNALS = [  # that ask a run to end; not all of them are there on Windows
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]


@contextmanager
def signals_blocked():
    """Signals wait until the end of this block. Processes that are started in it never get them.

    So a signal to all processes of a run is for the main one, which ends the others. (Not on Windows.)
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if multiprocessing.get_start_method() != "fork":  # Python starts it together with the first process, and unblocks
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerLoader(DataLoader):
    """A DataLoader whose worker processes ignore signals and end with the main process, however that ends.

    Its batches are moved to the device `to`, if that is not None.
    """

    to = None

    def __iter__(self):
        if self.num_workers and self._iterator is None:
            self.dataset.closing.value = False
            with signals_blocked():  # the workers begin in here
                batches = super().__iter__()
            _with_workers.add(self)
            atexit.unregister(_end_workers)
            atexit.register(_end_workers)  # the last one is called first: before those of torch and multiprocessing
        else:
            batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, BadInput):
                raise batch
            yield batch if self.to is None else [part.to(self.to) for part in batch]


_with_workers = weakref.WeakSet()


def _end_workers():
    """End all worker processes: after the image that each is at, or after 5 seconds."""
    iterators = [loader._iterator for loader in _with_workers if loader._iterator is not None]
    for loader in _with_workers:
        loader.dataset.closing.value, loader._iterator = True, None
    late = threading.Timer(5, lambda: [worker.kill() for iterator in iterators for worker in iterator._workers])
    late.start()
    for iterator in iterators:
        with suppress(RuntimeError):  # torch's, about the workers that had to be killed
            iterator._shutdown_workers()
    late.cancel()
