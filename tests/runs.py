"""Small models and small runs, shared by the tests. CPU only, no network."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forked
import utils
from checkpoints.files import save_checkpoint
from models_dynamic import DynamicViT
from training import loop

ROOT = Path(__file__).parent.parent

# A model of a few thousand parameters, trained for seconds.
TINY = "--embed_dim 24 --depth 3 --num_heads 3 --num_reg 2 --patch_size 8 --device cpu --num_threads 1".split()

# The same for main_distillation.py, on data that need no download.
STUDENT = [*"--data_set DIGITS --model dynamic_vit_cifar --input_size 32 --num_workers 0".split(), *TINY]


# A run of cifar_main.py of two epochs.
DIGITS = [*TINY, *"--data_set DIGITS --cls_pos 2 --reg_pos 1 --repeats 1 --epochs 2".split()]


def tiny(**kwargs) -> DynamicViT:
    """Grid 4 x 6 (height 16, width 24), 4 blocks, 3 heads; tokens as asked for."""
    torch.manual_seed(0)
    args = dict(img_size=(16, 24), patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=5)
    model = DynamicViT(**(args | kwargs))
    with torch.no_grad():  # larger than at initialisation, so that attention is far from uniform
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def saved_model(path, model, **data) -> Path:
    """The checkpoint of a model of image folders; `data`: more of the description of its images, with mean and std."""
    about = {"name": "FOLDER", "classes": list("abcde"), "input_size": tuple(model.model_args["img_size"])} | data
    save_checkpoint(path, {"model": model.state_dict(), "model_args": model.model_args, "data": about})
    return path


def noise(model, batch=2):
    """Random images of the model's size."""
    return torch.randn(batch, 3, *model.model_args["img_size"], generator=torch.Generator().manual_seed(1))


def run(main, argv, capsys) -> tuple[int, str, str]:
    """A script's `main` as its command line runs it: (exit status, standard output, standard error)."""
    status = 0
    try:
        utils.run_script(main, [str(arg) for arg in argv])
    except SystemExit as end:
        status = end.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def shell(name, *argv, cwd, status=0):
    """Standard output and standard error of a script as `python NAME ...` runs it, without the time of its imports."""
    done, out, err = forked.run(argv, forked.script(name), cwd=cwd)
    assert done == status, out + err
    return out, err


def typed(*words, cwd, status=0):
    """The same of `python ...`, in a new process."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def killed_in_epoch_3(main, argv):
    """`main(argv)`, which ends at the beginning of its third epoch, as by a crash."""

    class Killed(Exception):
        pass

    work = loop.train_one_epoch

    def dies(*args, **kwargs):
        if kwargs["title"].startswith("epoch 3"):
            raise Killed
        return work(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_one_epoch", dies)
        with pytest.raises(Killed):
            main([str(arg) for arg in argv])
