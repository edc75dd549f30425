"""The log of a run and its curves."""

import torch

import cifar_main
from conftest import DIGITS, run
from training import run_log
from training.run_log import environment


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
