"""Object discovery as in "Vision Transformers Need Registers" (arXiv 2309.16588): LOST on the queries, keys or values
of a block gives one box per image; CorLoc where boxes are annotated.

    python discover_objects.py --model_path ./models/best_model.pth --image_path my_photos --output_dir ./objects
    python discover_objects.py --model_path model.pth --features values --bias -20 --annotations VOC2007/Annotations
    python discover_objects.py --model_path dinov2.safetensors --num_heads 6 --max_side 448 \
        --image_path coco/train2014 --annotations coco/annotations/instances_train2014.json

The model sees the whole image in its own shape. Writes `objects.json` and `objects.pdf`.

Annotations are a COCO-style .json file (its crowds do not count) or a folder of VOC-style .xml files (all objects
count, difficult and truncated ones too, as in LOST's code). Without --image_path the images are looked for in `images/`
beside the file, in `JPEGImages/` beside the folder, or else where the annotations are. Boxes have to be those of the
image as it is displayed, rotated as its EXIF data say; an image of another size than annotated is left out.

CorLoc is the share of images with annotated boxes in which the discovered box has an intersection over union of at
least 0.5 (as in LOST's code) with one of them. CorLoc of the whole image as the box is printed for comparison.
"""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from torchvision.ops import box_iou

import utils
from inspection import inputs, test_time_registers
from inspection.annotations import Annotated, check_matches, entry_of, folder_of_images, index_of, read_annotations
from inspection.objects import FEATURES, SAME, Found, discovered, model_sizes
from inspection.objects_pages import boxes_pages, one_line, short
from inspection.pages import write_pdf
from loading.folders import image_files
from utils import BadInput, number

NO_BOX, OTHER_SIZE = "no annotated box", "other size than annotated"


def find_images(args, data, checkpoint) -> tuple[list[inputs.InputImage], dict[str, Annotated]]:
    """The images to look for objects in, and the annotated ones by their names."""
    entries = read_annotations(Path(args.annotations)) if args.annotations else []
    index, files = index_of(entries), None
    if args.annotations and not args.image_path:
        folder = folder_of_images(Path(args.annotations))
        files = [file for file in image_files(folder) if entry_of(file, index)]
        if not files:
            raise BadInput(f"none of the images of {args.annotations} is in {folder}; give --image_path")
    images = inputs.find_images(args, data, checkpoint, args.img_num, files)
    if args.annotations:
        check_matches(images, entries, index, args.annotations)
    return images, index


def record(image, entry: Annotated | None, size, grid, found: Found) -> dict:
    """The entry of `objects.json` for an image; boxes in its pixels."""
    scale = (size[0] / grid[1], size[1] / grid[0]) * 2
    box = [edge * pixels for edge, pixels in zip(found.box, scale)]
    truth = entry.boxes if entry else []
    other_size = entry is not None and entry.size not in (None, size)
    verdict, judged = (OTHER_SIZE, []) if other_size else (NO_BOX, truth)
    best = whole = None
    if judged:
        both = torch.tensor([box, (0, 0, *size)], dtype=torch.double)
        best, whole = box_iou(both, torch.tensor(judged, dtype=torch.double)).amax(dim=1).tolist()
        verdict = "found" if best >= SAME else "missed"
    return {
        "name": one_line(image.title), "file": image.file and str(image.file), "size": size,
        "box": [round(v, 2) for v in box], "annotated": truth, "best_iou": best, "verdict": verdict,
        "whole_image_iou": whole, "grid": grid[::-1],
        **{key: value for key, value in asdict(found).items() if key != "box"},
    }  # fmt: skip


def settings_and_scores(args, block, records) -> dict:
    judged = [r for r in records if r["best_iou"] is not None]

    def share(key):
        return 100 * sum(r[key] >= SAME for r in judged) / len(judged) if judged else None

    names = ("model_path", "features", "bias", "k_patches", "input_size", "max_side", "annotations")
    return {
        **{name: getattr(args, name) for name in names}, "block": block, "iou": SAME, "images": len(records),
        "judged": len(judged), "verdicts": Counter(r["verdict"] for r in records),
        "corloc": share("best_iou"), "corloc_of_whole_image": share("whole_image_iou"),
    }  # fmt: skip


def report(args, results, records):
    """Print CorLoc, and notes on what weakens it."""
    arbitrary, centred = (sum(r[key] for r in records) for key in ("arbitrary", "centred"))
    if centred:
        kinds = " and ".join(sorted({r["features"] for r in records if r["centred"]}))
        utils.say(
            f"note: in {centred} of {len(records)} images all products of the features have one sign; the "
            f"{kinds} less their mean over patches are used there"
        )
    if arbitrary:
        quartile = sum(r["quartile"] for r in records) / len(records)
        utils.say(
            f"note: in {arbitrary} of {len(records)} images the seed correlates with all patches, or with none, and is "
            f"arbitrary; try other --features, or about --bias {-quartile:.3g}: a quarter of the products negative"
        )
    others = [r["name"] for r in records if r["verdict"] == OTHER_SIZE]
    if others:
        utils.say(f"note: {len(others)} images are of another size than annotated ({others[0]}, ...); not in CorLoc")
    if args.annotations and results["judged"]:
        utils.say(
            f"CorLoc {results['corloc']:.1f}% (at IoU {SAME}) over {results['judged']} images; "
            f"{results['verdicts'][NO_BOX]} without annotated boxes left out; "
            f"the whole image as the box: {results['corloc_of_whole_image']:.1f}%"
        )
    elif args.annotations:
        utils.say("no CorLoc: no image has annotated boxes")


@utils.full_precision()
def discover(args):
    device = utils.pick_device(args.device)
    model, data, checkpoint = inputs.load(args.model_path, args)
    (block,) = inputs.chosen_blocks(model, [model.depth - 1 if args.layer_num is None else args.layer_num])
    images, index = find_images(args, data, checkpoint)
    model = test_time_registers.from_flags(args, model.to(device), data, images, checkpoint)
    model_for = model_sizes(model, args)
    folder, records, failed = utils.writable_folder(args.output_dir), [], []

    def examine(image):
        pixels = image.read()
        sized = model_for(*pixels.size)
        found = discovered(sized, pixels, data, block, args)
        records.append(record(image, entry_of(image.file, index), pixels.size, sized.grid_size, found))
        return records[-1], pixels

    (name,) = inputs.names_of([args.model_path])
    kinds = args.features or "keys, else values,"
    bias = "" if args.bias is None else f" bias {args.bias:g},"
    title = f"LOST on the {kinds} of block {block},{bias} {short(one_line(name))}"
    there = inputs.readable(images, failed)
    write_pdf(boxes_pages(there, len(images), examine, title, args), folder / "objects.pdf")
    results = settings_and_scores(args, block, records) | {"left_out": failed}
    lines = ",\n".join(json.dumps(r, allow_nan=False) for r in records)
    content = f'{{"settings": {json.dumps(results, indent=1)},\n"images": [\n{lines}\n]}}\n'
    utils.write_atomically(folder / "objects.json", lambda file: file.write(content.encode()))
    report(args, results, records)
    utils.say(f"wrote {folder / 'objects.json'} ({len(records)} images) and {folder / 'objects.pdf'}")
    inputs.report_failed(failed, len(images))


def main(argv=None):
    words = "Discover an object in each image with LOST; CorLoc where boxes are annotated."
    parser = utils.ArgumentParser(description=words)
    flag = parser.add_argument
    flag("--output_dir", default="objects", help="folder for objects.json and objects.pdf")
    inputs.add_image_flags(parser)
    flag("--img_num", type=number(int, 0), nargs="+", default=[0], help="without images: these of the test set")
    flag("--annotations", metavar="PATH", help="COCO-style .json file, or a folder of VOC-style .xml files")
    flag("--layer_num", type=number(int), metavar="BLOCK", help="counted from 0 (default: the last one)")
    flag("--features", choices=FEATURES, help="of that block, all heads together (default: keys, or values in images "
         "where all products of the keys have one sign)")  # fmt: skip
    flag("--bias", type=number(float), help="added to the products of the features (default: 0; where all have one "
         "sign, the features' mean over patches is taken off instead)")  # fmt: skip
    flag("--k_patches", type=number(int, 1), default=100, help="patches of lowest degree that may expand the seed")
    flag("--max_side", type=number(int, 1), help="pixels of the longer side for the model (default: its own)")
    flag("--max_drawn", type=number(int, 1), default=60, help="number of images to draw")
    test_time_registers.add_flags(parser)
    inputs.add_checkpoint_flags(parser)
    discover(parser.parse_args(argv))


if __name__ == "__main__":
    utils.run_script(main)
