"""What a finished cell is measured by beside its accuracy: `MEASURES`, on the same test images for all cells."""

from itertools import islice

import torch

import utils
from checkpoints.models import load_model
from datasets import ImageData
from inspection import causes, dense, sinks
from inspection.attention import can_be_seen
from inspection.inputs import InputImage
from inspection.statistics import TokenStatistics
from inspection.truth import of_scenes
from loading import scenes
from loading.memory import MemoryLoader

IMAGES, BATCH = 512, 64  # of the test images, drawn at random


@utils.full_precision()
@torch.no_grad()
def measured(model_path, data: ImageData, device) -> dict:
    """What `MEASURES` add to the record of a cell, of the weights that were tested; None for an absent token."""
    model, checkpoint = load_model(model_path)
    model, order = model.to(device), torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    numbers = order[:IMAGES].tolist()  # folders come class by class
    images, record = data.test.part(numbers).to(device), {}
    truths = _of_scenes(numbers, checkpoint["data"]) if data.name == "DIGITS_SCENES" else None

    def batches(truth=None):
        left = iter(truths or ())
        for shown, labels in MemoryLoader(images, checkpoint["data"], BATCH):
            yield (shown, labels, list(islice(left, len(shown)))) if truth else (shown, labels)

    for measure in MEASURES:
        record |= measure(model, batches)
    return record | (dense_quality(model, batches) if truths else {})


def _of_scenes(numbers, data) -> list:
    truth = of_scenes(data)
    images = (InputImage(str(n), None, in_memory=True, number=n) for n in numbers)
    return [truth(image, (scenes.SIZE, scenes.SIZE)) for image in images]


def dense_quality(model, batches) -> dict:
    """Hit ratio, LOST's CorLoc, and the mean IoU of patches by kNN, in per cent; see `inspection.dense`."""
    found = dense.measure(model, batches, truth=True)
    hits, segmented = found["hit_ratio"], found["segmentation"]
    return {
        "hit_ratio": hits and hits["value"], "corloc": found["corloc"] and found["corloc"]["value"],
        "knn_iou": segmented and segmented["probes"]["kNN"]["iou"],
    }  # fmt: skip


def attention_and_artefacts(model, batches) -> dict:
    """Shares of attention and of artefacts, in per cent.

    The artefact share is that of the block with most; the class token's attention is a mean over heads, at the last
    block.
    """
    statistics = TokenStatistics(model, probe_images=0, attention=can_be_seen(model))
    for images, _ in batches():
        statistics.add(images)
    found = statistics.result()

    def share(kind):
        heads = found["cls_attention"].get(kind, [None])[-1]
        return None if heads is None else 100 * sum(heads) / len(heads)

    artefacts = [block["share"] for block in found["artefacts"]["blocks"]]
    return {
        "artefact_share": 100 * max(artefacts), "artefacts_begin_at": found["artefacts"]["begins_at_block"],
        "cls_to_patches": share("patches"), "cls_to_registers": share("registers"), "cls_to_itself": share("cls"),
    }  # fmt: skip


def causal_depth(model, batches) -> dict:
    """Top-1 lost where CLS is replaced by its initial token, at each block, and until which block that is harmless.

    Where it is not even harmless at the first block of CLS, the depth is the block before that, so that means over
    seeds have a number; -1: before block 0.
    """
    names = ("causal_depth", "causal_depth_low", "causal_depth_high")
    if model.cls_pos is None:
        return dict.fromkeys((*names, "causal_cost", "causal_cost_interval"))
    found = causes.measure(model, batches, images=0, kinds=("cls",), replacements=(causes.INITIAL,))
    values = found["tokens"]["cls"][causes.INITIAL]
    blocks = [values["harmless_until"], *values["harmless_interval"]]
    depths = dict(zip(names, (model.cls_pos - 1 if block is None else block for block in blocks)))
    return depths | {"causal_cost": values["cost"], "causal_cost_interval": values["cost_interval"]}


def sinks_by_kind(model, batches) -> dict:
    """Shares of all heads, blocks and images with a sink on such a token, in per cent."""
    kinds = sinks.measure(model, batches)["kinds"] if can_be_seen(model) else {}

    def share(kind):
        return 100 * sum(v or 0 for v in kinds[kind]["sink"]) / model.depth if kind in kinds else None

    return {f"sinks_on_{kind}": share(kind) for kind in ("cls", "registers", "patches")}


# Each takes (model, a function that returns batches of images and labels) and returns a part of the record: plain
# values, which `checkpoints.schema.CELL_RESULT` describes.
MEASURES = (attention_and_artefacts, causal_depth, sinks_by_kind)
# What tables, means over seeds and sweep.html show of a record: its title, and its unit.
TITLES = {
    "test_top1": ("test accuracy", "%"), "val_top1": ("held-out accuracy", "%"), "test_loss": ("test loss", ""),
    "test_top5": ("test accuracy, top-5", "%"),
    "flops": ("a forward pass", "MFLOPs"), "images_per_s": ("training", "images/s"),
    "causal_depth": ("CLS replaceable to block (entry - 1: none)", ""),
    "artefact_share": ("artefact patches", "%"),
    "cls_to_registers": ("attention of CLS to registers", "%"), "sinks_on_cls": ("sinks on CLS", "%"),
    "sinks_on_registers": ("sinks on registers", "%"), "sinks_on_patches": ("sinks on patches", "%"),
    "hit_ratio": ("patch most like CLS is in the box", "%"), "corloc": ("CorLoc of LOST", "%"),
    "knn_iou": ("segmentation by kNN, mean IoU", "%"),
}  # fmt: skip
# What a verdict may be on (`--measure`): its name in `TITLES`, and 1 if more of it is better, -1 if less.
PRIMARY = {
    "accuracy": ("test_top1", 1), "top5": ("test_top5", 1), "loss": ("test_loss", -1),
    "artefacts": ("artefact_share", -1), "patch_sinks": ("sinks_on_patches", -1), "hit_ratio": ("hit_ratio", 1),
    "corloc": ("corloc", 1), "knn_iou": ("knn_iou", 1),
}  # fmt: skip
