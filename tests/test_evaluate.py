"""evaluate.py: sets of few images against what timm's validate.py computes, and its own folders, tables and errors."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import RealLabelsImagenet, create_dataset, create_loader
from timm.utils import accuracy

from checkpoints.files import save_checkpoint
from evaluate import main
from loading.labels import timm_info
from runs import run, tiny
from training.evaluation_sets import COLUMNS, read_set
from utils import BadInput

SYNSETS = timm_info("imagenet_synsets.txt").split()
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=1000, img_size=32, depth=1)
    with torch.no_grad():
        model.head.weight.normal_(std=1.0)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(model.state_dict(), path)
    return model.eval(), path


def noise_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path, "PNG")


@pytest.fixture
def scored(weights, monkeypatch, tmp_path, capsys):
    """(set, folder) -> (images, top-1, top-5) of the script's table, and the row of its file."""
    monkeypatch.setattr("evaluate.create", lambda *_: weights[0])

    def score(name, folder, file):
        flags = ["--input_size", 32, "--eval_crop_ratio", 1, "--num_workers", 0, "--device", "cpu", "--batch_size", 7]
        out = tmp_path / "results"
        status, text, err = run(main, ["--model_path", f"timm:{NAME}", *flags, "--sets", f"{name}={folder}",
                                       "--output_dir", out], capsys)  # fmt: skip
        assert status == 0, err
        images, *shown = next(line.split()[1:] for line in text.splitlines() if line.startswith(f"{name} "))
        (row,) = csv.DictReader((out / file).open())
        assert tuple(row) == COLUMNS and row["model"] == NAME and row["img_size"] == "32"
        return int(images), *map(float, shown), float(row["top1"]), float(row["top5"])

    return score


def timms(model, folder, valid=None, real=False):
    """Top-1 and top-5 as timm's validate.py computes them."""
    data = create_dataset("", root=str(folder), class_map="")
    loader = create_loader(data, (3, 32, 32), 5, is_training=False, use_prefetcher=False, num_workers=0, crop_pct=1.0,
                           mean=model.pretrained_cfg["mean"], std=model.pretrained_cfg["std"],
                           interpolation=model.pretrained_cfg["interpolation"])  # fmt: skip
    with torch.no_grad():
        logits, labels = zip(*((model(images), labels) for images, labels in loader))
    logits, labels = torch.cat(logits), torch.cat(labels)
    if real:
        names = data.filenames(basename=True)
        judge = RealLabelsImagenet.__new__(RealLabelsImagenet)  # its own constructor wants all 50,000 images
        every = json.loads(timm_info("imagenet_real_labels.json"))
        judge.real_labels = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": found for i, found in enumerate(every)}
        judge.filenames, judge.topk, judge.is_correct, judge.sample_idx = names, (1, 5), {1: [], 5: []}, 0
        judge.add_result(logits)
        return judge.get_accuracy(1), judge.get_accuracy(5), len(judge.is_correct[1])
    return *(float(value) for value in accuracy(logits if valid is None else logits[:, valid], labels, (1, 5))), len(
        data
    )


def check(found, count, top1, top5):
    assert found[0] == count
    assert found[1:3] == pytest.approx((top1, top5), abs=0.006)  # printed with two digits
    assert found[3:] == pytest.approx((top1, top5), abs=1e-3)


def choose(model, seed, classes):
    """A folder for an image of noise: the class of the model's first, fourth or 41st guess."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        logits = model(((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None])[0, classes]
    return int(logits.argsort(descending=True)[(0, 3, 40)[seed % 3]])


@pytest.mark.parametrize("name", ["a", "r"])
def test_a_and_r_are_scored_among_their_200_classes(name, weights, scored, tmp_path):
    valid = [int(line) for line in timm_info(f"imagenet_{name}_indices.txt").split()]
    synsets = timm_info(f"imagenet_{name}_synsets.txt").split()
    assert [SYNSETS[number] for number in valid] == synsets
    folder = tmp_path / "set"
    for i, synset in enumerate(synsets):
        noise_image(folder / synset / "x.png", i)
    for seed in range(300, 330):
        noise_image(folder / synsets[choose(weights[0], seed, valid)] / f"{seed}.png", seed)
    top1, top5, count = timms(weights[0], folder, valid)
    assert top1 >= 3 and top5 > top1
    found = scored(name, folder, f"results-imagenet-{name}.csv")
    assert found == (
        count,
        *(round(value, 2) for value in (top1, top5)),
        *(pytest.approx(value, abs=1e-3) for value in (top1, top5)),
    )


def test_real(weights, scored, tmp_path):
    """Any of several labels is right; images without one do not count."""
    every = json.loads(timm_info("imagenet_real_labels.json"))
    folder = tmp_path / "imagenet" / "val"
    numbers = range(40)
    with torch.no_grad():  # classes that are among the labels become frequent
        for i in numbers[:8]:
            weights[0].head.bias[every[i][-1:]] += 40
    for i in numbers:
        noise_image(folder / SYNSETS[i % 5] / f"ILSVRC2012_val_{i + 1:08d}.JPEG", i)
    top1, top5, count = timms(weights[0], folder, real=True)
    assert count == sum(bool(every[i]) for i in numbers) < len(numbers) and top5 > 0
    found = scored("real", tmp_path / "imagenet", "results-imagenet-real.csv")
    assert found == (
        count,
        *(round(value, 2) for value in (top1, top5)),
        *(pytest.approx(value, abs=1e-3) for value in (top1, top5)),
    )


@pytest.mark.parametrize("number", [0, 50001])
def test_real_has_50000_images(number, tmp_path):
    noise_image(tmp_path / SYNSETS[0] / f"ILSVRC2012_val_{number:08d}.JPEG", 0)
    with pytest.raises(BadInput, match="to 00050000"):
        read_set("real", tmp_path, SYNSETS, 10**6)


def test_v2_has_numbers_for_names(tmp_path):
    for number in (0, 10, 2):
        noise_image(tmp_path / str(number) / "x.png", number)
    split, valid = read_set("v2", tmp_path, SYNSETS, 10**6)
    assert valid == [0, 2, 10]
    assert split.labels.tolist() == [0, 2, 1]  # of folders 0, 10, 2


def test_own_folders_of_an_own_checkpoint(tmp_path, capsys):
    """Class names decide, not their order; rows of other models stay."""
    model, path = tiny(img_size=(8, 8), num_classes=3), tmp_path / "model.pth"
    data = {"name": "FOLDER", "classes": ["c", "a", "b"], "input_size": (8, 8), "mean": [0.5] * 3, "std": [0.2] * 3}
    about = {"model_args": model.model_args, "data": data, "args": {"epochs": 1}, "epoch": 1}
    save_checkpoint(path, about | {"model": model.state_dict()})
    expected = []
    for i in range(12):
        file = tmp_path / "own" / "test" / "abc"[i % 3] / f"{i}.png"
        noise_image(file, i)
        pixels = np.asarray(Image.open(file).resize((8, 8), Image.Resampling.BICUBIC))
        images = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255 - 0.5) / 0.2
        expected.append(data["classes"][int(model(images).argmax())] == "abc"[i % 3])
    flags = ["--sets", f"cifar10.1={tmp_path / 'own'}", "--output_dir", tmp_path, "--num_workers", 0, "--device", "cpu"]
    for name in ("one", "two", "one"):
        status, out, err = run(main, ["--model_path", path, "--name", name, *flags], capsys)
        assert status == 0 and f"wrote {tmp_path / 'results-cifar10.1.csv'}" in out, err
    rows = list(csv.DictReader((tmp_path / "results-cifar10.1.csv").open()))
    assert [row["model"] for row in rows] == ["one", "two"]
    assert float(rows[0]["top1"]) == pytest.approx(100 * sum(expected) / 12, abs=1e-3)
    noise_image(tmp_path / "own" / "test" / "d" / "0.png", 0)
    status, _, err = run(main, ["--model_path", path, *flags], capsys)
    assert status == 2 and "has a class d" in err and len(err.splitlines()) == 1
    status, _, err = run(main, ["--model_path", path, "--sets", f"x={tmp_path / 'none'}"], capsys)
    assert status == 2 and "there is no folder" in err
    status, _, err = run(main, ["--model_path", path, "--sets", f"x={tmp_path}", f"X={tmp_path}"], capsys)
    assert status == 2 and "two sets x" in err
    status, _, err = run(main, ["--model_path", path, "--sets", "own"], capsys)
    assert status == 2 and "give NAME=PATH" in err
    status, _, err = run(main, ["--model_path", path, "--sets", f"real={tmp_path / 'own'}"], capsys)
    assert status == 2 and "leave real out" in err
