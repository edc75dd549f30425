"""main_distillation.py in several processes, started by torchrun as a user does (Gloo, CPU), and by submitit."""

import json
import time

import pytest
import torch

import main_distillation
import run_with_submitit
from checkpoints.files import load_checkpoint
from checkpoints.models import load_model
from conftest import ROOT, STUDENT, run, shell
from engine import evaluate
from loading.files import FileLoader, load_file_data
from training.scoring import score

# Nothing is drawn, so that one process and several see the same images in a step.
PLAIN = [*STUDENT, *"--no_aug --drop_path 0 --no-repeated-aug --amp off --val_size 0 --epochs 1".split()]
GRADIENT = [*PLAIN, *"--max_steps 1 --opt sgd --lr 1 --unscale-lr --weight_decay 0 --warmup_epochs 0".split()]
BATCH_NORM = "--data_set DIGITS --model resnet10t --input_size 32 --num_workers 0 --device cpu".split()
BATCH_NORM += "--batch_size 16 --max_steps 4 --drop_path 0 --lr 0.01 --unscale-lr --warmup_epochs 0".split()
STEPS = [*PLAIN, *"--max_steps 5 --lr 1e-3 --warmup_epochs 0.1".split()]


def torchrun(processes, script, *argv, cwd, **kwargs):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return shell(script, *argv, cwd=cwd, launcher=launcher, **kwargs)


def jobs(folder, *todo):
    path = folder / "jobs.json"
    path.write_text(json.dumps(list(todo)))
    return path


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A folder with noise: 12 training images, and 7 to test, which neither 2 nor 3 processes share evenly."""
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("seven"), torch.Generator().manual_seed(0)
    for part, counts in (("train", (6, 6)), ("val", (3, 4))):
        for name, count in zip("ab", counts):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (20, 30, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def together(tmp_path_factory, seven):
    """A folder with what two processes left: runs `gradient`, `steps` and `seven`, and the figures of `seven`."""
    folder = tmp_path_factory.mktemp("together")
    imnet = [*STUDENT, "--data_set", "IMNET", "--data_path", str(seven), "--epochs", "1", "--output_dir"]
    todo = jobs(
        folder,
        {"argv": [*GRADIENT, "--batch_size", "16", "--output_dir", "gradient"]},
        {"argv": [*STEPS, "--batch_size", "16", "--output_dir", "steps"]},
        {"argv": [*imnet, "seven", "--batch_size", "2", "--val_size", "3"]},
        {"argv": [*BATCH_NORM, "--output_dir", "batchnorm"]},
        {"score": "seven/best_checkpoint.pth", "to": "figures2.json"},
    )
    torchrun(2, ROOT / "tests" / "processes.py", todo, cwd=folder)
    return folder


@pytest.mark.parametrize(("name", "argv"), [("gradient", GRADIENT), ("steps", STEPS)])
def test_two_processes_train_as_one(together, tmp_path, capsys, name, argv):
    """After one step of SGD the weights tell the gradient; after five of AdamW they are the same to rounding."""
    alone = tmp_path / name
    assert run(main_distillation.main, [*argv, "--batch_size", "32", "--output_dir", alone], capsys)[0] == 0
    one, two = (load_checkpoint(folder / "checkpoint.pth") for folder in (alone, together / name))
    assert one["step"] == two["step"] == (1 if name == "gradient" else 5)
    assert one["model"].keys() == two["model"].keys()
    for key, weight in one["model"].items():
        assert torch.allclose(weight, two["model"][key], atol=2e-5), key
    assert one["metrics"]["train_loss"] == pytest.approx(two["metrics"]["train_loss"], rel=1e-4)
    assert one["metrics"]["grad_norm"] == pytest.approx(two["metrics"]["grad_norm"], rel=1e-3)


def test_no_wrapper_in_the_checkpoints(together):
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        keys = load_checkpoint(together / "steps" / name)["model"]
        assert "blocks.0.norm1.weight" in keys
        assert not any(key.startswith(("module.", "_orig_mod.")) for key in keys)


def test_every_image_is_counted_once(together):
    """One, two and three processes give the same figures on seven images."""
    torchrun(
        3, ROOT / "tests" / "processes.py",
        jobs(together, {"score": "seven/best_checkpoint.pth", "to": "figures3.json"}), cwd=together,
    )  # fmt: skip
    model, checkpoint = load_model(together / "seven" / "best_checkpoint.pth")
    alone, _ = score(model, checkpoint, None, torch.device("cpu"), batch_size=4)
    assert alone["images"] == 7
    for count in (2, 3):
        figures = json.loads((together / f"figures{count}.json").read_text())
        assert figures["loss"] == pytest.approx(alone.pop("loss", figures["loss"]), rel=1e-5)
        assert {k: figures[k] for k in ("top1", "top5", "images")} == {k: alone[k] for k in ("top1", "top5", "images")}
    log = [json.loads(line) for line in (together / "seven" / "log.txt").read_text().splitlines()]
    assert log[0]["processes"] == 2
    assert log[0]["data"]["images"] == {"train": 9, "val": 3, "test": 7}


def test_the_saved_model_is_the_one_that_was_scored(together):
    """Also with batch norm, whose running statistics differ from process to process before they are shared."""
    model, checkpoint = load_model(together / "batchnorm" / "best_checkpoint.pth")
    val = load_file_data("DIGITS", None, (32, 32), None, 1.0).val
    figures = evaluate(model, FileLoader(val, checkpoint["data"], 64, torch.device("cpu")))
    assert figures["loss"] == pytest.approx(checkpoint["metrics"]["val_loss"], rel=1e-5)
    assert figures["top1"] == checkpoint["metrics"]["val_top1"]


@pytest.mark.parametrize(("how", "cause"), [("raise", "planted in rank 1"), ("kill", "Signal 9 (SIGKILL)")])
def test_a_rank_that_dies_ends_the_others(tmp_path, how, cause):
    start = time.monotonic()
    todo = jobs(tmp_path, {"die": how}, {"argv": [*STEPS, "--output_dir", "run"]})
    done = torchrun(2, ROOT / "tests" / "processes.py", todo, cwd=tmp_path, status=1)
    assert time.monotonic() - start < 60
    root_cause = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in root_cause
    assert cause in root_cause
    assert not (tmp_path / "run" / "best_checkpoint.pth").exists()


def test_what_all_processes_refuse_is_printed_once(tmp_path):
    done = torchrun(2, "main_distillation.py", "--distributed", "--data_path", "nowhere", cwd=tmp_path, status=1)
    words = "there is no folder nowhere/train; give --data_path"
    assert done.stderr.count(f"main_distillation.py: error: {words}") == 1
    assert "BadInput" not in done.stderr  # no traceback of ours, also in torchrun's summary
    assert done.stderr.index("Root Cause") < done.stderr.rindex(words)


def test_submitit(tmp_path, capsys):
    """Two tasks of its local executor train and test one model; the same job again goes on from its checkpoint."""
    pytest.importorskip("submitit")
    argv = ["--cluster", "local", "--ngpus", "2", "--job_dir", tmp_path / "job", "--wait"]
    argv += [*STUDENT, "--max_steps", "2", "--batch_size", "8"]
    assert run(run_with_submitit.main, argv, capsys)[0] == 0
    log = [json.loads(line) for line in (tmp_path / "job" / "log.txt").read_text().splitlines()]
    assert log[0]["processes"] == 2
    out = next((tmp_path / "job" / "submitit").glob("*_0_log.out")).read_text()
    assert "Accuracy: top-1" in out
    (tmp_path / "job" / "submitit").rename(tmp_path / "first")
    status, _, err = run(run_with_submitit.main, [*argv, "--depth", "2"], capsys)
    assert status == 1
    assert "failed; its messages are in" in err
    err = next((tmp_path / "job" / "submitit").glob("*_0_log.err")).read_text()
    assert "--resume: the model of" in err and "depth is 3 there, 2 here" in err
