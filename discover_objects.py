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
from functools import lru_cache
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor
from tqdm import tqdm

import looking
import utils
from annotations import Annotated, read_annotations
from attention_pages import write_pdf
from datasets import image_files, normalise
from models_dynamic import at_size
from utils import BadInput, number

FEATURES = ("queries", "keys", "values")  # in the order of DynamicViT.projections
SAME = 0.5  # intersection over union from which an object is found
COLUMNS, ROWS, SIDE = 4, 3, 320  # of a page, in images; pixels of an image's longer side on it
BOX, TRUTH, SEED = "#ff2d55", "#00e5ff", "#ffd60a"  # colours
NO_BOX, OTHER_SIZE = "no annotated box", "other size than annotated"


# LOST ------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """An object in one image, in patches."""

    seed: tuple[int, int]  # column, row
    box: tuple[int, int, int, int]  # left, upper, right, lower; right and lower are just outside
    degree: int  # of the seed
    similar: int  # patches that expand the seed, itself among them
    component: int  # patches of the object
    quartile: float  # a quarter of the products of features are below this, before the bias


def lost(features: Tensor, grid: tuple[int, int], k_patches=100, bias=0.0) -> Found:
    """LOST (Simeoni et al., BMVC 2021, arXiv 2109.14279) on the features (P, D) of the patches of a grid (gh, gw).

    The degree of a patch is the number of patches with which its product is at least 0 (the paper's rule; the published
    code counts those above 0). The seed is the patch of lowest degree, the first one in reading order if there are
    several. It is expanded by those of the `k_patches` patches of lowest degree that have a positive product with it.
    Patches whose products with all of these add up to more than 0 form the mask; its 4-connected component with the
    seed is the object.

    `bias` is added to every product, in their units. LOST takes it that object and background differ in sign; a part
    that all features have in common makes every product positive, and a negative bias takes it off again ("Vision
    Transformers Need Registers", section 3.3).
    """
    products = features @ features.T + bias  # (P, P)
    degrees = (products >= 0).sum(dim=1)
    order = degrees.argsort(stable=True)
    seed = int(order[0])
    similar = order[:k_patches]
    similar = similar[products[seed, similar] > 0]
    mask = products[similar].sum(dim=0) > 0
    mask[seed] = True  # a negative bias may outweigh the seed's own square
    parts, _ = scipy.ndimage.label(mask.unflatten(0, grid).cpu().numpy())
    row, column = divmod(seed, grid[1])
    rows, columns = np.nonzero(parts == parts[row, column])
    return Found(
        seed=(column, row), degree=int(degrees[seed]), similar=len(similar), component=len(rows),
        box=(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1),
        quartile=float(products.flatten().kthvalue(math.ceil(products.numel() / 4)).values) - bias,
    )  # fmt: skip


def iou(a, b) -> float:
    """Intersection over union of two boxes: left, upper, right, lower."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


# The model -------------------------------------------------------------------------------------------------------


def model_sizes(model, args) -> Callable:
    """A function: (width, height) of an image -> the model for it. Raises BadInput for less than two patches."""
    patch, own = model.model_args["patch_size"], model.model_args["img_size"]
    if args.input_size and args.max_side:
        raise BadInput("with --input_size images have one size, with --max_side each keeps its shape; leave one out")
    longer = args.max_side or max(own)
    if longer < 2 * max(patch):
        flag = "--input_size" if args.input_size else "--max_side"
        raise BadInput(f"{longer} pixels are less than two patches; give {flag} {2 * max(patch)} or more")

    @lru_cache(maxsize=4)
    def resized(size):
        try:
            return at_size(model, size)
        except ValueError as error:
            raise BadInput(f"--max_side {longer}: {error}") from None

    return lambda *size: model if args.input_size else resized(fitting_size(*size, longer, patch))


def fitting_size(width, height, longer, patch) -> tuple[int, int]:
    """(h, w) in whole patches, nearest to the image's shape with `longer` pixels on its longer side."""
    scale = longer / max(width, height)
    return tuple(max(1, round(side * scale / p)) * p for side, p in zip((height, width), patch))


def patch_features(model, image, data, block, kind) -> Tensor:
    """A PIL image, squeezed to the model's size -> (P, H * d): the patches' queries, keys or values."""
    from PIL import Image

    h, w = model.model_args["img_size"]
    image = image.resize((w, h), Image.Resampling[data.get("interpolation", "bicubic").upper()])
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(model.pos_embed.device)
    of_heads = model.projections(normalise(images, data["mean"], data["std"]), block)[FEATURES.index(kind)]
    features = of_heads[0, :, model.token_layout(block).patches].transpose(0, 1).flatten(1)
    if not features.isfinite().all():
        raise utils.RunFailed(f"the {kind} of block {block} are not all finite; the weights may be damaged")
    return features


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
    index, files = index_of(entries), looking.image_paths(args.image_path) if args.image_path else []
    if args.annotations and not args.image_path:
        place = _place_of_images(Path(args.annotations))
        files = [file for file in image_files(place) if entry_of(file, index)]
        if not files:
            raise BadInput(f"none of the images of {args.annotations} is in {place}; give --image_path")
    args.image_path = [str(file) for file in files] or args.image_path
    pictures = looking.pictures(args, data, checkpoint, args.img_num)
    pairs = zip(pictures, files or [None] * len(pictures))
    items = [Item(printable(file.name if file else p.name), file, p.read, entry_of(file, index)) for p, file in pairs]
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


def printable(name) -> str:
    return " ".join(name.encode("utf-8", "replace").decode().split())


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


# Pages -----------------------------------------------------------------------------------------------------------


def pages(items, total, examine, title, args):
    """Figures of the first --max_drawn images, made while all are examined; `examine`: item -> (record, PIL image)."""
    shown = []
    for done, item in enumerate(tqdm(items, "images", total, leave=False, disable=None), start=1):
        result, image = examine(item)
        if done <= args.max_drawn:
            image.thumbnail((SIDE, SIDE))
            shown.append((result, image))
        if len(shown) == COLUMNS * ROWS:
            yield draw_page(title, shown, args.annotations is not None)
            shown = []
    if shown:
        yield draw_page(title, shown, args.annotations is not None)


def draw_page(title, shown, annotated):
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    page_w, cell_w, cell_h = 11.6, 2.85, 2.75  # inches
    page_h = 0.5 + cell_h * math.ceil(len(shown) / COLUMNS)
    figure, head = Figure(figsize=(page_w, page_h)), 1 - 0.25 / page_h
    figure.text(0.15 / page_w, head, title, fontsize=10, weight="bold", va="center", parse_math=False)
    lines = [Line2D([], [], color=BOX, lw=2, label="discovered box")]
    lines += [Line2D([], [], color=TRUTH, lw=2, ls="--", label="annotated box")] * annotated
    lines += [Line2D([], [], color=SEED, marker="s", ls="", mec="black", label="seed patch")]
    figure.legend(handles=lines, loc="center right", bbox_to_anchor=(1, head), ncols=3, fontsize=8, frameon=False)
    for i, (result, image) in enumerate(shown):
        row, column = divmod(i, COLUMNS)
        left, bottom = 0.15 + column * cell_w, page_h - 0.4 - (row + 1) * cell_h
        axes = figure.add_axes((left / page_w, bottom / page_h, 2.7 / page_w, 2.3 / page_h))
        draw_boxes(axes, result, image)
        score = "" if result["best_iou"] is None else f", IoU {result['best_iou']:.2f}"
        words = short(result["name"]) + f"\n{result['verdict']}{score}" * annotated
        axes.set_title(words, fontsize=7.5, loc="left", parse_math=False)
    return figure


def short(name) -> str:
    return name if len(name) <= 40 else f"{name[:24]}...{name[-13:]}"


def draw_boxes(axes, result, image):
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    (width, height), (gw, gh), (x, y) = result["size"], result["grid"], result["seed"]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="none")
    axes.set(xlim=(-0.01 * width, 1.01 * width), ylim=(1.01 * height, -0.01 * height), anchor="NW")
    axes.set_axis_off()
    seed = (x * width / gw, y * height / gh, (x + 1) * width / gw, (y + 1) * height / gh)
    styles = [(seed, SEED, "-", 1), *((box, TRUTH, "--", 1.4) for box in result["annotated"])]
    for box, colour, style, thick in [*styles, (result["box"], BOX, "-", 1.8)]:
        outline = Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, ec=colour, ls=style, lw=thick)
        outline.set_path_effects([withStroke(linewidth=thick + 1, foreground="black", alpha=0.5)])
        axes.add_patch(outline)


# Wiring ----------------------------------------------------------------------------------------------------------


@utils.full_precision()
def discover(args):
    device = utils.pick_device(args.device)
    model, data, checkpoint = looking.load(args.model_path, args)
    (block,) = looking.chosen_blocks(model, [model.depth - 1 if args.layer_num is None else args.layer_num])
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

    name = short(printable(Path(args.model_path).name))
    title = f"LOST on the {args.features} of block {block}, bias {args.bias:g}: {name}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of names in other scripts; objects.json has them
        there = looking.readable(items, failed)
        write_pdf(pages(there, len(items), examine, title, args), folder / "objects.pdf")
    figures = summary(args, block, records) | {"left_out": failed}
    lines = ",\n".join(json.dumps(r, allow_nan=False) for r in records)
    content = f'{{"settings": {json.dumps(figures, indent=1)},\n"images": [\n{lines}\n]}}\n'
    utils.write_atomically(folder / "objects.json", lambda file: file.write(content.encode()))
    report(args, figures, records)
    utils.say(f"wrote {folder / 'objects.json'} ({len(records)} images) and {folder / 'objects.pdf'}")
    looking.report_failed(failed, len(items))


def main(argv=None):
    parser = utils.ArgumentParser(
        description="Discover an object in each image with LOST; CorLoc where boxes are annotated."
    )
    flag = parser.add_argument
    flag("--output_dir", default=".", help="folder for objects.json and objects.pdf")
    looking.add_image_flags(parser)
    flag("--img_num", type=number(int, 0), nargs="+", default=[0], help="without images: these of the test set")
    flag("--annotations", metavar="PATH", help="COCO-style .json file, or a folder of VOC-style .xml files")
    flag("--layer_num", type=number(int), metavar="BLOCK", help="counted from 0 (default: the last one)")
    flag("--features", choices=FEATURES, default="keys", help="of that block, all heads together")
    flag("--bias", type=number(float), default=0.0, help="added to the products of the features")
    flag("--k_patches", type=number(int, 1), default=100, help="so many patches of lowest degree may expand the seed")
    flag("--max_side", type=number(int, 1), help="pixels of the longer side for the model (default: its own)")
    flag("--max_drawn", type=number(int, 1), default=60, help="so many images are drawn")
    looking.add_model_flags(parser)
    discover(parser.parse_args(argv))


if __name__ == "__main__":
    utils.run_script(main)
