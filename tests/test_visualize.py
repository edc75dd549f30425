"""The pages of `visualize_attention.py`."""

import pytest
import torch
from PIL import Image
from pypdf import PdfReader

import utils
import visualize_attention
from conftest import noise, run, tiny
from datasets import eval_transform, fit_image, read_image
from models_dynamic import model_from_checkpoint
from visualize_attention import Page, draw_page, main

MEAN = {"mean": [0.5] * 3, "std": [0.25] * 3}


def words(file):
    return [page.extract_text() for page in PdfReader(file).pages]


@pytest.fixture
def photo(tmp_path):
    """72 x 48 pixels: red above, green below."""
    image = Image.new("RGB", (72, 48), "red")
    image.paste("green", (0, 24, 72, 48))
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def checkpoint(tmp_path):
    """Not square, 16 x 24; registers enter at block 1, CLS at block 2."""
    model = tiny(cls_pos=2, reg_pos=1, num_register_tokens=2)
    data = {"name": "FOLDER", "classes": list("abcde"), "input_size": (16, 24), **MEAN}
    utils.save_checkpoint(
        tmp_path / "m.pth", {"model": model.state_dict(), "model_args": model.model_args, "data": data}
    )
    return tmp_path / "m.pth"


def test_pages_of_a_trained_model(trained, tmp_path, capsys):
    argv = [
        "--model_path",
        trained / "model.pth",
        "--output_dir",
        tmp_path / "new",
        "--img_num",
        "7",
        "--device",
        "cpu",
    ]
    status, out, err = run(main, argv, capsys)
    assert status == 0, err
    file = tmp_path / "new" / "attention_DIGITS_test7_block2.pdf"
    assert f"wrote {file}" in out
    pages = words(file)
    assert len(pages) == 3
    assert "Class token at block 2 (entered at block 2)" in pages[0]
    assert "Register 0 (of 2) at block 2 (entered at block 1)" in pages[1]
    assert "Register 1 (of 2)" in pages[2]
    for page in pages:
        assert all(f"head {i}" in page for i in range(3))
        assert "head 3" not in page
        assert all(word in page for word in ("true: ", "predicted: ", "mean over heads", "% on patches"))


def test_what_is_drawn_is_the_models_attention(checkpoint, photo, tmp_path, capsys, monkeypatch):
    drawn = {}

    def kept(page, shown, text, overlay):
        figure = draw_page(page, shown, text, overlay)
        drawn[page.key] = (figure, shown)
        return figure

    monkeypatch.setattr(visualize_attention, "draw_page", kept)
    argv = [
        "--model_path",
        checkpoint,
        "--image_path",
        photo,
        "--layer_num",
        "3",
        "--output_dir",
        tmp_path,
        "--device",
        "cpu",
    ]
    assert run(main, argv, capsys)[0] == 0
    model = model_from_checkpoint(utils.load_checkpoint(checkpoint))
    images = eval_transform(fit_image(read_image(photo), (16, 24))[None], {"input_size": (16, 24), **MEAN})
    attention = model.attention(images, 3)[0]  # (H, N, N): CLS, 24 patches, 2 registers
    for key, row in (("cls", 0), ("reg0", 25), ("reg1", 26)):
        figure, shown = drawn[key]
        pictures = [axes.images[0] for axes in figure.axes if not axes.axison]
        picture, mean, *heads = (picture.get_array() for picture in pictures[:5])
        expected = 100 * attention[:, row, 1:25].unflatten(1, (4, 6))
        assert len(heads) == 3
        for head, values in zip(heads, expected):
            assert head.shape == (4, 6)
            assert torch.allclose(torch.as_tensor(head), values, atol=1e-4)
        assert torch.allclose(torch.as_tensor(mean), expected.mean(0), atol=1e-4)
        # The photo as a person sees it: its colours, upright, its whole height and width.
        assert picture.shape == (48, 72, 3)
        assert picture[2, 2].tolist() == [255, 0, 0]
        assert picture[46, 70].tolist() == [0, 128, 0]
        assert all(p.get_extent() == pictures[0].get_extent() for p in pictures[1:5])
        # Each map's colours go from 0 to its largest value, and so does the scale beside it.
        scales = [axes.images[0] for axes in figure.axes if axes.axison]
        for drawn_map, scale in zip(pictures[1:5], scales, strict=True):
            assert (drawn_map.norm.vmin, drawn_map.norm.vmax) == (0, drawn_map.get_array().max())
            assert list(scale.get_extent()[2:]) == [0, drawn_map.norm.vmax]
            assert scale.cmap == drawn_map.cmap and scale.origin == "lower"
            assert (scale.get_array().ravel() == range(256)).all()


@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("shape", [(32, 32), (20, 60), (60, 20)])
def test_any_number_of_heads_fits_without_overlap(heads, shape):
    shown = torch.zeros(3, *shape, dtype=torch.uint8)
    figure = draw_page(
        Page("cls", "A title " * 6, torch.rand(heads, 4, 4)),
        shown,
        "true: cat\npredicted: a dog of many words (99.9%)",
        False,
    )
    figure.draw_without_rendering()
    titles = [axes._left_title for axes in figure.axes if not axes.axison]
    boxes = [text.get_window_extent() for text in (*titles, *figure.texts)]
    for axes in figure.axes:
        is_map = not axes.axison
        boxes.append(axes.get_window_extent() if is_map else axes.get_tightbbox())
    assert len(figure.axes) == 1 + 2 * (heads + 1)
    page = figure.bbox
    for i, box in enumerate(boxes):
        assert page.x0 - 1 <= box.x0 < box.x1 <= page.x1 + 1
        assert page.y0 - 1 <= box.y0 < box.y1 <= page.y1 + 1
        for other in boxes[:i]:
            overlap = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(overlap) < 1.5, (box, other)


def test_tokens_that_have_not_entered(checkpoint, photo, tmp_path, capsys):
    argv = ["--model_path", checkpoint, "--image_path", photo, "--output_dir", tmp_path / "new", "--device", "cpu"]
    status, _, err = run(main, [*argv, "--layer_num", "1", "--tokens", "cls"], capsys)
    assert status == 2
    assert "only enters at block 2" in err
    assert "--layer_num 2 or later (to 3), or --tokens reg" in err
    status, _, err = run(main, [*argv, "--layer_num", "0"], capsys)
    assert status == 2
    assert "ask for --layer_num" in err
    status, _, err = run(main, [*argv, "--layer_num", "4"], capsys)
    assert status == 2
    assert "0..3" in err
    assert not (tmp_path / "new").exists()
    status, out, _ = run(main, [*argv, "--layer_num", "1"], capsys)  # by default, what is there
    assert status == 0
    assert "the class token only enters at block 2; it is not drawn" in out
    assert len(words(tmp_path / "new" / "attention_photo_block1.pdf")) == 2


def test_one_kind_of_token_and_png(checkpoint, photo, tmp_path, capsys):
    argv = ["--model_path", checkpoint, "--image_path", photo, "--output_dir", tmp_path, "--device", "cpu", "--overlay"]
    assert run(main, [*argv, "--tokens", "reg", "--format", "png"], capsys)[0] == 0
    assert {f.name for f in tmp_path.glob("attention*")} == {f"attention_photo_block2_reg{i}.png" for i in (0, 1)}
    with Image.open(tmp_path / "attention_photo_block2_reg0.png") as page:
        assert page.width > 900


def test_folders_and_equal_names(checkpoint, photo, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.png").write_bytes(photo.read_bytes())
    argv = [
        "--model_path",
        checkpoint,
        "--image_path",
        tmp_path / "one",
        tmp_path / "two",
        "--output_dir",
        tmp_path / "new",
    ]
    assert run(main, [*argv, "--tokens", "cls", "--device", "cpu"], capsys)[0] == 0
    assert {f.name for f in (tmp_path / "new").iterdir()} == {f"attention_photo{n}_block2.pdf" for n in ("", "_2")}


def test_a_bare_state_dict(photo, tmp_path, capsys):
    model = tiny(img_size=16, cls_pos=2, reg_pos=1, num_register_tokens=2)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    argv = ["--model_path", tmp_path / "bare.pth", "--image_path", photo, "--output_dir", tmp_path, "--device", "cpu"]
    status, _, err = run(main, argv, capsys)
    assert status == 2
    assert "--num_heads" in err
    positions = ["--num_heads", "3", "--cls_pos", "2", "--reg_pos", "1"]
    assert run(main, [*argv, *positions], capsys)[0] == 0
    pages = words(tmp_path / "attention_photo_block2.pdf")
    assert "Class token at block 2 (entered at block 2)" in pages[0]
    assert len(pages) == 3
    status, _, err = run(main, [*argv[:2], *positions], capsys)
    assert status == 2
    assert "--image_path" in err
    digits = [*argv[:2], *argv[4:], *positions, "--data_set", "digits", "--mean", "0", "0", "0", "--std", "1", "1", "1"]
    assert run(main, digits, capsys)[0] == 0
    assert "true: 7" in words(tmp_path / "attention_DIGITS_test0_block2.pdf")[0]


def test_a_checkpoint_takes_no_flags_of_the_model(checkpoint, photo, tmp_path, capsys):
    argv = ["--model_path", checkpoint, "--image_path", photo, "--num_heads", "6", "--output_dir", tmp_path]
    status, _, err = run(main, argv, capsys)
    assert status == 2
    assert "leave out num_heads" in err


def test_weights_without_a_head(photo, tmp_path, capsys):
    model = tiny(img_size=16, num_classes=0, num_register_tokens=0)
    assert model(noise(model)).shape == (2, 24)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    argv = ["--model_path", tmp_path / "bare.pth", "--num_heads", "3", "--image_path", photo, "--output_dir", tmp_path]
    assert run(main, [*argv, "--device", "cpu"], capsys)[0] == 0
    (page,) = words(tmp_path / "attention_photo_block2.pdf")
    assert "predicted" not in page
