"""What a cell of a sweep is measured by beside its accuracy, and old records without it."""

import json

import numpy as np
import pytest
import torch

import position_sweep
from checkpoints.models import load_model
from conftest import run
from datasets import Split
from inspection import causes, sinks
from loading.memory import MemoryLoader, load_data
from sweep import cells, measures, results
from test_sweep import ONE, RECIPE, record, sweep
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
    curve = causes.measure(model, lambda: MemoryLoader(part, checkpoint["data"], 20))["tokens"]["cls"]["its initial"]
    assert found["causal_cost"][:2] == [None, None] and found["causal_cost"] == pytest.approx(curve["cost"])
    assert found["causal_cost_interval"][2] == pytest.approx(curve["cost_interval"][2])
    assert found["causal_depth"] == (1 if curve["harmless_until"] is None else 2)
    on = sinks.measure(model, lambda: MemoryLoader(part, checkpoint["data"], 20))["kinds"]
    assert found["sinks_on_patches"] == pytest.approx(100 * sum(on["patches"]["sink"]) / 3)
    assert found["sinks_on_registers"] == pytest.approx(100 * sum(on["registers"]["sink"][1:]) / 3)
    assert sum(found[f"cls_to_{kind}"] for kind in ("patches", "registers", "itself")) == pytest.approx(100, abs=1e-3)


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


def test_a_cell_without_tokens_is_trained_without_pictures(tmp_path, capsys):
    argv = [*RECIPE, *"--cls_pos 0 none --reg_pos 0 --num_reg 0 --seeds 0 --epochs 1 --viz_every 1".split()]
    out = sweep(capsys, tmp_path, *argv, "--viz_images", "3")
    assert out.count("note: --viz_every draws nothing for cells without CLS and registers") == 1
    assert (tmp_path / "cells/cls0_x0_seed0/attention/attention.pdf").is_file()
    assert not (tmp_path / "cells/clsnone_x0_seed0/attention").exists()
    assert (tmp_path / "cells/clsnone_x0_seed0/result.json").is_file()
    assert "note:" not in run(position_sweep.main, [*map(str, argv), "--output_dir", str(tmp_path)], capsys)[1]
    assert "note:" not in sweep(capsys, tmp_path / "one", *ONE, "--epochs", "1", "--viz_every", "1")
