"""The pages of `visualize_attention.py`."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from pypdf import PdfReader

import visualize_attention
from checkpoints.files import load_checkpoint
from checkpoints.models import model_from_checkpoint
from datasets import eval_transform
from inspection.attention import attention_rollout
from inspection.class_maps import grad_cam, relevance
from inspection.map_pages import draw_page
from inspection.pages import MapCell, Page, Row
from loading.decode import fit_image, read_image
from runs import noise, run, saved_model, tiny
from visualize_attention import main

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
    return saved_model(tmp_path / "m.pth", tiny(cls_pos=2, reg_pos=1, num_register_tokens=2), **MEAN)


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

    def kept(page, *args):
        figure = draw_page(page, *args)
        drawn[page.key.removeprefix("block3_")] = (figure, page.rows[0].shown)
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
    model = model_from_checkpoint(load_checkpoint(checkpoint))
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
        # Each map's colours go from 0 to the 99th percentile of its values, and so does the scale beside it.
        scales = [axes for axes in figure.axes if axes.axison]
        for drawn_map, scale in zip(pictures[1:5], scales, strict=True):
            top = np.percentile(np.asarray(drawn_map.get_array()), 99)
            assert (drawn_map.norm.vmin, drawn_map.norm.vmax) == (0, pytest.approx(top))
            assert drawn_map.norm(100) == 1
            for place, label in zip(scale.get_yticks(), scale.get_yticklabels(), strict=True):
                assert float(label.get_text().removesuffix("%")) == pytest.approx(place * top, abs=1e-3)
            (picture,) = scale.images
            assert picture.cmap == drawn_map.cmap and picture.origin == "lower"
            assert np.allclose(picture.get_array().ravel(), np.linspace(0, 1, 256))


@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("shape", [(32, 32), (20, 60), (60, 20)])
@pytest.mark.parametrize(("rows", "vmax"), [(1, None), (1, 0.2), (3, None), (3, 0.2)])
def test_any_number_of_heads_and_rows_fits_without_overlap(heads, shape, rows, vmax):
    shown = torch.zeros(3, *shape, dtype=torch.uint8)
    cells = [MapCell(f"head {i}", torch.rand(4, 4)) for i in range(heads)]
    cells.insert(0, MapCell("mean over heads", torch.rand(4, 4)))
    caption = "true: cat\npredicted: a dog of many words (99.9%)"
    rows = [Row(f"block {i}" * (rows > 1), shown, cells) for i in range(rows)]
    if len(rows) > 1:
        rows[1].cells = [MapCell("", None, "absent: enters at block 6")]
    figure = draw_page(Page("cls", "A title " * 6, rows, caption), vmax=vmax)
    figure.draw_without_rendering()
    check_no_overlap(figure)
    maps = sum(cell.map is not None for row in rows for cell in row.cells)
    absent = sum(cell.map is None for row in rows for cell in row.cells)
    scales = maps if len(rows) == 1 and vmax is None else int(vmax is not None)
    assert len(figure.axes) == 1 + maps + absent + scales  # the image once
    assert sorted(figure.get_size_inches())[1] <= 11.7 and min(figure.get_size_inches()) <= 8.28
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 6


def check_no_overlap(figure):
    titles = [axes._left_title for axes in figure.axes if not axes.axison]
    boxes = [text.get_window_extent() for text in (*titles, *figure.texts) if text.get_text()]
    for axes in figure.axes:
        is_map = not axes.axison
        boxes.append(axes.get_window_extent() if is_map else axes.get_tightbbox())
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
    for name, file in (("one", "photo.png"), ("two", "Photo.png")):  # one name where case does not count
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(photo.read_bytes())
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
    assert {f.name for f in (tmp_path / "new").iterdir()} == {f"attention_{n}_block2.pdf" for n in ("photo", "Photo_2")}


@pytest.mark.parametrize("more", ["", "--format png", "--scale shared", "--pages rollout", "--compare"])
def test_unreadable_images_are_left_out_and_listed(checkpoint, photo, tmp_path, capsys, more):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "c", "e"):
        (folder / f"{name}.png").write_bytes(photo.read_bytes())
    for name in ("b", "f"):
        (folder / f"{name}.png").write_bytes(photo.read_bytes()[:60])
    argv = ["--model_path", checkpoint, "--image_path", folder, "--output_dir", tmp_path / "new", "--device", "cpu"]
    argv += ["--tokens", "cls", *more.split(), *[checkpoint] * (2 * (more == "--compare"))]
    status, out, err = run(main, argv, capsys)
    assert status == 1, err
    assert "2 of 5 images could not be read, the others are done: cannot read the image" in err and "b.png" in err
    assert err.count("\n") == 1
    assert [line.count("f.png") for line in out.splitlines() if line.startswith("left out: ")] == [0, 1]
    assert [file.name.split("_")[1] for file in sorted((tmp_path / "new").iterdir())] == ["a", "c", "e"]
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    argv[argv.index(tmp_path / "new")] = tmp_path / "other"
    status, _, err = run(main, argv, capsys)
    assert status == 2 and "none of the 5 images can be read" in err
    assert not list((tmp_path / "other").iterdir())


def test_names_that_are_too_long_and_images_of_a_pixel(tmp_path, capsys):
    model = tiny(img_size=(4, 56), num_register_tokens=0)
    saved_model(tmp_path / "m.pth", model, crop_pct=0.875, interpolation="bicubic", **MEAN)
    (tmp_path / "images").mkdir()
    for name in ("猫" * 80, "x" * 250, "x" * 249 + "y", b"a\xe9\x1b[31m".decode(errors="surrogateescape")):
        Image.new("RGB", (1, 90)).save(tmp_path / "images" / f"{name}.png")
    argv = ["--model_path", tmp_path / "m.pth", "--image_path", tmp_path / "images", "--output_dir", tmp_path / "new"]
    status, out, err = run(main, [*argv, "--tokens", "cls", "--device", "cpu"], capsys)
    assert status == 0, err
    assert "\x1b" not in out and out.encode()  # a terminal obeys none of it
    names = {file.name for file in (tmp_path / "new").iterdir()}
    assert names >= {f"attention_{name}_block2.pdf" for name in ("猫" * 33, "x" * 100, "x" * 100 + "_2")}
    assert len(names) == 4


def test_paths_of_images_are_looked_for_beforehand(checkpoint, photo, tmp_path, capsys):
    argv = [
        "--model_path",
        checkpoint,
        "--image_path",
        photo,
        tmp_path / "absent.png",
        "--output_dir",
        tmp_path / "new",
    ]
    status, _, err = run(main, [*argv, "--device", "cpu"], capsys)
    assert status == 2
    assert "there is no image or folder" in err and "absent.png" in err
    assert not (tmp_path / "new").exists()


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


def test_a_bare_state_dict_of_images_that_are_not_square(checkpoint, photo, tmp_path, capsys, drawn):
    torch.save(load_checkpoint(checkpoint)["model"], tmp_path / "bare.pth")
    argv = ["--model_path", tmp_path / "bare.pth", "--image_path", photo, "--output_dir", tmp_path, "--device", "cpu"]
    argv += "--num_heads 3 --cls_pos 2 --reg_pos 1 --tokens cls --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25".split()
    status, _, err = run(main, argv, capsys)
    assert status == 2
    assert "24 rows, which may be 4x6 patches; give the size of the images that they are for, as in" in err
    assert "--input_size 16x24" in err
    status, out, _ = run(main, [*argv, "--input_size", "16x24"], capsys)
    assert status == 0
    assert "read as a grid of 4x6 patches, from --input_size" in out
    expected, _ = expected_rows(checkpoint, photo, 2)
    assert torch.allclose(drawn["block2_cls"][0].rows[0].cells[1].map, expected[0, 0], atol=1e-6)


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
    argv += ["--device", "cpu"]
    status, _, err = run(main, argv, capsys)
    assert status == 2
    assert "16 rows, which may be 4x4 patches, or 3x5 patches after 1 for tokens; give the size" in err
    assert run(main, [*argv, "--input_size", "16"], capsys)[0] == 0
    (page,) = words(tmp_path / "attention_photo_block2.pdf")
    assert "predicted" not in page


@pytest.fixture
def drawn(monkeypatch):
    """Pages as they are drawn: {key: (page, vmax)}, of the last image."""
    pages = {}

    def kept(page, vmax, *others):
        pages[page.key] = (page, vmax)
        return draw_page(page, vmax, *others)

    monkeypatch.setattr(visualize_attention, "draw_page", kept)
    return pages


def expected_rows(checkpoint, photo, block):
    """(H, N, gh, gw): what the model attends to at a block, of all its tokens."""
    model = model_from_checkpoint(load_checkpoint(checkpoint))
    images = eval_transform(fit_image(read_image(photo), (16, 24))[None], {"input_size": (16, 24), **MEAN})
    layout = model.token_layout(block)
    return model.attention(images, block)[0][..., layout.patches].unflatten(-1, (4, 6)), layout


def test_summary_pages(checkpoint, photo, tmp_path, capsys, drawn):
    argv = ["--model_path", checkpoint, "--image_path", photo, "--output_dir", tmp_path, "--device", "cpu"]
    pages = ["--pages", "blocks", "tokens", "rollout", "--layer_num", "all", "--tokens", "cls,reg", "--patch", "5,2"]
    status, out, err = run(main, [*argv, *pages], capsys)
    assert status == 0, err
    text = words(tmp_path / "attention_photo_blocks0-1-2-3.pdf")
    keys = ["blocks_cls", "blocks_reg0", "blocks_reg1", "blocks_patch5-2"]
    keys += [f"block{i}_tokens" for i in range(4)] + ["rollout"]
    assert list(drawn) == keys
    assert len(text) == len(keys)
    assert "Class token (entered at block 2) through the blocks" in text[0]
    page = drawn["blocks_cls"][0]
    assert [row.label for row in page.rows] == [f"block {i}" for i in range(4)]
    for block in (0, 1):  # shown as absent, not as zeros
        (cell,) = page.rows[block].cells
        assert cell.map is None
        assert cell.absent == "absent: enters at block 2"
    assert text[0].count("absent: enters at block 2") == 2
    for block in range(4):
        attention, layout = expected_rows(checkpoint, photo, block)
        where = {"Patch 5,2 (column, row)": layout.patches.start + 2 * 6 + 5}
        if block >= 2:
            where["Class token"] = 0
        if block >= 1:
            where |= {f"Register {r} (of 2)": layout.registers.start + r for r in (0, 1)}
        rows = {row.label: row.cells for row in drawn[f"block{block}_tokens"][0].rows}
        assert len(rows) == 4
        for label, cells in rows.items():
            if label not in where:
                assert cells[0].map is None
                continue
            assert [cell.name for cell in cells] == ["mean over heads", "head 0", "head 1", "head 2"]
            heads = attention[:, where[label]]
            assert torch.allclose(cells[0].map, heads.mean(0), atol=1e-6)
            assert torch.allclose(torch.stack([cell.map for cell in cells[1:]]), heads, atol=1e-6)
    rollout = {row.label: row.cells for row in drawn["rollout"][0].rows}
    model = model_from_checkpoint(load_checkpoint(checkpoint))
    images = eval_transform(fit_image(read_image(photo), (16, 24))[None], {"input_size": (16, 24), **MEAN})
    expected = attention_rollout(model, images, range(4))
    assert [cell.map is None for cell in rollout["Class token"]] == [True, True, False, False]
    assert torch.equal(rollout["Class token"][3].map, expected[3].cls[0, 0])
    assert torch.equal(rollout["Register 1 (of 2)"][1].map, expected[1].registers[0, 1, 0])


def test_several_images_and_blocks(trained, tmp_path, capsys):
    argv = ["--model_path", trained / "model.pth", "--output_dir", tmp_path, "--device", "cpu"]
    chosen = ["--img_num", "0", "5", "--layer_num", "2", "1"]
    assert run(main, [*argv, *chosen], capsys)[0] == 0
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {f"attention_DIGITS_test{i}_blocks1-2.pdf" for i in (0, 5)}
    pages = words(tmp_path / "attention_DIGITS_test5_blocks1-2.pdf")
    expected = [f"Register {r} (of 2) at block 1" for r in (0, 1)] + ["Class token at block 2"]
    expected += [f"Register {r} (of 2) at block 2" for r in (0, 1)]
    assert len(pages) == 5
    assert all(title in page for title, page in zip(expected, pages))
    assert run(main, [*argv, *chosen, "--format", "png"], capsys)[0] == 0
    assert (tmp_path / "attention_DIGITS_test5_block1_reg1.png").exists()
    assert not (tmp_path / "attention_DIGITS_test5_block1_cls.png").exists()


def test_scales(checkpoint, photo, tmp_path, capsys, drawn):
    Image.effect_noise((50, 40), 90).convert("RGB").save(tmp_path / "noise.png")
    argv = ["--model_path", checkpoint, "--image_path", photo, "--layer_num", "2", "3", "--device", "cpu"]
    argv += ["--output_dir", tmp_path]
    assert run(main, argv, capsys)[0] == 0
    assert all(vmax is None for _, vmax in drawn.values())
    assert run(main, [*argv, "--scale", "page"], capsys)[0] == 0
    largest = {key: max(float(c.map.max()) for c in page.rows[0].cells) for key, (page, _) in drawn.items()}
    assert len(set(largest.values())) > 1
    assert all(0 < vmax <= largest[key] for key, (_, vmax) in drawn.items())
    assert run(main, [*argv, "--scale", "page", "--percentile", "100"], capsys)[0] == 0
    assert {key: vmax for key, (_, vmax) in drawn.items()} == largest
    both = [*argv, "--image_path", photo, tmp_path / "noise.png", "--scale", "shared", "--percentile", "100"]
    assert run(main, both, capsys)[0] == 0
    of_noise = max(page.top() for page, _ in drawn.values())
    assert {vmax for _, vmax in drawn.values()} == {max(of_noise, *largest.values())}
    assert "One scale for all pages" in words(tmp_path / "attention_photo_blocks2-3.pdf")[0]


def test_models_side_by_side(checkpoint, photo, tmp_path, capsys, drawn):
    other = tiny(num_heads=2, cls_pos=3, num_register_tokens=0)
    torch.save(other.state_dict(), tmp_path / "bare.pth")
    late = tiny(img_size=(24, 24), cls_pos=0, num_register_tokens=1)
    saved_model(tmp_path / "late.pth", late, **MEAN)
    argv = ["--image_path", photo, "--layer_num", "2", "--output_dir", tmp_path / "new", "--device", "cpu"]
    status, _, err = run(main, ["--compare", checkpoint, tmp_path / "late.pth", *argv], capsys)
    assert status == 0, err
    assert list(drawn) == ["block2_cls", "block2_reg0", "block2_reg1"]
    page, vmax = drawn["block2_cls"]
    assert vmax == page.top(99)
    names = [f"{tmp_path.name}/{name}" for name in ("m.pth", "late.pth")]
    assert [row.label.split("\n")[0] for row in page.rows] == names
    attention, _ = expected_rows(checkpoint, photo, 2)
    assert torch.allclose(page.rows[0].cells[1].map, attention[0, 0], atol=1e-6)
    assert page.rows[1].cells[1].map.shape == (6, 6)
    assert drawn["block2_reg1"][0].rows[1].cells[0].absent == "absent: not in this model"
    err = run(main, ["--compare", checkpoint, tmp_path / "late.pth", *argv, "--layer_num", "9"], capsys)[2]
    assert "block 9 is outside the model" in err and f"({tmp_path.name}/m" in err
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == "compared_photo_block2.pdf"
    assert "Class token at block 2 under 2 models" in words(file)[0]
    square = ["--compare", checkpoint, tmp_path / "bare.pth", "--num_heads", "2", "--cls_pos", "3", *argv]
    status, _, err = run(main, square, capsys)
    assert status == 2  # 24 patches of a bare state dict are no square
    assert "bare.pth" in err


def test_bare_files_of_other_head_counts_side_by_side(photo, tmp_path, capsys, drawn):
    heads, flags = (2, 6), {"--num_heads": (2, 6), "--cls_pos": (3, 1)}
    models = [tiny(img_size=16, num_heads=h, cls_pos=p, num_register_tokens=2) for h, p in zip(*flags.values())]
    for i, model in enumerate(models):
        torch.save(model.state_dict(), tmp_path / f"{i}.pth")
    argv = ["--compare", tmp_path / "0.pth", tmp_path / "1.pth", "--image_path", photo, "--output_dir", tmp_path]
    argv += ["--device", "cpu", "--layer_num", 3, "--mean", *[0.5] * 3, "--std", *[0.25] * 3]
    status, _, err = run(main, [*argv, *"--num_heads 2 6 --cls_pos 3 1 --reg_pos 0".split()], capsys)
    assert status == 0, err
    images = eval_transform(fit_image(read_image(photo), (16, 16))[None], {"input_size": (16, 16), **MEAN})
    for row, model, count in zip(drawn["block3_cls"][0].rows, models, heads, strict=True):
        expected = model.attention_maps(images, [3])[3].cls[0]
        assert [cell.name for cell in row.cells] == ["mean over heads", *(f"head {i}" for i in range(count))]
        assert torch.allclose(torch.stack([cell.map for cell in row.cells[1:]]), expected, atol=1e-6)
    status, _, err = run(main, [*argv, "--num_heads", 2, 6, 3], capsys)
    assert status == 2
    assert "--num_heads has 3 values for 2 files; give one value, or one per file" in err


def test_one_scale_for_models_of_other_numbers_of_patches(checkpoint, photo, tmp_path, capsys, drawn):
    """Of 4 x 6 and of 37 x 37 patches: in per cent all of the second row would be black."""
    fine = tiny(img_size=148, num_register_tokens=0)
    saved_model(tmp_path / "fine.pth", fine, **MEAN)
    argv = ["--image_path", photo, "--layer_num", 3, "--output_dir", tmp_path / "new", "--device", "cpu", "--compare"]
    both = [*argv, checkpoint, tmp_path / "fine.pth"]
    for scale in ("page", "shared"):
        assert run(main, [*both, "--scale", scale, "--tokens", "cls"], capsys)[0] == 0
        (page, vmax), (text,) = drawn["block3_cls"], words(tmp_path / "new" / "compared_photo_block3.pdf")
        maps = [[cell.map for cell in row.cells] for row in page.rows]
        values = torch.cat([(m * m.numel()).flatten() for row in maps for m in row])
        assert vmax == pytest.approx(np.percentile(values.numpy(), 99), rel=1e-6)
        figure = draw_page(page, vmax=vmax)
        pictures = [axes.images[0] for axes in figure.axes if not axes.axison]
        shown = [p for p in pictures if p.get_array().ndim == 2]
        for picture, attention in zip(shown, [m for row in maps for m in row], strict=True):
            assert torch.allclose(torch.as_tensor(picture.get_array()), attention * attention.numel())
            assert (picture.norm.vmin, picture.norm.vmax) == (0, vmax)
        assert max(float(m.max()) * m.numel() for m in maps[1]) > vmax / 4
        (scale_of_page,) = [axes for axes in figure.axes if axes.axison]
        last = scale_of_page.get_xticks()[-1], scale_of_page.get_xticklabels()[-1].get_text()
        assert float(last[1].removesuffix("×")) == pytest.approx(last[0] * vmax, abs=1e-3)
        assert "0×" in text
        flat = " ".join(text.split())
        assert "times the number of patches, which differ; 1 = uniform over patches" in flat and "in %" not in flat
    for others in ([*both, "--scale", "map"], [*argv, checkpoint, checkpoint]):
        assert run(main, [*others, "--tokens", "cls"], capsys)[0] == 0
        assert not drawn["block3_cls"][0].times_patches
        assert "in %" in words(tmp_path / "new" / "compared_photo_block3.pdf")[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--format html --heads mean", "leave out --heads"),
        ("--patch 6,0", "outside the grid: x is 0..5, y is 0..3"),
        ("--patch 6", "give its column and row, as in 3,5"),
        ("--layer_num 1 9", "0..3"),
        ("--layer_num some", "'some' is not a whole number"),
        ("--compare A.pth", "at least two"),
        ("--compare A.pth B.pth --pages blocks", "leave out --pages"),
        ("--format html --scale page", "leave out --scale"),
        ("--input_size 17", "not divisible into patches"),
        ("--layer_num 0 1 --tokens cls", "ask for --layer_num 2 or later"),
        ("--tokens dist", "this model has no distillation token"),
        ("--target b", "--target is the class of --pages class"),
        ("--pages class --target f", "no class f; give a number, 0..4 or a name, as in a"),
    ],
)
def test_what_does_not_go_together(checkpoint, photo, tmp_path, capsys, flags, words):
    argv = ["--model_path", checkpoint, "--image_path", photo, "--output_dir", tmp_path / "new", "--device", "cpu"]
    status, _, err = run(main, [*argv, *flags.split()], capsys)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_another_input_size(checkpoint, photo, tmp_path, capsys, drawn):
    argv = ["--model_path", checkpoint, "--image_path", photo, "--output_dir", tmp_path, "--device", "cpu"]
    assert run(main, [*argv, "--input_size", "20x32"], capsys)[0] == 0
    page = drawn["block2_cls"][0]
    assert page.rows[0].cells[0].map.shape == (5, 8)
    assert page.rows[0].shown.shape == (3, 45, 72)  # the part of the photo that has that shape


def test_pages_of_classes(checkpoint, photo, tmp_path, capsys, drawn):
    argv = ["--model_path", checkpoint, "--image_path", photo, "--output_dir", tmp_path, "--device", "cpu"]
    status, _, err = run(main, [*argv, "--pages", "class", "--target", "b", "4", "--scale", "page"], capsys)
    assert status == 0, err
    assert list(drawn) == ["class"]
    rows = drawn["class"][0].rows
    assert [row.label for row in rows] == ["b", "e"]
    model = model_from_checkpoint(load_checkpoint(checkpoint))
    images = eval_transform(fit_image(read_image(photo), (16, 24))[None], {"input_size": (16, 24), **MEAN})
    for row, target in zip(rows, (1, 4)):
        assert [cell.name for cell in row.cells] == ["gradient x attention", "Grad-CAM, input of block 3"]
        for cell, expected in zip(row.cells, (relevance(model, images, target), grad_cam(model, images, 3, target))):
            assert torch.allclose(cell.map, expected[0] / expected.sum().clamp_min(1e-30), atol=1e-6)
    predicted = "abcde"[int(model(images).argmax())]
    assert run(main, [*argv, "--pages", "class"], capsys)[0] == 0
    (page,) = words(tmp_path / "attention_photo_blocks0-1-2-3.pdf")
    assert f"What speaks for: {predicted}" in page and f"predicted: {predicted}" in page


def test_pages_of_classes_of_a_model_without_tokens_or_head(photo, tmp_path, capsys, drawn):
    argv = ["--num_heads", "3", "--image_path", photo, "--output_dir", tmp_path, "--device", "cpu", "--pages", "class"]
    for classes, expected in ((5, 0), (0, 2)):
        model = tiny(img_size=16, cls_pos=None, num_register_tokens=0, num_classes=classes)
        torch.save(model.state_dict(), tmp_path / "bare.pth")
        size = ["--input_size", "16"] if not classes else []
        status, _, err = run(main, ["--model_path", tmp_path / "bare.pth", *argv, *size], capsys)
        assert status == expected, err
    assert drawn["class"][0].rows[0].cells[0].map.shape == (4, 4)
    assert "this model has no head" in err
