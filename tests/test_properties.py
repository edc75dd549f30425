"""Properties of random models and random command lines.

The examples are the same in each run, and few. To search longer, with new ones: PROPERTIES=50 pytest
tests/test_properties.py takes 50 times as many.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import utils
from conftest import noise, tiny
from models_dynamic import load_weights, model_from_checkpoint
from test_model import inputs_of_blocks

TIMES = int(os.environ.get("PROPERTIES", "1"))
KINDS = ("cls", "dist", "patches", "registers")  # in the order of the sequence


def examples(count):
    return settings(
        max_examples=count * TIMES, derandomize=TIMES == 1, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


# Models ----------------------------------------------------------------------------------------------------------


@st.composite
def model_args(draw):
    """Arguments of a small model; wherever its tokens enter, if they do."""
    depth, heads = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    gh, gw, ph, pw = (draw(st.integers(1, n)) for n in (4, 5, 3, 3))
    block = st.integers(0, depth - 1)
    return dict(
        img_size=(gh * ph, gw * pw), patch_size=(ph, pw), depth=depth, num_heads=heads, embed_dim=heads * 4,
        num_classes=3, cls_pos=draw(st.none() | block), reg_pos=draw(block), dist_pos=draw(st.none() | block),
        num_register_tokens=draw(st.integers(0, 5)), qkv_bias=draw(st.booleans()),
        init_values=draw(st.sampled_from((None, 0.5))),
    )  # fmt: skip


def exact(args):
    """The model in double precision, so that equal is equal to twelve digits."""
    return tiny(**args).double()


def images_of(model, batch=2):
    return noise(model, batch).double()


def close(a, b):
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def sequence(args, block):
    """The kinds of the tokens at the input of a block, one after another."""
    patches = args["img_size"][0] // args["patch_size"][0] * (args["img_size"][1] // args["patch_size"][1])
    counts = {"cls": 1, "dist": 1, "patches": patches, "registers": args["num_register_tokens"]}
    enter = {"cls": args["cls_pos"], "dist": args["dist_pos"], "patches": 0, "registers": args["reg_pos"]}
    return [kind for kind in KINDS if enter[kind] is not None and enter[kind] <= block for _ in range(counts[kind])]


def places(args, block, kind):
    return [i for i, there in enumerate(sequence(args, block)) if there == kind]


@examples(40)
@given(model_args())
def test_the_layout_is_the_sequence(args):
    model = tiny(**args)
    for block in range(args["depth"]):
        layout = model.token_layout(block)
        assert layout.length == len(sequence(args, block))
        for kind in KINDS:
            cut, expected = getattr(layout, kind), places(args, block, kind)
            assert (cut is None) == (not expected)
            assert not expected or list(range(layout.length))[cut] == expected


@examples(25)
@given(model_args(), st.integers(1, 3))
@torch.no_grad()
def test_tokens_enter_at_their_block_and_go_on_in_their_order(args, batch):
    model = exact(args)
    images = images_of(model, batch)
    seen = inputs_of_blocks(model, images)
    before = {"patches": model.patch_embed(images) + model.pos_embed}
    names = {"cls": "cls_token", "dist": "dist_token", "registers": "register_tokens"}
    for block in range(args["depth"]):
        for kind in KINDS:
            at = places(args, block, kind)
            if at:
                x = before.get(kind, None if kind == "patches" else getattr(model, names[kind], None))
                assert close(seen[block][:, at], x.expand(batch, -1, -1)), (block, kind)
        after = model.blocks[block](seen[block])
        before = {kind: after[:, places(args, block, kind)] for kind in set(sequence(args, block))}
    features = model.forward_features(images)
    assert close(features, model.norm(after))


@examples(25)
@given(model_args(), st.integers(1, 3))
@torch.no_grad()
def test_maps_are_rows_of_the_attention(args, batch):
    model = exact(args)
    images, (gh, gw) = images_of(model, batch), model.grid_size
    maps = model.attention_maps(images, range(args["depth"]), patches=[(gw - 1, gh - 1), (0, 0)])
    for block in range(args["depth"]):
        attention, found = model.attention(images, block), maps[block]
        N = len(sequence(args, block))
        assert attention.shape == (batch, args["num_heads"], N, N)
        assert close(attention.sum(-1), torch.ones(batch, args["num_heads"], N).double())
        cls, dist, patches, registers = (places(args, block, kind) for kind in KINDS)
        rows = attention[..., patches].unflatten(-1, (gh, gw)).transpose(1, 2)  # (B, N, H, gh, gw)
        for one, at in ((found.cls, cls), (found.dist, dist)):
            assert (one is None) == (not at)
            assert one is None or close(one, rows[:, at[0]])
        assert (found.registers is None) == (not registers)
        assert found.registers is None or close(found.registers, rows[:, registers])
        assert close(found.patches, rows[:, [patches[-1], patches[0]]])


@examples(25)
@given(model_args(), st.integers(1, 3))
@torch.no_grad()
def test_attention_is_what_the_blocks_compute_with(args, batch):
    model = exact(args)
    images = images_of(model, batch)
    for block, x in inputs_of_blocks(model, images).items():
        attn, y = model.blocks[block].attn, model.blocks[block].norm1(x)
        value = attn.qkv(y)[..., 2 * model.embed_dim :].unflatten(-1, (args["num_heads"], 4)).transpose(1, 2)
        mixed = (model.attention(images, block) @ value).transpose(1, 2).flatten(2)
        assert close(attn.proj(mixed), attn(y))


@examples(25)
@given(model_args(), st.integers(1, 3))
def test_the_short_last_block_is_the_whole_one_and_every_parameter_learns(args, batch):
    model = exact(args).train()
    images = images_of(model, batch)
    features, last = model.forward_features(images), args["depth"] - 1
    cls, dist, patches, _ = (places(args, last, kind) for kind in KINDS)
    expected = [model.head(features[:, cls or patches].mean(1))]
    expected += [model.head_dist(features[:, at]) for at in dist]
    found = model(images)
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == len(expected)
    assert all(map(close, found, expected))
    assert close(model.eval()(images), sum(expected) / len(expected))
    names, parameters = zip(*model.named_parameters())
    fast, slow = (torch.autograd.grad(sum(y.square().sum() for y in ys), parameters) for ys in (found, expected))
    for name, a, b in zip(names, fast, slow):
        assert close(a, b), name
        assert a.abs().sum() > 0, name


@examples(25)
@given(model_args(), st.randoms(use_true_random=False))
@torch.no_grad()
def test_without_positions_maps_move_with_the_patches(args, random):
    model = exact(args)
    model.pos_embed.zero_()
    (gh, gw), (ph, pw) = model.grid_size, args["patch_size"]
    order = random.sample(range(gh * gw), gh * gw)
    images = images_of(model)
    tiles = images.unflatten(2, (gh, ph)).unflatten(4, (gw, pw)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    moved = tiles[:, order].unflatten(1, (gh, gw)).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    assert close(model(moved), model(images))
    blocks = range(args["depth"])
    for here, there in zip(*(model.attention_maps(i, blocks).values() for i in (images, moved))):
        for kind in ("cls", "dist", "registers"):
            a, b = getattr(here, kind), getattr(there, kind)
            assert (a is None) == (b is None)
            assert a is None or close(a.flatten(-2)[..., order], b.flatten(-2))


@examples(15)
@given(model_args())
@torch.no_grad()
def test_an_image_does_not_see_the_others_of_its_batch(args):
    model = exact(args)
    images, blocks = images_of(model, 3), range(args["depth"])
    together = model.attention_maps(images, blocks)
    assert close(model(images)[1:2], model(images[1:2]))
    for block, alone in model.attention_maps(images[1:2], blocks).items():
        for kind in ("cls", "dist", "registers"):
            one, all_of_them = getattr(alone, kind), getattr(together[block], kind)
            assert one is None or close(one, all_of_them[1:2])


@examples(40)
@given(model_args(), st.integers(), st.sampled_from(("cls_pos", "reg_pos", "dist_pos")))
def test_positions_outside_are_refused(args, position, name):
    assume(not 0 <= position < args["depth"])
    args["num_register_tokens"] = args["num_register_tokens"] or 1
    with pytest.raises(ValueError, match=rf"{name} {position} .*0\.\.{args['depth'] - 1}"):
        tiny(**args | {name: position})
    model = tiny(**args)
    images = noise(model)
    for call in (
        model.token_layout,
        lambda block: model.attention(images, block),
        lambda block: model.projections(images, block),
        lambda block: model.attention_maps(images, [0, block]),
        lambda block: model.attention_rollout(images, [block]),
        lambda block: model.trace(images, last=block),
    ):
        with pytest.raises(ValueError, match=rf"0\.\.{args['depth'] - 1}"):
            call(position)


@examples(40)
@given(model_args(), st.data())
def test_surgery_keeps_every_tensor(args, data):
    """The same weights in a model whose tokens are others, and enter elsewhere."""
    block = st.none() | st.integers(0, args["depth"] - 1)
    others = dict(
        cls_pos=data.draw(block), dist_pos=data.draw(block), reg_pos=data.draw(block) or 0,
        num_register_tokens=data.draw(st.integers(0, 5)),
    )  # fmt: skip
    here = tiny(**args)
    there = tiny(**args | others)
    given, before = here.state_dict(), {n: t + 1 for n, t in there.state_dict().items()}
    there.load_state_dict(before)
    report = load_weights(there, given)
    assert sorted(report.left_out) == sorted(given.keys() - before.keys())
    assert sorted(report.new) == sorted(before.keys() - given.keys())
    assert report.resampled == ["register_tokens"] * (
        0 < args["num_register_tokens"] != others["num_register_tokens"] > 0
    )
    assert sorted(report.loaded + report.resampled + report.new) == sorted(before)
    for name, tensor in there.state_dict().items():
        expected = given.get(name, before[name])
        if name in report.resampled:
            kept = min(args["num_register_tokens"], others["num_register_tokens"])
            expected = torch.cat([given[name][:, :kept], before[name][:, kept:]], dim=1)
        assert torch.equal(tensor, expected), name


@examples(15)
@given(model_args(), st.integers(1, 3))
@torch.no_grad()
def test_a_checkpoint_is_the_model(tmp_path, args, batch):
    model, file = tiny(**args), tmp_path / "model.pth"
    utils.save_checkpoint(file, {"model": model.state_dict(), "model_args": model.model_args})
    again = model_from_checkpoint(utils.load_checkpoint(file))
    assert again.model_args == model.model_args
    assert torch.equal(again(noise(model, batch)), model(noise(model, batch)))
