"""Dense quality on planted patches, boxes and masks whose scores are known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import analyze_tokens
from checkpoints.files import save_checkpoint
from inspection import dense, outliers, segmentation
from inspection.dense import judge_boxes
from inspection.foreign import ForeignViT
from inspection.inputs import InputImage
from inspection.truth import Truth, truth_of
from loading import scenes
from pages import no_overlaps
from runs import noise, run, tiny
from utils import BadInput

GRID = (4, 6)  # of `tiny`: 16 x 24 pixels in patches of 4


def test_a_hit_is_a_centre_in_a_box():
    """The patch most like CLS is number 8: column 2, row 1, its centre at (10, 6)."""
    model = tiny()
    tokens = torch.eye(24)
    seen = {"cls": 3 * tokens[8], "tokens": tokens, "keys": torch.randn(24, 24)}
    for box, hit, inside in (
        ((8, 4, 12, 8), 1, 1 / 24), ((9, 5, 11, 7), 1, 1 / 24), ((10.5, 4, 12, 8), 0, 0), ((0, 0, 24, 16), 1, 1),
        ((0, 0, 24, 4), 0, 6 / 24),
    ):  # fmt: skip
        found = judge_boxes(model, torch.tensor([box]).float(), seen)
        assert found[:2] == (hit, pytest.approx(inside))
        assert found[3] == (box == (0, 0, 24, 16))  # the whole image as the box
    assert np.isnan(judge_boxes(model, torch.ones(1, 4), {"tokens": tokens, "keys": tokens})[0])


def test_what_lost_finds_is_judged_by_its_overlap():
    """Patches of columns 1 and 2 have one key, the others another: LOST's box is x 4..12."""
    model, keys = tiny(), torch.zeros(24, 2)
    columns = torch.arange(24) % 6
    keys[:, 0] = 1.0
    keys[(columns == 1) | (columns == 2)] = torch.tensor([-1.0, 0.1])
    seen = {"tokens": keys, "keys": keys}
    for box, same in (((4, 0, 12, 16), 1), ((4, 0, 12, 7), 0), ((12, 0, 24, 16), 0)):
        assert judge_boxes(model, torch.tensor([box]).float(), seen)[2] == same


def test_labels_of_patches():
    mask = torch.zeros(16, 24, dtype=torch.uint8)
    mask[:4, :4] = 3  # patch 0
    mask[:4, 4:6] = 2  # half of patch 1: of equals the lower one
    mask[:4, 8:11] = 5  # three quarters of patch 2
    mask[:4, 12:16] = 255
    assert segmentation.patch_labels(mask, GRID)[:5].tolist() == [3, 0, 5, 255, 0]
    tokens, labels = segmentation.draw(torch.eye(24), mask, GRID, 100, torch.Generator().manual_seed(0))
    assert len(labels) == 23 and 255 not in labels and (tokens.argmax(1) != 3).all()


def planted_images(informative, count=40):
    """Patches of classes 0 to 2, whose tokens are their class, or random."""
    rng, images = np.random.default_rng(0), []
    for _ in range(count):
        labels = rng.integers(3, size=12)
        tokens = np.eye(8)[labels] + 0.01 * rng.normal(size=(12, 8)) if informative else rng.normal(size=(12, 8))
        images.append((tokens.astype(np.float32), labels))
    return images


def test_patches_that_know_their_class_are_segmented_without_error():
    found = segmentation.segment(planted_images(True))
    for name in ("kNN", "linear"):
        probe = found["probes"][name]
        assert (probe["accuracy"], probe["iou"]) == (100, 100) and probe["iou_interval"] == [100, 100]
    blind = segmentation.segment(planted_images(False))["probes"]
    for name in ("kNN", "linear"):
        assert blind[name]["accuracy"] < 45
    judged = np.concatenate([labels for _, labels in planted_images(True)[1::2]])
    most = np.bincount(np.concatenate([labels for _, labels in planted_images(True)[::2]])).argmax()
    share = (judged == most).mean()
    plain = blind["most frequent class"]
    assert plain["accuracy"] == pytest.approx(100 * share)
    assert plain["iou"] == pytest.approx(100 * share / 3)  # one class has right / all, the two others 0
    assert segmentation.segment(planted_images(True, 3)) is None


def test_cosines_with_neighbours_by_hand():
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [1, 1]]])  # a grid of 2 x 2
    half = 0.5**0.5
    expected = [(1 + 0) / 2, (1 + half) / 2, (0 + half) / 2, (half + half) / 2]
    assert outliers.neighbour_cosine(x, (2, 2))[0].tolist() == pytest.approx(expected)
    assert outliers.neighbour_cosine(torch.ones(1, 3, 2), (1, 3))[0].tolist() == pytest.approx([1] * 3)


def drawn(knows):
    """Images with two outliers and two normal patches; tokens of a kind know "place", "class" or "pixels"."""
    rng, images, labels = np.random.default_rng(0), [], []
    for i in range(200):
        labels.append(i // 2 % 2)
        image = {}
        for kind in outliers.KINDS:
            place, pixels = rng.choice(4, size=2, replace=False), rng.normal(size=(2, 3))
            known = {"place": np.eye(4)[place], "class": np.eye(4)[[labels[-1]] * 2]}
            known["pixels"] = np.pad(pixels, [(0, 0), (0, 1)])
            image[kind] = {
                "tokens": (known[knows[kind]] + 0.01 * rng.normal(size=(2, 4))).astype(np.float32),
                "pixels": pixels, "place": place, "cosine": np.full(2, 0.9 if kind == "outlier" else 0.1),
            }  # fmt: skip
        images.append(image)
    return outliers.compare(images, labels, (2, 2))


def test_what_outliers_hold():
    found = drawn({"outlier": "class", "normal": "place"})
    values = {name: [found[name][kind]["value"] for kind in outliers.KINDS] for name in found}
    assert values["class"][0] == 100 and 30 < values["class"][1] < 70
    assert values["position"][1] == 100 and values["position"][0] < 45
    assert values["away"][1] == 0 and values["away"][0] > 0.4
    assert values["cosine"] == pytest.approx([0.9, 0.1])
    found = drawn({"outlier": "pixels", "normal": "class"})["pixels"]
    assert found["outlier"]["value"] > 99 and abs(found["normal"]["value"]) < 10
    assert outliers.compare([{}] * 5, None, GRID) is None


def test_as_many_normal_patches_as_outliers_are_drawn():
    norms = torch.ones(24)
    norms[[3, 17]] = 50
    values = {"tokens": torch.arange(24)[:, None]}
    found = outliers.draw(norms, 10, values, 32, torch.Generator().manual_seed(0))
    assert sorted(found["outlier"]["place"]) == [3, 17] and len(found["normal"]["place"]) == 2
    assert (found["normal"]["tokens"][:, 0] == found["normal"]["place"]).all()
    assert outliers.draw(torch.ones(24), 10, values, 32, torch.Generator()) is None


def annotated(images, truth):
    return lambda given=None: iter(
        [(images, torch.arange(len(images)) % 2, *([[truth] * len(images)] if given else []))]
    )


def test_what_is_not_there_is_absent():
    model = tiny(cls_pos=None)
    images, box = noise(model, 4), torch.tensor([[0.0, 0, 24, 16]])
    found = dense.measure(model, annotated(images, Truth(boxes=box)), truth=1)
    assert found["hit_ratio"] is None and found["corloc"]["plain"] == 100 and found["segmentation"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert not any("CLS" in line for line in dense.lines(found))
    no_overlaps(dense.page(found, "a model"))
    with pytest.raises(BadInput, match="nothing to judge by"):
        dense.measure(model, annotated(images, None))


def test_scenes_in_the_script(tmp_path, capsys):
    """Boxes and masks are of the very images that are looked at, resized as they are."""
    model = tiny(img_size=32, patch_size=8, num_classes=10)
    data = {
        "name": "DIGITSSCENES",
        "classes": scenes.CLASSES,
        "input_size": (32, 32),
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
    }
    args = {"epochs": 1, "data_path": None}
    data["name"] = "DIGITS_SCENES"
    file = tmp_path / "m.pth"
    save_checkpoint(file, {"model": model.state_dict(), "model_args": model.model_args, "data": data, "args": args})
    argv = ["--model_path", file, "--output_dir", tmp_path, "--what", "dense", "--num_images", 60]
    status, out, err = run(analyze_tokens.main, argv, capsys)
    assert status == 0 and "The patch most like CLS is in a box" in out and "Segmentation, kNN" in out, err
    found = json.loads((tmp_path / "analysis.json").read_text())["dense"]
    assert found["with_boxes"] == found["with_masks"] == 60
    boxes, _ = scenes.truth(train=False)
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).float().mean() / 64**2
    assert found["hit_ratio"]["plain"] == pytest.approx(100 * float(area), rel=0.25)  # chance: the boxes' mean area


def test_masks_and_boxes_of_a_users_images(tmp_path, capsys):
    model, folder = tiny(), tmp_path / "photos"
    data = {"name": "FOLDER", "classes": list("abcde"), "input_size": (16, 24), "mean": [0.5] * 3, "std": [0.2] * 3}
    file = tmp_path / "m.pth"
    save_checkpoint(file, {
        "model": model.state_dict(), "model_args": model.model_args, "data": data, "args": {"epochs": 1}
    })  # fmt: skip
    (tmp_path / "masks").mkdir()
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(256, size=(32, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        mask = Image.fromarray((np.arange(48)[None] // 16 * np.ones((32, 1))).astype(np.uint8))
        mask.putpalette(list(range(256)) * 3)
        mask.save(tmp_path / "masks" / f"{i}.png")
    common = ["--model_path", file, "--output_dir", tmp_path, "--what", "dense", "--image_path", folder]
    status, out, err = run(analyze_tokens.main, [*common, "--masks", tmp_path / "masks"], capsys)
    assert status == 0 and "Segmentation, linear" in out, err
    found = json.loads((tmp_path / "analysis.json").read_text())["dense"]["segmentation"]
    assert found["classes"] == [0, 1, 2] and found["probes"]["most frequent class"]["accuracy"] == pytest.approx(
        33, abs=9
    )
    for more, words in (
        ([], "dense has nothing to judge by"),
        (["--masks", tmp_path], "none of the images has a mask"),
        (["--boxes", tmp_path / "no.json"], "no.json"),
    ):
        status, _, err = run(analyze_tokens.main, [*common, *more], capsys)
        assert (status, len(err.splitlines())) == (2, 1) and words in err, err
    status, out, err = run(analyze_tokens.main, [*common, "--what", "dense", "norms"], capsys)  # which is not lost
    assert status == 2 and "all but this is measured: dense has nothing to judge by" in err and "analysis.pdf" in out
    results = json.loads((tmp_path / "analysis.json").read_text())
    assert results["what"] == ["norms"] and results["norms"] and "dense" not in results
    Image.new("L", (5, 5)).save(tmp_path / "masks" / "3.png")
    status, _, err = run(analyze_tokens.main, [*common, "--masks", tmp_path / "masks"], capsys)
    assert status == 2 and "5 x 5 pixels, and its image 48 x 32" in err


def test_patches_that_do_not_cover_the_image():
    """As 6 of 384 pixels in patches of 14: of 30 pixels, 24 are in 3 x 3 patches of 8, and boxes and masks of these."""
    vit = VisionTransformer(img_size=30, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0)
    vit.pretrained_cfg = {"input_size": (3, 30, 30)}
    model, data = ForeignViT(vit, "own", (30, 30)), {"input_size": (30, 30), "covered": (24, 24)}
    mask = torch.zeros(60, 60, dtype=torch.uint8)
    mask[32:48, 16:32] = 7  # patch 7: row 2, column 1
    seen = truth_of([(16, 32, 32, 48)], Image.fromarray(mask.numpy()), (60, 60), InputImage("a", None), data)
    assert seen.boxes.tolist() == [[8, 16, 16, 24]]
    assert segmentation.patch_labels(seen.mask, model.grid_size).tolist() == [0] * 7 + [7, 0]
    tokens = torch.eye(9)
    found = judge_boxes(model, seen.boxes, {"cls": tokens[7], "tokens": tokens, "keys": torch.ones(9, 2)})
    assert found[:2] == (1, pytest.approx(1 / 9))
