"""Faults injected into runs, and what they lose. `python tests/faults/faults.py` (make faults) prints the table of
docs/RELIABILITY.md; `tests/test_survival.py` has the same in small.

A run has survived a fault if, resumed, it ends with the weights, optimizer, averaged weights, random states, best
model and log of the run that was never disturbed, bit for bit.
"""

import argparse
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from forked import AUGMENTED, Child, Faults, dies, differences, ending, light_curves, run, torchrun


@dataclass
class Row:
    """A line of the table."""

    fault: str
    injected: int
    survived: int
    lost: str = "nothing"


def undisturbed(folder, argv=AUGMENTED) -> dict:
    """`ending` of the run that nothing happens to."""
    status, out, err = run([*argv, "--model_path", folder / "model.pth"], before=light_curves)
    assert status == 0, out + err
    return ending(folder)


def resume(folder, argv=AUGMENTED, expected=None) -> list[str]:
    """Resume the run in `folder` to its end, as a user would; names of what is not as `expected`."""
    argv = [*argv, "--model_path", folder / "model.pth"]
    begun = list(folder.glob("checkpoint*.pth"))
    status, out, err = run([*argv, *(["--resume"] if begun else [])], before=light_curves)
    if status:
        return [f"status {status}: {out}{err}"]
    left = [file.name for file in folder.iterdir() if file.suffix == ".tmp" or file.name in ("lock", "running.json")]
    return left + differences(expected, ending(folder))


# Kills ------------------------------------------------------------------------------------------------------------


def soak(folder, kills, seed=0) -> Row:
    """One run, killed so many times at random moments; each time it is started again, and another one at its end."""
    epochs = kills // 2 + 2
    argv = [*AUGMENTED, "--epochs", str(epochs), "--save_steps", "1"]
    expected = undisturbed(folder / "undisturbed", argv)
    generator, done, found, lives = random.Random(seed), 0, [], folder / "killed"
    lives.mkdir()
    start = time.monotonic()
    assert (
        run([*argv, "--model_path", folder / "measured" / "model.pth", "--max_steps", "1"], before=light_curves)[0] == 0
    )
    life = time.monotonic() - start  # from the start to the first save, and a test
    while done < kills:
        begun = list(lives.glob("checkpoint*.pth"))
        status, out, err = run(
            [*argv, "--model_path", lives / "model.pth", *(["--resume"] if begun else [])], before=light_curves,
            kill_after=generator.uniform(0, 1.3 * life),
        )  # fmt: skip
        if status == 0:
            found += differences(expected, ending(lives))
            shutil.rmtree(lives)
            lives.mkdir()
            continue
        assert status == 128 + signal.SIGKILL, out + err
        done += 1
    found += resume(lives, argv, expected)
    name = f"SIGKILL at random moments of a run of {epochs} epochs"
    return Row(name, done, 0 if found else done, "; ".join(found) or "nothing")


def at_every_write(folder, how, each=1) -> Row:
    """A run for each thing that a run does to a file (open, write, flush, rename, remove); there it is killed, or the
    call fails, half done."""
    argv = [*AUGMENTED, "--epochs", "2", "--save_steps", "4"]
    expected = undisturbed(folder / "undisturbed", argv)
    log = folder / "actions"
    status, out, err = run(
        [*argv, "--model_path", folder / "counted" / "model.pth"], before=Faults(folder / "counted", log=log)
    )
    assert status == 0, out + err
    actions, injected, lost = log.read_text().splitlines(), 0, []
    for at in range(1, len(actions) + 1, each):
        place = folder / str(at)
        status, out, err = run([*argv, "--model_path", place / "model.pth"], before=Faults(place, at, how))
        injected += 1
        if how == "kill":
            problem = [] if status == 137 else [f"status {status}"]
        else:  # one line that names the file, or nothing was wrong for the user (as when a temporary file stays)
            reported = status == 0 or (status in (1, 2) and len(err.splitlines()) == 1 and str(place) in err)
            problem = [] if reported else [f"status {status}: {err}"]
        if status or how == "kill":
            problem += resume(place, argv, expected)
        lost += [f"{actions[at - 1]} ({at}): {what}" for what in problem[:3]]
        shutil.rmtree(place)
    name = "SIGKILL" if how == "kill" else os.strerror(how)
    return Row(f"{name} at {'each' if each == 1 else f'one in {each}'} of {len(actions)} file operations", injected,
               injected - len({line.split(':')[0] for line in lost}), "; ".join(lost) or "nothing")  # fmt: skip


# Signals, several processes ---------------------------------------------------------------------------------------


def a_signal(folder, number, expected) -> Row:
    """The signal, after the first epoch of a run in a process of its own."""
    child = Child([*AUGMENTED, "--model_path", folder / "model.pth"], before=light_curves)
    child.until("epoch 1/")
    start = time.monotonic()
    child.kill(number)
    status, out, err = child.end()
    seconds = time.monotonic() - start
    lost = [] if status == 128 + number else [f"status {status}: {out}{err}"]
    lost += [] if "--resume resumes it" in err and "Traceback" not in err else [err]
    lost += resume(folder, AUGMENTED, expected)
    return Row(f"{signal.Signals(number).name} (status {status} after {seconds:.1f} s)", 1, not lost,
               "; ".join(lost) or "nothing")  # fmt: skip


def ranks(folder, processes, *killed) -> Row:
    """Processes of a job under torchrun --max-restarts=1, one of which is killed: (its rank, at which step)."""
    argv, endings = [*AUGMENTED, "--batch_size", "32", "--epochs", "2", "--model_path"], []
    for rank, step in ((-1, 0), *killed):
        place = folder / f"{processes}_{rank}"
        main = torchrun(processes, dies(rank, step), restarts=1)
        status, out, err = run([*argv, place / "model.pth"], main, before=light_curves)
        assert status == 0, out + err
        assert ("resuming after" in out) == (rank >= 0), out
        endings.append(ending(place))
    lost = [what for other in endings[1:] for what in differences(endings[0], other)]
    return Row(f"SIGKILL of one of {processes} processes, torchrun --max-restarts", len(killed),
               0 if lost else len(killed), "; ".join(lost) or "nothing")  # fmt: skip


# Files ------------------------------------------------------------------------------------------------------------


def damaged_newest(folder, expected, shares=range(10)) -> Row:
    """The newest checkpoint of a killed run, cut at each tenth, or with a byte changed there."""
    whole, lost, injected = folder / "whole", [], 0
    log = folder / "actions"
    run([*AUGMENTED, "--model_path", whole / "model.pth"], before=Faults(whole, log=log))
    last = max(i for i, line in enumerate(log.read_text().splitlines(), 1) if line.startswith("replace .checkpoint"))
    shutil.rmtree(whole)
    run([*AUGMENTED, "--model_path", whole / "model.pth"], before=Faults(whole, last - 40))
    content = (whole / "checkpoint.pth").read_bytes()
    for share in shares:
        for how in ("cut", "changed"):
            place, at = folder / f"{how}{share}", len(content) * share // 10
            shutil.copytree(whole, place)
            damaged = content[:at] if how == "cut" else content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
            (place / "checkpoint.pth").write_bytes(damaged)
            lost += [f"{how} at {share}0 %: {what}" for what in resume(place, AUGMENTED, expected)[:3]]
            injected += 1
    return Row("newest checkpoint cut, or a byte of it changed, at each tenth", injected,
               injected - len({line.split(':')[0] for line in lost}), "; ".join(lost) or "nothing")  # fmt: skip


def a_small_disk(folder) -> Row | None:
    """A file system of 600 KiB that fills up in the middle of the run, and gets room again. None without mounts."""
    place = folder / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", place], capture_output=True).returncode:
        return None
    try:
        argv = [*AUGMENTED, "--model_path", place / "model.pth"]
        status, _, err = run(argv, before=light_curves)
        ballast = place / "ballast"
        full = status == 1 and "No space left on device" in err and len(err.splitlines()) == 1
        lost = [] if full else [f"status {status}: {err}"]
        ballast.unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        lost += resume(place, AUGMENTED, undisturbed(folder / "undisturbed"))
    finally:
        subprocess.run(["umount", place], check=False)
    return Row("a disk that fills up (tmpfs)", 1, not lost, "; ".join(lost) or "nothing")


def main():
    parser = argparse.ArgumentParser(description="Inject faults into training runs, and report what is lost.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--each", type=int, default=3, help="every so many-th file operation; 1: all, for half an hour")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), iter(range(1000))

        def place():
            made = folder / str(next(count))
            made.mkdir()
            return made

        expected = undisturbed(place())
        faults = [
            lambda: soak(place(), args.kills),
            lambda: at_every_write(place(), "kill", args.each),
            lambda: at_every_write(place(), errno.ENOSPC, args.each),
            lambda: at_every_write(place(), errno.EROFS, args.each),
            lambda: at_every_write(place(), errno.EIO, args.each),
            lambda: a_small_disk(place()),
            lambda: damaged_newest(place(), expected),
            *(lambda n=n: a_signal(place(), n, expected) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)),
            lambda: ranks(place(), 2, (1, 9), (0, 14)),
            lambda: ranks(place(), 3, (2, 9)),
        ]  # fmt: skip
        print("| fault | injected | survived | lost | seconds |\n|---|---|---|---|---|", flush=True)
        failed = False
        for fault in faults:
            start = time.monotonic()
            row = fault()
            if row is not None:
                failed |= row.survived < row.injected
                line = f"| {row.fault} | {row.injected} | {int(row.survived)} | {row.lost} "
                print(f"{line}| {time.monotonic() - start:.0f} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
