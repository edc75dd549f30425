"""Attention maps are the attention that the model used."""

import itertools

import pytest
import torch

import models_dynamic
from conftest import noise, tiny
from test_model import inputs_of_blocks

PAIRS = list(itertools.product((0, 1, 2, 3, None), (0, 1, 2, 3)))


def softmax_by_hand(block, x):
    """(B, H, N, N) from a block's input, with numbers of its own."""
    B, N, D = x.shape
    heads = block.attn.num_heads
    query, key, _ = block.attn.qkv(block.norm1(x)).split(D, dim=-1)
    attention = torch.empty(B, heads, N, N)
    d = D // heads
    for h in range(heads):
        cut = slice(h * d, (h + 1) * d)
        scores = query[..., cut] @ key[..., cut].transpose(1, 2) / d**0.5
        attention[:, h] = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return attention


@pytest.mark.parametrize("img_size", [(16, 16), (16, 24)])
@pytest.mark.parametrize(("cls_pos", "reg_pos"), PAIRS)
@torch.no_grad()
def test_maps_equal_a_softmax_by_hand(cls_pos, reg_pos, img_size):
    model = tiny(img_size=img_size, cls_pos=cls_pos, reg_pos=reg_pos, num_register_tokens=2)
    images = noise(model)
    gh, gw = img_size[0] // 4, img_size[1] // 4
    maps = model.attention_maps(images, range(4))
    for i, x in inputs_of_blocks(model, images).items():
        expected = softmax_by_hand(model.blocks[i], x)
        assert torch.allclose(model.attention(images, i), expected, atol=1e-5)
        first = int(cls_pos is not None and i >= cls_pos)  # where the patches begin
        patches = expected[..., first : first + gh * gw].unflatten(-1, (gh, gw))
        assert (maps[i].cls is None) == (not first)
        if first:
            assert torch.allclose(maps[i].cls, patches[:, :, 0], atol=1e-5)
        assert (maps[i].registers is None) == (i < reg_pos)
        if i >= reg_pos:
            rows = patches[:, :, first + gh * gw :]
            assert rows.shape[2] == 2
            assert torch.allclose(maps[i].registers, rows.transpose(1, 2), atol=1e-5)


@torch.no_grad()
def test_attention_is_what_the_block_computes_with():
    model = tiny(cls_pos=1, reg_pos=2)
    images = noise(model)
    for i, x in inputs_of_blocks(model, images).items():
        block = model.blocks[i]
        value = block.attn.qkv(block.norm1(x)).split(24, dim=-1)[2].unflatten(-1, (3, 8)).transpose(1, 2)
        mixed = (model.attention(images, i) @ value).transpose(1, 2).flatten(2)
        assert torch.allclose(block.attn.proj(mixed), block.attn(block.norm1(x)), atol=1e-5)


def test_maps_are_without_dropout_and_leave_the_mode_alone():
    model = tiny(attn_drop_rate=0.5, drop_rate=0.5, drop_path_rate=0.5)
    images = noise(model)
    expected = model.attention_maps(images, [3])[3].cls
    model.train()
    model.blocks[1].eval()
    assert torch.equal(model.attention_maps(images, [3])[3].cls, expected)
    assert torch.equal(model.attention(images, 3)[:, :, 0, 1:25].unflatten(-1, (4, 6)), expected)
    assert model.training
    assert model.blocks[2].attn.training
    assert not model.blocks[1].attn.training


def test_only_rows_of_tokens_are_computed(monkeypatch):
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=3)
    rows = []
    original = models_dynamic._softmax_attention

    def watched(attn, queries, keys):
        rows.append(queries.shape[2])
        return original(attn, queries, keys)

    monkeypatch.setattr(models_dynamic, "_softmax_attention", watched)
    model.attention_maps(noise(model), range(4))
    assert rows == [1, 4, 4]  # block 0 has no token, block 1 only CLS


def test_blocks_after_the_last_one_wanted_are_not_run():
    model = tiny()
    run = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: run.append(i))
    assert list(model.attention_maps(noise(model), [2, 1])) == [1, 2]
    assert run == [0, 1]
    assert model.attention_maps(noise(model), []) == {}


def test_a_block_outside_the_model_is_refused():
    model = tiny()
    for call in (lambda: model.attention(noise(model), 4), lambda: model.attention_maps(noise(model), [0, -1])):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            call()
