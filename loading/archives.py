"""Images that are no files of their own: in tar files, WebDataset shards, Hugging Face and torchvision datasets.

Each has a name, as a file has its path: 'val.tar!OFFSET+SIZE!n01440764/a.JPEG', or 'hfds/NAME!train!17'. All are read
by number, in any order, so that splits, shuffling, shares of processes and resuming are those of files.
"""

import importlib
import io
import os
import posixpath
import re
import sys
import tarfile
import threading
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

import utils
from utils import BadInput

WDS_IMAGES = ("jpg", "jpeg", "png", "webp")  # as in timm
KINDS = ("wds", "hfds", "hfids", "torch")  # as in timm's create_dataset, before the first slash
MEMBER = re.compile(r"(.+?\.tar)!(\d+)\+(\d+)!", re.DOTALL)
_theirs, _importing = {}, threading.RLock()


def kind_of(path) -> str | None:
    """One of KINDS, or None for a path of files."""
    kind = str(path).partition("/")[0]
    return kind if kind in KINDS and "/" in str(path) else None


def open_image(name):
    """What Pillow opens, or a PIL image, of an image that has a name of this module; None for all others."""
    if MEMBER.match(name):
        return io.BytesIO(_member(name))
    if not kind_of(name) or name.count("!") < 2:
        return None
    root, part, number = name.rsplit("!", 2)
    if kind_of(root) == "torch":
        return _torch(root, part)[int(number)][0]
    split, image, _ = _columns(f"{root}!{part}")
    value = split[int(number)][image] or {}
    return io.BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")


def _member(name) -> bytes:
    """The content of a file in a tar, which has such a name."""
    tar, offset, size = MEMBER.match(name).groups()
    with open(tar, "rb") as file:
        file.seek(int(offset))
        return file.read(int(size))


def tar_members(tars) -> list[tuple[str, str]]:
    """(path inside, name) of each file in the tars, and in tars inside of them. With several, `tar/` is put before.

    As in folders, what is hidden is left out, and of several files with one path the last one is there.
    """
    found = {}
    for tar in map(str, tars):
        before = f"{Path(tar).stem}/" if len(tars) > 1 else ""
        try:
            with tarfile.open(tar, "r:") as archive:
                for path, place in _walk(archive, before):
                    found[path] = (
                        found.get(place) if isinstance(place, str) else "{}!{}+{}!{}".format(tar, *place, path)
                    )
        except (tarfile.TarError, OSError) as error:
            raise BadInput(f"cannot read {tar} ({error}); give an uncompressed tar file") from None
    return [(path, name) for path, name in found.items() if name]


def _walk(archive, before="", start=0):
    """(path, (offset, size)) of each file, or (path, path that it is a hard link to)."""
    for info in archive:
        path = posixpath.normpath(before + info.name)  # tar puts ./ before what `tar -C FOLDER .` packs
        if "/." in f"/{path}":
            continue
        if info.isfile() and path.endswith(".tar") and not start:
            with tarfile.open(fileobj=archive.extractfile(info), mode="r:") as inner:
                yield from _walk(inner, path.removesuffix(".tar") + "/", info.offset_data)
        elif info.isfile():
            yield path, (start + info.offset_data, info.size)
        elif info.islnk():
            yield path, posixpath.normpath(before + info.linkname)
        elif info.issym():
            utils.note_once("links", f"left out in tar files: symbolic links, as {path}")
        archive.members = []  # else it remembers all of them


# Parts, images, labels ---------------------------------------------------------------------------------------------


def splits_of(path) -> dict[str, str]:
    """Name of each split of a dataset that is one of KINDS, and what `labelled_images` takes for it."""
    kind, _, rest = str(path).partition("/")
    if kind == "wds":
        if "://" in rest or rest.startswith("pipe:"):
            raise BadInput(f"{path}: shards are read from a disk, by number; download them, and give their folder")
        words = {word for shard in _shards(rest) for word in _words(shard, rest)}
    elif kind == "torch":
        words = ("train", "validation")
        utils.main_decides(lambda: [_torch(str(path), word) for word in words] and None)  # the first process downloads
    else:
        if kind == "hfids":
            utils.note_once(
                path, f"{path} is not streamed: of a stream nothing can be held out, order and draws depend on the "
                "number of workers, and no run resumes in the middle; it is read as hfds/, from the disk",
            )  # fmt: skip
        words = utils.main_decides(lambda: list(_hugging_face(rest)))  # the first process downloads
    return {word: f"{path}!{word}" for word in words}


def labelled_images(part) -> tuple[np.ndarray, list[int], list[str] | None]:
    """Names (bytes) and labels of a split (see `splits_of`), and its class names if it has any."""
    root, _, split = str(part).rpartition("!")
    kind, _, rest = root.partition("/")
    if kind == "wds":
        shards = [shard for shard in _shards(rest) if split in _words(shard, rest)]
        names = dict(sample for shard in shards for sample in _samples(shard))
        labels, classes = names.values(), None
    elif kind == "torch":
        data = _torch(root, split)
        labels = getattr(data, "targets", None)
        if labels is None:
            raise BadInput(f"{root} has no list of targets; give a dataset of torchvision with one label an image")
        classes = [name if isinstance(name, str) else ", ".join(name) for name in data.classes]
    else:
        data, _, label = _columns(part)
        labels, classes = list(data[label]), getattr(data.features[label], "names", None)
        if classes is None and all(isinstance(word, str) for word in labels):
            feature, splits = data.features[label], _hugging_face(rest).values()
            words = {word for each in splits if each.features.get(label) == feature for word in each.unique(label)}
            if not all(map(str.isdecimal, words - {None})):
                classes = sorted(words - {None})  # one order for all splits
                labels = np.searchsorted(classes, labels)
    try:
        labels = [int(label) for label in labels]
    except (TypeError, ValueError, RuntimeError) as error:  # lists, nothing
        raise BadInput(f"labels of {root} are no numbers of classes ({error}); cast them to ClassLabel") from None
    if not labels:
        raise BadInput(f"{root} has no images for {split}; correct --data_path")
    names = names if kind == "wds" else (f"{part}!{i}" for i in range(len(labels)))
    return np.array([os.fsencode(name) for name in names]), labels, classes


# WebDataset: members with the same path up to the first dot of the name are a sample ---------------------------------


def _shards(folder) -> list[Path]:
    shards = sorted(Path(folder).rglob("[!.]*.tar"))
    if not shards:
        raise BadInput(f"there are no shards (*.tar) in {folder}; give wds/FOLDER")
    return shards


def _words(shard, folder) -> list[str]:
    return re.findall(r"[a-z]+", str(shard.relative_to(folder).with_suffix("")).lower())


def _samples(shard) -> list[tuple[str, int]]:
    """(name, label) of each image, -1 without a label. Of a sample's images the first of `WDS_IMAGES` counts."""
    images, labels = {}, {}
    for inside, name in tar_members([shard]):
        stem, _, ending = os.path.basename(inside).partition(".")
        key, ending = (os.path.dirname(inside), stem), ending.lower()
        labels.setdefault(key, "")
        if ending == "cls":
            labels[key] = _member(name).decode(errors="replace").strip()
        elif ending in WDS_IMAGES:
            images[key] = min((WDS_IMAGES.index(ending), name), images.get(key, (len(WDS_IMAGES), "")))
    if lost := labels.keys() - images.keys():
        what = f"{len(lost)} samples without an image ({', '.join(WDS_IMAGES)})"
        utils.note_once("samples", f"left out in {shard}: {what} (and in other shards likewise)")
    numbers = {key: int(label) for key, label in labels.items() if label.isdecimal()}
    return [(name, numbers.get(key, -1)) for key, (_, name) in images.items()]


# Packages ----------------------------------------------------------------------------------------------------------


@contextmanager
def hugging_face_package():
    """Hugging Face's package `datasets`, whose name the project's own file has, too."""
    here = str(Path(__file__).parent.parent)
    with _importing:
        ours, path = sys.modules.pop("datasets", None), list(sys.path)
        sys.modules.update(_theirs)
        sys.path[:] = [folder for folder in path if os.path.abspath(folder or ".") != here]
        try:
            _theirs["datasets"] = importlib.import_module("datasets")
            yield _theirs["datasets"]
        except ImportError as error:
            raise BadInput(f"Hugging Face datasets take a package ({error}): pip install datasets") from None
        finally:
            sys.path[:] = path
            sys.modules.pop("datasets", None)
            if ours is not None:
                sys.modules["datasets"] = ours


@cache
def _hugging_face(name):
    """A DatasetDict, from what `save_to_disk` wrote, a folder of parquet or images, or the hub."""
    with hugging_face_package() as package:
        try:
            saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
            found = package.load_from_disk(name) if saved else package.load_dataset(name)
        except ImportError:
            raise
        except Exception as error:  # many kinds: no network, no such name, damaged files
            raise BadInput(f"cannot read the Hugging Face dataset {name} ({error}); correct --data_path") from None
        return found if isinstance(found, dict) else {str(found.split or "train"): found}


@cache
def _columns(part):
    """(dataset whose images are not decoded, name of its images, name of its labels)."""
    root, _, split = part.rpartition("!")
    data = _hugging_face(root.partition("/")[2])[split]
    kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = ["label"] * ("label" in kinds) + [name for name, kind in kinds.items() if kind == "ClassLabel"]
    if not (images and labels):
        raise BadInput(f"{root} has no columns image and label of these kinds, but {', '.join(kinds)}; rename them")
    image, label = "image" if "image" in images else images[0], labels[0]
    with hugging_face_package() as package:
        return data.cast_column(image, package.Image(decode=False)), image, label


@cache
def _torch(root, split):
    """torch/NAME, in ./data/NAME, or torch/NAME/FOLDER: a dataset of torchvision's, as timm makes it."""
    from timm.data import create_dataset

    _, name, *folder = root.split("/", 2)
    folder = Path(folder[0] if folder else f"./data/{name}")
    missing = not folder.is_dir() or not os.listdir(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return create_dataset(f"torch/{name}", root=str(folder), split=split, download=missing)
    except Exception as error:  # many kinds: no network, no such name, damaged files
        raise BadInput(f"cannot read {root} ({error}); give torch/NAME/FOLDER") from None
