"""Both training scripts in several processes (Gloo, CPU): by torchrun, its agent, and submitit."""

import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import cifar_test
import forked
import main_distillation
import run_with_submitit
import utils
from checkpoints.files import load_checkpoint
from checkpoints.models import load_model, model_from_checkpoint
from engine import evaluate
from loading.files import FileLoader, load_file_data
from loading.memory import MemoryLoader, load_data
from runs import DIGITS, ROOT, STUDENT, run, typed
from test_loading_files import WORKERS
from test_training_film import check_maps
from training import loop, slurm
from training.run_log import read_json_lines
from training.scoring import score

# Nothing is drawn, so that one process and several see the same images in a step.
PLAIN = [*STUDENT, *"--no_aug --drop_path 0 --no-repeated-aug --amp off --val_size 0 --epochs 1".split()]
GRADIENT = [*PLAIN, *"--max_steps 1 --opt sgd --lr 1 --unscale-lr --weight_decay 0 --warmup_epochs 0".split()]
BATCH_NORM = "--data_set DIGITS --model resnet10t --input_size 32 --num_workers 0 --device cpu".split()
BATCH_NORM += "--batch_size 16 --max_steps 4 --drop_path 0 --lr 0.01 --unscale-lr --warmup_epochs 0".split()
STEPS = [*PLAIN, *"--max_steps 5 --lr 1e-3 --warmup_epochs 0.1".split()]


def in_processes(processes, main, *argv, cwd, status=0):
    """Standard output and standard error of `main(argv)` in several processes, run by torchrun's agent."""
    done, out, err = forked.run(argv, forked.torchrun(processes, main), cwd=cwd)
    assert done == status, out + err
    return out, err


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


def write_score(checkpoint, file):
    """A process of several, that tests a checkpoint; the first one writes the figures."""
    utils.init_distributed(torch.device("cpu"))
    model, content = load_model(checkpoint)
    figures, _ = score(model, content, None, torch.device("cpu"), batch_size=2)
    if utils.is_main():
        file.write_text(json.dumps(figures))


@pytest.fixture(scope="module")
def together(tmp_path_factory, seven):
    """A folder with what two processes left: runs `gradient`, `steps` and `seven`, and the figures of `seven`."""
    folder = tmp_path_factory.mktemp("together")
    imnet = [*STUDENT, "--data_set", "IMNET", "--data_path", str(seven), "--epochs", "1", "--output_dir"]

    def work(_):
        for argv in (
            [*GRADIENT, "--batch_size", "16", "--output_dir", "gradient"],
            [*STEPS, "--batch_size", "16", "--output_dir", "steps"],
            [*imnet, "seven", "--batch_size", "2", "--val_size", "3"],
            [*BATCH_NORM, "--output_dir", "batchnorm"],
        ):
            main_distillation.main(argv)
        write_score(folder / "seven" / "best_checkpoint.pth", folder / "figures2.json")

    in_processes(2, work, cwd=folder)
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
    best = together / "seven" / "best_checkpoint.pth"
    in_processes(3, lambda _: write_score(best, together / "figures3.json"), cwd=together)
    model, checkpoint = load_model(best)
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
    def main(argv):
        def dies(*args, **kwargs):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("planted in rank 1")

        if os.environ["RANK"] == "1":
            loop.train_one_epoch = dies
        main_distillation.main(argv)

    start = time.monotonic()
    _, err = in_processes(2, main, *STEPS, "--output_dir", "run", cwd=tmp_path, status=1)
    assert time.monotonic() - start < 60
    root_cause = err[err.index("Root Cause") :]
    assert "rank      : 1" in root_cause
    assert cause in root_cause
    assert not (tmp_path / "run" / "best_checkpoint.pth").exists()


def test_what_all_processes_refuse_is_printed_once(tmp_path):
    argv = ["--distributed", "--data_path", "nowhere"]
    main = forked.torchrun(2, forked.script("main_distillation.py"), every=1)  # both have the time to print
    status, _, err = forked.run(argv, main, cwd=tmp_path)
    words = "there is no folder nowhere/train; give --data_path"
    assert status == 1 and err.count(f"main_distillation.py: error: {words}") == 1
    assert "BadInput" not in err  # no traceback of ours, also in torchrun's summary
    assert err.index("Root Cause") < err.rindex(words)


def test_cifar_main_as_a_user_types_it(tmp_path, capsys):
    """No wrapper's names in the checkpoint, the accuracy that one process finds, maps and lines of one process."""
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    argv = [*DIGITS, *"--amp off --model_path m.pth --batch_size 64 --epochs 1 --viz_every 1".split()]
    out, _ = typed(*torchrun, ROOT / "cifar_main.py", *argv, cwd=tmp_path)
    checkpoint = load_checkpoint(tmp_path / "m.pth")
    assert not any(name.startswith("module.") for name in checkpoint["model"])
    assert json.loads((tmp_path / "log.txt").read_text().splitlines()[0])["processes"] == 2
    status, alone, _ = run(cifar_test.main, ["--model_path", tmp_path / "m.pth", "--device", "cpu"], capsys)
    assert status == 0 and alone.splitlines()[-1] in out.splitlines()
    assert out.count("Test accuracy") == 1
    assert out.count("wrote attention/epoch_0001.png") == 1
    last = load_checkpoint(tmp_path / "checkpoint.pth")
    images, _ = next(iter(MemoryLoader(load_data("DIGITS", None, (32, 32)).val, last["data"], 4)))
    check_maps(tmp_path / "attention" / "epoch_0001.npz", model_from_checkpoint(last), images)
    with Image.open(tmp_path / "attention" / "attention_cls.gif") as film:
        assert film.n_frames == 2


def test_broken_images_end_all_processes(tmp_path, photos):
    """Each of two processes meets them, in the test after the training: what both refuse is printed once."""
    bad = shutil.copytree(photos, tmp_path / "bad")
    for file in (bad / "test").rglob("*.png"):
        file.write_bytes(b"broken")
    argv = [*WORKERS, "--data_path", bad, *"--batch_size 4 --val_size 4 --epochs 1 --max_steps 1".split()]
    _, err = in_processes(2, forked.script("main_distillation.py"), *argv, cwd=tmp_path, status=1)
    printed = [line for line in err.splitlines() if line.startswith("main_distillation.py")]
    assert len(printed) == len(set(printed)) and all("cannot read" in line for line in printed), err
    assert printed and "BadInput" not in err


def test_submitit(tmp_path, capsys, monkeypatch):
    """Two tasks of its local executor get submitit's signal in training, as SLURM sends it: they save, are requeued,
    resume, and test the model."""
    pytest.importorskip("submitit")
    folder, wait = tmp_path / "job", slurm.wait
    log, logs = folder / "log.txt", folder / "submitit"

    def preempt(jobs, where):
        (job,), end = jobs, time.monotonic() + 120
        while not (log.exists() and any("epoch" in record for record in read_json_lines(log))):
            assert time.monotonic() < end and job.state != "FINISHED", job.stderr()
            time.sleep(0.02)
        for task in forked.children_of(int(job.job_id)):
            os.kill(task, signal.SIGUSR2)
        wait(jobs, where)
        assert job.results() == [None, None]

    argv = ["--cluster", "local", "--job_dir", folder, "--wait"]
    more = [*STUDENT, *"--epochs 2 --batch_size 8 --no_aug".split()]
    with monkeypatch.context() as patch:
        patch.setattr(slurm, "wait", preempt)
        assert run(run_with_submitit.main, [*argv, "--ngpus", "2", *more], capsys)[0] == 0
    records = read_json_lines(log)
    assert records[0]["processes"] == 2
    assert [record["epoch"] for record in records if "epoch" in record] == [1, 2]
    out, err = (next(logs.glob(f"*_0_log.{kind}")).read_text() for kind in ("out", "err"))
    assert "stopped by SIGUSR2" in err and "this job is" in out
    assert "resuming after epoch" in out and "Accuracy: top-1" in out


def test_a_submitted_job_that_fails(tmp_path, capsys, monkeypatch):
    """The folder of another model is refused in the job, whose messages the submitting process points to."""
    pytest.importorskip("submitit")
    argv = [*STUDENT, *"--epochs 1 --batch_size 64 --no_aug --max_steps 1".split()]
    assert run(main_distillation.main, [*argv, "--output_dir", tmp_path], capsys)[0] == 0
    here = SimpleNamespace(export=lambda **_: None)  # one process, which torchrun's agent has started instead
    monkeypatch.setattr("submitit.helpers.TorchDistributedEnvironment", lambda: here)

    def task(argv):
        run_with_submitit.Task(tmp_path, argv)()

    _, err = in_processes(1, task, *argv, "--depth", "2", cwd=tmp_path, status=1)
    assert "the model of" in err and "depth is 3 there, 2 here" in err
    assert "main_distillation.py ended with status 2; its message is above" in err

    def failed():
        raise RuntimeError("submitit's own words")

    with pytest.raises(utils.RunFailed, match=r"job 7 failed; its messages are in .*7_\*_log\.err"):
        slurm.wait([SimpleNamespace(job_id=7, results=failed)], tmp_path)
