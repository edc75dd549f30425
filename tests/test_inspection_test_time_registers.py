"""Registers without training, on a model with a planted register neuron."""

import json

import pytest
import timm
import torch
from torchvision.transforms.functional import to_pil_image

import analyze_tokens
import discover_objects
import visualize_attention
from checkpoints.files import save_checkpoint
from inspection.attention import attention_rows, trace
from inspection.foreign import ForeignViT
from inspection.statistics import TokenStatistics
from inspection.test_time_registers import WithRegisters, add_registers, lasting, rank_neurons
from runs import noise, run, tiny
from utils import BadInput

BLOCK, NEURON = 1, 5


def plant(model, blocks):
    """Neuron 5 of block 1 fires on patches whose number 1 is large, and writes 300 as number 0; others read it."""
    with torch.no_grad():
        for block in blocks:
            for module in (block.mlp.fc1, block.mlp.fc2):
                module.weight.mul_(0.1)
            for module in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                module.bias.zero_()
            for norm in (block.norm1, block.norm2):
                norm.reset_parameters()
            width = block.attn.proj.in_features
            block.attn.qkv.weight[: 2 * width] = 0  # every token attends to all tokens equally
            block.attn.qkv.weight[2 * width :, 1:] = 0
        mlp = blocks[BLOCK].mlp
        mlp.fc1.weight[NEURON] = 0
        mlp.fc1.weight[NEURON, 1] = 10
        mlp.fc1.bias[NEURON] = -15
        mlp.fc2.weight[:, NEURON] = 0
        mlp.fc2.weight[0, NEURON] = 30


def planted(**kwargs):
    """A model, and images of which one patch each, number i in image i, is bright."""
    model, draws = tiny(num_register_tokens=0, **kwargs), torch.Generator().manual_seed(0)
    with torch.no_grad():  # how torch initialises layers differs between its versions
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=draws)
    plant(model, model.blocks)
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(0.02)
        model.patch_embed.proj.weight[1] = 3 / 48  # number 1 is three times the patch's brightness
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.sign_()  # all patches have a norm of 4.8, the bright ones of 5.7
        model.pos_embed[..., :2] = 0
        images = noise(model, 12) * 0.02
        for i, image in enumerate(images):
            y, x = divmod(i, 6)
            image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 1
    return model, images


def in_batches(images):
    return lambda: ((part, None) for part in images.split(5))


def shares(model, images):
    statistics = TokenStatistics(model, 0)
    statistics.add(images)
    return [block["share"] for block in statistics.result()["artefacts"]["blocks"]]


@torch.no_grad()
def test_outliers_move_and_the_logits_stay(capsys):
    model, images = planted(cls_pos=0)
    assert shares(model, images)[1:] == [pytest.approx(1 / 24)] * 3  # the one patch in 24
    norms = {}
    trace(model, images, output=lambda i, x: norms.update({i: x.norm(dim=-1)}))
    threshold = TokenStatistics(model, 0)
    threshold.add(images)
    threshold = threshold.result()["artefacts"]["blocks"][BLOCK]["threshold"]
    assert rank_neurons(model, in_batches(images), BLOCK, threshold)[0] == (BLOCK, NEURON)
    logits = model(images)
    changed = add_registers(model, in_batches(images), neurons=1)
    words = f"block {BLOCK}: {NEURON}. Artefacts from block {BLOCK} on: 4.17% of the patches, now 0.00%"
    assert words in capsys.readouterr().out
    assert max(shares(changed, images)) == 0
    kept = changed(images)
    silent = WithRegisters(planted(cls_pos=0)[0], 1, 0, {})
    silent.inner.blocks[BLOCK].mlp.fc2.weight[:, NEURON] = 0
    # Every block has 26 tokens to attend to rather than 25, so that some hundredths of what each brought are missing.
    assert (kept - logits).norm() < 0.2 * (silent(images) - logits).norm()
    seen = {}
    trace(changed, images, output=lambda i, x: seen.update({i: x}))
    register = seen[BLOCK][:, -1]
    assert torch.allclose(register[:, 0], norms[BLOCK][:, 1:].max(dim=1).values, rtol=0.05)
    assert changed.token_layout(3).registers == slice(25, 26) and changed.token_layout(3).numbers == (0,)
    rows = attention_rows(changed, images, [3], [changed.token_layout(3).registers])[3]
    assert rows.shape == (12, 3, 1, 26)


@torch.no_grad()
def test_it_enters_at_a_block_after_other_registers():
    model, images = planted(cls_pos=1)
    before = model(images)
    changed = add_registers(model, in_batches(images), count=2, entry=1, neurons=3)
    assert changed.token_layout(0).registers is None and changed.token_layout(1).registers == slice(25, 27)
    assert changed.num_register_tokens == 2 and changed.forward(images).shape == before.shape
    assert (changed(images) - before).abs().max() < 0.1 * before.abs().max()
    other = changed.at_size((24, 24))
    assert other.token_layout(2).length == 36 + 1 + 2 and other(torch.zeros(1, 3, 24, 24)).shape == (1, 5)
    assert torch.equal(changed(images), changed(images))


@torch.no_grad()
def test_a_model_of_timms_whose_mean_is_classified():
    """The new token is no part of the mean that its head reads."""
    torch.manual_seed(0)
    own = timm.create_model(
        "vit_tiny_patch16_224", img_size=(16, 24), patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=5,
        global_pool="avg", class_token=False, fc_norm=False,
    ).eval()  # fmt: skip
    reference, images = planted(cls_pos=None)
    own.load_state_dict(reference.state_dict(), strict=False)
    model = ForeignViT(own, "vit", (16, 24))
    logits = model(images)
    changed = add_registers(model, in_batches(images), neurons=1)
    assert max(shares(changed, images)) == 0 and changed.token_layout(2).registers == slice(24, 25)
    features = {}
    own.norm.register_forward_hook(lambda _, args, y: features.update(tokens=args[0].shape[1]))
    assert changed(images).shape == logits.shape and features["tokens"] == 24


def test_artefacts_of_early_blocks_alone_do_not_count():
    cases = [0.1, 0.1, 0, 0], [0.1, 0, 0.1, 0.1], [0, 0, 0, 0], [0.1] * 4, [0, 0.1, 0.1, 0]
    assert [*map(lasting, cases)] == [None, 2, None, 0, 1]


def test_the_scripts(tmp_path, capsys):
    model, images = planted(cls_pos=0)
    data = {"name": "FOLDER", "classes": list("abcde"), "input_size": (16, 24), "mean": [0.0] * 3, "std": [1.0] * 3}
    args = {"epochs": 1, "data_path": None}
    file, folder = tmp_path / "m.pth", tmp_path / "images"
    save_checkpoint(file, {"model": model.state_dict(), "model_args": model.model_args, "data": data, "args": args})
    folder.mkdir()
    for i, image in enumerate(images):
        to_pil_image((image.clamp(0, 1) * 255).byte()).save(folder / f"{i}.png")
    common = ["--model_path", file, "--output_dir", tmp_path, "--image_path", folder, "--test_time_registers", 1]
    common += ["--register_neurons", 1]
    for main, more in (
        (analyze_tokens.main, []),
        (visualize_attention.main, ["--layer_num", 3, "--tokens", "reg"]),
        (discover_objects.main, ["--max_side", 32]),
    ):
        status, out, err = run(main, [*common, *more], capsys)
        assert status == 0 and f"register neurons: block {BLOCK}: {NEURON}. " in out, err
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert "1 test-time registers at block 0" in found["model"]["is"] and "registers" in found["norms"]
    assert found["artefacts"]["begins_at_block"] is None
    status, out, err = run(visualize_attention.main, [*common, "--image_path", folder / "0.png"], capsys)
    assert status == 2 and "at least 8 images" in err
    argv = [*common, "--image_path", folder / "0.png", "--registers_from", folder]
    assert run(visualize_attention.main, argv, capsys)[0] == 0


def test_nothing_to_do_and_what_cannot_be_done():
    model, images = planted(cls_pos=0)
    for made, pictures, options, words in (
        (tiny(), noise(tiny(), 12), {}, "no patch of these images is an artefact"),
        (model, images[:4], {}, "at least 8 images"),
        (model, images, {"entry": 4}, r"blocks are 0\.\.3"),
        (model, images, {"entry": 2, "neurons": 1}, "blocks up to 1"),
        (tiny(rope=True, num_register_tokens=0), images, {}, "no patch of these images is an artefact"),
    ):
        with pytest.raises(BadInput, match=words):
            add_registers(made, in_batches(pictures), **options)
    rotary, images = planted_with_rope()
    with pytest.raises(BadInput, match="cannot take another token"):
        add_registers(rotary, in_batches(images), neurons=1)


def planted_with_rope():
    model, images = planted(cls_pos=0)
    rotary = tiny(num_register_tokens=0, rope=True)
    rotary.load_state_dict({n: t for n, t in model.state_dict().items() if n != "pos_embed"}, strict=False)
    return rotary, images
