"""How a run begins: the model, its weights, the seed, compilation."""

import torch

import cifar_main
from checkpoints.files import load_checkpoint
from checkpoints.models import model_from_checkpoint
from conftest import DIGITS, run
from models_dynamic import DynamicViT


def test_same_seed_same_weights(tmp_path, capsys):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        argv = [*DIGITS, "--epochs", "1", "--deterministic", "--seed", seed, "--model_path", tmp_path / name / "m.pth"]
        assert run(cifar_main.main, argv, capsys)[0] == 0
        states.append(load_checkpoint(tmp_path / name / "checkpoint.pth")["model"]["head.weight"])
    torch.use_deterministic_algorithms(False)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_compiled_training_saves_plain_names(tmp_path, monkeypatch, capsys):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))
    argv = [*DIGITS, "--compile", "--max_steps", "2", "--amp", "off", "--model_path", tmp_path / "m.pth"]
    assert run(cifar_main.main, argv, capsys)[0] == 0
    model = model_from_checkpoint(load_checkpoint(tmp_path / "m.pth"))
    assert model.cls_pos == 2


def test_training_builds_one_model(tmp_path, monkeypatch, capsys):
    """Flags are checked on a description without weights, so a large model stands in memory once."""
    devices = []

    build = DynamicViT.__init__

    def counted(model, *args, **kwargs):
        devices.append(torch.empty(0).device.type)
        build(model, *args, **kwargs)

    monkeypatch.setattr(DynamicViT, "__init__", counted)
    assert run(cifar_main.main, [*DIGITS, "--max_steps", "1", "--model_path", tmp_path / "m.pth"], capsys)[0] == 0
    assert devices == ["meta", "cpu", "meta", "cpu"]  # flags, training; the test of what was saved: shapes, weights


def test_a_run_that_begins_with_the_weights_of_another(tmp_path, trained, capsys):
    """The class token enters elsewhere; one step at a rate of almost 0 keeps the first model's weights."""
    path = tmp_path / "model.pth"
    argv = [*DIGITS, "--cls_pos", "0", "--num_reg", "1", "--max_steps", "1", "--lr", "1e-9", "--warmup_epochs", "0"]
    status, out, err = run(cifar_main.main, [*argv, "--finetune", trained / "model.pth", "--model_path", path], capsys)
    assert status == 0, err
    assert "--finetune: loaded" in out and "CLS enters at block 0" in out
    old, new = (load_checkpoint(file)["model"] for file in (trained / "model.pth", path))
    torch.testing.assert_close(new["cls_token"], old["cls_token"], atol=1e-6, rtol=0)
    torch.testing.assert_close(new["register_tokens"], old["register_tokens"][:, :1], atol=1e-6, rtol=0)
    status, _, err = run(cifar_main.main, [*argv, "--finetune", tmp_path / "no.pth", "--overwrite"], capsys)
    assert status == 2 and "there is no checkpoint" in err
