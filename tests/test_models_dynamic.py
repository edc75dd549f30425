"""The model: token layout, positions, the shortcut of the last block, equality with timm's ViT."""

import ast
import copy
import itertools
import os
import subprocess
import sys

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2

import models_dynamic
from checkpoints.weights import load_weights
from models_dynamic import DynamicViT, TokenLayout, set_fused_attention, vit_register_dynamic_viz
from runs import ROOT, noise, tiny

POSITIONS = [(c, r, n) for c, r in itertools.product((0, 1, 3, None), (0, 2, 3)) for n in (0, 3) if n or not r]


def inputs_of_blocks(model, images):
    """{block: its input}, seen by hooks while `forward` runs."""
    seen = {}
    hooks = [
        block.norm1.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0].detach()}))
        for i, block in enumerate(model.blocks)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_layout_by_hand():
    model = tiny(cls_pos=2, reg_pos=1, num_register_tokens=3)
    assert model.token_layout(0) == TokenLayout(None, slice(0, 24), None, 24)
    assert model.token_layout(1) == TokenLayout(None, slice(0, 24), slice(24, 27), 27, numbers=(0, 1, 2))
    assert model.token_layout(2) == TokenLayout(slice(0, 1), slice(1, 25), slice(25, 28), 28, numbers=(0, 1, 2))
    assert tiny(num_register_tokens=0).token_layout(3) == TokenLayout(slice(0, 1), slice(1, 25), None, 25)
    for block in (-1, 4):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            model.token_layout(block)


@pytest.mark.parametrize(("cls_pos", "reg_pos", "registers"), POSITIONS)
def test_tokens_enter_at_their_block(cls_pos, reg_pos, registers):
    model = tiny(cls_pos=cls_pos, reg_pos=reg_pos, num_register_tokens=registers)
    images = noise(model)
    seen = inputs_of_blocks(model, images)
    for i, x in seen.items():
        layout = model.token_layout(i)
        assert x.shape[1] == layout.length
        if i == cls_pos:
            assert torch.equal(x[:, layout.cls], model.cls_token.expand(2, -1, -1))
        if registers and i == reg_pos:
            assert torch.equal(x[:, layout.registers], model.register_tokens.expand(2, -1, -1))
        if i:  # the blocks before were applied
            assert torch.allclose(
                x[:, layout.patches], model.blocks[i - 1](seen[i - 1])[:, model.token_layout(i - 1).patches]
            )
    assert torch.equal(seen[0][:, model.token_layout(0).patches], model.patch_embed(images) + model.pos_embed)


@pytest.mark.parametrize(("cls_pos", "reg_pos", "registers"), POSITIONS)
def test_last_block_computes_only_what_is_classified_and_loses_nothing(cls_pos, reg_pos, registers):
    model = tiny(cls_pos=cls_pos, reg_pos=reg_pos, num_register_tokens=registers, init_values=0.5)
    images, layout = noise(model), model.token_layout(3)
    features = model.forward_features(images)
    assert features.shape == (2, layout.length, 24)
    whole = features[:, 0] if cls_pos is not None else features[:, layout.patches].mean(1)
    expected = torch.autograd.grad(model.head(whole).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    assert torch.allclose(model(images), model.head(whole), atol=1e-5)
    for (name, _), a, b in zip(model.named_parameters(), found, expected):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("init_values", [None, 0.1])
@pytest.mark.parametrize("registers", [0, 4])
def test_equals_timm(init_values, registers):
    args = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=7, init_values=init_values)
    torch.manual_seed(0)
    theirs = VisionTransformer(**args, reg_tokens=registers, no_embed_class=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = DynamicViT(**args, num_register_tokens=registers)
    report = load_weights(ours, theirs.state_dict())
    assert not (report.new or report.left_out or report.resampled)
    images = torch.randn(3, 3, 32, 32)
    expected, found = theirs(images), ours(images)
    assert torch.allclose(found, expected, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    gradients = {n.replace("reg_token", "register_tokens"): p.grad for n, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize(("cls_pos", "reg_pos", "registers"), POSITIONS)
def test_every_parameter_gets_a_gradient(cls_pos, reg_pos, registers):
    model = tiny(cls_pos=cls_pos, reg_pos=reg_pos, num_register_tokens=registers).train()
    model(noise(model)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # The last block's register output is not used, but its keys and values are.
        assert parameter.grad.abs().sum() > 0, name
    assert hasattr(model, "cls_token") == (cls_pos is not None)
    assert hasattr(model, "register_tokens") == bool(registers)


def test_registers_start_different_from_each_other():
    registers = DynamicViT(img_size=32, embed_dim=48, depth=1, num_heads=2).register_tokens[0]
    assert torch.cdist(registers, registers).fill_diagonal_(1).min() > 0.05
    assert 0.01 < registers.std() < 0.03


def test_a_seed_gives_the_same_weights_in_every_process():
    """Whatever the order in which Python iterates over sets of names, which its hash seed decides."""
    code = (
        "import torch; from models_dynamic import DynamicViT; torch.manual_seed(0);"
        "m = DynamicViT(img_size=32, embed_dim=24, depth=1, num_heads=2);"
        "names, sums = zip(*((n, float(p.detach().double().sum())) for n, p in m.named_parameters()));"
        "printed = [[*set(names)], [*sums]]"
    )
    there = subprocess.run(
        [sys.executable, "-c", f"{code}; print(printed)"], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    here = {}
    exec(code, here)
    (names, sums), (other_names, other_sums) = here["printed"], ast.literal_eval(there)
    assert names != other_names and sums == other_sums


def test_tokens_and_positions_are_not_decayed():
    model = tiny()
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "register_tokens"}
    assert tiny(cls_pos=None, num_register_tokens=0).no_weight_decay() == {"pos_embed"}
    names = {id(p): n for n, p in model.named_parameters()}
    free = {
        names[id(p)] for group in create_optimizer_v2(model, "adamw", weight_decay=0.1).param_groups
        if group["weight_decay"] == 0 for p in group["params"]
    }  # fmt: skip
    assert {"pos_embed", "cls_token", "register_tokens", "norm.weight", "head.bias"} <= free
    assert "head.weight" not in free


def test_plain_attention_equals_fused():
    model = tiny(cls_pos=1, reg_pos=2)
    images = noise(model)
    fused = model(images)
    set_fused_attention(model, False)
    assert torch.allclose(model(images), fused, atol=1e-5)


def test_registered_sizes():
    for size, (width, heads) in {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}.items():
        model = timm.create_model(
            f"dynamic_vit_{size}_patch16_224", cls_pos=6, reg_pos=3, num_register_tokens=4, num_classes=3
        )
        assert (model.embed_dim, model.depth, model.blocks[0].attn.num_heads) == (width, 12, heads)
        assert (model.cls_pos, model.reg_pos, model.grid_size) == (6, 3, (14, 14))
        assert model.norm.eps == model.blocks[0].norm1.eps == 1e-6
        assert model.blocks[0].attn.qkv.bias is not None
    small = timm.create_model("dynamic_vit_cifar")
    assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    # timm drops arguments that are None, so None would silently mean block 0.
    assert timm.create_model("dynamic_vit_cifar", cls_pos="none").cls_pos is None
    with pytest.raises(TypeError, match="cls_position"):
        timm.create_model("dynamic_vit_cifar", cls_position=3)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("dynamic_vit_cifar", pretrained=True)
    assert vit_register_dynamic_viz is DynamicViT
    assert "DynamicViT" in models_dynamic.__all__  # timm would list its registered names alone


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(cls_pos=4), r"cls_pos 4 is outside.*0\.\.3.*None"),
        (dict(cls_pos=-1), "cls_pos -1"),
        (dict(reg_pos=4), "reg_pos 4"),
        (dict(num_heads=5), "24 is not divisible by 5 heads"),
        (dict(img_size=(16, 26)), "16 x 26"),
        (dict(num_register_tokens=-1), "at least 0"),
    ],
)
def test_impossible_models_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        tiny(**wrong)


def test_position_of_absent_registers_is_ignored():
    assert tiny(num_register_tokens=0, reg_pos=99).token_layout(3).registers is None


def test_height_and_width_are_not_swapped():
    model = tiny()
    dark = torch.zeros(1, 3, 16, 24)
    bright = dark.clone()
    bright[:, :, 8:12, 20:24] = 1  # patch in row 2, column 5
    changed = (model.patch_embed(bright) - model.patch_embed(dark)).abs().sum(-1)[0]
    assert changed.view(model.grid_size).nonzero().tolist() == [[2, 5]]
    with pytest.raises(AssertionError):
        model(torch.zeros(1, 3, 24, 16))


def test_a_model_says_how_it_is_built():
    model = tiny(cls_pos=None, reg_pos=2, init_values=0.1, drop_path_rate=0.2)
    twin = DynamicViT(**model.model_args)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(noise(model)), model(noise(model)))
    with pytest.raises(ValueError, match="norm_layer"):
        _ = tiny(norm_layer=torch.nn.LayerNorm).model_args
    assert set(models_dynamic.SIZES) <= set(timm.list_models("dynamic_vit*"))


def test_tokens_of_a_model_are_moved_by_building_another_one():
    model = tiny(cls_pos=2, reg_pos=1)
    with pytest.raises(AttributeError, match=r"cls_pos cannot be set: build DynamicViT\(\*\*model.model_args"):
        model.cls_pos = 0
    assert model.cls_pos == 2 and copy.deepcopy(model).cls_pos == 2
    other = DynamicViT(**model.model_args | dict(cls_pos=0))
    other.load_state_dict(model.state_dict())
    assert (other.cls_pos, other.token_layout(0).cls) == (0, slice(0, 1))


@pytest.mark.parametrize("place", [1, 3])
def test_a_block_of_ones_own(place):
    """`forward(x, rope, rows)`, as docs/MODEL.md says; the others' attention can still be seen."""

    class Skip(torch.nn.Module):
        def forward(self, x, *_):
            return x

    model = tiny(cls_pos=2, reg_pos=1)
    images = noise(model)
    model.blocks[place] = Skip()
    assert model(images).shape == (2, 5) and model.token_layout(place).patches.start == int(place > 1)
    assert torch.allclose(model(images), model.forward_head(model.forward_features(images)), atol=1e-5)
    assert model.attention_maps(images, [2])[2].cls.shape == (2, 3, 4, 6)
    with pytest.raises(ValueError, match=rf"block {place} \(Skip\) cannot be seen"):
        model.attention(images, place)
