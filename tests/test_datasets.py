"""Data sets, augmentation image by image, the loader."""

import math
import os
import pickle
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, PngImagePlugin, TiffImagePlugin
from torchvision.transforms import RandAugment, TrivialAugmentWide

import cifar_main
import cifar_test
import datasets
import main_distillation
import utils
import visualize_attention
from checkpoints.files import load_checkpoint
from conftest import STUDENT, TINY, run
from datasets import Split, find_split, image_files
from inspection import inputs
from loading import augment, files
from loading.decode import crop_box, fit_image, read_image, read_picture
from loading.files import _readable, load_file_data
from loading.memory import MemoryLoader, TrainTransform, load_data, read_split
from utils import BadInput

DATA = {"input_size": (32, 32), "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count=40, h=28, w=36):
    """Noise, smooth images, and one of a single colour."""
    images = torch.randint(256, (count, 3, h, w), generator=seeded()).to(torch.uint8)
    smooth = torch.rand(count // 2, 3, 5, 5, generator=seeded(1)) * 200 + 20
    images[: count // 2] = torch.nn.functional.interpolate(smooth, size=(h, w), mode="bicubic").to(torch.uint8)
    images[0] = 77
    return images


def torchvisions(name, image, m):
    """The same operation on one image."""
    degrees = math.degrees(math.atan(m))
    return {
        "identity": lambda: image,
        "shear_x": lambda: TF.affine(image, 0, [0, 0], 1.0, [degrees, 0.0], center=[0, 0]),
        "shear_y": lambda: TF.affine(image, 0, [0, 0], 1.0, [0.0, degrees], center=[0, 0]),
        "translate_x": lambda: TF.affine(image, 0, [int(m), 0], 1.0, [0.0, 0.0]),
        "translate_y": lambda: TF.affine(image, 0, [0, int(m)], 1.0, [0.0, 0.0]),
        "rotate": lambda: TF.rotate(image, m),
        "brightness": lambda: TF.adjust_brightness(image, 1 + m),
        "color": lambda: TF.adjust_saturation(image, 1 + m),
        "contrast": lambda: TF.adjust_contrast(image, 1 + m),
        "sharpness": lambda: TF.adjust_sharpness(image, 1 + m),
        "posterize": lambda: TF.posterize(image, 8 - round(m)),
        "solarize": lambda: TF.solarize(image, 255 - m),
        "autocontrast": lambda: TF.autocontrast(image),
        "equalize": lambda: TF.equalize(image),
    }[name]()


@pytest.mark.parametrize("name", [name for name in augment.TRIVIAL if name != "identity"])
def test_operations_are_torchvisions_with_a_magnitude_for_each_image(name):
    images = some_images()
    magnitudes = torch.linspace(0, augment.TRIVIAL[name], len(images))
    if name not in ("posterize", "solarize"):
        magnitudes = magnitudes * torch.tensor([1, -1]).repeat(len(images) // 2)
    found = augment.apply_operation(name, images, magnitudes[:, None, None, None])
    expected = torch.stack([torchvisions(name, image, m.item()) for image, m in zip(images, magnitudes)])
    difference = (found.int() - expected.int()).abs()
    if name in augment.WARPS:  # rounding may choose the neighbouring pixel
        assert (difference > 0).float().mean() < 1e-3
    else:
        assert difference.max() <= 1
    assert found.dtype == torch.uint8


@pytest.mark.parametrize(("policy", "theirs"), [("TRIVIAL", TrivialAugmentWide()), ("RAND", RandAugment())])
@pytest.mark.parametrize("size", [(32, 32), (90, 150)])
def test_magnitudes_are_torchvisions_for_images_of_any_size(monkeypatch, policy, theirs, size):
    """Each operation of both policies at each level: the magnitudes that the operation is called with."""
    policy, names = getattr(augment, policy), list(augment.TRIVIAL)
    space = (31, size) if isinstance(theirs, RandAugment) else (31,)
    space = {name.lower(): magnitudes for name, (magnitudes, _) in theirs._augmentation_space(*space).items()}
    assert {name.replace("_", "") for name in names} == space.keys() and list(policy) == names
    called = {}

    def applied(name, images, magnitude):
        called.setdefault(name, magnitude.abs().flatten())
        return images

    monkeypatch.setattr(augment, "apply_operation", applied)
    images = torch.zeros(200, 3, *size, dtype=torch.uint8)
    for level in range(31):
        called.clear()
        augment.random_operation(images, seeded(), policy, level)
        assert called.keys() == set(names) - {"identity"}
        for name, found in called.items():
            their = space[name.replace("_", "")]
            wanted = float(their[level]) if their.ndim else 0.0
            if name == "solarize":
                found = 255 - found
            elif name == "posterize":
                found = 8 - found.round()
            assert found.tolist() == pytest.approx([wanted] * len(found), abs=1e-4), (name, level)


def test_each_image_has_a_draw_of_its_own():
    images = some_images(2).repeat(100, 1, 1, 1)[::2].contiguous()  # 100 equal images
    for aug in ("trivial", "rand", "none"):
        result = TrainTransform(DATA | {"input_size": (28, 36)}, aug)(images, seeded())
        assert len({tuple(image.flatten().tolist()) for image in result}) > 60
    policy = augment.random_operation(images, seeded(), augment.TRIVIAL, None)
    assert 0 < (policy != images).flatten(1).any(1).sum() < 100


def test_crop_and_flip_cut_windows_of_the_padded_image():
    images = some_images(64, 12, 16)
    found = augment.crop_and_flip(images, seeded(), pad=2, hflip=0.5)
    places = set()
    for image, result in zip(images, found):
        padded = torch.nn.functional.pad(image, (2,) * 4)
        matches = {
            (flipped, y, x)
            for y in range(5) for x in range(5) for flipped in (False, True)
            if torch.equal(padded[:, y : y + 12, x : x + 16], result.flip(2) if flipped else result)
        }  # fmt: skip
        assert matches
        places |= matches
    assert len(places) > 25
    unflipped = augment.crop_and_flip(images, seeded(), pad=0, hflip=0)
    assert torch.equal(unflipped, images)
    assert torch.equal(augment.crop_and_flip(images, seeded(), pad=0, hflip=1), images.flip(3))


def test_erasing_sets_one_rectangle_to_the_mean():
    images = torch.ones(400, 3, 32, 32)
    erased = augment.erase(images, seeded(), 0.25) == 0
    assert torch.equal(erased[:, 0], erased[:, 2])
    areas = []
    for mask in erased[:, 0]:
        if mask.any():
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert mask.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            areas.append(mask.float().mean().item())
    assert 60 < len(areas) < 140
    assert min(areas) < 0.1 < 0.3 < max(areas) < 0.45


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


def test_upsampling_keeps_height_and_width():
    found = datasets.eval_transform(some_images(2, 8, 12), DATA | {"input_size": (16, 48)})
    assert found.shape == (2, 3, 16, 48)


def numbered(count):
    """A split whose images can be told apart: image i has the value i in its first channel."""
    images = torch.zeros(count, 3, 4, 4, dtype=torch.uint8)
    images[:, 0] = torch.arange(count)[:, None, None]
    return Split(images, torch.arange(count))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_every_image_once(world_size):
    data = DATA | {"input_size": (4, 4)}
    seen = []
    for rank in range(world_size):
        loader = MemoryLoader(numbered(23), data, 4, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        for images, labels in batches:
            assert torch.equal(images, datasets.eval_transform(numbered(23).images[labels], data))
            seen += labels.tolist()
    assert sorted(seen) == list(range(23))


class Labels:
    """A transform that does nothing, to look at the order."""

    def __call__(self, images, generator):
        return images.float()


def order(seed=0, epoch=0, count=100, batch_size=8, **kwargs):
    loader = MemoryLoader(
        numbered(count), DATA | {"input_size": (4, 4)}, batch_size, transform=Labels(), seed=seed, **kwargs
    )
    loader.set_epoch(epoch)
    batches = [labels.tolist() for _, labels in loader]
    assert len(batches) == len(loader)
    return [label for batch in batches for label in batch]


def test_training_order():
    assert order() == order()
    assert order(seed=1) != order() != order(epoch=1)
    assert len(order()) == 96  # the incomplete batch is dropped
    assert len(set(order())) == 96
    three = order(passes=3)
    assert len(three) == 296
    assert set(three[:100]) == set(three[100:200]) == set(range(100))
    shares = [order(world_size=2, rank=r) for r in range(2)]
    assert not set(shares[0]) & set(shares[1])
    assert len(shares[0]) == len(shares[1]) == 48


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_fewer_images_than_a_batch_still_train(count):
    assert len(order(count=count, batch_size=128)) == max(count - count % 2, 1)


def test_a_fraction_of_a_pass():
    """All images twice, then a quarter of them; a part too small for a batch is still an image for each process."""
    for world_size in (1, 2):
        drawn = [order(count=40, batch_size=5, passes=2.25, world_size=world_size, rank=r) for r in range(world_size)]
        assert len({len(part) for part in drawn}) == 1
        assert sorted(np.bincount(np.concatenate(drawn), minlength=40)) == [2] * 30 + [3] * 10
    assert len(order(count=40, passes=1e-3, world_size=2, rank=1)) == 1


def test_augmentation_depends_on_seed_and_epoch_only():
    split = Split(some_images(20, 8, 8), torch.arange(20))

    def first(seed, epoch):
        loader = MemoryLoader(
            split, DATA | {"input_size": (8, 8)}, 20, transform=TrainTransform(DATA | {"input_size": (8, 8)}), seed=seed
        )
        loader.set_epoch(epoch)
        images, labels = next(iter(loader))
        return images[labels.argsort()]

    assert torch.equal(first(0, 3), first(0, 3))
    assert not torch.equal(first(0, 3), first(0, 4))
    assert not torch.equal(first(0, 3), first(1, 3))


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


def test_a_photo_is_centre_cropped_the_right_way_round(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:5, 10:20, 0] = 250  # the upper half of the centre is red
    found = fit_image(Image.fromarray(wide), (10, 10))
    assert found[0, :4].min() > 200
    assert found[0, 6:].max() < 50


def test_pictures_of_every_kind_look_right(tmp_path):
    left_red = np.zeros((20, 40, 3), np.uint8)
    left_red[:, :20] = (255, 0, 0)
    image = Image.fromarray(left_red)
    image.save(tmp_path / "plain.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    image.convert("P").save(tmp_path / "palette.gif")
    image.save(tmp_path / "web.webp", lossless=True)
    image.save(tmp_path / "two.tiff", save_all=True, append_images=[image.rotate(180)])
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn right by 90 degrees to see it"
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    for file in sorted(tmp_path.iterdir()):
        seen = read_image(file)
        assert seen.size == (40, 20), file
        assert seen.getpixel((5, 10))[0] > 180 > 90 > seen.getpixel((5, 10))[2], file
        assert max(seen.getpixel((35, 10))) < 60, file
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "deep.png")  # 16 bits, mid grey
    assert abs(read_image(tmp_path / "deep.png").getpixel((1, 1))[0] - 128) <= 1
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:60])
    with pytest.raises(BadInput, match=r"cut\.png"):
        read_image(tmp_path / "cut.png")


def test_the_crop_stays_inside_the_image_whatever_the_rounding():
    for width in range(1, 80):
        for size in ((224, 224), (7, 13), (97, 31)):
            left, upper, right, lower = crop_box(width, 61, size)
            assert 0 <= left < right <= width
            assert 0 <= upper < lower <= 61
            assert (right - left) / (lower - upper) == pytest.approx(size[1] / size[0])


# Folders as people have them --------------------------------------------------------------------------------------


def picture(colour="teal", size=(12, 10)):
    return Image.new("RGB", size, colour)


def folder_of_images(root, parts, classes=("ant", "bee"), count=4):
    """`root/part/class/0.png`, ..., all of different colours; a part '' is `root` itself."""
    for p, part in enumerate(parts):
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture((p * 50 + 10, k * 100 + 20, i * 5)).save(root / part / name / f"{i}.png")
    return root


def names(split):
    return [os.fsdecode(file) for file in split.images.tolist()]


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


def test_a_model_of_class_folders_is_tested_on_the_same_images(tmp_path, capsys):
    root = folder_of_images(tmp_path / "data", [""], count=10)
    argv = [*TINY, "--data_path", root, "--test_size", "0.2", "--max_steps", "1", "--model_path", tmp_path / "m.pth"]
    status, out, err = run(cifar_main.main, argv, capsys)
    assert status == 0, err
    assert "14 train, 2 val, 4 test images" in out and "on 4 images of FOLDER" in out
    last = out.splitlines()[-1]
    assert run(cifar_test.main, ["--model_path", tmp_path / "m.pth", "--device", "cpu"], capsys)[1].strip() == last
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
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".gitkeep").write_bytes(b"")
    (tmp_path / "both" / "cifar-10-batches-py").mkdir(parents=True)
    for place in ("absent", "empty", "both"):
        with pytest.raises(BadInput, match="cannot be downloaded"):
            read_split("CIFAR100", tmp_path / place, True, (32, 32))
    assert asked == [str(tmp_path / place) for place in ("absent", "empty", "both")]


# What is held out -------------------------------------------------------------------------------------------------


def test_the_default_holds_out_one_image_of_each_class(tmp_path):
    labels = torch.tensor([0] * 190 + [1] * 7 + [2] * 3)
    data = Split(torch.arange(200), labels)
    kept, held = datasets._hold_out(data, ["ant", "bee", "cow"], 0.01, "--val_size", of_each_class=True)
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


# Image files as people have them ----------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(8, 0)


def deep_png(values, path):
    """(h, w, c) uint16: what Pillow cannot write."""
    h, w, channels = values.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, kind, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def deep_tiff(values, path, order):
    """The same as TIFF of three channels, uncompressed."""
    h, w, _ = values.shape
    entries = [(256, 3, 1, w), (257, 3, 1, h), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 200),
               (277, 3, 1, 3), (278, 3, 1, h), (279, 4, 1, h * w * 6)]  # fmt: skip
    short = order + "HHIHH"
    table = [struct.pack(order + "HHII", *e) if e[1] == 4 or e[2] > 1 else struct.pack(short, *e, 0) for e in entries]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 16)
    content = head + struct.pack(order + "HHHH", 16, 16, 16, 0) + struct.pack(order + "H", len(table)) + b"".join(table)
    path.write_bytes((content + bytes(4)).ljust(200, b"\0") + values.astype(order + "u2").tobytes())


@pytest.mark.parametrize(
    ("values", "ending", "note"),
    [
        (RAMP, "tif", None),
        (RAMP * 65535, "tif", "0 to 65535, of no known range"),
        (RAMP * 3 - 1, "tif", "-1 to 2, of no known range"),
        (np.where(RAMP > 0.99, np.nan, RAMP), "tif", None),
        ((RAMP * 255).astype(np.uint16), "png", "above 255: read as 8 bits"),
        ((RAMP * 1023).astype(np.uint16), "tif", "read as 10 bits"),
        ((RAMP * 4095).astype(np.uint16), "png", "read as 12 bits"),
        ((RAMP * 16383).astype(np.uint16), "tif", "read as 14 bits"),
        ((RAMP * 65535).astype(np.uint16), "png", None),
        ((RAMP * 65535).astype(np.int32), "tif", None),
        ((RAMP * 2e9).astype(np.int32), "tif", "of no known range"),
        ((RAMP * 60000 - 30000).astype(np.int32), "tif", "of no known range"),
        ((RAMP * 65535).astype(np.uint16), "jp2", None),
        ((RAMP * 65535).astype(np.uint16), "pgm", None),
    ],
)
def test_a_ramp_is_a_ramp_in_any_depth(values, ending, note, tmp_path, capsys, monkeypatch):
    """And a note is printed once where its range is not known."""
    monkeypatch.setattr(datasets, "_NOTED", {})
    for name in ("a", "b"):
        Image.fromarray(values).save(tmp_path / f"{name}.{ending}")
        seen = np.array(read_image(tmp_path / f"{name}.{ending}"))[0, :, 1].astype(int)
        assert np.abs(seen - np.linspace(0, 255, 64))[np.isfinite(values[0])].max() < 3, seen
    out = capsys.readouterr().out
    assert out.count("note: ") == (note is not None) and (note or "") in out


def test_bits_that_a_tiff_declares(tmp_path, capsys):
    """The largest value that it may have; white is zero in some of them."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 4095
    dark = (RAMP * 200).astype(np.uint16)
    Image.fromarray(dark).save(tmp_path / "a.tif", tiffinfo=tags)
    assert np.array(read_image(tmp_path / "a.tif")).max() == round(200 * 255 / 4095)
    assert capsys.readouterr().out == ""
    down, up = np.linspace(255, 0, 64), np.linspace(0, 255, 64)
    unsigned = (RAMP.astype(np.float64) * 4e9).astype(np.uint32).view(np.int32)
    for values, tag, value, wanted in (((RAMP * 65535).astype(np.uint16), 262, 0, down), (unsigned, 339, 1, up)):
        Image.fromarray(values).save(tmp_path / "b.tif")
        content = bytearray((tmp_path / "b.tif").read_bytes())
        entry = content.index(struct.pack("<HHI", tag, 3, 1))
        content[entry + 8 : entry + 10] = struct.pack("<H", value)
        (tmp_path / "b.tif").write_bytes(content)
        assert np.abs(np.array(read_image(tmp_path / "b.tif"))[0, :, 0] - wanted).max() < 3, tag


@pytest.mark.parametrize("ending", ["pgm", "jp2"])
def test_what_pillow_has_scaled_stays_dark(ending, tmp_path):
    Image.fromarray((RAMP * 4095).astype(np.uint16)).save(tmp_path / f"a.{ending}")
    assert np.array(read_image(tmp_path / f"a.{ending}")).max() == 16


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("most", [255, 4095, 65535])
def test_colours_of_16_bits(channels, most, tmp_path):
    values = np.repeat((RAMP * most).astype(np.uint16)[..., None], channels, axis=2)
    if channels != 3:
        values[..., -1] = 65535  # opaque
    deep_png(values, tmp_path / "a.png")
    deep_tiff(values, tmp_path / "a.tif", "<")
    deep_tiff(values, tmp_path / "b.tif", ">")
    for file in sorted(tmp_path.iterdir()) if channels == 3 else [tmp_path / "a.png"]:
        seen = np.array(read_image(file))
        assert np.abs(seen[0, :, 2] - np.linspace(0, 255, 64)).max() < 3, file


def test_a_wrong_exif_tag_is_no_reason_to_refuse(tmp_path):
    """The picture is turned, though its width is a text; and seen, though its orientation is one."""
    image = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint32).astype(np.uint8).reshape(30, 40, 3))
    cases = (0x0100, 2, "wide", True), (0x0112, 2, "upright", False), (0x0112, 7, b"\6", False)
    for tag, kind, value, turned in cases:
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = 6
        tags.tagtype[tag] = kind
        tags[tag] = value
        exif = b"Exif\0\0II*\0\x08\0\0\0" + tags.tobytes(8)
        for name in ("a.jpg", "a.png", "a.webp"):
            image.save(tmp_path / name, exif=exif)
            assert read_image(tmp_path / name).size == ((30, 40) if turned else (40, 30)), (name, value)
    damaged = PngImagePlugin.PngInfo()
    damaged.add_text("Raw profile type exif", "\nexif\n2\nno hexadecimal digits")
    image.save(tmp_path / "b.png", pnginfo=damaged)
    assert read_image(tmp_path / "b.png").size == (40, 30)


def test_max_pixels(tmp_path, capsys, trained):
    """Looked at before anything is decoded, by each script that reads files, in worker processes too."""
    root = folder_of_images(tmp_path / "data", ["train", "test"])
    Image.new("L", (200, 100)).save(root / "train" / "ant" / "large.png")
    line = "large.png (20000 pixels are more than --max_pixels 19999); raise that"
    assert read_image(root / "train" / "ant" / "large.png", 20_000).size == (200, 100)
    limit = ["--max_pixels", "19999"]
    train = [*TINY, "--data_set", "FOLDER", "--data_path", root, "--max_steps", "1"]
    with pytest.raises(BadInput, match="20000 pixels are more than --max_pixels 19999"):
        load_data("FOLDER", root, (8, 8), max_pixels=19_999)
    lazy = load_file_data("FOLDER", root, (8, 8), max_pixels=19_999, val_size=2, crop_pct=1.0)
    assert {part.max_pixels for part in (lazy.train, lazy.val, lazy.test)} == {19_999}
    lazy = load_file_data("FOLDER", root, (8, 8), max_pixels=19_999, val_size=0)
    spawned = pickle.loads(pickle.dumps(lazy.train))  # as for a worker process
    with pytest.raises(BadInput, match="20000 pixels are more than --max_pixels 19999"):
        [read_picture(spawned, i) for i in range(len(spawned))]
    status, _, err = run(cifar_main.main, [*train, *limit, "--model_path", tmp_path / "m.pth"], capsys)
    assert status == 2 and "large.png (20000 pixels are more than --max_pixels 19999)" in err, err
    look = ["--model_path", trained / "model.pth", "--device", "cpu", "--output_dir", tmp_path / "out"]
    argv = [*look, "--image_path", root / "train" / "ant" / "large.png", *limit]
    status, _, err = run(visualize_attention.main, argv, capsys)
    assert status == 2 and line in err and len(err.splitlines()) == 1, err
    assert run(cifar_main.main, [*train, "--max_pixels", "20000", "--model_path", tmp_path / "m.pth"], capsys)[0] == 0
    Image.new("L", (200, 100)).save(root / "test" / "ant" / "large.png")
    status, _, err = run(cifar_test.main, ["--model_path", tmp_path / "m.pth", "--device", "cpu", *limit], capsys)
    assert status == 2 and line in err, err


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    root = folder_of_images(tmp_path / "data", ["train", "test"])
    pillow_heif.from_pillow(picture((200, 10, 10), (64, 64))).save(root / "train" / "ant" / "a.heic")
    assert read_image(root / "train" / "ant" / "a.heic").getpixel((30, 30))[0] > 180
    assert "a.heic" in [file.name for file in image_files(root / "train" / "ant")]


def test_heic_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypmif1" + bytes(100))  # renamed, as telephones do
    monkeypatch.setattr(datasets, "_pillow", lambda: Image)
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in ("HEIF", "AVIF")])
    endings = {k: v for k, v in Image.registered_extensions().items() if v != "HEIF"}
    monkeypatch.setattr(Image, "EXTENSION", endings)
    for name in ("a.heic", "a.jpg"):
        with pytest.raises(BadInput, match=f"{name} \\(HEIC takes a package: pip install pillow-heif\\)"):
            read_image(tmp_path / name)
    left_out = Counter()
    assert image_files(tmp_path, left_out) == [tmp_path / "a.jpg"] and left_out == {".heic": 1}
    assert datasets._words(left_out).endswith(".heic: 1, and HEIC takes a package: pip install pillow-heif")


# Images that cannot be read ---------------------------------------------------------------------------------------


def damage(root, *places):
    for place in places:
        whole = (root / place).read_bytes()
        (root / place).write_bytes(whole[: len(whole) // 2])


def test_all_unreadable_images_are_named(tmp_path):
    root = folder_of_images(tmp_path, ["train", "test"], count=30)
    damage(root, *(f"train/ant/{i}.png" for i in range(3)), "test/bee/7.png")
    with pytest.raises(BadInput, match=r"^cannot read 4 images: .*skip leaves out training images") as caught:
        load_data("FOLDER", root, (8, 8))
    assert all(name in str(caught.value) for name in ("ant/0.png", "ant/1.png", "ant/2.png", "test/bee/7.png"))
    with pytest.raises(BadInput, match=r"^cannot read the image \S*7.png .*fix or remove it$"):
        load_data("FOLDER", root, (8, 8), bad_images="skip")
    damage(root, *(f"train/bee/{i}.png" for i in range(30)))
    with pytest.raises(BadInput, match="and 14 more; fix or remove them"):
        load_data("FOLDER", root, (8, 8))


@pytest.mark.parametrize("load", [load_data, load_file_data])
def test_unreadable_training_images_are_left_out(load, tmp_path, capsys):
    root = folder_of_images(tmp_path, ["train", "test"], count=10)
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "train" / "ant" / "cut.jpg")
    damage(root, "train/ant/cut.jpg", "train/bee/1.png")
    data = load("FOLDER", root, (8, 8), bad_images="skip", val_size=0)
    assert len(data.train) == 19
    out = capsys.readouterr().out
    assert "note: 2 of 21 training images cannot be read and are left out:\n" in out
    assert "ant/cut.jpg (image file is truncated" in out and "bee/1.png (" in out
    if load is load_file_data:
        assert not any(file.endswith(("cut.jpg", "bee/1.png")) for file in names(data.train))
    damage(root, *(f"train/ant/{i}.png" for i in range(10)))
    with pytest.raises(BadInput, match="no training image of class ant can be read"):
        load("FOLDER", root, (8, 8), bad_images="skip")
    assert "--bad_images" not in capsys.readouterr().out


def test_processes_share_the_search_for_unreadable_images(tmp_path, monkeypatch):
    root = folder_of_images(tmp_path, ["train", "test"], count=10)
    damage(root, "train/ant/1.png", "train/bee/4.png", "train/bee/5.png")
    split, classes = find_split("FOLDER", root, True)
    read, found = [], []
    monkeypatch.setattr(
        files, "read_image", lambda *args, **kwargs: read.append(args[0]) or read_image(*args, **kwargs)
    )
    monkeypatch.setattr(utils, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(utils, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(utils, "gather", lambda value: found.append(value) or [value])
        _readable(split, "train", classes, at_once=3)
    assert sorted(read) == sorted(names(split))
    assert sorted(i for errors in found for i in errors) == [1, 14, 15] and len(found) == 8


def test_main_distillation_leaves_out_unreadable_images(tmp_path, capsys):
    root = folder_of_images(tmp_path / "data", ["train", "test"])
    damage(root, "train/ant/1.png")
    argv = [*STUDENT, "--data_set", "FOLDER", "--data_path", root, "--batch_size", "2", "--max_steps", "1"]
    argv += ["--output_dir", tmp_path / "run", "--bad_images", "skip", "--val_size", "2"]
    status, out, err = run(main_distillation.main, argv, capsys)
    assert status == 0, err
    assert "1 of 8 training images cannot be read" in out and "5 train, 2 val, 8 test images" in out
