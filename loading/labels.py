"""Which class an image has where no folder says so: ImageNet's label files; and which classes are wanted."""

import csv
import io
import os
import tarfile
from importlib.resources import files
from pathlib import Path

from utils import BadInput

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"  # numbers of the devkit's own
LABEL_FILES = ("LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt", "val.txt", "labels.csv",
               "labels.txt")  # Kaggle's, TensorFlow's, Caffe's, own  # fmt: skip


def timm_info(name) -> str:
    """One of timm's files about ImageNet (`timm/data/_info`)."""
    return files("timm.data").joinpath("_info", name).read_text(encoding="utf-8")


def labels_of(names, place) -> list[str] | list[int]:
    """The class name, or the number, of each image of a folder or tar without class folders.

    They are in a file in it, or beside it: lines of name and class, or of the class alone, in the order of the names.

    Args:
        names: of the images, sorted.

    Raises:
        BadInput: no such file, or it does not have all the images.
    """
    around = [Path(place), Path(place).parent]
    file = next((folder / name for folder in around for name in LABEL_FILES if (folder / name).is_file()), None)
    if file is not None:
        rows = _rows(file)
    else:
        try:
            file, rows = _devkit(around[0]) or _devkit(around[1]) or (None, None)
        except Exception as error:  # of tarfile, gzip or scipy: a download that was cut
            raise BadInput(f"cannot read the {DEVKIT} beside {place} ({error}); download it again") from None
    if file is None:
        raise BadInput(
            f"{place} has no class folders, and no file says which class its images have; put "
            f"{', '.join(LABEL_FILES)} or {DEVKIT}.tar.gz beside it"
        )
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(names):
            raise BadInput(f"{file} has {len(rows)} lines, {place} has {len(names)} images; give a line for each")
        labels = [label for (label,) in rows]
    else:
        pairs = [row for row in rows if len(row) == 2]
        order = {Path(name).stem: label for name, label in pairs} | dict(pairs)
        labels = [order.get(name) or order.get(Path(name).stem) for name in names]
        if not all(labels):
            raise BadInput(f"{file} has no line with a label for {names[[*map(bool, labels)].index(False)]}; add one")
    return [int(label) for label in labels] if all(map(str.isdecimal, labels)) else labels


def _rows(file) -> list[list[str]]:
    """[name, label] or [label] of each line; between them a comma, or else spaces."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # Excel's begin with a mark
    except ValueError as error:
        raise BadInput(f"cannot read {file} ({error}); write it in UTF-8") from None
    lines = [line.strip() for line in lines if line.strip()]
    if file.name == LABEL_FILES[0]:  # after the class it has boxes
        lines = [line.split()[0] for line in lines]
    rows = [next(csv.reader([line], skipinitialspace=True)) if "," in line else line.split(None, 1) for line in lines]
    return [[cell.strip() for cell in row[:2]] for row in rows]


def _devkit(folder):
    """(file, [[WordNet ID], ...]) from a devkit, packed or not; None without one."""
    from scipy.io import loadmat

    for root in (folder, folder / "data", folder / DEVKIT / "data"):
        if (root / TRUTH).is_file() and (root / "meta.mat").is_file():
            file, truth, meta = root / TRUTH, (root / TRUTH).read_bytes(), (root / "meta.mat").read_bytes()
            break
    else:
        file = folder / f"{DEVKIT}.tar.gz"
        if not file.is_file():
            return None
        with tarfile.open(file) as archive:
            inside = {os.path.basename(name): name for name in archive.getnames()}
            truth, meta = (archive.extractfile(inside[name]).read() for name in (TRUTH, "meta.mat"))
    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    names = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist()))
    return file, [[names[int(number)]] for number in truth.split()]


def class_map(file) -> list[str]:
    """The classes of --class_map, in the order of their labels: a class a line, or a pickled {class: label}.

    `file` may also be the name of one of timm's, such as imagenet_a_synsets.txt.
    """
    from timm.data.readers.class_map import load_class_map

    if not os.path.exists(file):
        try:
            labels = {name: i for i, name in enumerate(timm_info(file).split())}
        except (OSError, ValueError):
            raise BadInput(f"there is no file {file}; give --class_map a text file with a class a line") from None
    else:
        try:
            labels = {str(name).lstrip("\ufeff"): label for name, label in load_class_map(file).items()}  # Excel's mark
        except Exception as error:  # a damaged pickle raises anything
            raise BadInput(f"cannot read --class_map {file} ({error}); give a text file, a class a line") from None
    labels.pop("", None)
    if not labels or set(labels.values()) != set(range(len(labels))):
        raise BadInput(f"--class_map {file}: its labels have to be 0, 1, 2, ..., each once")
    return sorted(labels, key=labels.get)
