"""The script cifar_test.py."""

import numpy as np
import pytest
import torch
from pypdf import PdfReader

import cifar_test
from checkpoints.models import load_model
from loading.memory import MemoryLoader, read_split
from pages import no_overlaps
from runs import run
from training import errors


def test_classes_and_confusions(trained, tmp_path, capsys):
    status, out, _ = run(
        cifar_test.main,
        [
            "--model_path",
            trained / "model.pth",
            "--device",
            "cpu",
            "--per_class",
            "--confusion",
            "--output_dir",
            tmp_path,
        ],
        capsys,
    )
    assert status == 0
    lines = out.splitlines()
    accuracy = float(lines[0].split()[2].rstrip("%"))
    per_class = [line for line in lines if " of 3" in line and "(" in line and line.startswith("  ")]
    right, total = (sum(int(n) for n in column) for column in zip(*(
        line.split("(")[1].rstrip(")").split(" of ") for line in per_class)))  # fmt: skip
    assert total == 360
    assert 100 * right / total == pytest.approx(accuracy, abs=0.006)
    start = next(i for i, line in enumerate(lines) if line.startswith("Confusion"))
    matrix = [[int(n) for n in line.split()[1:]] for line in lines[start + 1 : start + 11]]
    assert sum(map(sum, matrix)) == 360
    assert sum(matrix[i][i] for i in range(10)) == right
    assert lines[-1] == f"wrote {tmp_path / 'confusion.pdf'}"
    page = PdfReader(tmp_path / "confusion.pdf").pages[0].extract_text()
    assert f"{trained.name}/model.pth: {accuracy:.2f}%" in page
    assert all(str(n) in page.split() for row in matrix for n in row if n)


def test_pages_of_errors_are_the_surest_wrong_answers(trained, tmp_path, capsys):
    argv = ["--model_path", trained / "model.pth", "--device", "cpu", "--errors", "43", "--output_dir", tmp_path]
    status, out, _ = run(cifar_test.main, argv, capsys)
    assert status == 0 and out.splitlines()[-1] == f"wrote {tmp_path / 'errors.pdf'}"
    pages = [page.extract_text() for page in PdfReader(tmp_path / "errors.pdf").pages]
    assert [page.count("no. ") for page in pages] == [40, 3]

    model, checkpoint = load_model(trained / "model.pth")
    split, _ = read_split("DIGITS", None, False, (32, 32), checkpoint["data"])
    images, labels = next(iter(MemoryLoader(split, checkpoint["data"], len(split))))
    with torch.no_grad():
        sure, predicted = model(images).softmax(dim=1).max(dim=1)
    surest = max((i for i in range(len(split)) if predicted[i] != labels[i]), key=lambda i: sure[i])
    words = f"no. {surest}\ntrue: {labels[surest]}\nas: {predicted[surest]} ({100 * sure[surest]:.0f}%)"
    assert words in pages[0]
    assert f"{int((predicted != labels).sum())} of 360 test images are wrong, here 41 to 43" in pages[1]
    for figure in errors.error_pages(model, checkpoint["data"], split, predicted, 43, "x"):
        no_overlaps(figure)
    assert not [*errors.error_pages(model, checkpoint["data"], split, labels, 43, "x")]


@pytest.mark.parametrize("classes", [2, 20, 40, 100])
def test_confusions_of_few_and_of_many_classes(classes):
    counts = np.random.default_rng(0).integers(0, 9999, (classes, classes))
    figure = errors.confusion_figure(counts, [f"a class with a long name {i}" for i in range(classes)], "x")
    no_overlaps(figure)
    assert len(figure.axes[0].texts) == (classes**2 if classes <= 20 else 0)
