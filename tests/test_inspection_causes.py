"""The causal depth curve against passes and numbers by hand, on models with planted structure."""

import json
import math

import numpy as np
import pytest
import timm
import torch

from inspection import causes, ridge
from inspection.attention import trace
from inspection.bootstrap import bootstrap
from inspection.causes import REPLACEMENTS, divergence, effective_rank, harmless_until, lines, measure, page
from inspection.foreign import ForeignViT
from runs import noise, tiny
from utils import BadInput


def in_batches(images, labels=None, size=2):
    def batches():
        for k in range(0, len(images), size):
            yield images[k : k + size], None if labels is None else labels[k : k + size]

    return batches


def late(**kwargs):
    return tiny(**(dict(cls_pos=1, reg_pos=2, num_register_tokens=2) | kwargs))


def reading_registers(**kwargs):
    """The same, with attention so sharp that what registers hold reaches the output."""
    model = late(**kwargs)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(2)
    return model


def foreign():
    """A ViT of timm's of 3 blocks with CLS and 4 registers, without a head."""
    torch.manual_seed(0)
    args = dict(depth=3, img_size=56, embed_dim=48, num_heads=3, num_classes=0, init_values=None)
    return ForeignViT(timm.create_model("vit_small_patch14_reg4_dinov2", **args).eval(), "dinov2", 56)


def test_the_same_image_as_donor_changes_nothing_exactly():
    model = reading_registers()
    images = noise(model, 1).repeat(3, 1, 1, 1)
    found = measure(model, in_batches(images, torch.zeros(3, dtype=torch.long), size=1))["tokens"]
    for kind, entry in (("cls", 1), ("registers", 2)):
        same, zero = found[kind]["another image's"], found[kind]["zero"]
        nothing = [None] * entry + [0.0] * (4 - entry)
        assert same["cost"] == same["divergence_bits"] == nothing
        assert same["cost_interval"] == [None if n is None else [0.0, 0.0] for n in nothing]
        assert same["agreement"] == [None if n is None else 100.0 for n in nothing]
        assert same["patch_cosine"][entry:] == pytest.approx([1] * (4 - entry), abs=1e-6)
        assert (same["harmless_until"], same["harmless_interval"]) == (3, [3, 3])
        assert zero["divergence_bits"][entry] > 1e-5
    assert found["registers"]["zero"]["patch_cosine"][2] < 0.9999


@pytest.mark.parametrize(("cls_pos", "reg_pos"), [(0, 0), (2, 1), (3, 3), (None, 2)])
def test_before_its_entry_a_token_is_absent(cls_pos, reg_pos):
    model = tiny(cls_pos=cls_pos, reg_pos=reg_pos, num_register_tokens=2)
    found = measure(model, in_batches(noise(model, 4), torch.arange(4)))
    entries = {kind: at for kind, at in (("cls", cls_pos), ("registers", reg_pos)) if at is not None}
    assert found["tokens"].keys() == entries.keys()
    for kind, entry in entries.items():
        for values in found["tokens"][kind].values():
            for name in ("cost", "cost_interval", "agreement", "divergence_bits", "patch_cosine", "output_cosine"):
                assert [i for i, value in enumerate(values[name]) if value is None] == list(range(entry))
    present = [value is not None for value in found["effective_rank"]]
    assert present == [cls_pos is not None and i >= cls_pos for i in range(4)]


def test_without_tokens_there_is_nothing_to_replace():
    model = tiny(cls_pos=None, num_register_tokens=0)
    found = measure(model, in_batches(noise(model, 4)))
    assert found["tokens"] == {}
    assert lines(found) == ["Causes: no class token or registers to replace, or no head to judge it by"]
    with pytest.raises(BadInput, match="neither a class token nor registers"):
        causes.check(model)


@pytest.mark.parametrize("make", [late, foreign])
@pytest.mark.parametrize("kind", ["cls", "registers"])
def test_its_initial_token_at_the_input_of_its_entry_block_changes_nothing(make, kind):
    model = make()
    images, entry = noise(model, 4), {"cls": model.cls_pos, "registers": model.reg_pos}[kind]
    initial = causes.Replacements(model, in_batches(images), 0).entered[kind, model.depth - 1]

    def replace(i, x):
        if i == entry:
            x = x.clone()
            x[:, getattr(model.token_layout(i), kind)] = initial
            return x

    assert torch.equal(trace(model, images, tokens=replace), trace(model, images))


def test_before_the_first_block_that_writes_to_it_its_initial_token_changes_nothing():
    """CLS enters at block 0, and blocks 0 and 1 change nothing: it could as well enter at block 2."""
    model = tiny(cls_pos=0, reg_pos=0, num_register_tokens=2)
    with torch.no_grad():
        for block in model.blocks[:2]:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    images = noise(model, 6)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    found = measure(model, in_batches(images, labels), epsilon=0)
    for kind in ("cls", "registers"):
        bits = found["tokens"][kind]["its initial"]["divergence_bits"]
        assert bits[:2] == [0, 0] and bits[2] > 0
    assert found["tokens"]["cls"]["its initial"]["harmless_until"] >= 1
    assert found["tokens"]["cls"]["zero"]["divergence_bits"][0] > 0
    assert found["effective_rank"][:2] == pytest.approx([1, 1], abs=1e-3)
    assert found["effective_rank"][2] > 1.01


@pytest.mark.parametrize("make", [reading_registers, foreign])
def test_every_measure_equals_that_of_whole_passes(make):
    """Of zero, the previous image's tokens and the mean, from the definitions."""
    model = make()
    images = noise(model, 5)
    labels = torch.tensor([0, 1, 2, 3, 4]) if model.num_classes else None
    found = measure(model, in_batches(images, labels))
    outputs: dict = {}
    intact = trace(model, images, output=lambda i, x: outputs.update({i: x}))
    last = model.depth - 1
    for kind in ("cls", "registers"):
        for block in (1, 2, last):
            part = getattr(model.token_layout(block), kind)
            if part is None:
                continue
            own = outputs[block][:, part]
            others = (0 * own, own.mean(dim=0, keepdim=True), own.roll(1, dims=0))
            for name, new in zip(("zero", "mean", "another image's"), others):
                seen = {}

                def replace(i, x, block=block, part=part, new=new, seen=seen):
                    x = x.clone()
                    x[:, part] = new if i == block else x[:, part]
                    seen[i] = x
                    return x

                logits, values = trace(model, images, output=replace), found["tokens"][kind][name]
                patches = model.token_layout(last).patches
                cosine = torch.cosine_similarity(seen[last][:, patches], outputs[last][:, patches], dim=-1).mean()
                assert values["patch_cosine"][block] == pytest.approx(float(cosine), abs=1e-5)
                cosine = torch.cosine_similarity(logits, intact, dim=-1).mean()
                assert values["output_cosine"][block] == pytest.approx(float(cosine), abs=1e-5)
                if labels is None:
                    assert values["cost"] is values["divergence_bits"] is None
                    continue
                a, b = intact.argmax(dim=1), logits.argmax(dim=1)
                assert values["agreement"][block] == pytest.approx(100 * float((a == b).float().mean()))
                cost = float((a == labels).float().mean() - (b == labels).float().mean())
                assert values["cost"][block] == pytest.approx(100 * cost)
                p, q = intact.softmax(dim=1).double(), logits.softmax(dim=1).double()
                m = (p + q) / 2
                bits = ((p * (p / m).log2()).sum(dim=1) + (q * (q / m).log2()).sum(dim=1)).mean() / 2
                assert values["divergence_bits"][block] == pytest.approx(float(bits), abs=1e-6)
    for block, rank in enumerate(found["effective_rank"]):
        if rank is not None:
            cls = outputs[block][:, model.token_layout(block).cls].flatten(1).double()
            assert rank == pytest.approx(effective_rank(torch.linalg.svdvals(cls)), rel=1e-3)


def test_the_gaussian_has_the_mean_and_the_variance_of_the_images():
    model = late()
    images = noise(model, 40)
    given, outputs = causes.Replacements(model, in_batches(images, size=7), 0), {}
    trace(model, images, output=lambda i, x: outputs.update({i: x}))
    own = outputs[3][:, model.token_layout(3).registers]
    drawn = given.of("registers", 3, own.repeat(100, 1, 1))["Gaussian"]
    deviation = own.std(dim=0, correction=0)
    assert torch.allclose(drawn.std(dim=0), deviation, rtol=0.06)
    assert ((drawn.mean(dim=0) - own.mean(dim=0)).abs() < 0.08 * deviation).all()
    assert given.entered["registers", model.depth - 1].shape == (1, 2, 24)


def test_without_labels_the_cost_is_what_changes():
    model = late()
    images = noise(model, 6)
    found = measure(model, in_batches(images), epsilon=100)
    assert (found["labelled"], found["top1"]) == (False, None)
    changed = found["tokens"]["cls"]["zero"]
    assert changed["cost"][1:] == pytest.approx([100 - agreement for agreement in changed["agreement"][1:]])
    assert max(changed["cost"][1:]) > 0
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labelled = measure(model, in_batches(images, labels), epsilon=100)
    assert labelled["top1"] == 100 and labelled["tokens"]["cls"]["zero"]["cost"] == changed["cost"]


def test_only_so_many_images_are_measured():
    model = late()
    images, labels = noise(model, 7), torch.arange(7) % 5
    found = measure(model, in_batches(images, labels), images=3)
    assert found == measure(model, in_batches(images[:3], labels[:3]), images=0)
    assert found["images"] == 3


def two_classes(model, count=40):
    """Bright and dark images, alternating."""
    labels = torch.arange(count) % 2
    return noise(model, count) / 4 + 3 * labels[:, None, None, None] - 1.5, labels


def test_what_a_probe_reads_beside_what_the_model_uses():
    """Tokens read the patches from block 2 on, and the head uses nothing."""
    model = tiny(cls_pos=1, reg_pos=0, num_register_tokens=2)
    images, labels = two_classes(model)
    with torch.no_grad():
        model.head.weight.zero_()
        for layer in [model.blocks[i].attn.proj for i in (0, 1)]:
            layer.weight.zero_()
    found = measure(model, in_batches(images, labels, size=16))
    probed, cost = found["probe"], found["tokens"]["cls"]["zero"]["cost"]
    assert {name: probed[name] for name in ("trained_on", "scored_on", "classes", "chance")} == {
        "trained_on": 20, "scored_on": 20, "classes": 2, "chance": 50
    }  # fmt: skip
    assert probed["accuracy"]["cls"] == [None, 50, 100, 100] and cost == [None, 0, 0, 0]
    assert probed["interval"]["cls"][2] == [100, 100] and probed["interval"]["cls"][0] is None
    low, high = probed["interval"]["cls"][1]
    assert low < 50 < high
    assert probed["accuracy"]["registers"] == [50, 50, 100, 100]
    assert "class token in 100.0% (100.0..100.0) at block 2, 100.0% (100.0..100.0) at block 3" in lines(found)[2]
    assert "mean of the registers in" in lines(found)[3] and "20 images; chance 50.0%" in lines(found)[3]
    drawn = {axes.get_title(): axes for axes in page(found, "a model").axes if axes.get_visible()}
    assert len(drawn) == 9
    shown = drawn["class token:\naccuracy of a probe (%)"].get_lines()[0]
    assert list(shown.get_xdata()) == [0, 1, 2, 3] and list(shown.get_ydata())[1:] == [50, 100, 100]
    assert np.isnan(shown.get_ydata()[0])


def test_the_probe_is_scored_on_images_that_it_has_not_seen():
    """Random labels and more dimensions than images: on its own half it would score 100 %."""
    chance = np.random.default_rng(0)
    features = {("cls", 0): chance.normal(size=(400, 300))}
    found = ridge.probe(features, list(chance.integers(2, size=400)), 1)
    assert found["scored_on"] == 200 and 40 < found["accuracy"]["cls"][0] < 60
    low, high = found["interval"]["cls"][0]
    assert high - low == pytest.approx(2 * 1.96 * 50 / math.sqrt(200), abs=1.5)


def test_a_probe_needs_two_classes_of_four_images():
    features = {("cls", 0): np.arange(9.0)[:, None]}
    assert ridge.probe(features, [0, 0, 0, 0, 0, 1, 1, 1, 2], 1) is None
    found = ridge.probe(features, [0, 0, 0, 0, 0, 1, 1, 1, 1], 1)
    assert found["classes"] == 2 and found["trained_on"] + found["scored_on"] == 9
    assert ridge.probe({("cls", 0): np.zeros((8, 1))}, [5, 5, 7, 7, 5, 5, 7, 7], 1)["accuracy"]["cls"] == [50]
    assert ridge.probe({}, [0] * 9 + [1] * 9, 1) is ridge.probe(features, [], 1) is None


def test_only_some_replacements():
    model = late()
    images, labels = noise(model, 6), torch.arange(6) % 5
    found = measure(model, in_batches(images, labels), kinds=("cls",), replacements=("its initial",))
    whole = measure(model, in_batches(images, labels))
    assert found["tokens"] == {"cls": {"its initial": whole["tokens"]["cls"]["its initial"]}}


def test_divergence_by_hand():
    p = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [1, 0, 0]], dtype=torch.float64)
    q = torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0.5, 0]], dtype=torch.float64)
    half = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5  # entropy of the mixture - mean of 0 and 1
    assert divergence(p, q).tolist() == pytest.approx([1, 0, half])


def test_effective_rank_by_hand():
    assert effective_rank(torch.tensor([7.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.full((5,), 0.3)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 1])) == pytest.approx(4 / 3**0.75)


def test_harmless_until_the_first_block_that_costs_more():
    assert harmless_until([0, 1, -2, 1.5, 0], 1) == 2
    assert harmless_until([1.5, 0, 0], 1) == -1
    assert harmless_until([0, 0, 0], 1) == 2
    # 1 of 100 images at block 1, all at block 2; after an entry at block 3
    rows = [None, None, None, *(np.zeros((100, 5)) for _ in range(3))]
    rows[4][:1, 0], rows[5][:, 0] = 1, 1
    found = causes.summary(rows, 1.0, 10)
    assert (found["harmless_until"], found["harmless_interval"]) == (4, [3, 4])
    assert found["cost"] == [None, None, None, 0, 1, 100]
    assert found["cost_interval"][4] == pytest.approx([0, 3], abs=0.5)
    rows[3][:, 0] = 1
    found = causes.summary(rows, 1.0, 10)
    assert (found["harmless_until"], found["harmless_interval"]) == (None, [None, None])


def test_bootstrap():
    values = np.repeat([0.0, 1.0], [100, 300])
    low, high = bootstrap(values, resamples=4000)
    normal = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - normal, 0.75 + normal), abs=0.004)
    assert bootstrap(values).tolist() == bootstrap(values).tolist() != bootstrap(values, seed=1).tolist()
    noisy = np.random.default_rng(0).normal(size=50)
    pairs = np.stack([noisy, noisy + 2], axis=1)  # measures of an image stay together
    assert bootstrap(pairs, lambda some: np.diff(some.mean(axis=0))[0]) == pytest.approx([2, 2])
    assert bootstrap(pairs).shape == (2, 2)


@pytest.mark.parametrize("make", [late, foreign])
def test_what_is_written_and_drawn(make):
    model = make()
    labels = torch.arange(4) if model.num_classes else None
    found = measure(model, in_batches(noise(model, 4), labels))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [list(by_name) for by_name in found["tokens"].values()] == [list(REPLACEMENTS)] * 2
    titles = [axes.get_title() for axes in page(found, "a model").axes if axes.get_visible()]
    if model.num_classes:
        assert len(lines(found)) == 3 and all(name in lines(found)[0] for name in REPLACEMENTS)
        assert found["probe"] is None and lines(found)[2].startswith("No probe beside it: it needs two classes with 4")
        assert len(titles) == 7 and "registers:\ntop-1 lost (points)" in titles
    else:
        assert "no head" in lines(found)[0]
        assert len(titles) == 5 and "class token:\ncosine of outputs" in titles


def test_registers_that_come_and_go_are_replaced_by_their_own_initial_tokens():
    """Number 0 leaves at block 1, numbers 1 and 2 enter at block 2: none is there in between."""
    model = tiny(num_register_tokens=3, reg_pos=(0, 2, 2), reg_end=(1, 4, 4))
    images, given = noise(model, 4), {}

    def record(i, x):
        given[i] = x[:, model.token_layout(i).registers] if i != 1 else None

    trace(model, images, output=record)
    made = causes.Replacements(model, lambda: [(images, None)], 0)
    for i, numbers in ((0, [0]), (2, [1, 2]), (3, [1, 2])):
        own = made.of("registers", i, given[i])[causes.INITIAL]
        assert torch.equal(own, model.register_tokens[:, numbers])
    found = causes.measure(model, lambda: [(images, torch.zeros(4, dtype=torch.long))])["tokens"]["registers"]["zero"]
    assert [value is None for value in found["cost"]] == [False, True, False, False]
    causes.page(causes.measure(model, lambda: [(images, None)]), "a model")


def test_a_block_without_registers_has_no_cost_and_no_probe():
    """The first at blocks 0 and 1, the second at 1, the third at 3; then all leave before the last block."""
    for ends, absent in (((2, 2, 4), 2), ((2, 2, 3), 3)):
        model = tiny(num_register_tokens=3, reg_pos=(0, 1, ends[2] - 1), reg_end=ends)
        found = measure(model, in_batches(*two_classes(model, 12)))
        assert [i for i, value in enumerate(found["probe"]["accuracy"]["registers"]) if value is None] == [absent]
        assert None not in found["probe"]["accuracy"]["cls"] and len(lines(found)) == 4
        drawn = {axes.get_title(): axes for axes in page(found, "a model").axes}["registers:\ntop-1 lost (points)"]
        assert [i for i, y in enumerate(drawn.get_lines()[0].get_ydata()) if np.isnan(y)] == [absent]  # a gap
    rows = [None, np.zeros((50, 5)), None, np.zeros((50, 5))]
    assert causes.summary(rows, 1.0, 5)["harmless_until"] == 3
    rows[3][:, 0] = 1
    values = causes.summary(rows, 1.0, 5)
    assert (values["harmless_until"], values["harmless_interval"]) == (1, [1, 1])
