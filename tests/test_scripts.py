"""The examples in the scripts' own docstrings, as printed, one after the other in one folder."""

import pickle
import re
import shutil

import numpy as np
import pytest

import cifar_main
import main_distillation
from conftest import run

TINY = "--embed_dim 24 --depth 5 --num_heads 3 --max_steps 1 --batch_size 4 --val_size 10 --device cpu".split()


def examples(module):
    """The arguments of each command that names the script, without its comment."""
    lines = re.findall(rf"^    python {module.__name__}.py (.*)$", module.__doc__, re.M)
    return [line.partition(" #")[0].split() for line in lines]


@pytest.fixture
def work(tmp_path, monkeypatch, photos):
    """A folder with the data that the examples name, few of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    shutil.copytree(photos, "my_photos")
    cifar = tmp_path / "data" / "CIFAR10" / "cifar-10-batches-py"
    cifar.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (cifar / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(20)]}))
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return tmp_path


def test_cifar_main(work, capsys):
    commands = examples(cifar_main)
    assert len(commands) == 3
    for argv in commands:
        status, out, err = run(cifar_main.main, [*argv, *TINY], capsys)
        assert status == 0 and "Test accuracy" in out, (argv, err)
    status, out, err = run(cifar_main.main, [*commands[0], *TINY], capsys)
    assert status == 0 and "only tested now" in out, err


def test_main_distillation(work, capsys):
    commands = examples(main_distillation)
    assert len(commands) == 2
    shutil.copytree("my_photos", "data/imagenet")
    shutil.move("data/imagenet/test", "data/imagenet/val")
    more = [*TINY, "--num_workers", "0"]
    small = ["--model", "dynamic_vit_cifar", "--input_size", "32"]
    assert run(main_distillation.main, [*more, *small], capsys)[0] == 0  # what torchrun does in the first example
    for argv in commands:
        status, out, err = run(main_distillation.main, [*argv, *more], capsys)
        assert status == 0 and "Accuracy: top-1" in out, (argv, err)
