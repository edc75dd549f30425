"""What a checkpoint of training holds, and that a resumed run ends as one that was never stopped."""

import copy
import os
import shutil
import signal

import pytest
import torch

import cifar_main
import faults
import main_distillation
import utils
from checkpoints.files import load_checkpoint, save_checkpoint
from forked import TWO_EPOCHS, differences
from runs import DIGITS, STUDENT, killed_in_epoch_3, run
from training import loop, run_folder
from training.run_log import read_json_lines
from training.state import TrainingState, random_states, set_random_states

pytestmark = pytest.mark.usefixtures("deterministic")


def test_a_checkpoint_with_anything_wrong_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    """Each part of one from the middle of an epoch, and the parts of those, missing or of another kind."""
    argv = [*TWO_EPOCHS, "--save_steps", "3", "--model_path", tmp_path / "a" / "m.pth"]

    def stop(state):
        save(state)
        raise utils.RunFailed("planted")

    save = TrainingState.save
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", stop)
        assert run(cifar_main.main, argv, capsys)[0] == 1
    good = load_checkpoint(tmp_path / "a" / "checkpoint.pth")
    assert good["batch"] == 3

    def reached(*_):
        raise SystemExit(0)

    monkeypatch.setattr(loop, "start_log", reached)
    argv = [*argv, "--model_path", tmp_path / "b" / "m.pth", "--resume", tmp_path / "c.pth"]

    def resumed(checkpoint):
        save_checkpoint(tmp_path / "c.pth", checkpoint)
        status, _, err = run(cifar_main.main, argv, capsys)
        assert (status, err) == (0, "") or (status == 2 and len(err.splitlines()) == 1 and "c.pth" in err), err
        return status

    assert resumed(good) == 0
    refused = set()
    for value in ("x", 2**70):
        for name in good:
            if resumed({**good, name: value}) == 2:
                refused.add(name)
        for part in good["processes"][0]:
            resumed({**good, "processes": [{**good["processes"][0], part: value}]})
    for name in good:
        resumed({key: part for key, part in good.items() if key != name})
    assert refused >= good.keys() - {"scaler"}  # which is not used without float16
    assert not (tmp_path / "b" / "log.txt").exists()


def test_images_resume_in_the_middle_of_an_epoch_whatever_the_workers(tmp_path, capsys):
    """RandAugment, repeated augmentation, erasing, Mixup, the distillation script: killed after step 7 of 11."""
    argv = [
        *STUDENT,
        "--epochs",
        "2",
        "--save_steps",
        "7",
        "--batch_size",
        "32",
        "--max_steps",
        "20",
        "--deterministic",
    ]

    def go(folder, *more, dies=False):
        def before():
            if dies:
                save = run_folder.save

                def last(*args):
                    save(*args)
                    os.kill(os.getpid(), signal.SIGKILL)

                run_folder.save = last

        status, out, err = faults.run([*argv, "--output_dir", folder, *more], main_distillation.main, before)
        assert status == (137 if dies else 0), out + err
        return out

    go(tmp_path / "whole")
    go(tmp_path / "cut", "--num_workers", "2", dies=True)
    assert "and 7 batches" in go(tmp_path / "cut", "--num_workers", "1", "--resume")
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "cut"))
    for key in ("model", "optimizer", "step", "epoch"):
        assert differences(one[key], other[key]) == [], key
    assert differences(*([p["random"] for p in c["processes"]] for c in (one, other))) == []


def test_the_same_command_twice_has_the_same_log_and_weights(tmp_path, expected):
    assert differences(expected, faults.undisturbed(tmp_path)) == []


@pytest.mark.parametrize("more", [[], ["--ema", "0.9"], ["--layer_decay", "0.7"], ["--balance", "sampler"]])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(tmp_path, monkeypatch, capsys, more):
    argv = [*DIGITS, *more, "--epochs", "4", "--drop_path", "0.2"]
    assert run(cifar_main.main, [*argv, "--model_path", tmp_path / "a" / "m.pth"], capsys)[0] == 0

    killed_in_epoch_3(cifar_main.main, [*argv, "--model_path", tmp_path / "b" / "m.pth"])
    aside = (tmp_path / "b" / "m.pth").rename(tmp_path / "aside.pth")
    status, _, err = run(cifar_main.main, [*argv, "--model_path", tmp_path / "b" / "m.pth"], capsys)
    assert status == 2  # an unfinished run is not thrown away
    assert "--resume resumes it, --overwrite trains anew" in err
    aside.rename(tmp_path / "b" / "m.pth")
    status, out, _ = run(cifar_main.main, [*argv, "--model_path", tmp_path / "b" / "m.pth", "--resume"], capsys)
    assert status == 0
    assert "resuming after epoch 2" in out
    whole, resumed = (load_checkpoint(tmp_path / run / "checkpoint.pth") for run in "ab")
    assert all(torch.equal(t, resumed["model"][n]) for n, t in whole["model"].items())
    logs = [read_json_lines(tmp_path / run / "log.txt") for run in "ab"]
    assert [r["epoch"] for r in logs[1][1:]] == [1, 2, 3, 4]
    for one, other in zip(logs[0][1:], logs[1][1:]):
        for key in ("train_loss", "val_loss", "lr", "step"):
            assert one[key] == other[key]
    bests = [load_checkpoint(tmp_path / run / "checkpoint.pth")["best"]["epoch"] for run in "ab"]
    assert bests[0] == bests[1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. 2"), RuntimeError("MPS out of memory")])
def test_a_card_that_is_full_is_no_damaged_checkpoint(trained, tmp_path, monkeypatch, capsys, error):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)

    def fails(state, path, saved):
        raise error

    monkeypatch.setattr(TrainingState, "_restore", fails)
    argv = [*DIGITS, "--epochs", "3", "--model_path", folder / "model.pth", "--resume"]
    status, _, err = run(cifar_main.main, argv, capsys)
    assert status == 1 and f"out of memory ({error})" in err and "damaged" not in err


def test_a_run_on_the_cpu_leaves_the_card_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert random_states()["cuda"] is None


def test_random_states_of_mps(monkeypatch):
    """Stochastic depth draws there."""
    given, state = [], torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", given.append)
    states = random_states()
    set_random_states(states)
    set_random_states({name: value for name, value in states.items() if name != "mps"})
    assert given == [state]


def test_moments_lie_in_memory_as_their_weights():
    """Those of --fsdp are contiguous, and without it the convolutions of timm's models have their channels last."""
    weights = torch.nn.Conv2d(3, 8, 4).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(weights.parameters(), fused=True)

    def step():
        optimizer.zero_grad()
        weights(images).square().sum().backward()
        optimizer.step()

    step()
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(weights.state_dict())
    step()
    expected = weights.weight.clone()
    for state in saved["state"].values():
        state.update({name: value.contiguous() for name, value in state.items()})
    weights.load_state_dict(before)
    TrainingState(weights, optimizer, None, None, {}, None)._load_optimizer(saved)
    step()
    assert torch.equal(weights.weight, expected)
