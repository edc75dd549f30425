"""How a run begins: the model, its weights, the seed, compilation."""

from argparse import Namespace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import cifar_main
from checkpoints.files import load_checkpoint
from checkpoints.models import model_from_checkpoint
from checkpoints.schema import MODEL_ARGS
from engine import peak_rate
from models_dynamic import DynamicViT
from runs import DIGITS, TINY, run, tiny
from training.setup import make_optimizer


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


def test_a_model_that_no_checkpoint_could_describe_is_not_trained(tmp_path, monkeypatch, capsys):
    """An argument that somebody added to DynamicViT alone: known before the data are read, not after the training."""
    monkeypatch.delitem(MODEL_ARGS, "stem?")
    argv = [*DIGITS, "--stem", "conv", "--model_path", tmp_path / "m.pth"]
    status, out, err = run(cifar_main.main, argv, capsys)
    assert status == 2 and not out and not list(tmp_path.iterdir())
    assert "stem is unknown; checkpoints/schema.py has what they may be" in err


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


def rates(model, opt="adamw", layer_decay=0.5):
    """{parameter: its learning rate after a warm-up to 1}."""
    args = Namespace(fsdp=False, opt=opt, lr=1.0, weight_decay=0.05, layer_decay=layer_decay, epochs=2, accum_steps=1,
                     warmup_epochs=1, warmup_lr=0.1, min_lr=0.0)  # fmt: skip
    optimizer, scheduler = make_optimizer(model, args, range(10))
    scheduler.step_update(10)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert peak_rate(optimizer) == pytest.approx(0.5, abs=0.01)  # a half of the cosine
    return {names[p]: g["lr"] / peak_rate(optimizer) for g in optimizer.param_groups for p in g["params"]}


def test_rates_halve_from_layer_to_layer_below_the_head():
    """4 blocks: the head is a layer, then blocks 3 (with the norm), 2, 1, 0, then the stem."""
    found = rates(tiny(cls_pos=2, reg_pos=(3, 1), num_register_tokens=2, dist_pos=0))
    for name, rate in {
        "head.weight": 1, "head_dist.bias": 1, "norm.weight": 1 / 2, "blocks.3.attn.qkv.weight": 1 / 2,
        "blocks.0.norm1.bias": 1 / 16, "patch_embed.proj.weight": 1 / 32, "pos_embed": 1 / 32, "dist_token": 1 / 32,
        "cls_token": 1 / 8, "blocks.1.mlp.fc1.weight": 1 / 8, "register_tokens": 1 / 16,
    }.items():  # fmt: skip
        assert found[name] == rate, name
    assert set(rates(tiny(cls_pos=None, num_register_tokens=0), layer_decay=None).values()) == {1}


def test_rates_are_those_of_timms_model():
    """All tokens at block 0."""
    size = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    theirs = VisionTransformer(**size, reg_tokens=2, no_embed_class=True)
    ours = rates(DynamicViT(**size, num_register_tokens=2), opt="nmuon")
    assert {name.replace("register_tokens", "reg_token"): rate for name, rate in ours.items()} == rates(theirs)


def test_an_optimizer_that_timm_does_not_have(tmp_path, capsys):
    """The folder that was made for the run goes again."""
    argv = [*TINY, "--data_set", "DIGITS", "--model_path", tmp_path / "new" / "m.pth", "--opt", "adamww"]
    status, _, err = run(cifar_main.main, argv, capsys)
    assert status == 2 and "--opt adamww: " in err and "list_optimizers() names all" in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()
