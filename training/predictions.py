"""Predictions for a folder of images without labels, as a CSV file."""

import codecs
import csv
import os
from collections import Counter
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
from tqdm import tqdm

import utils
from datasets import MAX_PIXELS, WHOLE_IMAGE, Split, normalise
from loading.decode import THREADS, fit_image, note_unreadable, read_picture
from loading.folders import image_files, note_left_out
from utils import BadInput

TOP = 5  # classes of each image that are written


def write_predictions(model, checkpoint, folder, path, device, batch_size, max_pixels=MAX_PIXELS) -> int:
    """Write the most probable classes of each image at any depth below `folder`, a row each, to the CSV file `path`.

    Columns: `path`, `class`, `probability` (softmax), then `class_2`, `probability_2`, up to `TOP`, or to the model's
    classes if they are fewer. Images are read a batch at a time, as those that the model is tested on. Those that
    cannot be read have no row; they are counted and listed.

    Args:
        checkpoint: the model's, with a description of its data.

    Returns:
        How many rows there are.

    Raises:
        BadInput: no such folder, no images in it, or none that can be read. The file is then as it was.
    """
    if not os.path.isdir(folder):
        raise BadInput(f"--predict: there is no folder {folder}")
    left_out = Counter()
    files = image_files(folder, left_out)
    note_left_out(folder, left_out)
    if not files:
        raise BadInput(f"--predict: {folder} has no images; give a folder that has some")
    split = Split(np.array([os.fsencode(file) for file in files]), torch.zeros(len(files)), max_pixels)
    model, data, errors = model.to(device).eval(), WHOLE_IMAGE | checkpoint["data"], {}
    classes = data["classes"]

    def write(file):  # names of files are bytes
        table = csv.writer(codecs.getwriter("utf-8")(file, "surrogateescape"), lineterminator="\n")
        numbers = ["", *(f"_{n}" for n in range(2, min(TOP, len(classes)) + 1))]
        table.writerow(["path", *(name + n for n in numbers for name in ("class", "probability"))])
        for i, shares, labels in _predicted(model, split, data, batch_size, errors):
            pairs = ((classes[label], f"{share:.6g}") for share, label in zip(shares, labels))
            table.writerow([files[i], *(value for pair in pairs for value in pair)])
        if len(errors) == len(files):
            raise BadInput(f"--predict: none of the {len(files)} images in {folder} can be read: {errors[0]}")

    utils.write_atomically(path, write)
    note_unreadable(errors, len(files), "")
    return len(files) - len(errors)


@torch.no_grad()
def _predicted(model, split, data, batch_size, errors):
    """(number, `TOP` probabilities, their classes) of each image; `errors` gets those that cannot be read, and why."""
    device = next(model.parameters()).device
    crop = {key: data[key] for key in ("crop_pct", "interpolation")}

    def read(i):
        try:
            return fit_image(read_picture(split, i), data["input_size"], **crop)
        except BadInput as error:
            errors[i] = error

    starts = range(0, len(split), batch_size)
    with ThreadPool(THREADS) as pool, utils.full_precision():
        for start in tqdm(starts, desc="predicting", unit="batch", leave=False, disable=None):
            numbers = range(start, min(start + batch_size, len(split)))
            images = {i: image for i, image in zip(numbers, pool.map(read, numbers)) if image is not None}
            if not images:
                continue
            batch = normalise(torch.stack([*images.values()]).to(device), data["mean"], data["std"])
            top = model(batch).float().softmax(dim=1).topk(min(TOP, len(data["classes"])), dim=1)
            yield from zip(images, top.values.tolist(), top.indices.tolist())
