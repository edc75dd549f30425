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
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
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
FOLDERS = {"FOLDER": ("test", "val"), "IMNET": ("val", "test")}  # and where their test images are


@dataclass
class Split:
    images: Tensor | np.ndarray  # (M, 3, h, w) uint8, or the names of M files
    labels: Tensor  # (M,) int64

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        """Images in memory on `device`. Raises RunFailed if they do not fit there."""
        try:
            return Split(self.images.to(device), self.labels.to(device))
        except torch.OutOfMemoryError:
            raise RunFailed(
                f"the {len(self)} images ({self.images.nbytes / 2**30:.1f} GiB) do not fit on {device}; "
                "choose a smaller --input_size, or main_distillation.py, which reads images while it trains"
            ) from None


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

    def description(self) -> dict:
        """What a checkpoint says about its data, as plain values."""
        sizes = {part: len(getattr(self, part) or ()) for part in ("train", "val", "test")}
        return {
            "name": self.name, "classes": list(self.classes), "input_size": tuple(self.input_size),
            "mean": list(self.mean), "std": list(self.std), "images": sizes, **(self.crop or {}),
        }  # fmt: skip


# Data sets -------------------------------------------------------------------------------------------------------


def detect_data_set(path) -> str:
    """The name of the data set under `path`: what lies there decides, else the folder's name, else CIFAR10."""
    if path is None:
        return "CIFAR10"
    path = Path(path)
    for name, folder in (("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python"), ("FOLDER", "train")):
        if (path / folder).is_dir():
            return name
    return path.name.upper() if path.name.upper() in ("CIFAR10", "CIFAR100", "DIGITS") else "CIFAR10"


def load_data(name, path, input_size, val_size=None) -> ImageData:
    """Load a data set and hold out validation images, stratified and the same ones in every run.

    Args:
        val_size: a share of the training images below 1, or a number of images; None: 5,000 for CIFAR, else 10 %.

    Raises:
        BadInput: nothing there, a broken image, classes that differ between the splits, no images to hold out.
    """
    images, labels, classes = read_split(name, path, True, input_size)
    test_images, test_labels, test_classes = read_split(name, path, False, input_size)
    check_classes(classes, test_classes, "the training images", "the test images")
    train, val = _hold_out(Split(images, labels), _val_size(name, val_size))
    mean, std = channel_statistics(train.images)
    return ImageData(name, classes, input_size, mean, std, train, val, Split(test_images, test_labels))


def load_pictures(name, path, input_size, val_size=None, crop_pct=0.875, interpolation="bicubic") -> ImageData:
    """The same for a `PictureLoader`: images in folders stay there, and get ImageNet's mean and standard deviation.

    Args:
        val_size: as for `load_data`, but 1 % for IMNET, as in big_vision.
        crop_pct, interpolation: of evaluation, see `fit_image`.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    split, classes = find_split(name, path, True)
    test, test_classes = find_split(name, path, False)
    check_classes(classes, test_classes, "the training images", "the test images")
    train, val = _hold_out(split, _val_size(name, val_size))
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if name not in FOLDERS:
        mean, std = channel_statistics(train.images)
    crop = {"crop_pct": crop_pct, "interpolation": interpolation}
    return ImageData(name, classes, input_size, mean, std, train, val, test, crop)


def _val_size(name, val_size):
    if val_size is not None:
        return val_size
    return 5000 if name.startswith("CIFAR") else 0.01 if name == "IMNET" else 0.1


def check_classes(these, those, these_are, those_are):
    """Raise BadInput, naming the difference, unless two lists of classes are the same."""
    if list(these) == list(those):
        return
    only = [f"only {what} have {', '.join(sorted(rest)[:10])}" for rest, what in (
        (set(these) - set(those), these_are), (set(those) - set(these), those_are)) if rest]  # fmt: skip
    raise BadInput(f"{these_are} and {those_are} differ in their classes: {'; '.join(only) or 'another order'}")


def read_split(name, path, train, input_size) -> tuple[Tensor, Tensor, list[str]]:
    """One split of a data set: images (M, 3, h, w) uint8, labels (M,), class names."""
    split, classes = find_split(name, path, train)
    images = _read_files(split.images, input_size, f"reading {path}") if name in FOLDERS else split.images
    return images, split.labels, classes


def find_split(name, path, train) -> tuple[Split, list[str]]:
    """One split of a data set and its class names; images that lie in folders are not read yet."""
    if name in FOLDERS:
        return _find_folder(name, path, train)
    images, labels, classes = _read_digits(train) if name == "DIGITS" else _read_cifar(name, path, train)
    return Split(images, labels), classes


def check_number(i, count):
    """Raise BadInput unless there is an image `i`."""
    if not 0 <= i < count:
        raise BadInput(f"there is no image {i}: the images are 0..{count - 1}")


def _read_cifar(name, path, train):
    import torchvision

    if name not in DATA_SETS[:2]:
        raise BadInput(f"there is no data set {name}; it is one of {', '.join(DATA_SETS)}")
    path = path or f"./data/{name}"
    kind = getattr(torchvision.datasets, name)
    there = False
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


def _find_folder(name, path, train) -> tuple[Split, list[str]]:
    """`path/train/<class>/*`, or `path/test/` or `path/val/`, in any format that Pillow reads."""
    if path is None:
        raise BadInput(
            f"--data_set {name} needs --data_path, a folder with train/<class>/ and {FOLDERS[name][0]}/<class>/"
        )
    names = ("train",) if train else FOLDERS[name]
    root = next((Path(path) / n for n in names if os.path.isdir(Path(path) / n)), None)
    if root is None:
        raise BadInput(f"there is no folder {' or '.join(str(Path(path) / n) for n in names)}; give --data_path")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise BadInput(f"{root} has no class folders; put the images into {root}/<class>/")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = image_files(root / name)
        if not found:
            raise BadInput(f"class folder {root / name} has no images; add some or remove it")
        files += [os.fsencode(file) for file in found]
        labels += [label] * len(found)
    # One array of bytes: worker processes share it, while a list of a million strings is copied into each of them.
    return Split(np.array(files), torch.tensor(labels)), classes


def _read_files(files, input_size, title) -> Tensor:
    """Images of `input_size` in memory, (M, 3, h, w) uint8."""
    from tqdm import tqdm

    _check_memory(len(files), input_size)
    images = torch.empty(len(files), 3, *input_size, dtype=torch.uint8)

    def read(i):
        images[i] = fit_image(read_image(os.fsdecode(files[i])), input_size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in tqdm(pool.map(read, range(len(files))), title, len(files), leave=False, disable=None):
            pass
    return images


def image_files(folder) -> list[Path]:
    """The files at any depth below `folder`, sorted, whose ending is that of a format Pillow reads."""
    from PIL import Image

    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = (Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(file for file in files if file.suffix.lower() in endings and file.name[0] != ".")


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


def read_image(path):
    """A file as a person would see it: a PIL image in RGB, turned as its EXIF says, transparency on white.

    Raises BadInput, naming the file, if Pillow cannot read it.
    """
    from PIL import EpsImagePlugin, Image, ImageOps

    if not os.path.isfile(path):  # a pipe or a device may never end
        raise BadInput(f"there is no image {path}; give a file")
    EpsImagePlugin.gs_binary = False  # PostScript is a program, and Pillow would have it run by Ghostscript
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits; Pillow would cut values off at 255
                    image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
                    if isinstance(image.info.get("transparency"), int):
                        image.info["transparency"] = round(image.info["transparency"] / 257)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise many kinds
        raise BadInput(f"cannot read the image {path} ({error}); mend or remove it") from None


def joined(errors: list[BadInput]) -> BadInput:
    """One error for several images."""
    return errors[0] if len(errors) == 1 else BadInput("; ".join(map(str, errors)))


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
    return read_image(os.fsdecode(split.images[i]))


def _hold_out(data: Split, val_size) -> tuple[Split, Split | None]:
    from sklearn.model_selection import train_test_split

    if val_size == 0:
        return data, None
    try:
        kept, held = train_test_split(
            range(len(data)), test_size=val_size if val_size < 1 else int(val_size),
            stratify=data.labels.numpy(), random_state=0,
        )  # fmt: skip
    except ValueError as error:
        raise BadInput(f"--val_size {val_size} of {len(data)} training images cannot be held out: {error}") from None
    return Split(data.images[kept], data.labels[kept]), Split(data.images[held], data.labels[held])


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


def _collate(items):
    """A batch, or one error that names all images that cannot be read."""
    from timm.data.loader import fast_collate

    errors = [item for item in items if isinstance(item, BadInput)]
    return joined(errors) if errors else fast_collate(items)


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
            collate_fn=_collate, pin_memory=device.type == "cuda", drop_last=training,
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
