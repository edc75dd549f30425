"""Bad input: one line on standard error that says what to do, status 2, nothing touched. Imports and help."""

import argparse
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

import cifar_main
import cifar_test
import utils
import visualize_attention
from checkpoints.files import load_checkpoint, save_checkpoint
from runs import ROOT, TINY, run, shell, typed
from training import run_folder

DIGITS = [*TINY, "--data_set", "DIGITS", "--max_steps", "1"]
MODULES = sorted(file.stem for file in ROOT.glob("*.py"))


def refused(main, argv, capsys, *words, cwd=None):
    before = {f: f.read_bytes() for f in cwd.rglob("*") if f.is_file()} if cwd else {}
    status, out, err = run(main, argv, capsys)
    assert status == 2, (status, out, err)
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err
    if cwd:
        assert before == {f: f.read_bytes() for f in cwd.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--cls_pos 3", "0..2, or None"),
        ("--reg_pos 3", "0..2"),
        ("--cls_pos x", "not a whole number"),
        ("--num_heads 5", "24 is not divisible by 5 heads"),
        ("--patch_size 5", "32 x 32 pixels is not divisible into patches of 5 x 5"),
        ("--input_size 30", "30 x 30"),
        ("--epochs 0", "at least 1, not 0"),
        ("--epochs 2.5", "whole number"),
        ("--batch_size 0", "at least 1"),
        ("--batch_size 7", "even"),
        ("--mixup -1", "at least 0"),
        ("--lr 0", "more than 0"),
        ("--lr nan", "more than 0"),
        ("--lr inf", "finite"),
        ("--drop_path 1", "at most 0.99"),
        ("--smoothing 1", "at most"),
        ("--ema 1", "at most"),
        ("--warmup_epochs 200", "less than --epochs"),
        ("--accum_steps 0", "at least 1"),
        ("--val_size 5000", "--val_size 5000"),
        ("--val_size -1", "at least 0"),
        ("--device cuda", "there is no cuda here"),
        ("--device toaster", "no device"),
        ("--amp fp16", "needs a CUDA device"),
        ("--model resnet50", "dynamic_vit_cifar"),
        ("--data_set MNIST", "DIGITS"),
        ("--no_such_flag 1", "--no_such_flag"),
        ("--epoch 3", "--epoch"),
        ("--resume", "there is no"),
    ],
)
def test_flags(flags, word, tmp_path, capsys):
    argv = [*DIGITS, *flags.split(), "--model_path", tmp_path / "new" / "m.pth"]
    refused(cifar_main.main, argv, capsys, word)
    assert not (tmp_path / "new" / "m.pth").exists()


def test_both_spellings(tmp_path, capsys):
    argv = [*DIGITS, "--batch-size=7", "--model-path", tmp_path / "m.pth"]
    refused(cifar_main.main, argv, capsys, "--batch_size 7")


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


@pytest.fixture
def broken(trained, tmp_path):
    """Files that are no checkpoints, by name."""
    good = (trained / "model.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "random.pth").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "foreign.pth")
    torch.save({"model": Payload(tmp_path / "executed")}, tmp_path / "code.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    other = torch.load(trained / "model.pth", weights_only=True)
    other["model_args"]["embed_dim"] = 48
    torch.save(other, tmp_path / "contradiction.pth")
    return tmp_path


BROKEN = ("absent cut empty random text folder list foreign code pickle contradiction").split()


@pytest.mark.parametrize("name", [*(f"{name}.pth" for name in BROKEN), "cut.safetensors"])
def test_checkpoints(name, broken, capsys):
    path = broken / name
    refused(cifar_test.main, ["--model_path", path], capsys, name, cwd=broken)
    refused(visualize_attention.main, ["--model_path", path, "--output_dir", broken / "o"], capsys, name, cwd=broken)
    refused(cifar_main.main, ["--eval", "--model_path", path], capsys, name, cwd=broken)
    argv = [*DIGITS, "--model_path", broken / "new.pth", "--resume", path]
    refused(cifar_main.main, argv, capsys, cwd=broken)
    assert not (broken / "executed").exists()


def test_a_result_is_nothing_to_resume_from(trained, tmp_path, capsys):
    shutil.copy(trained / "model.pth", tmp_path / "m.pth")
    argv = [
        *DIGITS,
        "--cls_pos",
        "2",
        "--reg_pos",
        "1",
        "--model_path",
        tmp_path / "n.pth",
        "--resume",
        tmp_path / "m.pth",
    ]
    refused(cifar_main.main, argv, capsys, "no optimizer state", "checkpoint.pth", cwd=tmp_path)


def damage_nothing(root):
    shutil.rmtree(root)


def damage_empty(root):
    for file in (root / "train" / "red").iterdir():
        file.unlink()


def damage_classes(root):
    (root / "test" / "red").rename(root / "test" / "green")


def damage_image(root):
    (root / "train" / "red" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")


def damage_test(root):
    shutil.rmtree(root / "test")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_nothing, ["there is no folder", "train"]),
        (damage_empty, ["red", "no images"]),
        (damage_classes, ["only the training images have red", "only the test images have green"]),
        (damage_image, ["3.png"]),
        (damage_test, ["test", "val"]),
    ],
)
def test_folders(damage, words, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "data")
    damage(tmp_path / "data")
    argv = [*TINY, "--data_set", "FOLDER", "--data_path", tmp_path / "data", "--model_path", tmp_path / "m.pth"]
    refused(cifar_main.main, argv, capsys, *words, cwd=tmp_path)


def test_data_that_are_gone(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "data")
    argv = [*TINY, "--data_path", tmp_path / "data", "--max_steps", "1", "--model_path", tmp_path / "m.pth"]
    assert run(cifar_main.main, argv, capsys)[0] == 0
    (tmp_path / "data" / "test" / "red").rename(tmp_path / "data" / "test" / "green")
    refused(cifar_test.main, ["--model_path", tmp_path / "m.pth"], capsys, "only the model have red", cwd=tmp_path)
    shutil.rmtree(tmp_path / "data")
    refused(cifar_test.main, ["--model_path", tmp_path / "m.pth"], capsys, "--data_path", cwd=tmp_path)


def test_unwritable_output(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("a file, not a folder")
    refused(
        cifar_main.main, [*DIGITS, "--model_path", tmp_path / "file" / "m.pth"], capsys, "cannot write", cwd=tmp_path
    )
    argv = ["--model_path", trained / "model.pth", "--output_dir", tmp_path / "file"]
    refused(visualize_attention.main, argv, capsys, "cannot write", cwd=tmp_path)


def test_images_to_draw(trained, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no image")
    argv = ["--model_path", trained / "model.pth", "--output_dir", tmp_path]
    for more, word in (
        (["--image_path", tmp_path / "absent.jpg"], "absent.jpg"),
        (["--image_path", tmp_path / "notes.txt"], "notes.txt"),
        (["--image_path", tmp_path], "no images"),
        (["--img_num", "360"], "0..359"),
        (["--tokens", "cls,foo"], "cls,reg"),
        (["--mean", "0", "0", "0"], "leave out --mean"),
        (["--layer_num", "3"], "0..2"),
    ):
        refused(visualize_attention.main, argv + more, capsys, word, cwd=tmp_path)


def test_as_a_process(tmp_path):
    """The real thing: status 2, one line, no traceback."""
    for script, argv in (
        ("cifar_main.py", ["--epochs", "0"]),
        ("cifar_main.py", ["--data_path", "nowhere", "--data_set", "FOLDER"]),
        ("cifar_test.py", []),
        ("visualize_attention.py", []),
    ):
        out, err = shell(script, *argv, cwd=tmp_path, status=2)
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith(f"{script}: error: ")
    assert typed(ROOT / script, cwd=tmp_path, status=2) == (out, err)


def test_values_in_hints_are_as_the_flag_takes_them(tmp_path):
    for text, kind in (("48x64", utils.image_size), ("none", utils.position), ("3", utils.position)):
        assert utils.flag_value(kind(text)) == text
    saved = {"args": {"input_size": (48, 48), "num_reg": 4}, "processes": [None], "batch": 0}
    here = argparse.Namespace(input_size=(32, 64), num_reg=2, output_dir=str(tmp_path), overwrite=False)
    with pytest.raises(utils.BadInput) as error:
        run_folder.check_same_run(tmp_path / "checkpoint.pth", saved, here)
    assert "--input_size was 48x48, is now 32x64; --num_reg was 4, is now 2" in str(error.value)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "c.pth", {"a": 1})

    def full(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(utils.RunFailed, match="No space left"):
        save_checkpoint(tmp_path / "c.pth", {"a": 2})
    assert load_checkpoint(tmp_path / "c.pth") == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["c.pth"]


def test_importing_does_nothing(tmp_path):
    """No output, no file, no plotting or learning library, no arguments read, no random state moved."""
    code = f"""
import sys, random
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["x", "--nonsense"]
import torch
torch.manual_seed(5); state = torch.get_rng_state()
for name in {MODULES!r}:
    __import__(name)
assert torch.equal(state, torch.get_rng_state())
slow = {{"matplotlib.pyplot", "matplotlib.figure", "sklearn.datasets", "sklearn.metrics"}} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
