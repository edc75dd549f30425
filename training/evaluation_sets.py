"""Sets of images that ImageNet's models are compared on, scored as by timm's `validate.py`, in its files."""

import csv
import io
import json
import os
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn

import utils
from datasets import Split
from engine import evaluate
from loading.archives import kind_of
from loading.files import FileLoader
from loading.folders import class_folders, find_folders, folder_of, note_left_out
from loading.labels import timm_info
from training.run_log import write_csv
from utils import BadInput

FILES = {  # the names of timm's results/
    "imagenet": "imagenet", "real": "imagenet-real", "v2": "imagenetv2-matched-frequency", "a": "imagenet-a",
    "r": "imagenet-r", "sketch": "sketch",
}  # fmt: skip
COLUMNS = ("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation")


def read_set(name, path, classes, max_pixels) -> tuple[Split, list[int] | None]:
    """The images of a set (one of FILES, or any other name), from its class folders, or those of val/ or test/ in it.

    Where it has only some of the model's classes (ImageNet-A and R have 200), only these compete, as in timm. Folders
    that are numbers (ImageNet-V2) are numbers of the model's classes, unless these have such names.

    Args:
        classes: of the model.

    Returns:
        The images, and numbers of the model's classes that compete (None: all). Labels are places among these, (M,),
        or with several right answers (M, L), filled up with -1.

    Raises:
        BadInput: no such images, or classes that the model does not have.
    """
    left_out = Counter()
    folders = find_folders("IMNET", path)
    place = folders.get("test") or (folder_of("test", folders, "IMNET", path) if kind_of(path) else Path(path))
    images, labels, own = class_folders(place, left_out)
    note_left_out(path, left_out)
    split = Split(images, labels, max_pixels)
    if name == "real":
        return _reassessed(split, classes, path), None
    numbers = _numbers(own, labels, classes, path)
    valid = sorted(numbers)
    split.labels = torch.tensor([valid.index(number) for number in numbers])[labels]
    return split, valid if len(valid) < len(classes) else None


def _numbers(own, labels, classes, path) -> list[int]:
    """The number of each class of a set (its names, or None: the labels are numbers) among the model's classes."""
    own = own or [str(i) for i in range(max(len(classes), int(labels.max()) + 1))]
    places = {name: i for i, name in enumerate(classes)}
    are_numbers = not set(own) & places.keys() and all(name.isdecimal() for name in own)
    numbers = [int(name) if are_numbers else places.get(name, -1) for name in own]
    wrong = [name for name, number in zip(own, numbers) if not 0 <= number < len(classes)]
    if wrong:
        raise BadInput(f"{path} has a class {wrong[0]} and the model has none; leave out this set, or these images")
    return numbers


def _reassessed(split, classes, path) -> Split:
    """ImageNet's validation images with the labels of ReaL (arXiv 2006.07159), those that have none left out."""
    synsets, places = timm_info("imagenet_synsets.txt").split(), {name: i for i, name in enumerate(classes)}
    if not set(synsets) <= places.keys():
        raise BadInput("the labels of ReaL are for ImageNet's 1000 classes, and the model has others; leave real out")
    real, kept, labels = json.loads(timm_info("imagenet_real_labels.json")), [], []
    for i, file in enumerate(split.images.tolist()):
        number = re.search(r"ILSVRC2012_val_(\d{8})\.[^./]*$", os.fsdecode(file))
        if number is None or not 0 < int(number[1]) <= len(real):
            raise BadInput(f"{path}: ReaL knows ILSVRC2012_val_00000001.JPEG to 00050000, not {os.fsdecode(file)}")
        right = [places[synsets[label]] for label in real[int(number[1]) - 1]]
        if right:
            kept.append(i)
            labels.append(torch.tensor(right))
    if not kept:
        raise BadInput(f"{path}: none of its images has a label in ReaL")
    split = split.part(kept)
    split.labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-1)
    return split


def score_set(model, data, split, valid, device, batch_size, workers=0) -> dict:
    """`evaluate` a model on its device. `data`: a description of its images, see `FileLoader`; the set: `read_set`."""
    batches = FileLoader(split, data, batch_size, device, workers=workers, **utils.own_share())
    if valid is None:
        return evaluate(model, batches)
    with model.register_forward_hook(lambda module, args, logits: logits[:, valid]):
        return evaluate(model, batches)


def result_row(model, name, data, result) -> dict:
    """A line of timm's results/: per cent, parameters in millions."""
    top1, top5 = (round(result[key], 4) for key in ("top1", "top5"))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    values = (name, top1, round(100 - top1, 4), top5, round(100 - top5, 4), f"{millions:.2f}",
              max(data["input_size"]), data["crop_pct"], data["interpolation"])  # fmt: skip
    return dict(zip(COLUMNS, values))


def write_results(folder, name, row) -> Path:
    """Put a row into results-NAME.csv, in place of the one of the same model, ordered by top-1."""
    path, rows = Path(folder) / f"results-{FILES.get(name, name)}.csv", []
    if path.is_file():
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        if rows and set(rows[0]) != set(COLUMNS):
            raise BadInput(f"{path} has other columns; give another --output_dir")
    rows = [row, *(other for other in rows if other["model"] != row["model"])]
    write_csv(path, COLUMNS, sorted(rows, key=lambda each: -float(each["top1"])))
    return path
