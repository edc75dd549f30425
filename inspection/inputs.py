"""What the inspection scripts share: their flags, the model, and the images."""

import copy
import os
from argparse import SUPPRESS, ArgumentTypeError
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

import utils
from checkpoints.files import load_checkpoint
from checkpoints.models import at_size, data_folder, model_from_checkpoint
from datasets import DATA_SETS, check_classes, eval_transform, find_split
from inspection.foreign import SOURCES, ForeignViT, create, data_of
from loading.decode import add_max_pixels, crop_box, fit_image, read_image, read_picture
from loading.folders import image_files, note_left_out
from models_dynamic import DynamicViT
from utils import BadInput, RunFailed, number

STATE_DICT_FLAGS = ("num_heads", "cls_pos", "reg_pos", "dist_pos", "weights_key")  # only a bare state dict needs them
DEFAULT_MODEL = "best_model.pth"
DISPLAY_SIDE = 512  # pixels of the longer side of an image on a page
NAME = 100  # bytes of an image's name in the names of files; they may have 255, with block and token


@dataclass
class InputImage:
    name: str  # for file names; unique
    read: Callable  # () -> PIL image in RGB
    label: int | None = None
    in_memory: bool = False  # of a dataset that training holds in memory, where images are resized and not cropped
    file: Path | None = None  # None: an image of the dataset
    number: int | None = None  # there
    whole: tuple[int, int] | None = None  # width and height, of an image that was padded

    @property
    def title(self) -> str:
        return self.file.name if self.file else self.name


def model_file(path: str) -> str:
    """An argparse type: the default's file is also looked for where cifar_main.py writes it."""
    written = Path("models") / DEFAULT_MODEL
    if path == DEFAULT_MODEL and not os.path.exists(path) and written.exists():
        return str(written)
    return path


def names_of(paths, least=2) -> list[str]:
    """Of files, with as many of their folders as tell them apart; `least` parts, as many a model is best_model.pth."""
    parts = [[path] if str(path).startswith(SOURCES) else Path(path).absolute().parts for path in paths]
    for n in range(least, max(least, *map(len, parts)) + 1):
        names = [utils.printable(str(Path(*own[-n:]))) for own in parts]
        if len(set(names)) == len(set(paths)):
            break
    return names


def add_checkpoint_flags(parser, several=False):
    """Which checkpoint, and what a bare state dict lacks; `several`: flags take a value per file (`flags_for_file`)."""
    flag = parser.add_argument
    flag("--model_path", default=DEFAULT_MODEL, type=model_file, metavar="MODEL", help="checkpoint of this project, "
         "state dict, or a model of timm's: timm:NAME, hf-hub:USER/REPO or local-dir:FOLDER (default: best_model.pth, "
         "or else models/best_model.pth)")  # fmt: skip
    flag("--weights", metavar="FILE", nargs="+" if several else None,
         help="for timm:NAME, in place of the weights that timm downloads")  # fmt: skip
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    flag("--input_size", type=utils.image_size, help="pixels, 224 or 280x420 (height x width); the position "
         "embedding is resampled if this is not the model's own size")  # fmt: skip
    group = parser.add_argument_group("only for a bare state dict from elsewhere (the rest is read off its shapes)")
    flag, missing = group.add_argument, dict(default=SUPPRESS, nargs="+" if several else None)
    flag("--num_heads", type=number(int, 1), help="heads of each block; required", **missing)
    flag("--cls_pos", type=utils.position, help="block that CLS enters at, or none (0)", **missing)
    flag("--reg_pos", type=number(int, 0), help="block that the registers enter at (0)", **missing)
    flag("--dist_pos", type=number(int, 0), help="block that the distillation token enters at (0)", **missing)
    flag("--weights_key", help="which of several sets of weights, as in teacher.backbone", **missing)
    flag("--data_set", choices=DATA_SETS, type=str.upper, help="take the images from this dataset")
    flag("--mean", type=number(float), nargs=3, help="of its normalisation, 0..1 (default: ImageNet's)")
    flag("--std", type=number(float, above=0), nargs=3, help="of its normalisation")


def add_image_flags(parser):
    parser.add_argument("--image_path", nargs="+", metavar="FILE", help="images, or folders of them")
    parser.add_argument("--data_path", help="folder of the dataset, if it is not where it was in training")
    add_max_pixels(parser)


def flags_for_file(args, i, total):
    """The flags for file `i` of `total`, where --weights and `STATE_DICT_FLAGS` have one value each, or one per file.

    Raises BadInput for another number of values.
    """
    mine = copy.copy(args)
    for flag in (*STATE_DICT_FLAGS, "weights"):
        values = getattr(args, flag, None)
        if values is not None:
            if len(values) not in (1, total):
                raise BadInput(f"--{flag} has {len(values)} values for {total} files; give one value, or one per file")
            setattr(mine, flag, values[i if len(values) > 1 else 0])
    return mine


def block(text):
    """An argparse type: a block's number, or 'all'."""
    return text.lower() if text.lower() == "all" else number(int)(text)


def patch(text):
    """An argparse type: '3,5' -> (3, 5), column and row in the grid of patches."""
    x, comma, y = text.partition(",")
    if not comma:
        raise ArgumentTypeError(f"{text!r} is not a patch; give its column and row, as in 3,5")
    return number(int, 0)(x), number(int, 0)(y)


def chosen_blocks(model, wanted, name="") -> list[int]:
    """Numbers of blocks in ascending order. Raises BadInput for one outside the model, which has the `name`, if any."""
    if "all" in wanted:
        return list(range(len(model.blocks)))
    try:
        for i in wanted:
            model.token_layout(i)
    except ValueError as error:
        raise BadInput(f"--layer_num: {error}" + f" ({name})" * bool(name)) from None
    return sorted(set(wanted))


def load(path, args, one_of_several=False) -> tuple[DynamicViT | ForeignViT, dict, dict]:
    """(model in eval mode, description of its data, checkpoint) as the flags of `add_checkpoint_flags` say.

    `one_of_several`: a checkpoint of this project ignores flags for bare state dicts, which are for the other files.
    """
    if str(path).startswith(SOURCES):
        given = [f"--{flag}" for flag in STATE_DICT_FLAGS if hasattr(args, flag) and flag != "weights_key"]
        if given and not one_of_several:
            raise BadInput(f"{path} is a model of timm's, which knows its tokens; leave out {', '.join(given)}")
        model = create(path, args.weights, args.input_size, getattr(args, "weights_key", None))
        return *_foreign(model, str(path), args), {}
    if args.weights and not one_of_several:
        raise BadInput(f"--weights is for a model of timm's, as in --model_path timm:NAME; {path} has weights")
    checkpoint = load_checkpoint(path)
    given = {flag: getattr(args, flag) for flag in STATE_DICT_FLAGS if hasattr(args, flag)}
    if one_of_several and "model_args" in checkpoint:
        given = {}
    try:
        model = model_from_checkpoint(checkpoint, img_size=args.input_size, **given)
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    if not isinstance(model, DynamicViT):
        foreign, data = _foreign(model, model.model_args["timm_name"], args, checkpoint.get("data"))
        return foreign, data, checkpoint
    gh, gw = model.grid_size
    if gh != gw and "model_args" not in checkpoint:
        utils.say(f"note: the position embedding in {path} is read as a grid of {gh}x{gw} patches, from --input_size")
    data = _describe_data(path, checkpoint, model, args, one_of_several)
    if args.input_size:
        try:
            model = at_size(model, args.input_size)
        except ValueError as error:
            raise BadInput(f"--input_size: {error}") from None
        data = data | {"input_size": args.input_size}
    return model, data, checkpoint


def _foreign(model, name, args, data=None) -> tuple[DynamicViT | ForeignViT, dict]:
    """(adapter, description of its data); `data` is that of a checkpoint."""
    size = args.input_size or (data["input_size"] if data else model.pretrained_cfg["input_size"][1:])
    changes = {"mean": args.mean, "std": args.std, "input_size": tuple(size)}
    data = (data or data_of(model, size)) | {key: value for key, value in changes.items() if value}
    if isinstance(model, DynamicViT):  # that export_model.py wrote
        return at_size(model, size), data
    try:
        model = ForeignViT(model, name, size)
    except ValueError as error:
        raise BadInput(str(error)) from None
    patch = model.model_args["patch_size"]
    covered = tuple(n * p for n, p in zip(model.grid_size, patch))
    if covered != tuple(size):  # timm leaves out the rest, as of 384 pixels in patches of 14
        if args.input_size:
            words = "{} x {} pixels is not divisible into patches of {} x {}".format(*size, *patch)
            raise BadInput(f"--input_size: an image of {words}")
        data["covered"] = covered
    if model.hidden:
        utils.say(
            f"note: {name}: the attention of its first {model.hidden} blocks is not torch's own and cannot be seen; "
            f"block 0 is the first of the other {model.depth}"
        )
    return model, data


def _describe_data(path, checkpoint, model, args, one_of_several) -> dict:
    if "data" in checkpoint:
        if (args.mean or args.std or args.data_set) and not one_of_several:
            raise BadInput(f"{path} describes its own data; leave out --mean, --std and --data_set")
        return checkpoint["data"]
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    return {
        "name": args.data_set, "classes": [], "input_size": model.model_args["img_size"],
        "mean": args.mean or IMAGENET_DEFAULT_MEAN, "std": args.std or IMAGENET_DEFAULT_STD,
    }  # fmt: skip


def find_images(args, data, checkpoint, numbers=None, files=None) -> list[InputImage]:
    """The images of `files` or --image_path, else the test images `numbers` (None: all) of the dataset; read later.

    Fills in `data["classes"]` from the dataset.
    """
    if files or args.image_path:
        files = files or image_paths(args.image_path)
        named = zip(unique_names(files), files)
        return [InputImage(name, partial(read_image, file, args.max_pixels), file=file) for name, file in named]
    if data["name"] is None:
        raise BadInput(f"{args.model_path} does not name its dataset; give --image_path FILE, or --data_set")
    path = data_folder(checkpoint, args.data_path) if "data" in checkpoint else args.data_path
    split, classes = find_split(data["name"], path, False, data, args.max_pixels)
    if data["classes"]:
        check_classes(classes, data["classes"], "the test images", "the model")
    data["classes"] = classes
    numbers = range(len(split)) if numbers is None else numbers
    in_memory, found = isinstance(split.images, Tensor), []
    for i in numbers:
        if not 0 <= i < len(split):
            raise BadInput(f"--img_num: there is no image {i}; the images are 0..{len(split) - 1}")
        name, read = f"{data['name']}_test{i}", partial(read_picture, split, i)
        found.append(InputImage(name, read, int(split.labels[i]), in_memory, number=i))
    return found


def image_paths(paths) -> list[Path]:
    """The files of --image_path and those in its folders. Raises BadInput for a path that is missing, and for none."""
    files, left_out = [], Counter()
    for path in map(Path, paths):
        if not os.path.exists(path):
            raise BadInput(f"there is no image or folder {path}; correct --image_path")
        files += image_files(path, left_out) if path.is_dir() else [path]
    note_left_out(" ".join(map(str, paths)), left_out)
    if not files:
        raise BadInput(f"there are no images in {', '.join(paths)}; give --image_path images or folders of them")
    return files


def readable(images, failed: list[str]):
    """Yield those of `images` that can be read, with their pixels in memory.

    The errors of the others are added to `failed`, each once. Raises BadInput if none can be read.

    Args:
        images: `InputImage`s, or other dataclasses with `read`.
    """
    any_read, problem = False, None
    for image in images:
        try:
            pixels = image.read()
        except BadInput as error:
            problem = str(error)
            failed += [] if problem in failed else [problem]
            continue
        any_read = True
        yield replace(image, read=lambda pixels=pixels: pixels)
    if not any_read:
        words = f"none of the {len(images)} images can be read; the last one: " if len(images) > 1 else ""
        raise BadInput(f"{words}{problem}")


def batches(images, failed: list[str], data, device, size: int, truth=None):
    """Yield (images (B, 3, h, w) normalised, labels (B,) or None) of the `readable` ones, at most `size` at a time.

    With `truth`, a function of `truth.find_truth`, also a list of their `Truth`s.
    """
    left = readable(images, failed)
    while part := list(islice(left, size)):
        pixels = [image.read() for image in part]
        labels = None if part[0].label is None else torch.tensor([image.label for image in part], device=device)
        annotated = [[truth(image, own.size) for image, own in zip(part, pixels)]] if truth else []
        yield model_input(pixels, part, data, device), labels, *annotated


def report_failed(failed: list[str], total: int):
    """At the end of a run: list what was left out of `total` images, and raise RunFailed if it was anything."""
    if failed:
        for problem in failed:
            utils.say(utils.printable(f"left out: {problem}"))
        raise RunFailed(f"{len(failed)} of {total} images could not be read, the others are done: {failed[0]}")


def unique_names(files) -> list[str]:
    """A name for each file: its own, cut to NAME bytes, and a number if it is not the first of that name.

    For macOS and Windows, a.png and A.png are one file.
    """
    names = {}  # by their lower case, in order
    for file in files:
        stem, encoded = file.stem, os.fsencode(file.stem)
        if len(encoded) > NAME:
            stem = encoded[:NAME].decode(errors="ignore")
        candidates = (stem if n == 1 else f"{stem}_{n}" for n in count(1))
        name = next(name for name in candidates if name.lower() not in names)
        names[name.lower()] = name
    return list(names.values())


def model_input(pixels, images, data, device="cpu") -> Tensor:
    """(B, 3, h, w), normalised: PIL images, read from `images`, as the model saw such images in its test."""
    return eval_transform(torch.stack([_sized(*pair, data) for pair in zip(pixels, images)]).to(device), data)


def _sized(pixels, image, data) -> Tensor:
    if image.in_memory and "crop_pct" not in data:
        return fit_image(pixels, (pixels.height, pixels.width))
    return fit_image(pixels, data["input_size"], **_crop(data))


def seen_part(width, height, image, data) -> tuple[float, float, float, float]:
    """What of an image the model's patches see: left, upper, right, lower."""
    if image.in_memory and "crop_pct" not in data:
        return 0, 0, width, height
    left, upper, right, lower = crop_box(width, height, data["input_size"], data.get("crop_pct", 1.0))
    tall, wide = _covered(data)
    return left, upper, left + wide * (right - left), upper + tall * (lower - upper)


def _covered(data) -> tuple[float, float]:
    """The shares of the model's input, in height and width, that are in patches."""
    (h, w), (covered_h, covered_w) = data["input_size"], data.get("covered", data["input_size"])
    return covered_h / h, covered_w / w


def as_seen(pixels, image, data, side=DISPLAY_SIDE) -> Tensor:
    """The part of a PIL image that the model's patches see, in up to `side` pixels, for display: (3, ., .) uint8."""
    if image.in_memory and "crop_pct" not in data:
        return _sized(pixels, image, data)
    left, upper, right, lower = crop_box(*pixels.size, data["input_size"], data.get("crop_pct", 1.0))
    scale = min(1, side / max(right - left, lower - upper))
    size = max(1, round(scale * (lower - upper))), max(1, round(scale * (right - left)))
    h, w = (max(1, round(n * share)) for n, share in zip(size, _covered(data)))
    return fit_image(pixels, size, **_crop(data))[:, :h, :w]


def _crop(data) -> dict:
    return {key: data[key] for key in ("crop_pct", "interpolation") if key in data}


def prediction(logits, classes) -> str:
    """'predicted: dog (61.3%)'."""
    confidence, k = logits.softmax(dim=-1).max(dim=-1)
    return f"predicted: {class_name(int(k), classes)} ({100 * float(confidence):.1f}%)"


def class_name(k, classes) -> str:
    return utils.printable(classes[k]) if k < len(classes) else f"class {k}"
