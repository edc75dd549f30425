"""The accuracy of a model on the test images of a checkpoint's data set."""

import utils
from checkpoints.models import data_folder
from datasets import MAX_PIXELS, check_classes, find_split
from engine import evaluate
from loading.files import FileLoader
from loading.memory import MemoryLoader, read_split
from utils import say


def score(model, checkpoint, data_path, device, batch_size, workers=0, keep_predictions=False, max_pixels=MAX_PIXELS):
    """Score `model` on the test images of a checkpoint's data set, every image once, in full precision.

    Returns:
        What `evaluate` does, and the split of the test images.
    """
    data, path = checkpoint["data"], data_folder(checkpoint, data_path)
    share = dict(batch_size=batch_size, rank=utils.rank(), world_size=utils.world_size())
    if "crop_pct" in data:
        split, classes = find_split(data["name"], path, False, data, max_pixels)
        batches = FileLoader(split, data, device=device, workers=workers, **share)
    else:
        split, classes = read_split(data["name"], path, False, data["input_size"], data, max_pixels)
        batches = MemoryLoader(split.to(device), data, **share)
    check_classes(classes, data["classes"], "the test images", "the model")
    there = data.get("images", {}).get("test", len(split))
    if len(split) != there:
        say(f"note: there are {len(split)} test images; in training there were {there}")
    return evaluate(model.to(device), batches, keep_predictions), split
