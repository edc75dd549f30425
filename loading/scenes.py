"""DIGITS_SCENES: pictures whose object has a box and a mask, composed of scikit-learn's digits.

One clear digit of some size, place and colour on a textured background, among pieces of digits: what class a scene is
of takes finding the digit. The same in every process: the draws are seeded, and Pillow blends in whole numbers.
"""

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import masks_to_boxes

SIZE, COUNTS = 64, {True: 4000, False: 1000}  # pixels; training and test scenes
DIGIT, PIECE = (30, 46), (9, 15)  # pixels of a side
PIECES = 8  # less those that would touch the digit
GROUND, INK = 110, 150  # of 255: the background is darker than the one, digit and pieces are lighter than the other
CLASSES = [str(n) for n in range(10)]


def scans(train) -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 handwritten digits that scikit-learn ships: (n, 8, 8) in 0..16, and labels (n,); 360 are the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    chosen = train_test_split(range(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
    chosen = chosen[0] if train else chosen[1]
    return digits.images[chosen], digits.target[chosen]


@cache
def scenes(train) -> tuple[Tensor, Tensor, Tensor]:
    """(images (M, 3, 64, 64) uint8, labels (M,) int64, masks (M, 64, 64) uint8: 0 background, 1 + class), in order."""
    chance, (digits, labels) = np.random.default_rng([18, train]), scans(train)
    digits = [Image.fromarray((digit * (255 / 16)).round().astype(np.uint8)) for digit in digits]
    rounds = -(-COUNTS[train] // len(digits))
    order = np.concatenate([chance.permutation(len(digits)) for _ in range(rounds)])[: COUNTS[train]]
    composed = [_compose(digits[n], int(labels[n]), digits, chance) for n in order]
    images, masks = (torch.from_numpy(np.stack(parts)) for parts in zip(*composed))
    return images.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[order]).long(), masks


def boxes_of(masks: Tensor) -> Tensor:
    """(M, h, w) -> (M, 4) int64: left, upper, right, lower of what is not background; right and lower are outside."""
    return masks_to_boxes(masks).long() + torch.tensor([0, 0, 1, 1])  # torchvision's end inside


def truth(train) -> tuple[Tensor, Tensor]:
    """(boxes (M, 4) in pixels, masks (M, 64, 64)) of the scenes, in their order; see `boxes_of` and `scenes`."""
    masks = scenes(train)[2]
    return boxes_of(masks), masks


def _compose(digit, label, digits, chance) -> tuple[np.ndarray, np.ndarray]:
    """A scene (64, 64, 3), and its mask (64, 64)."""
    dark, light = np.sort(chance.integers(GROUND, size=(2, 3)), axis=0)
    coarse, fine = (_noise(cells, dark, light, chance) for cells in (4, 16))
    scene = Image.blend(coarse, fine, 0.35)
    own, *colours = map(tuple, chance.integers(INK, 256, size=(1 + PIECES, 3)).tolist())
    sides = [int(chance.integers(*DIGIT, endpoint=True)), *chance.integers(*PIECE, size=PIECES, endpoint=True).tolist()]
    (left, upper), *places = chance.integers(SIZE + 1 - np.array(sides)[:, None], size=(1 + PIECES, 2)).tolist()
    pieces, corners = chance.integers(len(digits), size=PIECES).tolist(), chance.integers(1, 4, (PIECES, 2)).tolist()
    side = sides[0]
    for (x, y), size, n, (column, row), colour in zip(places, sides[1:], pieces, corners, colours):
        if max(x - left - side, left - x - size, y - upper - side, upper - y - size) >= 0:
            piece = digits[n].crop((column, row, column + 4, row + 4)).resize((size, size), Image.Resampling.BILINEAR)
            scene.paste(colour, (x, y), piece)
    digit = digit.resize((side, side), Image.Resampling.BICUBIC)
    scene.paste(own, (left, upper), digit)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[upper : upper + side, left : left + side] = (np.asarray(digit) >= 128) * (1 + label)
    return np.asarray(scene), mask


def _noise(cells, dark, light, chance):
    values = chance.integers(dark, light, size=(cells, cells, 3), endpoint=True).astype(np.uint8)
    return Image.fromarray(values).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
