"""DIGITS_SCENES: what is composed, its boxes and masks, and that the scripts take it."""

import functools

import numpy as np
import pytest
import torch

import cifar_main
import cifar_test
import datasets
import visualize_attention
from checkpoints.files import load_checkpoint
from datasets import detect_data_set, find_split
from loading import scenes
from runs import TINY, run


@pytest.fixture(scope="module")
def test_scenes():
    return scenes.scenes(False)


def test_what_is_composed(test_scenes):
    images, labels, masks = test_scenes
    assert images.shape == (1000, 3, 64, 64) and images.dtype == masks.dtype == torch.uint8
    assert labels.bincount().min() >= 90  # as often as each other
    assert all(mask.unique().tolist() == [0, 1 + label] for mask, label in zip(masks, labels.tolist()))
    left, upper, right, lower = scenes.boxes_of(masks).T
    assert (right - left).min() >= 8 and (lower - upper).max() == 46
    for centre in ((left + right) / 2, (upper + lower) / 2):  # it is anywhere
        assert centre.min() < 20 and centre.max() > 44
    grey = images.float().mean(dim=1)
    inside = torch.stack([image[mask > 0].mean() for image, mask in zip(grey, masks)])
    outside = torch.stack([image[mask == 0].median() for image, mask in zip(grey, masks)])
    assert (inside - outside).min() > 40  # a clear digit


def test_the_same_in_every_process(test_scenes):
    np.random.seed(5)
    torch.manual_seed(5)
    again = scenes.scenes.__wrapped__(False)  # composed anew
    assert all(torch.equal(a, b) for a, b in zip(test_scenes, again))
    boxes, masks = scenes.truth(False)
    assert torch.equal(masks, again[2]) and torch.equal(boxes, scenes.boxes_of(masks))


def test_no_digit_is_in_both():
    parts = [{scan.tobytes() for scan in scenes.scans(train)[0]} for train in (True, False)]
    assert not parts[0] & parts[1] and len(parts[1]) == 360


def test_boxes_by_hand():
    masks = torch.zeros(3, 6, 9, dtype=torch.uint8)
    masks[0, 2:4, 5:9] = 3
    masks[1, 0, 0] = 255
    masks[2, 5, 1:3] = masks[2, 1, 2] = 1
    assert scenes.boxes_of(masks).tolist() == [[5, 2, 9, 4], [0, 0, 1, 1], [1, 1, 3, 6]]


def test_scripts(test_scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scenes, "COUNTS", {True: 400, False: 100})
    few = functools.cache(scenes.scenes.__wrapped__)
    for module in (scenes, datasets):
        monkeypatch.setattr(module, "scenes", few)
    path, argv = tmp_path / "m.pth", [*TINY, "--input_size", "64", "--data_set", "DIGITS_SCENES", "--max_steps", "1"]
    status, out, _ = run(cifar_main.main, [*argv, "--model_path", path], capsys)
    assert status == 0 and "DIGITS_SCENES: 360 train, 40 val, 100 test images" in out
    args = load_checkpoint(path)["args"]
    assert (args["aug"], args["hflip"]) == ("none", 0.0)
    assert detect_data_set(tmp_path / "digits_scenes") == "DIGITS_SCENES"
    assert run(cifar_test.main, ["--model_path", path, "--device", "cpu"], capsys)[0] == 0
    argv = ["--model_path", path, "--img_num", "3", "--device", "cpu", "--output_dir", tmp_path]
    assert run(visualize_attention.main, argv, capsys)[0] == 0
    assert (tmp_path / "attention_DIGITS_SCENES_test3_block2.pdf").exists()
    split, classes = find_split("DIGITS_SCENES", None, False)
    assert torch.equal(split.images, scenes.scenes(False)[0]) and classes == list("0123456789")
