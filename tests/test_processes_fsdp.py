"""main_distillation.py --fsdp in two processes (Gloo, CPU): FSDP2's shards in place of DDP."""

import argparse
import functools
import os
import signal

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch.distributed.fsdp import FSDPModule

import main_distillation
import utils
from checkpoints.files import load_checkpoint
from engine import TrainingStep
from forked import differences, torchrun
from forked import run as forked_run
from runs import STUDENT, run, tiny
from training import film, loop
from training.state import TrainingState
from visualize_attention import main as visualize

# Two epochs of 5 steps, with stochastic depth.
RUN = [*STUDENT, *"--cls_pos 1 --reg_pos 2 --amp off --epochs 2 --batch_size 128 --drop_path 0.2 --ema 0.9".split()]
RUN += "--lr 1e-3 --warmup_epochs 0.1 --clip_grad 0.5 --deterministic --save_steps 3 --val_size 130 --no_aug".split()
# Nothing is drawn, so that one process and two see the same images in a step.
PLAIN = [*RUN, *"--drop_path 0 --no-repeated-aug".split()]
STEP = [*PLAIN, *"--epochs 1 --max_steps 4 --batch_size 16".split()]


def light():
    """In a child: drawing the film takes longer than the run."""
    film.write_film = lambda args: None


def in_two(main, *argv, cwd, status=0):
    """Standard output and standard error of `main(argv)` in two processes."""
    done, out, err = forked_run(argv, torchrun(2, main), light, cwd=cwd)
    assert done == status, out + err
    return out, err


def stops(argv):
    """`main_distillation.main`, which ends after its third checkpoint: one batch into the second epoch."""
    save, saved = TrainingState.save, []

    def third(state):
        save(state)
        saved.append(1)
        if len(saved) == 3:
            raise utils.RunFailed("planted")

    TrainingState.save = third
    main_distillation.main(argv)


def check_close(one, other, atol=3e-6):
    """Two checkpoints are of one form, and their weights and optimizer states are the same to rounding."""
    assert one.keys() == other.keys()
    states = [checkpoint["optimizer"]["state"] for checkpoint in (one, other)]
    assert states[0].keys() == states[1].keys() and states[0]
    pairs = [(one["model"], other["model"]), (one["ema"] or {}, other["ema"] or {})]
    for left, right in pairs + [(states[0][i], states[1][i]) for i in states[0]]:
        assert list(left) == list(right)
        for name, value in left.items():
            assert type(value) is type(right[name]) is torch.Tensor and value.device == right[name].device
            assert torch.allclose(value, right[name], atol=atol), (name, (value - right[name]).abs().max())
    groups = [checkpoint["optimizer"]["param_groups"] for checkpoint in (one, other)]
    assert groups[0] == groups[1]


def checkpoint_of(folder):
    return load_checkpoint(folder / "checkpoint.pth")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the whole runs `ddp` and `fsdp`, and of others that stopped in the second epoch; with maps."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "fsdp_runs"  # one for all workers
    viz = ["--viz_every", "2", "--viz_images", "0"]
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            in_two(main_distillation.main, *RUN, *viz, "--output_dir", "ddp", cwd=folder)
            in_two(main_distillation.main, *RUN, *viz, "--output_dir", "fsdp", "--fsdp", cwd=folder)
            in_two(stops, *RUN, "--output_dir", "ddp_stopped", cwd=folder, status=1)
            in_two(stops, *RUN, "--output_dir", "fsdp_stopped", "--fsdp", cwd=folder, status=1)
            (folder / "done").touch()
    return folder


def test_as_ddp(runs):
    """130 held-out images are batches of 65: weights, EMA, optimizer, figures and maps."""
    ddp, fsdp = (checkpoint_of(runs / name) for name in ("ddp", "fsdp"))
    check_close(ddp, fsdp)
    assert ddp["step"] == fsdp["step"] == 10
    for key in ("train_loss", "grad_norm", "val_loss", "raw_val_loss", "val_top1", "val_top5"):
        assert ddp["metrics"][key] == pytest.approx(fsdp["metrics"][key], rel=1e-4), key
    maps = [np.load(runs / name / "attention" / "epoch_0002.npz") for name in ("ddp", "fsdp")]
    for key in ("cls", "reg0", "logits"):
        assert np.allclose(*(saved[key] for saved in maps), atol=1e-5, equal_nan=True), key


def test_scripts_read_its_checkpoints(runs, tmp_path, capsys):
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        argv = ["--model_path", runs / "fsdp" / name, "--output_dir", tmp_path / name, "--device", "cpu"]
        status, _, err = run(visualize, argv, capsys)
        assert status == 0, err
    argv = ["--eval", "--resume", runs / "fsdp" / "checkpoint.pth", "--device", "cpu", "--num_workers", "0"]
    status, out, _ = run(main_distillation.main, argv, capsys)
    assert status == 0 and "EMA accuracy: top-1" in out


@pytest.mark.parametrize("before", ["ddp", "fsdp"])
@pytest.mark.parametrize("after", ["ddp", "fsdp"])
def test_resumed(runs, tmp_path, before, after):
    """In the middle of an epoch, under the other one, too: exactly the same if nothing changes, else to rounding."""
    argv = [*RUN, "--resume", runs / f"{before}_stopped" / "checkpoint.pth", "--output_dir", "run", "--overwrite"]
    out, _ = in_two(main_distillation.main, *argv, *["--fsdp"] * (after == "fsdp"), cwd=tmp_path)
    assert "resuming after epoch 1 and 1 batches" in out
    whole, resumed = checkpoint_of(runs / after), checkpoint_of(tmp_path / "run")
    check_close(whole, resumed)
    if before == after:
        for part in ("model", "ema", "optimizer"):
            assert not differences(whole[part], resumed[part])


def test_in_one_process(tmp_path, capsys):
    """Two processes train an epoch, one the next one; and the other way round."""
    pair, one, more = ["--batch_size", "16"], ["--batch_size", "32"], ["--resume", "--overwrite", "--max_steps", "6"]
    alone, shards = [*STEP, *one, "--epochs", "2"], [*STEP, *pair, "--epochs", "2", "--fsdp"]
    for folder in ("alone", "first", "second"):
        argv = [*(alone if folder != "first" else shards), "--max_steps", "3", "--output_dir", folder]
        in_two(main_distillation.main, *argv, cwd=tmp_path) if folder == "first" else alone_in(tmp_path, argv)
    alone_in(tmp_path, [*alone, *more, "--output_dir", "alone"])
    alone_in(tmp_path, [*alone, *more, "--output_dir", "first"])
    in_two(main_distillation.main, *shards, *more, "--output_dir", "second", cwd=tmp_path)
    for folder in ("first", "second"):
        check_close(checkpoint_of(tmp_path / "alone"), checkpoint_of(tmp_path / folder), 2e-5)


def alone_in(folder, argv):
    done, out, err = forked_run(argv, main_distillation.main, light, cwd=folder)
    assert done == 0, out + err


@pytest.mark.parametrize("turn", [1, 2])
def test_stopped_in_validation(runs, tmp_path, turn):
    """Of the model (1) and of its EMA (2), while every process has all of its weights: in the second epoch."""

    def main(argv):
        evaluate, calls = loop.evaluate, []

        def stopped(*args, **kwargs):
            calls.append(1)
            if len(calls) == turn:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args, **kwargs)

        loop.evaluate = stopped
        main_distillation.main(argv)

    argv = [*RUN, "--fsdp", "--output_dir", "run"]
    begun = ["--resume", runs / "fsdp_stopped" / "checkpoint.pth", "--overwrite"]
    _, err = in_two(main, *argv, *begun, cwd=tmp_path, status=1)
    assert "stopped by SIGTERM" in err
    in_two(main_distillation.main, *argv, "--resume", cwd=tmp_path)
    assert not differences(checkpoint_of(runs / "fsdp")["model"], checkpoint_of(tmp_path / "run")["model"])


TIMMS = "--data_set DIGITS --model test_vit --input_size 32 --num_workers 0 --device cpu --amp off".split()
TIMMS += "--epochs 1 --max_steps 2 --batch_size 8 --warmup_epochs 0.1 --val_size 0 --drop_path 0".split()


@pytest.mark.parametrize(
    "argv",
    [
        [*STEP, *"--compile --accum_steps 2 --val_size 33".split()],  # one batch to validate here, two there
        [*STEP, *"--attn_only --grad_checkpointing --skip_bad_steps 1".split()],
        [*TIMMS, "--opt", "lamb"],  # channels-last weights, an optimizer of timm's
    ],
    ids=["compile", "attn_only", "timm"],
)
def test_flags_as_with_ddp(tmp_path, argv):
    def main(argv):
        torch.compile = functools.partial(torch.compile, backend="eager")
        for more in (["--output_dir", "ddp"], ["--output_dir", "fsdp", "--fsdp"]):
            main_distillation.main([*argv, *more])

    in_two(main, *argv, cwd=tmp_path)
    check_close(*(checkpoint_of(tmp_path / name) for name in ("ddp", "fsdp")), 1e-5)


def test_shares_and_scaler(tmp_path):
    """Each process holds half of the numbers, of the EMA and of Adam's state too, and none of them whole after a step.

    A gradient that overflows in one process makes float16's scaler leave the step out in both.
    """

    def main(_):
        utils.init_distributed(torch.device("cpu"))
        scales = {}
        for fsdp in (False, True):
            model, ema = tiny(), argparse.Namespace(module=tiny())
            optimizer = torch.optim.AdamW(model.parameters())
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            step = TrainingStep(model, torch.nn.CrossEntropyLoss(), optimizer, None, scaler=scaler)
            loop.wrap(step, argparse.Namespace(fsdp=fsdp, compile=False), (16, 24), ema)
            images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(utils.rank()))
            for i in range(3):
                images[0, 0, 0, 0] = float("inf") if i == 1 and utils.rank() == 1 else 0.0
                step.backward(images, torch.tensor([0, 1]))
                scales.setdefault(fsdp, []).append((step.gradient_norm().item(), scaler.get_scale()))
                step.update()
        norms, values = zip(*(zip(*scales[fsdp]) for fsdp in (False, True)))
        assert values[0] == values[1] == (1024.0, 1024.0, 512.0)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5, nan_ok=True)
        assert np.isfinite(norms[1][2]) and not np.isfinite(norms[1][1])
        assert all(isinstance(block, FSDPModule) for block in (*model.blocks, *ema.module.blocks))
        states = [state["exp_avg"] for state in optimizer.state.values()]
        for shares in (list(model.parameters()), list(ema.module.parameters()), states):
            held = sum(share.to_local().numel() for share in shares)
            assert 0.45 < held / sum(share.numel() for share in shares) < 0.55

    in_two(main, cwd=tmp_path)


def test_an_optimizer_without_shares_is_refused(tmp_path):
    _, err = in_two(main_distillation.main, *STEP, "--fsdp", "--opt", "adamp", cwd=tmp_path, status=1)
    assert "error: --fsdp was not tested with --opt adamp; give one of adam, adamw" in err
    assert "exitcode  : 2" in err
