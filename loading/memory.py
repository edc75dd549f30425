"""Small images in memory: one uint8 tensor (M, 3, h, w) on the training device, augmented there in large pieces.

Each image has a draw of its own, and no training step waits for data.
"""

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from datasets import (
    MAX_PIXELS,
    ImageData,
    Split,
    balanced_draws,
    channel_statistics,
    eval_transform,
    find_parts,
    find_split,
    full_batch,
    held_out,
)
from loading.augment import RAND, TRIVIAL, crop_and_flip, erase, moved, random_operation
from loading.decode import failures, fit_image, joined, read_picture, without_errors
from loading.folders import FOLDERS
from utils import BadInput


def load_data(
    name, path, input_size, val_size=None, test_size=None, max_pixels=MAX_PIXELS, bad_images="error"
) -> ImageData:
    """Load a dataset and hold out validation images, stratified and the same ones in every run.

    Args:
        val_size: a share of the training images below 1, or a number of images; None: 5,000 for CIFAR, else 10 %, and
            at least one image of each class. Not for folders that have val/ and test/: val/ is held out there.
        test_size: the same for the test images of class folders without train/; None: 10 %.
        max_pixels: a file with more is not read.
        bad_images: 'skip' leaves out unreadable training images, 'error' refuses them; test images are always refused.

    Raises:
        BadInput: nothing there, broken images, classes that differ between the parts, no images to hold out.
    """
    parts, classes, origin = find_parts(name, path, val_size, test_size, max_pixels)
    if name in FOLDERS:
        errors = {}
        for part, split in parts.items():
            parts[part], errors[part] = _in_memory(split, input_size, f"reading {path}")
        strict = parts if bad_images == "error" else ("test",)
        refused = [error for part in strict for error in errors[part].values()]
        if refused:
            raise joined(refused, training=len(refused) > len(errors["test"]))
        parts = {part: without_errors(split, errors[part], part, classes) for part, split in parts.items()}
    train, val = held_out(name, parts, classes, val_size)
    mean, std = channel_statistics(train.images)
    return ImageData(name, classes, input_size, mean, std, train, val, parts["test"], origin=origin)


def read_split(name, path, train, input_size, about=None, max_pixels=MAX_PIXELS) -> tuple[Split, list[str]]:
    """`find_split` with the images in memory, (M, 3, h, w) uint8, those in folders of `input_size`."""
    split, classes = find_split(name, path, train, about, max_pixels)
    if name in FOLDERS:
        split, errors = _in_memory(split, input_size, f"reading {path}")
        if errors:
            raise joined(errors.values())
    return split, classes


def _in_memory(split, input_size, title) -> tuple[Split, dict[int, BadInput]]:
    """The files of a split as images of `input_size` in memory, (M, 3, h, w) uint8; which cannot be read, and why."""
    check_images_fit(len(split), input_size)
    images = torch.empty(len(split), 3, *input_size, dtype=torch.uint8)

    def read(i):
        images[i] = fit_image(read_picture(split, i), input_size)

    errors = failures(read, range(len(split)), title)
    return replace(split, images=images), errors


def check_images_fit(count, size):
    """Refuse what would not fit, where the system reports its free memory (Linux)."""
    wanted = count * 3 * size[0] * size[1]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return
    if wanted > free:
        raise BadInput(
            f"{count} images of {size[0]} x {size[1]} pixels need {wanted / 2**30:.1f} GiB of memory, "
            f"{free / 2**30:.1f} are free; choose a smaller --input_size"
        )


class TrainTransform:
    """Random crop (padded by an eighth) and flip, a policy, resize, normalise, random erasing; one draw for each image.

    The draws come from a CPU generator, so that no device is waited for.

    Args:
        data: a description of the data (see `eval_transform`).
        aug: 'trivial' (TrivialAugment Wide, arXiv 2103.10158), 'rand' (RandAugment with 2 operations of magnitude
            9 of 30, 1909.13719) or 'none'.
        hflip: probability of a horizontal flip.
        reprob: probability of random erasing (1708.04896).
    """

    def __init__(self, data, aug="trivial", hflip=0.5, reprob=0.25):
        self.data, self.aug, self.hflip, self.reprob = data, aug, hflip, reprob

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        images = crop_and_flip(images, generator, images.shape[2] // 8, self.hflip)
        if self.aug == "trivial":
            images = random_operation(images, generator, TRIVIAL, level=None)
        elif self.aug == "rand":
            for _ in range(2):
                images = random_operation(images, generator, RAND, level=9)
        images = eval_transform(images, self.data)
        return erase(images, generator, self.reprob) if self.reprob else images


# Images are transformed this many values at a time, several batches at once, since an operation on a few images costs
# little more than on one. On a CPU larger pieces leave the cache; on a GPU small ones cost too many launches.
CHUNK = {"cpu": 1_000_000, "cuda": 4_000_000, "mps": 4_000_000}


class MemoryLoader:
    """Batches of (images (B, 3, h, w) normalised, labels (B,)), transformed on the device of the split's images.

    With a `TrainTransform`: shuffled anew in each pass, the last incomplete batch dropped, and all randomness a
    function of (seed, epoch, place in the epoch), so that a resumed run is as if never stopped, in the middle of
    an epoch too (`set_epoch`). Without one: in order, all once. Over several processes each takes its share, without
    padding.

    Args:
        data: a description of the data (see `eval_transform`).
        passes: how often an epoch goes through the images; the last time, through a part of them if it is a fraction.
        balanced: each pass has `balanced_draws` in place of every image once.
    """

    def __init__(
        self, split: Split, data, batch_size, transform=None, passes=1, seed=0, rank=0, world_size=1, balanced=False
    ):  # fmt: skip
        self.split, self.data, self.transform, self.balanced = split, data, transform, balanced
        self.passes, self.seed, self.rank, self.world_size = passes, seed, rank, world_size
        self.epoch = self.first = 0
        self.drawn = max(world_size, int(passes * len(split)))  # in an epoch of training, by all processes
        self.count = self.drawn // world_size if transform else len(range(rank, len(split), world_size))
        self.batch_size = full_batch(batch_size, self.count) if transform else batch_size

    def __len__(self):
        return self.count // self.batch_size if self.transform else -(-self.count // self.batch_size)

    def set_epoch(self, epoch, first=0):
        """The next iteration is this epoch's, from batch `first` on."""
        self.epoch, self.first = epoch, first

    def __iter__(self):
        order, generator = self._order()
        _, _, h, w = self.split.images.shape
        larger = max(h * w, math.prod(self.data["input_size"]))
        device = self.split.images.device
        chunk = max(1, CHUNK[device.type] // (3 * larger * self.batch_size)) * self.batch_size
        for start in range(0, len(order), chunk):
            if generator is not None:  # a seed for each piece, so that one can begin with any of them
                draws = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
            before = self.first - start // self.batch_size  # batches of this piece that are not wanted
            if before * self.batch_size >= chunk:
                continue
            index = moved(order[start : start + chunk], device)
            images, labels = self.split.images.index_select(0, index), self.split.labels[index]
            images = self.transform(images, draws) if self.transform else eval_transform(images, self.data)
            batches = zip(images.split(self.batch_size), labels.split(self.batch_size))
            yield from islice(batches, max(before, 0), None)

    def _order(self) -> tuple[Tensor, torch.Generator]:
        if not self.transform:
            return torch.arange(self.rank, len(self.split), self.world_size), None
        seed = (self.seed * 1_000_003 + self.epoch) * 1_009
        shuffle, passes = torch.Generator().manual_seed(seed), math.ceil(self.passes)  # the same in every process
        if self.balanced:
            orders = [balanced_draws(self.split.labels, shuffle) for _ in range(passes)]
        else:
            orders = [torch.randperm(len(self.split), generator=shuffle) for _ in range(passes)]
        order = torch.cat(orders)[: self.drawn]
        order = order[self.rank :: self.world_size][: len(self) * self.batch_size]
        return order, torch.Generator().manual_seed(seed + 1 + self.rank)
