"""Attention maps are the attention that the model used."""

import itertools

import pytest
import torch

import visualize_attention
from checkpoints.models import at_size
from checkpoints.weights import load_weights
from inspection import interventions, lens, sinks
from inspection.attention import AttentionCall, attention_maps, attention_rollout, projections, trace
from inspection.class_maps import relevance
from inspection.statistics import TokenStatistics
from runs import noise, run, tiny
from test_models_dynamic import inputs_of_blocks
from tokens.blocks import TokenAttention

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
    softmax = torch.Tensor.softmax

    def watched(scores, *args, **kwargs):
        rows.append(scores.shape[2])
        return softmax(scores, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", watched)
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


def test_maps_of_chosen_patches():
    model = tiny(cls_pos=2, reg_pos=1, num_register_tokens=2)
    images = noise(model)
    maps = model.attention_maps(images, range(4), patches=[(5, 0), (2, 3)])  # grid: 6 columns, 4 rows
    for i in range(4):
        layout = model.token_layout(i)
        attention = model.attention(images, i)[..., layout.patches]
        for n, place in enumerate((5, 3 * 6 + 2)):
            expected = attention[:, :, layout.patches.start + place].unflatten(-1, (4, 6))
            assert torch.allclose(maps[i].patches[:, n], expected, atol=1e-6)
    assert model.attention_maps(images, [0])[0].patches is None
    for call in (attention_maps, attention_rollout):
        with pytest.raises(ValueError, match=r"patch 6,0 is outside the grid: x is 0\.\.5, y is 0\.\.3"):
            call(model, images, [0], patches=[(6, 0)])


def test_rollout_by_hand():
    """A CLS that enters at block 1, one register that enters at block 2, a grid of 1 x 2."""
    model = tiny(img_size=(4, 8), depth=3, cls_pos=1, reg_pos=2, num_register_tokens=1)
    images = noise(model, batch=1)
    a, b, c = (model.attention(images, i)[0].mean(dim=0).tolist() for i in range(3))  # 2, 3 and 4 tokens
    patches = [[(1 + a[0][0]) / 2, a[0][1] / 2], [a[1][0] / 2, (1 + a[1][1]) / 2]]  # after block 0

    def mixed(attention, row, shares):
        return [(sum(w * s[k] for w, s in zip(attention[row], shares)) + shares[row][k]) / 2 for k in (0, 1)]

    shares = [[0, 0], *patches]  # CLS has nothing of them yet
    shares = [mixed(b, row, shares) for row in range(3)]
    after_1 = shares[0]
    shares = [*shares, [0, 0]]
    shares = [mixed(c, row, shares) for row in range(4)]
    maps = attention_rollout(model, images, [1, 2], patches=[(1, 0)])
    assert list(maps) == [1, 2]
    assert maps[1].cls.shape == (1, 1, 1, 2)
    assert maps[1].registers is None
    for found, expected in (
        (maps[1].cls, after_1),
        (maps[2].cls, shares[0]),
        (maps[2].patches, shares[2]),
        (maps[2].registers, shares[3]),
    ):
        assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_projections_make_the_attention_and_the_output():
    model = tiny(cls_pos=1, reg_pos=2)
    images = noise(model)
    for i, x in inputs_of_blocks(model, images).items():
        queries, keys, values = projections(model, images, i)
        assert queries.shape == (2, 3, x.shape[1], 8)
        attention = (queries @ keys.transpose(-2, -1) / 8**0.5).softmax(-1)
        assert torch.allclose(attention, model.attention(images, i), atol=1e-5)
        attn = model.blocks[i].attn
        mixed = (attention @ values).transpose(1, 2).flatten(2)
        assert torch.allclose(attn.proj(mixed), attn(model.blocks[i].norm1(x)), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"cls_pos": None, "num_register_tokens": 0}, {"dist_pos": 1, "reg_pos": 3}])
def test_a_trace_is_the_forward_pass(kwargs):
    model = tiny(**({"cls_pos": 2, "reg_pos": 1, "drop_rate": 0.3} | kwargs))
    images = noise(model)
    inputs, outputs, attention = {}, {}, {}
    logits = trace(
        model, images, tokens=inputs.__setitem__, output=outputs.__setitem__, attention=attention.__setitem__
    )
    assert torch.allclose(logits, model(images), atol=1e-5)
    for i, x in inputs_of_blocks(model, images).items():
        assert torch.allclose(inputs[i], x, atol=1e-5)
        assert torch.allclose(outputs[i], model.blocks[i](x), atol=1e-5)
        assert torch.allclose(attention[i], model.attention(images, i), atol=1e-5)
    run = []
    assert trace(model, images, tokens=lambda i, x: run.append(i), last=1) is None
    assert run == [0, 1]


@torch.no_grad()
def test_what_a_trace_changes_is_what_the_model_goes_on_with():
    model = tiny(cls_pos=1, reg_pos=1, num_register_tokens=1)
    images = noise(model)

    def blind(i, attn):
        if i == 3:  # CLS at nothing but itself
            attn = torch.zeros_like(attn)
            attn[:, :, 0, 0] = 1
            return attn

    logits = trace(model, images, attention=blind)
    x = inputs_of_blocks(model, images)[3][:, :1]
    assert torch.allclose(logits, model.head(model.norm(model.blocks[3](x))[:, 0]), atol=1e-5)
    assert not torch.allclose(logits, model(images), atol=1e-2)
    seen = {}
    trace(model, images, tokens=lambda i, x: torch.zeros_like(x) if i == 2 else None, attention=seen.__setitem__)
    assert torch.allclose(seen[2], torch.tensor(1 / 26))


class SigmoidAttention(TokenAttention):
    """Of one's own: no softmax, and no call of torch's function."""

    def forward(self, x, rope=None, rows=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(((q[:, :, :rows] @ k.mT).sigmoid() @ v).transpose(1, 2).flatten(2))


def test_attention_that_cannot_be_seen_is_an_error_and_never_left_out():
    """A rollout, a statistic or an ablation without one block's attention would be a wrong result."""
    model = tiny(cls_pos=2, reg_pos=1, num_register_tokens=2)
    model.blocks[2].attn.__class__ = SigmoidAttention
    images = noise(model)

    def batches():
        yield images, torch.zeros(2).long()

    assert model.attention_maps(images, [1, 3])[3].cls is not None  # the others can be seen
    logits = trace(model, images, tokens=lambda i, x: None, output=lambda i, x: None)  # what needs tokens alone works
    assert torch.allclose(logits, model(images), atol=1e-5) and lens.measure(model, batches)["images"] == 2
    for what in (
        lambda: model.attention(images, 2), lambda: trace(model, images, attention=lambda i, attn: None),
        lambda: attention_rollout(model, images, [3]), lambda: TokenStatistics(model).add(images),
        lambda: sinks.measure(model, batches), lambda: relevance(model, images),
        lambda: interventions.ablate(model, batches, ["cls_attention_to_registers"]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"the attention of block 2 \(TokenBlock\) cannot be seen"):
            what()


@pytest.mark.parametrize("flags", [["--pages", "rollout"], ["--format", "html"], []])
def test_the_script_says_so_in_one_line(trained, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(TokenAttention, "forward", SigmoidAttention.forward)
    argv = ["--model_path", trained / "model.pth", "--output_dir", tmp_path, "--device", "cpu", *flags]
    status, _, err = run(visualize_attention.main, argv, capsys)
    assert status == 2 and err.count("\n") == 1
    assert "(TokenBlock) cannot be seen: it does not call F.scaled_dot_product_attention" in err


def test_the_same_weights_for_images_of_another_size():
    model = tiny(reg_pos=1)
    other = at_size(model, (24, 16))
    assert other.grid_size == (6, 4)
    assert not other.training
    assert other.blocks[0].mlp.fc1.weight.data_ptr() == model.blocks[0].mlp.fc1.weight.data_ptr()
    fresh = tiny(reg_pos=1, img_size=(24, 16))
    load_weights(fresh, {"model": model.state_dict(), "model_args": model.model_args})
    assert torch.equal(fresh(noise(fresh)), other(noise(fresh)))
    assert torch.equal(at_size(model, (16, 24))(noise(model)), model(noise(model)))
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_heads_that_share_keys_and_values():
    """Grouped queries: 4 heads of queries, 2 of keys and values; drawn and replaced as torch computes them."""
    q, kv = torch.randn(1, 4, 5, 3), torch.randn(2, 1, 2, 5, 3)
    call = AttentionCall(q, *kv, enable_gqa=True)
    by_torch = torch.nn.functional.scaled_dot_product_attention(q, *kv, enable_gqa=True)
    assert torch.allclose(call.mixed(call.weights()), by_torch, atol=1e-6)
