"""Data sets, augmentation image by image, the loader."""

import math
import pickle

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import RandAugment, TrivialAugmentWide

import augment
import datasets
from conftest import tiny  # noqa: F401  (sets the number of threads)
from datasets import Loader, Split, TrainTransform, crop_box, load_data, read_image, read_split
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
        loader = Loader(numbered(23), data, 4, rank=rank, world_size=world_size)
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
    loader = Loader(numbered(count), DATA | {"input_size": (4, 4)}, batch_size, transform=Labels(), seed=seed, **kwargs)
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
        loader = Loader(
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
    images, found, classes = read_split(name, tmp_path, False, (32, 32))
    assert classes == ["cat", "dog"]
    assert torch.equal(images, torch.from_numpy(pixels.reshape(20, 3, 32, 32)))
    assert found.tolist() == [0, 1] * 10


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
    assert datasets.detect_data_set("./data/CIFAR100") == "CIFAR100"
    assert datasets.detect_data_set(tmp_path / "anything") == "CIFAR10"
    assert datasets.detect_data_set(photos) == "FOLDER"
    (tmp_path / "CIFAR100" / "train" / "cat").mkdir(parents=True)  # what lies there decides, not the name
    assert datasets.detect_data_set(tmp_path / "CIFAR100") == "FOLDER"


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
    found = datasets.fit_image(Image.fromarray(wide), (10, 10))
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
