"""checkpoints/names.py: weights in the wrappings and under the names that people save them."""

import argparse
import collections
import pathlib
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import visualize_attention
from checkpoints.files import load_checkpoint
from checkpoints.models import model_from_checkpoint
from checkpoints.weights import load_weights
from inspection.attention import attention_rows
from models_dynamic import DynamicViT
from runs import run
from utils import BadInput

ARGS = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def noisy(model):
    """With weights so large that attention is far from uniform."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def timm_vit(**kwargs):
    torch.manual_seed(1)
    return noisy(VisionTransformer(**(ARGS | kwargs)))


@pytest.fixture(scope="module")
def plain():
    return timm_vit().state_dict()


def put(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def zeros(state):
    return {name: tensor * 0 for name, tensor in state.items()}


def beside():
    """What training scripts save next to the weights."""
    counts = collections.defaultdict(list)
    counts["a"].append(pathlib.PurePosixPath("a/b"))
    return {
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("runs"), inner=argparse.Namespace(best=np.float64(0.5))),
        "counts": counts, "nothing": collections.defaultdict(dict), "best": np.float32(3), "kind": np.dtype("int64"),
        "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]},
    }  # fmt: skip


WRAPPINGS = {
    **{prefix: lambda s, prefix=prefix: put(prefix, s) for prefix in (
        "module.", "backbone.", "teacher.backbone.", "model.", "net.", "encoder.", "_orig_mod.", "my_own.module.thing.",
    )},
    **{key: lambda s, key=key: {key: s, "epoch": 3} for key in (
        "state_dict", "model", "teacher", "student", "model_ema", "model_state_dict", "net", "anything",
    )},
    "Lightning": lambda s: {"state_dict": put("model._orig_mod.", s), "pytorch-lightning_version": "2.6"},
    "nested": lambda s: {"checkpoint": {"latest": {"module": put("net.", s)}}},
    "chunks of blocks": lambda s: {re.sub(r"^blocks\.(?=1\.)", "blocks.3.", n): t for n, t in s.items()},
    "objects beside": lambda s: {"model": s, **beside()},
}  # fmt: skip
NOTED = {  # the wrapping, and what is printed
    "DINO": (
        lambda s: {
            "student": put("module.backbone.", zeros(s)),
            "teacher": put("backbone.", s) | {"head.mlp.0.weight": torch.ones(2), "head.last_layer.v": torch.ones(2)},
        },
        "weights in teacher.backbone are taken, not student.module.backbone, head.mlp, head.last_layer; --weights_key",
    ),
    "EMA": (lambda s: {"model": zeros(s), "model_ema": s}, "model_ema are taken, not model; --weights_key chooses"),
    "timm's training": (lambda s: {"state_dict": zeros(s), "state_dict_ema": s}, "state_dict_ema are taken"),
    "MAE": (
        lambda s: {"model": s | {"mask_token": s["cls_token"], "decoder_blocks.0.attn.qkv.weight": torch.ones(3, 3)}},
        "left out of the weights, since no map needs it: mask_token, decoder_blocks\n",
    ),
    "heads": (
        lambda s: s | dict.fromkeys(("fc_norm.weight", "dino_head.mlp.0.weight", "attn_pool.latent"), torch.ones(2)),
        "left out of the weights, since no map needs it: fc_norm, dino_head, attn_pool\n",
    ),
    "averaged": (lambda s: {"n_averaged": torch.tensor(3), **put("module.", s)}, "module are taken, not n_averaged\n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*WRAPPINGS, *NOTED])
def test_wrapped_weights_are_the_plain_ones(kind, plain, tmp_path, capsys):
    wrap, note = (WRAPPINGS[kind], "") if kind in WRAPPINGS else NOTED[kind]
    torch.save(wrap(plain), tmp_path / "m.pth")
    checkpoint = load_checkpoint(tmp_path / "m.pth")
    model = model_from_checkpoint(checkpoint, num_heads=3)
    printed = capsys.readouterr().out
    assert note in printed and printed.count("\n") == bool(note)
    expected = timm_vit()(IMAGES)
    assert torch.allclose(model(IMAGES), expected, atol=1e-5)
    other = DynamicViT(**ARGS, num_register_tokens=0).eval()
    assert not load_weights(other, checkpoint).new
    assert torch.equal(other(IMAGES), model(IMAGES))
    theirs = VisionTransformer(**ARGS).eval()
    theirs.pretrained_cfg = {"classifier": "head"}
    load_weights(theirs, checkpoint)
    assert torch.equal(theirs(IMAGES), expected)


@pytest.mark.parametrize("name", ["test_efficientnet", "resnet18", "test_convnext", "test_vit", "lcnet_035"])
def test_any_model_of_timm(name):
    """By its first tensor, whatever its names have: a second conv1.weight in ResNet's blocks, or blocks.0.1."""
    theirs, again = timm.create_model(name, num_classes=5), timm.create_model(name, num_classes=5)
    state = theirs.state_dict()
    report = load_weights(again, {"epoch": 3, "state_dict": put("module.", state)})
    assert not (report.new or report.left_out or report.resampled)
    assert all(torch.equal(tensor, state[n]) for n, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match=r"no weights of .*: there is no \S+; its tensors are a.weight 2"):
        load_weights(again, {"a.weight": torch.ones(2)})


def test_what_timm_cannot_convert(plain):
    theirs = VisionTransformer(**ARGS, reg_tokens=2)
    with pytest.raises(ValueError, match="timm cannot convert these weights for the model: KeyError"):
        load_weights(
            theirs, without(plain, "pos_embed") | dict.fromkeys(("mask_token", "register_tokens"), torch.ones(1))
        )


def test_which_of_several_sets(plain, tmp_path, capsys):
    """By its name, or the first words of it; the flag does the same."""
    both = {"first": {"student": put("module.", plain)}, "second": put("a.", zeros(plain)) | put("b.", plain)}
    with pytest.raises(
        ValueError, match=r"sets of weights, first.student.module, second.a, second.b; choose .*weights_key"
    ):
        model_from_checkpoint(both, num_heads=3)
    with pytest.raises(ValueError, match=r"no weights in 'sec', but in first.student.module, second.a"):
        model_from_checkpoint(both, num_heads=3, weights_key="sec")
    with pytest.raises(ValueError, match=r"sets of weights, second.a, second.b;"):
        model_from_checkpoint(both, num_heads=3, weights_key="second")
    expected = timm_vit()(IMAGES)
    for key in ("first", "first.student", "second.b"):
        model = model_from_checkpoint(both, num_heads=3, weights_key=key)
        assert torch.allclose(model(IMAGES), expected, atol=1e-5)
        load_weights(model, both, weights_key="second.a")
        assert (model(IMAGES) == 0).all()
    Image.new("RGB", (32, 32)).save(tmp_path / "i.png")
    torch.save(both, tmp_path / "m.pth")
    argv = ["--model_path", tmp_path / "m.pth", "--num_heads", 3, "--image_path", tmp_path / "i.png"]
    argv += ["--output_dir", tmp_path, "--layer_num", 1]
    capsys.readouterr()
    status, _, err = run(visualize_attention.main, argv, capsys)
    assert status == 2 and "choose one with weights_key (--weights_key)" in err
    status, out, err = run(visualize_attention.main, [*argv, "--weights_key", "first"], capsys)
    assert status == 0, err
    assert "the weights in first.student.module are taken, not second.a, second.b" in out


# Names of Hugging Face ------------------------------------------------------------------------------------------

HF_VIT = (
    (r"^(cls_token)", r"vit.embeddings.\1"), (r"^pos_embed", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"), (r"^blocks\.", "vit.encoder.layer."),
    (r"attn\.(query|key|value)", r"attention.attention.\1"), (r"attn\.proj", "attention.output.dense"),
    (r"norm1", "layernorm_before"), (r"norm2", "layernorm_after"), (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"), (r"^norm", "vit.layernorm"), (r"^head", "classifier"),
)  # fmt: skip
HF_DINOV2 = (
    (r"^(cls_token|register_tokens|mask_token)", r"embeddings.\1"), (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^blocks\.", "encoder.layer."),
    (r"attn\.(query|key|value)", r"attention.attention.\1"), (r"attn\.proj", "attention.output.dense"),
    (r"ls([12])\.gamma", r"layer_scale\1.lambda1"), (r"^norm", "layernorm"),
)  # fmt: skip
HF_DINOV3 = (
    (r"^(cls_token|register_tokens|mask_token)", r"embeddings.\1"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings"), (r"^blocks\.", "layer."),
    (r"attn\.query", "attention.q_proj"), (r"attn\.key", "attention.k_proj"),
    (r"attn\.value", "attention.v_proj"), (r"attn\.proj", "attention.o_proj"),
    (r"ls([12])\.gamma", r"layer_scale\1.lambda1"), (r"mlp\.fc1_g", "mlp.gate_proj"), (r"mlp\.fc1(_x)?", "mlp.up_proj"),
    (r"mlp\.fc2", "mlp.down_proj"),
)  # fmt: skip


def as_hf(state, names):
    """As transformers saves them; checked once against transformers 5.24 with its own models."""
    split = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3))
            split |= {name.replace("qkv", part): t for part, t in parts}
        else:
            split[name] = tensor
    for old, new in names:
        split = {re.sub(old, new, name): t for name, t in split.items()}
    return split


def test_vit_of_hugging_face(plain, capsys):
    model = model_from_checkpoint(as_hf(plain, HF_VIT), num_heads=3)
    assert capsys.readouterr().out == ""  # the classifier beside vit. is its head
    assert torch.allclose(model(IMAGES), timm_vit()(IMAGES), atol=1e-5)
    theirs = VisionTransformer(**ARGS).eval()
    theirs.pretrained_cfg = {"classifier": "head"}
    load_weights(theirs, put("model.", as_hf(plain, HF_VIT)))
    assert torch.equal(theirs(IMAGES), timm_vit()(IMAGES))


def test_dinov2_of_hugging_face(plain):
    theirs = timm_vit(reg_tokens=4, no_embed_class=True, init_values=0.3, num_classes=0)
    state = theirs.state_dict() | {"mask_token": torch.ones(1, 48)}
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([torch.ones(1, 1, 48), state["pos_embed"]], dim=1)  # a row for CLS
    state["cls_token"] = state["cls_token"] - 1
    model = model_from_checkpoint(as_hf(state, HF_DINOV2), num_heads=3)
    assert torch.allclose(model(IMAGES), theirs(IMAGES), atol=1e-5)
    both = put("dinov2.", as_hf(state, HF_DINOV2)) | {"classifier.weight": torch.ones(5, 96)}  # of CLS and the mean
    assert torch.equal(model_from_checkpoint(both, num_heads=3)(IMAGES), model(IMAGES))


def test_a_missing_part_of_hugging_faces_qkv(plain):
    state = as_hf(plain, HF_VIT)
    del state["vit.encoder.layer.1.attention.attention.value.weight"]
    with pytest.raises(ValueError, match=r"blocks.1.attn.q_weight 48x48 has no keys and values of its shape beside it"):
        model_from_checkpoint(state, num_heads=3)


# Modern models ---------------------------------------------------------------------------------------------------


def dinov3(name="vit_small_patch16_dinov3"):
    args = ARGS | dict(img_size=64, patch_size=16, global_pool="token")
    return noisy(timm.create_model(name, **args))


def as_meta(state):
    """Of a checkpoint of DINOv3 as Meta saves it."""
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "mlp.fc1_g": "mlp.w1"}
    names |= {"mlp.fc1_x": "mlp.w2"} | ({"mlp.fc2": "mlp.w3"} if "blocks.0.mlp.fc1_g.weight" in state else {})
    renamed = {}
    for name, tensor in state.items():
        if name.endswith("q_bias"):
            values = state[name.replace("q_bias", "v_bias")]
            name, tensor = name.replace("q_bias", "qkv.bias"), torch.cat([tensor, torch.ones(48), values])
            renamed[f"{name}_mask"] = torch.cat([torch.ones(48), torch.zeros(48), torch.ones(48)])
        for old, new in names.items():
            name = name.replace(old, new)
        if not name.endswith("v_bias"):
            renamed[name] = tensor
    return renamed | {"mask_token": torch.ones(1, 48), "rope_embed.periods": torch.ones(4)}


KINDS = ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", ["timm", "Meta", "Hugging Face"])
def test_dinov3(kind, names):
    theirs, images = dinov3(kind), torch.randn(2, 3, 64, 96)
    state = theirs.state_dict()
    if names != "timm":
        state = as_meta(state)
    if names == "Hugging Face":
        head = {n.replace("head", "classifier"): state.pop(n) for n in ("head.weight", "head.bias")}
        ours = model_from_checkpoint(state | {n.replace("classifier", "head"): t for n, t in head.items()}, num_heads=3)
        state = {n: t for n, t in ours.state_dict().items() if n not in ("head.weight", "head.bias")}
        state = as_hf(state, HF_DINOV3) | head
        state = {n: t for n, t in state.items() if not n.endswith("k_proj.bias")}
    model = model_from_checkpoint(state, num_heads=3, img_size=(64, 96))
    assert model.model_args["rope"] and model.grid_size == (4, 6) and model.num_register_tokens == 4
    assert torch.allclose(model(images), theirs(images), atol=1e-5)
    order = [0, *range(5, 29), *range(1, 5)]  # theirs: CLS, registers, patches
    here, there = (attention_rows(m, images, [0, 1]) for m in (model, theirs))
    for block in (0, 1):
        assert torch.allclose(here[block], there[block][:, :, order][..., order], atol=1e-6)
    if names != "Hugging Face":
        again = timm.create_model(kind, **(ARGS | dict(img_size=64, patch_size=16, global_pool="token"))).eval()
        load_weights(again, state)
        assert torch.allclose(again(images), theirs(images), atol=1e-5)
    moved = model_from_checkpoint(state, num_heads=3, img_size=(64, 96), cls_pos=1, reg_pos=1)
    assert moved.token_layout(0).length == 24
    assert torch.equal(moved.register_tokens, model.register_tokens)
    assert not torch.allclose(moved(images), model(images))


@torch.no_grad()
def test_the_mean_of_patches_normalised():
    """With fc_norm, logits are timm's; the mean of normalised patches shows in no name, and is asked for by none."""
    theirs = timm_vit(global_pool="avg", qk_norm=True)
    model = model_from_checkpoint(theirs.state_dict(), num_heads=3)
    assert torch.allclose(model(IMAGES), theirs(IMAGES), atol=1e-5)
    assert model.model_args["fc_norm"] and model.model_args["qk_norm"]


@torch.no_grad()
def test_swiglu_as_dinov2_has_it():
    model = noisy(DynamicViT(**ARGS, num_register_tokens=0, swiglu=True, mlp_ratio=49 / 48, init_values=0.1))
    state = model.state_dict()
    for name in [n for n in state if ".fc1_g." in n]:
        state[name.replace("fc1_g", "w12")] = torch.cat([state.pop(name), state.pop(name.replace("fc1_g", "fc1_x"))])
    state = {n.replace("mlp.fc2", "mlp.w3"): t for n, t in state.items()}
    assert torch.equal(model_from_checkpoint(state, num_heads=3)(IMAGES), model(IMAGES))


def test_attention_pooling_is_left_out_with_its_head():
    theirs = timm_vit(class_token=False, global_pool="map")
    model = model_from_checkpoint(theirs.state_dict(), num_heads=3)
    assert model.num_classes == 0 and model.cls_pos is None
    here, there = (attention_rows(m, IMAGES, [1])[1] for m in (model, theirs))
    assert torch.allclose(here, there, atol=1e-6)


def test_every_width_of_an_mlp():
    """11 * (15 / 11) is a little less than 15."""
    theirs = DynamicViT(**(ARGS | dict(embed_dim=11, num_heads=1)), mlp_ratio=15.5 / 11)
    assert theirs.blocks[0].mlp.fc1.out_features == 15
    assert model_from_checkpoint(theirs.state_dict(), num_heads=1).blocks[0].mlp.fc1.out_features == 15


# Refusals --------------------------------------------------------------------------------------------------------


class Own:
    """Not one of the classes that stand beside weights."""


@pytest.mark.parametrize("legacy", [False, True])
def test_a_refused_object_is_named_by_its_class(legacy, plain, tmp_path):
    for beside, name in (
        (Own(), r"test_checkpoints_names\.Own"),
        (np.ones(3), r"numpy\.\S*_reconstruct"),
        (timm.create_model, "create_model"),
    ):
        torch.save({"model": plain, "x": beside}, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(
            BadInput, match=rf"m\.pth carries .* not loaded: \S*{name}; save only the weights, as in torch"
        ):
            load_checkpoint(tmp_path / "m.pth")


def test_objects_beside_weights_leave_nothing(plain, tmp_path):
    torch.save({"model": plain, **beside()}, tmp_path / "m.pth")
    checkpoint = load_checkpoint(tmp_path / "m.pth")
    assert checkpoint["args"] is checkpoint["best"] is checkpoint["kind"] is None
    assert checkpoint["counts"] == {"a": [None]} and type(checkpoint["counts"]) is dict
    assert checkpoint["epoch"] == 3
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def without(state, name):
    return {n: t for n, t in state.items() if n != name}


REFUSED = {
    "another kind of model": (
        lambda s: {"state_dict": {"conv1.weight": torch.ones(8, 3, 7, 7), "fc.bias": torch.ones(5)}},
        r"no patch_embed.proj.weight; its tensors are state_dict.conv1.weight 8x3x7x7, state_dict.fc.bias 5",
    ),
    "nothing": (lambda s: {"a": {"b": 3}}, "it has no tensors with names"),
    "not a tensor": (lambda s: s | {"epoch": 3, "lr": 0.1}, "values are tensors, with names; see epoch, lr"),
    "two names": (
        lambda s: s | dict.fromkeys(("reg_token", "storage_tokens"), s["cls_token"]), "storage_tokens .* second name",
    ),
    "a part of the trunk": (lambda s: s | {"norm_pre.weight": s["norm.weight"]}, "norm_pre.weight 48 is unknown here"),
    "no positions": (
        lambda s: without(s, "pos_embed"), "lack pos_embed, register_tokens, blocks.0.ls1.gamma; give",
    ),
    "rotary positions of another kind": (
        lambda s: s | {"blocks.0.gamma_1": torch.ones(48)}, "both pos_embed and blocks.0.gamma_1; give --model_path",
    ),
    "rotary positions without CLS": (
        lambda s: without(dinov3().state_dict(), "cls_token"), "lack pos_embed, cls_token; give --model_path",
    ),
    "no MLP": (lambda s: without(s, "blocks.0.mlp.fc1.weight"), "lack blocks.0.mlp.fc1.weight"),
    "one channel": (
        lambda s: s | {"patch_embed.proj.weight": torch.ones(48, 1, 8, 8)}, "proj.weight is 48x1x8x8",
    ),
    "bias of two thirds": (
        lambda s: s | {"blocks.0.attn.qkv.bias": torch.ones(4), "blocks.0.attn.qkv.bias_mask": torch.ones(4)},
        "blocks.0.attn.qkv.bias 4 does not consist of 3 equal parts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_and_its_tensors(kind, plain):
    change, words = REFUSED[kind]
    with pytest.raises(ValueError, match=words):
        model_from_checkpoint(change(plain), num_heads=3)


def test_a_checkpoint_of_this_project_needs_no_key(capsys):
    model = DynamicViT(**ARGS)
    checkpoint = {"model": model.state_dict(), "model_args": model.model_args, "ema": zeros(model.state_dict())}
    assert torch.equal(model_from_checkpoint(checkpoint).head.weight, model.head.weight)
    assert "its weights without EMA are used" in capsys.readouterr().out
    model_from_checkpoint(checkpoint | {"ema": None})
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="leave out weights_key"):
        model_from_checkpoint(checkpoint, weights_key="ema")
