"""export_model.py and hubconf.py: a checkpoint leaves this project, and comes back through timm and torch.hub."""

import json
import sys

import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config

import export_model
import hubconf
from checkpoints.files import save_checkpoint
from checkpoints.models import timm_model
from images import picture
from runs import ROOT, noise, run, shell, tiny

DATA = {
    "name": "FOLDER", "classes": ["ant", "bee", "cow", "dog", "elk"], "input_size": (16, 24), "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
}  # fmt: skip


def saved(model, folder, **data):
    data = DATA | data
    path = folder / "model.pth"
    checkpoint = {"model": model.state_dict(), "model_args": model.model_args, "args": {"epochs": 1}, "epoch": 0}
    save_checkpoint(path, checkpoint | {"data": data})
    return path


KINDS = {
    "late tokens": dict(cls_pos=2, reg_pos=1), "no class token": dict(cls_pos=None),
    "distillation, LayerScale": dict(dist_pos=3, init_values=0.1), "no registers": dict(num_register_tokens=0),
    "modern": dict(rope=True, swiglu=True, qk_norm=True, norm_eps=1e-5, embed_dim=48),
    "normalised mean": dict(global_pool="avg", fc_norm=True),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_timm_loads_the_folder(kind, tmp_path, capsys):
    model = tiny(**KINDS[kind])
    status, out, err = run(export_model.main, [saved(model, tmp_path), tmp_path / "out"], capsys)
    assert (status, err) == (0, "") and f'create_model("local-dir:{tmp_path / "out"}"' in out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(again(noise(model)), model(noise(model)))
    config = resolve_model_data_config(again)
    assert config["input_size"] == (3, 16, 24)
    assert (tuple(config["mean"]), tuple(config["std"])) == (DATA["mean"], DATA["std"])
    assert config["crop_pct"] == 1.0 and config["interpolation"] == "bicubic"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == DATA["classes"]
    other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=3)
    assert other.head.out_features == 3
    assert torch.equal(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_the_folder_is_looked_at_like_the_checkpoint(tmp_path):
    model = tiny(cls_pos=2)
    shell("export_model.py", saved(model, tmp_path), "out", cwd=tmp_path)
    picture(size=(48, 32)).save(tmp_path / "a.png")
    flags = ["--image_path", "a.png", "--layer_num", "3", "--tokens", "cls", "--format", "png"]
    for n, path in enumerate(("model.pth", "local-dir:out")):
        shell("visualize_attention.py", "--model_path", path, *flags, "--output_dir", str(n), cwd=tmp_path)
    first, second = (Image.open(tmp_path / n / "attention_a_block3_cls.png") for n in "01")
    below = (0, 100, *first.size)  # the name of the model, which is another one
    assert first.size == second.size and first.crop(below).tobytes() == second.crop(below).tobytes()


@torch.no_grad()
def test_a_model_of_timm(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm_model("vit_tiny_patch16_224", 5, img_size=(16, 32)).eval()
    path = saved(model, tmp_path, input_size=(16, 32), crop_pct=0.9, interpolation="bilinear")
    assert run(export_model.main, [path, tmp_path / "out"], capsys)[0] == 0
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 32)
    assert torch.equal(again(images), model(images))
    assert resolve_model_data_config(again)["interpolation"] == "bilinear"


def test_onnx(tmp_path):
    from onnxruntime import InferenceSession

    model = tiny(cls_pos=2, reg_pos=1)
    out, _ = shell("export_model.py", saved(model, tmp_path), "out", "--onnx", cwd=tmp_path)  # no fork after an export
    assert "checked with batches of 2 and 5" in out
    found = InferenceSession(tmp_path / "out" / "model.onnx").run(None, {"images": noise(model, 3).numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), model(noise(model, 3)), atol=1e-4)


def test_refusals(tmp_path, capsys, monkeypatch):
    status, _, err = run(export_model.main, [tmp_path / "absent.pth", tmp_path / "out"], capsys)
    assert status == 2 and "there is no checkpoint" in err and not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    path = saved(tiny(), tmp_path)
    status, _, err = run(export_model.main, [path, tmp_path / "file" / "out"], capsys)
    assert status == 2 and "choose another folder" in err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, _, err = run(export_model.main, [path, tmp_path / "out", "--onnx"], capsys)
    assert status == 2 and "--onnx needs onnxruntime; pip install -r requirements-extra.txt" in err
    assert not list((tmp_path / "out").iterdir())


def test_torch_hub():
    names = [name for name, entry in vars(hubconf).items() if callable(entry) and not name.startswith("_")]
    assert sorted(names) == sorted(timm.list_models("dynamic_vit*"))  # what torch.hub.list shows
    model = torch.hub.load(str(ROOT), "dynamic_vit_cifar", source="local", cls_pos=3, reg_pos=1, depth=4, num_classes=7)
    assert (model.cls_pos, model.reg_pos, model.depth, model.num_classes) == (3, 1, 4, 7)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
