"""Label files beside flat folders, and --class_map."""

import pickle

import pytest

from datasets import find_parts, find_split
from loading.labels import class_map
from test_loading_archives import SYNSETS, imagenets_own, picture, shards, tar_of_a_class, torchvisions, values_of
from utils import BadInput


@pytest.mark.parametrize(
    ("name", "line"),
    [("val.txt", "{file}.JPEG {label}"), ("LOC_val_solution.csv", "{file},{name} 1 2 3 4"), ("labels.txt", "{name}")],
)
def test_a_flat_folder_with_a_label_file(name, line, tmp_path):
    tar_of_a_class(tmp_path)
    for file in (tmp_path / "val").iterdir():
        file.unlink()
    lines = ["ImageId,PredictionString"] if name.endswith("csv") else []
    for i, label in enumerate((2, 0, 1, 0)):
        file = f"ILSVRC2012_val_{i + 1:08d}"
        picture(i).save(tmp_path / "val" / f"{file}.JPEG", "PNG")
        lines.append(line.format(file=file, label=label, name=SYNSETS[label]))
    (tmp_path / name).write_text("\n".join(lines))
    parts, classes, _ = find_parts("IMNET", tmp_path, None, None, 10**6)
    assert classes == SYNSETS
    assert values_of(parts["test"]) == [(0, 2), (1, 0), (2, 1), (3, 0)]


def test_class_map(tmp_path):
    path = tmp_path / "map.pkl"
    path.write_bytes(pickle.dumps({SYNSETS[2]: 0, SYNSETS[0]: 1}))
    wanted = class_map(path)
    parts, classes, origin = find_parts("IMNET", tar_of_a_class(tmp_path), None, None, 10**6, wanted)
    assert classes == [SYNSETS[2], SYNSETS[0]]
    assert values_of(parts["test"]) == [*((100 + i, 1) for i in range(4)), *((120 + i, 0) for i in range(4))]
    again, _ = find_split("IMNET", tmp_path, False, {"classes": classes} | origin)
    assert values_of(again) == values_of(parts["test"])
    assert len(class_map("imagenet_a_synsets.txt")) == 200
    with pytest.raises(BadInput, match="no class n0"):
        find_parts("IMNET", tmp_path, None, None, 10**6, ["n0"])
    for wrong in (2, "0", 0):
        path.write_bytes(pickle.dumps({SYNSETS[2]: 0, SYNSETS[0]: wrong}))
        with pytest.raises(BadInput, match="0, 1, 2"):
            class_map(path)
    (tmp_path / "excel.txt").write_text("b\na\n", encoding="utf-8-sig")
    assert class_map(tmp_path / "excel.txt") == ["b", "a"]


def test_a_cut_devkit(tmp_path):
    path = imagenets_own(tmp_path)
    file = path / "ILSVRC2012_devkit_t12.tar.gz"
    file.write_bytes(file.read_bytes()[:300])
    for old in (path / "ILSVRC2012_devkit_t12" / "data").iterdir():
        old.unlink()
    with pytest.raises(BadInput, match="download it again"):
        find_split("IMNET", path, False)


def test_class_map_where_labels_are_numbers(tmp_path):
    """A checkpoint has its map's classes; the numbers are of all classes."""
    path, wanted = shards(tmp_path / "a"), ["2", "0"]
    parts, classes, origin = find_parts("IMNET", path, None, None, 10**6, wanted)
    again, _ = find_split("IMNET", path, False, {"classes": classes} | origin)
    assert values_of(again) == values_of(parts["test"]) and (120, 0) in values_of(again)
    path, wanted = torchvisions(tmp_path / "b").removeprefix("torch/image_folder/"), [SYNSETS[2], SYNSETS[0]]
    flat_val(tmp_path / "b", "val.txt", "{name} {label}")
    parts, classes, origin = find_parts("IMNET", path, None, None, 10**6, wanted)
    again, _ = find_split("IMNET", path, False, {"classes": classes} | origin)
    assert values_of(again) == values_of(parts["test"]) == [(0, 1), (2, 0), (3, 1)]


def flat_val(path, file, line, encoding="utf-8", labels=(0, 1, 2, 0), classes=SYNSETS):
    """val/ with four images, of values 0 to 3, and a file of such lines."""
    for old in (path / "val").glob("*/*"):
        old.unlink()
    for old in (path / "val").iterdir():
        old.rmdir() if old.is_dir() else old.unlink()
    names = ["a.jpg", "a.png", "b.jpg", "c.jpg"]
    for i, name in enumerate(names):
        picture(i).save(path / "val" / name, "PNG")
    lines = [line.format(name=n, label=i, word=classes[i % len(classes)]) for n, i in zip(names, labels)]
    (path / file).write_bytes("\r\n".join(lines).encode(encoding))


def test_label_files_as_people_write_them(tmp_path):
    """Quotes, Excel's mark, spaces in names of classes, one stem with two endings; what is wrong is said."""
    spaced = ["golden eagle", "golden retriever", "hen"]
    for name in spaced:
        (tmp_path / "train" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "train" / name / "0.png")
    (tmp_path / "val").mkdir()

    def found(file, line, **of):
        (tmp_path / "labels.csv").unlink(missing_ok=True)
        flat_val(tmp_path, file, line, classes=spaced, **of)
        parts, classes, _ = find_parts("IMNET", tmp_path, None, None, 10**6)
        assert classes == spaced
        return values_of(parts["test"])

    right = [(0, 0), (1, 1), (2, 2), (3, 0)]
    assert found("labels.csv", "{name},{word}", encoding="utf-8-sig") == right
    assert found("labels.csv", '"{name}", "{word}"') == right
    assert found("labels.txt", "{name} {word}") == right
    for line, words, of in (
        ("", "0 lines", {}), ("{name},", "no line with a label for a.jpg", {}),
        ("{name},ü", "UTF-8", {"encoding": "latin-1"}),
        ("{name},{label}", "has a label 3, and there are 3", {"labels": (1, 2, 3, 1)}),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=words):
            found("labels.csv", line, **of)
