"""What a cell of a sweep is measured by beside its accuracy, and old records without it."""

import json

import numpy as np
import pytest
import torch
from pypdf import PdfReader
from scipy import stats

import position_sweep
from checkpoints.models import load_model
from checkpoints.schema import CELL_RESULT
from datasets import Split
from inspection import causes, sinks
from loading.memory import MemoryLoader, load_data
from runs import run
from sweep import cells, measures, pages, results
from test_models_dynamic_attention import SigmoidAttention
from test_sweep import ONE, RECIPE, record, sweep
from tokens.blocks import TokenAttention
from utils import BadInput

NEW = {
    "causal_depth": 1, "causal_depth_low": -1, "causal_depth_high": 2, "causal_cost": [0.0, 2.5],
    "causal_cost_interval": [[-1.0, 2], [1, 4]], "sinks_on_cls": 12.5, "sinks_on_registers": None,
    "sinks_on_patches": 3.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return load_data("DIGITS", None, (32, 32))


def planted(trained, tmp_path, **weights):
    """The trained checkpoint (3 blocks, CLS at 2, registers at 1), with some weights times a number."""
    checkpoint = torch.load(trained / "model.pth", weights_only=True)
    for name, factor in weights.items():
        checkpoint["model"][name.replace("__", ".")] *= factor
    torch.save(checkpoint, tmp_path / "m.pth")
    return tmp_path / "m.pth"


def test_the_record_has_what_the_parts_of_inspection_measure(trained, data, monkeypatch):
    monkeypatch.setattr(measures, "IMAGES", 60)
    found = measures.measured(trained / "model.pth", data, torch.device("cpu"))
    model, checkpoint = load_model(trained / "model.pth")
    order = torch.randperm(360, generator=torch.Generator().manual_seed(0))[:60]
    part = Split(data.test.images[order], data.test.labels[order])
    assert len(set(part.labels.tolist())) == 10
    described = {key.removesuffix("?") for key in CELL_RESULT}
    assert found.keys() <= described, "describe a new measure in checkpoints/schema.CELL_RESULT"
    assert {name for name, _ in measures.PRIMARY.values()} <= measures.TITLES.keys() <= described
    assert measures.TITLES.keys() <= {*results.COLUMNS}
    curve = causes.measure(model, lambda: MemoryLoader(part, checkpoint["data"], 20))["tokens"]["cls"]["its initial"]
    assert found["causal_cost"][:2] == [None, None] and found["causal_cost"] == pytest.approx(curve["cost"])
    assert found["causal_cost_interval"][2] == pytest.approx(curve["cost_interval"][2])
    assert found["causal_depth"] == (1 if curve["harmless_until"] is None else 2)
    on = sinks.measure(model, lambda: MemoryLoader(part, checkpoint["data"], 20))["kinds"]
    assert found["sinks_on_patches"] == pytest.approx(100 * sum(on["patches"]["sink"]) / 3)
    assert found["sinks_on_registers"] == pytest.approx(100 * sum(on["registers"]["sink"][1:]) / 3)
    assert sum(found[f"cls_to_{kind}"] for kind in ("patches", "registers", "itself")) == pytest.approx(100, abs=1e-3)


def test_attention_that_cannot_be_seen_is_absent(trained, data, monkeypatch):
    """A sweep of another kind of attention has its other measures; sinks were 0 there, and shares a crash."""
    monkeypatch.setattr(measures, "IMAGES", 60)
    monkeypatch.setattr(TokenAttention, "forward", SigmoidAttention.forward)
    found = measures.measured(trained / "model.pth", data, torch.device("cpu"))
    absent = {name for name, value in found.items() if value is None}
    assert {"sinks_on_cls", "sinks_on_patches", "cls_to_patches", "cls_to_itself"} <= absent
    assert found["artefact_share"] >= 0 and found["causal_cost"][2] is not None


def test_planted_depths(trained, tmp_path, data):
    """A head that sees no token loses nothing; one that needs CLS loses it from the first block on."""
    found = measures.measured(planted(trained, tmp_path, head__weight=0), data, torch.device("cpu"))
    assert [found[f"causal_depth{end}"] for end in ("", "_low", "_high")] == [2, 2, 2]
    assert found["causal_cost"] == [None, None, 0] and found["causal_cost_interval"][2] == [0, 0]
    model, _ = load_model(trained / "model.pth")

    class Reader(torch.nn.Module):
        """All images are of class 0 or 1 by the sign of CLS's first number, which is 0 at entry."""

        def forward(self, x):
            return torch.stack([x[..., 0], -x[..., 0], *([0 * x[..., 0] - 9] * 8)], dim=-1)

    model.head, model.norm = Reader(), torch.nn.Identity()
    with torch.no_grad():
        model.cls_token.zero_()
        images = torch.randn(80, 3, 32, 32)
        labels = model(images).argmax(dim=1)
    assert 0 < labels.float().mean() < 1
    found = measures.causal_depth(model, lambda: [(images, labels)])
    assert found["causal_cost"][2] == pytest.approx(100 * labels.float().mean())
    assert [found[f"causal_depth{end}"] for end in ("", "_low", "_high")] == [1, 1, 1]  # the block before its entry


def test_without_cls_there_is_no_depth():
    class Model:
        cls_pos = None

    assert set(measures.causal_depth(Model, None).values()) == {None}


def test_old_records_load_and_wrong_ones_do_not(tmp_path):
    """Each new part may be missing, but not be something else."""
    file = tmp_path / "cells" / "a" / "result.json"
    file.parent.mkdir(parents=True)
    old = record(0, 0, 1, 0, 90) | dict.fromkeys(
        ("best_epoch", "test_top5", "test_loss", "repeats", "train_seconds"), 1
    )
    old |= {"artefacts_begin_at": None}
    file.write_text(json.dumps(old))
    assert cells.read_record(file) == old
    rows = results.write_tables(tmp_path, {})["groups"]
    assert rows[0]["causal_depth"] is rows[0]["sinks_on_cls"] is None
    file.write_text(json.dumps(old | NEW))
    assert cells.read_record(file) == old | NEW
    text = results.markdown(results.summarise([old | NEW]))
    assert "| **1.0** | **12.5 %, -, 3.2 %** |" in text
    for wrong in (
        {"causal_depth": 1.5}, {"causal_depth_low": -2}, {"causal_cost": 3}, {"causal_cost": [101]},
        {"causal_cost_interval": [[0]]}, {"sinks_on_cls": "12"}, {"sinks_on_patches": 101}, {"causal_cost": [np.nan]},
    ):  # fmt: skip
        file.write_text(json.dumps(old | NEW | wrong))
        with pytest.raises(BadInput, match=f"{next(iter(wrong))} missing or wrong"):
            cells.read_record(file)


def test_a_cell_without_tokens_is_trained_without_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measures, "IMAGES", 64)
    argv = [*RECIPE, *"--cls_pos 0 none --reg_pos 0 --num_reg 0 --seeds 0 --epochs 1 --viz_every 1".split()]
    out = sweep(capsys, tmp_path, *argv, "--viz_images", "3")
    assert out.count("note: --viz_every draws nothing for cells without CLS and registers") == 1
    assert (tmp_path / "cells/cls0_x0_seed0/attention/attention.pdf").is_file()
    assert not (tmp_path / "cells/clsnone_x0_seed0/attention").exists()
    assert (tmp_path / "cells/clsnone_x0_seed0/result.json").is_file()
    assert "note:" not in run(position_sweep.main, [*map(str, argv), "--output_dir", str(tmp_path)], capsys)[1]


def measured_grid(values, **changes):
    """`values`: {CLS at: artefact shares by seed}; the accuracies say the opposite."""
    return [
        record(cls, 0, 4, seed, 90 - share) | {"artefact_share": share} | changes
        for cls, shares in values.items() for seed, share in enumerate(shares)
    ]  # fmt: skip


def test_a_verdict_on_another_measure():
    """Differences -9, -10, -11: mean -10, deviation 1; Student's t with 2 degrees of freedom, 2 comparisons."""
    records = measured_grid({0: [20.0, 20, 20], 2: [11.0, 10, 9], 4: [30.0, 29, 31]})
    found = results.summarise(records, "artefacts")
    assert found["best"]["cls_pos"] == 2 and found["measure"] == "artefacts"
    against = next(row["against_0_0"] for row in found["groups"] if row["cls_pos"] == 2)
    half = stats.t.ppf(1 - 0.05 / 4, 2) / 3**0.5
    assert [against[end] for end in ("mean", "low", "high")] == pytest.approx([-10, -10 - half, -10 + half])
    assert (
        f"Best by artefacts (less is better): CLS at 2, 4 registers at 0, 10.00 ± 1.00 (3 seeds). That is -10.00 "
        f"against 0/0 (95 % interval {-10 - half:+.2f} to {-10 + half:+.2f} over 3 seeds, corrected for 2 "
        "comparisons): better beyond seed noise."
    ) == found["verdict"]
    text = results.markdown(found)
    assert "| test % | artefacts | against 0/0" in text and "Intervals: of artefacts, 95 %" in text
    assert "All other measures are exploratory" in text and "test images" not in text.partition("Intervals")[2]
    worse = measured_grid({0: [20.0, 20, 20], 2: [11.0, 10, 9], 4: [30.0, 29, 31]}, test_loss=1.0)
    for one in worse:
        one["test_loss"] = one["artefact_share"] / 100
    assert "Best by loss (less is better): CLS at 2" in results.summarise(worse, "loss")["verdict"]
    assert results.summarise(records)["best"]["cls_pos"] == 2  # by accuracy


def test_a_measure_that_is_better_if_it_is_more():
    records = measured_grid({0: [20.0, 20, 20], 2: [11.0, 10, 9]})
    for one in records:
        one["test_top5"] = one["artefact_share"] + 70
    assert "Best by top5 (more is better): CLS at 0" in results.summarise(records, "top5")["verdict"]
    for one in records:
        one["test_top5"] = 100 - one["artefact_share"]
    found = results.summarise(records, "top5")["verdict"]
    assert "CLS at 2" in found and "That is +10.00 against 0/0" in found and "better beyond seed noise" in found
    few = [one for one in records if one["seed"] < 2]
    assert "no verdict: it needs 3 common seeds, there are 2" in results.summarise(few, "top5")["verdict"]
    close = measured_grid({0: [20.0, 21, 22], 2: [19.0, 22, 21]})
    assert "no difference beyond seed noise" in results.summarise(close, "artefacts")["verdict"]


def test_cells_that_lack_the_measure():
    """Those of an earlier revision have no sinks."""
    records = measured_grid({0: [20.0, 20, 20], 2: [11.0, 10, 9]})
    found = results.summarise(records, "patch_sinks")
    assert found["verdict"].startswith("No finished cell has patch_sinks") and found["best"] is None
    assert "| - | - |" in results.markdown(found) and pages.heat_maps(found, "")
    new = [one | {"sinks_on_patches": 5.0 - one["seed"]} if one["cls_pos"] else one for one in records]
    found = results.summarise(new, "patch_sinks")
    assert found["best"]["cls_pos"] == 2 and "no 0/0 cell" in found["verdict"]


def test_the_flag_changes_the_verdict_and_no_cell(tmp_path, capsys):
    argv = [*ONE, *"--cls_pos 0 1 --epochs 1".split()]
    sweep(capsys, tmp_path, *argv)
    out = sweep(capsys, tmp_path, *argv, "--measure", "loss")
    written = json.loads((tmp_path / "results.json").read_text())
    assert "Test accuracy" not in out and "Best by loss (less is better)" in out and written["measure"] == "loss"
    losses = {cell["cls_pos"]: cell["test_loss"] for cell in written["cells"]}
    assert written["best"]["cls_pos"] == min(losses, key=losses.get)
    text = " ".join(PdfReader(tmp_path / "sweep.pdf").pages[0].extract_text().split())
    assert "Where the tokens enter, and loss" in text and f"{losses[0]:.2f}" in text
    assert "Best by loss (less is better)" in (tmp_path / "sweep.html").read_text()
    assert "invalid choice" in sweep(capsys, tmp_path, *argv, "--measure", "flops", status=2)
    needs = "--measure hit_ratio needs boxes and masks, which only DIGITS_SCENES has"
    assert needs in sweep(capsys, tmp_path, *argv, "--measure", "hit_ratio", status=2)
