"""What people do with timm's Vision Transformer works here: adapters, hooks, quantization, export, timm's own calls.

Expected values come from timm's models with the same weights where timm has such a model (`TWINS`), else from this
model's plain forward pass.
"""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import AttentionExtract
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from checkpoints.models import at_size
from checkpoints.weights import load_weights
from inspection.attention import attention_rows
from models_dynamic import DynamicViT, set_fused_attention
from runs import noise, tiny

LAYOUTS = {
    "late": dict(cls_pos=2, reg_pos=1, num_register_tokens=2),
    "none": dict(cls_pos=None, reg_pos=2, num_register_tokens=2),
    "distillation": dict(cls_pos=1, dist_pos=2, reg_pos=3, num_register_tokens=2),
    "bare": dict(cls_pos=1, num_register_tokens=0),
    "modern": dict(cls_pos=2, reg_pos=1, num_register_tokens=2, qk_norm=True, rope=True, swiglu=True),
}
# A model of timm's, and what makes a DynamicViT the same one.
VIT, DEIT = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
TWINS = {
    "registers": (VIT, dict(reg_tokens=2), dict(num_register_tokens=2)),
    "none": (
        VIT, dict(reg_tokens=2, class_token=False, global_pool="avg", fc_norm=False),
        dict(num_register_tokens=2, cls_pos=None),
    ),
    "distillation": (DEIT, {}, dict(num_register_tokens=0, dist_pos=0)),
    "bare": (VIT, {}, dict(num_register_tokens=0)),
    "qk_norm": (VIT, dict(qk_norm=True, init_values=0.5), dict(num_register_tokens=0, qk_norm=True, init_values=0.5)),
    "fc_norm": (VIT, dict(global_pool="avg"), dict(num_register_tokens=0, global_pool="avg", fc_norm=True)),
}  # fmt: skip
OF_LAST_BLOCK = ("blocks.3", "blocks.3.norm1", "blocks.3.attn", "blocks.3.attn.qkv", "blocks.3.mlp")

layouts = pytest.mark.parametrize("kind", LAYOUTS)
twins = pytest.mark.parametrize("kind", TWINS)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit, torch.ao and the older ONNX exporter
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def twin(kind):
    """(model of timm's, DynamicViT with the same weights, images), in double precision."""
    name, theirs, ours = TWINS[kind]
    args = dict(img_size=(16, 24), patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=5)
    if name == VIT:
        theirs = dict(no_embed_class=True) | theirs
    model = randomised(timm.create_model(name, **args, **theirs))
    own = DynamicViT(**args, **ours)
    report = load_weights(own, model.state_dict())
    assert not (report.new or report.left_out or report.resampled)
    return model.double(), own.double().eval(), images_of().double()


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def images_of(batch=2):
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def to_our_order(x, model, *dims):
    """Registers after the patches rather than in front of them, as rows of `x` along `dims`."""
    registers = model.num_register_tokens
    first = model.num_prefix_tokens
    for dim in dims:
        cls, moved, patches = x.split([first, registers, x.shape[dim] - first - registers], dim)
        x = torch.cat([cls, patches, moved], dim)
    return x


def softmaxes(model, images):
    """The attention of every block, (B, H, N, N), as the model's own unfused attention has it."""
    model, seen = copy.deepcopy(model), []
    set_fused_attention(model, False)
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        model(images)
    return seen


def near(found, expected, tolerance=1e-5):
    """Equal to `tolerance`, as a share of the largest value where that is above 1."""
    assert found.shape == expected.shape
    return (found - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def logits_and_gradients(model, images):
    """Logits (with a distillation token those of both heads), {name: gradient}."""
    model.zero_grad()
    logits = model(images)
    logits = torch.cat(logits) if isinstance(logits, tuple) else logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@twins
@pytest.mark.parametrize("hooked", [False, True])
def test_training_equals_timm_with_and_without_hooks(kind, hooked):
    theirs, ours, images = twin(kind)
    if kind == "distillation":
        theirs.set_distilled_training()
    with FlopCounterMode(display=False) as whole:
        expected, gradients = logits_and_gradients(theirs.train(), images)
    if hooked:
        ours.blocks[-1].mlp.register_forward_hook(lambda *_: None)
    with FlopCounterMode(display=False) as counter:
        found, own = logits_and_gradients(ours.train(), images)
    # The shortcut of the last block is there until somebody looks. Where all patches are classified, it saves less.
    saved = whole.get_total_flops() - counter.get_total_flops()
    assert saved == 0 if hooked else saved > 0 or kind == "fc_norm"
    assert near(found, expected)
    gradients = {n.replace("reg_token", "register_tokens"): gradient for n, gradient in gradients.items()}
    gradients["pos_embed"] = gradients["pos_embed"][:, -24:]  # timm's DeiT has positions for its tokens, too
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        assert near(gradient, gradients[name]), name


# Adapters, quantization, hooks -------------------------------------------------------------------------------------


def with_lora(model):
    torch.manual_seed(3)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["qkv", "proj", "fc1"], init_lora_weights=False)
    return get_peft_model(model, config)


@twins
def test_adapters_equal_those_of_timm(kind):
    theirs, ours, images = twin(kind)
    theirs, ours = with_lora(theirs), with_lora(ours)
    adapters = {n: t for n, t in theirs.state_dict().items() if "lora_" in n}
    assert len(adapters) == 2 * (3 * 4 + 1)  # proj is in each block and in the patch embedding
    ours.load_state_dict(adapters, strict=False)
    expected, gradients = logits_and_gradients(theirs, images)
    found, own = logits_and_gradients(ours, images)
    assert near(found, expected)
    assert own.keys() == gradients.keys() == adapters.keys()
    for name, gradient in own.items():
        assert gradient.abs().max() > 0, name
        assert near(gradient, gradients[name]), name
    found = attention_rows(ours.get_base_model(), images, range(4))
    for i, attention in enumerate(softmaxes(theirs.get_base_model(), images)):
        assert near(found[i], to_our_order(attention, ours.get_base_model(), 2, 3))


@layouts
def test_adapters_are_the_same_merged_into_the_weights(kind):
    adapted = with_lora(tiny(**LAYOUTS[kind] | dict(drop_path_rate=0.0)))
    images = images_of()
    with torch.no_grad():
        plain, found = tiny(**LAYOUTS[kind])(images), adapted(images)
        rows = attention_rows(adapted.get_base_model(), images, range(4))
        merged = adapted.merge_and_unload()
        assert near(found, merged(images))
    assert not near(found, plain, 1e-2)
    for i, attention in attention_rows(merged, images, range(4)).items():
        assert near(rows[i], attention, 1e-4)


def quantized(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@twins
@torch.no_grad()
def test_quantized_it_is_timms_quantized(kind):
    theirs, ours, images = (part.float() for part in twin(kind))
    expected = quantized(theirs)(images)
    own = quantized(ours)
    assert isinstance(own.blocks[-1].attn.qkv, torch.ao.nn.quantized.dynamic.Linear)
    # The range of a layer's input is that of all rows, so that without the shortcut it is the same to rounding.
    spread = (expected - theirs(images)).abs().max()
    assert (own(images) - expected).abs().max() < 2 * spread
    own.blocks[-1].register_forward_hook(lambda *_: None)
    assert (own(images) - expected).abs().max() < spread / 10


@layouts
@pytest.mark.parametrize("name", OF_LAST_BLOCK)
def test_hooks_of_the_last_block_see_all_rows(kind, name):
    model = tiny(**LAYOUTS[kind])
    images = images_of()
    expected, module, seen = model(images), model.get_submodule(name), []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(("input", args[0]))),
        module.register_forward_hook(lambda _, args, output: seen.append(("output", output))),
        module.register_full_backward_hook(lambda _, wanted, given: seen.append(("gradient", given[0]))),
    ]
    logits = model(images)
    logits.square().sum().backward()
    assert [what for what, _ in seen] == ["input", "output", "gradient"]  # once each
    shape, width = (2, model.token_layout(3).length), 72 if name.endswith("qkv") else 24
    assert [tuple(x.shape) for _, x in seen] == [(*shape, 24), (*shape, width), (*shape, width)]
    assert near(logits, expected)
    if name == "blocks.3":
        assert torch.equal(model.norm(seen[1][1]), model.forward_features(images))
    for handle in handles:
        handle.remove()
    seen.clear()
    model(images)
    assert not seen


def grad_cam(model, images, patches):
    """(B, P): Grad-CAM (arXiv 1610.02391) of class 1 on the output of the last block."""
    seen = {}
    handles = [
        model.blocks[-1].register_forward_hook(lambda _, args, output: seen.update(activations=output)),
        model.blocks[-1].register_full_backward_hook(lambda _, wanted, given: seen.update(gradients=given[0])),
    ]
    model(images)[:, 1].sum().backward()
    for handle in handles:
        handle.remove()
    activations, gradients = seen["activations"][:, patches], seen["gradients"][:, patches]
    return (activations * gradients.mean(dim=1, keepdim=True)).sum(dim=-1).relu().detach()


@twins
def test_grad_cam_equals_that_of_timm(kind):
    theirs, ours, images = twin(kind)
    patches = slice(theirs.num_prefix_tokens, None)
    expected = grad_cam(theirs, images, patches)
    found = grad_cam(ours, images, ours.token_layout(3).patches)
    assert near(found, expected)
    # With a class token no gradient reaches the patches of the last block, here as in timm.
    assert (expected.abs().max() > 0) == (ours.global_pool == "avg")


# Tracing, export, compilation --------------------------------------------------------------------------------------


def check_batches(run, model, batches=(1, 2, 5)):
    with torch.no_grad():
        for batch in batches:
            assert near(run(images_of(batch)), model(images_of(batch)))


@layouts
def test_exported_with_a_dynamic_batch(kind):
    model = tiny(**LAYOUTS[kind])
    program = torch.export.export(model, (images_of(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    check_batches(program.module(), model)


@layouts
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_with_a_dynamic_batch(kind, dynamo, tmp_path):
    model, file = tiny(**LAYOUTS[kind]), tmp_path / "model.onnx"
    batch = dict(dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}})
    if dynamo:
        batch = dict(dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False)
    names = dict(input_names=["images"], output_names=["logits"])
    torch.onnx.export(model, (images_of(3),), file, dynamo=dynamo, **names, **batch)
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    check_batches(lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), model)


@layouts
def test_torchscript(kind):
    model = tiny(**LAYOUTS[kind])
    check_batches(torch.jit.trace(model, images_of(3)), model)
    check_batches(torch.jit.script(model), model)


@layouts
def test_torch_fx_and_compile(kind):
    model = tiny(**LAYOUTS[kind])
    check_batches(torch.fx.symbolic_trace(model), model)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    check_batches(compiled, model, (2, 5))  # one image takes another compilation


@layouts
@torch.no_grad()
def test_extracted_features_are_of_all_tokens(kind):
    model = tiny(**LAYOUTS[kind])
    images, seen = images_of(), {}
    extractor = create_feature_extractor(model, {f"blocks.{i}": str(i) for i in range(4)} | {"head": "logits"})
    features = extractor(images)
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, args, output, i=i: seen.update({str(i): output}))
    expected = model(images)
    for i in range(4):
        assert features[str(i)].shape == (2, model.token_layout(i).length, 24)
        assert near(features[str(i)], seen[str(i)])
    assert near(features["logits"], expected if kind != "distillation" else model.head(model.norm(seen["3"])[:, 0]))


@layouts
@pytest.mark.parametrize("method", ["fx", "hook"])
@torch.no_grad()
def test_timms_attention_extract(kind, method):
    model, images = tiny(**LAYOUTS[kind]).double(), images_of().double()
    expected = [model.attention(images, i) for i in range(4)]
    set_fused_attention(model, False)
    maps = AttentionExtract(model, method=method)(images)
    assert len(maps) == 4
    for found, attention in zip(maps.values(), expected):
        assert near(found, attention, 1e-6)


# timm's calls ------------------------------------------------------------------------------------------------------

NAME = "dynamic_vit_cifar"


def registered(kind, **kwargs):
    args = {name: "none" if value is None else value for name, value in LAYOUTS[kind].items()}
    return randomised(timm.create_model(NAME, depth=4, embed_dim=24, num_heads=3, **args, **kwargs))


@layouts
def test_pretrained_cfg_names_the_layers(kind):
    model = registered(kind)
    cfg = model.pretrained_cfg
    assert cfg is model.default_cfg
    heads = ("head", "head_dist") if kind == "distillation" else ("head",)
    classifier = cfg["classifier"]
    assert ((classifier,) if isinstance(classifier, str) else classifier) == heads
    assert all(isinstance(model.get_submodule(head), torch.nn.Linear) for head in heads)
    assert isinstance(model.get_submodule(cfg["first_conv"]), torch.nn.Conv2d)
    assert (cfg["input_size"], cfg["num_classes"], cfg["architecture"]) == ((3, 32, 32), 10, NAME)


@twins
@torch.no_grad()
def test_features_head_and_classifier_as_in_timm(kind):
    theirs, ours, images = twin(kind)
    found, expected = ours.forward_features(images), theirs.forward_features(images)
    assert near(found, to_our_order(expected, ours, 1))
    assert near(ours.forward_head(found), theirs(images))
    assert torch.equal(ours.forward_head(found), ours.forward_head(ours.forward_features(images)))
    if kind != "distillation":  # timm's DeiT gives the mean of both tokens there
        assert near(ours.forward_head(found, pre_logits=True), theirs.forward_head(expected, pre_logits=True))
    for model in (theirs, ours):
        model.reset_classifier(7)
        assert (model.num_classes, model(images).shape) == (7, (2, 7))
        assert model.get_submodule("head").out_features == 7
    assert DynamicViT(**ours.model_args).num_classes == 7
    for model in (theirs, ours):
        model.reset_classifier(0)
    if kind != "distillation":
        assert near(ours(images), theirs(images))
        theirs.reset_classifier(0, "")
        ours.reset_classifier(0, "")
        assert near(ours(images), to_our_order(theirs(images), ours, 1))


def test_both_heads_are_reset():
    model = tiny(**LAYOUTS["distillation"]).train()
    model.reset_classifier(7)
    assert [logits.shape for logits in model(images_of())] == [(2, 7), (2, 7)]
    model.reset_classifier(0)
    assert [tokens.shape for tokens in model(images_of())] == [(2, 24), (2, 24)]


ASKED = {
    "all": {},
    "last two, normalised": dict(indices=2, norm=True),
    "chosen": dict(indices=[0, 2], output_fmt="NLC"),
    "early": dict(indices=[1], stop_early=True, intermediates_only=True),
    "tokens": dict(indices=[-1, 1], return_prefix_tokens=True),
    "tokens alone": dict(indices=[1], return_prefix_tokens=True, intermediates_only=True, norm=True),
    "dictionary": dict(output_dict=True),
    "dictionary with tokens": dict(output_dict=True, return_prefix_tokens=True, output_fmt="NLC"),
    "dictionary of some": dict(output_dict=True, intermediates_only=True, indices=[2]),
}


def same(found, expected, model):
    """Equal parts, of which (B, N, D) of all tokens are in this project's order."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return all(same(found[key], expected[key], model) for key in expected)
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        return all(same(a, b, model) for a, b in zip(found, expected))
    if expected.shape[1] == model.token_layout(3).length:
        expected = to_our_order(expected, model, 1)
    return near(found, expected)


@twins
@pytest.mark.parametrize("asked", ASKED)
@torch.no_grad()
def test_intermediates_are_those_of_timm(kind, asked):
    theirs, ours, images = twin(kind)
    asked = ASKED[asked]
    expected, found = (model.forward_intermediates(images, **asked) for model in (theirs, ours))
    assert same(found, expected, ours)


@twins
@torch.no_grad()
def test_intermediate_layers_are_those_of_timm(kind):
    theirs, ours, images = twin(kind)
    for asked in (dict(n=2), dict(n=[0, 3], reshape=True, norm=True), dict(n=1, return_prefix_tokens=True)):
        expected, found = (model.get_intermediate_layers(images, **asked) for model in (theirs, ours))
        assert same(found, expected, ours)


@layouts
@torch.no_grad()
def test_intermediates_of_tokens_that_enter_late(kind):
    model = tiny(**LAYOUTS[kind])
    last, found = model.forward_intermediates(images_of(), output_fmt="NLC", return_prefix_tokens=True)
    assert torch.equal(last, model.forward_features(images_of()))
    for i, (patches, others) in enumerate(found):
        layout = model.token_layout(i)
        assert (patches.shape, others.shape) == ((2, 24, 24), (2, layout.length - 24, 24))
    whole = torch.cat([others[:, : layout.patches.start], patches, others[:, layout.patches.start :]], dim=1)
    assert near(model.norm(whole), last)
    for wrong in (dict(output_fmt="NHWC"), dict(attn_mask=torch.ones(1))):
        with pytest.raises(ValueError, match="NCHW and NLC"):
            model.forward_intermediates(images_of(), **wrong)


@layouts
@torch.no_grad()
def test_features_only(kind):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model, features = registered(kind), registered(kind, features_only=True, out_indices=(1, 3))
    features.load_state_dict({f"model.{n}": t for n, t in model.state_dict().items()}, strict=False)
    expected = model.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    assert (features.feature_info.channels(), features.feature_info.reduction()) == ([24, 24], [4, 4])
    for found, wanted in zip(features(images), expected):
        assert found.shape == (2, 24, 8, 8) and torch.equal(found, wanted)


@layouts
@torch.no_grad()
def test_set_input_size_makes_the_model_of_that_size(kind):
    model = tiny(**LAYOUTS[kind])
    other = DynamicViT(**model.model_args | {"img_size": (32, 16)}).eval()
    load_weights(other, {"model": model.state_dict(), "model_args": model.model_args})
    model_at_size = copy.deepcopy(model)
    model_at_size.set_input_size((32, 16))
    images = torch.randn(2, 3, 32, 16)
    assert model_at_size.grid_size == (8, 4) and model_at_size.model_args == other.model_args
    assert model_at_size.state_dict().keys() == other.state_dict().keys()
    assert torch.equal(model_at_size(images), other(images))
    assert torch.equal(at_size(model, (32, 16))(images), other(images))
    assert torch.equal(model_at_size.attention(images, 3), other.attention(images, 3))
    again = DynamicViT(**model_at_size.model_args)
    again.load_state_dict(model_at_size.state_dict())
    assert torch.equal(again.eval()(images), model_at_size(images))
    with pytest.raises(ValueError, match="not divisible into patches"):
        model.set_input_size(30)
    assert torch.equal(model(images_of()), tiny(**LAYOUTS[kind])(images_of()))


@torch.no_grad()
def test_set_input_size_resamples_as_timm_does():
    theirs, ours, _ = twin("registers")
    images = torch.randn(2, 3, 32, 16).double()
    for model in (theirs, ours):
        model.set_input_size(img_size=(32, 16))
    assert near(ours(images), theirs(images))
    assert ours.pos_embed.requires_grad


def test_layouts_print_well():
    printed = {kind: str(tiny(**args).token_layout(3)) for kind, args in LAYOUTS.items()}
    assert printed["late"] == printed["modern"] == "CLS 0 | patches 1..24 | registers 25..26 (27 tokens)"
    assert printed["none"] == "patches 0..23 | registers 24..25 (26 tokens)"
    assert printed["distillation"] == "CLS 0 | distillation 1 | patches 2..25 | registers 26..27 (28 tokens)"
    assert printed["bare"] == "CLS 0 | patches 1..24 (25 tokens)"
    assert str(tiny(**LAYOUTS["late"]).token_layout(0)) == "patches 0..23 (24 tokens)"


def test_names_of_weights_are_those_of_the_reference_implementation():
    names = {n for n in tiny(**LAYOUTS["distillation"], init_values=0.1).state_dict() if not n.startswith("blocks.")}
    assert names == {
        "cls_token", "dist_token", "register_tokens", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "norm.weight", "norm.bias", "head.weight", "head.bias", "head_dist.weight", "head_dist.bias",
    }  # fmt: skip
    names = {n.removeprefix("blocks.0.") for n in tiny(init_values=0.1).state_dict() if n.startswith("blocks.0.")}
    assert names == {f"{layer}.{kind}" for kind in ("weight", "bias") for layer in (
        "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"
    )} | {"ls1.gamma", "ls2.gamma"}  # fmt: skip


# Ingredients of newer models ---------------------------------------------------------------------------------------


def eva_twin(ours=None, **kwargs):
    """(timm's small DINOv3 in little, DynamicViT with the same weights), in double precision."""
    args = dict(img_size=64, embed_dim=24, depth=3, num_heads=3, num_classes=5, mlp_ratio=2.0)
    theirs = randomised(timm.create_model("vit_small_patch16_dinov3", **args, **kwargs))
    own = DynamicViT(
        **args, rope=True, norm_eps=1e-5, init_values=1e-5, qkv_bias=False, num_register_tokens=4, **(ours or {})
    )
    names = {"reg_token": "register_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    for name, weights in list(theirs.state_dict().items()):
        for their_name, our_name in names.items():
            name = name.replace(their_name, our_name)
        own.state_dict()[name].copy_(weights)
    return theirs.double(), own.double().eval()


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("pool", ["avg", "token"])
@torch.no_grad()
def test_equals_timms_dinov3(pool, swiglu):
    more = dict(swiglu_mlp=True, swiglu_align_to=8) if swiglu else {}
    theirs, ours = eva_twin(dict(global_pool=pool, swiglu=swiglu), global_pool=pool, **more)
    images = torch.randn(2, 3, 64, 64).double()
    assert near(ours(images), theirs(images))
    found, seen = attention_rows(ours, images, range(3)), attention_rows(theirs, images, range(3))
    for i, expected in enumerate(softmaxes(theirs, images)):
        assert near(seen[i], expected, 1e-6)
        assert near(found[i], to_our_order(expected, ours, 2, 3), 1e-6)


@torch.no_grad()
def test_rotary_positions_at_another_size_are_timms():
    theirs, ours = eva_twin(dict(global_pool="token"), global_pool="token")
    ours.set_input_size((32, 96))
    images = torch.randn(2, 3, 32, 96).double()
    assert near(ours(images), theirs(images))


@torch.no_grad()
def test_rotary_positions_leave_the_tokens_alone():
    """A token that enters late attends with its plain queries and keys: those of the patches alone are rotated."""
    model = tiny(**LAYOUTS["modern"])
    layout, attn, images = model.token_layout(3), model.blocks[3].attn, images_of()
    seen = []
    model.blocks[3].norm1.register_forward_hook(lambda _, args, output: seen.append(output))
    found = model.attention(images, 3)
    q, k, _ = attn.qkv(seen[0]).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    scores = attn.q_norm(q) @ attn.k_norm(k).transpose(2, 3) / 8**0.5
    others = [0, *range(layout.registers.start, layout.registers.stop)]
    kept = found[:, :, others][..., others]
    expected = scores[:, :, others][..., others].softmax(dim=-1)
    assert near(kept / kept.sum(dim=-1, keepdim=True), expected)
    patches = found[:, :, layout.patches, layout.patches]
    plain = scores[:, :, layout.patches, layout.patches].softmax(dim=-1)
    assert not near(patches / patches.sum(dim=-1, keepdim=True), plain, 1e-2)


@layouts
def test_every_parameter_is_trained(kind):
    model = tiny(**LAYOUTS[kind]).train()
    logits = model(noise(model))
    loss = sum(F.cross_entropy(x, torch.tensor([1, 2])) for x in (logits if isinstance(logits, tuple) else [logits]))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
