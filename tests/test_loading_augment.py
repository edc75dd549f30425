"""Augmentation of images in memory, image by image."""

import math

import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms import RandAugment, TrivialAugmentWide

from images import DATA, seeded, some_images
from loading import augment
from loading.memory import TrainTransform


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
