"""Models of timm's under the looking scripts: their own attention, and what they are refused for."""

import json
import re
from argparse import Namespace

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms.functional import to_pil_image

import visualize_attention
from images import picture
from inspection import foreign, inputs
from inspection.attention import (
    attention_maps,
    attention_rollout,
    attention_rows,
    blocks_of,
    set_fused_attention,
    trace,
)
from inspection.foreign import ForeignViT
from inspection.inputs import InputImage
from inspection.maps import image_maps
from runs import run, shell, tiny

# What each is made smaller by: (blocks, prefix [CLS | registers], queries of the pooling)
MODELS = {
    "vit_small_patch16_dinov3": dict(depth=2, img_size=64),
    "vit_small_patch14_reg4_dinov2": dict(depth=2, img_size=56),
    "vit_base_patch16_siglip_224": dict(depth=2, embed_dim=96),
    "eva02_tiny_patch14_224": dict(depth=2),
    "vit_base_patch16_clip_224": dict(depth=2, embed_dim=96),
    "deit3_small_patch16_224": dict(depth=2),
    "vit_pe_core_tiny_patch16_384": dict(depth=2, img_size=96),
    "beit_base_patch16_224": dict(depth=2, embed_dim=96),
    "vit_small_patch16_rope_224": dict(depth=2),
    "cait_xxs24_224": dict(depth=2),
}


def make(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **MODELS[name], **kwargs).eval()
    size = MODELS[name].get("img_size", model.pretrained_cfg["input_size"][1])
    return model, torch.randn(2, 3, size, size)


@torch.no_grad()
def unfused(model, images, monkeypatch) -> tuple:
    """(logits, every softmaxed attention in order) with timm's own explicit products."""
    seen, softmax = [], torch.Tensor.softmax

    def watched(scores, *args, **kwargs):
        seen.append(softmax(scores, *args, **kwargs))
        return seen[-1]

    set_fused_attention(model, False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", watched)
        logits = model(images)
    set_fused_attention(model, True)
    return logits, [attn for attn in seen if attn.dim() == 4]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_head_of_every_block_is_the_models_own(name, monkeypatch):
    model, images = make(name)
    logits, expected = unfused(model, images, monkeypatch)
    blocks = range(2, 4) if name.startswith("cait") else range(len(blocks_of(model)))
    expected = expected[-len(blocks) :]
    rows = attention_rows(model, images, blocks)
    assert list(rows) == list(blocks)
    for block, own in zip(blocks, expected):
        assert rows[block].shape == own.shape
        assert torch.allclose(rows[block], own, atol=1e-6)
    some = attention_rows(model, images, blocks, rows=[0])
    assert all(torch.allclose(some[block], rows[block][:, :, :1], atol=1e-6) for block in blocks)
    # Watching changes nothing: the same logits, and none of the hooks stays.
    before = model(images)
    assert torch.equal(trace(model, images, tokens=lambda i, x: None), before)
    assert torch.allclose(before, logits, atol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


LAYOUTS = {
    "vit_small_patch16_dinov3": "CLS 0 | registers 1..4 | patches 5..20 (21 tokens)",
    "vit_base_patch16_siglip_224": "patches 0..195 (196 tokens)",
    "deit3_small_patch16_224": "CLS 0 | patches 1..196 (197 tokens)",
    "cait_xxs24_224": "CLS 0 | patches 1..196 (197 tokens)",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    model, images = make(name)
    model = ForeignViT(model, name, images.shape[2:])
    assert (model.depth, str(model.token_layout(0))) == (2, LAYOUTS[name])
    assert model.cls_only == name.startswith("cait") and model.hidden == 2 * model.cls_only
    with pytest.raises(ValueError, match=r"its blocks are 0\.\.1"):
        model.token_layout(3)


def where_blocks_ran(model) -> list[str]:
    """A list to which every block adds the device of its tokens."""
    devices = []
    for block in blocks_of(model):
        block.register_forward_pre_hook(lambda _, args: devices.append(args[0].device.type))
    return devices


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_is_asked_for_its_shapes_without_computing(name):
    """Every block runs once, on the meta device, and the model is as it was."""
    model, images = make(name)
    before, devices = model(images), where_blocks_ran(model)
    ForeignViT(model, name, images.shape[2:])
    assert devices == ["meta"] * len(blocks_of(model))
    assert not any(x.is_meta for x in model.state_dict().values())
    assert torch.equal(model(images), before)


def test_a_model_that_reads_values_is_asked_with_a_black_image():
    model, images = make("deit3_small_patch16_224")
    expected, devices = ForeignViT(model, "deit3", 224).token_layout(1), where_blocks_ran(model)
    model.blocks[1].register_forward_pre_hook(lambda _, args: (args[0] * args[0].sum().sign().item(),))
    assert ForeignViT(model, "deit3", 224).token_layout(1) == expected
    assert devices == ["meta", "meta", "cpu", "cpu"]


@pytest.mark.parametrize(("classes", "runs"), [(0, 2), (5, 4)])
def test_what_nobody_asks_for_is_not_computed(classes, runs):
    """Without a head the pass for a picture ends after the last block that is drawn."""
    model = tiny(num_classes=classes)
    devices = where_blocks_ran(model)
    data = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": (16, 24), "classes": []}
    image = InputImage("photo", lambda: picture(size=(24, 16)))
    seen = image_maps(model, data, image, [0, 1], [], False)
    assert (len(devices), list(seen.maps), bool(seen.caption)) == (runs, [0, 1], bool(classes))


def test_the_distillation_token_is_no_register():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1).eval()
    layout = ForeignViT(model, "deit", 224).token_layout(0)
    assert (layout.cls, layout.dist, layout.registers) == (slice(0, 1), slice(1, 2), None)


@torch.no_grad()
def test_pooling_is_a_block_of_its_own():
    name = "vit_base_patch16_siglip_224"
    model, images = make(name)
    own = attention_rows(model, images, [2])[2]  # (B, H, 1, P)
    model = ForeignViT(model, name, 224)
    assert model.pool_pos == 2
    maps = attention_maps(model, images, [1, 2], patches=[(3, 1)])
    assert torch.equal(maps[2].pool, own[:, :, 0].unflatten(-1, (14, 14)))
    assert maps[2].cls is None and maps[2].patches is None and maps[1].pool is None
    rolled = attention_rollout(model, images, [1, 2])
    shares = attention_rollout(model, images, [1], patches=[(x, y) for y in range(14) for x in range(14)])[1].patches
    expected = own.mean(dim=1) @ shares[:, :, 0].flatten(2)  # (B, 1, P)
    assert torch.allclose(rolled[2].pool, expected.unflatten(-1, (14, 14)), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "blocks", "queries"), [("cait_xxs24_224", "01", 1), ("vit_base_patch16_siglip_224", "01", 196)]
)
def test_the_html_file_of_class_attention_and_of_pooling(name, blocks, queries, tmp_path, capsys, monkeypatch):
    """Only CLS has rows in CaiT's blocks; a pooling has one query, which stands before the patches."""
    monkeypatch.setattr(inputs, "create", lambda *_: make(name)[0])
    picture(size=(200, 160)).save(tmp_path / "photo.png")
    argv = ["--model_path", f"timm:{name}", "--image_path", tmp_path / "photo.png", "--format", "html"]
    status, _, err = run(visualize_attention.main, [*argv, "--output_dir", tmp_path], capsys)
    assert status == 0, err
    about = re.search('id="about">(.*)</script>', (tmp_path / "attention_photo.html").read_text())[1]
    (view,) = json.loads(about)["pictures"][0]["views"]
    rows = [(b, queries) for b in blocks] + [("2", 1)] * name.startswith("vit")
    assert [(block, of["queries"]) for block, of in view["attention"].items()] == rows
    if name.startswith("vit"):
        pooling = view["attention"]["2"]
        assert (pooling["places"], pooling["first"], pooling["tokens"]) == ({"pool": 0}, 1, 197)
    assert view["about"].startswith("photo.png, centre crop of 200 x 160") and view["grid"] == [14, 14]


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"])
def test_what_has_no_attention_over_all_patches_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"the attention of {name} cannot be seen"):
        ForeignViT(timm.create_model(name).eval(), name, 224)


def test_other_sizes():
    model, _ = make("vit_small_patch14_reg4_dinov2")
    wide = ForeignViT(model, "dinov2", 56).at_size((28, 70))
    assert wide.grid_size == (2, 5) and wide.model_args["img_size"] == (28, 70)
    assert model.patch_embed.grid_size == (4, 4)  # the model itself is as it was
    cait, _ = make("cait_xxs24_224")
    with pytest.raises(ValueError, match="cait cannot take images of 32 x 64 pixels"):
        ForeignViT(cait, "cait", 224).at_size((32, 64))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of a small ViT with registers of timm's, and a photo."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    model = timm.create_model("test_vit3", num_classes=0)
    torch.save(model.state_dict(), folder / "weights.pth")
    picture(size=(200, 160)).save(folder / "photo.png")
    return folder


def test_the_scripts(files, tmp_path):
    what = ["--model_path", "timm:test_vit3", "--weights", files / "weights.pth", "--image_path", files / "photo.png"]
    for name, *flags in (
        ("visualize_attention.py", "--layer_num", "all", "--pages", "heads", "tokens", "rollout"),
        ("visualize_attention.py", "--format", "html"),
        ("visualize_attention.py", "--compare", "timm:test_vit3", "timm:test_vit3"),
        ("analyze_tokens.py",),
        ("discover_objects.py",),
    ):
        given = what[2:] if "--compare" in flags else what  # one file of weights for both
        shell(name, *given, "--output_dir", ".", *flags, cwd=tmp_path)
    assert json.loads((tmp_path / "analysis.json").read_text())["model"]["args"]["timm_name"] == "timm:test_vit3"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_path", "timm:nonsense"], "timm has no model nonsense"),
        (["--model_path", "timm:resnet10t", "--weights", "W"], "--weights W"),
        (["--model_path", "timm:test_vit3", "--weights", "W", "--num_heads", "3"], "leave out --num_heads"),
        (["--model_path", "local-dir:nowhere"], "cannot get the weights of local-dir:nowhere"),
        (["--model_path", "W", "--weights", "W", "--num_heads", "3"], "--weights is for a model of timm's"),
        (
            ["--model_path", "timm:test_vit3", "--weights", "W", "--input_size", "100"],
            "100 x 100 pixels is not divisible",
        ),
    ],
)
def test_bad_input(files, tmp_path, flags, words):
    flags = [str(files / "weights.pth") if flag == "W" else flag for flag in flags]
    _, err = shell("visualize_attention.py", *flags, "--image_path", files / "photo.png", cwd=tmp_path, status=2)
    assert words.replace("W", str(files / "weights.pth")) in err and err.count("\n") == 1


def test_what_no_patch_covers_is_not_shown(monkeypatch):
    """As 6 of 384 pixels in patches of 14: timm leaves them out, and so do the page and the places of boxes."""
    config = {"input_size": (3, 30, 30), "mean": [0.5] * 3, "std": [0.5] * 3}
    model = VisionTransformer(img_size=30, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    model.pretrained_cfg = config
    monkeypatch.setattr(inputs, "create", lambda *_: model.eval())
    args = Namespace(weights=None, input_size=None, mean=None, std=None)
    adapted, data, _ = inputs.load("timm:own", args)
    assert adapted.grid_size == (3, 3) and data["covered"] == (24, 24)
    pixels = torch.randint(256, (3, 30, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image, shown = to_pil_image(pixels), InputImage("a", None)
    assert torch.equal(inputs.as_seen(image, shown, data), pixels[:, :24, :24])
    assert inputs.seen_part(60, 30, shown, data) == (15, 0, 39, 24)
    assert inputs.model_input([image], [shown], data).shape == (1, 3, 30, 30)  # the model gets all
    with pytest.raises(inputs.BadInput, match="30 x 30 pixels is not divisible into patches of 8 x 8"):
        inputs.load("timm:own", Namespace(weights=None, input_size=(30, 30), mean=None, std=None))


def test_without_a_network_the_error_comes_at_once(monkeypatch):
    def unknown(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(foreign.socket, "getaddrinfo", unknown)
    monkeypatch.setattr(foreign, "getproxies", dict)
    monkeypatch.setattr(foreign.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(foreign.BadInput, match=r"no network\); connect to the network, or give a file"):
        foreign.create("timm:test_vit3")
