"""Object discovery as in "Vision Transformers Need Registers" (arXiv 2309.16588): LOST on the queries, keys or values
of a block gives one box an image; CorLoc where boxes are annotated.

    python discover_objects.py --model_path ./models/best_model.pth --image_path my_photos --output_dir ./objects
    python discover_objects.py --model_path model.pth --features values --bias -20 --annotations VOC2007/Annotations
    python discover_objects.py --model_path dinov2.safetensors --num_heads 6 --max_side 448 \
        --image_path coco/train2014 --annotations coco/annotations/instances_train2014.json

The model sees the whole image in its own shape. Written are `objects.json` and `objects.pdf`.

Annotations are a COCO-style .json file (its crowds do not count) or a folder of VOC-style .xml files (all objects
count, difficult and truncated ones too, as in LOST's code). Without --image_path the images are looked for in `images/`
beside the file, in `JPEGImages/` beside the folder, or else where the annotations are. Boxes have to be those of the
image as a person sees it, turned as its EXIF data say; an image of another size than annotated is left out.

CorLoc is the share of images with annotated boxes in which the box has an intersection over union of at least 0.5 (as
in LOST's code) with one of them. Compare it with what the whole image as the box would reach, which is printed, too.
"""

import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import utils
from datasets import image_files
from inspection import inputs
from inspection.annotations import Annotated, read_annotations
from inspection.objects import FEATURES, Found, iou, lost, model_sizes, patch_features
from inspection.objects_pages import one_line, pages, short
from inspection.pages import write_pdf
from utils import BadInput, number

SAME = 0.5  # intersection over union from which an object is found
NO_BOX, OTHER_SIZE = "no annotated box", "other size than annotated"


# The images ------------------------------------------------------------------------------------------------------


@dataclass
class Item:
    name: str
    file: Path | None  # None: an image of the data set
    read: Callable  # () -> PIL image
    entry: Annotated | None


def find_items(args, data, checkpoint) -> list[Item]:
    """The images to look at, and what is annotated in them."""
    entries = read_annotations(Path(args.annotations)) if args.annotations else []
    index, files = index_of(entries), inputs.image_paths(args.image_path) if args.image_path else []
    if args.annotations and not args.image_path:
        place = _place_of_images(Path(args.annotations))
        files = [file for file in image_files(place) if entry_of(file, index)]
        if not files:
            raise BadInput(f"none of the images of {args.annotations} is in {place}; give --image_path")
    args.image_path = [str(file) for file in files] or args.image_path
    pictures = inputs.pictures(args, data, checkpoint, args.img_num)
    pairs = zip(pictures, files or [None] * len(pictures))
    items = [Item(one_line(file.name if file else p.name), file, p.read, entry_of(file, index)) for p, file in pairs]
    if args.annotations:
        check_matches(items, entries, args.annotations)
    return items


def _place_of_images(annotations: Path) -> Path:
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
    """The annotated image that has the most of the file's path as its name, or else its name without the suffix."""
    names = [] if file is None else ["/".join(file.parts[i:]) for i in range(len(file.parts))] + [file.stem]
    return next((index[name] for name in names if name in index), None)


def check_matches(items, entries, path):
    owner = {}
    for item in items:
        if item.entry and owner.setdefault(id(item.entry), item) is not item:
            first = owner[id(item.entry)].file
            raise BadInput(f"{first} and {item.file} are one image in {path}; leave one out of --image_path")
    if not owner:
        raise BadInput(f"none of the images ({items[0].name}, ...) is in {path}; give those that are annotated there")
    if len(owner) < len(entries):
        utils.say(f"note: {len(entries) - len(owner)} of {len(entries)} annotated images are not there; left out")


# Results ---------------------------------------------------------------------------------------------------------


def record(item, size, grid, found: Found) -> dict:
    """What `objects.json` says about an image; boxes in its pixels."""
    scale = (size[0] / grid[1], size[1] / grid[0]) * 2
    box = [edge * pixels for edge, pixels in zip(found.box, scale)]
    truth = item.entry.boxes if item.entry else []
    if item.entry and item.entry.size not in (None, size):
        verdict, judged = OTHER_SIZE, []
    else:
        verdict, judged = NO_BOX, truth
    best, whole = (max((iou(b, other) for other in judged), default=None) for b in (box, (0, 0, *size)))
    if judged:
        verdict = "found" if best >= SAME else "missed"
    return {
        "name": item.name, "file": item.file and str(item.file), "size": size, "box": [round(v, 2) for v in box],
        "annotated": truth, "best_iou": best, "verdict": verdict, "whole_image_iou": whole, "grid": grid[::-1],
        **{key: value for key, value in asdict(found).items() if key != "box"},
    }  # fmt: skip


def summary(args, block, records) -> dict:
    judged = [r for r in records if r["best_iou"] is not None]
    shares = [
        100 * sum(r[key] >= SAME for r in judged) / len(judged) if judged else None
        for key in ("best_iou", "whole_image_iou")
    ]
    names = ("model_path", "features", "bias", "k_patches", "input_size", "max_side", "annotations")
    return {
        **{name: getattr(args, name) for name in names}, "block": block, "iou": SAME, "images": len(records),
        "judged": len(judged), "verdicts": Counter(r["verdict"] for r in records),
        "corloc": shares[0], "corloc_of_whole_image": shares[1],
    }  # fmt: skip


def report(args, figures, records):
    """Print what came out, and what to mind about it."""
    one_sign = sum(r["degree"] <= 1 or r["degree"] == math.prod(r["grid"]) for r in records)
    if 2 * one_sign > len(records):
        quartile = sum(r["quartile"] for r in records) / len(records)
        utils.say(
            f"note: in {one_sign} of {len(records)} images the seed correlates with all patches, or with none, and is "
            f"arbitrary; try other --features, or about --bias {-quartile:.3g}: a quarter of the products negative"
        )
    others = [r["name"] for r in records if r["verdict"] == OTHER_SIZE]
    if others:
        utils.say(f"note: {len(others)} images are of another size than annotated ({others[0]}, ...); not in CorLoc")
    if args.annotations and figures["judged"]:
        utils.say(
            f"CorLoc {figures['corloc']:.1f}% (at IoU {SAME}) over {figures['judged']} images; "
            f"{figures['verdicts'][NO_BOX]} without annotated boxes left out; "
            f"the whole image as the box: {figures['corloc_of_whole_image']:.1f}%"
        )
    elif args.annotations:
        utils.say("no CorLoc: there is no image with annotated boxes")


# Wiring ----------------------------------------------------------------------------------------------------------


@utils.full_precision()
def discover(args):
    device = utils.pick_device(args.device)
    model, data, checkpoint = inputs.load(args.model_path, args)
    (block,) = inputs.chosen_blocks(model, [model.depth - 1 if args.layer_num is None else args.layer_num])
    model_for = model_sizes(model.to(device), args)
    items = find_items(args, data, checkpoint)
    folder, records, failed = utils.writable_folder(args.output_dir), [], []

    def examine(item):
        image = item.read()
        sized = model_for(*image.size)
        features = patch_features(sized, image, data, block, args.features)
        found = lost(features, sized.grid_size, args.k_patches, args.bias)
        records.append(record(item, image.size, sized.grid_size, found))
        return records[-1], image

    name = short(one_line(Path(args.model_path).name))
    title = f"LOST on the {args.features} of block {block}, bias {args.bias:g}: {name}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of names in other scripts; objects.json has them
        there = inputs.readable(items, failed)
        write_pdf(pages(there, len(items), examine, title, args), folder / "objects.pdf")
    figures = summary(args, block, records) | {"left_out": failed}
    lines = ",\n".join(json.dumps(r, allow_nan=False) for r in records)
    content = f'{{"settings": {json.dumps(figures, indent=1)},\n"images": [\n{lines}\n]}}\n'
    utils.write_atomically(folder / "objects.json", lambda file: file.write(content.encode()))
    report(args, figures, records)
    utils.say(f"wrote {folder / 'objects.json'} ({len(records)} images) and {folder / 'objects.pdf'}")
    inputs.report_failed(failed, len(items))


def main(argv=None):
    parser = utils.ArgumentParser(
        description="Discover an object in each image with LOST; CorLoc where boxes are annotated."
    )
    flag = parser.add_argument
    flag("--output_dir", default=".", help="folder for objects.json and objects.pdf")
    inputs.add_image_flags(parser)
    flag("--img_num", type=number(int, 0), nargs="+", default=[0], help="without images: these of the test set")
    flag("--annotations", metavar="PATH", help="COCO-style .json file, or a folder of VOC-style .xml files")
    flag("--layer_num", type=number(int), metavar="BLOCK", help="counted from 0 (default: the last one)")
    flag("--features", choices=FEATURES, default="keys", help="of that block, all heads together")
    flag("--bias", type=number(float), default=0.0, help="added to the products of the features")
    flag("--k_patches", type=number(int, 1), default=100, help="so many patches of lowest degree may expand the seed")
    flag("--max_side", type=number(int, 1), help="pixels of the longer side for the model (default: its own)")
    flag("--max_drawn", type=number(int, 1), default=60, help="so many images are drawn")
    inputs.add_checkpoint_flags(parser)
    discover(parser.parse_args(argv))


if __name__ == "__main__":
    utils.run_script(main)
