"""Images that are read one at a time: the loader of main_distillation.py, its transforms and worker processes."""

import multiprocessing
import os
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import utils
from checkpoints.files import load_checkpoint
from datasets import Split, find_split, normalise
from forked import Child, children_of, script
from images import damage, folder_of_images, names
from inspection.inputs import InputImage, as_seen, model_input
from loading import files
from loading.decode import fit_image, read_image, read_picture
from loading.files import FileLoader, load_file_data, picture_transform, readable
from loading.memory import read_split
from main_distillation import main
from runs import ROOT, TINY, run, typed
from visualize_attention import main as visualize

DATA = {
    "input_size": (8, 12), "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "crop_pct": 1.0, "interpolation": "bicubic"
}  # fmt: skip


CPU = torch.device("cpu")


PLAIN = dict(aa="none", color_jitter=0, hflip=0.0, interpolation="bicubic", none=True)


def split(count=20, side=16) -> Split:
    """Noise; the label of an image is its number."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count))


def photograph(width=120, height=80):
    """Smooth, as photographs are."""
    y, x = np.mgrid[0:height, 0:width]
    values = [np.sin(x / 9) + np.cos(y / 7), np.cos(x / 5), np.sin((x + y) / 11)]
    return Image.fromarray((np.stack(values, -1) * 60 + 128).clip(0, 255).astype(np.uint8))


def training(**kwargs):
    transform = picture_transform((8, 12), **({"aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "hflip": 0.5,
                                               "interpolation": "random"} | kwargs.pop("transform", {})))  # fmt: skip
    return FileLoader(split(), DATA, 4, CPU, transform, **({"seed": 1} | kwargs))


def drawn(loader, epoch=0):
    loader.set_epoch(epoch)
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


# The loader ------------------------------------------------------------------------------------------------------


def test_draws_are_a_function_of_seed_and_epoch():
    """Not of the number of workers, nor of what was drawn before; and the global generators are left alone."""
    loader = training()
    first = drawn(loader, 3)
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with_workers = training(workers=2)
    drawn(with_workers, 0)  # workers that have an epoch behind them
    for other in (drawn(with_workers, 3), drawn(training(), 3)):
        assert all(torch.equal(a, b) for a, b in zip(first, other))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    for other in (drawn(loader, 4), drawn(training(seed=2), 3)):
        assert not torch.equal(first[1], other[1])
        assert sorted(other[1].tolist()) == list(range(20))


def test_processes_share_the_epoch():
    """The same order cut up, so that together they see what one would; as many batches in each."""
    alone = drawn(training())[1].tolist()
    shares = [drawn(training(rank=r, world_size=2))[1].tolist() for r in range(2)]
    assert shares == [alone[0::2][:8], alone[1::2][:8]]
    images = [drawn(training(rank=r, world_size=2, repeats=3))[0] for r in range(2)]
    assert not torch.equal(*images)


def test_repeated_augmentation():
    """Three draws of each image that is taken, all different, also below 256 images; the seed matters."""
    images, labels = drawn(training(repeats=3))
    counts = Counter(labels.tolist())
    assert len(labels) == 20 and sorted(counts.values()) == [2, 3, 3, 3, 3, 3, 3]
    one = images[labels == next(n for n, count in counts.items() if count == 3)]
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[1], one[2])
    assert not torch.equal(labels, drawn(training(repeats=3, seed=2))[1])
    assert not torch.equal(labels, drawn(training(repeats=3), epoch=1)[1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_counts_every_image_once(world_size):
    loaders = [FileLoader(split(7), DATA, 2, CPU, rank=r, world_size=world_size) for r in range(world_size)]
    parts = [(len(loader), list(loader)) for loader in loaders]
    assert all(length == len(batches) for length, batches in parts)
    labels = [label for _, batches in parts for _, part in batches for label in part.tolist()]
    assert sorted(labels) == list(range(7))


def test_an_evaluated_image_is_cropped_resized_and_normalised():
    (images, _), *_ = FileLoader(split(2), DATA | {"crop_pct": 0.75}, 2, CPU)
    picture = read_picture(split(2), 1)
    expected = picture.resize((12, 8), Image.Resampling.BICUBIC, (2, 4, 14, 12))
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    assert torch.allclose(images[1], normalise(expected, DATA["mean"], DATA["std"]), atol=1e-5)


def test_few_images_make_a_small_even_batch():
    transform = picture_transform((8, 12), **PLAIN)
    loader = FileLoader(split(7), DATA, 64, CPU, transform)
    assert loader.batch_size == 6 and len(loader) == 1
    assert next(iter(loader))[0].shape == (6, 3, 8, 12)


def test_erasing_leaves_noise():
    """In a rectangle of some images; never in evaluation."""
    plain, erased = (drawn(training(transform=PLAIN, reprob=p))[0] for p in (0.0, 1.0))
    changed = (plain != erased).any(dim=1)
    share = changed.float().mean(dim=(1, 2))
    assert (share > 0).all() and (share < 0.6).all()
    evaluated = (next(iter(FileLoader(split(2), DATA, 2, CPU, reprob=p)))[0] for p in (0.0, 1.0))
    assert torch.equal(*evaluated)


# Transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (256, 128)])
def test_the_crop_is_timms(size):
    """Resize to 64 and crop 56 of it, in one step: the same pixels, but for a border that looks beyond the crop."""
    picture = photograph(*size)
    theirs = create_transform((56, 56), crop_pct=0.875, interpolation="bicubic", normalize=False)(picture)
    ours = fit_image(picture, (56, 56), 0.875)
    difference = (ours.int() - theirs.int()).abs()
    assert difference[:, 2:-2, 2:-2].max() <= 1
    assert (ours.int() - fit_image(picture, (56, 56)).int()).abs().max() > 20


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_interpolation_of_evaluation(interpolation):
    picture = photograph(64, 64)
    expected = picture.resize((32, 32), Image.Resampling[interpolation.upper()])
    assert torch.equal(
        fit_image(picture, (32, 32), 1.0, interpolation), torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    )


def test_simple_random_crop():
    """The shorter side is resized, and a window cut out, at most 4 pixels beyond the border, which is mirrored."""
    picture = photograph(60, 30)
    transform = picture_transform((20, 20), **(PLAIN | {"none": False}), simple_crop=True)
    whole = np.array(picture.resize((40, 20), Image.Resampling.BICUBIC))
    padded = np.pad(whole, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {padded[y : y + 20, x : x + 20].tobytes(): (y, x) for y in range(9) for x in range(29)}
    torch.manual_seed(0)
    found = {windows[transform(picture).permute(1, 2, 0).numpy().tobytes()] for _ in range(30)}
    assert len({y for y, _ in found}) > 4 and len({x for _, x in found}) > 10


def test_three_augment():
    """Grey, solarized or blurred, one of the three each time; colours are jittered too if asked for."""
    picture = photograph(32, 32)
    setting = PLAIN | {"none": False, "aa": "rand-m9"}
    transform = picture_transform((32, 32), **setting, three_augment=True, simple_crop=True)
    seen = Counter()
    for _ in range(60):
        image = transform(picture).int()
        grey = bool((image[0] == image[1]).all())
        seen["grey" if grey else "inverted" if image.float().mean() < 100 else "blurred"] += 1
    assert set(seen) == {"grey", "inverted", "blurred"} and min(seen.values()) > 5, seen
    jittered = picture_transform((32, 32), **(setting | {"color_jitter": 0.8}), three_augment=True, simple_crop=True)
    assert max(jittered(picture).float().mean().item() for _ in range(30)) > 150


def test_no_augmentation_is_the_whole_image():
    picture = photograph()
    assert torch.equal(picture_transform((16, 24), **PLAIN)(picture), fit_image(picture, (16, 24)))


# Data sets -------------------------------------------------------------------------------------------------------


def test_imnet_is_a_folder_with_train_and_val(photos, tmp_path):
    (tmp_path / "train").symlink_to(photos / "train")
    (tmp_path / "val").symlink_to(photos / "test")
    data = load_file_data("IMNET", tmp_path, (16, 24), val_size=4, crop_pct=0.9)
    assert data.classes == ["blue", "red"]
    assert data.description()["images"] == {"train": 16, "val": 4, "test": 6}
    assert (data.description()["crop_pct"], data.description()["interpolation"]) == (0.9, "bicubic")
    assert isinstance(data.train.images, np.ndarray)  # names, not pixels
    assert read_picture(data.test, 0).getpixel((0, 0)) == (0, 0, 200)
    everything = load_file_data("IMNET", tmp_path, (16, 24), val_size=0)
    assert everything.val is None and len(everything.train) == 20
    split, _ = read_split("IMNET", tmp_path, False, (16, 24))
    assert split.images.shape == (6, 3, 16, 24) and split.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_page_shows_the_part_that_is_cropped():
    data, picture = DATA | {"crop_pct": 0.5}, photograph(120, 80)
    asked = InputImage("name", lambda: picture)
    expected = normalise(fit_image(picture, (8, 12), 0.5)[None], data["mean"], data["std"])
    assert torch.equal(model_input([picture], [asked], data), expected)
    assert torch.equal(
        as_seen(picture, asked, data), torch.from_numpy(np.array(picture.crop((30, 20, 90, 60)))).permute(2, 0, 1)
    )


def test_the_page_shows_what_the_model_saw(tmp_path, capsys, photos):
    """A checkpoint of main_distillation.py: its test image is cropped as in evaluation."""

    argv = (
        "--model dynamic_vit_cifar --embed_dim 24 --depth 2 --num_heads 2 --patch_size 8 --input_size 16 --max_steps 1"
    )
    argv = [*argv.split(), "--data_set", "FOLDER", "--data_path", photos, "--batch_size", "4", "--device", "cpu"]
    assert run(main, [*argv, "--num_workers", "0", "--output_dir", tmp_path], capsys)[0] == 0
    argv = ["--model_path", tmp_path / "best_checkpoint.pth", "--output_dir", tmp_path, "--layer_num", "1"]
    status, out, err = run(visualize, [*argv, "--img_num", "4", "--device", "cpu"], capsys)
    assert status == 0, err
    assert "attention_FOLDER_test4_block1.pdf: cls, reg0" in out
    assert "there is no image 6; the images are 0..5" in run(visualize, [*argv, "--img_num", "6"], capsys)[2]


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
        readable(split, "train", classes, at_once=3)
    assert sorted(read) == sorted(names(split))
    assert sorted(i for errors in found for i in errors) == [1, 14, 15] and len(found) == 8


# Worker processes: a run ends when its work ends, with the right status --------------------------------------------

WORKERS = [*"--data_set FOLDER --model dynamic_vit_cifar --input_size 32 --num_workers 1".split(), *TINY]
SOON = 30  # seconds from the last line to the end of the process: 10 are promised, tests share a slow machine


@pytest.fixture
def start(tmp_path, photos):
    """A function that starts a training with worker processes."""
    begun = []

    def start(*argv, method="fork", data=photos):
        argv = [*WORKERS, "--data_path", data, *"--batch_size 4 --val_size 4 --output_dir run".split(), *argv]
        child = Child(
            argv, script("main_distillation.py"), lambda: multiprocessing.set_start_method(method, force=True),
            cwd=tmp_path, ends=True,
        )  # fmt: skip
        begun.append(child)
        return child

    yield start
    for child in begun:
        child.kill(group=True)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_stopped_then_resumed_to_the_end(start, tmp_path, photos, method):
    """A signal to the whole process group costs no step and no worker; the resumed run ends by itself."""
    child = start(*"--epochs 1000 --val_size 0".split(), method=method)
    child.until("epoch 2/")
    child.kill(signal.SIGTERM, group=True)
    status, _, err = child.end(SOON)
    assert status == 128 + signal.SIGTERM and len(err.splitlines()) == 1, err
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert saved["step"] > 0
    more = ["--epochs", str(saved["epoch"] + 2), "--val_size", "0", "--resume", "--overwrite"]
    if method == "fork":  # as a user does: in an interpreter that ends as one does
        argv = [*WORKERS, "--data_path", photos, *"--batch_size 4 --output_dir run".split(), *more]
        out, err = typed(ROOT / "main_distillation.py", *argv, cwd=tmp_path)
    else:
        _, out, err = start(*more, method=method).end(SOON)
    assert err == "" and out.splitlines()[-3].startswith("Accuracy: top-1"), out + err


def test_broken_images_end_the_run(start, tmp_path, photos):
    """One line names all that a batch has."""
    bad = shutil.copytree(photos, tmp_path / "bad")
    broken = [bad / "train" / name for name in ("blue/1.png", "blue/3.png", "red/0.png", "red/2.png", "red/5.png")]
    for file in broken:
        file.write_bytes(file.read_bytes()[:60])
    child = start(*"--epochs 2 --batch_size 18 --val_size 2 --no-repeated-aug".split(), data=bad)
    status, _, err = child.end(SOON)
    assert status == 2 and len(err.splitlines()) == 1 and "Traceback" not in err, err
    assert sum(str(file) in err for file in broken) >= 3 and err.count("error:") == 1


def test_a_killed_worker_ends_the_run(start, curves):
    """While curves are drawn, so that no other worker is handing over a batch, which would fail in its own words."""
    child = start("--epochs", "1000")
    child.until("epoch 1/")
    os.kill(children_of(child.pid)[-1], signal.SIGKILL)
    status, _, err = child.end(SOON)
    assert status == 1 and len(err.splitlines()) == 1, err
    assert "a worker process ended" in err and "--num_workers" in err
