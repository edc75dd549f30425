"""Registers that come and go, tokens that only read, class attention, the convolutional stem: against a slow model."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import analyze_tokens
import cifar_main
import visualize_attention
from checkpoints.files import load_checkpoint, save_checkpoint
from checkpoints.models import model_from_checkpoint
from models_dynamic import TokenLayout, set_fused_attention
from runs import TINY, noise, run, tiny
from test_properties import close, examples
from tokens.layout import blocks_with


@st.composite
def designs(draw):
    """Arguments of a small model whose tokens do anything that they may."""
    depth, heads, registers = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(0, 4))
    block = st.integers(0, depth - 1)
    starts = [draw(block) for _ in range(registers)]
    args = dict(
        img_size=(8, 12), patch_size=4, depth=depth, num_heads=heads, embed_dim=heads * 4, num_classes=3,
        cls_pos=draw(st.none() | block), dist_pos=draw(st.none() | block), num_register_tokens=registers,
        reg_pos=tuple(starts), reg_end=tuple(draw(st.integers(start + 1, depth)) for start in starts),
        cls_mode=draw(st.sampled_from(("token", "reader"))), reg_mode=draw(st.sampled_from(("token", "reader"))),
        class_attention=draw(st.integers(0, depth)), rope=draw(st.booleans()),
        stem=draw(st.sampled_from(("patch", "conv", "deep"))),
    )  # fmt: skip
    try:
        tiny(**args)
    except ValueError:  # see test_what_would_be_without_use
        assume(False)
    return args


def model_of(args):
    torch.manual_seed(0)
    return tiny(**args).double().eval()


def slow(model, images):
    """(logits, [attention of each block]), one token after another, with a mask, from the weights of the modules."""
    args, H = model.model_args, model.model_args["num_heads"]
    patches = model.patch_embed(images) + (0 if model.rope is not None else model.pos_embed)
    sequence = [("patch", p, x) for p, x in enumerate(patches.unbind(1))]
    attentions, depth = [], args["depth"]
    starts, ends = (
        blocks if isinstance(blocks, tuple) else (depth if blocks is None else blocks,) * args["num_register_tokens"]
        for blocks in (args["reg_pos"], args.get("reg_end"))
    )
    reads = {"cls": args.get("cls_mode") == "reader", "reg": args.get("reg_mode") == "reader", "patch": False}
    reads["dist"] = reads["cls"]
    for i, block in enumerate(model.blocks):
        for kind, entry in (("dist", args["dist_pos"]), ("cls", args["cls_pos"])):
            if entry == i:
                sequence.append((kind, 0, getattr(model, f"{kind}_token")[:, 0].expand(len(images), -1)))
        entered = [n for n, start in enumerate(starts) if start == i]
        sequence += [("reg", n, model.register_tokens[:, n].expand(len(images), -1)) for n in entered]
        sequence = [(kind, n, x) for kind, n, x in sequence if kind != "reg" or ends[n] > i]
        sequence.sort(key=lambda token: (("cls", "dist", "patch", "reg").index(token[0]), token[1]))
        kinds, x = [kind for kind, _, _ in sequence], torch.stack([x for _, _, x in sequence], dim=1)
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, H, -1)).permute(2, 0, 3, 1, 4)
        if model.rope is not None:
            sines, cosines = model.rope.get_embed().double().chunk(2, dim=-1)
            at = [i for i, kind in enumerate(kinds) if kind == "patch"]
            q, k = q.clone(), k.clone()
            for y in (q, k):
                a, b = y[:, :, at].chunk(2, dim=-1)
                y[:, :, at] = y[:, :, at] * cosines + torch.cat([-b, a], dim=-1) * sines
        seen = torch.tensor([[reads[a] or not reads[b] for b in kinds] for a in kinds])
        attn = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        y = x + block.attn.proj((attn @ v).transpose(1, 2).flatten(2))
        y = y + block.mlp(block.norm2(y))
        fixed = torch.tensor([kind in ("patch", "reg") for kind in kinds]) if i >= depth - model_k(args) else None
        attentions.append(attn if fixed is None else attn[:, :, ~fixed])
        y = y if fixed is None else torch.where(fixed[:, None], x, y)
        sequence = [(kind, n, new) for (kind, n, _), new in zip(sequence, y.unbind(1))]
    last = {kind: model.norm(torch.stack([x for k, _, x in sequence if k == kind])) for kind in kinds}
    logits = model.head(last["cls"][0] if "cls" in last else last["patch"].mean(0))
    return (logits + model.head_dist(last["dist"][0])) / 2 if "dist" in last else logits, attentions


def model_k(args):
    return args.get("class_attention", 0)


@examples(30)
@given(designs())
def test_it_is_the_slow_model(args):
    model = model_of(args)
    images = noise(model).double()
    logits, attentions = slow(model, images)
    assert close(model(images), logits)
    assert close(model.forward_head(model.forward_features(images)), logits)
    for block, attention in enumerate(attentions):
        assert close(model.attention(images, block), attention), block
        maps, layout = model.attention_maps(images, [block], patches=[(1, 1)])[block], model.token_layout(block)
        rows = attention[..., layout.patches].unflatten(-1, model.grid_size).transpose(1, 2)
        assert maps.cls is None if layout.cls is None else close(maps.cls, rows[:, layout.cls.start])
        if layout.registers is None or layout.queries is not None:
            assert maps.registers is None and maps.numbers == ()
        else:
            assert close(maps.registers, rows[:, layout.registers]) and maps.numbers == layout.numbers


@examples(20)
@given(designs())
def test_every_parameter_learns_and_the_short_last_block_is_the_whole_one(args):
    model = model_of(args).train()
    images = noise(model).double()
    parameters = list(model.parameters())
    found = model(images)
    whole = model.forward_head(model.forward_features(images))
    found, whole = (sum(y.square().sum() for y in (ys if isinstance(ys, tuple) else (ys,))) for ys in (found, whole))
    for name, a, b in zip(
        dict(model.named_parameters()), *(torch.autograd.grad(y, parameters) for y in (found, whole)), strict=True
    ):
        assert close(a, b), name
        assert a.abs().sum() > 0, name


@examples(20)
@given(designs())
@torch.no_grad()
def test_flops_layouts_and_files(tmp_path_factory, args):
    model = tiny(**args).eval()
    set_fused_attention(model, False)
    with FlopCounterMode(display=False) as counter:
        logits = model(noise(model, 3))
    assert counter.get_total_flops() == 3 * model.forward_flops()
    set_fused_attention(model, True)
    assert torch.allclose(model(noise(model, 3)), logits, atol=1e-5)
    for n, (start, end) in enumerate(zip(args["reg_pos"], args["reg_end"])):
        assert blocks_with(model, f"reg{n}") == list(range(start, end))
    file = tmp_path_factory.mktemp("design") / "m.pth"
    save_checkpoint(file, {"model": model.state_dict(), "model_args": model.model_args})
    again = model_from_checkpoint(load_checkpoint(file))
    assert again.model_args == model.model_args and torch.equal(again(noise(model)), model(noise(model)))


@torch.no_grad()
def test_what_patches_hold_does_not_depend_on_readers():
    """Bit for bit, wherever CLS enters, and whether there are readers at all."""
    without = tiny(depth=5, cls_pos=None, num_register_tokens=0).eval()
    patches = without.forward_features(noise(without))
    for registers in (0, 2):
        for cls_pos in range(5):
            model = tiny(
                depth=5, cls_pos=cls_pos, cls_mode="reader", reg_mode="reader", num_register_tokens=registers
            ).eval()
            model.load_state_dict(without.state_dict(), strict=False)
            assert torch.equal(model.forward_features(noise(model))[:, model.token_layout(4).patches], patches)
    ordinary = tiny(depth=5, num_register_tokens=0).eval()
    ordinary.load_state_dict(without.state_dict(), strict=False)
    assert not torch.equal(ordinary.forward_features(noise(ordinary))[:, 1:], patches)


def test_layout_of_registers_that_come_and_go():
    model = tiny(depth=4, cls_pos=1, num_register_tokens=3, reg_pos=(0, 2, 1), reg_end=(2, 4, 3), class_attention=1)
    patches = [slice(0, 24), slice(1, 25)]
    one, three = slice(0, 1), TokenLayout(slice(0, 1), patches[1], slice(25, 26), 26, numbers=(1,), queries=1)
    assert [model.token_layout(i) for i in range(4)] == [
        TokenLayout(None, patches[0], slice(24, 25), 25, numbers=(0,)),
        TokenLayout(one, patches[1], slice(25, 27), 27, numbers=(0, 2)),
        TokenLayout(one, patches[1], slice(25, 27), 27, numbers=(1, 2)),
        three,
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"reg_pos": (0, 1)}, "reg_pos has 2 blocks for 4 registers"),
        ({"reg_pos": 2, "reg_end": 2}, r"enters at block 2 leaves at 3\.\.4, not at 2"),
        ({"reg_end": (4, 4, 5, 4)}, r"leaves at 1\.\.4, not at 5"),
        ({"cls_mode": "blind"}, "'blind' is none of token, reader"),
        ({"reg_mode": "reader"}, "seen by nobody but"),
        ({"reg_mode": "reader", "cls_mode": "reader", "cls_pos": 3, "reg_end": (4, 4, 3, 4)}, "seen by nobody but"),
        ({"cls_mode": "reader", "cls_pos": None}, "need a class token that is classified"),
        ({"class_attention": 2, "global_pool": "avg"}, "need a class token that is classified"),
        ({"class_attention": 5}, "class_attention is 5, but the model has 4 blocks"),
        ({"class_attention": 2, "cls_pos": 3}, "begins at block 2, before the token of block 3 enters"),
        ({"stem": "pool"}, "'pool' is none of patch, conv, deep"),
        ({"stem": "conv", "patch_size": 1}, "square patches of 2, 4, 8"),
        ({"stem": "conv", "patch_size": (4, 2)}, "square patches of 2, 4, 8"),
    ],
)
def test_what_would_be_without_use(args, words):
    with pytest.raises(ValueError, match=words):
        tiny(**{"depth": 4, "num_register_tokens": 4} | args)


DESIGNS = {
    "come and go": dict(reg_pos=(0, 2, 1, 0), reg_end=(2, 4, 3, 4)),
    "readers": dict(cls_mode="reader", reg_mode="reader", cls_pos=1),
    "class attention": dict(cls_pos=2, class_attention=2, stem="conv"),
}


@pytest.mark.parametrize("args", DESIGNS.values(), ids=DESIGNS)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_exported_and_scripted_it_takes_any_batch(args):
    model = tiny(**args).eval()
    exported = torch.export.export(model, (noise(model),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for other in (exported, torch.jit.script(model), torch.fx.symbolic_trace(model)):
        images = noise(model, 5)
        assert torch.allclose(other(images), model(images), atol=1e-5)


def test_checkpointed_gradients_are_the_same():
    for args in DESIGNS.values():
        model = tiny(**args)
        grads = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            grads.append(torch.autograd.grad(model(noise(model)).square().sum(), list(model.parameters())))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_a_run_of_the_scripts(tmp_path, capsys):
    """Trained, resumed, tested, drawn and analysed: what is absent is said to be, and nothing else is drawn."""
    model = tmp_path / "m.pth"
    argv = [*TINY, *"--data_set DIGITS --repeats 0.2 --depth 4 --num_reg 3 --reg_pos 0 1 2 --reg_end 2 3 4".split()]
    argv += [*"--cls_pos 1 --cls_mode reader --class_attention 1 --stem conv --opt nmuon --model_path".split(), model]
    for more in (["--epochs", 1], ["--epochs", 2, "--resume"]):
        status, out, err = run(cifar_main.main, [*argv, *more], capsys)
        assert status == 0, err
    assert "3 registers at block 0 1 2, leaving at 2 3 4, CLS only read, class attention in the last 1" in out
    draw = ["--model_path", model, "--output_dir", tmp_path, "--layer_num", "all", "--format", "png"]
    status, out, err = run(visualize_attention.main, [*draw, "--pages", "heads", "rollout", "class"], capsys)
    assert status == 0, err
    drawn = {file.stem.partition("_block")[2] for file in tmp_path.glob("*_block[0-9]_*.png")}
    assert drawn == {"0_reg0", "1_reg0", "1_reg1", "1_cls", "2_reg1", "2_reg2", "2_cls", "3_cls"}
    for layer, token, words in ((3, "reg", "class attention is of CLS alone"), (0, "cls", "only enters at block 1")):
        argv = [*draw, "--layer_num", layer, "--tokens", token]
        status, _, err = run(visualize_attention.main, argv, capsys)
        assert status == 2 and words in err
    what = ["--num_images", 60, "--what", *analyze_tokens.STATISTICS, *analyze_tokens.PARTS, "--ablate", "registers"]
    what.remove("dense") if "dense" in what else None
    status, out, err = run(analyze_tokens.main, ["--model_path", model, "--output_dir", tmp_path, *what], capsys)
    assert status == 0 and "linear:" in out, err


@pytest.mark.parametrize(("stem", "strides"), [("patch", [4]), ("conv", [2, 2, 1]), ("deep", [2, 1, 1, 2, 1, 1, 1])])
def test_the_convolutions_of_a_stem(stem, strides):
    """The last one is the projection; the widths double up to the model's, 24."""
    model = tiny(stem=stem)
    convs = [module for module in model.patch_embed.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [conv.stride[0] for conv in convs] == strides
    assert [conv.out_channels for conv in convs] == [12] * (len(strides) // 2) + [24] * (len(strides) // 2 + 1)
    assert model.patch_embed(noise(model)).shape == (2, 24, 24)
