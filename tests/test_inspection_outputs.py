"""What the last attention gives to CLS, part by part, and CKA, against values computed by hand."""

import pytest
import torch
import torch.nn.functional as F

from inspection import outputs
from inspection.attention import trace
from inspection.cka import CKA
from inspection.foreign import ForeignViT
from inspection.outputs import decompose, measure
from runs import noise, tiny
from test_inspection_foreign import MODELS, make
from utils import BadInput


def batches_of(images, size):
    return lambda: ((part, None) for part in images.split(size))


def cka(x, y, size=7):
    """Linear CKA and debiased CKA of (n, D) and (n, E), added batch by batch."""
    found = CKA()
    for a, b in zip(x.split(size), y.split(size)):
        found.add({"x": a}, b)
    return found.result()["x"]


def by_kernels(x, y) -> tuple:
    """Both from (n, n) kernel matrices, in the form of the papers."""
    n, one = len(x), torch.ones(len(x), dtype=torch.double)
    centre = torch.eye(n, dtype=torch.double) - 1 / n

    def biased(a, b):
        return (a @ centre @ b @ centre).trace()

    def unbiased(a, b):
        a, b = (kernel - kernel.diag().diag() for kernel in (a, b))
        product = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
        return (a @ b).trace() + product - 2 / (n - 2) * (one @ a @ b @ one)

    a, b = (v.double() @ v.double().T for v in (x, y))
    return tuple(float(hsic(a, b) / (hsic(a, a) * hsic(b, b)) ** 0.5) for hsic in (biased, unbiased))


def test_cka_by_hand():
    # Centred already. Y'X = [4 2], ||Y'X||^2 = 20; X'X = diag(4, 2), norm sqrt(20); Y'Y = 6 -> 20 / (sqrt(20) 6)
    x = torch.tensor([[1.0, 1], [1, -1], [-1, 0], [-1, 0]])
    y = torch.tensor([[2.0], [0], [-1], [-1]])
    assert cka(x, y)["cka"] == pytest.approx(20**0.5 / 6)
    assert cka(x + 5, 3 * y - 2)["cka"] == pytest.approx(20**0.5 / 6)  # centred, whatever the scale


def test_cka_of_a_matrix_with_itself_and_with_a_rotation_is_one():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7) + 3
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    for y in (x, x @ rotation, 0.1 * x @ rotation + 2):
        assert cka(x, y) == pytest.approx({"cka": 1, "debiased": 1}, abs=1e-6)
    assert cka(x, x @ torch.diag(1 / torch.arange(1.0, 7)))["cka"] < 0.9  # not any linear map


@pytest.mark.parametrize("size", [3, 30])
def test_cka_is_that_of_the_kernels(size):
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=seed) + 2
    y = x @ torch.randn(5, 8, generator=seed) + 3 * torch.randn(30, 8, generator=seed)
    found = cka(x, y, size)
    assert (found["cka"], found["debiased"]) == pytest.approx(by_kernels(x, y), rel=1e-6)


def test_cka_of_unrelated_sets_is_biased_and_the_other_is_not():
    x, y = torch.randn(2, 300, 100, generator=torch.Generator().manual_seed(0))
    found = cka(x, y)
    assert found["cka"] == pytest.approx(100 / 400, abs=0.02)  # D / (D + n)
    assert found["debiased"] == pytest.approx(0, abs=0.02)


def test_cka_of_what_does_not_vary_is_none():
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    assert cka(torch.full((10, 3), 0.1), x) == {"cka": None, "debiased": None}
    assert cka(torch.ones(3, 3), x[:3]) == {"cka": None, "debiased": None}  # too few for the other as well
    few = cka(x[:3], x[:3])
    assert (few["cka"], few["debiased"]) == (pytest.approx(1), None)


@pytest.mark.parametrize("kwargs", [{}, {"dist_pos": 2}, {"init_values": 0.5, "qk_norm": True, "rope": True}])
@torch.no_grad()
def test_parts_by_hand(kwargs):
    """Rows of the softmax times values times the projection, kind by kind; together they give the attention."""
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2, **kwargs)
    images, last = noise(model, 3), model.blocks[-1]
    cls, skip, added, kept = decompose(model, images)
    seen: dict = {"out": {}}
    last.attn.proj.register_forward_hook(lambda module, args, y: seen.update(attention=y[:, 0]))
    trace(model, images, tokens=lambda i, x: seen.update(x=x), output=seen["out"].__setitem__)
    assert torch.allclose(skip, seen["x"][:, 0])
    assert torch.allclose(added["attention"], last.ls1(seen["attention"]), atol=1e-5)
    assert torch.allclose(added["none"], last.ls1(last.attn.proj.bias).expand(3, -1), atol=1e-5)
    layout = model.token_layout(3)
    row = model.attention(images, 3)[:, :, 0]  # (B, 3, N)
    value = last.attn.qkv(last.norm1(seen["x"]))[..., 48:]
    assert ("dist" in added) == ("dist_pos" in kwargs) and {"cls", "registers", "patches"} < set(added)
    for kind in set(added) - {"attention", "none"}:
        part = getattr(layout, kind)
        heads = [row[:, h, None, part] @ value[:, part, 8 * h : 8 * h + 8] for h in range(3)]
        expected = last.ls1(last.attn.proj(torch.cat(heads, dim=2)[:, 0]))
        assert torch.allclose(added[kind], expected, atol=1e-5)
        x = skip + expected
        assert torch.allclose(kept[kind], x + last.ls2(last.mlp(last.norm2(x))), atol=1e-4)
    parts = sum(added[kind] - added["none"] for kind in added if kind not in ("attention", "none"))
    assert torch.allclose(parts + added["none"], added["attention"], atol=1e-5)
    assert torch.allclose(kept["attention"], seen["out"][3][:, 0], atol=1e-4)
    for i in range(4):
        assert (i in cls) == (i >= 1)
        assert i not in cls or torch.allclose(cls[i], seen["out"][i][:, 0])


def planted():
    """CLS reads nothing but its first register, whose content is the same in all images."""
    model = tiny(cls_pos=0, reg_pos=0, num_register_tokens=1)
    attn, norm = model.blocks[3].attn, model.blocks[3].norm1
    with torch.no_grad():
        for block in model.blocks[:3]:  # a register stays as it enters
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
        norm.weight.fill_(1)
        norm.bias.zero_()
        attn.qkv.weight[:48].zero_()
        attn.qkv.bias[:48].zero_()
        attn.qkv.bias[:24] = 30  # queries
        model.register_tokens.zero_()
        model.register_tokens[..., 5] = 50
        model.pos_embed[..., 5] = model.cls_token[..., 5] = 0
        model.patch_embed.proj.weight[5] = model.patch_embed.proj.bias[5] = 0
        attn.qkv.weight[24:48, 5] = 30  # keys
    return model


def test_a_planted_register_is_all_that_the_attention_gives():
    model = planted()
    images = noise(model, 6)
    found = measure(model, batches_of(images, 4))
    norms = {name: values["mean"] for name, values in found["norms"].items()}
    assert norms["patches"] == pytest.approx(0, abs=1e-4)
    assert norms["cls"] == pytest.approx(0, abs=1e-4)
    assert norms["registers"] > 1
    assert found["norms"]["registers"]["interval"] == pytest.approx([norms["registers"]] * 2)  # of all images the same
    assert found["rest"] == pytest.approx(0, abs=1e-4)
    assert found["cosine"][3] == pytest.approx(1)
    assert found["cka"]["attention"]["registers"] == {"cka": None, "debiased": None}
    assert "registers" in outputs.lines(found)[1]


@torch.no_grad()
def test_figures_are_means_over_images_whatever_the_batches():
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2)
    images = noise(model, 9)
    found, other = (measure(model, batches_of(images, size)) for size in (9, 2))
    cls, skip, added, kept = decompose(model, images)
    assert found["images"] == 9
    assert found["cosine"][0] is None and found["cosine_interval"][0] is None
    for i in (1, 2, 3):
        assert found["cosine"][i] == pytest.approx(float(F.cosine_similarity(cls[i], cls[3]).mean()), abs=1e-5)
    assert found["norms"]["skip"]["mean"] == pytest.approx(float(skip.norm(dim=1).mean()), rel=1e-5)
    part = (added["patches"] - added["none"]).norm(dim=1)
    low, high = found["norms"]["patches"]["interval"]
    assert found["norms"]["patches"]["mean"] == pytest.approx(float(part.mean()), rel=1e-5)
    assert part.min() < low < part.mean() < high < part.max()
    for where, sets in (("attention", {k: v - added["none"] for k, v in added.items()}), ("output", kept)):
        whole = added if where == "attention" else {k: model.norm(v) for k, v in kept.items()}
        for name, values in found["cka"][where].items():
            x = model.norm(sets[name]) if where == "output" else sets[name]
            assert (values["cka"], values["debiased"]) == pytest.approx(by_kernels(x, whole["attention"]), abs=1e-4)
            assert values == pytest.approx(other["cka"][where][name], abs=1e-4)
    assert set(found["cka"]["output"]) - set(found["cka"]["attention"]) == {"none"}
    page = outputs.page(found, "a model; 9 images")
    assert "a model; 9 images" in [text.get_text() for text in page.texts]


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("cait")])
@torch.no_grad()
def test_models_of_timm(name):
    model, images = make(name)
    with torch.no_grad():
        for parameter in model.parameters():  # LayerScale of 1e-5 would hide everything
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = ForeignViT(model, name, images.shape[2:])
    if model.cls_pos is None:
        with pytest.raises(BadInput, match="no class token"):
            outputs.check(model)
        return
    added, seen = decompose(model, images)[2], {}
    block = model.blocks[model.depth - 1]
    block.attn.register_forward_hook(lambda module, args, y: seen.update(y=y[:, 0]))
    model(images)
    gamma = getattr(block, "gamma_1", None)
    expected = block.ls1(seen["y"]) if hasattr(block, "ls1") else seen["y"] if gamma is None else gamma * seen["y"]
    scale = float(expected.abs().max())
    assert torch.allclose(added["attention"], expected, atol=1e-3 * scale)
    parts = sum(added[kind] - added["none"] for kind in added if kind not in ("attention", "none"))
    assert torch.allclose(parts + added["none"], expected, atol=1e-3 * scale)


def test_models_without_such_parts_are_refused():
    model = tiny()
    with pytest.raises(BadInput, match="no class token"):
        measure(tiny(cls_pos=None), batches_of(noise(model), 2))
    model.blocks[3].mlp.register_forward_hook(lambda module, args, y: y + args[0].mean(dim=1, keepdim=True))
    with pytest.raises(BadInput, match="does more with its attention"):
        measure(model, batches_of(noise(model), 2))
