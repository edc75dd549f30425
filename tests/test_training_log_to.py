"""Logs beside log.txt: --log_to, with the real packages, without a network."""

import csv
import json
import sys
from importlib.machinery import ModuleSpec

import pytest

import cifar_main
from runs import DIGITS, killed_in_epoch_3, run
from training import log_to
from training.run_log import read_json_lines

LOGGED = [*DIGITS, "--repeats", "0.1", "--epochs", "4"]


def cut_and_resumed(argv, capsys):
    """Killed in the third epoch, then resumed to the end. Returns what the second run printed."""
    killed_in_epoch_3(cifar_main.main, argv)
    capsys.readouterr()
    status, out, err = run(cifar_main.main, [*argv, "--resume"], capsys)
    assert status == 0, err
    return out + err


def test_csv_is_the_log_as_a_table(tmp_path, capsys):
    argv = [*LOGGED, "--model_path", tmp_path / "m.pth", "--log_to", "csv"]
    (tmp_path / "metrics.csv").write_text("of another run")
    cut_and_resumed(argv, capsys)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [record for record in read_json_lines(tmp_path / "log.txt") if "epoch" in record]
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert rows == [{name: json.dumps(value) for name, value in record.items()} for record in epochs]


def test_a_value_that_only_some_epochs_have_leaves_a_gap(tmp_path):
    (tmp_path / "log.txt").write_text('{"args": {}}\n{"epoch": 1, "lr": 2}\n{"epoch": 2, "lr": 1, "skipped": 3}\n')
    (tmp_path / "metrics.csv").write_text("of another run")
    with log_to.to_csv(tmp_path, "", {}, None) as add:
        assert not (tmp_path / "metrics.csv").exists()
        add({})
    assert (tmp_path / "metrics.csv").read_text() == "epoch,lr,skipped\n1,2,\n2,1,3\n"


def test_tensorboard_under_both_names(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = [*LOGGED, "--model_path", tmp_path / "m.pth", "--log_to", "tensorboard", "--tensorboard"]
    cut_and_resumed(argv, capsys)
    assert len(list(tmp_path.glob("events.*"))) == 2  # one for each of the two runs
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = [record["val_loss"] for record in read_json_lines(tmp_path / "log.txt") if "epoch" in record]
    assert [event.step for event in events.Scalars("val_loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("val_loss")] == pytest.approx(losses)


def test_wandb_resumes_under_the_same_id(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    cut_and_resumed([*LOGGED, "--model_path", tmp_path / "m.pth", "--log_to", "wandb"], capsys)
    name = (tmp_path / "run_id.txt").read_text()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in runs] == [f"run-{name}.wandb"] * 2
    first, second = (file.read_bytes() for file in runs)
    for content in (first, second):
        assert b"val_top1" in content and b"vit-token-entry" in content and b"weight_decay" in content
    assert run(cifar_main.main, [*LOGGED, "--epochs", "1", "--overwrite", "--model_path", tmp_path / "m.pth",
                                 "--log_to", "csv"], capsys)[0] == 0  # fmt: skip
    assert (tmp_path / "run_id.txt").read_text() != name  # another run


def test_trackio_resumes_under_the_same_name(tmp_path, monkeypatch, capsys):
    if "trackio" not in sys.modules:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it looks there when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("TRACKIO_PROJECT", "tests")
    cut_and_resumed([*LOGGED, "--model_path", tmp_path / "run" / "m.pth", "--log_to", "trackio"], capsys)
    name = f"run-{(tmp_path / 'run' / 'run_id.txt').read_text()}"
    logged = SQLiteStorage.get_logs("tests", name)
    epochs = [record for record in read_json_lines(tmp_path / "run" / "log.txt") if "epoch" in record]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
    assert [entry["val_loss"] for entry in logged] == [record["val_loss"] for record in epochs]
    assert [entry["steps"] for entry in logged] == [record["step"] for record in epochs]


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    """Also where a folder wandb/, as its runs leave them, could be imported."""
    folder = ModuleSpec("wandb", None)
    for spec in (None, folder):
        monkeypatch.setattr(log_to, "find_spec", lambda _, spec=spec: spec)
        argv = [*LOGGED, "--model_path", tmp_path / "new" / "m.pth", "--log_to", "csv", "wandb"]
        status, _, err = run(cifar_main.main, argv, capsys)
        assert status == 2 and "pip install wandb" in err and len(err.splitlines()) == 1
        assert not (tmp_path / "new").exists()
