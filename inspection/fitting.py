"""How an image of any shape gets into a model that was made for one shape."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache

from PIL import Image

from checkpoints.models import at_size
from loading.decode import crop_box
from utils import BadInput

FITS = ("crop", "pad", "native")


def fitting_size(width, height, longer, patch) -> tuple[int, int]:
    """(h, w) in whole patches, nearest to the image's shape with `longer` pixels on its longer side."""
    scale = longer / max(width, height)
    return tuple(max(1, round(side * scale / p)) * p for side, p in zip((height, width), patch))


@cache
def sized(model) -> Callable:
    """A function: (h, w) -> the model at that size, which shares its weights. It raises ValueError if there is none."""
    return lru_cache(maxsize=4)(model.at_size if hasattr(model, "at_size") else lambda size: at_size(model, size))


def fitted(fit, model, data, image):
    """(model, data, image) for an `InputImage` that is in memory.

    Args:
        fit: 'crop': the middle, as in the model's test. 'pad': the whole image, with bars of the mean colour. 'native':
            the whole image in its own shape, positions resampled; its longer side is the longer one of the model's.
    """
    if fit == "crop" or image.in_memory:
        return model, data, image
    pixels, whole = image.read(), data | {"crop_pct": 1.0}
    if fit == "native":
        own = model.model_args["img_size"]
        size = fitting_size(*pixels.size, max(own), model.model_args["patch_size"])
        try:
            return sized(model)(size), whole | {"input_size": size, "covered": size}, image
        except ValueError as error:
            raise BadInput(f"--fit native: {error}; give --fit crop or --fit pad") from None
    (h, w), mean = data["input_size"], tuple(round(255 * value) for value in data["mean"])
    scale = max(pixels.height / h, pixels.width / w)
    canvas = Image.new("RGB", (max(1, round(w * scale)), max(1, round(h * scale))), mean)
    canvas.paste(pixels, ((canvas.width - pixels.width) // 2, (canvas.height - pixels.height) // 2))
    return model, whole, replace(image, read=lambda: canvas, whole=pixels.size)


def how_fitted(image, pixels, data) -> str:
    """What the model sees of an image, in words: 'centre crop of 500 x 375', 'padded from ...', 'whole, ...'."""
    width, height = pixels.size
    if image.whole:
        return "padded from {} x {} pixels".format(*image.whole)
    if image.in_memory and "crop_pct" not in data:
        return f"{width} x {height} pixels"
    left, upper, right, lower = crop_box(width, height, data["input_size"], data.get("crop_pct", 1.0))
    part = (right - left) * (lower - upper) / (width * height)
    return f"{'whole image' if part > 0.97 else 'centre crop'} of {width} x {height} pixels"
