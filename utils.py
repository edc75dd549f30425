"""What every script needs and that knows nothing of models or data: errors for the user, the command line, processes
and devices, files that are written whole.
"""

import argparse
import difflib
import functools
import gc
import hashlib
import json
import math
import os
import secrets
import signal
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

# Errors for the user ---------------------------------------------------------------------------------------------


class BadInput(Exception):
    """Something that the user can fix. One line: what is wrong; what to do."""

    status = 2

    @property
    def problem(self) -> str:
        """What is wrong, without what to do."""
        return str(self).rpartition("; ")[0] or str(self)


class RunFailed(Exception):
    """A run that failed. One line."""

    status = 1


class Stopped(Exception):
    """A run that was asked to end by a signal, and has saved what is there. The conventional exit status."""

    def __init__(self, number, message):
        super().__init__(f"stopped by {signal.Signals(number).name}: {message}")
        self.number, self.status = number, 128 + number


@functools.cache  # once in a process
def _freeze_imports():
    """Garbage collections skip what is imported: a second less for a picture."""
    gc.freeze()


def run_script(main, *args):
    """Call `main(*args)` and end the program as a script here does: one line and a status, no traceback.

    Under torchrun the error is also written where torchrun looks for the first cause of a job's end. After an error
    the process group is not destroyed: that would wait for peers that may be waiting for this process.
    """
    _freeze_imports()
    try:
        main(*args)
    except (BadInput, RunFailed, Stopped) as error:
        _fail(error, error.status)
    except KeyboardInterrupt:
        _fail("interrupted; saved files are undamaged", 130)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; give another path, or fix that one", 2)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        full = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")  # MPS, cuBLAS, a CPU
        if any(words in str(error) for words in full) or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            flags = " or ".join(f for f in ("--batch_size", "--input_size") if f in ArgumentParser.flags)
            _fail(f"out of memory ({first_line})" + f"; a smaller {flags} takes less" * bool(flags), 1)
        if first_line.startswith("DataLoader worker"):  # torch raises it wherever this process is at that moment
            _fail(f"a worker process ended ({first_line}); a smaller --num_workers takes less memory", 1)
        if first_line.startswith("the attention of block"):  # `inspection.attention.unseen`
            _fail(f"{first_line}; maps and what is measured on attention need that", 2)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            if dist.is_initialized() and "onnection" in str(error):
                time.sleep(10)  # the cause is another process's end; torchrun now ends this one
            get_error_handler().record_exception(error)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def counted(n, noun) -> str:
    """'1 image', '2 images'"""
    return f"{n} {noun}{'s' * (n != 1)}"


def printable(text) -> str:
    """`text` without what a terminal obeys."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def shortened(text, letters) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _fail(message, status):
    kind = "error: " if status in (1, 2) else ""  # not for what a user has stopped
    line = printable(" ".join(str(message).split()))
    if _is_first_to_print(line):
        several = status == 1 and os.environ.get("WORLD_SIZE", "1") != "1"  # others are of what all were given
        where = f" (rank {os.environ['RANK']})" if several else ""
        print(f"{Path(sys.argv[0]).name}{where}: {kind}{line}", file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": line, "timestamp": time.time()}))
    sys.exit(status)


def _is_first_to_print(line) -> bool:
    """Whether no other process of this job on this machine has printed this line: what all refuse is printed once.

    Under torchrun; a process that fails cannot ask the others.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return True
    of_all = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parent.parent  # <job>/attempt_0/<local rank>/error.json
    try:
        (of_all / f"printed_{hashlib.sha256(line.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to a flag's help, as the command line takes it."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default in (argparse.SUPPRESS, []) or "default" in action.help:
            return action.help
        return f"{action.help} (default: {flag_value(list(default) if isinstance(default, tuple) else default)})"


class ArgumentParser(argparse.ArgumentParser):
    """argparse that takes `--data-path` for `--data_path`, no abbreviations, and answers an error with one line."""

    flags = frozenset()  # of the command line that was parsed last, for messages that name some of them

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        ArgumentParser.flags = frozenset(self._option_string_actions)
        spellings = {name.replace("-", "_"): name for name in self._option_string_actions}
        spelled = []
        for arg in args:
            name, equals, value = arg.partition("=")
            known = spellings.get(name.replace("-", "_"), name) if name.startswith("--") else name
            spelled.append(known + equals + value)
        return super().parse_known_args(spelled, namespace)

    def error(self, message):
        flag = str(message).removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.75) if flag.startswith("--") else []
        _fail(f"{message}{''.join(f'; did you mean {name}?' for name in near)} (see {self.prog} --help)", 2)


def number(kind, low=None, high=None, above=None):
    """An argparse type: a finite `kind` of at least `low`, more than `above` and at most `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:  # and for int, more than 4300 digits
            shown = text if len(text) < 40 else f"{text[:37]}..."
            raise argparse.ArgumentTypeError(f"{shown!r} is not {'a whole' if kind is int else 'a'} number") from None
        if low is not None and not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"must be more than {above}, not {text}")
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, not {text}")
        most = 2**62 if high is None and kind is int else high  # what arithmetic on 64 bits can still take
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {text if len(text) < 40 else 'so much'}")
        return value

    return parse


def image_size(text):
    """An argparse type: '224' -> (224, 224), '96x128' -> (96, 128), height first."""
    height, x, width = text.lower().partition("x")
    return number(int, 1)(height), number(int, 1)(width if x else height)


def flag_value(value) -> str:
    """A flag's value as the command line takes it: (48, 64) -> '48x64', [0, 3] -> '0 3', None -> 'none'."""
    if isinstance(value, tuple | list):
        return ("x" if isinstance(value, tuple) else " ").join(map(str, value))
    return "none" if value is None else str(value)


def position(text):
    """An argparse type: a block's number, or 'none'."""
    return None if text.lower() == "none" else number(int, 0)(text)


# Processes and devices -------------------------------------------------------------------------------------------


def pick_device(name="auto") -> torch.device:
    """'auto' is CUDA, else MPS, else the CPU; under torchrun, CUDA means the process's own GPU."""
    mps = torch.backends.mps.is_available() and "RANK" not in os.environ  # Gloo takes no tensors of it
    available = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name} is no device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.index is not None and device.type == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput(
            f"--device {name} would put every process on one GPU; use --device cuda, and choose the GPUs with "
            "CUDA_VISIBLE_DEVICES"
        )
    if not available.get(device.type):
        raise BadInput(f"--device {name}: there is no {device.type} here; use --device cpu, or auto")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        alone = count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ  # srun may show each process its own GPU
        index = (0 if alone else int(os.environ.get("LOCAL_RANK", 0))) if device.index is None else device.index
        if index >= count:
            raise BadInput(f"--device {name}: no GPU {index}; they are 0..{count - 1}, one for each process")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def init_distributed(device):
    """Join the process group if torchrun started this process: NCCL on GPUs, Gloo elsewhere."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # Processes that torchrun starts again may meet the same store as those before, and take the addresses of dead
        # ones from it (torch 2.14, --max-restarts): so each start has names of its own there.
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size,
            device_id=device if on_gpu else None,  # else NCCL guesses it from the rank
        )  # fmt: skip


NOTED = {}  # kinds of notes that this process has printed


def note_once(kind, text):
    """Print a note, the first of its `kind` in this process; of several threads, one is the first."""
    me = object()
    if NOTED.setdefault(kind, me) is me:
        say(f"note: {printable(text)}")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_share() -> dict:
    """The arguments of a loader of batches that give this process its share."""
    return {"rank": rank(), "world_size": world_size()}


def is_main() -> bool:
    return rank() == 0


def say(*words):
    """Print, in the first process only. Letters that the encoding of the output lacks are escaped (Windows: cp1252)."""
    if is_main():
        with suppress(AttributeError):  # a notebook's output takes all letters
            sys.stdout.reconfigure(errors="backslashreplace")
        print(*words, flush=True)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def main_decides(function):
    """What `function()` returns or refuses in the first process, in all of them. NCCL waits ten minutes for that."""
    if not dist.is_initialized():
        return function()
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except (BadInput, RunFailed) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(value) -> list:
    """`value` of every process, in all of them."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


@contextmanager
def full_precision():
    """Float32 products in float32, not TF32: around each accuracy, statistic and map; also `@full_precision()`."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# Files -----------------------------------------------------------------------------------------------------------


def writable_folder(path) -> Path:
    """The folder `path`, made if need be. Raises BadInput where nothing can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise BadInput(f"cannot write to {path}: {error.strerror}; choose another folder") from None
    return path


def write_atomically(path, write, make_room=None):
    """`write(file)` to a temporary file, flush it to disk, rename it to `path`, which is so never half written.

    `make_room()` is called when the temporary file is complete. Raises RunFailed, naming `path`, if it cannot be done.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # several hosts may write it
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if make_room is not None:
            make_room()
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save has the second kind for a disk that is full
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = getattr(cause, "strerror", None) or (error if cause is error else "is the disk full?")
        raise RunFailed(f"cannot write {path}: {reason}; the file that was there is unchanged") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path, text):
    """`write_atomically` of a text, in UTF-8; of a name that is none (Linux: any bytes), those bytes are escaped."""
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def _flush_folder(folder):
    """A rename outlives a power cut only when its folder is on the disk, too. Not all systems can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_temporary(folder):
    """What processes that were killed while they wrote have left."""
    for file in Path(folder).glob(f".*.{'[0-9a-f]' * 8}.tmp"):
        file.unlink(missing_ok=True)
