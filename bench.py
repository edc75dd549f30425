"""Measure this machine: python bench.py

Loading: images per second of the in-memory loader against the same operations as PIL transforms (torchvision), both on
one CPU core. Interleaved rounds, medians; a table on the screen, and `--json FILE`.
"""

import json
import time
from statistics import median

import torch

import utils
from datasets import Loader, Split, TrainTransform

DATA = {"input_size": (32, 32), "mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]}


def pil_transform(aug, reprob):
    """What `TrainTransform` does, image by image."""
    from torchvision import transforms

    policy = {"trivial": [transforms.TrivialAugmentWide()], "none": []}[aug]
    erasing = [transforms.RandomErasing(reprob, scale=(0.02, 0.4), ratio=(0.3, 3.3))] if reprob else []
    return transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *policy, transforms.ToTensor(),
        transforms.Normalize(DATA["mean"], DATA["std"]), *erasing,
    ])  # fmt: skip


def rate(iterate, images) -> float:
    start = time.perf_counter()
    iterate()
    return images / (time.perf_counter() - start)


def compare_loading(aug, reprob, rounds, count=6400) -> dict:
    from PIL import Image

    # Noise that was smoothed: as many different values as a photograph, drawn without a data set.
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    images = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear").to(torch.uint8)
    loader = Loader(
        Split(images, torch.zeros(count, dtype=torch.long)), DATA, 128, TrainTransform(DATA, aug, 0.5, reprob)
    )
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:640]]
    transform = pil_transform(aug, reprob)

    def ours():
        for _ in loader:
            pass

    def theirs():
        for start in range(0, len(pictures), 128):
            torch.stack([transform(picture) for picture in pictures[start : start + 128]])

    ours(), theirs()  # warm up
    rates = [(rate(ours, count), rate(theirs, len(pictures))) for _ in range(rounds)]
    ours_median, theirs_median = (median(column) for column in zip(*rates))
    return {"ours": ours_median, "peer": theirs_median, "ratio": median(a / b for a, b in rates)}


def main(argv=None):
    parser = utils.ArgumentParser(description="Measure the loader against PIL transforms, one CPU core each.")
    parser.add_argument("--rounds", type=utils.number(int, 1), default=7)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = {
        "crop, flip, normalise": compare_loading("none", 0.0, args.rounds),
        "full default augmentation": compare_loading("trivial", 0.25, args.rounds),
    }
    print(f"{'images/s at 32 px, one core':30}{'ours':>12}{'PIL':>12}{'ratio':>8}")
    for name, row in rows.items():
        print(f"{name:30}{row['ours']:12,.0f}{row['peer']:12,.0f}{row['ratio']:8.1f}")
    if args.json:
        text = json.dumps({"rows": rows, **utils.environment()}, indent=1)
        utils.write_atomically(args.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    utils.run_script(main)
