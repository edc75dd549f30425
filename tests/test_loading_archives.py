"""Images in tar files, shards, Hugging Face and torchvision datasets, and ImageNet's own files: read as folders are."""

import io
import ntpath
import tarfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from datasets import find_parts, find_split
from loading import archives
from loading.archives import kind_of
from loading.decode import read_image, read_picture
from loading.files import FileLoader, load_file_data
from main_distillation import main
from runs import STUDENT, run
from training.evaluation_sets import read_set
from utils import BadInput

SYNSETS = "n01440764 n01443537 n01484850".split()


def picture(n) -> Image.Image:
    """Whose upper left value is n."""
    pixels = np.full((6, 6, 3), n, np.uint8)
    return Image.fromarray(pixels)


def encoded(n) -> bytes:
    file = io.BytesIO()
    picture(n).save(file, "PNG")
    return file.getvalue()


def write_tar(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def values_of(split) -> list[tuple[int, int]]:
    """(upper left value, label) of each image."""
    return [(read_picture(split, i).getpixel((0, 0))[0], int(split.labels[i])) for i in range(len(split))]


def tar_of_a_class(path):
    for part, start in (("train", 0), ("val", 100)):
        for label, name in enumerate(SYNSETS):
            files = {f"{name}_{i}.png": encoded(start + 10 * label + i) for i in range(4)}
            write_tar(path / part / f"{name}.tar", files | {"readme.txt": b"no image"})
    return path


def imagenets_own(path):
    """ILSVRC2012_*.tar: a tar of tars, a flat tar, and the devkit, whose numbers are not those of sorted classes."""
    inner = {}
    for label, name in enumerate(SYNSETS):
        file = write_tar(path / "one.tar", {f"{name}_{i}.JPEG": encoded(10 * label + i) for i in range(4)})
        inner[f"{name}.tar"] = file.read_bytes()
        file.unlink()
    write_tar(path / "ILSVRC2012_img_train.tar", inner)
    flat = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": encoded(100 + 10 * (i // 4) + i % 4) for i in range(12)}
    write_tar(path / "ILSVRC2012_img_val.tar", dict(reversed(flat.items())))
    write_tar(path / "ILSVRC2012_img_test.tar", {"ILSVRC2012_test_00000001.JPEG": encoded(1)})
    devkit = path / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    numbers = np.array([(3, SYNSETS[0]), (1, SYNSETS[1]), (2, SYNSETS[2])], [("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    savemat(devkit / "meta.mat", {"synsets": numbers})
    truth = "".join(f"{number}\n" * 4 for number in (3, 1, 2))
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    with tarfile.open(path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        archive.add(devkit.parent, "ILSVRC2012_devkit_t12")
    return path


def shards(path):
    for part, start in (("train", 0), ("validation", 100)):
        for shard in range(2):
            files = {}
            for label in range(3):
                for i in (2 * shard, 2 * shard + 1):
                    files[f"{label}_{i}.png"] = encoded(start + 10 * label + i)
                    files[f"{label}_{i}.cls"] = str(label).encode()
                    files[f"{label}_{i}.json"] = b"{}"
            write_tar(path / f"tiny-{part}-{shard:04d}.tar", files)
    return f"wds/{path}"


def hugging_face(path, saved):
    """As `save_to_disk` writes it, or parquet files; the test images have no labels, as ImageNet's there."""
    from loading.archives import hugging_face_package

    with hugging_face_package() as package:
        features = package.Features(image=package.Image(), label=package.ClassLabel(names=SYNSETS))
        found = package.DatasetDict()
        for part, start in (("train", 0), ("validation", 100), ("test", 200)):
            rows = [(start + 10 * label + i, -1 if part == "test" else label) for label in range(3) for i in range(4)]
            columns = {"image": [{"bytes": encoded(n), "path": None} for n, _ in rows], "label": [n for _, n in rows]}
            found[part] = package.Dataset.from_dict(columns, features=features)
        if saved:
            found.save_to_disk(str(path / "hf"))
        for part, data in found.items() if not saved else ():
            data.to_parquet(str(path / "hf" / f"{part}-00000-of-00001.parquet"))
    return f"hfds/{path / 'hf'}"


def torchvisions(path):
    for part, start in (("train", 0), ("val", 100)):
        for label, name in enumerate(SYNSETS):
            (path / part / name).mkdir(parents=True)
            for i in range(4):
                picture(start + 10 * label + i).save(path / part / name / f"{i}.png")
    return f"torch/image_folder/{path}"


def one_tar(path):
    for part, start in (("train", 0), ("val", 100)):
        images = [(label, i) for label in range(3) for i in range(4)]
        files = {f"in/{SYNSETS[label]}/{i}.png": encoded(start + 10 * label + i) for label, i in images}
        write_tar(path / f"{part}.tar", files)
    return path


def skip_without_datasets():
    try:
        version("datasets")
    except PackageNotFoundError:
        pytest.skip("Hugging Face datasets take a package: pip install datasets")


def make(kind, path, monkeypatch):
    if kind.startswith("hf"):
        skip_without_datasets()
        monkeypatch.setenv("HF_DATASETS_CACHE", str(path / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        return hugging_face(path, kind == "hf_saved")
    return {"tar": tar_of_a_class, "one_tar": one_tar, "imagenet": imagenets_own, "wds": shards, "torch": torchvisions}[
        kind
    ](path)


KINDS = ("tar", "one_tar", "imagenet", "wds", "hf_saved", "hf_parquet", "torch")


@pytest.mark.parametrize("kind", KINDS)
def test_all_images_with_their_labels(kind, tmp_path, monkeypatch):
    path = make(kind, tmp_path, monkeypatch)
    parts, classes, _ = find_parts("IMNET", path, None, None, 10**6)
    assert classes == (["0", "1", "2"] if kind == "wds" else SYNSETS)
    for part, start in (("train", 0), ("test", 100)):
        assert sorted(values_of(parts[part])) == [
            (start + 10 * label + i, label) for label in range(3) for i in range(4)
        ]
    again, same = find_split("IMNET", path, False, {"classes": classes})
    assert same == classes and values_of(again) == values_of(parts["test"])


@pytest.mark.parametrize("kind", KINDS)
def test_promises_of_files_hold(kind, tmp_path, monkeypatch):
    """Held out, each evaluated once by two processes, the same order and draws whatever the workers, from any batch."""
    path = make(kind, tmp_path, monkeypatch)
    data = load_file_data("IMNET", path, (6, 6))
    assert len(data.train) == 9 and len(data.val) == 3
    about, cpu = data.description(), torch.device("cpu")
    seen = [label for rank in range(2) for _, labels in FileLoader(data.test, about, 5, cpu, rank=rank, world_size=2)
            for label in labels.tolist()]  # fmt: skip
    assert Counter(seen) == {0: 4, 1: 4, 2: 4}

    def draw(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) + torch.randint(50, (1,)).to(torch.uint8)

    def batches(workers, first):
        loader = FileLoader(data.train, about, 2, cpu, transform=draw, seed=3, workers=workers)
        loader.set_epoch(1, first)
        return torch.cat([images for images, _ in loader])

    whole = batches(0, 0)
    assert torch.equal(batches(2, 0), whole)
    assert torch.equal(batches(0, 2), whole[4:])


def test_train_and_test_from_tar_files_on_the_command_line(tmp_path, capsys):
    tar_of_a_class(tmp_path / "data")
    (tmp_path / "two.txt").write_text(f"{SYNSETS[2]}\n{SYNSETS[0]}\n")
    words = [word for word in STUDENT if word not in ("--data_set", "DIGITS")]
    flags = ["--data_path", tmp_path / "data", "--class_map", tmp_path / "two.txt", "--epochs", 1, "--batch_size", 2]
    out = tmp_path / "out"
    status, text, err = run(main, [*words, *flags, "--output_dir", out], capsys)
    assert status == 0, err
    assert "on 8 images" in text
    status, text, _ = run(main, ["--eval", "--resume", out / "best_checkpoint.pth", "--device", "cpu"], capsys)
    assert status == 0 and "on 8 images" in text
    (tmp_path / "two.txt").write_text(f"{SYNSETS[0]}\n")
    flags = ["--eval", "--resume", out / "best_checkpoint.pth", "--class_map", tmp_path / "two.txt"]
    status, _, err = run(main, [*flags, "--device", "cpu"], capsys)
    assert status == 2 and f"only the model have {SYNSETS[2]}" in err


def pair(path, files):
    """`files` as all that train/ and val/ have, a tar of each class."""
    for part in ("train", "val"):
        for label, name in enumerate(SYNSETS):
            write_tar(path / part / f"{name}.tar", files(label))
    return path


def test_tar_files_as_people_pack_them(tmp_path, capsys):
    """`tar -C FOLDER .`, macOS's hidden files, a file packed again, hard links, hidden tar files."""

    def files(label):
        return {"./a.png": encoded(99), "./._a.png": b"no image", "./b.png": encoded(label)}

    path = pair(tmp_path, files)
    for tar in path.glob("*/*.tar"):
        with tarfile.open(tar, "a") as archive:
            again, link = tarfile.TarInfo("./a.png"), tarfile.TarInfo("./c.png")
            again.size = len(encoded(50))
            archive.addfile(again, io.BytesIO(encoded(50)))
            link.type, link.linkname = tarfile.LNKTYPE, "./b.png"
            archive.addfile(link)
            link.name, link.type = "./d.png", tarfile.SYMTYPE
            archive.addfile(link)
    (path / "train" / "._n01440764.tar").write_bytes(b"no tar")
    parts, classes, _ = find_parts("IMNET", path, None, None, 10**6)
    assert classes == SYNSETS and "symbolic links, as n01440764/d.png" in capsys.readouterr().out
    for split in parts.values():
        assert sorted(values_of(split)) == sorted((n, label) for label in range(3) for n in (50, label, label))


def test_paths_in_tar_files_have_slashes_on_windows(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {"./red/a.png": encoded(1), "red/.hidden/b.png": encoded(2), "red/._a.png": b""})
    monkeypatch.setattr(archives, "os", SimpleNamespace(path=ntpath))
    assert [path for path, _ in archives.tar_members([tmp_path / "a.tar"])] == ["red/a.png"]


def test_one_class_is_a_wrong_folder(tmp_path):
    with pytest.raises(BadInput, match="of one class, images"):
        find_parts("IMNET", pair(tmp_path, lambda label: {"images/a.png": encoded(label)}), None, None, 10**6)


def test_what_lies_beside_class_folders_is_noted(tmp_path, capsys):
    torchvisions(tmp_path)
    picture(0).save(tmp_path / "train" / "loose.PNG")
    write_tar(tmp_path / "train" / "n0.tar", {"a.png": encoded(1)})
    parts, _, _ = find_parts("IMNET", tmp_path, None, None, 10**6)
    assert len(parts["train"]) == 12
    assert "left out beside the class folders" in capsys.readouterr().out


def test_a_flat_tar_may_have_a_folder_of_its_own_name(tmp_path):
    torchvisions(tmp_path / "a")
    write_tar(tmp_path / "val.tar", {f"val/{i}.png": encoded(i) for i in range(3)})
    (tmp_path / "a" / "train").rename(tmp_path / "train")
    (tmp_path / "val.txt").write_text("0.png 2\n1.png 0\n2.png 1\n")
    assert values_of(find_parts("IMNET", tmp_path, None, None, 10**6)[0]["test"]) == [(0, 2), (1, 0), (2, 1)]


def test_samples_of_shards(tmp_path, capsys):
    """Of several images in a sample timm takes the jpg; one in an unknown format is noted; a test needs no labels."""
    for part in ("train", "val"):
        files = {"0.png": encoded(99), "0.jpg": encoded(5), "0.CLS": b"0", "1.PNG": encoded(6), "1.cls": b"1\n"}
        write_tar(tmp_path / f"{part}-0.tar", files | {"2.bmp": b"", "2.cls": b"1", "3.x.jpg": b""})
    write_tar(tmp_path / "test-0.tar", {"0.png": encoded(0)})
    parts, _, _ = find_parts("IMNET", f"wds/{tmp_path}", None, None, 10**6)
    assert sorted(values_of(parts["test"])) == [(5, 0), (6, 1)]
    assert "2 samples without an image" in capsys.readouterr().out
    write_tar(tmp_path / "none" / "train-0.tar", {"2.bmp": b"", "2.cls": b"1"})
    with pytest.raises(BadInput, match="no images for train"):
        find_split("IMNET", f"wds/{tmp_path / 'none'}", True)


def hugging_faces(path, **columns):
    """hfds/ of six images, and columns of (values, kind of their feature)."""
    from loading.archives import hugging_face_package

    with hugging_face_package() as package:
        kinds = {"Image": package.Image(), "names": package.ClassLabel(names=["x", "y"])}
        features = {name: kinds.get(kind) or package.Value(kind) for name, (_, kind) in columns.items()}
        values = {name: values for name, (values, _) in columns.items()}
        data = package.Dataset.from_dict(values, features=package.Features(features))
        package.DatasetDict(train=data, validation=data).save_to_disk(str(path))
    return f"hfds/{path}"


def test_columns_of_hugging_face(tmp_path):
    """`image` and `label` before others of their kind; labels that are absent, lists or below 0 are refused."""
    skip_without_datasets()
    images = [{"bytes": encoded(n), "path": None} for n in range(4)]
    labels, domain = [0, 1, 0, 1], ([0] * 4, "names")
    path = hugging_faces(
        tmp_path / "a", mask=(images[::-1], "Image"), domain=domain, image=(images, "Image"), label=(labels, "int64")
    )
    split, classes = find_split("IMNET", path, True)
    assert values_of(split) == [(0, 0), (1, 1), (2, 0), (3, 1)] and classes == ["0", "1"]
    for name, values, kind, words in (
        ("b", ["x", None, "y", "y"], "string", "no numbers of classes"), ("c", [0, None, 1, 1], "int64", "no numbers"),
        ("d", [0, -1, 1, 1], "int64", "train!1 has no label"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=words):
            find_split("IMNET", hugging_faces(tmp_path / name, image=(images, "Image"), label=(values, kind)), True)
    path = hugging_faces(tmp_path / "e", image=([None, *images[1:]], "Image"), label=(labels, "int64"))
    with pytest.raises(BadInput, match=r"no image hfds.*train!0"):
        values_of(find_split("IMNET", path, True)[0])


def test_labels_of_hugging_face_that_are_words(tmp_path):
    """They are numbered in the order of the alphabet, over all splits: one may lack some, or have only numbers."""
    skip_without_datasets()
    from loading.archives import hugging_face_package

    with hugging_face_package() as package:
        parts, kinds = {"train": ["dog", "cat", "7"], "test": ["7", "7"]}, package.Features(image=package.Image())
        found = package.DatasetDict()
        for part, words in parts.items():
            images = [{"bytes": encoded(n), "path": None} for n in range(len(words))]
            found[part] = package.Dataset.from_dict({"image": images}, features=kinds).add_column("label", words)
        found.save_to_disk(str(tmp_path / "words"))
    for train, labels in ((True, [2, 1, 0]), (False, [0, 0])):
        split, classes = find_split("IMNET", f"hfds/{tmp_path / 'words'}", train)
        assert classes == ["7", "cat", "dog"] and values_of(split) == list(enumerate(labels))
    images = [{"bytes": encoded(n), "path": None} for n in range(3)]
    path = hugging_faces(tmp_path / "numbers", image=(images, "Image"), label=(["10", "2", "0"], "string"))
    assert values_of(find_split("IMNET", path, True)[0]) == [(0, 10), (1, 2), (2, 0)]


def test_hfids_is_read_by_number(tmp_path, monkeypatch, capsys):
    path = make("hf_saved", tmp_path, monkeypatch).replace("hfds", "hfids")
    parts, _, _ = find_parts("IMNET", path, None, None, 10**6)
    assert len(values_of(parts["train"])) == 12
    assert capsys.readouterr().out.count("is not streamed") == 1


# What is wrong is one line ---------------------------------------------------------------------------------------


def make_train_shard(path):
    write_tar(path / "train-0.tar", {"x.png": encoded(0), "x.cls": b"0"})
    return path


def test_bad_input(tmp_path, monkeypatch):
    def refused(path, match):
        with pytest.raises(BadInput, match=match):
            find_parts("IMNET", path, None, None, 10**6)

    refused("wds/https://host/train-{00..10}.tar", "download them")
    refused(f"wds/{tmp_path}", "no shards")
    make_train_shard(tmp_path / "a")
    refused(f"wds/{tmp_path / 'a'}", "no split test, only train")
    write_tar(tmp_path / "a" / "val-0.tar", {"x.png": encoded(0)})
    refused(f"wds/{tmp_path / 'a'}", "x.png has no label")
    refused(f"torch/none/{tmp_path / 'b'}", "cannot read torch/none")
    tar_of_a_class(tmp_path / "c")
    (tmp_path / "c" / "val" / f"{SYNSETS[0]}.tar").write_bytes(b"no tar")
    refused(tmp_path / "c", "uncompressed")
    for part in ("train", "val"):
        (tmp_path / "d" / part).mkdir(parents=True)
        (tmp_path / "d" / part / "a.tar.gz").write_bytes(b"\x1f\x8b")
    refused(tmp_path / "d", "a.tar.gz .*; give an uncompressed tar")
    with pytest.raises(BadInput, match="no split test, only train"):  # whose images were trained on
        read_set("x", f"wds/{make_train_shard(tmp_path / 'e')}", SYNSETS, 10**6)
    skip_without_datasets()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(f"hfds/{tmp_path / 'none'}", "cannot read the Hugging Face dataset")


def test_damaged_image_in_a_tar_is_named(tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a.png": encoded(1)[:40]})
    with pytest.raises(BadInput, match=r"cannot read the image .*x.tar!512\+40!a.png"):
        read_image(f"{tar}!512+40!a.png")


def test_all_damaged_images_are_left_out(tmp_path):
    path = tar_of_a_class(tmp_path)
    name = f"{SYNSETS[0]}_"
    files = {f"{name}{i}.png": encoded(i)[: 40 if i == 1 else None] for i in range(4)}
    write_tar(path / "train" / f"{SYNSETS[0]}.tar", files)
    data = load_file_data("IMNET", path, (6, 6), bad_images="skip")
    assert len(data.train) + len(data.val) == 11
    with pytest.raises(BadInput, match=f"{name}1.png"):
        list(FileLoader(find_split("IMNET", path, True)[0], data.description(), 12, torch.device("cpu")))


def test_files_in_folders_named_as_a_kind():
    assert kind_of("./wds/a") is None and kind_of("wds") is None and kind_of("hfds/a/b") == "hfds"
