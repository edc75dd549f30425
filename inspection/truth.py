"""Where the objects of an image are, as the model sees it: the boxes and masks that dense quality is judged by.

DIGITS_SCENES has both. For the images of --image_path, --masks is a folder of PNG files named like the images with a
class for each pixel (a palette or 8 bits; 255 is ignored), as VOC's SegmentationClass, and --boxes are annotations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from inspection.annotations import COCO, VOC, check_matches, entry_of, index_of, read_annotations
from inspection.inputs import seen_part
from loading import scenes
from utils import BadInput

IGNORED = 255  # a class of masks


@dataclass
class Truth:
    """In pixels of the model's input that are in patches; None: not annotated."""

    boxes: Tensor | None = None  # (n, 4): left, upper, right, lower; n > 0
    mask: Tensor | None = None  # (h, w) uint8: 0 background, 255 to be ignored


def add_flags(parser):
    group = parser.add_argument_group("for --what dense, with --image_path (DIGITS_SCENES has boxes and masks)")
    group.add_argument("--masks", metavar="FOLDER", help="PNG files named like the images: a class for each pixel")
    group.add_argument("--boxes", metavar="PATH", help=f"{COCO}; or {VOC}")


def find_truth(args, data, images) -> Callable | None:
    """A function: (`InputImage`, its size (width, height)) -> Truth; None if nothing is annotated.

    Raises BadInput, now or for one of the images, for annotations that are missing, damaged or of other images.
    """
    if not args.masks and not args.boxes:
        return of_scenes(data) if data["name"] == "DIGITS_SCENES" and not args.image_path else None
    if not args.image_path:
        raise BadInput("--masks and --boxes are of the images of --image_path; give that, too")
    files = _mask_files(images, Path(args.masks)) if args.masks else {}
    entries = read_annotations(Path(args.boxes)) if args.boxes else []
    index = index_of(entries)
    if args.boxes:
        check_matches(images, entries, index, args.boxes)

    def truth(image, size):
        entry, file = entry_of(image.file, index), files.get(image.name)
        boxes = entry.boxes if entry and entry.size in (None, size) else []
        return truth_of(boxes, _read_mask(file, size) if file else None, size, image, data)

    return truth


def of_scenes(data) -> Callable:
    """A function: (`InputImage` with its number among the test images, its size) -> Truth, of DIGITS_SCENES."""
    boxes, masks = scenes.truth(train=False)

    def truth(image, size):
        mask = Image.fromarray(masks[image.number].numpy())
        return truth_of(boxes[image.number][None].tolist(), mask, size, image, data)

    return truth


def _mask_files(images, folder) -> dict[str, Path]:
    """{name of an image: its mask}, of the images that have one."""
    files = {image.name: folder / f"{image.file.stem}.png" for image in images}
    files = {name: file for name, file in files.items() if file.is_file()}
    if not files:
        example = f"{images[0].file.stem}.png"
        raise BadInput(f"none of the images has a mask in {folder}; give --masks a folder with {example}, ...")
    if len({*files.values()}) < len(files):
        raise BadInput(f"two images have one mask in {folder}; give --image_path images of different names")
    return files


def _read_mask(file, size):
    try:
        with Image.open(file) as image:
            mode, mask = image.mode, Image.fromarray(np.array(image)) if image.mode in "LP" else image
    except Exception as error:  # Pillow's plugins raise many kinds
        raise BadInput(f"cannot read the mask {file} ({error}); fix or remove it") from None
    if mode not in "LP":
        raise BadInput(f"the mask {file} has no palette and no single channel of 8 bits, but {mode}; convert it")
    if mask.size != size:
        here, there = (f"{width} x {height}" for width, height in (mask.size, size))
        raise BadInput(f"the mask {file} has {here} pixels, and its image {there}; masks are of whole images, upright")
    return mask


def truth_of(boxes, mask, size, image, data) -> Truth:
    """Cropped and resized as the image is; masks take the nearest pixel."""
    (h, w), part = data.get("covered", data["input_size"]), seen_part(*size, image, data)
    if mask is not None:
        mask = torch.from_numpy(np.array(mask.resize((w, h), Image.Resampling.NEAREST, part)))
    offset, scale = torch.tensor(part[:2] * 2), torch.tensor([w / (part[2] - part[0]), h / (part[3] - part[1])] * 2)
    boxes = (torch.tensor(boxes).reshape(-1, 4) - offset) * scale
    boxes = boxes.clamp(min=torch.zeros(4), max=torch.tensor([w, h, w, h]))
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
    return Truth(boxes if len(boxes) else None, mask)
