"""Folders of image files: which of them are training and test, which are classes, and which files are images."""

import os
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
from utils import BadInput

PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # and names of their folders
LIKE_PARTS = {"training", "testing", *(name for names in PARTS.values() for name in names)}  # no names of classes
FOLDERS = {"FOLDER": "test", "IMNET": "val"}  # and the part that is the test, unless a checkpoint has another
EXPECTED = {
    "FOLDER": "train/<class>/ and test/<class>/ (or val/<class>/), or with <class>/ alone",
    "IMNET": "train/<class>/ and val/<class>/; --data_set FOLDER takes others, too",
}
HEIF_ENDINGS = (".heic", ".heif", ".hif")
HEIF_NEEDS = "HEIC takes a package: pip install pillow-heif"


def find_folders(name, path, about=None) -> dict[str, Path]:
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


def folder_of(part, folders, name, path) -> Path:
    """Raises BadInput, with what is there and what is expected, if that part is not there."""
    if part in folders:
        return folders[part]
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


def class_folders(root, left_out) -> tuple[np.ndarray, Tensor, list[str]]:
    """(names of M files as bytes, labels (M,) int64, classes) of `root/<class>/*`, at any depth, in any format that
    Pillow reads."""
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
    return np.array(files), torch.tensor(labels), classes


def image_files(folder, left_out: Counter | None = None) -> list[Path]:
    """The files at any depth below `folder`, sorted, whose ending is that of a format that is read; each once.

    Hidden files and folders are left out. Links are followed, but not to a folder that was visited, nor to one that
    `folder` is in. Of a file that several links lead to, its own place counts, else the first link.

    Args:
        left_out: here the other files are counted, by their ending.
    """
    prepare_pillow()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files, links = {}, []
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
    found = sorted(map(Path, files.values()))
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
