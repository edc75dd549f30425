"""Maps drawn during training: `--viz_every` and `--viz_images` of both training scripts."""

import argparse
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pypdf import PdfReader

import cifar_main
import main_distillation
from checkpoints.files import load_checkpoint
from checkpoints.models import model_from_checkpoint
from inspection.strips import Group, Strip, draw_strips
from loading.files import FileLoader, load_file_data
from loading.memory import MemoryLoader, load_data
from pages import no_overlaps
from runs import STUDENT, TINY, killed_in_epoch_3, run
from training import film
from training.run_log import read_json_lines, run_name

# In full precision, since training in bfloat16 on CPUs has attention that is not fused, which rounds otherwise.
DIGITS = [*TINY, *"--data_set DIGITS --amp off --cls_pos 2 --reg_pos 1 --num_reg 1 --repeats 1 --drop_path 0.2".split()]
THREE = [*DIGITS, "--epochs", "3", "--viz_every", "2", "--viz_images", "7", "1"]


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def names(folder):
    return sorted(file.name for file in (folder / "attention").iterdir())


def words(folder):
    """Of each page of the film."""
    pages = PdfReader(folder / "attention" / "attention.pdf").pages
    return [" ".join(page.extract_text().split()) for page in pages]


def check_maps(file, model, images):
    """The arrays are the model's attention, mean over heads, and its logits; NaN where a token is absent."""
    maps = model.attention_maps(images, range(model.depth))
    with np.load(file) as saved:
        for block, of_block in maps.items():
            there = {"cls": of_block.cls, "dist": of_block.dist}
            for r in range(model.num_register_tokens):
                there[f"reg{r}"] = None if of_block.registers is None else of_block.registers[:, r]
            for key, heads in there.items():
                if key == "dist" and model.dist_pos is None:
                    assert key not in saved
                elif heads is None:
                    assert np.isnan(saved[key][:, block]).all()
                else:
                    assert np.array_equal(saved[key][:, block], heads.mean(dim=1).numpy()), (key, block)
        with torch.no_grad():
            assert np.array_equal(saved["logits"], model(images).numpy())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three epochs with averaged weights, maps of two images, a register from block 1 and CLS from 2 on."""
    folder = tmp_path_factory.mktemp("whole")
    cifar_main.main([*THREE, "--ema", "0.9", "--model_path", str(folder / "m.pth")])
    return folder


def test_what_is_written(whole):
    epochs, kinds = ["0000", "0002", "0003"], ["cls", "reg0"]
    expected = [f"epoch_{epoch}.{kind}" for epoch in epochs for kind in ("npz", "png")]
    assert names(whole) == sorted([*expected, "attention.pdf", *(f"attention_{kind}.gif" for kind in kinds)])
    pages = words(whole)
    assert len(pages) == 3  # of an epoch: a row for each token below each image
    for page, epoch in zip(pages, (0, 2, 3)):
        assert f"{whole.name}: epoch {epoch} of 3" in page
        assert "held-out images 7, 1 of DIGITS; EMA weights" in page and "mean over heads" in page
        assert page.count("Class token to ") == page.count("Register 0 (of 1) to ") == 2  # and the scale
        assert page.count("block ") == 3
    with np.load(whole / "attention" / "epoch_0003.npz") as saved:
        assert saved["images"].tolist() == [7, 1] and int(saved["epoch"]) == 3
        for caption in saved["captions"]:
            assert all(line in pages[2] for line in str(caption).split("\n"))
    for kind in kinds:
        with Image.open(whole / "attention" / f"attention_{kind}.gif") as animation:
            assert animation.n_frames == 3 and animation.info["loop"] == 0
            durations = []
            for i in range(3):
                animation.seek(i)
                durations.append(animation.info["duration"])
            assert durations == [film.FRAME_MS] * 2 + [film.LAST_MS]


def test_the_maps_are_those_of_the_saved_weights(whole):
    """Of the averaged ones, which are validated and saved, at the last epoch."""
    checkpoint = load_checkpoint(whole / "checkpoint.pth")
    val = load_data("DIGITS", None, (32, 32)).val
    images = torch.cat([images for images, _ in MemoryLoader(val, checkpoint["data"], 64)])[[7, 1]]
    check_maps(
        whole / "attention" / "epoch_0003.npz", model_from_checkpoint(checkpoint | {"model": checkpoint["ema"]}), images
    )
    with np.load(whole / "attention" / "epoch_0003.npz") as saved:
        assert saved["labels"].tolist() == val.labels[[7, 1]].tolist()
        assert np.array_equal(saved["pictures"], val.images[[7, 1]].numpy())


def test_pictures_and_the_distillation_token(trained, tmp_path, capsys):
    argv = [*STUDENT, *"--amp off --cls_pos 1 --dist_pos 2 --num_reg 0 --epochs 1 --max_steps 3 --viz_images 2".split()]
    argv += ["--distillation_type", "hard", "--teacher_path", trained / "model.pth"]
    argv += ["--viz_every", "5", "--output_dir", tmp_path]
    status, out, err = run(main_distillation.main, argv, capsys)
    assert status == 0, err
    assert f"wrote {tmp_path / 'attention' / 'epoch_0001.png'}" in out
    assert "attention.pdf and attention_cls.gif, attention_dist.gif: 2 epochs" in out
    pages = words(tmp_path)
    assert len(pages) == 2
    assert ": epoch 1 of 1" in pages[1] and "Distillation token to " in pages[1]
    checkpoint = load_checkpoint(tmp_path / "best_checkpoint.pth")
    val = load_file_data("DIGITS", None, (32, 32), None, 1.0).val
    images, _ = next(iter(FileLoader(val, checkpoint["data"], 3, torch.device("cpu"))))
    check_maps(tmp_path / "attention" / "epoch_0001.npz", model_from_checkpoint(checkpoint), images[2:])


def test_drawing_changes_nothing(tmp_path, capsys):
    argv = [*DIGITS, "--epochs", "2", "--num_reg", "0"]
    for name, more in (("without", []), ("with", ["--viz_every", "1", "--viz_images", "0"])):
        assert run(cifar_main.main, [*argv, *more, "--model_path", tmp_path / name / "m.pth"], capsys)[0] == 0
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("without", "with"))
    assert all(torch.equal(t, other["model"][n]) for n, t in one["model"].items())
    states = [checkpoint["processes"][0]["random"] for checkpoint in (one, other)]
    assert torch.equal(*(state["torch"] for state in states))
    assert [states[0][kind] for kind in ("python", "numpy")] == [states[1][kind] for kind in ("python", "numpy")]
    logs = [read_json_lines(tmp_path / name / "log.txt")[1:] for name in ("without", "with")]
    for a, b in zip(*logs, strict=True):
        for key in ("train_loss", "grad_norm", "lr", "val_loss", "val_top1", "step"):
            assert a[key] == b[key]
    assert not (tmp_path / "without" / "attention").exists()


def test_a_resumed_run_has_the_whole_film(whole, tmp_path, monkeypatch, capsys):
    argv = [*THREE, "--ema", "0.9", "--model_path", tmp_path / "m.pth"]

    killed_in_epoch_3(cifar_main.main, argv)
    maps = tmp_path / "attention"
    assert names(tmp_path) == ["epoch_0000.npz", "epoch_0000.png", "epoch_0002.npz", "epoch_0002.png"]
    before = contents(tmp_path)
    status, _, err = run(cifar_main.main, [*argv, "--resume", "--viz_images", "3"], capsys)
    assert status == 2
    assert "give --viz_images 7 1, or move its folder away" in err
    assert contents(tmp_path) == before

    for kind in ("npz", "png"):
        shutil.copy(maps / f"epoch_0002.{kind}", maps / f"epoch_0009.{kind}")  # of a longer run that was here before
    (maps / "epoch_0002.npz").unlink()  # killed between saving and drawing
    assert run(cifar_main.main, [*argv, "--resume"], capsys)[0] == 0
    assert names(tmp_path) == names(whole)
    for file in whole.glob("attention/*.npz"):
        with np.load(file) as one, np.load(maps / file.name) as other:
            assert all(np.array_equal(one[key], other[key], equal_nan=key in ("cls", "reg0")) for key in one)


def test_maps_of_an_overwritten_run_are_removed(whole, tmp_path, capsys):
    """Also by a run that draws none; other files stay."""
    maps = tmp_path / "attention"
    shutil.copytree(whole / "attention", maps)
    others = {"notes.txt", "attention_DIGITS_test0_block2.pdf", "epoch_2.npz", "my_epoch_0002.npz"}
    for name in others:
        (maps / name).write_text("mine")
    argv = [*DIGITS, "--epochs", "1", "--max_steps", "1", "--overwrite", "--model_path", tmp_path / "m.pth"]
    assert run(cifar_main.main, argv, capsys)[0] == 0
    assert set(names(tmp_path)) == others


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        (cifar_main, ["--viz_every", "0"], "argument --viz_every: must be at least 1, not 0"),
        (cifar_main, ["--viz_images", "1"], "also give --viz_every N"),
        (cifar_main, ["--viz_every", "1", "--val_size", "0"], "--val_size 0 holds none out; leave out one of the two"),
        (cifar_main, ["--viz_every", "1", "--viz_images", "144"], "no such image, the held-out images are 0..143"),
        (cifar_main, ["--viz_every", "1", "--cls_pos", "none", "--num_reg", "0"], "this model has none; give --num_"),
        (main_distillation, ["--viz_every", "1"], "cannot draw timm's models; leave it out"),
    ],
)
def test_nothing_to_draw_is_said_before_training(script, argv, message, trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "attention").mkdir()
    (folder / "attention" / "epoch_0001.npz").write_text("of the run before")
    before = contents(folder)
    if script is cifar_main:
        argv = [*DIGITS, *argv, "--model_path", folder / "model.pth", "--overwrite"]
    else:
        argv = [*argv, *"--data_set DIGITS --model resnet10t --input_size 32 --num_workers 0 --device cpu".split()]
        argv += ["--output_dir", folder, "--overwrite"]
    status, _, err = run(script.main, argv, capsys)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert message in err
    assert contents(folder) == before


def test_one_scale_a_token_and_not_too_many_frames_pages_and_bytes(whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "attention", tmp_path / "attention")
    drawn, draw_strips = [], film.draw_strips

    def kept(title, about, columns, groups):
        drawn.append((title, groups))
        figure = draw_strips(title, about, columns, groups)
        no_overlaps(figure)
        return figure

    monkeypatch.setattr(film, "draw_strips", kept)
    for name, value in dict(FRAMES=2, PAGES=2, GIF_BYTES=11_000).items():
        monkeypatch.setattr(film, name, value)
    film.write_film(argparse.Namespace(output_dir=tmp_path, viz_every=2, epochs=3))
    assert [title for title, _ in drawn[:2]] == [f"{run_name(tmp_path)}: epoch {n} of 3" for n in (0, 3)]
    saved = [dict(np.load(whole / "attention" / f"epoch_000{epoch}.npz")) for epoch in (0, 2, 3)]
    tops = {key: np.nanpercentile([one[key] for one in saved], 99) for key in ("cls", "reg0")}
    for strips in (group.strips for _, groups in drawn[:2] for group in groups):
        assert [strip.top for strip in strips] == pytest.approx([*tops.values()])
        absent = [[np.isnan(m).all() for m in strip.maps] for strip in strips]
        assert absent == [[True, True, False], [True, False, False]]
    for key in tops:
        file = tmp_path / "attention" / f"attention_{key}.gif"
        assert file.stat().st_size <= 11_000
        with Image.open(file) as animation:
            assert animation.n_frames <= 2
    assert len(words(tmp_path)) == 2


def test_a_page_has_few_rows_and_the_last_epoch_is_shown():
    assert [list(part) for part in film.pages_of(4, 5)] == [[0, 1], [2, 3]]
    assert [list(part) for part in film.pages_of(2, 17)] == [[0], [1]]
    assert film.spread([*range(7)], 3) == [0, 3, 6] and film.spread([*range(7)], 1) == [6]
    maps = np.random.default_rng(0).random((12, 4, 4))
    maps[:3] = np.nan  # absent
    strips = [Strip(f"Register {r} (of 16)", maps, 0.5) for r in range(17)]
    no_overlaps(draw_strips("x", "y", [f"block {b}" for b in range(12)], [Group("z", np.zeros((3, 9, 9)), strips)]))


@pytest.mark.filterwarnings("error")
def test_names_of_folders_that_are_no_letters_here_and_no_tex():
    strip = Strip("a", np.ones((1, 2, 2)), 1.0)
    figure = draw_strips("猫 $^$", "about", ["block 0"], [Group("a", np.zeros((3, 8, 8), np.uint8), [strip])])
    assert film.rendered(figure).ndim == 3
