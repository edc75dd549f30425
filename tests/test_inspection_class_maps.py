"""Class-specific maps: gradient x attention, and Grad-CAM."""

import pytest
import timm
import torch
import torch.nn.functional as F

from inspection.attention import set_fused_attention
from inspection.class_maps import class_number, grad_cam, relevance
from inspection.foreign import ForeignViT
from models_dynamic import DynamicViT, TokenLayout
from runs import noise, tiny
from utils import BadInput


class HandBlock(torch.nn.Module):
    """Tokens of width 1, two heads with the values x and -x: adds the first, and half of the second. The attention is
    the given one."""

    def __init__(self, attention):
        super().__init__()
        self.mask = torch.tensor(attention).log()

    def forward(self, x):  # (B, N, 1)
        value, zero = torch.stack([x, -x], dim=1), torch.zeros(len(x), 2, *x.shape[1:])
        first, second = F.scaled_dot_product_attention(zero, zero, value, attn_mask=self.mask).unbind(dim=1)
        return x + first + second / 2


class HandModel(torch.nn.Module):
    """Two patches, which are the two pixels; CLS, which is 0, enters at block 1. Logits: CLS, and minus CLS."""

    depth, grid_size, num_classes = 2, (1, 2), 2

    def __init__(self):
        super().__init__()
        half, third = [0.5, 0.5], [1 / 3] * 3
        self.blocks = torch.nn.ModuleList([HandBlock([half, half]), HandBlock([[1 / 2, 1 / 8, 3 / 8], third, third])])

    def token_layout(self, block):
        return TokenLayout(slice(0, 1), slice(1, 3), None, 3) if block else TokenLayout(None, slice(0, 2), None, 2)

    def forward(self, images):
        x = self.blocks[0](images[:, 0, 0, :, None])
        cls = self.blocks[1](torch.cat([torch.zeros(len(x), 1, 1), x], dim=1))[:, 0]
        return torch.cat([cls, -cls], dim=1)


IMAGE = torch.tensor([1.0, 3]).expand(1, 3, 1, 2)


def test_relevance_by_hand():
    """Pixels (1, 3); the patches leave block 0 as (2, 4), and CLS becomes (2 / 8 + 4 * 3 / 8) / 2 = 7 / 8.

    For class 0. Block 1, row of CLS: head 0 has gradient (0, 2, 4), times attention (0, 1/4, 3/2); head 1's gradients
    are negative; mean (0, 1/8, 3/4). The patches' gradients are (1/8, 3/8) (1 - 1/2) = (1/16, 3/16). Block 0: head 0
    has gradient g_i x_j, times attention ((1/32, 3/32), (3/32, 9/32)), head 1 negative ones; mean
    ((1/64, 3/64), (3/64, 9/64)). R of the patches: ((65/64, 3/64), (3/64, 73/64)). CLS: 1/8 row 1 + 3/4 row 2.

    For class 1, all signs are opposite: head 1 alone counts, with half of the gradient.
    """
    model = HandModel()
    assert torch.allclose(model(IMAGE), torch.tensor([[7 / 8, -7 / 8]]))
    expected = torch.tensor([[[83 / 512, 441 / 512]], [[147 / 2048, 825 / 2048]]])
    assert torch.allclose(relevance(model, IMAGE), expected[:1])  # class 0 is predicted
    assert torch.allclose(relevance(model, IMAGE.expand(2, -1, -1, -1), torch.tensor([0, 1])), expected)
    assert torch.allclose(relevance(model, IMAGE, 1), expected[1:])


def test_grad_cam_by_hand():
    """At the input of block 1 the patches are (2, 4), with gradients (1/16, 3/16), of mean 1/8."""
    model = HandModel()
    assert torch.allclose(grad_cam(model, IMAGE, 1, 0), torch.tensor([[[1 / 4, 1 / 2]]]))
    assert torch.equal(grad_cam(model, IMAGE, 1, 1), torch.zeros(1, 1, 2))  # negative
    with pytest.raises(ValueError, match=r"blocks are 0\.\.1"):
        grad_cam(model, IMAGE, 2)


def whole_relevance(model, images, target, monkeypatch):
    """Rows of the whole (N, N) matrices R of the last block, from plain products and torch's backward."""
    seen, softmax = [], torch.Tensor.softmax

    def watched(scores, *args, **kwargs):
        seen.append(softmax(scores, *args, **kwargs))
        seen[-1].retain_grad()
        return seen[-1]

    watching = model.blocks[-1].register_forward_hook(lambda *_: None)  # so that the last block computes all rows
    set_fused_attention(model, False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", watched)
        model(images)[:, target].sum().backward()
    set_fused_attention(model, True)
    watching.remove()
    model.zero_grad()
    R = None
    for i, attn in enumerate(seen):
        layout, N = model.token_layout(i), attn.shape[-1]
        new = torch.eye(N).repeat(len(images), 1, 1)
        if R is not None:
            before = model.token_layout(i - 1)
            kept = torch.cat([
                torch.arange(N)[getattr(layout, part)]
                for part in ("cls", "dist", "patches", "registers") if getattr(before, part) is not None
            ])  # fmt: skip
            new[:, kept[:, None], kept] = R
        R = new + (attn.grad * attn).relu().mean(dim=1) @ new
    return R.detach()


@pytest.mark.parametrize(
    ("kwargs", "rows"),
    [
        ({"cls_pos": 0, "reg_pos": 0}, [0]),
        ({"cls_pos": 2, "reg_pos": 1, "num_register_tokens": 2}, [0]),
        ({"cls_pos": 1, "dist_pos": 2, "reg_pos": 3}, [0, 1]),
        ({"cls_pos": None, "reg_pos": 2}, range(24)),
        ({"cls_pos": 1, "global_pool": "avg"}, range(1, 25)),  # CLS is there, and is not what is classified
    ],
)
def test_tokens_that_enter_later(kwargs, rows, monkeypatch):
    model = tiny(**kwargs)
    images = noise(model)
    R = whole_relevance(model, images, 3, monkeypatch)
    expected = R[:, list(rows)][..., model.token_layout(3).patches].mean(dim=1).unflatten(-1, (4, 6))
    with torch.no_grad():
        found = relevance(model, images, 3)
    assert expected.std() > 0
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7 * float(expected.max()))


def test_the_model_is_left_alone():
    model = tiny(cls_pos=2, reg_pos=1, drop_rate=0.5).train()
    images = noise(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    first = relevance(model, images, 1)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert torch.equal(relevance(model, images, 1), first)  # no dropout
    assert torch.equal(grad_cam(model, images, 3, 1), grad_cam(model, images, 3, 1))
    assert model.training and not images.requires_grad and not first.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.equal(relevance(model, images, 2), first)


def test_attention_pooling():
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_siglip_224", depth=2, embed_dim=96, num_classes=4).eval()
    model = ForeignViT(model, "siglip", 224)
    images = torch.randn(2, 3, 224, 224)
    maps = relevance(model, images, 2)
    assert maps.shape == (2, 14, 14) and (maps > 0).any() and (maps >= 0).all()
    assert grad_cam(model, images, 1).shape == (2, 14, 14)


def test_what_there_is_no_map_of():
    with pytest.raises(ValueError, match=r"no class 5: the model's classes are 0\.\.4"):
        relevance(tiny(), noise(tiny()), 5)
    headless = tiny(num_classes=0)
    with pytest.raises(ValueError, match="has no head"):
        grad_cam(headless, noise(headless), 3)


def test_names_and_numbers_of_classes():
    assert class_number("bee", ["ant", "bee"], 2) == 1
    assert class_number("0", ["1", "0"], 2) == 1  # a name comes first
    assert class_number("3", [], 5) == 3
    for text in ("5", "-1", "wasp", "²"):
        with pytest.raises(BadInput, match=r"no class .*; give a number, 0\.\.4 or a name, as in ant"):
            class_number(text, ["ant"], 5)


def coloured(count, chance, others=0):
    """Noise with one patch of 16 in one of three colours, which is the class: images, classes, places.

    `others`: 1 for images that have a patch of the next class too, five places on."""
    images = torch.randn(count, 3, 4, 8, 4, 8, generator=chance) * 0.3  # rows, pixels, columns, pixels
    labels, places = (torch.randint(n, (count,), generator=chance) for n in (3, 16))
    for k in range(1 + others):
        place = (places + 5 * k) % 16
        images[torch.arange(count), (labels + k) % 3, place // 4, :, place % 4] += 2
    return images.reshape(count, 3, 32, 32), labels, places


@pytest.mark.parametrize("cls_pos", [0, None])
def test_of_two_objects_each_class_has_its_own(cls_pos):
    torch.manual_seed(0)
    model = DynamicViT(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=3, cls_pos=cls_pos,
        num_register_tokens=2, reg_pos=1, mlp_ratio=2.0,
    )  # fmt: skip
    chance, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(120):
        images, labels, _ = coloured(32, chance)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels, places = coloured(200, chance, others=1)
    for k in (0, 1):
        found = relevance(model, images, (labels + k) % 3).flatten(1)
        own, other = (found.gather(1, ((places + 5 * n) % 16)[:, None]) for n in (k, 1 - k))
        assert (own > other).float().mean() > 0.8
