"""One run a folder: checkpoints that rotate, flags that differ, the lock, the log."""

import json
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

import cifar_main
import forked
import main_distillation
from checkpoints.files import load_checkpoint
from forked import AUGMENTED, TWO_EPOCHS, Child
from runs import DIGITS, run
from training import loop, run_folder
from training.run_log import read_json_lines

pytestmark = pytest.mark.usefixtures("deterministic")


def test_no_checkpoint_is_whole(tmp_path, capsys):
    for name in ("checkpoint.pth", "checkpoint_1.pth"):
        (tmp_path / name).write_bytes(b"nothing")
    status, out, err = run(cifar_main.main, [*TWO_EPOCHS, "--model_path", tmp_path / "m.pth", "--resume"], capsys)
    assert status == 2 and "is undamaged; --overwrite trains anew" in err
    assert "checkpoint.damaged now, and checkpoint_1.pth is tried" in out
    assert "checkpoint_1.damaged now\n" in out  # there is none before it


def test_checkpoints_rotate(tmp_path):
    for n in range(5):
        run_folder.save(tmp_path, {"n": n}, keep=3)
    run_folder.save(tmp_path, {"n": 5}, keep=2)
    names = [file.name for file in run_folder.checkpoints(tmp_path)]
    assert names == ["checkpoint.pth", "checkpoint_1.pth"]
    assert [load_checkpoint(tmp_path / name)["n"] for name in names] == [5, 4]
    (tmp_path / "checkpoint_x.pth").write_text("somebody's")
    (tmp_path / "checkpoint_10.pth").write_text("old")
    (tmp_path / "checkpoint_9.pth").write_text("old")
    assert [file.name for file in run_folder.checkpoints(tmp_path)][2:] == ["checkpoint_9.pth", "checkpoint_10.pth"]


def test_other_flags_are_another_run(tmp_path, capsys):
    argv = [*TWO_EPOCHS, "--epochs", "1", "--model_path", tmp_path / "a" / "m.pth"]
    assert run(cifar_main.main, argv, capsys)[0] == 0
    before = {f: f.read_bytes() for f in (tmp_path / "a").iterdir()}
    status, _, err = run(cifar_main.main, [*argv, "--resume", "--lr", "1e-3"], capsys)
    assert status == 2 and "--lr was 0.002, is now 0.001" in err and "--overwrite resumes with these" in err
    assert before == {f: f.read_bytes() for f in (tmp_path / "a").iterdir()}
    status, out, err = run(cifar_main.main, [*argv, "--resume", "--epochs", "2"], capsys)  # longer, and said
    assert status == 0 and "--epochs was 1, is now 2" in out, err
    elsewhere = [*argv, "--resume", tmp_path / "a" / "checkpoint.pth", "--lr", "1e-3", "--epochs", "3"]
    status, out, err = run(cifar_main.main, [*elsewhere, "--model_path", tmp_path / "b" / "m.pth"], capsys)
    assert status == 0 and "--lr was 0.002, is now 0.001" in out, err
    log = read_json_lines(tmp_path / "b" / "log.txt")
    assert log[0]["args"]["lr"] == 1e-3 and [r["epoch"] for r in log[1:]] == [2, 3]


def test_overwriting_leaves_nothing_to_resume_from(tmp_path, capsys):
    """A run that is killed before its first checkpoint must not go on with the one that it was to replace."""
    argv = [*TWO_EPOCHS, "--model_path", tmp_path / "m.pth"]
    assert run(cifar_main.main, argv, capsys)[0] == 0

    def dies(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    status, _, _ = forked.run([*argv, "--overwrite"], before=lambda: setattr(loop, "train_one_epoch", dies))
    assert status == 137
    assert not run_folder.checkpoints(tmp_path) and not (tmp_path / "m.pth").exists()


def test_data_that_changed(photos, tmp_path, capsys):
    """Another number of images, or other classes."""
    import shutil

    data = shutil.copytree(photos, tmp_path / "data")
    argv = [*AUGMENTED, "--data_set", "FOLDER", "--data_path", data, "--epochs", "1", "--batch_size", "4"]
    argv += ["--model_path", tmp_path / "m" / "m.pth"]
    assert run(cifar_main.main, argv, capsys)[0] == 0
    (data / "test" / "red" / "0.png").unlink()
    argv_eval = ["--eval", "--device", "cpu", "--model_path", tmp_path / "m" / "m.pth"]
    status, out, err = run(cifar_main.main, argv_eval, capsys)
    assert status == 0 and "note: there are 5 test images; in training there were 6" in out, err
    (data / "train" / "red" / "0.png").unlink()
    status, _, err = run(cifar_main.main, [*argv, "--resume"], capsys)
    assert status == 2 and "the data of" in err and "'train': 17" in err


def test_a_second_run_in_the_folder_is_refused(tmp_path, capsys):
    argv = [*AUGMENTED, "--epochs", "500"]
    process = Child([*argv, "--model_path", tmp_path / "model.pth"])
    try:
        process.until("epoch 1/")
        for more in ([], ["--resume"], ["--overwrite"]):
            other = ["--output_dir", tmp_path, "--model_path", tmp_path / "other.pth", *more]
            status, _, err = run(cifar_main.main, [*argv, *other], capsys)
            assert status == 2 and f"process {process.pid} on {socket.gethostname()}" in err, err
    finally:
        process.kill()
        process.end()
    argv += ["--model_path", tmp_path / "model.pth", "--resume", "--max_steps", "1", "--overwrite"]
    status, out, err = run(cifar_main.main, argv, capsys)
    assert (
        status == 0 and f"process {process.pid} on {socket.gethostname()}" in out and "removing its stale lock" in out
    ), err
    assert not {"lock", "running.json"} & {file.name for file in tmp_path.iterdir()}


def test_the_best_model_elsewhere_is_locked_too(tmp_path):
    best = tmp_path / "models" / "best.pth"
    best.parent.mkdir()

    def hold(folder, path):
        """In another process."""

        def main(_):
            with run_folder.locked(tmp_path / folder, best.with_name(path)):
                pass

        return forked.run([], main)

    with run_folder.locked(tmp_path / "a", best):
        assert hold("b", "best.pth")[0] == 2 and f"process {os.getpid()} on" in hold("b", "best.pth")[2]
        assert hold("a", "other.pth")[0] == 2
        assert hold("b", "other.pth")[0] == 0
        with run_folder.locked(tmp_path / "a"):  # by the same process, as a sweep does
            pass
    with run_folder.locked(tmp_path / "b", best):
        pass
    assert [file.name for file in best.parent.iterdir()] == []


def test_a_log_is_repaired(tmp_path):
    """A half line, bytes that are none, an epoch that the checkpoint does not know, one that is not written yet."""
    header, log = {"args": {"lr": 1}}, tmp_path / "log.txt"
    lines = [json.dumps(record).encode() for record in (header, {"epoch": 1, "a": 1}, {"epoch": 2}, {"epoch": 3})]
    log.write_bytes(b"\n".join([lines[0], lines[1], b"\xff\xfe{}", b"17", lines[3], b'{"epoch": 4, "tr']))
    run_folder.resume_log(tmp_path, header, 2, {"epoch": 2, "b": 2})
    records = read_json_lines(log)
    assert records == [header | {"job": None}, {"epoch": 1, "a": 1}, {"epoch": 2, "b": 2}]
    assert log.read_text().count("\n") == 3


def test_no_flag_of_a_run_is_forgotten_by_the_comparison():
    """What may differ between a run and its continuation is listed, and is a flag of one of the scripts."""
    known = {
        action.dest
        for parser in (cifar_main.get_parser(), main_distillation.get_parser())
        for action in parser._actions
    }
    assert set(run_folder.MAY_DIFFER) | set(run_folder.MAY_CHANGE) <= known
    assert {"lr", "seed", "batch_size", "mixup", "amp", "max_steps", "skip_bad_steps"} <= known - set(
        run_folder.MAY_DIFFER
    )


def test_resuming_another_model_is_refused(trained, capsys):
    before = {file: file.read_bytes() for file in trained.iterdir()}
    argv = [*DIGITS, "--model_path", trained / "model.pth", "--resume", "--cls_pos", "0"]
    status, _, err = run(cifar_main.main, argv, capsys)
    assert status == 2
    assert "cls_pos is 2 there, 0 here" in err
    assert before == {file: file.read_bytes() for file in trained.iterdir()}


def test_a_run_on_windows_ends_no_process(tmp_path, monkeypatch):
    """os.kill with signal 0 sends Ctrl-C there."""
    (tmp_path / "running.json").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    monkeypatch.setattr(run_folder, "os", SimpleNamespace(name="nt"))
    assert run_folder.is_running(tmp_path)


def test_windows_removes_no_open_file(tmp_path, monkeypatch):
    unlink = Path.unlink

    def refuses(path, missing_ok=False):
        if path.name == "lock":
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuses)
    for _ in range(2):  # what stays there is no obstacle
        with run_folder.locked(tmp_path):
            assert run_folder.is_running(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["lock"]
