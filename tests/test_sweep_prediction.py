"""Whether the causal curve of CLS at 0 predicts the trained grid: planted records, and one sweep of the script."""

import json

import numpy as np
import pytest

from pages import no_overlaps
from sweep import cells, measures, pages, prediction, results
from sweep.prediction import predictions
from test_sweep import RECIPE, record, sweep

BASE = 80.0
COST = [0.0, 2, 5, 10, 20]  # of replacing CLS at the output of block 0, 1, ...


def base(seed, cost, reg=0, test=BASE):
    ends = [[c - 1, c + 2] for c in cost]
    return record(0, reg, 4, seed, test) | {"causal_cost": list(cost), "causal_cost_interval": ends}


def planted(change, seeds=3, noise=0.0, cost=COST):
    """Cells with CLS at 0 to 4; CLS at k changes the accuracy by `change[k - 1]`."""
    chance, records = np.random.default_rng(0), []
    for seed in range(seeds):
        records.append(base(seed, cost))
        for k, points in enumerate(change, 1):
            records.append(record(k, 0, 4, seed, BASE + points + noise * chance.normal()))
    return records


def test_a_perfect_prediction():
    found = predictions(planted([0, -2, -5, -10]))
    for name in ("pearson", "spearman"):
        assert list(found[name].values()) == pytest.approx([1, 1, 1])
    assert len(found["cells"]) == 12 and "Yes, in its order." in found["verdict"]
    assert "Spearman +1.00 (+1.00 to +1.00)" in found["verdict"] and "3 seeds, 4 positions" in found["verdict"]
    noisy = predictions(planted([0, -2, -5, -10], noise=0.3))
    assert noisy["pearson"]["low"] > 0.9 and noisy["pearson"]["value"] < 1
    opposite = predictions(planted([-10, -5, -2, 0], noise=0.3))
    assert "No: in the opposite order." in opposite["verdict"] and opposite["spearman"]["high"] < 0


def test_a_shuffled_prediction():
    """The same changes at other positions: the interval contains 0."""
    found = predictions(planted([-5, -2, -10, 0], noise=0.3))
    for name in ("pearson", "spearman"):
        assert found[name]["low"] < 0 < found[name]["high"] and abs(found[name]["value"]) < 0.6
    assert "Not beyond noise." in found["verdict"]


def test_each_cell_is_compared_with_the_one_beside_it():
    """CLS at k with the curve at block k - 1, of the same registers and seed."""
    records = [base(0, COST), base(1, [9.0, 9, 9, 9]), base(0, [1.0, 1], reg=2, test=70), record(3, 0, 4, 0, 72)]
    records += [record(2, 2, 4, 0, 71), record(3, 2, 4, 0, 71), record(2, 5, 4, 0, 71), record(None, 0, 4, 0, 99)]
    records.append({k: v for k, v in record(1, 0, 4, 1, 82).items() if k != "test_hits"})
    found = predictions(records)["cells"]
    assert [(c["cls_pos"], c["reg_pos"], c["seed"], c["predicted"], c["measured"]) for c in found] == [
        (3, 0, 0, -5, pytest.approx(-8)), (2, 2, 0, -1, pytest.approx(1)), (1, 0, 1, -9, pytest.approx(2))
    ]  # fmt: skip
    assert found[0]["predicted_interval"] == [-7, -4] and found[2]["measured_interval"] is None
    low, high = found[0]["measured_interval"]  # 8 % of the images are lost, none is won
    assert (low + high) / 2 == pytest.approx(-8, abs=0.3)
    assert high - low == pytest.approx(2 * 196 * (0.08 * 0.92 / 400) ** 0.5, rel=0.1)


def test_what_cannot_be_judged():
    few = planted([0, -2, -5], seeds=1)
    assert "cannot be judged: it takes 4 cells with CLS after block 0, at 3 positions" in predictions(few)["verdict"]
    assert (
        "there are 3 such cells at 3 positions; add some to --cls_pos" in predictions(few)["verdict"]
        and predictions(few)["pearson"] is None
    )
    assert "6 such cells at 2 positions" in predictions(planted([0, -2]))["verdict"]
    assert "0 such cells at 0 positions" in predictions([base(0, COST), record(1, 0, 4, 0, 70)])["verdict"]
    assert "the same at all positions" in predictions(planted([-3, -3, -3]))["verdict"]
    assert predictions([record(0, 0, 4, 0, 80), record(1, 0, 4, 0, 70)]) == {  # of an earlier revision
        "cells": [], "pearson": None, "spearman": None, "verdict": ""
    }  # fmt: skip


def test_the_noise_of_the_cell_with_cls_at_0_correlates_nothing():
    """It is in what is predicted and in what is measured; here they have nothing else in common."""
    chance, records = np.random.default_rng(0), []
    for seed in range(5):
        luck = 10 * chance.normal()
        records.append(base(seed, 5 + luck + chance.normal(size=5), test=60 + luck))
        records += [record(k, 0, 4, seed, 55 + chance.normal()) for k in (1, 2, 3, 4)]
    found = predictions(records)
    raw = np.corrcoef([(c["predicted"], c["measured"]) for c in found["cells"]], rowvar=False)[0, 1]
    assert raw > 0.9 and abs(found["pearson"]["value"]) < 0.5 and "Not beyond noise" in found["verdict"]


def test_a_cell_counts_as_often_as_it_is_drawn():
    x, y = np.random.default_rng(0).normal(size=(2, 6))
    weights = np.array([[1, 1, 1, 1, 1, 1], [2, 0, 3, 1, 0, 1], [4, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    found = prediction.correlation(x, y, weights)
    drawn = [np.repeat(np.arange(6), w) for w in weights[:2]]
    assert found[:2] == pytest.approx([np.corrcoef(x[d], y[d])[0, 1] for d in drawn]) and np.isnan(found[2:]).all()


@pytest.mark.parametrize(("positions", "seeds"), [(3, 3), (4, 3), (6, 5)])
def test_of_300_grids_without_a_relation_few_are_found_to_have_one(positions, seeds):
    """What a position costs and what it changes are independent; cells of one position or seed have much in common."""
    chance, false = np.random.default_rng(positions), 0
    for _ in range(300):
        luck, shifts = chance.normal(size=seeds), chance.normal(0, 1.5, (2, positions))
        values = shifts[:, None] - luck[:, None] + chance.normal(0, 0.5, (2, seeds, positions))
        grid = [
            {"cls_pos": k + 1, "reg_pos": 0, "num_reg": 4, "seed": s, "predicted": x, "measured": y}
            for s in range(seeds) for k, (x, y) in enumerate(values[:, s].T)
        ]  # fmt: skip
        found = prediction.correlations(grid)["spearman"]
        false += found["low"] > 0 or found["high"] < 0
    assert false <= 24  # 15, and three standard deviations less than one


def test_a_damaged_curve_is_refused():
    good = base(0, COST) | {"best_epoch": 1, "test_top5": 99, "test_loss": 0.5, "repeats": 1, "train_seconds": 1.5}
    good |= {"artefacts_begin_at": None}
    assert cells.wrong_result(good) is None
    for wrong in (
        {"causal_cost": [None, *COST[1:]]}, {"causal_cost": []}, {"causal_cost": None}, {"causal_cost_interval": None},
        {"cls_pos": 1}, {"cls_pos": None}, {"causal_cost": COST[1:]},
    ):  # fmt: skip
        assert cells.wrong_result(good | wrong) == "causal_cost"


def test_tables_and_page():
    records = planted([0, -2, -5, -10], noise=0.3) + [record(None, 0, 4, s, 70) for s in range(3)]
    found = predictions(records)
    text = results.markdown(results.summarise(records) | {"prediction": found})
    assert "| 4 | 4 | 0 | 3 | -10.00 | -" in text and text.strip().endswith(found["verdict"])
    figure = pages.prediction_page(found, "")
    no_overlaps(figure)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["CLS at 1", "CLS at 2", "CLS at 3", "CLS at 4", "4 registers at 0"]
    points = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1 and line.get_marker() == "o"]
    assert len(points) == 12 and len({tuple(line.get_color()) for line in points}) == 4
    assert "predicted" not in results.markdown(results.summarise(records))


def test_a_sweep_by_the_script(tmp_path, capsys, monkeypatch):
    from pypdf import PdfReader

    monkeypatch.setattr(measures, "IMAGES", 64)
    argv = [*RECIPE, *"--depth 5 --cls_pos 0 1 2 3 4 --reg_pos 0 --num_reg 0 --seeds 0 --epochs 1 --repeats 1".split()]
    out = sweep(capsys, tmp_path, *argv)
    written = json.loads((tmp_path / "results.json").read_text())
    found = written["prediction"]
    of = {cell["cls_pos"]: cell for cell in written["cells"]}
    assert [cell["cls_pos"] for cell in found["cells"]] == [1, 2, 3, 4] and len(of[0]["causal_cost"]) == 5
    for cell in found["cells"]:
        assert cell["predicted"] == -of[0]["causal_cost"][cell["cls_pos"] - 1]
        assert cell["measured"] == pytest.approx(of[cell["cls_pos"]]["test_top1"] - of[0]["test_top1"])
    assert "Does the causal curve of the model with CLS at 0 predict where CLS can enter?" in out
    assert found["verdict"] in (tmp_path / "results.md").read_text()
    text = [" ".join(page.extract_text().split()) for page in PdfReader(tmp_path / "sweep.pdf").pages]
    assert sum("Does a trained model say where CLS can enter?" in page for page in text) == 1
