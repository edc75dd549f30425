"""Folders of image files: which of them are training and test, which are classes, and which files are images."""

import os
import re
import warnings
from collections import Counter, deque
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import EpsImagePlugin, Image
from torch import Tensor

import utils
from loading.archives import kind_of, labelled_images, splits_of, tar_members
from loading.labels import labels_of
from utils import BadInput

OF_IMAGENET = "ILSVRC2012_img_"  # and train.tar, val.tar
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # and names of their folders
LIKE_PARTS = {"training", "testing", *(name for names in PARTS.values() for name in names)}  # no names of classes
FOLDERS = {"FOLDER": "test", "IMNET": "val"}  # and the part that is the test, unless a checkpoint has another
EXPECTED = {
    "FOLDER": "train/<class>/ and test/<class>/ (or val/<class>/), or with <class>/ alone",
    "IMNET": "train/<class>/ and val/<class>/; --data_set FOLDER takes others, too",
}
HEIF_ENDINGS = (".heic", ".heif", ".hif")
HEIF_NEEDS = "HEIC takes a package: pip install pillow-heif"


def find_folders(name, path, about=None) -> dict[str, Path | str]:
    """Those that are there of 'train', 'test', and 'val' if another one is the test; of class folders alone, 'all'.

    Each is a folder, a tar file, or a split of `loading.archives`.

    With val/ and test/, val/ is held out. With one of them that is the test, as it is for a checkpoint (`about`).
    """
    if path is None:
        raise BadInput(f"--data_set {name} needs --data_path, a folder with {EXPECTED[name]}")
    root, there, splits = Path(path), {}, splits_of(path) if kind_of(path) else None
    for part, names in PARTS.items():
        if splits is None:
            tars = [root / f"{before}{n}.tar" for n in names for before in ("", OF_IMAGENET)]
            found = [root / n for n in names if os.path.isdir(root / n)] or [tar for tar in tars if tar.is_file()]
        else:
            found = [splits[n] for n in names if n in splits]
        if len(found) > 1:
            raise BadInput(f"{' and '.join(map(str, found))} are both there; keep one, or move one into the other")
        there |= {part: found[0]} if found else {}
    subfolders = class_names(root) if not there and name == "FOLDER" else []
    if len(subfolders) > 1 and not {n.lower() for n in subfolders} & LIKE_PARTS:
        return {"all": root}
    if name == "IMNET" and {"val", "test"} <= there.keys() and not _has_labels(there["test"]):
        del there["test"]  # ImageNet's own, without labels
    test = "test" if about is None else about.get("test_folder", FOLDERS[name])
    if test not in there:
        test = "val" if test == "test" else "test"
    of_parts = {"train": "train", "test": test} | ({"val": "val"} if test == "test" else {})
    return {part: there[folder] for part, folder in of_parts.items() if folder in there}


def _has_labels(place) -> bool:
    return max(labelled_images(place)[1]) >= 0 if kind_of(place) else place.is_dir() and bool(class_names(place))


def part_of(place) -> str:
    """Which of PARTS a folder, tar file or split is by its name."""
    name = Path(re.split("[/!]", str(place))[-1]).stem.removeprefix(OF_IMAGENET)
    return next(part for part, names in PARTS.items() if name in names)


def folder_of(part, folders, name, path) -> Path | str:
    """Raises BadInput, with what is there and what is expected, if that part is not there."""
    if part in folders:
        return folders[part]
    if kind_of(path):
        raise BadInput(f"{path} has no split {part}, only {', '.join(splits_of(path))}; call them train and validation")
    root = Path(path)
    names = [root / "train"] if part == "train" else [root / n for n in ("test", "val")]
    download = "" if visible(root) or name == "IMNET" else "; --data_set CIFAR10 would be downloaded there"
    raise BadInput(
        f"there is no folder {' or '.join(map(str, names))}; give --data_path a folder with {EXPECTED[name]} "
        f"({listing(root)}{download})"
    )


def visible(folder) -> list[str]:
    """What a folder has, without what is hidden; nothing if it is not there. Raises BadInput for a file."""
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise BadInput(f"--data_path {folder} is no folder; give a folder")
        return []
    return sorted(name for name in os.listdir(folder) if name[0] != ".")


def listing(folder) -> str:
    names = [f"{name}/" if os.path.isdir(Path(folder) / name) else name for name in visible(folder)]
    if not names:
        return f"{folder} {'is empty' if os.path.isdir(folder) else 'does not exist'}"
    return f"{folder} has {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


def class_names(folder) -> list[str]:
    return [name for name in visible(folder) if os.path.isdir(Path(folder) / name)]


def class_folders(root, left_out) -> tuple[np.ndarray, Tensor, list[str] | None]:
    """(names of M images as bytes, labels (M,) int64, classes) of `root/<class>/*`, at any depth, in any format that
    Pillow reads; of tar files of a class each, or of a tar of folders; or of a split of `loading.archives`.

    Images without class folders have their labels in a file (`labels_of`). Classes are None if they have only numbers.
    """
    images, labels, classes = labelled_images(root) if kind_of(root) else _class_folders(root, left_out)
    if min(labels) < 0:
        name = os.fsdecode(images[labels.index(min(labels))])
        raise BadInput(f"{name} has no label (a number from 0 on; in shards, in its .cls); give it one, or remove it")
    # One array of bytes: worker processes share it, while a list of a million strings is copied into each of them.
    return np.array(images), torch.tensor(labels), classes


def _class_folders(root, left_out) -> tuple[list[bytes], list[int], list[str] | None]:
    if not root.exists():
        raise BadInput(f"there is no folder {root}; give one that is there")
    classes = class_names(root) if root.is_dir() else []
    if not classes:
        tars = [root] if root.is_file() else sorted(root.glob("[!.]*.tar")) or sorted(root.glob("[!.]*.tar.gz"))
        entries = tar_members(tars) if tars else [(file.name, str(file)) for file in image_files(root, left_out)]
        return _listed_images(entries, root, left_out)
    loose = [name for name in visible(root) if os.path.splitext(name)[1].lower() in image_endings() | {".tar"}]
    if loose := [name for name in loose if name not in classes]:
        utils.note_once(str(root), f"left out beside the class folders of {root}: {len(loose)} files, as {loose[0]}")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = image_files(root / name, left_out)
        if not found:
            others = f" ({_words(left_out)})" if left_out else ""
            raise BadInput(f"class folder {root / name} has no images{others}; add some or remove it")
        files += [os.fsencode(file) for file in found]
        labels += [label] * len(found)
    return files, labels, classes


def _listed_images(entries, root, left_out):
    """`class_folders` of (path, name of the image): the last folder of the path is the class, or none has one."""
    endings = image_endings()
    kept = [(path, name) for path, name in entries if os.path.splitext(path)[1].lower() in endings]
    left_out.update(ending for path, _ in entries if (ending := os.path.splitext(path)[1].lower()) not in endings)
    if not kept:
        raise BadInput(f"{root} has no class folders and no images; put images into {root}/<class>/, or move it away")
    kept.sort(key=lambda entry: (os.path.dirname(entry[0]), entry[0]))
    names = [os.path.basename(os.path.dirname(path)) for path, _ in kept]
    if not {name.lower() for name in names} - {"", *LIKE_PARTS}:  # tar packs a flat val/ with its name
        names = labels_of([path for path, _ in kept], root)
    images = [os.fsencode(name) for _, name in kept]
    if isinstance(names[0], int):
        return images, names, None
    classes = sorted(set(names))
    numbers = {name: i for i, name in enumerate(classes)}
    return images, [numbers[name] for name in names], classes


def image_endings() -> set[str]:
    prepare_pillow()
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def image_files(folder, left_out: Counter | None = None) -> list[Path]:
    """The files at any depth below `folder`, sorted, whose ending is that of a format that is read; each once.

    Hidden files and folders are left out. Links are followed, but not to a folder that was visited, nor to one that
    `folder` is in. Of a file that several links lead to, its own place counts, else the first link.

    Args:
        left_out: here the other files are counted, by their ending.
    """
    endings, files, links = image_endings(), {}, []
    visited, waiting = set(map(str, Path(os.path.realpath(folder)).parents)), deque([os.fspath(folder)])
    while waiting:
        here = waiting.popleft()
        place = os.path.realpath(here)
        if place in visited:
            continue
        visited.add(place)
        for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
            if entry.name[0] == ".":
                continue
            if entry.is_dir():  # those that links lead to come last: they may also have a place of their own
                (waiting.append if entry.is_symlink() else waiting.appendleft)(entry.path)
            elif entry.is_symlink():
                links.append(entry.path)
            else:
                files[os.path.join(place, entry.name)] = entry.path
    for link in sorted(links):
        files.setdefault(os.path.realpath(link), link)
    found = sorted(map(Path, files.values()), key=lambda file: file.parts)  # Windows would take a and A for equal
    if left_out is not None:
        left_out.update(file.suffix.lower() for file in found if file.suffix.lower() not in endings)
    return [file for file in found if file.suffix.lower() in endings]


def note_left_out(place, left_out: Counter):
    """Print what `image_files` left out in a folder, once a process."""
    if left_out:
        utils.note_once(os.path.abspath(place), _words(left_out))


def _words(left_out) -> str:
    counts = ", ".join(f"{ending or 'no ending'}: {n}" for ending, n in left_out.most_common())
    heif = f", and {HEIF_NEEDS}" if any(ending in HEIF_ENDINGS for ending in left_out) else ""
    return f"left out for their ending: {counts}{heif}"


@cache
def prepare_pillow():
    """Once a process: with HEIC if its package is there, without PostScript, and quiet."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    EpsImagePlugin.gs_binary = False  # PostScript is a program, and Pillow would have it run by Ghostscript
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of a tag, or of many pixels; errors are reported
