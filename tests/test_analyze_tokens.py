"""Figures of `analyze_tokens.py` against values computed by hand, on models with planted structure."""

import json
import math
import shutil

import pytest
import torch
from pypdf import PdfReader
from timm.layers import PatchEmbed

import analyze_tokens
import discover_objects
import visualize_attention
from analyze_tokens import main, table
from checkpoints.files import save_checkpoint
from images import picture
from inspection import interventions
from inspection.attention import trace
from inspection.interventions import ablate, recorded, replaced
from inspection.statistics import (
    LOWEST,
    PER_DECADE,
    TokenStatistics,
    artefact_bin,
    bin_edge,
    probe_accuracies,
    quantile,
)
from loading.memory import load_data
from pages import no_overlaps
from runs import noise, run, shell, tiny
from sweep import measures, pages
from utils import BadInput


def still(**kwargs):
    """A model whose blocks change nothing: a token's output is what it entered with."""
    model = tiny(**kwargs)
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    return model


def measured(model, images, labels=None, batch=2, **kwargs):
    statistics = TokenStatistics(model, **kwargs)
    for k in range(0, len(images), batch):
        statistics.add(images[k : k + batch], None if labels is None else labels[k : k + batch])
    return statistics


# Norms and artefacts ---------------------------------------------------------------------------------------------


def planted_artefact():
    """In block 2, a patch that is bright gets a large norm."""
    model = still(cls_pos=1, reg_pos=2, num_register_tokens=2)
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.weight[0, 0] = 1 / 16  # brightness of the first channel
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
        model.pos_embed[..., 0] = 0
        mlp, norm = model.blocks[2].mlp, model.blocks[2].norm2
        norm.weight.fill_(1)
        norm.bias.zero_()
        mlp.fc1.weight.zero_()
        mlp.fc1.bias.zero_()
        mlp.fc1.weight[0, 0] = 100
        mlp.fc1.bias[0] = -100  # only a bright patch passes
        mlp.fc2.weight[1, 0] = 10
    return model


def test_a_planted_artefact_is_found_at_its_place_and_block():
    model = planted_artefact()
    images = torch.zeros(4, 3, 16, 24)
    images[:3, 0, 8:12, 16:20] = 2.0  # three of four images
    found = measured(model, images).result()["artefacts"]
    assert found["begins_at_block"] == 2
    assert [block["share"] for block in found["blocks"][:2]] == [0, 0]
    for block in found["blocks"][2:]:
        assert block["share"] == pytest.approx(3 / (4 * 24))
        where = torch.tensor(block["where"])
        assert where.shape == (4, 6)
        assert where[2, 4] == 0.75
        assert where.sum() == 0.75


def test_threshold_of_known_distributions():
    def counted(norms):
        counts = torch.zeros(900, dtype=torch.int32)
        for norm in norms:
            counts[int((math.log10(norm) - LOWEST) * PER_DECADE)] += 1
        return counts

    spread = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    bulk = (10 ** (1.0 + 0.1 * spread)).tolist()  # log-normal around 10
    first, median = artefact_bin(counted(bulk))
    assert median == pytest.approx(10, rel=0.03)
    assert bin_edge(first) == pytest.approx(10 ** (1.0 + 5 * 0.1), rel=0.1)  # five standard deviations
    assert counted(bulk)[first:].sum() == 0
    first, _ = artefact_bin(counted(bulk + [150.0] * 50))  # 2.4 % at 15 times the norm
    assert counted(bulk + [150.0] * 50)[first:].sum() == 50
    first, _ = artefact_bin(counted([7.0] * 100 + [13.0]))  # hardly any spread: not twice the median
    assert bin_edge(first) == pytest.approx(14, rel=0.03)


def test_quantiles_are_those_of_the_values():
    values = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 9 + 1
    counts = torch.zeros(900, dtype=torch.int32)
    for value in values.tolist():
        counts[int((math.log10(value) - LOWEST) * PER_DECADE)] += 1
    for q in (0.01, 0.25, 0.5, 0.95):
        assert quantile(counts, q) == pytest.approx(float(values.quantile(q)), rel=0.03)


def test_norms_are_those_of_the_outputs():
    model = tiny(cls_pos=2, reg_pos=1, num_register_tokens=2)
    images, outputs = noise(model, 5), {}
    trace(model, images, output=outputs.__setitem__)
    norms = measured(model, images).result()["norms"]
    assert norms["cls"][:2] == [None, None]
    assert norms["registers"][0] is None
    assert "dist" not in norms
    for i in range(4):
        layout = model.token_layout(i)
        for kind, part in (("cls", layout.cls), ("registers", layout.registers), ("patches", layout.patches)):
            if part is None:
                continue
            expected, found = outputs[i][:, part].norm(dim=-1), norms[kind][i]
            assert found["mean"] == pytest.approx(float(expected.mean()), rel=1e-5)
            assert found["smallest"] == pytest.approx(float(expected.min()), rel=1e-5)
            assert found["largest"] == pytest.approx(float(expected.max()), rel=1e-5)
            assert found["mean_of_each"] == pytest.approx(expected.mean(dim=0).tolist(), rel=1e-5)
            assert sum(found["histogram"]["counts"]) == expected.numel()


# Attention -------------------------------------------------------------------------------------------------------


def test_a_head_that_looks_at_one_patch():
    """Head 1 of block 1 is made to look at one patch alone: entropy 0, its distance, all of CLS's share."""
    model = still(cls_pos=0, reg_pos=0, num_register_tokens=1, patch_size=(4, 8), img_size=(16, 24))  # grid 4 x 3
    seen = 2 * 3 + 1
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        for token in (model.pos_embed, model.cls_token, model.register_tokens):
            token.zero_()
            token[..., 1] = 1
        model.pos_embed[0, seen, 0] = 1
        model.pos_embed[0, seen, 1] = 0
        block = model.blocks[1]
        block.norm1.weight.fill_(1)
        block.norm1.bias.zero_()
        block.attn.qkv.weight.zero_()
        block.attn.qkv.bias.zero_()
        block.attn.qkv.bias[8:16] = 30  # every query of head 1
        block.attn.qkv.weight[24 + 8 : 24 + 16, 0] = 30  # its keys: large for the patch
    found = measured(model, torch.zeros(3, 3, 16, 24)).result()
    for kind in ("cls", "patches", "registers"):
        assert found["entropy"][kind][1][1] == pytest.approx(0, abs=1e-6)
        assert found["entropy"][kind][1][0] == pytest.approx(math.log(14), rel=1e-5)  # uniform
    places = [(y * 4, x * 8) for y in range(4) for x in range(3)]
    expected = sum(math.dist(place, (8, 8)) for place in places) / 12
    assert found["distance"][1][1] == pytest.approx(expected, rel=1e-5)
    uniform = sum(math.dist(a, b) for a in places for b in places) / 144
    assert found["distance"][1][0] == pytest.approx(uniform, rel=1e-5)
    shares = {kind: values[1] for kind, values in found["cls_attention"].items()}
    assert shares["patches"][1] == pytest.approx(1)
    assert [shares[kind][0] for kind in ("cls", "registers", "patches")] == pytest.approx([1 / 14, 1 / 14, 12 / 14])


def test_shares_are_the_models_and_add_up_to_one():
    model = tiny(cls_pos=1, dist_pos=2, reg_pos=3, num_register_tokens=2)
    images = noise(model, 5)
    found = measured(model, images).result()["cls_attention"]
    assert [values is None for values in found["registers"]] == [True, True, True, False]
    assert [values is None for values in found["cls"]] == [True, False, False, False]
    for i in (1, 2, 3):
        row = model.attention(images, i)[:, :, 0]
        registers = found["registers"][i] or [0] * 3
        dist = found["dist"][i] or [0] * 3
        for head in range(3):
            total = found["cls"][i][head] + registers[head] + found["patches"][i][head] + dist[head]
            assert total == pytest.approx(1, abs=1e-5)
        assert found["cls"][i] == pytest.approx(row[:, :, 0].mean(dim=0).tolist(), abs=1e-6)
        if i == 3:
            assert found["registers"][i] == pytest.approx(row[:, :, -2:].sum(-1).mean(0).tolist(), abs=1e-6)


def test_similarity_of_registers():
    model = still(cls_pos=2, reg_pos=1, num_register_tokens=3)
    with torch.no_grad():
        model.register_tokens.zero_()
        model.register_tokens[0, 0, 3] = 2
        model.register_tokens[0, 1, 3] = 5  # equal to the first one in direction
        model.register_tokens[0, 2, 7] = 1
    found = measured(model, noise(model, 3)).result()["register_similarity"]
    assert found[0] is None
    for cosines in found[1:]:
        assert torch.allclose(torch.tensor(cosines), torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]))


# Read-outs -------------------------------------------------------------------------------------------------------


def test_what_can_be_read_off_is_where_it_was_planted():
    """The class is in the patches; tokens in blocks that change nothing know nothing of it."""
    model = still(cls_pos=2, reg_pos=1, num_register_tokens=2)
    labels = torch.arange(60) % 3
    images = noise(model, 60) * 0.1
    images[torch.arange(60), labels] += 1.0  # the class is a colour
    statistics = measured(model, images, labels, batch=7)
    found = probe_accuracies(statistics.features, statistics.labels, 4)
    assert found["images"] == 60
    assert found["classes"] == 3
    assert found["chance"] == pytest.approx(100 / 3)
    for kind in ("linear", "neighbours"):
        assert set(found[kind]) == {"class token", "register 0", "register 1", "mean patch"}
        assert found[kind]["mean patch"] == [100] * 4
        assert found[kind]["class token"][:2] == [None, None]
        assert found[kind]["class token"][3] == pytest.approx(100 / 3, abs=0.1)  # it is the same for all images
        assert found[kind]["register 1"][0] is None


def test_few_images_of_a_class_are_left_out_of_the_readouts():
    features = {("class token", 0): [torch.randn(23, 4)]}
    found = probe_accuracies(features, [0] * 10 + [1] * 9 + [2] * 4, 1)
    assert (found["images"], found["classes"]) == (19, 2)
    assert found["chance"] == pytest.approx(100 * 10 / 19)
    assert probe_accuracies(features, [0] * 20 + [1] * 3, 1) is None


def test_tokens_of_no_more_images_than_asked_for_are_kept():
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2)
    statistics = measured(model, noise(model, 9), torch.arange(9) % 2, batch=4, probe_images=6)
    assert statistics.labels == [0, 1, 0, 1, 0, 1]
    assert {sum(map(len, parts)) for parts in statistics.features.values()} == {6}
    assert statistics.images == 9
    outputs = {}
    trace(model, noise(model, 9), output=outputs.__setitem__)
    for (token, block), parts in statistics.features.items():
        layout = model.token_layout(block)
        registers = outputs[block][:6, layout.registers] if layout.registers else None
        expected = {
            "class token": lambda x: x[:, 0],
            "mean patch": lambda x, layout=layout: x[:, layout.patches].mean(dim=1),
            "register 0": lambda x, registers=registers: registers[:, 0],
            "register 1": lambda x, registers=registers: registers[:, 1],
        }[token](outputs[block][:6])
        assert torch.allclose(torch.cat(parts), expected, atol=1e-5)
    assert len(statistics.features) == 3 + 4 + 2 * 2
    assert not measured(model, noise(model, 4)).features


def test_figures_do_not_depend_on_the_batches():
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2)
    images = noise(model, 6)
    one, other = (measured(model, images, batch=batch).result() for batch in (1, 4))
    assert flat(one) == pytest.approx(flat(other), rel=1e-4, abs=1e-5)


def flat(value):
    """All numbers in nested lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in flat(part)]
    return [value] if isinstance(value, (int, float)) else []


# Ablation --------------------------------------------------------------------------------------------------------


def batches_of(images, labels, size):
    return lambda: zip(images.split(size), labels.split(size))


def register_reader(**kwargs):
    """CLS copies the first register's dimension 2 in the last block; the class is whether that is above zero.

    In block 1 the registers copy the brightness of the image into that dimension.
    """
    model = still(depth=3, cls_pos=0, reg_pos=0, num_register_tokens=1, num_heads=1, num_classes=2, **kwargs)
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.weight[2, 0] = 1 / 16
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.zero_()
        model.cls_token.zero_()
        model.register_tokens.zero_()
        # A mark for each kind of token, with mean 0, so that norm1 leaves it in proportion.
        for token, mark in ((model.pos_embed, 5), (model.cls_token, 6), (model.register_tokens, 7)):
            token[..., mark], token[..., mark + 10] = 10, -10
        for block, asks, asked in ((1, 7, 5), (2, 6, 7)):
            attn, norm = model.blocks[block].attn, model.blocks[block].norm1
            norm.weight.fill_(1)
            norm.bias.zero_()
            attn.qkv.weight.zero_()
            attn.qkv.bias.zero_()
            query, key, value = attn.qkv.weight.split(24)
            query[0, asks] = key[0, asked] = 30
            query[1, 6] = 30
            key[1, 6] = 10  # else CLS looks at itself
            value[0, 2] = attn.proj.weight[2, 0] = 1
        model.norm.weight.fill_(1)
        model.norm.bias.zero_()
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.weight[1, 2] = 100
        model.head.weight[0, 3] = 100  # a dimension that nothing writes to
    return model


def test_ablation_of_the_way_that_the_class_takes():
    """Bright and dark images in turn: another image's register says the other class."""
    model = register_reader()
    labels = torch.arange(8) % 2
    images = torch.zeros(8, 3, 16, 24) + (2.0 * labels - 1)[:, None, None, None]
    for size in (8, 3, 1):
        found = ablate(model, batches_of(images, labels, size), ["registers", "cls_attention_to_registers"])
        assert found["images"] == 8
        assert found["clean"] == 100
        registers = found["registers"]
        assert registers["another image's"] == {
            "accuracy": 0, "difference": -100, "interval": [-100, -100], "changed": 100,
        }  # fmt: skip
        low, high = registers["mean"]["interval"]  # paired: half of the images lose
        assert registers["mean"]["difference"] == -50 and -100 <= low < -50 < high <= 0
        assert registers["mean"]["accuracy"] == 50  # the mean of bright and dark says nothing
        assert registers["zero"]["accuracy"] == 50
        attention = found["cls_attention_to_registers"]
        assert attention["another image's"]["accuracy"] == 100  # each looks at its own register as much
        assert attention["mean"]["accuracy"] == 100
        assert attention["zero"]["accuracy"] == 50


def test_replacing_by_ones_own_changes_nothing():
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2)
    images = noise(model, 1).expand(3, -1, -1, -1)  # the mean and another image's are the image's own
    found = ablate(model, batches_of(images, torch.zeros(3).long(), 2), ["registers", "cls_attention_to_registers"])
    for kind in ("registers", "cls_attention_to_registers"):
        for name in ("mean", "another image's"):
            same = {"accuracy": found["clean"], "difference": 0, "interval": [0, 0], "changed": 0}
            assert found[kind][name] == same


def test_tokens_that_never_meet_are_not_ablated():
    """To replace what no block has would change nothing, which reads as costing nothing."""
    model = tiny(cls_pos=2, reg_pos=0, reg_end=2, num_register_tokens=2)
    interventions.check(model, ["registers"])
    with pytest.raises(BadInput, match="registers and class token are together at no block"):
        interventions.check(model, ["cls_attention_to_registers"])


@pytest.mark.parametrize("kind", interventions.KINDS)
@torch.no_grad()
def test_each_kind_is_replaced(kind):
    """Also one that somebody adds: if its values never reached the model, it would cost nothing."""
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2)
    images = noise(model)
    logits, seen = recorded(model, images, [kind])
    assert torch.allclose(logits, model(images), atol=1e-5) and {name for name, _ in seen} == {kind}
    same, zero = (replaced(model, images, kind, {at: n * values for at, values in seen.items()}) for n in (1, 0))
    assert torch.allclose(same, logits, atol=1e-5) and not torch.allclose(zero, logits, atol=1e-3)


@torch.no_grad()
def test_the_rest_of_the_row_is_scaled_to_one(monkeypatch):
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2)
    images, rows = noise(model), {}
    _, seen = recorded(model, images, ["cls_attention_to_registers"])
    assert {block for _, block in seen} == {2, 3}
    expected = model.attention(images, 2)[:, :, 0]
    assert torch.allclose(seen["cls_attention_to_registers", 2], expected[..., -2:], atol=1e-6)

    def watched(model, images, attention):
        def both(i, attn):
            rows[i] = attention(i, attn)
            return rows[i]

        return trace(model, images, attention=both)

    monkeypatch.setattr("inspection.interventions.trace", watched)
    new = {("cls_attention_to_registers", 2): torch.full((3, 2), 0.1)}
    replaced(model, images, "cls_attention_to_registers", new)
    assert rows[3] is None
    row = rows[2][:, :, 0]
    assert torch.allclose(row.sum(dim=-1), torch.ones(2, 3), atol=1e-5)
    assert torch.allclose(row[..., -2:], torch.tensor(0.1))
    kept = expected[..., :-2] / expected[..., :-2].sum(dim=-1, keepdim=True) * 0.8
    assert torch.allclose(row[..., :-2], kept, atol=1e-5)


# The script ------------------------------------------------------------------------------------------------------


def test_the_script(trained, tmp_path):
    argv = ["--model_path", trained / "model.pth", "--output_dir", tmp_path, "--num_images", "60", "--device", "cpu"]
    out, _ = shell("analyze_tokens.py", *argv, "--ablate", "registers", "cls_attention_to_registers", cwd=tmp_path)
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert found["images"] == 60
    assert found["data"]["name"] == "DIGITS"
    assert found["norms"]["cls"][:2] == [None, None]
    assert found["norms"]["registers"][0] is None
    assert found["readout"]["linear"]["class token"][0] is None
    assert found["readout"]["linear"]["class token"][2] is not None
    assert found["ablation"]["clean"] == pytest.approx(found["accuracy"])
    lines = out.splitlines()
    assert "CLS enters at block 2, 2 registers at block 1; 60 images of DIGITS" in lines[0]
    rows = [line.split() for line in lines if line.split()[:1] in (["0"], ["1"], ["2"])]
    assert [row[:2] for row in rows[:3]] == [["0", "16"], ["1", "18"], ["2", "19"]]
    assert rows[0][3:5] == ["-", "-"]  # neither CLS nor registers yet
    assert "Accuracy with registers replaced: zero " in out
    pages = [page.extract_text() for page in PdfReader(tmp_path / "analysis.pdf").pages]
    titles = [
        "Norms of the tokens", "artefact patches", "Entropy of the attention", "Mean attention distance",
        "Where the class token's attention goes", "Do the registers differ?", "Linear and kNN probes",
        "What replaced tokens cost", "What is the output made of?", "sinks",
        "What would the model answer at each block?",
    ]  # fmt: skip
    assert len(pages) == len(titles), "add the title of a new page"
    for title, page in zip(titles, pages):
        assert title in page
        assert "60 images of DIGITS" in page
    again = tmp_path / "again"
    shell("analyze_tokens.py", *argv[:2], *argv[4:], "--output_dir", again, "--what", "norms", cwd=tmp_path)
    other = json.loads((again / "analysis.json").read_text())
    assert other["readout"] == found["readout"]  # the same images in the same order
    assert other["ablation"] is None


def test_which_images_are_looked_at(trained, tmp_path, capsys):
    chosen = []
    for seed, number in ((0, 9), (0, 4), (1, 4)):
        argv = ["--model_path", trained / "model.pth", "--output_dir", tmp_path, "--readout_images", "0"]
        argv += ["--num_images", number, "--seed", seed, "--device", "cpu", "--what", "norms"]
        assert run(main, argv, capsys)[0] == 0
        found = json.loads((tmp_path / "analysis.json").read_text())
        assert found["readout"] is None
        chosen.append(found["data"]["chosen"])
    assert chosen[0][:4] == chosen[1] != chosen[2]


def save(model, path, **data):
    about = {"name": "FOLDER", "classes": list("abcde"), "input_size": model.model_args["img_size"]}
    about |= {"mean": [0.5] * 3, "std": [0.25] * 3} | data
    save_checkpoint(path, {"model": model.state_dict(), "model_args": model.model_args, "data": about})
    return path


@pytest.mark.parametrize("kwargs", [{"cls_pos": None, "num_register_tokens": 0}, {"depth": 1}, {"dist_pos": 3}])
def test_any_model_on_files_of_any_shape(photos, tmp_path, capsys, kwargs):
    path = save(tiny(**kwargs), tmp_path / "m.pth")
    argv = ["--model_path", path, "--image_path", photos, "--output_dir", tmp_path / "new", "--device", "cpu"]
    status, out, err = run(main, argv, capsys)
    assert status == 0, err
    assert "No probes" in out
    found = json.loads((tmp_path / "new" / "analysis.json").read_text())
    assert found["images"] == 26
    assert found["accuracy"] is None
    assert len(PdfReader(tmp_path / "new" / "analysis.pdf").pages) >= 4


def test_unreadable_images_are_left_out_and_listed(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyze_tokens, "BATCH", 4)
    shutil.copytree(photos, tmp_path / "photos")
    argv = ["--model_path", save(tiny(), tmp_path / "m.pth"), "--image_path", tmp_path / "photos"]
    argv += ["--output_dir", tmp_path / "new", "--device", "cpu"]
    for name in ("train/red/0.png", "test/blue/1.png"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    status, out, err = run(main, argv, capsys)
    assert status == 1
    assert "2 of 26 images could not be read, the others are done: cannot read the image" in err
    assert err.count("\n") == 1
    assert out.count("left out: cannot read the image") == 2
    found = json.loads((tmp_path / "new" / "analysis.json").read_text())
    assert found["images"] == 24
    assert sum(found["norms"]["patches"][0]["histogram"]["counts"]) == 24 * 24
    assert len(found["data"]["left_out"]) == 2
    assert "24 images of" in PdfReader(tmp_path / "new" / "analysis.pdf").pages[0].extract_text()
    before = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    for file in (tmp_path / "photos").rglob("*.png"):
        file.write_bytes(b"no image")
    status, _, err = run(main, argv, capsys)
    assert status == 2 and "none of the 26 images can be read" in err
    assert {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()} == before


def test_ablation_with_unreadable_images(photos, tmp_path, capsys):
    """Of a dataset in folders: each pass leaves out the same ones, and accuracies are of the others."""
    shutil.copytree(photos, tmp_path / "data")
    path = save(tiny(num_classes=2), tmp_path / "m.pth", classes=["blue", "red"])
    for name in ("blue/0.png", "red/2.png"):
        (tmp_path / "data" / "test" / name).write_bytes(b"no image")
    argv = ["--model_path", path, "--data_path", tmp_path / "data", "--output_dir", tmp_path / "new"]
    argv += ["--ablate", "registers", "--device", "cpu"]
    status, _, err = run(main, argv, capsys)
    assert status == 1 and "2 of 6 images could not be read" in err
    found = json.loads((tmp_path / "new" / "analysis.json").read_text())
    assert found["images"] == found["ablation"]["images"] == 4
    assert found["accuracy"] == found["ablation"]["clean"]
    assert len(found["data"]["left_out"]) == 2
    for name in ("blue/1.png", "blue/2.png", "red/0.png"):
        (tmp_path / "data" / "test" / name).write_bytes(b"no image")
    status, _, err = run(main, argv, capsys)
    assert status == 2 and "only one can be read" in err


def test_memory_does_not_grow_with_the_images():
    """Everything that is kept has the size it had after the first images."""
    model = tiny(cls_pos=1, reg_pos=2, num_register_tokens=2)
    statistics = TokenStatistics(model, probe_images=2)

    def numbers():
        tensors = [norm.counts for norm in statistics.norms.values()]
        tensors += [part for moments in statistics.moments.values() for part in (moments.sum, moments.squares)]
        tensors += [part for parts in statistics.features.values() for part in parts]
        return sum(t.numel() for t in tensors) + len(statistics.labels)

    statistics.add(noise(model), torch.tensor([0, 1]))
    before = numbers()
    for _ in range(5):
        statistics.add(noise(model), torch.tensor([0, 1]))
    assert numbers() == before


def test_parts_that_are_asked_for(trained, tmp_path):
    """Only these are measured, drawn and printed; what a model lacks is refused by name."""
    flags = ["--num_images", "20", "--device", "cpu", "--output_dir", "."]
    out, _ = shell("analyze_tokens.py", "--model_path", trained / "model.pth", "--what", "causes", *flags, cwd=tmp_path)
    assert "Replacing the class token costs at most 1 point of top-1 up to block" in out and "patch" not in out
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert found["images"] == found["causes"]["images"] == 20
    assert "norms" not in found and "lens" not in found
    (page,) = (page.extract_text() for page in PdfReader(tmp_path / "analysis.pdf").pages)
    assert "Up to which block does it not matter what a token holds?" in page
    model = tiny(cls_pos=None, num_register_tokens=0)
    torch.save(model.state_dict(), tmp_path / "none.pth")
    picture().save(tmp_path / "a.png")
    foreign = ["--model_path", "none.pth", "--num_heads", "3", "--input_size", "16x24", "--image_path", "a.png"]
    _, err = shell("analyze_tokens.py", *foreign, "--what", "outputs", cwd=tmp_path, status=2)
    assert "outputs: this model has no class token" in err
    _, err = shell("analyze_tokens.py", *foreign, "--what", "causes", cwd=tmp_path, status=2)
    assert "causes: this model has neither a class token nor registers" in err
    out, _ = shell("analyze_tokens.py", *foreign, cwd=tmp_path)
    assert "note: outputs: this model has no class token" in out and "Lens on the mean patch" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--ablate nothing", "invalid choice"),
        ("--ablate registers", "this model has no registers"),
        ("--num_images -1", "at least 0"),
        ("--image_path nowhere.png", "nowhere.png"),
        ("--data_path nowhere", "give --data_path"),
        ("--output_dir PATH/m.pth/x --image_path PHOTOS", "cannot write"),
    ],
)
def test_bad_input(photos, tmp_path, capsys, flags, words):
    path = save(tiny(num_register_tokens=0), tmp_path / "m.pth")
    flags = flags.replace("PATH", str(tmp_path)).replace("PHOTOS", str(photos)).split()
    status, _, err = run(
        main, ["--model_path", path, "--output_dir", tmp_path / "new", "--device", "cpu", *flags], capsys
    )
    assert status == 2
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new" / "analysis.json").exists()


def test_ablation_needs_classes(photos, tmp_path, capsys):
    path = save(tiny(), tmp_path / "m.pth")
    argv = ["--model_path", path, "--image_path", photos, "--ablate", "registers", "--device", "cpu"]
    status, _, err = run(main, [*argv, "--output_dir", tmp_path / "new"], capsys)
    assert status == 2
    assert "have no classes" in err
    path = save(tiny(cls_pos=None), tmp_path / "m.pth")
    status, _, err = run(main, [*argv[:4], "--ablate", "cls_attention_to_registers"], capsys)
    assert status == 2
    assert "no class token" in err


def test_the_table_shows_what_is_absent():
    figures = measured(tiny(cls_pos=2, reg_pos=3), noise(tiny())).result() | {"readout": None}
    lines = table(figures).splitlines()
    assert lines[-4].split()[3:5] == ["-", "-"]
    assert lines[-1].count("-") == 0


def test_the_table_fits_100_columns():
    figures = measured(tiny(cls_pos=2, reg_pos=3), noise(tiny())).result()
    probes = {f"register {r}": [None, None, None, 12.5] for r in range(16)}
    text = table(figures | {"readout": {"linear": probes}})
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("block") > 1
    for title in ("norm", "artefacts", "entropy"):
        assert title in text
    assert text.count("12.5%") == 16


def of_a_sweep(trained, folder):
    """Finished cells with the same weights: CLS at 2 and at 0."""
    records = []
    for cls, reg in ((2, 1), (0, 0)):
        records.append({"cls_pos": cls, "reg_pos": reg, "num_reg": 2, "seed": 0})
        path = pages.path_of(folder, records[-1])
        path.parent.mkdir(parents=True)
        path.write_bytes((trained / "model.pth").read_bytes())
    return folder, records, {"best": records[0]}


@pytest.mark.parametrize("what", ["pages", "html", "analysis", "objects", "behaviour", "sweep page"])
def test_maps_and_figures_are_computed_in_full_precision(trained, tmp_path, monkeypatch, capsys, what):
    """As in `evaluate`, even where the program around it, or the user, allows TF32."""
    seen, forward = set(), PatchEmbed.forward

    def watched(self, images):
        seen.add((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return forward(self, images)

    monkeypatch.setattr(PatchEmbed, "forward", watched)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    argv = ["--model_path", trained / "model.pth", "--output_dir", tmp_path, "--device", "cpu"]
    script, more = {
        "pages": (visualize_attention, "--pages heads rollout --layer_num 2"),
        "html": (visualize_attention, "--format html"),
        "analysis": (analyze_tokens, "--num_images 9 --ablate registers"), "objects": (discover_objects, "--img_num 0"),
    }.get(what, (None, ""))  # fmt: skip
    try:
        if script:
            assert run(script.main, [*argv, *more.split()], capsys)[0] == 0
        elif what == "behaviour":
            measures.measured(trained / "model.pth", load_data("DIGITS", None, (32, 32)), torch.device("cpu"))
        else:
            no_overlaps(pages.attention_page(*of_a_sweep(trained, tmp_path), load_data("DIGITS", None, (32, 32))))
        assert seen == {(False, "highest")}
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, "high")
    finally:
        torch.set_float32_matmul_precision(precision)
