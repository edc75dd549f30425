"""Fixtures. What takes long to import is imported in them: pytest-xdist's first process, which runs no test, reads
this file before it starts the others.
"""

import gc
import os
from pathlib import Path

import pytest

from browser import browser  # noqa: F401  a fixture

os.environ["OMP_NUM_THREADS"] = "1"  # several test processes share two cores
os.environ["CUDA_VISIBLE_DEVICES"] = ""
more = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "quick"), *more])
gc.disable()  # until everything is imported


def pytest_collection_finish():
    """Garbage collections skip what is imported by now, and so forks share its memory: a tenth of their time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def originals():
    """What takes longer than a tiny run is not done, in children and other fixtures, too; what it was before."""
    import torch

    from inspection import pages
    from training import run_log

    # The first backward pass decides whether autograd may be forked; after a torch.export it would decide against it.
    torch.ones(1, requires_grad=True).sum().backward()
    before = {"curves": run_log.plot_curves, "fonts": pages.PDF["pdf.fonttype"]}
    os.fsync = lambda _: None  # nothing here has to survive a power cut
    run_log.plot_curves = lambda *_: None
    pages.PDF["pdf.fonttype"] = 3  # embedded in a tenth of the time
    return before


@pytest.fixture
def curves(monkeypatch, originals):
    """Runs of this test draw their training curves."""
    monkeypatch.setattr("training.run_log.plot_curves", originals["curves"])


@pytest.fixture(autouse=True)
def _one_thread():
    """A script may have set more; in a fork of a process with more, OpenMP waits for threads that are not there."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def fonts(monkeypatch, originals):
    """PDFs of this test have the fonts that users get."""
    from inspection import pages

    monkeypatch.setitem(pages.PDF, "pdf.fonttype", originals["fonts"])


@pytest.fixture
def deterministic():
    """What --deterministic switches on is off again after the test."""
    yield
    import torch

    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def expected(tmp_path_factory):
    """How the run of `forked.AUGMENTED` ends if nothing happens to it."""
    import faults

    return faults.undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, originals):
    """Folder of a finished run of two epochs on DIGITS, with its curves: CLS enters at block 2, 2 registers at 1."""
    from cifar_main import main
    from runs import DIGITS

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.run_log.plot_curves", originals["curves"])
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
