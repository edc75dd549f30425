"""The pages of analysis.pdf as somebody prints them."""

import pytest
import torch
from matplotlib.text import Text

import analyze_tokens
from checkpoints.files import save_checkpoint
from inspection.statistics import TokenStatistics
from inspection.statistics_pages import artefacts_page, norms_page, where_artefacts
from pages import no_overlaps
from runs import noise, tiny

EVERYTHING = "--what norms attention outputs sinks lens causes --causes_images 8 "
EVERYTHING += "--ablate registers cls_attention_to_registers"


def words(figure):
    return " ".join(" ".join(text.get_text() for text in figure.findobj(Text)).split())


def results_of(model, images):
    statistics = TokenStatistics(model)
    statistics.add(images, None)
    about = {"model": {"path": "runs/late/best_model.pth", "is": "a model"}, "data": {"name": "X", "image_path": None}}
    return statistics.result() | about


@pytest.fixture
def figures(monkeypatch):
    found = []
    monkeypatch.setattr(analyze_tokens, "write_pdf", lambda pages, file: found.extend(pages))
    return found


def test_no_text_of_a_page_is_cut_or_covered(trained, tmp_path, figures):
    argv = ["--model_path", trained / "model.pth", "--output_dir", tmp_path, "--num_images", "60", "--device", "cpu"]
    analyze_tokens.main([*map(str, argv), *EVERYTHING.split()])
    assert len(figures) == 12, "add a new page to this number"
    for figure in figures:
        no_overlaps(figure)
        assert f"{trained.name}/model.pth: 3 blocks" in words(figure)
    ablation = next(words(figure) for figure in figures if "What replaced tokens cost" in words(figure))
    assert "CLS attention to registers: another image's" in ablation
    assert "change of accuracy (points)" in ablation and "95% paired bootstrap" in ablation


def test_12_blocks_of_12_heads(photos, tmp_path, figures):
    model = tiny(depth=12, num_heads=12, cls_pos=3, reg_pos=0, num_register_tokens=4)
    data = {"name": "X", "classes": list("abcde"), "mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (16, 24)}
    checkpoint = {"model": model.state_dict(), "model_args": model.model_args, "data": data}
    save_checkpoint(tmp_path / "m.pth", checkpoint)
    argv = ["--model_path", tmp_path / "m.pth", "--image_path", photos / "test", "--output_dir", tmp_path]
    analyze_tokens.main([*map(str, argv), "--device", "cpu"])
    assert len(figures) > 8
    for figure in figures:
        no_overlaps(figure)


def test_a_model_without_artefacts_has_a_sentence_and_one_with_has_steps():
    model = tiny(cls_pos=0, reg_pos=0)
    results = results_of(model, noise(model))
    results["artefacts"]["begins_at_block"] = None
    for i, found in enumerate(results["artefacts"]["blocks"]):
        found |= {"share": 0, "threshold": results["norms"]["patches"][i]["largest"] * (1.25 if i == 2 else 2)}
    page = artefacts_page(results)
    assert not page.axes
    assert "late/best_model.pth: a model" in words(page)
    assert "No patch is above its block's threshold. Block 2 comes closest" in words(page)
    no_overlaps(page)

    assert where_artefacts(results["artefacts"]) == "none in any block"
    results["artefacts"]["blocks"][1]["share"] = 0.0005  # too few for a beginning, and not none
    assert "artefact patches: under 0.1% in each block" in words(artefacts_page(results))

    page = norms_page(results)
    no_overlaps(page)
    steps = [line for line in page.axes[-2].lines if line.get_color() == "tab:red"]
    assert [list(line.get_ydata()) for line in steps] == [[f["threshold"]] * 2 for f in results["artefacts"]["blocks"]]
    assert [list(line.get_xdata()) for line in steps] == [[i - 0.5, i + 0.5] for i in range(4)]

    results["artefacts"]["begins_at_block"] = 1
    results["artefacts"]["blocks"][1] |= {"share": 0.02, "where": torch.rand(4, 6).tolist()}
    no_overlaps(artefacts_page(results))
    assert "from block 1 on" in words(artefacts_page(results)) and "block 1: 2%" in words(artefacts_page(results))
