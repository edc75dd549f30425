"""Classes of unequal size that count alike: --balance."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from datasets import Split, balanced_draws, class_weights
from images import DATA
from loading.files import FileLoader, picture_transform
from loading.memory import MemoryLoader, TrainTransform
from training.setup import make_mixup_and_loss

LABELS = torch.tensor([0] * 450 + [2] * 50)  # no image of class 1
OF_FILES = DATA | {"input_size": (4, 4), "crop_pct": 1.0, "interpolation": "bicubic"}


def split():
    """The first pixel of an image is the class, the second one its number in it."""
    images = torch.zeros(len(LABELS), 3, 4, 4, dtype=torch.uint8)
    images[:, :, 0, 0], images[:, :, 0, 1] = LABELS[:, None], (torch.arange(len(LABELS)) % 450 % 250)[:, None]
    return Split(images, LABELS)


def loader(kind, **kwargs):
    kwargs = dict(seed=1, balanced=True) | kwargs
    if kind == "memory":
        return MemoryLoader(split(), OF_FILES, 50, TrainTransform(OF_FILES, "none", 0.0, 0.0), **kwargs)
    whole = picture_transform((4, 4), "none", 0, 0.0, "bicubic", none=True)
    return FileLoader(split(), OF_FILES, 50, torch.device("cpu"), whole, **kwargs)


def labels_of(loader, epoch=0, first=0):
    loader.set_epoch(epoch, first)
    return torch.cat([labels for _, labels in loader])


def test_weights():
    assert class_weights(torch.tensor([0, 0, 0, 2]), 4)[[0, 2]].tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
    assert class_weights(LABELS, 3)[LABELS].mean() == pytest.approx(1)
    assert class_weights(LABELS, 3).isfinite().all()  # also times a share of 0


def test_draws_are_of_all_images_of_a_class():
    draws = balanced_draws(LABELS.repeat(100), torch.Generator().manual_seed(0)) % 500
    counts = torch.bincount(draws, minlength=500)
    assert counts[:450].sum() == pytest.approx(25_000, abs=500)  # a standard deviation is 112
    assert counts[450:].min() > 400 and counts[450:].max() < 600 and counts[:450].min() > 20


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_both_loaders_draw_classes_alike(kind):
    rare = (labels_of(loader(kind)) == 2).sum()
    assert rare == pytest.approx(250, abs=45)  # four standard deviations
    assert (labels_of(loader(kind, balanced=False)) == 2).sum() == 50
    assert torch.equal(labels_of(loader(kind), 3), labels_of(loader(kind), 3))
    assert not torch.equal(labels_of(loader(kind), 3), labels_of(loader(kind), 4))
    assert not torch.equal(labels_of(loader(kind)), labels_of(loader(kind, seed=2)))
    assert torch.equal(labels_of(loader(kind), 3)[150:], labels_of(loader(kind), 3, first=3))  # resumed there
    shares = [labels_of(loader(kind, rank=r, world_size=2)) for r in range(2)]
    assert torch.equal(torch.stack(shares, 1).flatten(), labels_of(loader(kind)))


def test_passes_and_repeated_augmentation_take_draws():
    assert (labels_of(loader("memory", passes=2)) == 2).sum() == pytest.approx(500, abs=64)
    loaded = loader("files", repeats=3)
    loaded.set_epoch(0)
    images = torch.cat([images for images, _ in loaded])
    assert len(images) == 500 and (labels_of(loaded) == 2).sum() == pytest.approx(250, abs=80)  # of 167 draws


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("bce", [False, True])
def test_the_weighted_loss_is_the_mean_over_classes(bce, mixed):
    """Over all images; of mixed images, the loss times the shares of the weights of both."""
    args = Namespace(mixup=0.0, cutmix=0.0, smoothing=0.1, bce_loss=bce)
    weights, logits = class_weights(LABELS, 3), torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    _, criterion = make_mixup_and_loss(args, 2, 3, weights)
    if mixed:
        shares = F.one_hot(LABELS, 3) * 0.7 + F.one_hot(LABELS.flip(0), 3) * 0.3
        factors = 0.7 * weights[LABELS] + 0.3 * weights[LABELS.flip(0)]
        labels, targets = shares, shares if bce else shares * 0.9 + 0.1 / 3
    else:
        labels, targets = LABELS, F.one_hot(LABELS, 3) * 0.9 + 0.1 / 3
    if bce:
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    else:
        losses = -(targets * logits.log_softmax(1)).sum(1)
    of_classes = (losses[LABELS == 0].mean() + losses[LABELS == 2].mean()) / 2
    expected = (losses * factors).mean() if mixed else of_classes
    assert criterion(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
