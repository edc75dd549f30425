"""Operations of augmentation on a batch of images at once, with a draw of its own for each image.

Images are uint8 tensors (B, 3, h, w) on any device; draws come from a CPU generator.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF


def moved(values: Tensor, device) -> Tensor:
    """A CPU tensor on `device`, without waiting; but MPS may read what is free by then (pytorch issue 189690)."""
    return values.to(device, non_blocking=device.type != "mps")


def draw(generator, like: Tensor, low=0.0, high=1.0) -> Tensor:
    """(B,) uniform numbers on the device of the images `like`."""
    numbers = torch.rand(len(like), generator=generator) * (high - low) + low
    return moved(numbers, like.device)


def crop_and_flip(images: Tensor, generator, pad, hflip) -> Tensor:
    """Pad with black, cut out a window of the old size, mirror some: each image at its own offset."""
    B, C, h, w = images.shape
    top = (draw(generator, images) * (2 * pad + 1)).long()
    left = (draw(generator, images) * (2 * pad + 1)).long()
    mirrored = draw(generator, images) < hflip
    images = F.pad(images, (pad,) * 4)
    # Whole rows first, which are copied at once, then columns; one index for each pixel would take three times as long.
    first = torch.arange(B * C, device=images.device).view(B, C, 1) * (h + 2 * pad)
    rows = first + (top[:, None] + torch.arange(h, device=images.device))[:, None]  # (B, C, h)
    images = images.view(-1, w + 2 * pad).index_select(0, rows.flatten()).view(B, C, h, -1)
    columns = torch.arange(w, device=images.device).expand(B, w)
    columns = torch.where(mirrored[:, None], w - 1 - columns, columns) + left[:, None]
    return images.gather(3, columns[:, None, None].expand(B, C, h, w))


def erase(images: Tensor, generator, probability, area=(0.02, 0.4), aspect=(0.3, 1 / 0.3)) -> Tensor:
    """Set a rectangle of some images to 0, the mean colour (Random Erasing, arXiv 1708.04896), in place."""
    B, _, h, w = images.shape
    chosen = draw(generator, images) < probability
    pixels = draw(generator, images, *area) * (h * w)
    ratio = draw(generator, images, math.log(aspect[0]), math.log(aspect[1])).exp()
    height, width = (pixels * ratio).sqrt().round().clamp(1, h), (pixels / ratio).sqrt().round().clamp(1, w)
    top = (draw(generator, images) * (h - height + 1)).floor()
    left = (draw(generator, images) * (w - width + 1)).floor()
    y, x = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
    rows = (y >= top[:, None]) & (y < (top + height)[:, None]) & chosen[:, None]  # (B, h)
    columns = (x >= left[:, None]) & (x < (left + width)[:, None])  # (B, w)
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)


# Augmentation policies: the operations, and the magnitude of each at the highest level, 30. A translation is in pixels,
# below 1 a share of the width or height. Images stay uint8, and the arithmetic is torchvision's, but every image has a
# magnitude of its own.
TRIVIAL = dict(
    identity=0, shear_x=0.99, shear_y=0.99, translate_x=32, translate_y=32, rotate=135, brightness=0.99, color=0.99,
    contrast=0.99, sharpness=0.99, posterize=6, solarize=255, autocontrast=0, equalize=0,
)  # fmt: skip
RAND = TRIVIAL | dict(
    shear_x=0.3, shear_y=0.3, translate_x=150 / 331, translate_y=150 / 331, rotate=30, brightness=0.9, color=0.9,
    contrast=0.9, sharpness=0.9, posterize=4,
)  # fmt: skip
WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def random_operation(images: Tensor, generator, policy: dict, level: int | None) -> Tensor:
    """Apply one operation of the policy, drawn for each image, at `level` of 30 (None: drawn too, 0..30)."""
    B, _, h, w = images.shape
    drawn = torch.randint(len(policy), (B,), generator=generator)
    levels = torch.randint(31, (B,), generator=generator) if level is None else torch.full((B,), level)
    sign = torch.randint(2, (B,), generator=generator) * 2 - 1
    images = images.clone()
    for i, (name, largest) in enumerate(policy.items()):
        chosen = (drawn == i).nonzero()[:, 0]
        if name == "identity" or not len(chosen):
            continue
        if name.startswith("translate") and largest < 1:
            largest *= w if name == "translate_x" else h
        magnitude = levels[chosen] * (largest / 30)
        if name not in ("posterize", "solarize"):
            magnitude = magnitude * sign[chosen]
        magnitude = moved(magnitude, images.device)[:, None, None, None]
        chosen = moved(chosen, images.device)
        images[chosen] = apply_operation(name, images[chosen], magnitude)
    return images


def apply_operation(name: str, images: Tensor, magnitude: Tensor) -> Tensor:
    """One operation on (B, 3, h, w) uint8 images with magnitudes (B, 1, 1, 1); see `TRIVIAL` for the names."""
    if name in WARPS:
        return _warp(images, name, magnitude)
    if name == "brightness":
        return _blend(images, 0, 1 + magnitude)
    if name == "color":
        return _blend(images, TF.rgb_to_grayscale(images), 1 + magnitude)
    if name == "contrast":
        return _blend(images, TF.rgb_to_grayscale(images).float().mean(dim=(2, 3), keepdim=True), 1 + magnitude)
    if name == "sharpness":
        return _blend(images, _blur(images), 1 + magnitude)
    if name == "posterize":  # the number of bits that are cleared
        kept = -(2 ** magnitude.round().int())
        return images & kept.to(torch.uint8)
    if name == "solarize":  # inverted from 255 - magnitude on
        return torch.where(images >= 255 - magnitude, 255 - images, images)
    return TF.equalize(images) if name == "equalize" else _autocontrast(images)


def _warp(images, name, magnitude):
    """Move pixels, nearest neighbour, black from outside; shears keep the upper left corner."""
    B, C, h, w = images.shape
    m = magnitude[:, 0]  # (B, 1, 1)
    y = torch.arange(h, device=images.device, dtype=torch.float32)[None, :, None]
    x = torch.arange(w, device=images.device, dtype=torch.float32)[None, None, :]
    if name == "rotate":
        cos, sin = torch.cos(m * (math.pi / 180)), torch.sin(m * (math.pi / 180))
        cy, cx = (h - 1) / 2, (w - 1) / 2
        from_x = cos * (x - cx) - sin * (y - cy) + cx
        from_y = sin * (x - cx) + cos * (y - cy) + cy
    else:
        from_x = x + m * (y + 0.5) if name == "shear_x" else x - m.trunc() if name == "translate_x" else x + 0 * m
        from_y = y + m * (x + 0.5) if name == "shear_y" else y - m.trunc() if name == "translate_y" else y + 0 * m
    from_y, from_x = from_y.round().long(), from_x.round().long()
    inside = (from_y >= 0) & (from_y < h) & (from_x >= 0) & (from_x < w)  # (B, h, w)
    index = from_y.clamp(0, h - 1) * w + from_x.clamp(0, w - 1)
    index = index.view(B, 1, -1).expand(B, C, -1)
    return images.flatten(2).gather(2, index).view_as(images) * inside[:, None]


def _blend(images, other, ratio):
    return (ratio * images + (1 - ratio) * other).clamp_(0, 255).to(torch.uint8)


def _blur(images):
    kernel = images.new_ones(3, 3, dtype=torch.float32)
    kernel[1, 1].fill_(5)  # `= 5` would copy it from the CPU, and wait for a GPU
    blurred = images.float()
    inner = F.conv2d(blurred, (kernel / 13).expand(3, 1, 3, 3), groups=3).round()
    blurred[:, :, 1:-1, 1:-1] = inner
    return blurred


def _autocontrast(images):
    low = images.amin(dim=(2, 3), keepdim=True).float()
    high = images.amax(dim=(2, 3), keepdim=True).float()
    flat = low == high
    scale = torch.where(flat, 1.0, 255 / (high - low))
    return ((images - torch.where(flat, 0.0, low)) * scale).clamp_(0, 255).to(torch.uint8)
