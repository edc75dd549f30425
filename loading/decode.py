"""Image files as a person sees them: decoded, turned upright, scaled to 8 bits, cropped to a model's shape."""

import os
import re
import sys

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

import utils
from datasets import MAX_PIXELS, Split
from loading.archives import open_image
from loading.folders import HEIF_NEEDS, prepare_pillow
from utils import BadInput, number

SHOWN = 20  # images that one error names
THREADS = min(8, os.cpu_count() or 1)  # that decode


def failures(function, numbers, title) -> dict[int, BadInput]:
    """Call `function(number)` for all of them, several at once: the numbers of those that it refused, and why."""

    def attempt(number):
        try:
            function(number)
        except BadInput as error:
            return error

    results = thread_map(attempt, numbers, max_workers=THREADS, desc=title, leave=False, disable=None)
    return {number: error for number, error in zip(numbers, results) if error is not None}


def without_errors(split, errors, part, classes) -> Split:
    """A split without the images that `errors` has; they are counted and listed."""
    if not errors:
        return split
    kept = split.part([i for i in range(len(split)) if i not in errors])
    what = "held-out" if part == "val" else "training"
    note_unreadable(errors, len(split), f"{what} ")
    empty = [name for name, count in zip(classes, torch.bincount(kept.labels, minlength=len(classes))) if not count]
    if empty:
        raise BadInput(f"no {what} image of class {empty[0]} can be read; fix them, or remove that class")
    return kept


def note_unreadable(errors, count, what):
    """Count and list the images that are left out, of `count`. `errors`: see `failures`."""
    if errors:
        utils.say(f"note: {len(errors)} of {count} {what}images cannot be read and are left out:")
    for i in sorted(errors):
        utils.say(f"  {utils.printable(_what_is_wrong(errors[i]))}")


def joined(errors, training=False) -> BadInput:
    """One line for several images that cannot be read, the first of them by name.

    Args:
        errors: as `read_image` raises them.
        training: whether --bad_images can leave some of them out.
    """
    different = list({str(error): error for error in errors}.values())
    skip = " (--bad_images skip leaves out training images)" if training else ""
    if len(different) == 1:
        return BadInput(f"{different[0]}{skip}")
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    wrong = ", ".join(map(_what_is_wrong, different[:SHOWN]))
    return BadInput(f"cannot read {len(different)} images: {wrong}{more}; fix or remove them{skip}")


def _what_is_wrong(error: BadInput) -> str:
    """Of an error of `read_image`: 'a.png (it is cut)'."""
    return error.problem.removeprefix("cannot read the image ")


TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
         7: "TRANSVERSE", 8: "ROTATE_90"}  # of EXIF's orientation, to see the image upright  # fmt: skip
BITS, MAX_VALUE, PHOTOMETRIC, KIND, ORIENTATION = 258, 281, 262, 339, 274  # tags of TIFF and EXIF


def add_max_pixels(group):
    group.add_argument("--max_pixels", type=number(int, 1), default=MAX_PIXELS, help="refuse image files with more")


def read_image(path, max_pixels=MAX_PIXELS, draft=False):
    """A file as a person would see it: a PIL image in RGB, turned as its EXIF says, transparency on white.

    Values of more than 8 bits are scaled by the range of their kind, see `_value_range`.

    Args:
        max_pixels: refuse more, before they are decoded.
        draft: read a JPEG file whole, but decode it small, to see whether that can be done.

    Raises BadInput, naming the file, if Pillow cannot read it.
    """
    prepare_pillow()
    try:
        source = path if os.path.isfile(path) else open_image(str(path))  # a pipe or a device may never end
    except (OSError, LookupError) as error:
        raise BadInput(f"cannot read the image {path} ({error}); fix or remove it") from None
    if source is None:
        raise BadInput(f"there is no image {path}; give a file")
    Image.MAX_IMAGE_PIXELS = max_pixels / 2  # Pillow refuses twice as many wherever a file declares them
    try:
        with source if isinstance(source, Image.Image) else Image.open(source) as image:
            if draft:
                image.draft("RGB", (1, 1))
            return _as_seen(image, path, source)
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error)).group()
        raise BadInput(
            f"cannot read the image {path} ({count} pixels are more than --max_pixels {max_pixels}); raise that, or "
            "make the image smaller"
        ) from None
    except Exception as error:  # Pillow's plugins raise many kinds
        why = _why_unknown(source) if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadInput(f"cannot read the image {path} ({why}); fix or remove it") from None


def _why_unknown(source) -> str:
    with open(source, "rb") if isinstance(source, str | os.PathLike) else source as file:
        file.seek(0)
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        return HEIF_NEEDS
    return "AVIF takes Pillow 11.3 or newer" if head[4:11] == b"ftypavi" else "damaged, or of an unknown format"


def _as_seen(image, path, source):
    deep = _has_deep_colours(image)
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # a tag of a wrong type; the picture is there
        turn = None
    if image.mode[0] in "IF":
        image = _grey(image, path)
    elif deep:
        image = _colours(image, path, source)
    if turn:
        image = image.transpose(Image.Transpose[turn])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey(image, path):
    """An image of mode I;16, I or F in 8 bits: L, or LA if one of its values is transparent."""
    values, transparent = np.asarray(image), image.info.get("transparency")
    if image.mode == "I" and _tag(image, BITS) == 32 and _tag(image, KIND) in (0, 1):
        values = values.view(np.uint32)  # Pillow takes them for signed
    alpha = (values != transparent) if isinstance(transparent, int) else None
    low, high = _value_range(image, values if alpha is None else values[alpha], path)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # white is zero
        low, high = high, low
    grey = Image.fromarray(_in_8_bits(values, low, high))
    return grey if alpha is None else Image.merge("LA", (grey, Image.fromarray(alpha.astype(np.uint8) * 255)))


def _in_8_bits(values, low, high):
    scaled = (values.astype(np.float32) - low) * (255 / ((high - low) or 1))
    return (np.nan_to_num(scaled, nan=0, posinf=255, neginf=0).clip(0, 255) + 0.5).astype(np.uint8)


def _value_range(image, values, path) -> tuple[float, float]:
    """The values that are black and white.

    Floats are taken for 0..1, whole numbers for as many bits as the file declares, else for the fewest of 8, 10, 12,
    14, 16 that hold its largest value: 12 bits in 16 are usual, and no file says so. (A dark image of 16 bits, none of
    its values above 16383, is brightened by that.) All others are scaled by their own range. What is not sure is noted.
    """
    values = values[np.isfinite(values)] if image.mode == "F" else values
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if image.mode == "F" and low >= 0 and high <= 1:
        return 0.0, 1.0
    if image.mode != "F" and low >= 0 and high < 2**16:
        if image.format in ("PPM", "JPEG2000"):  # Pillow has scaled them
            return 0.0, 65535.0
        bits = _tag(image, BITS)
        declared = max(_tag(image, MAX_VALUE), 2**bits - 1 if 0 < bits < 16 else 0)
        return 0.0, float(_most(high, declared, path))
    values = f"the values of {path} are {low:g} to {high:g}, of no known range"
    utils.note_once("range", f"{values}: scaled by their own (and other such images likewise)")
    return low, high


def _most(high, declared, path) -> int:
    """The largest value of as many bits as hold those that are there and what the file declares."""
    bits = next((bits for bits in (8, 10, 12, 14) if max(high, declared) < 2**bits), 16)
    if bits < 16 and not declared and high:
        values = f"no value of {path}, of 16 bits, is above {high:.0f}"
        utils.note_once("bits", f"{values}: read as {bits} bits (and other such images likewise)")
    return 2**bits - 1


def _tag(image, number) -> int:
    """The largest whole number in a tag of a TIFF file; 0 if there is none."""
    value = getattr(image, "tag_v2", {}).get(number)
    return max((n for n in (value if isinstance(value, tuple) else (value,)) if type(n) is int), default=0)


def _raw_mode(tile) -> str:
    """How Pillow unpacks a part of a file."""
    return str(tile[3][0] if isinstance(tile[3], tuple) else tile[3])


def _has_deep_colours(image) -> bool:
    """Whether several channels have 16 bits each, of which Pillow keeps the upper 8."""
    modes = {f"{mode};16{order}" for mode in ("LA", "RGB", "RGBA") for order in "BLN"}
    return image.format in ("PNG", "TIFF") and bool(image.tile) and modes.issuperset(map(_raw_mode, image.tile))


def _colours(image, path, source):
    """An image with 16 bits a channel as Pillow read it, or from the file again if its values have fewer bits.

    As those of `_grey`; then the upper 8 are few or none. Unpacked in the other byte order, the file gives the lower 8.
    """
    if max(high for _, high in image.getextrema()[:3]) >= 64:  # of 256: at least 15 bits
        return image
    other = {"LA;16B": "RGBA", "B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    with Image.open(source) as again:
        mode = _raw_mode(again.tile[0])
        turned = other.get(mode) or mode[:-1] + other[mode[-1]]
        again.tile = [
            (*tile[:3], (turned, *tile[3][1:]) if isinstance(tile[3], tuple) else turned) for tile in again.tile
        ]
        again.load()
        lower = np.asarray(again).astype(np.uint16)
    if turned == "RGBA":  # all four bytes of grey and alpha
        values = (lower[..., 0::2] << 8 | lower[..., 1::2])[..., [0, 0, 0, 1]]
    else:
        values = np.asarray(image).astype(np.uint16) << 8 | lower
    parts = [part for part in (values[..., :3], values[..., 3:]) if part.size]
    parts = [_in_8_bits(part, 0, _most(int(part.max()), 0, path)) for part in parts]
    return Image.fromarray(np.concatenate(parts, axis=2))


def crop_box(width, height, size, crop_pct=1.0) -> tuple[float, float, float, float]:
    """A centred box of an image in the shape of `size` (h, w): left, upper, right, lower. The largest one, times
    `crop_pct`."""
    scale = min(height / size[0], width / size[1]) * crop_pct
    box_h, box_w = size[0] * scale, size[1] * scale
    left, upper = max((width - box_w) / 2, 0.0), max((height - box_h) / 2, 0.0)  # rounding may leave -1e-14
    return left, upper, min(left + box_w, width), min(upper + box_h, height)


def fit_image(image, size, crop_pct=1.0, interpolation="bicubic") -> Tensor:
    """Resize and centre-crop a PIL image to `size` (h, w): (3, h, w) uint8.

    The box that is cut out takes `crop_pct` of the shorter side: the usual "resize to 256, crop 224" is 0.875 of it,
    here in one step.
    """
    box = crop_box(image.width, image.height, size, crop_pct)
    if (image.height, image.width) != tuple(size) or box != (0, 0, image.width, image.height):
        image = image.resize((size[1], size[0]), Image.Resampling[interpolation.upper()], box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_picture(split: Split, i):
    """Image `i` as a PIL image in RGB."""
    if isinstance(split.images, Tensor):
        return Image.fromarray(split.images[i].permute(1, 2, 0).numpy())
    return read_image(os.fsdecode(split.images[i]), split.max_pixels)
