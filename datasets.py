"""Data sets: found, described, split; and the one transform of testing and drawing with its inverse."""

import math
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from loading.archives import kind_of
from loading.folders import FOLDERS, class_folders, find_folders, folder_of, listing, note_left_out, part_of, visible
from loading.scenes import CLASSES, scans, scenes
from utils import BadInput, RunFailed

DIGITS = ("DIGITS", "DIGITS_SCENES")  # no default augmentation: a mirrored digit is none
CIFAR = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}  # and the folders that torchvision reads
ARCHIVES = {"cifar-10-python.tar.gz": "CIFAR10", "cifar-100-python.tar.gz": "CIFAR100"}
TEST_SIZE = 0.1  # of class folders without train/
MAX_PIXELS = 200_000_000  # of an image file that is read
WHOLE_IMAGE = {"crop_pct": 1.0, "interpolation": "bicubic"}  # of a description of data without these keys


@dataclass
class Split:
    images: Tensor | np.ndarray  # (M, 3, h, w) uint8, or the names of M files
    labels: Tensor  # (M,) int64
    max_pixels: int = MAX_PIXELS  # of a file

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        """Images in memory on `device`. Raises RunFailed if they do not fit there."""
        try:
            return replace(self, images=self.images.to(device), labels=self.labels.to(device))
        except torch.OutOfMemoryError:
            raise RunFailed(
                f"the {len(self)} images ({self.images.nbytes / 2**30:.1f} GiB) do not fit on {device}; "
                "choose a smaller --input_size, or main_distillation.py, which reads images while it trains"
            ) from None

    def part(self, numbers):
        return replace(self, images=self.images[numbers], labels=self.labels[numbers])


@dataclass
class ImageData:
    """A dataset, split. `val` is None if nothing was held out; mean and std are of the training images, in 0..1."""

    name: str
    classes: list[str]
    input_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    train: Split
    val: Split | None
    test: Split
    crop: dict | None = None  # of pictures: `crop_pct` and `interpolation`, see `fit_image`
    origin: dict | None = None  # of images in folders: how `find_split` finds the same test images again

    def description(self) -> dict:
        """The description of the data in a checkpoint, as plain values."""
        sizes = {part: len(getattr(self, part) or ()) for part in ("train", "val", "test")}
        return {
            "name": self.name, "classes": list(self.classes), "input_size": tuple(self.input_size),
            "mean": list(self.mean), "std": list(self.std), "images": sizes, **(self.crop or {}), **(self.origin or {}),
        }  # fmt: skip


# Data sets -------------------------------------------------------------------------------------------------------


def detect_data_set(path) -> str:
    """The name of the dataset under `path`: what is there decides; where nothing is, the folder's name."""
    if path is None:
        return "CIFAR10"
    if kind_of(path):
        return "FOLDER"
    path = Path(path)
    for name, folder in CIFAR.items():
        if (path / folder).is_dir():
            return name
    name, there = path.name.upper(), visible(path)
    archives = [ARCHIVES[file] for file in there if file in ARCHIVES]
    if name in (*CIFAR, *EMBEDDED) and (not there or archives):
        return name
    return archives[0] if archives else "FOLDER"


def check_classes(these, those, these_are, those_are):
    """Raise BadInput, naming the difference, unless two lists of classes are the same."""
    if list(these) == list(those):
        return
    only = [f"only {what} have {', '.join(sorted(rest)[:10])}" for rest, what in (
        (set(these) - set(those), these_are), (set(those) - set(these), those_are)) if rest]  # fmt: skip
    raise BadInput(f"{these_are} and {those_are} differ in their classes: {'; '.join(only) or 'another order'}")


def check_labels(split, classes, place):
    """Raise BadInput unless all labels are numbers of the classes."""
    if (most := int(split.labels.max())) >= len(classes):
        raise BadInput(
            f"{place} has a label {most}, and there are {len(classes)} classes from 0 on; correct the labels"
        )


def find_split(name, path, train, about=None, max_pixels=MAX_PIXELS) -> tuple[Split, list[str]]:
    """The training or the test images of a dataset, and its class names; those in folders are not read yet.

    Args:
        about: a checkpoint's description of its data; its very test images are found again.
    """
    about = about or {}
    if name in FOLDERS:
        split, classes = _split_in_folders(name, path, "train" if train else "test", about, max_pixels)
    else:
        split, classes = _small_images(name, path, train)
    if about.get("class_map"):
        return select_classes(split, classes, about["classes"]), list(about["classes"])
    return split, classes


def _split_in_folders(name, path, part, about, max_pixels) -> tuple[Split, list[str]]:
    folders, left_out = find_folders(name, path, about or None), Counter()
    if "all" in folders:
        parts, classes, origin = _split_classes(path, about.get("test_size"), left_out, max_pixels)
        if about.get("classes") and not about.get("class_map"):
            check_classes(classes, about["classes"], "the images", "the model")
        if about.get("test_files", origin["test_files"]) != origin["test_files"]:
            raise BadInput(
                f"the files in {path} are not those of training, and some of them were trained on; give that folder by "
                f"--data_path, or put the images to test on into {Path(path) / 'test'}/<class>/"
            )
        split = parts[part]
    else:
        split, classes = _class_folders(folder_of(part, folders, name, path), left_out, max_pixels)
        known = about.get("class_map", about.get("classes"))  # what labels are numbers of; True in old checkpoints
        classes = classes or (numbered([split]) if known in (None, True) else known)
        check_labels(split, classes, path)
    note_left_out(path, left_out)
    return split, classes


def numbered(splits) -> list[str]:
    """Names of classes that have only numbers."""
    return [str(i) for i in range(1 + max(int(split.labels.max()) for split in splits))]


def select_classes(split, classes, wanted) -> Split:
    """The images of the classes `wanted`, whose labels are their places in that list."""
    unknown = [name for name in wanted if name not in set(classes)]
    if unknown:
        raise BadInput(
            f"there is no class {unknown[0]}: the classes are {', '.join(classes[:5])}, ...; correct the map"
        )
    places = torch.full((len(classes),), -1)
    places[[classes.index(name) for name in wanted]] = torch.arange(len(wanted))
    labels = places[split.labels]
    kept = (labels >= 0).nonzero()[:, 0]
    return replace(split.part(kept.tolist()), labels=labels[kept])


def _small_images(name, path, train) -> tuple[Split, list[str]]:
    if name in EMBEDDED:
        images, labels, classes = EMBEDDED[name](train)
    else:
        utils.main_decides(lambda: _read_cifar(name, path, train) and None)  # the first process downloads
        images, labels, classes = _read_cifar(name, path, train)
    kinds = images.dtype, images.shape[1:-2], labels.dtype, type(classes[0])
    if kinds != (torch.uint8, (3,), torch.int64, str):
        found = f"{images.dtype} {tuple(images.shape)}, {labels.dtype} {tuple(labels.shape)}, {classes[:1]}"
        raise TypeError(f"the reader of {name} must return images, labels and names as `EMBEDDED` says, not {found}")
    split = Split(images, labels)
    check_labels(split, classes, name)
    return split, classes


def _read_cifar(name, path, train):
    import torchvision

    if name not in CIFAR:
        raise BadInput(f"there is no dataset {name}; it is one of {', '.join(DATA_SETS)}")
    path = path or f"./data/{name}"
    kind = getattr(torchvision.datasets, name)
    folder = Path(path) / kind.base_folder
    there, made = folder.is_dir(), not Path(path).exists()
    if not there and set(visible(path)) - {*ARCHIVES, *CIFAR.values()}:
        raise BadInput(
            f"there is no {name} in {path} ({listing(path)}), and nothing is downloaded to where other files are; "
            "give --data_path the folder that has it, or an empty or absent one to download to"
        )
    try:
        data = kind(path, train=train, download=not there)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a cut archive is a RuntimeError
        if there:
            raise BadInput(f"{folder} is damaged ({error}); remove it to download again") from None
        if made:  # by torchvision
            with suppress(OSError):  # not empty: something was downloaded
                Path(path).rmdir()
        raise BadInput(
            f"no {name} under {path}, and it cannot be downloaded ({getattr(error, 'reason', error)}); "
            "put it there, or try --data_set DIGITS, which needs no download"
        ) from None
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), data.classes


@cache
def read_digits(train):
    """As 32 x 32 RGB."""
    digits, labels = scans(train)
    small = torch.from_numpy(digits).float()[:, None] * (255 / 16)
    images = F.interpolate(small, size=32, mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    return images.contiguous(), torch.from_numpy(labels).long(), CLASSES


def read_scenes(train):
    return *scenes(train)[:2], CLASSES


# Readers of datasets that need no file: train or test -> images (M, 3, h, w) uint8, labels (M,) int64, their names.
EMBEDDED = {"DIGITS": read_digits, "DIGITS_SCENES": read_scenes}
DATA_SETS = (*CIFAR, *EMBEDDED, "FOLDER")


# Training, held-out and test images --------------------------------------------------------------------------------


def find_parts(name, path, val_size, test_size, max_pixels, wanted=None) -> tuple[dict[str, Split], list[str], dict]:
    """('train' and 'test' images, and 'val' if that has a folder; classes; `ImageData.origin`). Nothing is read yet.

    Args:
        wanted: classes in the order of their labels; images of others are left out. None: all.
    """
    folders = find_folders(name, path) if name in FOLDERS else {}
    if test_size is not None and "all" not in folders:
        raise BadInput(f"--test_size is for class folders without train/, and {path or name} has its own test images")
    if val_size is not None and "val" in folders:
        raise BadInput(f"--val_size: {folders['val']} is what is held out; leave out that flag, or move that folder")
    if name in FOLDERS:
        parts, classes, origin = _parts_in_folders(name, path, folders, test_size, max_pixels)
    else:
        (train, classes), (test, _) = (_small_images(name, path, part) for part in (True, False))
        parts, origin = {"train": train, "test": test}, {}
    if len(classes) == 1:
        raise BadInput(f"all images of {path} are of one class, {classes[0]}; give the folder with the class folders")
    if wanted is not None:
        parts = {part: select_classes(split, classes, wanted) for part, split in parts.items()}
        classes, origin = list(wanted), origin | {"class_map": list(classes)}
    return parts, classes, origin


def _parts_in_folders(name, path, folders, test_size, max_pixels) -> tuple[dict[str, Split], list[str], dict]:
    left_out = Counter()
    if "all" in folders:
        parts, classes, origin = _split_classes(path, test_size, left_out, max_pixels)
    else:
        wanted = {part: folder_of(part, folders, name, path) for part in ("train", "test")}
        parts, named = {}, {}
        for part, folder in (wanted | folders).items():
            parts[part], named[part] = _class_folders(folder, left_out, max_pixels)
        classes = named["train"] or numbered(parts.values())
        for part, these in named.items():  # None: its labels are numbers of the training images' classes
            what = f"the {'held-out' if part == 'val' else part} images"
            check_classes(classes, these or classes, "the training images", what)
            check_labels(parts[part], classes, folders[part])
        chosen = part_of(folders["test"])
        origin = {} if chosen == FOLDERS[name] else {"test_folder": chosen}
    note_left_out(path, left_out)
    return parts, classes, origin


def _class_folders(root, left_out, max_pixels) -> tuple[Split, list[str] | None]:
    files, labels, classes = class_folders(root, left_out)
    return Split(files, labels, max_pixels), classes


def _split_classes(path, test_size, left_out, max_pixels) -> tuple[dict[str, Split], list[str], dict]:
    """Class folders without train/: ('train' and 'test' images, classes, `ImageData.origin`)."""
    everything, classes = _class_folders(Path(path), left_out, max_pixels)
    size = TEST_SIZE if test_size is None else test_size
    rest, test = _hold_out(everything, classes, size, "--test_size", of_each_class=True)
    names = b"\0".join(os.path.relpath(file, os.fsencode(path)) for file in test.images.tolist())
    names = names.replace(os.fsencode(os.sep), b"/")  # a checkpoint may have come from another system
    return {"train": rest, "test": test}, classes, {"test_size": size, "test_files": sha256(names).hexdigest()}


def held_out(name, parts, classes, val_size) -> tuple[Split, Split | None]:
    """Training and held-out images."""
    if "val" in parts:
        return parts["train"], parts["val"]
    default = 5000 if name in CIFAR else 0.01 if name == "IMNET" else 0.1
    size = default if val_size is None else val_size
    return _hold_out(parts["train"], classes, size, "--val_size", of_each_class=val_size is None)


def _hold_out(data: Split, classes, size, what, of_each_class) -> tuple[Split, Split | None]:
    """(kept, held): stratified, the same ones in every run.

    Args:
        size: a share below 1, or a number of images.
        what: gives that size, in a message.
        of_each_class: hold out more if that is needed for one image of each class.
    """
    from sklearn.model_selection import train_test_split

    if size == 0:
        return data, None
    labels, count, k = data.labels.numpy(), len(data), len(classes)
    wanted = math.ceil(size * count) if size < 1 else int(size)
    for name, images in zip(classes, np.bincount(labels, minlength=k).tolist()):
        if images < 2:
            nothing = ", or hold nothing out by --val_size 0" if what == "--val_size" else ""
            raise BadInput(f"class {name} has {images} image, and one of each class is held out; add some{nothing}")
    if of_each_class:
        wanted = min(max(wanted, k), count - k)
    if not k <= wanted <= count - k:
        raise BadInput(
            f"{what} {size:g} would hold out {wanted} of {count} images; of each of the {k} classes one has to be held "
            f"out, and one kept: give {k} to {count - k}"
        )
    kept, held = train_test_split(range(count), test_size=wanted, stratify=labels, random_state=0)
    for label in set(range(k)) - set(labels[held].tolist()) if of_each_class else ():
        held.append(next(i for i in kept if labels[i] == label))
        kept.remove(held[-1])
    return data.part(kept), data.part(held)


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """(K,) How much an image of each class counts where all classes count alike; 1 on average over the images.

    Both ways of --balance have it from here: the loss as a factor, the sampler as a chance.
    """
    counts = torch.bincount(labels, minlength=classes)
    return len(labels) / (counts.clamp(min=1) * (counts > 0).sum())


def balanced_draws(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of as many images as there are, drawn with replacement, each class as often as the others on average."""
    labels = labels.cpu()
    weights = class_weights(labels, 0).double()[labels]  # in float32 the sum over a million images is too coarse
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator)


def full_batch(wanted, count) -> int:
    """`wanted` images, or as many as there are, but for an odd one: Mixup pairs the images of a batch."""
    return min(wanted, max(count - count % 2, 1))


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of (M, 3, h, w) uint8 images, in 0..1."""
    histograms = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double()
    share = histograms / histograms.sum(dim=1, keepdim=True)  # (3, 256)
    values = torch.arange(256, dtype=torch.double) / 255
    mean = share @ values
    std = (share @ values.square() - mean.square()).clamp_min(1e-8).sqrt()
    return mean.tolist(), std.tolist()


@cache
def channels(values, device):
    """(3, 1, 1); made once, since the way to a GPU waits for it."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def normalise(images: Tensor, mean, std) -> Tensor:
    """uint8 or float images in 0..255 -> float, mean 0 and standard deviation 1 over the training set."""
    mean, std = (channels(tuple(values), images.device) for values in (mean, std))
    scale = 1 / (255 * std)
    return images.float().mul_(scale).sub_(mean * 255 * scale)


def denormalise(images: Tensor, mean, std) -> Tensor:
    """The inverse of `normalise`: uint8, as a person would see them."""
    mean, std = (channels(tuple(values), images.device) for values in (mean, std))
    images = (images * std + mean) * 255
    return images.round().clamp(0, 255).to(torch.uint8)


def resize(images: Tensor, size) -> Tensor:
    """(B, 3, h, w) in 0..255 to `size` (h, w), on their device; unchanged if they have that size."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images.float(), size=tuple(size), mode="bicubic", antialias=True).clamp_(0, 255)


def eval_transform(images: Tensor, data) -> Tensor:
    """(B, 3, h, w) uint8 -> normalised, at the input size: the one transform of testing and drawing.

    `data`: a checkpoint's description of its data, or anything with its keys.
    """
    return normalise(resize(images, data["input_size"]), data["mean"], data["std"])
