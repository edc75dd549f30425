"""The lens at the last block is the model, and activations have the sizes that were planted."""

import pytest
import torch
import torch.nn.functional as F

from inspection import lens
from inspection.attention import trace
from inspection.foreign import ForeignViT
from inspection.lens import Readout, measure
from runs import noise, tiny
from test_analyze_tokens import batches_of, register_reader, still
from test_inspection_foreign import make


def last_lens(model, images):
    """(lens logits at the last block, the model's logits)."""
    seen: dict = {}
    logits = trace(model, images, output=seen.__setitem__)
    last = model.depth - 1
    return Readout(model).logits(seen[last], model.token_layout(last)), logits


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": True}])
def test_the_last_block_gives_the_logits(kwargs):
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2, **kwargs)
    found, logits = last_lens(model, noise(model, 3))
    same = "patches" if kwargs else "cls"
    for kind in ("cls", "patches"):
        assert torch.allclose(found[kind], logits, atol=1e-5) == (kind == same)
    both, logits = last_lens(tiny(cls_pos=1, dist_pos=2), noise(model, 3))
    assert torch.allclose((both["cls"] + both["dist"]) / 2, logits, atol=1e-5)  # DeiT's two heads


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "same"), [("deit3_small_patch16_224", "cls"), ("beit_base_patch16_224", "patches"),
                       ("vit_small_patch14_reg4_dinov2", "cls"), ("eva02_tiny_patch14_224", "patches")],
)  # fmt: skip
def test_models_of_timm(name, same):
    model, images = make(name, num_classes=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = ForeignViT(model, name, images.shape[2:])
    found, logits = last_lens(model, images)
    scale = float(logits.abs().max())
    assert torch.allclose(found[same], logits, atol=1e-4 * scale)
    assert not torch.allclose(found["patches" if same == "cls" else "cls"], logits, atol=1e-2 * scale)


def test_the_block_at_which_the_answer_is_there():
    """CLS copies the class in the last block, from a register that copied it from the patches in block 1."""
    model = register_reader()
    labels = torch.arange(8) % 2
    images = torch.zeros(8, 3, 16, 24) + (2.0 * labels - 1)[:, None, None, None]
    for size in (8, 3):
        found = measure(model, batches_of(images, labels, size))
        assert found["images"] == 8 and found["top1"] == 100
        cls, patches = (found["lenses"][token] for token in ("class token", "mean patch"))
        assert cls["accuracy"] == cls["agreement"] == [50, 50, 100]  # before, it is the same in all images
        assert patches["accuracy"] == [100, 100, 100]  # the brightness is in them from the beginning
        assert cls["accuracy_interval"][2] == [100, 100]
        low, high = cls["accuracy_interval"][0]
        assert 0 < low < 50 < high < 100
    assert "class token: the final prediction in 90% of the images from block 2 on" in lens.lines(found)[0]
    assert "mean patch: the final prediction in 90% of the images from block 0 on" in lens.lines(found)[1]


def test_what_agrees_with_the_model_need_not_be_right():
    model = register_reader()
    images = torch.ones(4, 3, 16, 24)
    found = measure(model, batches_of(images, torch.tensor([0, 0, 0, 1]), 4))
    assert found["lenses"]["class token"]["agreement"][2] == 100
    assert found["lenses"]["class token"]["accuracy"][2] == found["top1"] == 25
    found = measure(model, lambda: [(images, None)])
    assert found["top1"] is None and set(found["lenses"]["class token"]) == {"agreement", "agreement_interval"}


def massive():
    """The registers enter at block 2 with activations of 300, 200 and 150; all others are of 0.1."""
    model = still(cls_pos=1, reg_pos=2, num_register_tokens=2)
    with torch.no_grad():
        for parameter in (model.patch_embed.proj.weight, model.patch_embed.proj.bias):
            parameter.zero_()
        model.pos_embed.fill_(0.1)
        model.cls_token.fill_(-0.1)
        model.register_tokens.fill_(0.1)
        model.register_tokens[0, 0, 7] = 300
        model.register_tokens[0, 1, 9] = -200
        model.register_tokens[0, 1, 3] = 150
    return model


def test_planted_massive_activations_are_found_at_their_block_and_token():
    model = massive()
    found = measure(model, batches_of(noise(model, 4), torch.zeros(4).long(), 3))
    assert found["largest"][0] == pytest.approx([0.1] * 3)
    for i in (2, 3):
        assert found["largest"][i] == pytest.approx([300, 200, 150])
        assert found["largest_in"][i] == {"registers": 100}
    assert found["median"] == pytest.approx([0.1] * 4)
    assert found["massive"] == [0, 0, 100, 100]
    words = "Massive activations: in 2 blocks from 2 on; largest 300 in the registers at block 2 (median 0.1)"
    assert lens.lines(found)[-1] == words
    with torch.no_grad():
        model.pos_embed.fill_(0.4)  # large, but not 1,000 times the median
    found = measure(model, batches_of(noise(model, 4), torch.zeros(4).long(), 3))
    assert found["massive"] == [0, 0, 0, 0]
    assert lens.lines(found)[-1] == "Massive activations: none"


@torch.no_grad()
def test_cosines_and_sizes_are_means_over_images():
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2, fc_norm=True)
    images, seen = noise(model, 5), {}
    trace(model, images, output=seen.__setitem__)
    found = measure(model, batches_of(images, torch.zeros(5).long(), 2))
    assert found["cosine"]["before"][0] is None and found["lenses"]["class token"]["agreement"][0] is None
    for i in (1, 2, 3):
        x = seen[i]
        patches = x[:, 1:25]
        for name, y, z in (("before", x, patches), ("after", model.fc_norm(x), model.fc_norm(patches))):
            expected = F.cosine_similarity(y[:, :1], z, dim=2).mean()
            assert found["cosine"][name][i] == pytest.approx(float(expected), abs=1e-5)
        sizes = x.abs().flatten(1).sort(dim=1, descending=True).values
        assert found["largest"][i] == pytest.approx(sizes[:, :3].mean(dim=0).tolist(), rel=1e-5)
        expected = sizes[:, sizes.shape[1] // 2].mean()  # the lower of the two in the middle
        assert found["median"][i] == pytest.approx(float(expected), rel=1e-5)
    page = lens.page(found, "a model; 5 images")
    assert "a model; 5 images" in [text.get_text() for text in page.texts]


def test_a_model_without_head_or_class_token():
    model = tiny(cls_pos=None, num_classes=0)
    found = measure(model, batches_of(noise(model, 3), torch.zeros(3).long(), 2))
    assert found["lenses"] == {} and found["top1"] is None
    assert found["cosine"] == {"before": [None] * 4, "after": [None] * 4}
    assert len(lens.lines(found)) == 1
    lens.page(found, "a model")
    model, images = make("vit_base_patch16_siglip_224", num_classes=4)  # its head is after an attention pooling
    found = measure(ForeignViT(model, "siglip", 224), lambda: [(images, torch.zeros(2).long())])
    assert found["lenses"] == {} and len(found["median"]) == 2
