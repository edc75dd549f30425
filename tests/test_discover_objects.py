"""Object discovery: LOST, annotation files, CorLoc, pages."""

import json
import warnings

import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from pypdf import PdfReader

import utils
from checkpoints.files import save_checkpoint
from checkpoints.models import at_size
from discover_objects import OTHER_SIZE, main
from inspection import fitting, objects
from inspection.annotations import entry_of, index_of, read_annotations
from inspection.fitting import fitting_size
from inspection.objects import lost
from inspection.objects_pages import draw_boxes_page
from pages import no_overlaps
from runs import run, tiny

DATA = {"name": "FOLDER", "classes": list("abcde"), "input_size": (32, 32), "mean": [0.5] * 3, "std": [0.5] * 3}
SCENES = {  # name: size of the image, box of the object
    "square.png": ((64, 64), (16, 24, 40, 48)),
    "wide.png": ((96, 48), (60, 9, 90, 30)),
    "high.jpg": ((50, 80), (10, 40, 30, 70)),
    "odd.png": ((131, 77), (20, 21, 70, 60)),
}


def planted(*rows):
    """Features of a map of signs, '#' is the object: +1 there and -1 elsewhere, in the first of two dimensions."""
    signs = torch.tensor([[1.0 if letter == "#" else -1.0 for letter in row] for row in rows])
    return torch.stack([signs, torch.zeros_like(signs)], dim=-1).flatten(0, 1), tuple(signs.shape)


# LOST ------------------------------------------------------------------------------------------------------------


def test_lost_finds_a_planted_object():
    features, grid = planted("......", "..##..", "..##..", "..#...")
    found = lost(features, grid)
    assert found.box == (2, 1, 4, 4)
    assert found.seed == (2, 1)  # the first of those with the lowest degree
    assert (found.degree, found.similar, found.component) == (5, 5, 5)
    inverted = lost(-features, grid)  # only products count
    assert inverted.box == found.box


def test_lost_keeps_the_component_of_the_seed():
    features, grid = planted("##....", "##....", "....#.", "....##")
    features[[16, 22, 23], 1] = 0.1  # they stay like the others: 1.01 and 1
    found = lost(features, grid)
    assert (found.seed, found.box, found.component) == ((0, 0), (0, 0, 2, 2), 4)
    assert found.similar == 7
    features, grid = planted("#...", ".#..", "..#.")  # corners do not connect
    assert lost(features, grid).box == (0, 0, 1, 1)


def test_lost_by_hand():
    """Degrees, expansion and mask differ: worked out on paper."""
    features = torch.tensor([[1.0, 0], [2, 1], [-1, 3], [-1, -1], [-2, 0], [-1, 0]])
    # products      0: 1 2 -1 -1 -2 -1   degree 2
    #               1: 2 5 1 -3 -4 -2    degree 3
    #               2: -1 1 10 -2 2 1    degree 4
    #               3: -1 -3 -2 2 2 1    degree 3
    #               4: -2 -4 2 2 4 2     degree 4
    #               5: -1 -2 1 1 2 1     degree 4
    found = lost(features, (1, 6), k_patches=3)  # of 0, 1, 3: 0 and 1 go with the seed; sums 3 7 0 -4 -6 -3
    assert (found.seed, found.degree, found.similar, found.box) == ((0, 0), 2, 2, (0, 0, 2, 1))
    assert found.quartile == -2  # of 36 products, the ninth
    assert lost(features, (1, 6), k_patches=1).similar == 1
    moved = lost(features, (1, 6), bias=1.5)  # now -1 counts as linked: 0 has 5 of them, 1 has 3, 3 has 4
    assert (moved.seed, moved.degree) == ((1, 0), 3)
    assert moved.quartile == pytest.approx(-2)


def test_a_bias_takes_off_what_all_features_share():
    features, grid = planted("......", "..##..", "..##..")
    features[:, 1] = 3.0  # all products are 8 or 10
    whole = lost(features, grid)
    assert (whole.degree, whole.seed, whole.box) == (18, (0, 0), (0, 0, 6, 3))
    found = lost(features, grid, bias=-9)
    assert (found.degree, found.box) == (4, (2, 1, 4, 3))
    alone = lost(features, grid, bias=-50)  # nothing correlates with anything
    assert (alone.degree, alone.similar, alone.box) == (0, 0, (0, 0, 1, 1))


def iou(a, b) -> float:
    """By hand."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def test_sizes():
    assert fitting_size(640, 480, 448, (14, 14)) == (336, 448)
    assert fitting_size(100, 1000, 64, (8, 16)) == (64, 16)
    assert fitting_size(1000, 1, 32, (4, 4)) == (4, 32)


# Annotation files ------------------------------------------------------------------------------------------------


def coco(images, boxes):
    """`images`: {name: (width, height)}, `boxes`: [(name, [x, y, width, height], iscrowd)]."""
    ids = {name: 7 + i for i, name in enumerate(images)}
    return {
        "images": [{"id": ids[n], "file_name": n, "width": w, "height": h} for n, (w, h) in images.items()],
        "annotations": [{"image_id": ids[n], "bbox": box, "iscrowd": crowd} for n, box, crowd in boxes],
    }


def voc(name, size, boxes):
    objects = "".join(
        f"<object><name>it</name><difficult>1</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox><part><bndbox><xmin>1</xmin></bndbox></part></object>"
        for x0, y0, x1, y1 in boxes
    )
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"


def test_coco_files(tmp_path):
    boxes = [("b.jpg", [1, 2, 3, 4.5], 0), ("b.jpg", [0, 0, 9, 9], 1), ("b.jpg", [5, 5, 0, 2], 0)]
    (tmp_path / "a.json").write_text(json.dumps(coco({"train/a.jpg": (10, 20), "b.jpg": (0, 0)}, boxes)))
    first, second = read_annotations(tmp_path / "a.json")
    assert (first.names, first.size, first.boxes) == ({"train/a.jpg", "a.jpg"}, (10, 20), [])
    assert (second.size, second.boxes) == (None, [[1, 2, 4, 6.5]])  # neither the crowd nor the empty box


def test_voc_files(tmp_path):
    (tmp_path / "000005.xml").write_text(voc("other.jpg", (500, 375), [(1, 1, 500, 375), (10, 20, 10, 29)]))
    (entry,) = read_annotations(tmp_path)
    assert entry.names == {"other.jpg", "000005"}
    assert entry.size == (500, 375)
    assert entry.boxes == [[0, 0, 500, 375], [9, 19, 10, 29]]


def test_names_that_several_images_have(tmp_path):
    images = {"one/x.png": (1, 1), "two/x.png": (2, 2), "two/y.png": (3, 3)}
    (tmp_path / "a.json").write_text(json.dumps(coco(images, [])))
    index = index_of(read_annotations(tmp_path / "a.json"))
    found = {name: entry_of(tmp_path / name, index) for name in ("two/x.png", "x.png", "y.png")}
    assert found["two/x.png"].size == (2, 2)
    assert found["x.png"] is None
    assert found["y.png"].size == (3, 3)


ONE = {"images": [{"id": 1, "file_name": "square.png"}]}
BAD_COCO = {
    "cut off": ('{"images": [', "Expecting value"),
    "a list": ("[]", "a.json"),
    "no boxes": (json.dumps(ONE), "'annotations' is missing"),
    "no name": ('{"images": [{"id": 1}], "annotations": []}', "'file_name' is missing"),
    "twice": (json.dumps({"images": ONE["images"] * 2, "annotations": []}), "two images have the id 1"),
    "strange image": (json.dumps(ONE | {"annotations": [{"image_id": 2, "bbox": [1, 1, 1, 1]}]}), "no such image"),
    "three": (json.dumps(ONE | {"annotations": [{"image_id": 1, "bbox": [1, 1, 1]}]}), "a.json"),
    "negative": (json.dumps(ONE | {"annotations": [{"image_id": 1, "bbox": [1, 1, -1, 1]}]}), "is not a box"),
    "nan": (json.dumps(ONE | {"annotations": [{"image_id": 1, "bbox": [1, 1, float("nan"), 1]}]}), "is not a box"),
    "number": (json.dumps(ONE | {"annotations": [{"image_id": 1, "bbox": 4}]}), "a.json"),
    "deep": ("[" * 200_000, "a.json"),
    "bytes": (b"\xff\xfe\x00\x01", "a.json"),
}
BAD_VOC = {
    "cut off": ("<annotation><object>", "no element found"),
    "html": ("<html></html>", "its root element is html"),
    "no box": ("<annotation><object></object></annotation>", "'bndbox' is missing"),
    "no corner": ("<annotation><object><bndbox><xmin>1</xmin></bndbox></object></annotation>", "'nothing'"),
    "reversed": (voc("square.png", (64, 64), [(9, 9, 4, 12)]), "is not a box"),
    "bomb": ('<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aa">]><annotation>&a;</annotation>', "DOCTYPE"),
}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [("a.json", *case) for case in BAD_COCO.values()] + [("a.xml", *case) for case in BAD_VOC.values()],
    ids=[f"coco {name}" for name in BAD_COCO] + [f"voc {name}" for name in BAD_VOC],
)
def test_malformed_annotations(tmp_path, name, text, words):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(utils.BadInput) as error:
        read_annotations(file if name == "a.json" else tmp_path)
    assert words in str(error.value)
    assert f"cannot use {file}" in str(error.value)
    assert "\n" not in str(error.value)
    assert "; give a" in str(error.value)


# From images to CorLoc -------------------------------------------------------------------------------------------


def seeing_brightness(**kwargs):
    """A model whose keys, at every block, are the sign of a patch's brightness; its queries share a large part."""
    model = tiny(img_size=32, **kwargs)
    with torch.no_grad():
        for parameter in (model.pos_embed, model.patch_embed.proj.weight, model.patch_embed.proj.bias):
            parameter.zero_()
        model.patch_embed.proj.weight[0] = 1.0
        model.patch_embed.proj.weight[1] = -1.0
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):  # patches go through unchanged
                layer.weight.zero_()
                layer.bias.zero_()
            block.norm1.weight.fill_(1)
            block.norm1.bias.zero_()
            block.attn.qkv.weight[:48].zero_()
            block.attn.qkv.bias[:48].zero_()
            block.attn.qkv.weight[0, 0] = 1.0  # of the first head's queries
            block.attn.qkv.bias[9] = 5.0  # of the second head's
            block.attn.qkv.weight[24 + 17, 0] = 1.0  # of the third head's keys
    return model


def save(model, path):
    save_checkpoint(path, {"model": model.state_dict(), "model_args": model.model_args, "data": DATA})
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return save(seeing_brightness(cls_pos=2, reg_pos=1, num_register_tokens=3), tmp_path / "m.pth")


@pytest.fixture
def scenes(tmp_path):
    """A folder of images with one bright rectangle each."""
    (tmp_path / "scenes").mkdir()
    for name, (size, (left, upper, right, lower)) in SCENES.items():
        image = Image.new("RGB", size, (20, 30, 40))
        ImageDraw.Draw(image).rectangle((left, upper, right - 1, lower - 1), (230, 220, 250))
        image.save(tmp_path / "scenes" / name)
    return tmp_path / "scenes"


def annotate(tmp_path, **wrong):
    """A COCO file of the scenes; `wrong`: name without suffix -> another box."""
    boxes = []
    for name, (_, box) in SCENES.items():
        left, upper, right, lower = wrong.get(name[:-4], box)
        boxes.append((name, [left, upper, right - left, lower - upper], 0))
    (tmp_path / "boxes.json").write_text(json.dumps(coco({n: size for n, (size, _) in SCENES.items()}, boxes)))
    return tmp_path / "boxes.json"


def flags(checkpoint, tmp_path, *more):
    return ["--model_path", checkpoint, "--output_dir", tmp_path / "new", "--device", "cpu", *more]


def result(tmp_path):
    content = json.loads((tmp_path / "new" / "objects.json").read_text(), parse_constant=pytest.fail)
    return content["settings"], {image["name"]: image for image in content["images"]}


def close(box, name):
    """Within a patch: 8 patches along the longer side."""
    size, truth = SCENES[name]
    return all(abs(a - b) <= max(size) / 8 for a, b in zip(box, truth)) and iou(box, truth) >= 0.5


def test_boxes_and_corloc_of_a_coco_file(checkpoint, scenes, tmp_path, capsys):
    argv = flags(checkpoint, tmp_path, "--image_path", scenes, "--annotations", annotate(tmp_path))
    status, out, err = run(main, argv, capsys)
    assert status == 0, err
    assert "CorLoc 100.0% (at IoU 0.5) over 4 images; 0 without annotated boxes left out" in out
    settings, images = result(tmp_path)
    assert set(images) == set(SCENES)
    for name, image in images.items():
        assert close(image["box"], name)
        assert image["verdict"] == "found"
        assert image["annotated"] == [list(SCENES[name][1])]
        assert image["best_iou"] == pytest.approx(iou(image["box"], SCENES[name][1]), abs=1e-3)
    assert images["square.png"]["box"] == [16, 24, 40, 48]
    assert images["square.png"]["seed"] == [2, 3]
    assert (images["wide.png"]["grid"], images["high.jpg"]["grid"]) == ([8, 4], [5, 8])
    assert (settings["block"], settings["corloc"], settings["judged"]) == (3, 100, 4)
    assert settings["corloc_of_whole_image"] == 0
    (page,) = PdfReader(tmp_path / "new" / "objects.pdf").pages
    words = page.extract_text()
    assert "LOST on the keys, else values, of block 3" in words
    assert all(name in words for name in SCENES)
    assert all(label in words for label in ("discovered box", "annotated box", "seed patch", "found, IoU 1.00"))


def test_corloc_counts_what_is_wrong(checkpoint, scenes, tmp_path, capsys):
    file = annotate(tmp_path, square=(40, 48, 64, 64), wide=(0, 0, 96, 48))
    argv = flags(checkpoint, tmp_path, "--image_path", scenes, "--annotations", file)
    _, out, _ = run(main, argv, capsys)
    assert "CorLoc 50.0% (at IoU 0.5) over 4 images; 0 without annotated boxes left out; " in out
    assert "the whole image as the box: 25.0%" in out
    _, images = result(tmp_path)
    assert {n: i["verdict"] for n, i in images.items() if i["verdict"] != "found"} == {
        "square.png": "missed", "wide.png": "missed",
    }  # fmt: skip


def test_voc_files_beside_their_images(checkpoint, scenes, tmp_path, capsys):
    (tmp_path / "VOC" / "Annotations").mkdir(parents=True)
    scenes.rename(tmp_path / "VOC" / "JPEGImages")
    for name, (size, (left, upper, right, lower)) in SCENES.items():
        text = voc(name, size, [(left + 1, upper + 1, right, lower)])
        (tmp_path / "VOC" / "Annotations" / f"{name[:-4]}.xml").write_text(text)
    argv = flags(checkpoint, tmp_path, "--annotations", tmp_path / "VOC" / "Annotations")
    status, out, err = run(main, argv, capsys)
    assert status == 0, err
    assert "CorLoc 100.0% (at IoU 0.5) over 4 images" in out
    assert result(tmp_path)[1]["square.png"]["best_iou"] == 1


def test_images_that_cannot_be_judged(checkpoint, scenes, tmp_path, capsys):
    file = annotate(tmp_path)
    content = json.loads(file.read_text())
    content["images"][1] |= {"width": 48, "height": 96}
    content["annotations"] = content["annotations"][:2] + content["annotations"][3:]  # high.jpg has none
    content["images"][3]["file_name"] = "elsewhere.png"  # odd.png is not annotated
    file.write_text(json.dumps(content))
    status, out, err = run(main, flags(checkpoint, tmp_path, "--image_path", scenes, "--annotations", file), capsys)
    assert status == 0, err
    assert "note: 1 of 4 annotated images are missing; left out" in out
    assert "note: 1 images are of another size than annotated (wide.png, ...); not in CorLoc" in out
    assert "CorLoc 100.0% (at IoU 0.5) over 1 images; 2 without annotated boxes left out" in out
    settings, images = result(tmp_path)
    assert images["wide.png"]["best_iou"] is None
    assert settings["verdicts"] == {"found": 1, "other size than annotated": 1, "no annotated box": 2}


@pytest.mark.parametrize(("cls_pos", "reg_pos", "dist_pos"), [(0, 0, None), (None, 3, 1), (1, 2, 2), (3, 0, 3)])
def test_patches_are_cut_by_the_layout(scenes, tmp_path, capsys, cls_pos, reg_pos, dist_pos):
    model = seeing_brightness(cls_pos=cls_pos, reg_pos=reg_pos, dist_pos=dist_pos, num_register_tokens=2)
    path = save(model, tmp_path / "late.pth")
    for block in (0, 2, 3):
        files = [scenes / "square.png", scenes / "high.jpg"]
        argv = flags(path, tmp_path, "--layer_num", block, "--max_drawn", "1", "--image_path", *files)
        assert run(main, argv, capsys)[0] == 0
        boxes = {name: image["box"] for name, image in result(tmp_path)[1].items()}
        assert boxes == {"square.png": [16, 24, 40, 48], "high.jpg": [10, 40, 30, 70]}


def test_features_and_bias(checkpoint, scenes, tmp_path, capsys):
    argv = flags(checkpoint, tmp_path, "--image_path", scenes, "--features", "queries")
    _, out, _ = run(main, [*argv, "--bias", "0"], capsys)
    assert "note: in 4 of 4 images the seed correlates with all patches" in out
    assert "no CorLoc" not in out
    _, images = result(tmp_path)
    assert images["square.png"]["box"] == [0, 0, 64, 64]
    assert images["square.png"]["degree"] == 64 and images["square.png"]["arbitrary"]
    (page,) = PdfReader(tmp_path / "new" / "objects.pdf").pages
    assert page.extract_text().count("arbitrary\n") == 4
    for more in (["--bias", "-25"], []):  # by hand, and by the rule: without what all patches share
        _, out, _ = run(main, [*argv, *more], capsys)
        assert ("queries less their mean over patches are used there" in out) == (not more) and "arbitrary" not in out
        found = result(tmp_path)[1]
        assert all(close(image["box"], name) for name, image in found.items())
        assert {(image["features"], image["centred"]) for image in found.values()} == {("queries", not more)}


def test_shapes_and_weights_of_the_models(checkpoint, scenes, tmp_path, capsys, monkeypatch):
    sizes = []

    def kept(model, size):
        sizes.append(size)
        other = at_size(model, size)
        assert other.blocks[0].attn.qkv.weight.data_ptr() == model.blocks[0].attn.qkv.weight.data_ptr()
        return other

    monkeypatch.setattr(fitting, "at_size", kept)
    argv = flags(checkpoint, tmp_path, "--image_path", scenes)
    assert run(main, [*argv, "--max_side", "64"], capsys)[0] == 0
    assert sizes == [(64, 40), (36, 64), (64, 64), (32, 64)]  # in the order of names
    assert all(close(image["box"], name) for name, image in result(tmp_path)[1].items())
    assert run(main, [*argv, "--input_size", "16x24"], capsys)[0] == 0
    assert len(sizes) == 4
    assert {tuple(image["grid"]) for image in result(tmp_path)[1].values()} == {(6, 4)}


def test_images_are_seen_as_a_person_sees_them(checkpoint, scenes, tmp_path, capsys):
    """A camera's file that lies on its side: box and size are those of the image turned upright."""
    with Image.open(scenes / "wide.png") as upright:
        exif = Image.Exif()
        exif[0x0112] = 6
        upright.rotate(90, expand=True).save(scenes / "wide.png", exif=exif)
    with Image.open(scenes / "wide.png") as stored:
        assert (stored.size, ImageOps.exif_transpose(stored).size) == ((48, 96), (96, 48))
    argv = flags(checkpoint, tmp_path, "--image_path", scenes, "--annotations", annotate(tmp_path))
    _, out, _ = run(main, argv, capsys)
    assert "CorLoc 100.0% (at IoU 0.5) over 4 images" in out


def test_pages_and_names(checkpoint, scenes, tmp_path, capsys):
    source = (scenes / "square.png").read_bytes()
    for name in ["a $x_{$ name.png", "照片.png", f"{'long' * 20}.png", *(f"n{i:02}.png" for i in range(15))]:
        (scenes / name).write_bytes(source)
    argv = flags(checkpoint, tmp_path, "--image_path", scenes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(main, argv, capsys)[0] == 0
    assert "照片.png" in result(tmp_path)[1]
    words = [page.extract_text() for page in PdfReader(tmp_path / "new" / "objects.pdf").pages]
    assert [sum(page.count(end) for end in (".png", ".jpg")) for page in words] == [12, 10]
    assert "a $x_{$ name.png" in words[0]
    assert "longlonglonglonglonglong...glonglong.png" in words[0]
    assert "annotated box" not in "".join(words)
    assert run(main, [*argv, "--max_drawn", "13"], capsys)[0] == 0
    assert len(PdfReader(tmp_path / "new" / "objects.pdf").pages) == 2
    assert len(result(tmp_path)[1]) == 22


@pytest.mark.parametrize("count", [1, 12])
def test_no_text_of_a_page_is_cut_or_covered(count):
    result = {
        "name": "a_photograph_of_a_garden_on_a_morning_in_May_0001.jpeg", "size": (60, 40), "grid": (6, 4),
        "seed": (1, 1), "box": (10, 10, 30, 30), "annotated": [(10, 10, 30, 30)], "verdict": OTHER_SIZE,
        "best_iou": 0.25, "arbitrary": True,
    }  # fmt: skip
    title = "LOST on the keys, else values, of block 11, bias -20, timm:vit_small_patch14_reg4...nov2.lvd142m"
    no_overlaps(draw_boxes_page(title, [(result, Image.new("RGB", (60, 40)))] * count, annotated=True))


def test_the_data_set_of_the_checkpoint(trained, tmp_path, capsys):
    argv = flags(trained / "model.pth", tmp_path, "--img_num", "0", "5", "--features", "values")
    status, out, err = run(main, argv, capsys)
    assert status == 0, err
    settings, images = result(tmp_path)
    assert list(images) == ["DIGITS_test0", "DIGITS_test5"]
    assert all(image["file"] is None for image in images.values())
    assert settings["corloc"] is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--layer_num 4", "0..3"),
        ("--features colours", "invalid choice: 'colours'"),
        ("--bias nan", "must be finite"),
        ("--k_patches 0", "must be at least 1"),
        ("--max_side 7", "7 pixels are less than two patches; give --max_side 8 or more"),
        ("--input_size 4", "give --input_size 8 or more"),
        ("--input_size 32 --max_side 32", "leave one out"),
        ("--annotations {}/none.json", "there are no annotations in"),
        ("--annotations {}/scenes", "there are no annotations in"),
        ("--annotations {}/m.pth", "cannot use"),
        ("--annotations {}/strange.json", "none of the images (high.jpg, ...) is in"),
        ("--image_path {}/none.png", "there is no image or folder"),
        ("--image_path {}/scenes/odd.png {}/copy/odd.png --annotations {}/boxes.json", "are one image in"),
        ("--output_dir {}/m.pth", "cannot write to"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(checkpoint, scenes, tmp_path, capsys, monkeypatch, more, words):
    annotate(tmp_path)
    (tmp_path / "strange.json").write_text(json.dumps(coco({"other.png": (4, 4)}, [])))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "odd.png").write_bytes((scenes / "odd.png").read_bytes())
    monkeypatch.setattr(objects, "patch_features", lambda *_: pytest.fail("an image was looked at"))
    argv = flags(checkpoint, tmp_path, "--image_path", scenes, *more.format(*[tmp_path] * 3).split())
    status, _, err = run(main, argv, capsys)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_unreadable_images_are_left_out_and_listed(checkpoint, scenes, tmp_path, capsys):
    for name in ("aaa.png", "zzz.png"):
        (scenes / name).write_bytes(b"no image")
    status, out, err = run(main, flags(checkpoint, tmp_path, "--image_path", scenes), capsys)
    assert status == 1
    assert err.count("\n") == 1
    assert "2 of 6 images could not be read, the others are done: cannot read the image" in err and "aaa.png" in err
    left_out = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert ["aaa.png" in left_out[0], "zzz.png" in left_out[1]] == [True, True] and len(left_out) == 2
    settings, images = result(tmp_path)
    assert set(images) == set(SCENES)
    assert settings["images"] == 4
    assert [f"left out: {problem}" for problem in settings["left_out"]] == left_out
    (page,) = PdfReader(tmp_path / "new" / "objects.pdf").pages
    assert all(name in page.extract_text() for name in SCENES)


def test_images_that_are_all_unreadable_leave_older_files_whole(checkpoint, scenes, tmp_path, capsys):
    argv = flags(checkpoint, tmp_path, "--image_path", scenes)
    assert run(main, argv, capsys)[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    for file in scenes.iterdir():
        file.write_bytes(b"no image")
    status, _, err = run(main, argv, capsys)
    assert status == 2
    assert "none of the 4 images can be read; the last one: cannot read the image" in err
    assert err.count("\n") == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()} == before


def test_annotations_without_their_images(checkpoint, tmp_path, capsys):
    (tmp_path / "alone").mkdir()
    argv = flags(checkpoint, tmp_path, "--annotations", annotate(tmp_path / "alone"))
    status, _, err = run(main, argv, capsys)
    assert status == 2
    assert "none of the images of" in err
    assert "give --image_path" in err


def test_weights_that_are_not_numbers(scenes, tmp_path, capsys):
    model = seeing_brightness()
    with torch.no_grad():
        model.blocks[3].attn.qkv.bias[30] = float("nan")
    status, _, err = run(main, flags(save(model, tmp_path / "nan.pth"), tmp_path, "--image_path", scenes), capsys)
    assert status == 1
    assert "the keys of block 3 are not all finite" in err
    assert not list((tmp_path / "new").iterdir())
