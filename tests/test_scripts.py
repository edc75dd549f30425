"""Each script: --help, one small run as `python SCRIPT` runs it, and the examples in its docstring, as printed."""

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import cifar_main
import house
import main_distillation
from runs import STUDENT, TINY, run, shell
from training import run_folder

SMALL = "--embed_dim 24 --depth 5 --num_heads 3 --max_steps 1 --batch_size 4 --val_size 10 --device cpu".split()

CELL = [*TINY[: TINY.index("--num_reg")], "--patch_size", "8", "--device", "cpu", "--num_threads", "1"]
# A small run of each (MODEL: a checkpoint), and what it prints.
RUNS = {
    "cifar_main.py": ([*TINY, "--data_set", "DIGITS", "--max_steps", "1"], "Test accuracy"),
    "main_distillation.py": ([*STUDENT, "--max_steps", "1", "--output_dir", "."], "Accuracy: top-1"),
    "cifar_test.py": ("--model_path MODEL --device cpu".split(), "Test accuracy"),
    "visualize_attention.py": (
        "--model_path MODEL --layer_num 2 --device cpu".split(),
        "attention_DIGITS_test0_block2",
    ),
    "analyze_tokens.py": ("--model_path MODEL --num_images 20 --device cpu".split(), "20 images of DIGITS"),
    "discover_objects.py": ("--model_path MODEL --device cpu".split(), "objects.pdf"),
    "export_model.py": ("MODEL exported".split(), "wrote exported"),
    "position_sweep.py": (
        [*CELL, *"--data_set DIGITS --cls_pos 0 --reg_pos 0 --num_reg 0 --seeds 0 --epochs 1 --repeats 0.1".split()],
        "Test accuracy",
    ),
}

# Run in test_processes.py, test_evaluate.py and, with tiny shapes, in test_speed.py.
ELSEWHERE = ["run_with_submitit.py", "evaluate.py", "bench.py"]


@pytest.mark.parametrize("name", [*RUNS, *ELSEWHERE])
def test_help(name, tmp_path):
    out, err = shell(name, "--help", cwd=tmp_path)
    assert out.startswith(f"usage: {name} ") and err == ""
    assert {"run_with_submitit.py": "--cluster", "export_model.py": "--onnx"}.get(name, "--device") in out
    assert "==SUPPRESS==" not in out
    assert "None" not in out


@pytest.mark.parametrize("name", RUNS)
def test_a_small_run(name, trained, tmp_path):
    argv, words = RUNS[name]
    out, err = shell(name, *(trained / "model.pth" if arg == "MODEL" else arg for arg in argv), cwd=tmp_path)
    assert words in out and err == "", out + err


def test_each_script_is_here():
    scripts = {*house.FLOORS["scripts"], "cifar_test"} - {"hubconf"}  # which is for torch.hub
    assert {f"{name}.py" for name in scripts} == {*RUNS, *ELSEWHERE}


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
        status, out, err = run(cifar_main.main, [*argv, *SMALL], capsys)
        assert status == 0 and "Test accuracy" in out, (argv, err)
    status, out, err = run(cifar_main.main, [*commands[0], *SMALL], capsys)
    assert status == 0 and "only tested now: --overwrite trains anew" in out, err
    with run_folder.locked(Path(commands[0][commands[0].index("--model_path") + 1]).parent):
        status, out, err = run(cifar_main.main, [*commands[0], *SMALL], capsys)
    assert status == 0 and "only tested now: another process is training it" in out, err


def test_main_distillation(work, capsys):
    commands = examples(main_distillation)
    assert len(commands) == 2
    shutil.copytree("my_photos", "data/imagenet")
    shutil.move("data/imagenet/test", "data/imagenet/val")
    more = [*SMALL, "--num_workers", "0"]
    small = ["--model", "dynamic_vit_cifar", "--input_size", "32"]
    assert run(main_distillation.main, [*more, *small], capsys)[0] == 0  # what torchrun does in the first example
    for argv in commands:
        status, out, err = run(main_distillation.main, [*argv, *more], capsys)
        assert status == 0 and "Accuracy: top-1" in out, (argv, err)
