"""How pages of maps are laid out and coloured, how images are fitted, and names in any script."""

import io
import os

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from pypdf import PdfReader

import visualize_attention
from checkpoints.files import load_checkpoint
from checkpoints.models import at_size, model_from_checkpoint
from datasets import eval_transform
from inspection import fonts, inputs, map_pages, objects_pages
from inspection.map_pages import Look, draw_page, parts_of
from inspection.pages import MapCell, Page, Row, write_pdf
from pages import no_overlaps
from runs import run, saved_model, tiny
from visualize_attention import main

MEAN = {"mean": [0.5, 0.25, 0], "std": [0.25] * 3}


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "late").mkdir()
    model = tiny(img_size=16, cls_pos=2, reg_pos=1, num_register_tokens=2)
    return saved_model(tmp_path / "late" / "best_model.pth", model, **MEAN)


@pytest.fixture
def wide(tmp_path):
    """80 x 40 pixels: red at the left, blue at the right."""
    image = Image.new("RGB", (80, 40), "red")
    image.paste("blue", (40, 0, 80, 40))
    image.save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


@pytest.fixture
def drawn(monkeypatch):
    pages = {}

    def kept(page, *others):
        pages[page.key] = (page, draw_page(page, *others))
        no_overlaps(pages[page.key][1])
        return pages[page.key][1]

    monkeypatch.setattr(visualize_attention, "draw_page", kept)
    return pages


def flags(checkpoint, image, folder, *more):
    return ["--model_path", checkpoint, "--image_path", image, "--output_dir", folder, "--device", "cpu", *more]


def words_of(figure) -> str:
    return " ".join(" ".join(text.get_text().split()) for text in figure.texts)


def test_native_shape(checkpoint, wide, tmp_path, capsys, drawn):
    status, _, err = run(main, flags(checkpoint, wide, tmp_path, "--fit", "native"), capsys)
    assert status == 0, err
    page, figure = drawn["block2_cls"]
    assert page.rows[0].cells[0].map.shape == (2, 4)
    assert "late/best_model.pth; image: wide.png, whole image of 80 x 40 pixels" in words_of(figure)
    model = at_size(model_from_checkpoint(load_checkpoint(checkpoint)), (8, 16))
    pixels = Image.open(wide).resize((16, 8), Image.Resampling.BICUBIC)
    images = eval_transform(torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None], {"input_size": (8, 16), **MEAN})
    expected = model.attention_maps(images, [2])[2].cls[0]
    found = torch.stack([cell.map for cell in page.rows[0].cells[1:]])
    assert torch.allclose(found, expected, atol=1e-6)
    for more in (["--patch", "1,1"], ["--format", "html"]):
        status, _, err = run(main, flags(checkpoint, wide, tmp_path, "--fit", "native", *more), capsys)
        assert status == 2 and "leave out --format html and --patch" in err


def test_the_whole_image_with_bars(checkpoint, wide, tmp_path, capsys, drawn):
    assert run(main, flags(checkpoint, wide, tmp_path, "--fit", "pad"), capsys)[0] == 0
    page, figure = drawn["block2_cls"]
    shown = page.rows[0].shown
    assert shown.shape == (3, 80, 80)
    assert shown[:, 5, 5].tolist() == shown[:, 75, 75].tolist() == [128, 64, 0]  # the mean: 0 for the model
    assert shown[:, 40, 5].tolist() == [255, 0, 0] and shown[:, 40, 75].tolist() == [0, 0, 255]
    assert "padded from 80 x 40 pixels" in words_of(figure)
    assert run(main, flags(checkpoint, wide, tmp_path), capsys)[0] == 0
    assert "centre crop of 80 x 40 pixels" in words_of(drawn["block2_cls"][1])


def test_chosen_heads(checkpoint, wide, tmp_path, capsys, drawn):
    for given, names in (("2,0", ["head 2", "head 0"]), ("mean", ["mean over heads"])):
        assert run(main, flags(checkpoint, wide, tmp_path, "--heads", given), capsys)[0] == 0
        assert [cell.name for cell in drawn["block2_cls"][0].rows[0].cells] == names
    other = tiny(img_size=16, num_heads=6, num_register_tokens=0)
    saved_model(tmp_path / "other.pth", other, **MEAN)
    both = ["--compare", checkpoint, tmp_path / "other.pth", *flags(checkpoint, wide, tmp_path)[2:]]
    status, _, err = run(main, [*both, "--heads", "4,1"], capsys)  # of 3 and of 6 heads
    assert status == 0, err
    rows = drawn["block2_cls"][0].rows
    assert [[cell.map is None for cell in row.cells] for row in rows] == [[True, False], [False, False]]
    for given, problem in (("3", "--heads 3: there are the heads 0..2"), ("x", "'x' is not a whole number")):
        status, _, err = run(main, flags(checkpoint, wide, tmp_path / "new", "--heads", given), capsys)
        assert status == 2 and problem in err


def test_the_top_of_the_scale_and_logarithms():
    attention = torch.arange(1, 101.0).reshape(10, 10) / 5050
    page = Page(
        "cls", "Class token", [Row("", torch.zeros(3, 40, 40, dtype=torch.uint8), [MapCell("head 0", attention)])]
    )
    figure = draw_page(page, look=Look(percentile=50))
    picture = figure.axes[1].images[0]
    assert picture.norm.vmax == pytest.approx(100 * 50.5 / 5050)
    assert "the 50th percentile of the values; larger ones have its colour" in words_of(figure)
    figure = draw_page(page, look=Look(log=True))
    norm, scale = figure.axes[1].images[0].norm, figure.axes[2]
    assert [round(float(norm(value)), 4) for value in (100 / 50.5, 10 / 50.5, 0.1 / 50.5, 0)] == [1, 0.6667, 0, 0]
    assert [label.get_text() for label in scale.get_yticklabels()] == ["0.002%", "0.02%", "0.2%", "2%"]
    assert "Logarithmic" in words_of(figure)


def test_over_the_image_opacity_grows_with_attention():
    attention, shown = torch.tensor([[0.0, 0.1], [0.2, 0.4]]), torch.zeros(3, 8, 8, dtype=torch.uint8)
    shown[0] = 200  # red
    figure = draw_page(Page("cls", "", [Row("", shown, [MapCell("head 0", attention)])]), look=Look(overlay=True))
    photo, over = figure.axes[1].images
    assert np.ptp(photo.get_array(), axis=-1).max() == 0  # grey
    assert over.get_alpha() == pytest.approx(np.array([[0, 0.2], [0.4, 0.8]]))


def test_many_rows_are_several_pages():
    shown, cells = torch.zeros(3, 8, 8, dtype=torch.uint8), [MapCell(f"head {i}", torch.rand(2, 2)) for i in range(17)]
    page = Page("blocks_cls", "Class token", [Row(f"block {i}", shown, cells) for i in range(24)])
    parts = parts_of(page)
    assert [row.label for part in parts for row in part.rows] == [row.label for row in page.rows]
    assert [part.key for part in parts] == [f"blocks_cls_{n}" for n in range(1, len(parts) + 1)]
    assert parts[0].title == f"Class token (1 of {len(parts)})"
    for part in parts:
        figure = draw_page(part)
        no_overlaps(figure)
        width, height = figure.get_size_inches()
        assert sorted((width, height)) < [8.28, 11.7] and max(width, height) <= 11.7
        sides = [axes.get_position().width * width for axes in figure.axes[1:]]
        assert min(sides) >= 0.55
        labels = {text.get_text() for text in figure.findobj(Text)}
        assert all(any(text.startswith(row.label) for text in labels) for row in part.rows)
    (alone,) = parts_of(Page("x", "", page.rows[:1], "true: cat"))
    assert "block 0\ntrue: cat" in {text.get_text() for text in draw_page(alone).findobj(Text)}
    assert parts_of(Page("x", "", page.rows[:2])) == [Page("x", "", page.rows[:2])]


def test_a_default_model_where_training_writes_it(checkpoint, wide, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = flags(checkpoint, wide, "pages")[2:]
    assert run(main, argv, capsys)[0] == 2
    os.renames(checkpoint, tmp_path / "models" / "best_model.pth")
    status, _, err = run(main, argv, capsys)
    assert status == 0, err
    text = " ".join(PdfReader(tmp_path / "pages" / "attention_wide_block2.pdf").pages[0].extract_text().split())
    assert "model: models/best_model.pth" in text


def test_overlay_with_a_logarithmic_scale(checkpoint, wide, tmp_path, capsys, monkeypatch):
    """Values below a tenth of the top are at the lower end, whose logarithm is rounded to a little less than 0."""
    monkeypatch.setattr(map_pages, "DECADES", 1)
    status, _, err = run(main, flags(checkpoint, wide, tmp_path, "--overlay", "--log", "--format", "png"), capsys)
    assert status == 0, err


def test_names_that_tell_models_apart():
    assert inputs.names_of(["a/best_model.pth"]) == ["a/best_model.pth"]
    assert inputs.names_of(["x/a/m.pth", "y/a/m.pth"]) == ["x/a/m.pth", "y/a/m.pth"]
    assert inputs.names_of(["timm:vit", "a/m.pth"]) == ["timm:vit", "a/m.pth"]


def test_characters_that_no_font_has_are_escaped(monkeypatch):
    monkeypatch.setattr(fonts, "_family_with", lambda character: None)
    assert fonts.drawable("héllo 猫") == "héllo \\u732b"
    monkeypatch.setattr(fonts, "_family_with", lambda character: "Fake" if character == ord("猫") else None)
    monkeypatch.setattr(fonts, "_glyphs", lambda family: frozenset(map(ord, "猫")) if family == "Fake" else frozenset())
    assert fonts.fonts_of("猫犬") == [fonts.PLAIN, "Fake"]
    assert fonts.drawable("猫犬") == "猫\\u72ac"


def test_wide_letters_count_as_two(monkeypatch):
    monkeypatch.setattr(fonts, "drawable", lambda text: text)  # as if there were a font
    assert fonts.letter_count("a猫é") == 4
    assert fonts.wrapped("a cat 猫猫猫猫猫", 8) == ["a cat 猫", "猫猫猫猫"]
    assert objects_pages.short("猫" * 19) == "猫" * 19
    assert objects_pages.short("猫" * 30) == "猫" * 12 + "..." + "猫" * 6
    assert objects_pages.short("a" * 50) == "a" * 24 + "..." + "a" * 13


def test_dollars_in_names_are_not_tex():
    figure = Figure()
    name, axes = figure.text(0, 0, r"a $\frac{$ b.png"), figure.add_subplot()
    axes.set_yscale("log")
    axes.set_ylim(1, 100)
    axes.set_xticks([0], ["$a_b$"])
    words = fonts.use_fonts(figure).findobj(Text)
    assert not name.get_parse_math() and not axes.get_xticklabels()[0].get_parse_math()
    assert all(word.get_parse_math() for word in words if "mathdefault" in word.get_text())
    figure.savefig(io.BytesIO())


@pytest.mark.filterwarnings("error")
def test_a_page_with_such_names(checkpoint, wide, tmp_path, capsys):
    (tmp_path / "猫").mkdir()
    wide = wide.rename(tmp_path / "猫" / "犬.png")
    status, _, err = run(main, flags(checkpoint, wide, tmp_path / "new", "--format", "png"), capsys)
    assert status == 0, err


@pytest.mark.usefixtures("fonts")
def test_fonts_of_a_pdf(tmp_path):
    """TrueType, whose letters other programs can search, copy and edit."""
    figure = Figure()
    figure.text(0.1, 0.5, "Block 3")
    write_pdf([figure], tmp_path / "page.pdf")
    (page,) = PdfReader(tmp_path / "page.pdf").pages
    (font,) = page["/Resources"]["/Font"].values()
    assert "/FontFile2" in font.get_object()["/DescendantFonts"][0].get_object()["/FontDescriptor"].get_object()
    assert page.extract_text() == "Block 3"


@pytest.mark.parametrize("heads", [3, 6, 12, 16])
def test_the_largest_value_stands_above_each_map_however_small(heads):
    maps = torch.full((heads, 4, 4), 0.0613)
    maps[:, 0, 0] = 0.0789
    rows = [
        Row(
            f"block {i}", torch.zeros(3, 8, 8, dtype=torch.uint8), [MapCell(f"head {h}", maps[h]) for h in range(heads)]
        )
        for i in range(3)
    ]
    figure = draw_page(Page("x", "", rows), None, "this page", Look())
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left").startswith("head")]
    assert len(titles) == 3 * heads and all(title.endswith("7.9%") for title in titles), titles[0]
