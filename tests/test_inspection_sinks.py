"""Sinks of heads: planted ones, and what they bring."""

import json
import math

import pytest
import torch

from inspection import sinks
from inspection.foreign import ForeignViT
from inspection.pages import write_pdf
from runs import noise, tiny
from test_inspection_foreign import make
from utils import BadInput


def attention(given, tokens=10):
    """(1, 1, N, N): the attention that each query gives to token 3; the rest is spread over the others."""
    rows = []
    for share in given:
        rows.append([(1 - share) / (tokens - 1)] * tokens)
        rows[-1][3] = share
    return torch.tensor(rows)[None, None]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([0.5] * 9 + [0.0], 3),  # 9 of 10 queries, exactly a half
        ([0.5] * 8 + [0.0] * 2, -1),
        ([0.49] * 10, -1),
        ([1.0] * 10, 3),
        ([0.1] * 10, -1),  # uniform
    ],
)
def test_what_a_sink_is(given, found):
    column, _, _ = sinks.sinks(attention(given), torch.ones(1, 1, 10, 2), torch.eye(2))
    assert column.tolist() == [[found]]


def test_norms_are_of_what_a_token_brings_through_the_output_projection():
    """By hand, width 3 and 2 heads of 2: W_O doubles the first value of head 0, and loses its second one."""
    weight = torch.tensor([[2.0, 0, 0, 3], [0, 0, 4, 0], [0, 0, 0, 0]])
    value = torch.zeros(1, 2, 10, 2)
    value[0, 0] = torch.tensor([1.0, 7])  # brings 2
    value[0, 0, 3] = torch.tensor([0.0, 9])  # large, and brings nothing
    value[0, 1] = torch.tensor([1.0, 1])  # brings (3, 4), 5
    value[0, 1, 3] = torch.tensor([2.0, 0])  # brings 8
    column, own, others = sinks.sinks(attention([1.0] * 10).expand(1, 2, 10, 10), value, weight)
    assert column.tolist() == [[3, 3]]
    assert torch.allclose(own, torch.tensor([[0.0, 8]]), atol=1e-5)
    assert torch.allclose(others, torch.tensor([[2.0, 5]]))


def planted():
    """CLS enters at block 1, two registers at block 2. Tokens are unit vectors: CLS 0, registers 2 and 3, patches 1;
    a bright patch is 4. All attention is uniform, but: head 0 of block 0 looks at a bright patch, head 1 of block 1 at
    CLS, each of which brings much; head 2 of block 3 looks at register 0, which brings nothing."""
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.patch_embed.proj.weight[4, 0] = 100 / 16
        model.pos_embed[..., 1] = model.cls_token[..., 0] = 1
        model.register_tokens[0, 0, 2] = model.register_tokens[0, 1, 3] = 1
        for block in model.blocks:
            block.norm1.weight.fill_(1)
            block.attn.proj.weight.copy_(1e-4 * torch.eye(24))  # hardly moves a token
        for i, head, looked_at, brings in ((0, 0, 4, 4), (1, 1, 0, 0), (3, 2, 2, 1)):
            qkv, rows = model.blocks[i].attn.qkv, torch.arange(8 * head, 8 * head + 8)
            qkv.bias[rows] = 30  # every query
            qkv.weight[24 + rows, looked_at] = 30
            qkv.weight[48 + rows, brings] = 1
            if brings == 1:  # LayerNorm makes the zeros of a unit vector of width 24 to -1 / sqrt(23)
                qkv.bias[48 + rows] = 1 / math.sqrt(23)
    return model


def batches_of(images, size=3):
    return lambda: ((images[k : k + size], None) for k in range(0, len(images), size))


def bright(count=4, total=8):
    images = torch.zeros(total, 3, 16, 24)
    images[:count, 0, 8:12, 16:20] = 1
    return images


def test_planted_sinks():
    result = sinks.measure(planted(), batches_of(bright()))
    kinds, third = result["kinds"], pytest.approx(1 / 3)
    assert list(kinds) == ["cls", "registers", "patches"]
    assert kinds["cls"]["broadcast"] == [None, third, 0, 0] and kinds["cls"]["sink"] == [None, third, 0, 0]
    assert kinds["registers"]["nop"] == [None, None, 0, third] and kinds["registers"]["broadcast"] == [None, None, 0, 0]
    assert kinds["patches"]["broadcast"] == [pytest.approx(1 / 6), 0, 0, 0]  # in half of the images
    assert kinds["cls"]["sink_interval"][1] == [third, third]  # all images have it
    low, high = kinds["patches"]["sink_interval"][0]
    assert 0 < low < 1 / 6 < high < 1 / 3
    assert result["all"]["sink"] == [pytest.approx(1 / 6), third, 0, third]
    assert result["distance"] == {"cls": [-1, 0, 1, 2], "registers": [-2, -1, 0, 1]}
    assert (result["images"], result["heads"]) == (8, 3)
    found = "\n".join(sinks.lines(result))
    assert "Sinks: in 20.8% of all heads and images (class token 8.3%, registers 8.3%, patches 4.2%)" in found
    assert "40.0% NOP, 0.0% between, 60.0% broadcast" in found
    assert "Sinks on registers: most 1 blocks after entry (33.3%)" in found


def test_thresholds_are_options():
    images = batches_of(bright())
    between = sinks.measure(planted(), images, broadcast=100.0)["kinds"]  # CLS brings 23 times the others' norm
    assert between["cls"]["between"][1] == pytest.approx(1 / 3) and between["cls"]["broadcast"][1] == 0
    assert sinks.measure(planted(), images, nop=100.0)["kinds"]["cls"]["nop"][1] == pytest.approx(1 / 3)
    every = sinks.measure(planted(), images, attention=0.01)["all"]["sink"]  # uniform attention is more than that
    assert every == [pytest.approx(1)] * 4


def test_batches_make_no_difference_and_a_page_is_drawn(tmp_path):
    for kwargs in ({"cls_pos": None, "num_register_tokens": 0}, {"cls_pos": 2, "reg_pos": 1, "dist_pos": 3}):
        model = tiny(**kwargs)
        images = noise(model, 5)
        result = sinks.measure(model, batches_of(images, 2), attention=0.1, queries=0.3)
        assert result == sinks.measure(model, batches_of(images, 5), attention=0.1, queries=0.3)
        assert any(result["all"]["sink"])
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert 1 <= len(sinks.lines(result)) <= 6
        write_pdf([sinks.page(result, "a model")], tmp_path / "page.pdf")
    none = sinks.measure(model, batches_of(images), attention=1.1)
    assert sinks.lines(none) == ["Sinks: none"] and sinks.page(none, "a model")


@pytest.mark.parametrize(("name", "entry"), [("vit_small_patch16_dinov3", 0), ("vit_base_patch16_siglip_224", None)])
def test_models_of_timms(name, entry):
    model, images = make(name)
    model = ForeignViT(model, name, images.shape[2:])
    result = sinks.measure(model, batches_of(images), attention=0.0)
    assert result["all"]["sink"] == [1, 1]  # of the blocks, not of the attention pooling
    assert result["distance"]["cls"] == (None if entry is None else [0, 1])


def test_blocks_without_an_output_projection_are_refused():
    model = tiny()
    del model.blocks[1].attn.proj
    with pytest.raises(BadInput, match=r"no attn.proj"):
        sinks.check(model)
