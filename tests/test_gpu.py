"""`make gpu` where there is no card: its code on the CPU, and what it reports."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

import gpu
import gpu_checks
import training.loop
from gpu_checks import Row
from runs import run


def reported(tmp_path, capsys, *argv):
    """(exit status, the record, the Markdown) of a dry run."""
    argv = ["--device", "cpu", "--tiny", "--output_dir", tmp_path / "out", *argv]
    status, out, err = run(gpu.main, argv, capsys)
    return status, json.loads((tmp_path / "out/gpu.json").read_text()), (tmp_path / "out/gpu.md").read_text()


def test_a_dry_run(tmp_path, capsys):
    status, record, page = reported(tmp_path, capsys, "--checks", "waiting,precisions,prefetching")
    rows = {row["what"]: row for row in record["rows"]}
    assert (status, record["device"], record["tiny"]) == (0, "cpu", True)
    assert rows["losses of 5 steps, --amp off, against the CPU's in fp32"]["value"] == 0
    assert 0 < rows["losses of 5 steps, --amp bf16, against the CPU's in fp32"]["value"] < 0.1
    assert rows["prefetched batches of training, against the CPU's"]["ok"]
    assert record["verdict"] == f"5 checks passed, 0 failed, {len(rows)} rows" and record["verdict"] in page


def test_what_is_wrong_is_found(tmp_path, capsys, monkeypatch):
    """Errors of a few per cent in the loss, and in products that should be exact."""
    losses = gpu_checks.losses
    calls = iter((1.0, 1.03, 1.2))
    monkeypatch.setattr(gpu_checks, "losses", lambda *args: losses(*args) * next(calls))
    monkeypatch.setattr(gpu_checks, "FileLoader", lambda *args, workers: gpu_checks.MemoryLoader)
    status, record, _ = reported(tmp_path, capsys, "--checks", "precisions,prefetching")
    failed = [row["what"] for row in record["rows"] if row["ok"] is False]
    assert status == 1 and [what[:6] for what in failed] == ["losses", "losses", "prefet"]


def test_an_error_or_the_end_of_the_time_spoils_no_other_check(tmp_path, capsys, monkeypatch):
    def breaks(machine):
        yield Row("first", 1.0, "s", True)
        raise ValueError("no such kernel\nmore")

    def late(machine):
        yield Row("second", 2.0, "s", False)
        machine.end = 0.0

    monkeypatch.setattr(gpu, "CHECKS", {"breaks": breaks, "late": late, "later": breaks})
    status, record, page = reported(tmp_path, capsys, "--checks", "breaks,late,later")
    assert status == 1
    assert [row["what"] for row in record["rows"]] == [
        "first", "breaks: it failed", "second", "later: left out, the time is over",
    ]  # fmt: skip
    assert record["verdict"] == "1 checks passed, 2 failed, 4 rows; failed: breaks: it failed; second"
    assert "| **FAILED** | no such kernel |" in page


def test_rows_of_a_bench_that_failed_are_kept(tmp_path, capsys, monkeypatch):
    def fails(command, **_):
        row = {"name": "a race", "ours": 2.0, "unit": "s", "ratio": 0.5, "target": ""}
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"rows": [row]}))
        return Namespace(returncode=1, stderr="bench.py: error: planted\n")

    monkeypatch.setattr(gpu_checks.subprocess, "run", fails)
    monkeypatch.setattr(gpu, "environment", lambda device: {})
    status, record, _ = reported(tmp_path, capsys, "--checks", "racing")
    assert status == 1 and [row["what"] for row in record["rows"]] == ["a race", "racing: it failed"]
    assert record["rows"][1]["note"] == "bench.py: status 1: bench.py: error: planted"


def test_the_killed_run_has_what_it_patches():
    assert callable(training.loop.StepHooks.after_step)


@pytest.mark.parametrize("words", [["--checks", "nonsense"], ["--minutes", "0"]])
def test_wrong_flags(words, capsys):
    status, _, err = run(gpu.main, words, capsys)
    assert status == 2 and len(err.splitlines()) == 1
