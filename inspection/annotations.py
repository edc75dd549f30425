"""Boxes of objects that people drew: COCO- and VOC-style annotation files, and which image each entry belongs to."""

import json
import math
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import utils
from utils import BadInput

COCO = "a COCO-style .json file: images with id and file_name, annotations with image_id and bbox"
VOC = "a folder of VOC-style .xml files: annotation with object/bndbox of xmin, ymin, xmax and ymax"


@dataclass
class Annotated:
    """An annotated image."""

    names: set[str]  # possible names of its file
    size: tuple[int, int] | None  # width, height; None: unknown
    boxes: list[list[float]]  # left, upper, right, lower


def read_annotations(path: Path) -> list[Annotated]:
    """Raises BadInput, naming the file, for one that is missing, damaged or of another kind."""
    files = sorted(path.glob("*.xml")) if path.is_dir() else [path] if path.exists() else []
    if not files:
        raise BadInput(f"there are no annotations in {path}; give {COCO}, or {VOC}")
    return [entry for file in files for entry in _read(file, *((_voc, VOC) if path.is_dir() else (_coco, COCO)))]


def _read(file, parse, kind):
    if not file.is_file():  # a pipe or a device may never end
        raise BadInput(f"{file} is not a file; give {kind}")
    try:
        return parse(file.read_text(encoding="utf-8-sig"), file.stem)
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}; give {kind}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, ET.ParseError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise BadInput(f"cannot use {file} ({problem}); give {kind}") from None


def _coco(text, _) -> list[Annotated]:
    content, images = json.loads(text), {}
    for image in content["images"]:
        if image["id"] in images:
            raise ValueError(f"two images have the id {image['id']}")
        images[image["id"]] = Annotated(_names(image["file_name"]), _size(image.get("width"), image.get("height")), [])
    for annotation in content["annotations"]:
        if annotation["image_id"] not in images:
            raise ValueError(f"it has a box of image {annotation['image_id']}, but no such image")
        if not annotation.get("iscrowd"):
            x, y, width, height = map(float, annotation["bbox"])
            images[annotation["image_id"]].boxes += _boxes(x, y, x + width, y + height)
    return list(images.values())


def _voc(text, stem) -> list[Annotated]:
    if "<!DOCTYPE" in text:  # it may define entities that grow without bounds
        raise ValueError("a DOCTYPE is not accepted")
    root = ET.fromstring(text)
    if root.tag != "annotation":
        raise ValueError(f"its root element is {root.tag}")
    boxes = []
    for corners in (each.find("bndbox") for each in root.findall("object")):
        if corners is None:
            raise KeyError("bndbox")
        left, upper, right, lower = (float(corners.findtext(n, "nothing")) for n in ("xmin", "ymin", "xmax", "ymax"))
        boxes += _boxes(left - 1, upper - 1, right, lower)  # pixels count from 1, the last one is inside
    size = _size(root.findtext("size/width"), root.findtext("size/height"))
    return [Annotated(_names(root.findtext("filename") or stem) | {stem}, size, boxes)]


def _names(name) -> set[str]:
    name = name.strip().replace("\\", "/")
    return {name, name.rpartition("/")[2]}


def _size(width, height) -> tuple[int, int] | None:
    """None where it is missing; some tools write 0."""
    size = round(float(width or 0)), round(float(height or 0))
    return size if min(size) > 0 else None


def _boxes(*box) -> list[list[float]]:
    """A list of one box, or of none if it is empty, as some of COCO are."""
    if not all(map(math.isfinite, box)) or box[2] < box[0] or box[3] < box[1]:
        raise ValueError(f"{box} (left, upper, right, lower) is not a box")
    return [list(box)] if box[2] > box[0] and box[3] > box[1] else []


def folder_of_images(annotations: Path) -> Path:
    """`images/` beside the file, `JPEGImages/` beside the folder, or else where the annotations are."""
    here, name = (annotations, "JPEGImages") if annotations.is_dir() else (annotations.parent, "images")
    there = annotations.absolute().parent / name
    return there if there.is_dir() else here


def index_of(entries) -> dict[str, Annotated]:
    """The annotated images, under each name that only one of them has."""
    owners = defaultdict(list)
    for entry in entries:
        for name in entry.names:
            owners[name].append(entry)
    return {name: those[0] for name, those in owners.items() if len(those) == 1}


def entry_of(file: Path | None, index) -> Annotated | None:
    """The annotated image whose name is the longest end of the file's path, or else its name without the suffix."""
    names = [] if file is None else ["/".join(file.parts[i:]) for i in range(len(file.parts))] + [file.stem]
    return next((index[name] for name in names if name in index), None)


def check_matches(images, entries, index, path):
    """Raise BadInput if two `InputImage`s have the same entry, or none has one."""
    owner = {}
    for image in images:
        entry = entry_of(image.file, index)
        if entry and owner.setdefault(id(entry), image) is not image:
            first = owner[id(entry)].file
            raise BadInput(f"{first} and {image.file} are one image in {path}; leave one out of --image_path")
    if not owner:
        raise BadInput(f"none of the images ({images[0].title}, ...) is in {path}; give those that are annotated there")
    if len(owner) < len(entries):
        utils.say(f"note: {len(entries) - len(owner)} of {len(entries)} annotated images are missing; left out")
