"""What only a machine with a card can show, in at most eight minutes: `python tests/gpu/gpu.py` (make gpu).

    python tests/gpu/gpu.py --device cpu --tiny      # a dry run of the same code on any machine

Writes gpu.json and gpu.md into --output_dir after each check. Exit status 1 if something is not as it should be.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import utils
from gpu_checks import CHECKS, Machine, Row
from training.run_log import environment


def perform(check, machine) -> list[Row]:
    """The rows of a check; an error is a row, too, and what was found before it stays."""
    rows = []
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            rows.extend(row for row in check(machine) if rows.append(row))
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        rows.append(Row(f"{check.__name__}: it failed", float("nan"), ok=False, note=reason[:200]))
    return rows


def markdown(rows, about) -> str:
    lines = [f"# {about['verdict']}", "", f"`{json.dumps({k: v for k, v in about.items() if k != 'verdict'})}`", ""]
    lines += ["| what | value | unit | | note |", "|---|---|---|---|---|"]
    marks = {True: "ok", False: "**FAILED**", None: ""}
    lines += [f"| {row.what} | {row.value:,.4g} | {row.unit} | {marks[row.ok]} | {row.note} |" for row in rows]
    return "\n".join(lines) + "\n"


def verdict(rows) -> str:
    failed = [row.what for row in rows if row.ok is False]
    line = f"{sum(row.ok is True for row in rows)} checks passed, {len(failed)} failed, {len(rows)} rows"
    return line + (f"; failed: {'; '.join(failed)}" if failed else "")


def main(argv=None):
    parser = utils.ArgumentParser(description="Check and measure what only a machine with a card can show.")
    flag = parser.add_argument
    flag("--device", default="cuda", help="cpu for a dry run")
    flag("--tiny", action="store_true", help="small shapes, for a dry run")
    flag("--checks", default=",".join(CHECKS), help=f"some of {','.join(CHECKS)}")
    flag("--minutes", type=utils.number(float, above=0), default=8.0, help="begin no check after this time")
    flag("--output_dir", default="gpu", help="folder for gpu.json and gpu.md")
    args = parser.parse_args(argv)
    unknown = set(args.checks.split(",")) - set(CHECKS)
    if unknown:
        raise utils.BadInput(f"--checks: there is no {', '.join(sorted(unknown))}; choose of {','.join(CHECKS)}")
    device, output = utils.pick_device(args.device), utils.writable_folder(args.output_dir)
    rows, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        machine = Machine(device, args.tiny, Path(name), start + 60 * args.minutes)
        for check in args.checks.split(","):
            found = [Row(f"{check}: left out, the time is over", args.minutes, "minutes")]
            if machine.left() > 0:
                found = perform(CHECKS[check], machine)
                torch.cuda.empty_cache()  # the next one may start processes, which need the memory
            rows += found
            for row in found:
                print(f"{row.what}: {row.value:,.4g} {row.unit} {row.note}{' FAILED' * (row.ok is False)}", flush=True)
            about = {"verdict": verdict(rows), "seconds": round(time.monotonic() - start), "device": str(device)}
            about |= {"tiny": args.tiny, **environment(device)}
            record = about | {"rows": [asdict(row) for row in rows]}
            utils.write_text(output / "gpu.json", json.dumps(record, indent=1))
            utils.write_text(output / "gpu.md", markdown(rows, about))
    print(about["verdict"])
    if any(row.ok is False for row in rows):
        raise utils.RunFailed(f"something is not as it should be, see {output / 'gpu.md'}")


if __name__ == "__main__":
    utils.run_script(main)
