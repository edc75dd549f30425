"""The log of a run and its curves."""

import math
import sys
from pathlib import Path

import numpy as np
import torch

import cifar_main
from pages import no_overlaps
from runs import DIGITS, run
from training import run_log
from training.run_log import curves, environment, git_revision, peak_memory, reset_peak_memory


def test_quick_epochs_do_not_wait_for_their_curves(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(run_log, "plot_curves", lambda epochs, folder: drawn.append(len(epochs)))
    argv = [*DIGITS, "--repeats", "0.1", "--epochs", "4"]
    assert run(cifar_main.main, [*argv, "--model_path", tmp_path / "a" / "m.pth"], capsys)[0] == 0
    assert drawn == [1, 4]
    monkeypatch.setattr(run_log, "CURVES_EVERY", 0)
    assert run(cifar_main.main, [*argv, "--model_path", tmp_path / "b" / "m.pth"], capsys)[0] == 0
    assert drawn == [1, 4, 1, 2, 3, 4]


def test_the_log_names_the_hardware_that_was_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    assert "GPU" not in environment(torch.device("cpu"))["hardware"]
    assert environment(torch.device("cuda", 1))["hardware"] == "a GPU, cuda:1"


def test_curves_mark_the_epoch_whose_weights_are_saved():
    epochs = [
        {"epoch": i + 1, "lr": 10.0**-i, "train_loss": 2.0 - i, "val_loss": loss, "val_top1": top1}
        for i, (top1, loss) in enumerate([(50.0, 1.0), (75.0, 0.9), (75.0, 0.8), (60.0, 0.5)])
    ]
    figure = curves(epochs, "models/late")
    no_overlaps(figure)
    loss, accuracy, rate, gradient, *_ = figure.axes
    assert figure.get_suptitle() == "models/late: best epoch 3, validation accuracy 75.00%"  # of equals, the lower loss
    assert all(list(axes.lines[-1].get_xdata()) == [3, 3] for axes in (loss, accuracy, rate))
    assert loss.get_legend() is not None and accuracy.get_legend() is None
    assert rate.get_yscale() == "log" and accuracy.get_yscale() == "linear"
    assert not gradient.lines and gradient.texts[0].get_text() == "not measured"
    assert all(tick == int(tick) for tick in loss.get_xticks())
    no_overlaps(curves([{"epoch": 1, "lr": 0.0, "train_loss": 2.0}], "a"))  # no validation; a rate without logarithm


def test_peak_memory_counts_anew():
    device = torch.device("cpu")
    block = np.ones(200 * 2**20, dtype=np.uint8)
    before = peak_memory(device)
    del block
    reset_peak_memory(device)
    assert peak_memory(device) < before - 150


def test_systems_that_do_not_say_how_much_memory_was_used(monkeypatch):
    monkeypatch.setattr(run_log, "Path", lambda _: Path("no /proc"))
    assert peak_memory(torch.device("cpu")) > 10  # macOS
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(peak_memory(torch.device("cpu")))  # Windows


def test_words_of_git_in_another_encoding(tmp_path, monkeypatch):
    (tmp_path / "git").write_bytes(b"#!/bin/sh\nprintf '\\377' >&2\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() == "unknown"
