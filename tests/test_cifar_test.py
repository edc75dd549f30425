"""The script cifar_test.py."""

import pytest

import cifar_test
from conftest import run


def test_classes_and_confusions(trained, capsys):
    status, out, _ = run(
        cifar_test.main,
        ["--model_path", trained / "model.pth", "--device", "cpu", "--per_class", "--confusion"],
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
