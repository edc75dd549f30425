"""Images of any size, read and augmented one at a time in worker processes, as timm does for ImageNet."""

import multiprocessing
import os
import random
from contextlib import contextmanager
from functools import partial
from itertools import islice

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.transforms import ResizeKeepRatio
from torch.utils.data import Dataset, DistributedSampler, Sampler
from torchvision import transforms

import utils
from datasets import MAX_PIXELS, ImageData, Split, balanced_draws, channel_statistics, find_parts, full_batch, held_out
from loading.decode import failures, fit_image, joined, read_image, read_picture, without_errors
from loading.folders import FOLDERS
from loading.workers import WorkerLoader
from utils import BadInput


def load_file_data(
    name, path, input_size, val_size=None, crop_pct=0.875, interpolation="bicubic", test_size=None,
    max_pixels=MAX_PIXELS, bad_images="error", classes=None,
) -> ImageData:  # fmt: skip
    """`loading.memory.load_data` for a `FileLoader`: images in folders stay there, and get ImageNet's mean and std.

    With `bad_images` 'skip' all processes have to call this together.

    Args:
        val_size: as there, but 1 % for IMNET, as in big_vision.
        crop_pct, interpolation: of evaluation, see `fit_image`.
        classes: see `find_parts`, wanted.
    """
    parts, classes, origin = find_parts(name, path, val_size, test_size, max_pixels, classes)
    if bad_images == "skip":
        parts |= {part: readable(parts[part], part, classes) for part in parts if part != "test" and name in FOLDERS}
    train, val = held_out(name, parts, classes, val_size)
    imagenets = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    mean, std = imagenets if name in FOLDERS else channel_statistics(train.images)
    crop = {"crop_pct": crop_pct, "interpolation": interpolation}
    return ImageData(name, classes, input_size, mean, std, train, val, parts["test"], crop, origin)


def readable(split, part, classes, at_once=10_000) -> Split:
    """A split without the images that cannot be read. Each process reads its share, and all leave out the same.

    Args:
        part: of the data, for messages.
        at_once: images of each process between two exchanges, so that none waits for the others longer than a
            collective of NCCL may take.
    """
    errors, ranks = {}, utils.world_size()

    def decode(i):
        read_image(os.fsdecode(split.images[i]), split.max_pixels, draft=True)

    for start in range(0, len(split), at_once * ranks):
        numbers = range(start + utils.rank(), min(start + at_once * ranks, len(split)), ranks)
        for found in utils.gather(failures(decode, numbers, f"checking images from {start} on")):
            errors |= found
    return without_errors(split, errors, part, classes)


def picture_transform(size, aa, color_jitter, hflip, interpolation, three_augment=False, simple_crop=False, none=False):
    """The training transform of DeiT or DeiT III, made of timm's: a PIL image -> (3, h, w) uint8.

    Args:
        size: (h, w).
        aa: timm's name of a policy, such as 'rand-m9-mstd0.5-inc1'; 'none' for none.
        color_jitter: strength; timm's policies other than 3-Augment replace it.
        interpolation: 'bicubic', 'bilinear', 'lanczos' or 'random'.
        three_augment: 3-Augment (DeiT III, arXiv 2204.07118: grey, solarize or blur) in place of `aa`.
        simple_crop: DeiT III's simple random crop in place of the random resized crop: the shorter side is resized, 4
            pixels are reflected at each border, and a window is cut out.
        none: no augmentation at all, the whole image.
    """
    if none:
        return partial(fit_image, size=size, interpolation="bicubic" if interpolation == "random" else interpolation)
    policy = "3a" if three_augment else None if aa == "none" else aa
    try:
        crop, augment, _ = create_transform(
            size, is_training=True, auto_augment=policy, color_jitter=color_jitter or None, hflip=hflip,
            interpolation=interpolation, separate=True,
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError) as error:
        raise BadInput(f"--aa {aa} is no policy of timm's ({error}); try rand-m9-mstd0.5-inc1, or none") from None
    if simple_crop:
        crop = transforms.Compose([
            ResizeKeepRatio(size, interpolation=interpolation),
            transforms.RandomCrop(size, padding=4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(hflip),
        ])  # fmt: skip
    return transforms.Compose([crop, augment, transforms.PILToTensor()])


@contextmanager
def _seeded(seed, device=None):
    """The global generators of the CPU (and a GPU), seeded, and afterwards as before: timm draws from all of them."""
    states = random.getstate(), np.random.get_state()
    on_gpu = device is not None and device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _ImageFiles(Dataset):
    """Item (number, seed) is an image as the transform makes it, and its label; the error for an unreadable one."""

    def __init__(self, split: Split, transform):
        self.split, self.transform = split, transform
        self.closing = multiprocessing.RawValue("b", False)  # shared with the worker processes

    def __len__(self):
        return len(self.split)

    def __getitem__(self, item):
        if self.closing.value:
            os._exit(0)  # a worker process, whose batch nobody waits for any more
        number, seed = item
        try:
            image, label = read_picture(self.split, number), self.split.labels[number]
        except BadInput as error:
            return error  # raised in a worker process, it would reach the user as a traceback in one long line
        if seed is None:
            return self.transform(image), label
        with _seeded(seed):
            return self.transform(image), label


def _collate(items, training):
    """A batch, or one error that names all images that cannot be read."""
    errors = [item for item in items if isinstance(item, BadInput)]
    return joined(errors, training) if errors else fast_collate(items)


class SeededSampler(Sampler):
    """(number, seed) of one image after another, from place `first` on; with `seed` None nothing is drawn.

    `balance`: the labels, for `balanced_draws` in place of all images, of which `numbers` then chooses; or None.
    """

    def __init__(self, numbers, seed, rank, balance=None):
        self.numbers, self.seed, self.rank, self.balance = numbers, seed, rank, balance
        self.set_epoch(0)

    def set_epoch(self, epoch, first=0):
        self.first = first
        if self.seed is not None:
            self.epoch_seed = self.seed * 1_000_003 + epoch
            self.numbers.set_epoch(self.epoch_seed)  # timm's sampler has no seed but the epoch

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        if self.seed is None:
            return ((number, None) for number in self.numbers)
        generator = torch.Generator().manual_seed(self.epoch_seed * 1_009 + self.rank)
        seeds = torch.randint(2**62, (len(self),), generator=generator).tolist()
        numbers = self.numbers
        if self.balance is not None:
            drawn = balanced_draws(self.balance, torch.Generator().manual_seed(self.epoch_seed * 1_009 - 1))
            numbers = (int(drawn[n]) for n in numbers)
        return islice(zip(numbers, seeds), self.first, None)


class SeededErasing:
    """timm's random erasing with draws that are a function of (seed, epoch, process, batch)."""

    def __init__(self, erasing, draws: SeededSampler, device):
        self.erasing, self.draws, self.device, self.batch = erasing, draws, device, 0

    def __call__(self, images):
        seed = ((self.draws.epoch_seed * 1_009 + self.draws.rank) * 1_000_003 + self.batch) % 2**62
        self.batch += 1
        with _seeded(seed, self.device):
            return self.erasing(images)


class FileLoader:
    """Batches of (images (B, 3, h, w) normalised, labels (B,)) on the device, from timm's prefetching loader.

    For training (with a `transform`) the order and all draws are a function of (seed, epoch, process, place in the
    epoch), whatever the number of workers; the last incomplete batch is dropped, and every process has as many
    batches. Without a transform: every image once, in order; over several processes each takes its share, without
    padding.

    Args:
        data: a description of the data with `crop_pct` and `interpolation`.
        repeats: with more than 1, repeated augmentation (timm's sampler): of each image so many draws, from a part of
            the images, so that an epoch is not longer.
        reprob: probability of random erasing with noise, on the device.
        workers: processes that read; 0: this one.
        balanced: train on `balanced_draws` in place of every image once.
    """

    def __init__(
        self, split: Split, data, batch_size, device, transform=None, *, repeats=1, reprob=0.0, seed=0, rank=0,
        world_size=1, workers=0, balanced=False,
    ):  # fmt: skip
        self.split, share = split, dict(num_replicas=world_size, rank=rank)
        if transform is None:
            crop = {key: data[key] for key in ("crop_pct", "interpolation")}
            transform = partial(fit_image, size=data["input_size"], **crop)
            numbers, seed, reprob, training = range(rank, len(split), world_size), None, 0.0, False
        elif repeats > 1:
            numbers, training = RepeatAugSampler(split, num_repeats=repeats, selected_round=0, **share), True
        else:
            numbers, training = DistributedSampler(split, drop_last=True, **share), True
        self.draws = SeededSampler(numbers, seed, rank, split.labels if balanced else None)
        self.batch_size = full_batch(batch_size, len(numbers)) if training else batch_size
        loader = WorkerLoader(
            _ImageFiles(split, transform), self.batch_size, sampler=self.draws, num_workers=workers,
            collate_fn=partial(_collate, training=training), pin_memory=device.type == "cuda", drop_last=training,
            persistent_workers=workers > 0, generator=torch.Generator(),  # else it draws from the global one
        )  # fmt: skip
        mps = device.type == "mps"
        loader.to = device if mps else None  # PrefetchLoader's copy would not wait: see `moved`
        self.batches = PrefetchLoader(loader, data["mean"], data["std"], device=device, re_prob=reprob, re_mode="pixel")
        if reprob:
            self.batches.random_erasing.device = torch.device("cpu") if mps else device  # `_seeded` seeds no MPS
            self.batches.random_erasing = SeededErasing(self.batches.random_erasing, self.draws, device)
        self.first = 0

    def set_epoch(self, epoch, first=0):
        """The next iteration is this epoch's, from batch `first` on."""
        self.first = first
        self.draws.set_epoch(epoch, first * self.batch_size)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        if self.first >= len(self):  # timm's fails on a process's share of no images
            return iter(())
        if self.batches.random_erasing is not None:
            self.batches.random_erasing.batch = self.first
        return iter(self.batches)
