"""Data sets: what is found, read, split and held out; normalisation."""

import math
import os
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

import cifar_main
import cifar_test
import datasets
import main_distillation
import visualize_attention
from checkpoints.files import load_checkpoint
from datasets import Split, find_split
from images import DATA, folder_of_images, names, picture, some_images
from inspection import inputs
from loading.files import load_file_data
from loading.folders import image_files
from loading.memory import load_data, read_split
from runs import TINY, run
from utils import BadInput


def test_normalisation_and_its_inverse():
    images = some_images(10, 32, 32)
    expected = TF.normalize(images.float() / 255, DATA["mean"], DATA["std"])
    found = datasets.eval_transform(images, DATA)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(datasets.denormalise(found, DATA["mean"], DATA["std"]), images)
    mean, std = datasets.channel_statistics(images)
    whole = datasets.normalise(images, mean, std)
    assert whole.mean((0, 2, 3)).abs().max() < 1e-4
    assert (whole.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_a_reader_of_ones_own(tmp_path, monkeypatch):
    """One entry of `EMBEDDED` is a data set; what is not as it says there is named, before anything is trained."""
    images, labels, names = torch.zeros(20, 3, 8, 6, dtype=torch.uint8), torch.arange(20) % 5, list("abcde")
    monkeypatch.setitem(datasets.EMBEDDED, "FACES", lambda train: (images, labels, names))
    assert datasets.detect_data_set(tmp_path / "faces") == "FACES"
    data = load_data("FACES", None, (32, 32), val_size=5)
    assert (len(data.train), len(data.val), len(data.test), data.classes) == (15, 5, 20, names)
    for wrong in (
        (images / 255, labels, names), (images[:, 0], labels, names), (images[:, :1], labels, names),
        (images.permute(0, 2, 3, 1), labels, names), (images, labels.int(), names), (images, labels, range(5)),
        (images.numpy(), labels.numpy(), names),
    ):  # fmt: skip
        monkeypatch.setitem(datasets.EMBEDDED, "FACES", lambda train, wrong=wrong: wrong)
        with pytest.raises(TypeError, match="the reader of FACES must return"):
            find_split("FACES", None, True)
    monkeypatch.setitem(datasets.EMBEDDED, "FACES", lambda train: (images, labels, names[:4]))
    with pytest.raises(BadInput, match="FACES has a label 4, and there are 4 classes"):
        find_split("FACES", None, True)


def test_upsampling_keeps_height_and_width():
    found = datasets.eval_transform(some_images(2, 8, 12), DATA | {"input_size": (16, 48)})
    assert found.shape == (2, 3, 16, 48)


def test_digits():
    data = load_data("DIGITS", None, (32, 32))
    assert (len(data.train), len(data.val), len(data.test)) == (1293, 144, 360)
    assert data.classes == list("0123456789")
    assert data.train.images.shape[1:] == (3, 32, 32)
    assert data.train.images.dtype == torch.uint8
    rows = [
        tuple(i.flatten().tolist()) for part in (data.train, data.val, data.test) for i in part.images[:, 0, ::4, ::4]
    ]
    assert len(rows) == 1797
    whole = load_data("DIGITS", None, (32, 32), val_size=0)
    assert whole.val is None
    assert len(whole.train) == 1437
    counts = torch.bincount(load_data("DIGITS", None, (32, 32), val_size=200).val.labels)
    assert counts.sum() == 200
    assert counts.min() >= 18  # stratified
    with pytest.raises(BadInput, match="--val_size 1437"):
        load_data("DIGITS", None, (32, 32), val_size=1437)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_files(name, tmp_path, monkeypatch):
    """The layout that torchvision reads, with few images."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    if name == "CIFAR10":
        folder, labels, meta = tmp_path / "cifar-10-batches-py", "labels", ("batches.meta", "label_names")
        files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    else:
        folder, labels, meta = tmp_path / "cifar-100-python", "fine_labels", ("meta", "fine_label_names")
        files = ["train", "test"]
    folder.mkdir()
    for file in files:
        (folder / file).write_bytes(pickle.dumps({"data": pixels, labels: [i % 2 for i in range(20)]}))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: ["cat", "dog"]}))
    assert datasets.detect_data_set(tmp_path) == name
    split, classes = read_split(name, tmp_path, False, (32, 32))
    assert classes == ["cat", "dog"]
    assert torch.equal(split.images, torch.from_numpy(pixels.reshape(20, 3, 32, 32)))
    assert split.labels.tolist() == [0, 1] * 10


def test_absent_and_damaged_cifar(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(BadInput, match=f"no CIFAR10 under {tmp_path}.*--data_set DIGITS"):
        read_split("CIFAR10", tmp_path, True, (32, 32))
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(BadInput, match="cifar-10-batches-py is damaged"):
        read_split("CIFAR10", tmp_path, True, (32, 32))


def test_which_data_set_a_path_means(tmp_path, photos):
    assert datasets.detect_data_set(None) == "CIFAR10"
    assert datasets.detect_data_set(tmp_path / "CIFAR100") == "CIFAR100"  # absent: to be downloaded
    assert datasets.detect_data_set(tmp_path / "anything") == "FOLDER"  # which then is refused
    assert datasets.detect_data_set(photos) == "FOLDER"
    (tmp_path / "CIFAR100" / "train" / "cat").mkdir(parents=True)  # what lies there decides, not the name
    assert datasets.detect_data_set(tmp_path / "CIFAR100") == "FOLDER"
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "cifar-100-python.tar.gz").write_bytes(b"")
    assert datasets.detect_data_set(tmp_path / "archive") == "CIFAR100"


def test_a_folder_of_images(photos):
    data = load_data("FOLDER", photos, (16, 24), val_size=0.2)
    assert data.classes == ["blue", "red"]
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 6)
    assert data.test.images.shape == (6, 3, 16, 24)
    assert data.test.images[0, :, 0, 0].tolist() == [0, 0, 200]
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.description()["images"] == {"train": 16, "val": 4, "test": 6}


def test_the_walk_gives_each_image_once(tmp_path):
    root = folder_of_images(tmp_path, ["train"])
    ant, left_out = root / "train" / "ant", Counter()
    (ant / ".ipynb_checkpoints").mkdir()
    picture().save(ant / ".ipynb_checkpoints" / "0-checkpoint.png")
    (ant / "deep" / ".cache").mkdir(parents=True)
    picture().save(ant / "deep" / ".cache" / "x.png")
    picture().save(ant / "deep" / "9.png")
    picture().save(ant / "._1.png")
    picture().save(tmp_path / "outside.png")
    (ant / "again").symlink_to(".")
    (ant / "deep" / "up").symlink_to("../..")  # to train/, which has other classes
    (ant / "a_link_before_deep").symlink_to("deep")
    (ant / "00.png").symlink_to("0.png")
    for name in ("out1.png", "out2.png"):
        (ant / name).symlink_to(tmp_path / "outside.png")
    for name in ("1.png.bak", "2.png.BAK", "no_ending", "photo.heix"):
        (ant / name).write_bytes(b"")
    found = image_files(ant, left_out)
    wanted = ["0.png", "1.png", "2.png", "3.png", "deep/9.png", "out1.png"]
    assert [str(file.relative_to(ant)) for file in found] == wanted
    assert left_out == {".bak": 2, "": 1, ".heix": 1}
    assert [f.name for f in image_files(ant / "again")] == ["0.png", "1.png", "2.png", "3.png", "9.png", "out1.png"]


def test_what_is_left_out_is_noted_once(tmp_path, capsys):
    root = folder_of_images(tmp_path, ["train", "test"])
    for place in ("train/ant/a.bak", "train/bee/b.bak", "test/ant/c"):
        (root / place).write_bytes(b"")
    load_data("FOLDER", root, (8, 8))
    find_split("FOLDER", root, False)
    assert capsys.readouterr().out == "note: left out for their ending: .bak: 2, no ending: 1\n"
    assert len(inputs.image_paths([str(root / "train" / "ant"), str(root / "test" / "ant" / "0.png")])) == 5
    assert capsys.readouterr().out == "note: left out for their ending: .bak: 1\n"  # --image_path


def test_val_beside_test_is_what_is_held_out(tmp_path):
    for val in ("val", "valid", "validation"):
        root = folder_of_images(tmp_path / val, ["train", val, "test"])
        for load, name in ((load_data, "FOLDER"), (load_file_data, "FOLDER"), (load_file_data, "IMNET")):
            data = load(name, root, (8, 8))
            assert data.description()["images"] == {"train": 8, "val": 8, "test": 8}
            assert data.description().get("test_folder") == (None if name == "FOLDER" else "test")
            again, _ = find_split(name, root, False, data.description())
            assert {file.split("/")[-3] for file in names(again)} == {"test"}
            if load is load_file_data:
                parts = [{file.split("/")[-3] for file in names(s)} for s in (data.train, data.val, data.test)]
                assert parts == [{"train"}, {val}, {"test"}]
            with pytest.raises(BadInput, match=f"--val_size: .*{val} is what is held out"):
                load(name, root, (8, 8), val_size=0.1)
    folder_of_images(root, ["valid"])
    with pytest.raises(BadInput, match=r"valid and .*validation are both there"):
        load_data("FOLDER", root, (8, 8))


@pytest.mark.parametrize("name", ["FOLDER", "IMNET"])
def test_one_of_val_and_test_is_the_test_and_stays_it(name, tmp_path):
    """Also for a checkpoint, when the other one is put beside it later."""
    for first, second in (("valid", "test"), ("test", "val")):
        root = folder_of_images(tmp_path / first, ["train", first])
        data = load_data(name, root, (8, 8), val_size=2)
        assert data.description()["images"] == {"train": 6, "val": 2, "test": 8}
        folder_of_images(root, [second])
        again, _ = find_split(name, root, False, data.description())
        assert {file.split("/")[-3] for file in names(again)} == {first}


def test_classes_of_all_parts_agree(tmp_path):
    root = folder_of_images(tmp_path, ["train", "val", "test"])
    (root / "val" / "bee").rename(root / "val" / "wasp")
    with pytest.raises(BadInput, match="the training images and the held-out images differ"):
        load_data("FOLDER", root, (8, 8))


def test_the_test_of_imagenet_has_no_labels(tmp_path):
    root = folder_of_images(tmp_path, ["train", "val"])
    (root / "test").mkdir()
    picture().save(root / "test" / "0.png")
    data = load_file_data("IMNET", root, (8, 8), val_size=2)
    assert data.description()["images"] == {"train": 6, "val": 2, "test": 8}
    with pytest.raises(BadInput, match="test has no class folders"):
        load_file_data("FOLDER", root, (8, 8))


def test_class_folders_alone_are_split(tmp_path):
    root = folder_of_images(tmp_path / "many", [""], count=20)
    for load, size, wanted in ((load_data, None, 4), (load_file_data, 6, 6), (load_file_data, 0.3, 12)):
        data = load("FOLDER", root, (8, 8), test_size=size)
        assert len(data.test) == wanted and len(data.val) == math.ceil(0.1 * (40 - wanted))
        assert torch.bincount(data.test.labels).tolist() == [wanted // 2] * 2
        again, classes = find_split("FOLDER", root, False, data.description())
        assert classes == data.classes == ["ant", "bee"]
        if load is load_file_data:
            assert names(again) == names(data.test)
            parts = [names(s) for s in (data.train, data.val, data.test)]
            assert len({file for part in parts for file in part}) == sum(map(len, parts)) == 40
    few = folder_of_images(tmp_path / "few", [""], count=5)
    small = load_data("FOLDER", few, (8, 8))  # 10 % is one image, and there are two classes
    assert small.description()["images"] == {"train": 6, "val": 2, "test": 2}
    assert torch.equal(read_split("FOLDER", few, False, (8, 8), small.description())[0].images, small.test.images)
    picture().save(root / "ant" / "new.png")
    with pytest.raises(BadInput, match="not those of training, and some of them were trained on"):
        find_split("FOLDER", root, False, data.description())
    folder_of_images(root, ["test"])  # to test on others
    assert len(find_split("FOLDER", root, False, data.description())[0]) == 8
    with pytest.raises(BadInput, match="has its own test images"):
        load_data("DIGITS", None, (32, 32), test_size=10)


def test_class_folders_of_a_checkpoint_from_another_system(tmp_path, monkeypatch):
    root = folder_of_images(tmp_path, [""])
    about = load_file_data("FOLDER", root, (8, 8)).description()
    windows = SimpleNamespace(sep="\\", fsencode=os.fsencode, fsdecode=os.fsdecode, path=SimpleNamespace())
    windows.path.relpath = lambda file, start: os.path.relpath(file, start).replace(b"/", b"\\")
    monkeypatch.setattr(datasets, "os", windows)
    find_split("FOLDER", root, False, about)  # is not refused


def test_a_model_of_class_folders_is_tested_on_the_same_images(tmp_path, capsys):
    root = folder_of_images(tmp_path / "data", [""], count=10)
    argv = [*TINY, "--data_path", root, "--test_size", "0.2", "--max_steps", "1", "--model_path", tmp_path / "m.pth"]
    status, out, err = run(cifar_main.main, argv, capsys)
    assert status == 0, err
    assert "14 train, 2 val, 4 test images" in out and "on 4 images of FOLDER" in out
    (tested,) = [line for line in out.splitlines() if line.startswith("Test accuracy")]
    assert run(cifar_test.main, ["--model_path", tmp_path / "m.pth", "--device", "cpu"], capsys)[1].strip() == tested
    show = ["--model_path", tmp_path / "m.pth", "--layer_num", "0", "--output_dir", tmp_path, "--device", "cpu"]
    assert run(visualize_attention.main, [*show, "--img_num", "3"], capsys)[0] == 0
    assert "the images are 0..3" in run(visualize_attention.main, [*show, "--img_num", "4"], capsys)[2]
    checkpoint = load_checkpoint(tmp_path / "m.pth")
    for key, value in (("test_size", "a"), ("test_size", -1.0), ("test_files", 3), ("test_folder", "../..")):
        damaged = checkpoint | {"data": checkpoint["data"] | {key: value}}
        torch.save(damaged, tmp_path / "d.pth")
        with pytest.raises(BadInput, match=f"data.{key} is missing or not as training writes it"):
            load_checkpoint(tmp_path / "d.pth")


def test_no_data_and_no_download(tmp_path, capsys, monkeypatch):
    """One line that says what is there and what is expected."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    picture().save(tmp_path / "files" / "0.png")
    (tmp_path / "CIFAR10" / "notes").mkdir(parents=True)
    (tmp_path / "Kaggle" / "Training").mkdir(parents=True)
    (tmp_path / "Kaggle" / "Testing").mkdir()
    (tmp_path / "file").write_bytes(b"")
    folder_of_images(tmp_path / "classes", [""])
    before = sorted(tmp_path.rglob("*"))
    for argv, words in (
        (["absent"], ["no folder absent/train", "absent does not exist", "train/<class>/"]),
        (["files"], ["no folder files/train", "files has 0.png", "train/<class>/"]),
        (["CIFAR10"], ["no folder CIFAR10/train", "CIFAR10 has notes/"]),
        (["Kaggle"], ["no folder Kaggle/train", "Kaggle has Testing/, Training/"]),
        (["file"], ["file is no folder"]),
        (["files", "--data_set", "CIFAR10"], ["no CIFAR10 in files (files has 0.png)", "nothing is downloaded"]),
        (["file", "--data_set", "CIFAR100"], ["file is no folder"]),
    ):
        status, out, err = run(cifar_main.main, [*TINY, "--model_path", "m/m.pth", "--data_path", *argv], capsys)
        assert (status, out, len(err.splitlines())) == (2, "", 1), (out, err)
        assert all(word in err for word in words), err
    status, _, err = run(main_distillation.main, ["--data_path", "classes", "--output_dir", "m"], capsys)
    assert status == 2 and "no folder classes/train" in err and "--data_set FOLDER" in err, err
    assert [file for file in sorted(tmp_path.rglob("*")) if file.name != "m"] == before


def test_a_download_goes_where_nothing_else_is(tmp_path, monkeypatch):
    asked = []

    def offline(url, root, **_):
        asked.append(str(root))
        root.mkdir(exist_ok=True)
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".gitkeep").write_bytes(b"")
    (tmp_path / "both" / "cifar-10-batches-py").mkdir(parents=True)
    for place in ("absent", "empty", "both"):
        with pytest.raises(BadInput, match="cannot be downloaded"):
            read_split("CIFAR100", tmp_path / place, True, (32, 32))
    assert asked == [str(tmp_path / place) for place in ("absent", "empty", "both")]
    assert [folder.name for folder in sorted(tmp_path.iterdir())] == ["both", "empty"]  # as it was


def test_the_default_holds_out_one_image_of_each_class(tmp_path):
    labels = torch.tensor([0] * 190 + [1] * 7 + [2] * 3)
    data = Split(torch.arange(200), labels)
    kept, held = datasets.held_out("IMNET", {"train": data}, ["ant", "bee", "cow"], None)
    assert set(held.labels.tolist()) == {0, 1, 2}
    assert len(held) <= 5 and sorted([*kept.images.tolist(), *held.images.tolist()]) == list(range(200))
    assert torch.equal(labels[held.images], held.labels)
    root = folder_of_images(tmp_path, ["train", "val"], [str(k) for k in range(20)], 2)
    data = load_file_data("IMNET", root, (8, 8))  # 1 % of 40 images are none
    assert torch.bincount(data.val.labels).tolist() == torch.bincount(data.train.labels).tolist() == [1] * 20


def test_what_cannot_be_held_out_is_said_in_our_words(tmp_path):
    root = folder_of_images(tmp_path, ["train", "val"], count=5)
    for size in (1, 9, 0.01, 0.95, 10, 11):
        with pytest.raises(BadInput, match=rf"--val_size {size} .*of each of the 2 classes .*give 2 to 8$"):
            load_file_data("IMNET", root, (8, 8), val_size=size)
    for i in range(1, 5):
        (root / "train" / "bee" / f"{i}.png").unlink()
    for load in (load_data, load_file_data):
        with pytest.raises(BadInput, match=r"^class bee has 1 image, and one of each class is held out; add some, or"):
            load("IMNET", root, (8, 8))
        assert load("IMNET", root, (8, 8), val_size=0).val is None
    alone = folder_of_images(tmp_path / "alone", [""], count=1)
    with pytest.raises(BadInput, match=r"^class ant has 1 image, and one of each class is held out; add some$"):
        load_data("FOLDER", alone, (8, 8))
