"""The folder of a run: one run at a time, its checkpoints, which of them to resume from, its log.

checkpoint.pth        the newest; checkpoint_1.pth the one before it, and so on, as many as --keep says
checkpoint*.damaged   what was found damaged, moved aside
log.txt               lines of JSON: how the run began, then one for each epoch
lock, running.json    while a run is in the folder: it is held, and by whom
"""

import json
import os
import re
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

from filelock import FileLock, Timeout

import utils
from checkpoints.files import load_checkpoint, save_checkpoint
from training.run_log import plain_args, read_json_lines
from utils import BadInput, say

NEWEST = "checkpoint.pth"
# Flags that leave a run what it is: where, by whom and how it is watched.
MAY_DIFFER = (
    "output_dir", "model_path", "data_path", "resume", "overwrite", "eval", "device", "num_threads", "num_workers",
    "distributed", "throughput", "compile", "log_to", "viz_every", "viz_images", "save_steps", "keep",
    "max_pixels", "bad_images", "fsdp",
)  # fmt: skip
MAY_CHANGE = ("epochs", "warmup_epochs")  # reported; all other flags must be the same to resume
# What decides which images are in which batch: the same within an epoch.
DECIDE_BATCHES = ("processes", "batch_size", "accum_steps", "repeats", "repeated_aug", "seed", "balance")


class InUse(BadInput):
    """Another run is at the folder."""


# One run at a time ------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder, best_path=None):
    """Hold the folder, and the file of the best weights if that lies elsewhere, for the processes of this run.

    The system lets a lock go when its process ends, however that happens. A folder that was made for a run that is
    then refused goes again. Raises InUse, naming who holds it.
    """
    made = not Path(folder).exists()
    folder = utils.writable_folder(folder)
    paths = [folder / "lock"]
    if best_path is not None and Path(best_path).parent.resolve() != folder.resolve():
        paths.append(utils.writable_folder(Path(best_path).parent) / f"{Path(best_path).name}.lock")
    try:
        with ExitStack() as stack:
            utils.main_decides(lambda: [stack.enter_context(_locked(path)) for path in paths] and None)
            yield
    except BadInput:
        if made:
            with suppress(OSError):  # something was written
                folder.rmdir()
        raise


@contextmanager
def _locked(path: Path):
    owner = path.with_name("running.json" if path.name == "lock" else f"{path.name}.json")
    lock = FileLock(path, is_singleton=True)  # a sweep holds the folders of its cells already
    again = lock.is_locked
    try:
        # Worker processes outlive a killed main process by seconds.
        lock.acquire(timeout=0 if _is_alive(first_record(owner)) else 15)
    except Timeout:
        raise InUse(
            f"{path.parent} is in use by {_describe_owner(owner)}: wait for its end, stop it, or give another folder"
        ) from None
    except OSError as error:
        raise BadInput(f"cannot lock {path}: {error.strerror or error}; choose another folder") from None
    try:
        if not again:
            if owner.exists():
                say(f"{_describe_owner(owner)} crashed; removing its stale lock")
            utils.remove_temporary(path.parent)
            me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            utils.write_text(owner, json.dumps(me))
        yield
    finally:
        if not again:
            owner.unlink(missing_ok=True)
            with suppress(PermissionError):  # Windows removes no open file
                path.unlink(missing_ok=True)  # while it is held: who waits for this file then sees that it is gone
        lock.release()


def is_running(folder) -> bool:
    """Whether a run holds the folder."""
    owner = first_record(Path(folder) / "running.json")
    return bool(owner) and _is_alive(owner)


def first_record(path) -> dict:
    """Of a file of JSON lines; empty without one."""
    return next(iter(read_json_lines(path)), {})


def _describe_owner(path) -> str:
    owner = first_record(path)
    if not owner:
        return "another run"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"


def _is_alive(owner) -> bool:
    """Whether that process may be alive; on another machine nobody can tell, and Windows' os.kill would end it."""
    if owner.get("host") == socket.gethostname() and isinstance(owner.get("pid"), int) and os.name != "nt":
        try:
            os.kill(owner["pid"], 0)
        except OSError as error:
            return not isinstance(error, ProcessLookupError)
    return True


# Checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(folder) -> list[Path]:
    """Those of an unfinished or finished run, the newest first."""
    files = [file for file in Path(folder).glob("checkpoint*.pth") if is_checkpoint(file) and file.is_file()]
    return sorted(files, key=lambda file: int(file.stem.partition("_")[2] or 0))


def is_checkpoint(path: Path) -> bool:
    """Whether a file has a name that the checkpoints of a run take."""
    return re.fullmatch(r"checkpoint(_[1-9]\d*)?\.pth", path.name) is not None


def save(folder, checkpoint: dict, keep: int):
    """Write the newest checkpoint; those before it move on by one, all but `keep` are removed.

    Whenever the process is killed in here, a whole one is there.
    """
    places = [Path(folder) / NEWEST, *(Path(folder) / f"checkpoint_{n}.pth" for n in range(1, keep))]

    def make_room():
        for newer, older in reversed(list(pairwise(places))):
            if newer.exists():
                os.replace(newer, older)

    save_checkpoint(places[0], checkpoint, make_room)
    for file in checkpoints(folder):
        if file not in places:
            file.unlink(missing_ok=True)


def newest_readable(folder) -> Path | None:
    """The newest checkpoint that can be read, None without one. Damaged ones are reported and moved aside."""
    for path in checkpoints(folder):
        try:
            load_checkpoint(path)
            return path
        except BadInput as error:
            aside = path.with_suffix(".damaged")
            os.replace(path, aside)
            older = checkpoints(folder)
            then = f", and {older[0].name} is tried" if older else ""
            say(f"{error.problem}; it is {aside.name} now{then}")
    return None


def checkpoint_to_resume(args, best_path) -> str | None:
    """The checkpoint to resume from, or None to begin; in all processes the same.

    `--resume` alone is the newest whole one of the folder. A process that torchrun started again (--max-restarts)
    resumes, too. Raises BadInput if another run would be lost, or there is nothing to resume from.
    """
    return utils.main_decides(lambda: _checkpoint_to_resume(args, Path(args.output_dir), Path(best_path)))


def _checkpoint_to_resume(args, folder, best_path):
    again, found = started_again(folder), checkpoints(folder)
    path = args.resume
    if path == "" or (again and found):
        path = newest_readable(folder) or folder / NEWEST
        if found and not path.is_file():
            raise BadInput(f"no checkpoint in {folder} is undamaged; --overwrite trains anew")
    if path is not None:
        if not Path(path).is_file():
            raise BadInput(f"--resume: there is no {path}; leave out --resume to begin")
        return str(path)
    there = [*found, *([best_path] if best_path.is_file() else [])]
    if there and not (args.overwrite or again):
        raise BadInput(
            f"{there[0]} is of another run: --resume resumes it, --overwrite trains anew; or give another --output_dir"
        )
    return None


def started_again(folder) -> bool:
    """Whether torchrun started this process after a failure, and the run in the folder is the one that failed."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    return first_record(Path(folder) / "log.txt").get("job") == job()


def job() -> str | None:
    """What processes that torchrun starts again share: the job's name, and who started them."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name is None else f"{name} {socket.gethostname()} {os.getppid()}"


def check_same_run(path, saved: dict, args):
    """Raise BadInput unless a checkpoint of this folder is of a run with these flags, and as many processes.

    With --overwrite, or from another folder, it may be of other flags, if these can take effect from there on.
    """
    here = plain_args(args) | {"processes": utils.world_size()}
    there = saved["args"] | {"processes": len(saved["processes"])}
    changes = {}
    for name in _changed_flags(there, here):
        was, now = (utils.flag_value(flags[name]) for flags in (there, here))
        changes[name] = f"{'' if name == 'processes' else '--'}{name} was {was}, is now {now}"
    if "finetune" in changes and args.finetune:
        raise BadInput(
            f"--resume: --finetune was {there['finetune']}, is now {args.finetune}, but the weights are those of "
            f"{path}; give the same --finetune, or leave out --resume"
        )
    of_batches = "; ".join(words for name, words in changes.items() if name in DECIDE_BATCHES)
    if saved["batch"] and of_batches:
        raise BadInput(
            f"{path} is in the middle of an epoch, whose batches are of other images now ({of_batches}): give the "
            "same, or resume from a checkpoint at the end of an epoch"
        )
    all_changes, in_place = "; ".join(changes.values()), Path(path).parent.resolve() == Path(args.output_dir).resolve()
    if not changes.keys() <= set(MAY_CHANGE) and not args.overwrite and in_place:
        raise BadInput(
            f"{path} is of another run ({all_changes}): give the same flags, or another --output_dir; "
            "--overwrite resumes with these"
        )
    if changes:
        say(f"note: not as in {path}: {all_changes}")


def _changed_flags(there: dict, here: dict) -> list[str]:
    """Names of flags that both have, with other values; in JSON, tuples are lists."""
    there, here = json.loads(json.dumps(there)), json.loads(json.dumps(here))
    return [name for name in here if name in there and name not in MAY_DIFFER and there[name] != here[name]]


# Beginning, and the log -------------------------------------------------------------------------------------------


def begin_log(folder, best_path, header: dict) -> Path:
    """Begin a run: its log, and nothing of another one left that could be taken for its own. Returns the log."""
    log = Path(folder) / "log.txt"
    write_log(log, [header | {"job": job()}])
    for file in (*checkpoints(folder), Path(best_path)):
        file.unlink(missing_ok=True)
    return log


def resume_log(folder, header: dict, epoch: int, metrics: dict | None) -> Path:
    """Put the log in the state that it had when the checkpoint was written, whatever happened since. Returns it."""
    log = Path(folder) / "log.txt"
    records = read_json_lines(log)
    headers = [r for r in records if "epoch" not in r and isinstance(r.get("args"), dict)]
    if not headers or _changed_flags(headers[-1]["args"], header["args"]):
        headers.append(header)
    epochs = {r["epoch"]: r for r in records if isinstance(r.get("epoch"), int) and r["epoch"] <= epoch}
    if metrics is not None:
        epochs[metrics["epoch"]] = metrics
    write_log(log, [headers[0] | {"job": job()}, *headers[1:], *(epochs[n] for n in sorted(epochs))])
    return log


def write_log(path, records):
    utils.write_text(path, "".join(json.dumps(record) + "\n" for record in records))
