"""Predictions for images without labels: cifar_test.py --predict."""

import csv
import os

import pytest
import torch
from PIL import Image

import cifar_main
import cifar_test
import main_distillation
from checkpoints.models import load_model
from datasets import normalise
from images import damage, folder_of_images
from runs import STUDENT, TINY, run
from training import predictions
from training.scoring import score


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of images, and a checkpoint of each training script."""
    folder, out = (tmp_path_factory.mktemp(name) for name in ("images", "models"))
    folder_of_images(folder, ["train", "test"], ("ant, red", "bee"))
    Image.effect_noise((50, 20), 90).convert("RGB").save(folder / "test" / "bee" / "wide.png")
    same = ["--data_set", "FOLDER", "--data_path", str(folder), *"--epochs 1 --val_size 0 --input_size 16".split()]
    cifar_main.main([*TINY, *same, "--model_path", str(out / "small" / "m.pth")])
    main_distillation.main([*STUDENT, *same, "--batch_size", "2", "--output_dir", str(out)])
    return {"folder": folder, "small": out / "small" / "m.pth", "pictures": out / "best_checkpoint.pth"}


def table(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["small", "pictures"])
def test_rows_are_the_predictions_of_the_test(kind, models, tmp_path, monkeypatch, capsys):
    """Here of labelled images, in batches of 4 of 9; the probabilities are those of the logits."""
    seen = []
    monkeypatch.setattr(predictions, "normalise", lambda images, *a: seen.append(len(images)) or normalise(images, *a))
    out = tmp_path / "new" / "p.csv"
    argv = ["--model_path", models[kind], "--device", "cpu", "--batch_size", 4, "--predictions", out]
    status, said, err = run(cifar_test.main, [*argv, "--predict", models["folder"] / "test"], capsys)
    assert status == 0, err
    assert said == f"{out}: predictions for 9 images\n" and seen == [4, 4, 1]
    rows = table(out)
    assert list(rows[0]) == ["path", "class", "probability", "class_2", "probability_2"]
    assert [row["path"] for row in rows] == [str(p) for p in sorted((models["folder"] / "test").glob("*/*.png"))]
    model, checkpoint = load_model(models[kind])
    logits = []
    model.register_forward_hook(lambda _, __, output: logits.append(output))
    result, _ = score(model, checkpoint, None, torch.device("cpu"), 3, keep_predictions=True)
    classes = checkpoint["data"]["classes"]
    assert [row["class"] for row in rows] == [classes[label] for label in result["predictions"]]
    found = torch.tensor([[float(row["probability"]), float(row["probability_2"])] for row in rows])
    torch.testing.assert_close(found, torch.cat(logits).softmax(1).sort(1, descending=True).values, atol=1e-5, rtol=0)


def test_images_that_cannot_be_read_are_listed(models, tmp_path, capsys):
    """A file whose name is no text has a row; so has one with a comma."""
    folder = folder_of_images(tmp_path, [""], ("a, b",), count=6)
    damage(folder, "a, b/1.png", "a, b/2.png", "a, b/3.png")
    os.rename(folder / "a, b" / "5.png", os.path.join(os.fsencode(folder), b"\xff.png"))
    argv = ["--model_path", models["small"], "--device", "cpu", "--batch_size", 2, "--predictions", tmp_path / "p.csv"]
    status, out, err = run(cifar_test.main, [*argv, "--predict", folder], capsys)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "note: 3 of 6 images cannot be read and are left out:" and "a, b/1.png (" in lines[1]
    assert len(lines) == 5 and lines[-1].endswith("p.csv: predictions for 3 images")
    paths = [row["path"] for row in table(tmp_path / "p.csv")]
    assert paths == [str(folder / "a, b" / name) for name in ("0.png", "4.png")] + [f"{folder}/\udcff.png"]


def test_nothing_to_predict_leaves_the_file_as_it_was(models, tmp_path, capsys):
    (tmp_path / "p.csv").write_text("before")
    folder_of_images(tmp_path, ["bad"], count=1)
    damage(tmp_path / "bad", "ant/0.png", "bee/0.png")
    (tmp_path / "empty").mkdir()
    argv = ["--model_path", models["small"], "--device", "cpu", "--predictions", tmp_path / "p.csv"]
    for name, words in (("bad", "none of the 2 images"), ("empty", "has no images"), ("no", "there is no folder")):
        status, _, err = run(cifar_test.main, [*argv, "--predict", tmp_path / name], capsys)
        assert status == 2 and words in err and len(err.splitlines()) == 1
        assert (tmp_path / "p.csv").read_text() == "before"
    assert not list(tmp_path.glob(".p.csv*"))
