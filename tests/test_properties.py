"""Properties of random models and random command lines.

The examples are the same in each run, and few. To search longer, with new ones: PROPERTIES=50 pytest
tests/test_properties.py takes 50 times as many.
"""

import os
import socket
import sys
import tempfile
from argparse import ArgumentTypeError, BooleanOptionalAction
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import analyze_tokens
import cifar_main
import cifar_test
import cifar_train
import discover_objects
import main_distillation
import position_sweep
import utils
import visualize_attention
from checkpoints.files import load_checkpoint, save_checkpoint
from checkpoints.models import model_from_checkpoint
from checkpoints.weights import load_weights
from inspection import objects_pages
from inspection.attention import attention_rollout, projections, trace
from runs import STUDENT, TINY, noise, run, tiny
from test_models_dynamic import inputs_of_blocks
from training import scoring, setup

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
@given(model_args(), st.integers(-2, 7) | st.integers(), st.sampled_from(("cls_pos", "reg_pos", "dist_pos")))
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
        lambda block: projections(model, images, block),
        lambda block: model.attention_maps(images, [0, block]),
        lambda block: attention_rollout(model, images, [block]),
        lambda block: trace(model, images, last=block),
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
    save_checkpoint(file, {"model": model.state_dict(), "model_args": model.model_args})
    again = model_from_checkpoint(load_checkpoint(file))
    assert again.model_args == model.model_args
    assert torch.equal(again(noise(model, batch)), model(noise(model, batch)))


# Command lines ---------------------------------------------------------------------------------------------------

SCRIPTS = (
    cifar_main, main_distillation, position_sweep, cifar_test, visualize_attention, analyze_tokens, discover_objects,
)  # fmt: skip
HARMLESS = "0 1 2 3 8 64 0.1 0.5 none".split()
HOSTILE = [
    *"-1 -0 +2 1.5 1e999 -inf nan inf 1e9 1000000 1000000000 0x10 1_0 \u0663 None all , 1,2 9,9 3x4 0x0 8x".split(),
    *"1000000x8 - -- --- . .. ... a/b no/such/file.pth \u00e9\U0001f600 %s {} $HOME * resnet18 cls,reg cpu:7".split(),
    *["meta", "cuda:x", "", " ", "\t", "two words", "a\nb", "9" * 25, "x" * 200, "1" + "0" * 400, "x" * 300],
]
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=6)  # no path that leads elsewhere


def reached(*_, **__):
    sys.exit(0)


@cache
def flags_of(script):
    """The actions of the script's parser, without running the script."""

    def seen(parser, *_):
        raise LookupError(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.ArgumentParser, "parse_known_args", seen)
        with pytest.raises(LookupError) as error:
            script.main([])
    return error.value.args[0]._actions


def values(action):
    """Some that the parser takes for this flag."""
    mine = [str(choice) for choice in action.choices or ()]
    if action.default not in (None, "==SUPPRESS=="):
        mine += map(str, action.default if isinstance(action.default, list) else [action.default])
    return st.sampled_from(mine or [text for text in (*HARMLESS, "1,1", "cls,reg", "0/2") if taken(action, text)])


def taken(action, text):
    try:
        if action.type is not None:
            action.type(text)
    except (ArgumentTypeError, ValueError):
        return False
    return True


@st.composite
def flag(draw, script):
    """Words: a flag in one of its spellings, and its values, right or wrong, too many or too few."""
    action = draw(st.sampled_from(flags_of(script)))
    name = draw(st.sampled_from(action.option_strings))
    name = draw(st.sampled_from((name, name.replace("_", "-"))))
    if draw(st.integers(0, 3)):
        value, few = values(action), action.nargs if isinstance(action.nargs, int) else 1
        if isinstance(action, BooleanOptionalAction):
            few = 0
    else:
        value, few = (
            st.sampled_from(HOSTILE) | TEXT | st.integers().map(str) | st.floats().map(str),
            draw(st.integers(0, 3)),
        )
    words = [draw(value) for _ in range(few)]
    return [f"{name}={words[0]}"] if len(words) == 1 and draw(st.booleans()) else [name, *words]


@pytest.fixture
def right(trained):
    """Flags that each script can begin with."""
    looks = ["--model_path", str(trained / "model.pth"), "--device", "cpu"]
    return {
        cifar_main: [*TINY, "--data_set", "DIGITS"], main_distillation: STUDENT,
        position_sweep: [*TINY, "--data_set", "DIGITS", "--cls_pos", "0", "2"],
    } | dict.fromkeys(SCRIPTS[3:], looks)  # fmt: skip


@pytest.fixture
def contained(monkeypatch):
    """No network, no threads, no settings of torch for later tests, and the digits are read once."""

    def offline(*_):
        raise OSError("no network")

    def set_num_threads(count):
        assert 1 <= count <= 1024

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    monkeypatch.setattr(setup, "make_deterministic", lambda: None)


@pytest.fixture
def cheap(monkeypatch, contained):
    """Nothing is trained, measured or drawn: that step ends the script with status 0."""
    for where, name in (
        (cifar_train, "train_model"), (scoring, "evaluate"), (main_distillation, "run_epochs"),
        (main_distillation, "train_one_epoch"), (main_distillation, "score"), (position_sweep, "work"),
        (position_sweep, "submit"), (position_sweep, "with_workers"), (analyze_tokens, "TokenStatistics"),
        (visualize_attention, "write_viewer"),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, reached)
    monkeypatch.setattr(visualize_attention, "draw_page", lambda *_: None)
    monkeypatch.setattr(objects_pages, "draw_boxes_page", lambda *_: None)
    monkeypatch.setattr(position_sweep, "seconds_left", lambda *_: 0.0)
    for script, write in ((visualize_attention, "write_pages"), (discover_objects, "write_pdf")):
        monkeypatch.setattr(script, write, lambda pages, *_: reached(list(pages)))


def ends_well(script, argv, capsys, statuses=(0, 2)):
    """Run it in a new folder. Returns the status, and the files that are there then."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", "of another program"])
        work = Path(root, "work")
        work.mkdir()
        os.chdir(work)
        try:
            status, _, err = run(script.main, argv, capsys)
        finally:
            os.chdir(here)
        files = [str(file.relative_to(work)) for file in Path(root).rglob("*") if file.is_file()]
    assert status in statuses, (argv, status, err)
    if status:
        assert len(err.splitlines()) == 1, err
        assert err.startswith(f"{script.__name__}.py: error: ")
    return status, files


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_they_begin_with_is_right(script, right, cheap, capsys):
    """So that what follows is not refused for that."""
    assert ends_well(script, right[script], capsys) == (0, [])


@pytest.mark.parametrize("script", SCRIPTS)
@examples(35)
@given(data=st.data(), begun=st.booleans())
def test_a_random_command_line_ends_in_one_line(script, right, cheap, capsys, begun, data):
    more = data.draw(st.lists(flag(script), min_size=1, max_size=4))
    _, files = ends_well(script, [*right[script] * begun, *chain(*more)], capsys)
    assert not files


# What was found so, and mended; and sizes that would take the memory, which few random command lines ask for.
@pytest.mark.parametrize(
    ("script", "words"),
    [
        (cifar_main, "--embed_dim 1000000000 --num_heads 1"),
        (cifar_main, "--embed_dim 65536 --num_heads 1 --depth 1000"),
        (cifar_main, "--depth 1000000000"),
        (cifar_main, "--num_reg 1000000000"),
        (cifar_main, "--mlp_ratio 1e300"),
        (cifar_main, "--patch_size 1 --input_size 1000000"),
        (cifar_main, "--num_threads 1000000000"),
        (cifar_main, "--model_path ."),
        (cifar_main, "--model_path="),
        (cifar_main, "--model_path a/checkpoint.pth"),
        (main_distillation, "--num_reg 1000000000"),
        (position_sweep, "--num_reg 4 1000000000"),
        (visualize_attention, "--input_size 1000000000"),
        (visualize_attention, "--input_size 99999999999999999999999992"),
        (discover_objects, "--max_side 1000000000"),
    ],
)
def test_what_was_found(script, words, right, cheap, capsys):
    assert ends_well(script, [*right[script], *words.split()], capsys) == (2, [])


# What is not tried for real: other data and devices, processes, what takes seconds. (Its files stay in the new folder.)
NOT_FOR_REAL = {*"data_set data_path device compile num_workers viz_every throughput teacher_model".split()}


@pytest.mark.parametrize("script", [cifar_main, main_distillation])
@examples(5)
@given(data=st.data())
def test_flags_that_may_be_right_train_a_step(script, right, contained, monkeypatch, capsys, data):
    argv = [*right[script], "--max_steps", "1", "--batch_size", "8"]
    possible = [action for action in flags_of(script) if action.dest not in NOT_FOR_REAL and action.nargs != "?"]
    for action in data.draw(st.lists(st.sampled_from(possible), max_size=4)):
        none = action.nargs == 0 or isinstance(action, BooleanOptionalAction)
        argv += [data.draw(st.sampled_from(action.option_strings)), *([] if none else [data.draw(values(action))])]
    status, files = ends_well(script, argv, capsys)
    assert not [file for file in files if file.endswith(".tmp")]
    assert status or "--help" in argv or "-h" in argv or len(files) >= 2
