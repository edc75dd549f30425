"""Data sets, the transforms of training and evaluation, and two loaders.

`Loader` has small images in memory: every set is one uint8 tensor (M, 3, s, s) on the training device. Augmentation
works there on many images at once, with a draw of its own for each image, so that no training step waits for data.
`PictureLoader` reads and augments images of any size one at a time, in worker processes, as timm does for ImageNet.
An evaluated or drawn image is only resized, cropped and normalised.
"""

import atexit
import math
import multiprocessing
import os
import random
import re
import sys
import threading
import warnings
import weakref
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import stopping
import utils
from augment import RAND, TRIVIAL, crop_and_flip, erase, random_operation
from utils import BadInput, RunFailed

DATA_SETS = ("CIFAR10", "CIFAR100", "DIGITS", "FOLDER")
CIFAR = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}  # and the folders that torchvision reads
ARCHIVES = {"cifar-10-python.tar.gz": "CIFAR10", "cifar-100-python.tar.gz": "CIFAR100"}
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # and names of their folders
LIKE_PARTS = {"training", "testing", *(name for names in PARTS.values() for name in names)}  # no names of classes
FOLDERS = {"FOLDER": "test", "IMNET": "val"}  # and the part that is the test, unless a checkpoint says another
EXPECTED = {
    "FOLDER": "train/<class>/ and test/<class>/ (or val/<class>/), or with <class>/ alone",
    "IMNET": "train/<class>/ and val/<class>/; --data_set FOLDER takes others, too",
}
TEST_SIZE = 0.1  # of class folders without train/
MAX_PIXELS = 200_000_000  # of an image file that is read
BAD_IMAGES = ("error", "skip")
SHOWN = 20  # images that one error names


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
        """The images with these numbers."""
        return replace(self, images=self.images[numbers], labels=self.labels[numbers])


@dataclass
class ImageData:
    """A data set, split. `val` is None if nothing was held out; mean and std are of the training images, in 0..1."""

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
        """What a checkpoint says about its data, as plain values."""
        sizes = {part: len(getattr(self, part) or ()) for part in ("train", "val", "test")}
        return {
            "name": self.name, "classes": list(self.classes), "input_size": tuple(self.input_size),
            "mean": list(self.mean), "std": list(self.std), "images": sizes, **(self.crop or {}), **(self.origin or {}),
        }  # fmt: skip


# Data sets -------------------------------------------------------------------------------------------------------


def detect_data_set(path) -> str:
    """The name of the data set under `path`: what is there decides; where nothing is, the folder's name."""
    if path is None:
        return "CIFAR10"
    path = Path(path)
    for name, folder in CIFAR.items():
        if (path / folder).is_dir():
            return name
    name, there = path.name.upper(), visible(path)
    archives = [ARCHIVES[file] for file in there if file in ARCHIVES]
    if name in (*CIFAR, "DIGITS") and (not there or archives):
        return name
    return archives[0] if archives else "FOLDER"


def load_data(
    name, path, input_size, val_size=None, test_size=None, max_pixels=MAX_PIXELS, bad_images="error"
) -> ImageData:
    """Load a data set and hold out validation images, stratified and the same ones in every run.

    Args:
        val_size: a share of the training images below 1, or a number of images; None: 5,000 for CIFAR, else 10 %, and
            at least one image of each class. Not for folders that have val/ and test/: val/ is held out there.
        test_size: the same for the test images of class folders without train/; None: 10 %.
        max_pixels: a file with more is not read.
        bad_images: 'skip' leaves out unreadable training images, 'error' refuses them; test images are always refused.

    Raises:
        BadInput: nothing there, broken images, classes that differ between the parts, no images to hold out.
    """
    parts, classes, origin = _find_parts(name, path, val_size, test_size, max_pixels)
    if name in FOLDERS:
        parts = _parts_in_memory(parts, classes, input_size, f"reading {path}", bad_images)
    train, val = _held_out(name, parts, classes, val_size)
    mean, std = channel_statistics(train.images)
    return ImageData(name, classes, input_size, mean, std, train, val, parts["test"], origin=origin)


def load_pictures(
    name, path, input_size, val_size=None, crop_pct=0.875, interpolation="bicubic", test_size=None,
    max_pixels=MAX_PIXELS, bad_images="error",
) -> ImageData:  # fmt: skip
    """The same for a `PictureLoader`: images in folders stay there, and get ImageNet's mean and standard deviation.

    With `bad_images` 'skip' all processes have to call this together.

    Args:
        val_size: as for `load_data`, but 1 % for IMNET, as in big_vision.
        crop_pct, interpolation: of evaluation, see `fit_image`.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    parts, classes, origin = _find_parts(name, path, val_size, test_size, max_pixels)
    if bad_images == "skip":
        parts |= {part: _readable(parts[part], part, classes) for part in parts if part != "test" and name in FOLDERS}
    train, val = _held_out(name, parts, classes, val_size)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if name not in FOLDERS:
        mean, std = channel_statistics(train.images)
    crop = {"crop_pct": crop_pct, "interpolation": interpolation}
    return ImageData(name, classes, input_size, mean, std, train, val, parts["test"], crop, origin)


def check_classes(these, those, these_are, those_are):
    """Raise BadInput, naming the difference, unless two lists of classes are the same."""
    if list(these) == list(those):
        return
    only = [f"only {what} have {', '.join(sorted(rest)[:10])}" for rest, what in (
        (set(these) - set(those), these_are), (set(those) - set(these), those_are)) if rest]  # fmt: skip
    raise BadInput(f"{these_are} and {those_are} differ in their classes: {'; '.join(only) or 'another order'}")


def read_split(name, path, train, input_size, about=None, max_pixels=MAX_PIXELS) -> tuple[Split, list[str]]:
    """`find_split` with the images in memory, (M, 3, h, w) uint8, those in folders of `input_size`."""
    split, classes = find_split(name, path, train, about, max_pixels)
    if name in FOLDERS:
        split, errors = _in_memory(split, input_size, f"reading {path}")
        if errors:
            raise joined(errors.values())
    return split, classes


def find_split(name, path, train, about=None, max_pixels=MAX_PIXELS) -> tuple[Split, list[str]]:
    """The training or the test images of a data set, and its class names; those in folders are not read yet.

    Args:
        about: a checkpoint's description of its data; its very test images are found again.
    """
    if name not in FOLDERS:
        return _small_images(name, path, train)
    part, left_out = "train" if train else "test", Counter()
    folders = _folders(name, path, about)
    if "all" in folders:
        parts, classes, origin = _split_classes(path, (about or {}).get("test_size"), left_out, max_pixels)
        _check_same_files(path, classes, origin, about or {})
        split = parts[part]
    else:
        split, classes = _class_folders(_folder_of(part, folders, name, path), left_out, max_pixels)
    note_left_out(path, left_out)
    return split, classes


def _check_same_files(path, classes, origin, about):
    """Raise BadInput where test images were split off, and the images there are no longer those of training."""
    if about.get("classes"):
        check_classes(classes, about["classes"], "the images", "the model")
    if "test_files" in about and about["test_files"] != origin["test_files"]:
        raise BadInput(
            f"the files in {path} are not those of training, and some of them were trained on; give that folder by "
            f"--data_path, or put the images to test on into {Path(path) / 'test'}/<class>/"
        )


def check_number(i, count):
    """Raise BadInput unless there is an image `i`."""
    if not 0 <= i < count:
        raise BadInput(f"there is no image {i}: the images are 0..{count - 1}")


def _small_images(name, path, train) -> tuple[Split, list[str]]:
    images, labels, classes = _read_digits(train) if name == "DIGITS" else _read_cifar(name, path, train)
    return Split(images, labels), classes


def _read_cifar(name, path, train):
    import torchvision

    if name not in CIFAR:
        raise BadInput(f"there is no data set {name}; it is one of {', '.join(DATA_SETS)}")
    path = path or f"./data/{name}"
    kind = getattr(torchvision.datasets, name)
    there = (Path(path) / kind.base_folder).is_dir()
    if not there and set(visible(path)) - {*ARCHIVES, *CIFAR.values()}:
        raise BadInput(
            f"there is no {name} in {path} ({_listing(path)}), and nothing is downloaded to where other files are; "
            "give --data_path the folder that has it, or an empty or absent one to download to"
        )
    try:
        with utils.main_first():
            there = (Path(path) / kind.base_folder).is_dir()
            data = kind(path, train=train, download=not there)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a cut archive is a RuntimeError
        if there:
            raise BadInput(
                f"{Path(path) / kind.base_folder} is damaged ({error}); remove it to download again"
            ) from None
        raise BadInput(
            f"no {name} under {path}, and it cannot be downloaded ({getattr(error, 'reason', error)}); "
            "put it there, or try --data_set DIGITS, which needs no download"
        ) from None
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), data.classes


def _read_digits(train):
    """The 1,797 handwritten digits that scikit-learn ships (8 x 8, 0..16), as 32 x 32 RGB; 360 of them are the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    chosen = train_test_split(range(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
    chosen = chosen[0] if train else chosen[1]
    small = torch.from_numpy(digits.images[chosen]).float()[:, None] * (255 / 16)
    images = F.interpolate(small, size=32, mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    return images.contiguous(), torch.from_numpy(digits.target[chosen]).long(), [str(n) for n in range(10)]


# Folders of images -----------------------------------------------------------------------------------------------


def _find_parts(name, path, val_size, test_size, max_pixels) -> tuple[dict[str, Split], list[str], dict]:
    """('train' and 'test' images, and 'val' if that has a folder; classes; `ImageData.origin`). Nothing is read yet."""
    folders = _folders(name, path) if name in FOLDERS else {}
    if test_size is not None and "all" not in folders:
        raise BadInput(f"--test_size is for class folders without train/, and {path or name} has its own test images")
    if val_size is not None and "val" in folders:
        raise BadInput(f"--val_size: {folders['val']} is what is held out; leave out that flag, or move that folder")
    if name not in FOLDERS:
        (train, classes), (test, test_classes) = (_small_images(name, path, part) for part in (True, False))
        check_classes(classes, test_classes, "the training images", "the test images")
        return {"train": train, "test": test}, classes, {}
    left_out = Counter()
    if "all" in folders:
        parts, classes, origin = _split_classes(path, test_size, left_out, max_pixels)
    else:
        wanted = {part: _folder_of(part, folders, name, path) for part in ("train", "test")}
        parts, classes = {}, None
        for part, folder in (wanted | folders).items():
            parts[part], these = _class_folders(folder, left_out, max_pixels)
            classes = classes or these
            check_classes(classes, these, "the training images", f"the {'held-out' if part == 'val' else part} images")
        chosen = next(part for part, names in PARTS.items() if folders["test"].name in names)
        origin = {} if chosen == FOLDERS[name] else {"test_folder": chosen}
    note_left_out(path, left_out)
    return parts, classes, origin


def _folders(name, path, about=None) -> dict[str, Path]:
    """Those that are there of 'train', 'test', and 'val' if another one is the test; of class folders alone, 'all'.

    With val/ and test/, val/ is held out. With one of them that is the test, as it is for a checkpoint (`about`).
    """
    if path is None:
        raise BadInput(f"--data_set {name} needs --data_path, a folder with {EXPECTED[name]}")
    root, there = Path(path), {}
    for part, names in PARTS.items():
        found = [root / n for n in names if os.path.isdir(root / n)]
        if len(found) > 1:
            raise BadInput(f"{' and '.join(map(str, found))} are both there; keep one, or move one into the other")
        there |= {part: found[0]} if found else {}
    subfolders = class_names(root) if not there and name == "FOLDER" else []
    if len(subfolders) > 1 and not {n.lower() for n in subfolders} & LIKE_PARTS:
        return {"all": root}
    if name == "IMNET" and {"val", "test"} <= there.keys() and not class_names(there["test"]):
        del there["test"]  # ImageNet's own, without labels
    test = "test" if about is None else about.get("test_folder", FOLDERS[name])
    if test not in there:
        test = "val" if test == "test" else "test"
    of_parts = {"train": "train", "test": test} | ({"val": "val"} if test == "test" else {})
    return {part: there[folder] for part, folder in of_parts.items() if folder in there}


def _folder_of(part, folders, name, path) -> Path:
    """Raises BadInput, with what is there and what is expected, if that part is not there."""
    if part in folders:
        return folders[part]
    root = Path(path)
    names = [root / "train"] if part == "train" else [root / n for n in ("test", "val")]
    download = "" if visible(root) or name == "IMNET" else "; --data_set CIFAR10 would be downloaded there"
    raise BadInput(
        f"there is no folder {' or '.join(map(str, names))}; give --data_path a folder with {EXPECTED[name]} "
        f"({_listing(root)}{download})"
    )


def visible(folder) -> list[str]:
    """What a folder has, without what is hidden; nothing if it is not there. Raises BadInput for a file."""
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise BadInput(f"--data_path {folder} is no folder; give a folder")
        return []
    return sorted(name for name in os.listdir(folder) if name[0] != ".")


def _listing(folder) -> str:
    names = [f"{name}/" if os.path.isdir(Path(folder) / name) else name for name in visible(folder)]
    if not names:
        return f"{folder} {'is empty' if os.path.isdir(folder) else 'does not exist'}"
    return f"{folder} has {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


def class_names(folder) -> list[str]:
    return [name for name in visible(folder) if os.path.isdir(Path(folder) / name)]


def _class_folders(root, left_out, max_pixels) -> tuple[Split, list[str]]:
    """`root/<class>/*`, at any depth, in any format that Pillow reads."""
    classes = class_names(root)
    if not classes:
        raise BadInput(f"{root} has no class folders; put the images into {root}/<class>/, or move it away")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = image_files(root / name, left_out)
        if not found:
            others = f" ({_words(left_out)})" if left_out else ""
            raise BadInput(f"class folder {root / name} has no images{others}; add some or remove it")
        files += [os.fsencode(file) for file in found]
        labels += [label] * len(found)
    # One array of bytes: worker processes share it, while a list of a million strings is copied into each of them.
    return Split(np.array(files), torch.tensor(labels), max_pixels), classes


def _split_classes(path, test_size, left_out, max_pixels) -> tuple[dict[str, Split], list[str], dict]:
    """Class folders without train/: ('train' and 'test' images, classes, `ImageData.origin`)."""
    everything, classes = _class_folders(Path(path), left_out, max_pixels)
    size = TEST_SIZE if test_size is None else test_size
    rest, test = _hold_out(everything, classes, size, "--test_size", of_each_class=True)
    names = b"\0".join(os.path.relpath(file, os.fsencode(path)) for file in test.images.tolist())
    return {"train": rest, "test": test}, classes, {"test_size": size, "test_files": sha256(names).hexdigest()}


def image_files(folder, left_out: Counter | None = None) -> list[Path]:
    """The files at any depth below `folder`, sorted, whose ending is that of a format that is read; each once.

    Hidden files and folders are left out. Links are followed, but not to a folder that was visited, nor to one that
    `folder` is in. Of a file that several links lead to, its own place counts, else the first link.

    Args:
        left_out: here the other files are counted, by their ending.
    """
    endings, files, links = _endings(), {}, []
    waiting, behind_links = deque([os.fspath(folder)]), deque()
    visited = {_identity(parent) for parent in Path(os.path.realpath(folder)).parents}
    while waiting or behind_links:
        here = (waiting or behind_links).popleft()
        if (identity := _identity(here)) in visited:
            continue
        visited.add(identity)
        place = os.path.realpath(here)
        with os.scandir(here) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name[0] == ".":
                    continue
                if entry.is_dir():
                    (behind_links if entry.is_symlink() else waiting).append(entry.path)
                elif entry.is_symlink():
                    links.append(entry.path)
                else:
                    files[os.path.join(place, entry.name)] = entry.path
    for link in sorted(links):
        files.setdefault(os.path.realpath(link), link)
    found = sorted(map(Path, files.values()))
    if left_out is not None:
        left_out.update(file.suffix.lower() for file in found if file.suffix.lower() not in endings)
    return [file for file in found if file.suffix.lower() in endings]


def _identity(folder):
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def note_left_out(place, left_out: Counter):
    """Print what `image_files` left out in a folder, once a process."""
    if left_out and _first_time(os.path.abspath(place)):
        utils.say(f"note: {_words(left_out)}")


def _words(left_out) -> str:
    counts = ", ".join(f"{utils.printable(ending) or 'no ending'}: {n}" for ending, n in left_out.most_common())
    heif = f", and {HEIF_NEEDS}" if any(ending in HEIF_ENDINGS for ending in left_out) else ""
    return f"left out for their ending: {counts}{heif}"


# Image files -----------------------------------------------------------------------------------------------------


def _parts_in_memory(parts, classes, input_size, title, bad_images) -> dict[str, Split]:
    """Raises BadInput that names all images that cannot be read and are not to be left out."""
    errors = {}
    for part, split in parts.items():
        parts[part], errors[part] = _in_memory(split, input_size, title)
    refused = [error for part in parts if part == "test" or bad_images == "error" for error in errors[part].values()]
    if refused:
        raise joined(refused, training=len(refused) > len(errors["test"]))
    return {part: _without(split, errors[part], part, classes) for part, split in parts.items()}


def _in_memory(split, input_size, title) -> tuple[Split, dict[int, BadInput]]:
    """The files of a split as images of `input_size` in memory, (M, 3, h, w) uint8; which cannot be read, and why."""
    _check_memory(len(split), input_size)
    images = torch.empty(len(split), 3, *input_size, dtype=torch.uint8)

    def read(i):
        images[i] = fit_image(read_picture(split, i), input_size)

    errors = _failures(read, range(len(split)), title)
    return replace(split, images=images), errors


def _failures(function, numbers, title) -> dict[int, BadInput]:
    """Call `function(number)` for all of them, several at once: the numbers of those that it refused, and why."""
    from tqdm import tqdm

    def attempt(number):
        try:
            function(number)
        except BadInput as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = tqdm(pool.map(attempt, numbers), title, len(numbers), leave=False, disable=None)
        return {number: error for number, error in zip(numbers, results) if error is not None}


def _readable(split, part, classes, at_once=10_000) -> Split:
    """A split without the images that cannot be read. Each process reads its share, and all leave out the same."""
    errors, ranks = {}, utils.world_size()

    def decode(i):
        read_image(os.fsdecode(split.images[i]), split.max_pixels, draft=True)

    # In pieces, so that no process waits for the others longer than a collective of NCCL may take.
    for start in range(0, len(split), at_once * ranks):
        numbers = range(start + utils.rank(), min(start + at_once * ranks, len(split)), ranks)
        for found in utils.gather(_failures(decode, numbers, f"checking images from {start} on")):
            errors |= found
    return _without(split, errors, part, classes)


def _without(split, errors, part, classes) -> Split:
    """A split without the images that `errors` has; they are counted and listed."""
    if not errors:
        return split
    kept = split.part([i for i in range(len(split)) if i not in errors])
    what = "held-out" if part == "val" else "training"
    utils.say(f"note: {len(errors)} of {len(split)} {what} images cannot be read and are left out:")
    for i in sorted(errors):
        utils.say(f"  {utils.printable(_what_is_wrong(errors[i]))}")
    empty = [name for name, count in zip(classes, torch.bincount(kept.labels, minlength=len(classes))) if not count]
    if empty:
        raise BadInput(f"no {what} image of class {empty[0]} can be read; fix them, or remove that class")
    return kept


def joined(errors, training=False) -> BadInput:
    """One line for several images that cannot be read, the first of them by name.

    Args:
        errors: as `read_image` raises them.
        training: whether --bad_images can leave some of them out.
    """
    lines = list(dict.fromkeys(map(str, errors)))
    skip = " (--bad_images skip leaves out training images)" if training else ""
    if len(lines) == 1:
        return BadInput(lines[0] + skip)
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    wrong = ", ".join(map(_what_is_wrong, lines[:SHOWN]))
    return BadInput(f"cannot read {len(lines)} images: {wrong}{more}; fix or remove them{skip}")


def _what_is_wrong(error) -> str:
    """Of an error of `read_image`, without what to do: 'a.png (it is cut)'."""
    return str(error).rpartition("; ")[0].removeprefix("cannot read the image ")


def _check_memory(count, size):
    """Refuse what would not fit, where the system tells what does (Linux)."""
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


HEIF_ENDINGS = (".heic", ".heif", ".hif")
HEIF_NEEDS = "HEIC takes a package: pip install pillow-heif"
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
         7: "TRANSVERSE", 8: "ROTATE_90"}  # of EXIF's orientation, to see the image upright  # fmt: skip
BITS, MAX_VALUE, PHOTOMETRIC, KIND, ORIENTATION = 258, 281, 262, 339, 274  # tags of TIFF and EXIF


@cache
def _pillow():
    """Pillow, once a process: with HEIC if its package is there, without PostScript, and quiet."""
    from PIL import EpsImagePlugin, Image

    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    EpsImagePlugin.gs_binary = False  # PostScript is a program, and Pillow would have it run by Ghostscript
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of a tag, or of many pixels; errors are reported
    return Image


def _endings() -> set[str]:
    """Of the formats that are read."""
    Image = _pillow()
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def read_image(path, max_pixels=MAX_PIXELS, draft=False):
    """A file as a person would see it: a PIL image in RGB, turned as its EXIF says, transparency on white.

    Values of more than 8 bits are scaled by the range of their kind, see `_value_range`.

    Args:
        max_pixels: refuse more, before they are decoded.
        draft: read a JPEG file whole, but decode it small, to see whether that can be done.

    Raises BadInput, naming the file, if Pillow cannot read it.
    """
    if not os.path.isfile(path):  # a pipe or a device may never end
        raise BadInput(f"there is no image {path}; give a file")
    Image = _pillow()
    Image.MAX_IMAGE_PIXELS = max_pixels / 2  # Pillow refuses twice as many wherever a file declares them
    try:
        with Image.open(path) as image:
            if draft:
                image.draft("RGB", (1, 1))
            return _as_seen(image, path)
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error)).group()
        raise BadInput(
            f"cannot read the image {path} ({count} pixels are more than --max_pixels {max_pixels}); raise that, or "
            "make the image smaller"
        ) from None
    except Exception as error:  # Pillow's plugins raise many kinds
        why = _why_unknown(path) if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadInput(f"cannot read the image {path} ({why}); fix or remove it") from None


def _why_unknown(path) -> str:
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        return HEIF_NEEDS
    return "AVIF takes Pillow 11.3 or newer" if head[4:11] == b"ftypavi" else "damaged, or of an unknown format"


def _as_seen(image, path):
    from PIL import Image

    deep = _has_deep_colours(image)
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # a tag of a wrong type; the picture is there
        turn = None
    if image.mode[0] in "IF":
        image = _grey(image, path)
    elif deep:
        image = _colours(image, path)
    if turn:
        image = image.transpose(Image.Transpose[turn])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey(image, path):
    """An image of mode I;16, I or F in 8 bits: L, or LA if one of its values is transparent."""
    from PIL import Image

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
    _note_once("range", f"the values of {path} are {low:g} to {high:g}, of no known range: scaled by their own")
    return low, high


def _most(high, declared, path) -> int:
    """The largest value of as many bits as hold those that are there and what the file declares."""
    bits = next((bits for bits in (8, 10, 12, 14) if max(high, declared) < 2**bits), 16)
    if bits < 16 and not declared and high:
        _note_once("bits", f"no value of {path}, of 16 bits, is above {high:.0f}: read as {bits} bits")
    return 2**bits - 1


def _note_once(kind, text):
    """Print a note, the first of its kind in this process."""
    if _first_time(kind):
        print(f"note: {utils.printable(text)} (and other such images likewise)", flush=True)


_NOTED = {}


def _first_time(what) -> bool:
    """Whether this process asks for the first time; of several threads, one is the first."""
    me = object()
    return _NOTED.setdefault(what, me) is me


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


def _colours(image, path):
    """An image with 16 bits a channel as Pillow read it, or from the file again if its values have fewer bits.

    As those of `_grey`; then the upper 8 are few or none. Unpacked in the other byte order, the file gives the lower 8.
    """
    from PIL import Image

    if max(high for _, high in image.getextrema()[:3]) >= 64:  # of 256: at least 15 bits
        return image
    other = {"LA;16B": "RGBA", "B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    with Image.open(path) as again:
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
    from PIL import Image

    box = crop_box(image.width, image.height, size, crop_pct)
    if (image.height, image.width) != tuple(size) or box != (0, 0, image.width, image.height):
        image = image.resize((size[1], size[0]), Image.Resampling[interpolation.upper()], box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_picture(split: Split, i):
    """Image `i` as a PIL image in RGB."""
    from PIL import Image

    if isinstance(split.images, Tensor):
        return Image.fromarray(split.images[i].permute(1, 2, 0).numpy())
    return read_image(os.fsdecode(split.images[i]), split.max_pixels)


def _held_out(name, parts, classes, val_size) -> tuple[Split, Split | None]:
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


# Transforms ------------------------------------------------------------------------------------------------------


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of (M, 3, h, w) uint8 images, in 0..1."""
    histograms = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double()
    share = histograms / histograms.sum(dim=1, keepdim=True)  # (3, 256)
    values = torch.arange(256, dtype=torch.double) / 255
    mean = share @ values
    std = (share @ values.square() - mean.square()).clamp_min(1e-8).sqrt()
    return mean.tolist(), std.tolist()


def _channels(values, images):
    return _constant(tuple(values), images.device)


@cache
def _constant(values, device):
    """(3, 1, 1); made once, since the way to a GPU waits for it."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def normalise(images: Tensor, mean, std) -> Tensor:
    """uint8 or float images in 0..255 -> float, mean 0 and standard deviation 1 over the training set."""
    scale = 1 / (255 * _channels(std, images))
    return images.float().mul_(scale).sub_(_channels(mean, images) * 255 * scale)


def denormalise(images: Tensor, mean, std) -> Tensor:
    """The inverse of `normalise`: uint8, as a person would see them."""
    images = (images * _channels(std, images) + _channels(mean, images)) * 255
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


class TrainTransform:
    """Random crop and flip, an augmentation policy, resize, normalise, random erasing; one draw for each image.

    The draws come from a CPU generator, so that no device is waited for.

    Args:
        data: a description of the data (see `eval_transform`).
        aug: 'trivial' (TrivialAugment Wide, arXiv 2103.10158), 'rand' (RandAugment with 2 operations of magnitude
            9 of 30, 1909.13719) or 'none'.
        hflip: probability of a horizontal flip.
        reprob: probability of random erasing (1708.04896).
        pad: pixels of black around the image before the crop; by default an eighth of its height.
    """

    def __init__(self, data, aug="trivial", hflip=0.5, reprob=0.25, pad=None):
        self.data, self.aug, self.hflip, self.reprob, self.pad = data, aug, hflip, reprob, pad

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        images = crop_and_flip(images, generator, images.shape[2] // 8 if self.pad is None else self.pad, self.hflip)
        if self.aug == "trivial":
            images = random_operation(images, generator, TRIVIAL, level=None)
        elif self.aug == "rand":
            for _ in range(2):
                images = random_operation(images, generator, RAND, level=9)
        images = eval_transform(images, self.data)
        return erase(images, generator, self.reprob) if self.reprob else images


# Loader ----------------------------------------------------------------------------------------------------------

# Images are transformed this many values at a time, several batches at once, since an operation on a few images costs
# little more than on one. On a CPU larger pieces leave the cache; on a GPU small ones cost too many launches.
CHUNK = {"cpu": 1_000_000, "cuda": 4_000_000, "mps": 4_000_000}


class Loader:
    """Batches of (images (B, 3, h, w) normalised, labels (B,)), transformed on the device of the split's images.

    With a `TrainTransform`: shuffled anew in each pass, the last incomplete batch dropped, and all randomness a
    function of (seed, epoch, place in the epoch), so that a resumed run goes on as if never stopped, in the middle of
    an epoch too (`set_epoch`). Without one: in order, all once. Over several processes each takes its share, without
    padding.

    Args:
        data: a description of the data (see `eval_transform`).
        passes: how often an epoch goes through the images; the last time, through a part of them if it is a fraction.
    """

    def __init__(self, split: Split, data, batch_size, transform=None, passes=1, seed=0, rank=0, world_size=1):
        self.split, self.data, self.transform = split, data, transform
        self.passes, self.seed, self.rank, self.world_size = passes, seed, rank, world_size
        self.epoch = self.first = 0
        self.drawn = max(world_size, int(passes * len(split)))  # in an epoch of training, by all processes
        self.count = self.drawn // world_size if transform else len(range(rank, len(split), world_size))
        # Mixup pairs the images of a batch, so a batch of fewer images than asked for must still be even.
        self.batch_size = min(batch_size, max(self.count - self.count % 2, 1)) if transform else batch_size

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
            index = order[start : start + chunk].to(device, non_blocking=True)
            images, labels = self.split.images.index_select(0, index), self.split.labels[index]
            images = self.transform(images, draws) if self.transform else eval_transform(images, self.data)
            batches = zip(images.split(self.batch_size), labels.split(self.batch_size))
            yield from islice(batches, max(before, 0), None)

    def _order(self) -> tuple[Tensor, torch.Generator]:
        if not self.transform:
            return torch.arange(self.rank, len(self.split), self.world_size), None
        seed = (self.seed * 1_000_003 + self.epoch) * 1_009
        shuffle = torch.Generator().manual_seed(seed)  # the same in every process
        order = torch.cat([torch.randperm(len(self.split), generator=shuffle) for _ in range(math.ceil(self.passes))])
        order = order[: self.drawn]
        order = order[self.rank :: self.world_size][: len(self) * self.batch_size]
        return order, torch.Generator().manual_seed(seed + 1 + self.rank)


# Pictures: read and transformed one at a time ---------------------------------------------------------------------


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
    from timm.data import create_transform
    from timm.data.transforms import ResizeKeepRatio
    from torchvision import transforms

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


class _Pictures(torch.utils.data.Dataset):
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
            image, label = read_picture(self.split, number), int(self.split.labels[number])
        except BadInput as error:
            return error  # raised in a worker process, it would reach the user as a traceback in one long line
        if seed is None:
            return self.transform(image), label
        with _seeded(seed):
            return self.transform(image), label


class _WorkerLoader(DataLoader):
    """A DataLoader whose worker processes ignore signals and end with the main process, however that ends."""

    def __iter__(self):
        if self.num_workers and self._iterator is None:
            self.dataset.closing.value = False
            _with_workers.add(self)
        with stopping.signals_blocked():
            batches = super().__iter__()
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # the last one is called first: before those of torch and multiprocessing
        for batch in batches:
            if isinstance(batch, BadInput):
                raise batch
            yield batch


_with_workers = weakref.WeakSet()


def _end_workers():
    """End all worker processes: after the image that each is at, or after 5 seconds."""
    iterators = [loader._iterator for loader in _with_workers if loader._iterator is not None]
    for loader in _with_workers:
        loader.dataset.closing.value, loader._iterator = True, None
    late = threading.Timer(5, lambda: [worker.kill() for iterator in iterators for worker in iterator._workers])
    late.start()
    for iterator in iterators:
        with suppress(RuntimeError):  # torch's, about the workers that had to be killed
            iterator._shutdown_workers()
    late.cancel()


def _collate(items, training):
    """A batch, or one error that names all images that cannot be read."""
    from timm.data.loader import fast_collate

    errors = [item for item in items if isinstance(item, BadInput)]
    return joined(errors, training) if errors else fast_collate(items)


class _Draws(torch.utils.data.Sampler):
    """(number, seed) of one image after another, from place `first` on; with `seed` None nothing is drawn."""

    def __init__(self, numbers, seed, rank):
        self.numbers, self.seed, self.rank = numbers, seed, rank
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
        return islice(zip(self.numbers, seeds), self.first, None)


class _Erasing:
    """timm's random erasing with draws that are a function of (seed, epoch, process, batch)."""

    def __init__(self, erasing, draws: _Draws, device):
        self.erasing, self.draws, self.device = erasing, draws, device

    def begin(self, batch):
        self.batch = batch

    def __call__(self, images):
        seed = ((self.draws.epoch_seed * 1_009 + self.draws.rank) * 1_000_003 + self.batch) % 2**62
        self.batch += 1
        with _seeded(seed, self.device):
            return self.erasing(images)


class PictureLoader:
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
    """

    def __init__(
        self, split: Split, data, batch_size, device, transform=None, *, repeats=1, reprob=0.0, seed=0, rank=0,
        world_size=1, workers=0,
    ):  # fmt: skip
        from timm.data.distributed_sampler import RepeatAugSampler
        from timm.data.loader import PrefetchLoader
        from torch.utils.data import DistributedSampler

        self.split, share = split, dict(num_replicas=world_size, rank=rank)
        if transform is None:
            crop = {key: data[key] for key in ("crop_pct", "interpolation")}
            transform = partial(fit_image, size=data["input_size"], **crop)
            numbers, seed, reprob, training = range(rank, len(split), world_size), None, 0.0, False
        elif repeats > 1:
            numbers, training = RepeatAugSampler(split, num_repeats=repeats, selected_round=0, **share), True
        else:
            numbers, training = DistributedSampler(split, drop_last=True, **share), True
        self.draws = _Draws(numbers, seed, rank)
        # Mixup pairs the images of a batch, so a batch of fewer images than asked for must still be even.
        count = len(numbers)
        self.batch_size = min(batch_size, max(count - count % 2, 1)) if training else batch_size
        loader = _WorkerLoader(
            _Pictures(split, transform), self.batch_size, sampler=self.draws, num_workers=workers,
            collate_fn=partial(_collate, training=training), pin_memory=device.type == "cuda", drop_last=training,
            persistent_workers=workers > 0, generator=torch.Generator(),  # else it draws from the global one
        )  # fmt: skip
        self.batches = PrefetchLoader(loader, data["mean"], data["std"], device=device, re_prob=reprob, re_mode="pixel")
        if reprob:
            self.batches.random_erasing = _Erasing(self.batches.random_erasing, self.draws, device)
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
            self.batches.random_erasing.begin(self.first)
        return iter(self.batches)
