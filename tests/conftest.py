"""Small models and small runs, shared by the tests. CPU only, no network."""

import gc
import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # several test processes share two cores
os.environ["CUDA_VISIBLE_DEVICES"] = ""
gc.disable()  # until everything is imported

import pytest
import torch

import faults
import forked
import utils
from browser import browser  # noqa: F401  a fixture
from checkpoints.files import save_checkpoint
from cifar_main import main
from inspection import pages
from models_dynamic import DynamicViT
from training import loop, run_log

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
# The first backward pass decides whether autograd may be forked; after a torch.export it would decide against it.
torch.ones(1, requires_grad=True).sum().backward()
# What takes longer than a tiny run, and not only in tests and their children but in fixtures, too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/quick"), *filter(None, [os.environ.get("PYTHONPATH")])])
os.fsync = lambda _: None  # nothing here has to survive a power cut
PLOT_CURVES, run_log.plot_curves = run_log.plot_curves, lambda *_: None  # see `curves`
FONT_TYPE, pages.PDF["pdf.fonttype"] = pages.PDF["pdf.fonttype"], 3  # embedded in a tenth of the time; see `fonts`


def pytest_collection_finish():
    """Garbage collections skip what is imported by now, and so forks share its memory: a tenth of their time."""
    gc.collect()
    gc.freeze()
    gc.enable()


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


@pytest.fixture
def curves(monkeypatch):
    """Runs of this test draw their training curves."""
    monkeypatch.setattr(run_log, "plot_curves", PLOT_CURVES)


@pytest.fixture(autouse=True)
def _one_thread():
    """A script may have set more; in a fork of a process with more, OpenMP waits for threads that are not there."""
    torch.set_num_threads(1)


@pytest.fixture
def fonts(monkeypatch):
    """PDFs of this test have the fonts that users get."""
    monkeypatch.setitem(pages.PDF, "pdf.fonttype", FONT_TYPE)


@pytest.fixture
def deterministic():
    """What --deterministic switches on is off again after the test."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def expected(tmp_path_factory):
    """How the run of `forked.AUGMENTED` ends if nothing happens to it."""
    return faults.undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folder of a finished run of two epochs on DIGITS, with its curves: CLS enters at block 2, 2 registers at 1."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "plot_curves", PLOT_CURVES)
        main([*DIGITS, "--model_path", str(folder / "model.pth")])
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of images as a user has them: two classes, several shapes, train/ and test/."""
    from PIL import Image

    root = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 10), ("test", 3)):
        for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (30 + i, 20), colour).save(root / part / name / f"{i}.png")
    return root
