"""The loader of images in memory."""

import numpy as np
import pytest
import torch

import datasets
from datasets import Split
from forked import differences
from images import DATA, some_images
from loading.memory import CHUNK, MemoryLoader, TrainTransform


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


@pytest.mark.parametrize("first", [0, 1, 5, 9, 10])
def test_a_loader_begins_anywhere(first, monkeypatch):

    monkeypatch.setitem(CHUNK, "cpu", 3 * 16 * 16 * 12)  # three batches of four images in a piece
    split = datasets.Split(torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8), torch.arange(40))
    data = {"input_size": (16, 16), "mean": [0.5] * 3, "std": [0.2] * 3}
    loader = MemoryLoader(split, data, 4, TrainTransform(data), seed=3)
    loader.set_epoch(2)
    batches = list(loader)
    loader.set_epoch(2, first)
    rest = list(loader)
    assert len(loader) == len(batches) == 10 and len(rest) == 10 - first
    assert differences(rest, batches[first:]) == []
