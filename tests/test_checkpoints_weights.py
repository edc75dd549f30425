"""Weights from this project's checkpoints and from elsewhere."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from checkpoints.models import model_from_checkpoint, timm_model
from checkpoints.weights import load_weights
from models_dynamic import DynamicViT
from runs import noise, tiny

ARGS = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=7)


def timm_vit(**kwargs):
    torch.manual_seed(0)
    model = VisionTransformer(**(ARGS | kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ours(**kwargs):
    return DynamicViT(**(ARGS | dict(num_register_tokens=0) | kwargs)).eval()


def test_deit_with_its_class_position():
    theirs, images = timm_vit(), torch.randn(2, 3, 32, 32)
    model = ours()
    report = load_weights(model, {"model": theirs.state_dict()})
    assert torch.allclose(model(images), theirs(images), atol=1e-5)
    assert not (report.new or report.left_out or report.resampled)


def test_distilled_deit():
    """Its distillation token is left out; the class token keeps its own position, the first of two."""
    theirs, images = timm_vit(), torch.randn(2, 3, 32, 32)
    state = theirs.state_dict()
    state["dist_token"] = torch.randn(1, 1, 48)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], torch.randn(1, 1, 48), state["pos_embed"][:, 1:]], dim=1)
    state["head_dist.weight"], state["head_dist.bias"] = torch.randn(7, 48), torch.randn(7)
    model = ours()
    assert load_weights(model, state).left_out == ["dist_token", "head_dist.weight", "head_dist.bias"]
    assert torch.allclose(model(images), theirs(images), atol=1e-5)


KINDS = {
    "DeiT": {}, "DeiT III": dict(no_embed_class=True, init_values=0.1), "DINOv2": dict(init_values=0.1),
    "registers": dict(reg_tokens=4, no_embed_class=True), "registers with rows": dict(reg_tokens=3),
    "no class token": dict(class_token=False, global_pool="avg", fc_norm=False),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bare_files_of_square_images_need_no_size(kind):
    theirs, images = timm_vit(img_size=112, **KINDS[kind]), torch.randn(2, 3, 112, 112)
    model = model_from_checkpoint(theirs.state_dict(), num_heads=4)
    assert model.grid_size == (14, 14)
    assert torch.allclose(model(images), theirs(images), atol=1e-4)


@pytest.mark.parametrize("size", [(48, 32), (120, 192), (64, 104), (104, 112)])  # 25, 361 and 105 rows: 24 is 4 x 6
@pytest.mark.parametrize("kind", KINDS)
def test_bare_files_of_images_that_are_not_square(kind, size):
    theirs, images = timm_vit(img_size=size, **KINDS[kind]), torch.randn(2, 3, *size)
    state = theirs.state_dict()
    if not (size == (48, 32) and kind == "DINOv2"):  # 25 rows: taken for a DeiT III of 5 x 5 patches
        with pytest.raises(ValueError, match="give the size of the images that they are for, as in --input_size"):
            model_from_checkpoint(state, num_heads=4)
        with pytest.raises(ValueError, match="give the size of the images"):  # whatever another model's grid is
            load_weights(ours(num_register_tokens=theirs.num_reg_tokens, init_values=0.1), state)
    model = model_from_checkpoint(state, num_heads=4, img_size=size)
    assert torch.allclose(model(images), theirs(images), atol=1e-4)
    same = DynamicViT(**model.model_args).eval()
    load_weights(same, state)
    assert torch.equal(same(images), model(images))


def test_a_size_that_the_positions_are_not_for():
    """A square file is then read at its own size; of what may be both, nothing."""
    model = model_from_checkpoint(timm_vit().state_dict(), num_heads=4, img_size=(48, 64))
    assert model.grid_size == (4, 4)
    assert model_from_checkpoint(timm_vit().state_dict(), num_heads=4, img_size=(30, 64)).grid_size == (4, 4)
    with pytest.raises(ValueError, match="may be 19x19 patches, or 15x24 patches after 1 for tokens"):
        model_from_checkpoint(timm_vit(img_size=(120, 192)).state_dict(), num_heads=4, img_size=(64, 64))
    prime = timm_vit(img_size=(8, 184), class_token=False, global_pool="avg", fc_norm=False).state_dict()
    with pytest.raises(ValueError, match="pos_embed has 23 rows, of no usual grid"):
        model_from_checkpoint(prime, num_heads=4)


def test_timm_resamples_only_square_positions():
    model = timm_model("vit_tiny_patch16_224", 7, img_size=(64, 96), depth=1)
    for size in ((32, 96), (240, 384)):
        state = timm_model("vit_tiny_patch16_224", 7, img_size=size, depth=1).state_dict()
        with pytest.raises(ValueError, match="rows, here 25, and timm resamples only those of square images"):
            load_weights(model, state)
    state = timm_model("vit_tiny_patch16_224", 7, img_size=(64, 64), depth=1).state_dict()
    assert load_weights(model, state).resampled == ["pos_embed"]


def test_another_resolution():
    theirs, larger = timm_vit(), timm_vit(img_size=(48, 64))
    state = theirs.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], (6, 8), num_prefix_tokens=1)
    larger.load_state_dict(state)
    model = ours(img_size=(48, 64))
    report = load_weights(model, theirs.state_dict())
    assert report.resampled == ["pos_embed"]
    images = torch.randn(2, 3, 48, 64)
    assert torch.allclose(model(images), larger(images), atol=1e-5)


def test_registers_with_positions_of_their_own():
    theirs, images = timm_vit(reg_tokens=3), torch.randn(2, 3, 32, 32)
    assert theirs.pos_embed.shape[1] == 1 + 3 + 16
    model = ours(num_register_tokens=3)
    load_weights(model, theirs.state_dict())
    assert torch.allclose(model(images), theirs(images), atol=1e-5)


def test_dinov2_with_registers():
    """Its file has register_tokens, a position for CLS but none for registers, a mask token and no head."""
    theirs = timm_vit(reg_tokens=4, no_embed_class=True, init_values=0.3, num_classes=0)
    state = theirs.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    of_cls = torch.randn(1, 1, 48)
    state["pos_embed"] = torch.cat([of_cls, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - of_cls
    state["mask_token"] = torch.zeros(1, 48)
    model = ours(num_register_tokens=4, init_values=1e-5)
    report = load_weights(model, state)
    assert report.left_out == ["mask_token"]
    assert report.new == ["head.weight", "head.bias"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.forward_features(images)[:, 0], theirs.forward_features(images)[:, 0], atol=1e-4)


def test_moved_tokens_and_another_head():
    source = tiny(cls_pos=0, reg_pos=0)
    target = tiny(cls_pos=2, reg_pos=3, num_classes=9)
    untouched = target.head.weight.clone()
    report = load_weights(target, {"model": source.state_dict(), "model_args": source.model_args})
    assert report.left_out == report.new == ["head.weight", "head.bias"]
    assert torch.equal(target.head.weight, untouched)
    assert torch.equal(target.cls_token, source.cls_token)
    assert load_weights(tiny(cls_pos=None, num_register_tokens=0), source.state_dict()).left_out == [
        "cls_token", "register_tokens",
    ]  # fmt: skip


def test_own_checkpoint_of_a_grid_that_is_not_square():
    source, target = tiny(), tiny(img_size=(24, 16))
    report = load_weights(target, {"model": source.state_dict(), "model_args": source.model_args})
    assert report.resampled == ["pos_embed"]  # 4 x 6 to 6 x 4: as many rows, another grid
    expected = resample_abs_pos_embed(source.pos_embed, (6, 4), (4, 6), num_prefix_tokens=0)
    assert torch.allclose(target.pos_embed, expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix):
    source = tiny()
    load_weights(tiny(), {prefix + name: t for name, t in source.state_dict().items()})


def test_what_does_not_fit_is_listed_and_nothing_is_loaded():
    model = tiny()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = {n: t * 0 for n, t in model.state_dict().items()}
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(5, 24)
    state["blocks.9.norm1.weight"] = torch.zeros(24)
    del state["norm.bias"]
    with pytest.raises(ValueError, match=r"norm\.bias") as error:
        load_weights(model, state)
    assert "blocks.0.mlp.fc1.weight is 5x24, here 96x24" in str(error.value)
    assert "blocks.9.norm1.weight 24 is unknown" in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight"):
        load_weights(model, {"a": torch.zeros(1)})


def test_a_checkpoint_rebuilds_its_model():
    """Heads leave no trace in the shapes, so 3 heads would load as 6 and the maps would mean nothing."""
    model = tiny(num_heads=6, cls_pos=3, reg_pos=1, num_register_tokens=2)
    again = model_from_checkpoint({"model": model.state_dict(), "model_args": model.model_args})
    assert again.blocks[0].attn.num_heads == 6
    assert torch.equal(again(noise(model)), model(noise(model)))
    with pytest.raises(ValueError, match="leave out num_heads"):
        model_from_checkpoint({"model": model.state_dict(), "model_args": model.model_args}, num_heads=3)


def test_a_bare_state_dict_needs_the_number_of_heads():
    model = tiny(img_size=16, cls_pos=3, reg_pos=1, num_register_tokens=2)
    with pytest.raises(ValueError, match="no weights of a Vision Transformer"):  # before anything is asked for
        model_from_checkpoint({"net": {"conv1.weight": torch.zeros(8, 3, 3, 3)}})
    with pytest.raises(ValueError, match="num_heads"):
        model_from_checkpoint(model.state_dict())
    again = model_from_checkpoint(model.state_dict(), num_heads=3, cls_pos=3, reg_pos=1)
    assert again.model_args == model.model_args
    assert torch.equal(again(noise(model)), model(noise(model)))


@pytest.mark.parametrize(("there", "here"), [(4, 2), (2, 4)])
def test_another_number_of_registers(there, here):
    """The first ones are taken over, the others stay as they were."""
    source, model = tiny(num_register_tokens=there), tiny(num_register_tokens=here, reg_pos=2)
    with torch.no_grad():
        source.register_tokens.fill_(7)
    before = model.register_tokens.clone()
    report = load_weights(model, source.state_dict())
    assert report.resampled == ["register_tokens"] and not report.new and not report.left_out
    assert (model.register_tokens[:, :2] == 7).all()
    assert torch.equal(model.register_tokens[:, there:], before[:, there:])
