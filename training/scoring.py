"""The accuracy of a model on the test images of a checkpoint's dataset."""

import utils
from checkpoints.models import data_folder
from datasets import MAX_PIXELS, check_classes, find_split
from engine import evaluate
from loading.files import FileLoader
from loading.memory import MemoryLoader, read_split
from utils import say


def eval_batches(split, data, device, batch_size, workers=0, **share):
    """Batches of a split as training on such `data` (a description) validates them: from files, or from memory.

    Args:
        workers: processes that read files.
        share: `rank` and `world_size` of this process.
    """
    if "crop_pct" in data:
        return FileLoader(split, data, batch_size, device, workers=workers, **share)
    return MemoryLoader(split.to(device), data, batch_size, **share)


def score(model, checkpoint, data_path, device, batch_size, workers=0, keep_predictions=False, max_pixels=MAX_PIXELS):
    """Score `model` on the test images of a checkpoint's dataset, every image once, in full precision.

    Returns:
        What `evaluate` does, and the split of the test images.
    """
    data, path = checkpoint["data"], data_folder(checkpoint, data_path)
    if "crop_pct" in data:
        split, classes = find_split(data["name"], path, False, data, max_pixels)
    else:
        split, classes = read_split(data["name"], path, False, data["input_size"], data, max_pixels)
    batches = eval_batches(split, data, device, batch_size, workers, **utils.own_share())
    check_classes(classes, data["classes"], "the test images", "the model")
    there = data.get("images", {}).get("test", len(split))
    if len(split) != there:
        say(f"note: there are {len(split)} test images; in training there were {there}")
    return evaluate(model.to(device), batches, keep_predictions), split
