"""Images, and folders of them, that tests make."""

import os

import torch
from PIL import Image

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


def damage(root, *places):
    for place in places:
        whole = (root / place).read_bytes()
        (root / place).write_bytes(whole[: len(whole) // 2])
