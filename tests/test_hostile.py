"""Broken and hostile files: one line on standard error or the right picture, no code run, no hang, no path out."""

import copy
import gzip
import json
import os
import pickle
import random
import signal
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import analyze_tokens
import cifar_main
import cifar_test
import discover_objects
import visualize_attention
from checkpoints.files import load_checkpoint
from checkpoints.models import model_from_checkpoint
from inspection.pages import write_pdf
from loading.decode import read_image
from loading.memory import read_split
from runs import TINY, run
from sweep.cells import read_record
from training.errors import confusion_figure, print_confusion
from utils import BadInput


@pytest.fixture(autouse=True)
def no_hang():
    def stop(*_):
        pytest.fail("this would hang")  # no Exception, which would count as a damaged file

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def good(trained):
    return torch.load(trained / "model.pth", weights_only=True)


def refused_by_all(path, capsys, *words):
    """Every reader of a checkpoint says one line about it and leaves nothing."""
    out = path.parent / "out"
    for main, argv in (
        (cifar_test.main, ["--model_path", path]),
        (cifar_main.main, ["--eval", "--model_path", path]),
        (cifar_main.main, [*TINY, "--data_set", "DIGITS", "--finetune", path, "--model_path", out / "new.pth"]),
        (visualize_attention.main, ["--model_path", path, "--output_dir", out]),
        (analyze_tokens.main, ["--model_path", path, "--output_dir", out]),
        (discover_objects.main, ["--model_path", path, "--output_dir", out]),
    ):
        status, _, err = run(main, argv, capsys)
        assert (status, len(err.splitlines())) == (2, 1), (main.__module__, err)
        assert all(word in err for word in words), err
    assert not out.exists() or not any(file.is_file() for file in out.rglob("*"))


# Checkpoints as files --------------------------------------------------------------------------------------------


def rezip(source, target, change=lambda name, content: content, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", how) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_cut_anywhere(trained, tmp_path):
    content = (trained / "model.pth").read_bytes()
    for percent in range(0, 100, 10):
        (tmp_path / "m.pth").write_bytes(content[: len(content) * percent // 100])
        with pytest.raises(BadInput, match=r"m\.pth"):
            load_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_bytes(legacy, good, tmp_path):
    """Ten bytes changed at a time: it loads, or is refused."""
    torch.save(good, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    content = (tmp_path / "m.pth").read_bytes()
    for seed in range(40):
        draw, damaged = random.Random(seed), bytearray(content)
        for _ in range(10):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "m.pth").write_bytes(damaged)
        with suppress(BadInput, ValueError):
            model_from_checkpoint(load_checkpoint(tmp_path / "m.pth"))


def number(n):  # as pickle writes it
    return b"\x8a\x08" + n.to_bytes(8, "little")


@pytest.mark.parametrize("count", [2000, 10**12, 2**62])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["storage", "shape", "both"])
@pytest.mark.parametrize("legacy", [False, True])
def test_declared_sizes(count, which, legacy, tmp_path):
    """1,000 numbers are there, `count` are said to be."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)

    def lie(name, content):
        parts = content.split(b"M\xe8\x03")  # 1,000: first of the storage, then of the shape
        assert len(parts) == 3 or not name.endswith("data.pkl")
        first, second = (number(count) if which in (i, 2) else b"M\xe8\x03" for i in (0, 1))
        return parts[0] + first + parts[1] + second + parts[2] if len(parts) == 3 else content

    if legacy:
        (tmp_path / "big.pth").write_bytes(lie("data.pkl", (tmp_path / "m.pth").read_bytes()))
    else:
        rezip(tmp_path / "m.pth", tmp_path / "big.pth", lie)
    with pytest.raises(BadInput, match=r"big\.pth"):
        load_checkpoint(tmp_path / "big.pth")


def test_an_archive_that_unpacks_to_more_than_it_has(tmp_path, capsys):
    torch.save({"a": torch.zeros(4_000_000)}, tmp_path / "m.pth")
    rezip(tmp_path / "m.pth", tmp_path / "packed.pth", how=zipfile.ZIP_DEFLATED)
    refused_by_all(tmp_path / "packed.pth", capsys, "packed.pth", "15 MiB")


def circle():
    values = []
    values.append(values)
    return values


def nested():
    values = []
    for _ in range(100):
        values = [values, values]
    return values


class Covered(OrderedDict):
    """Pickled as an OrderedDict whose `get` is 3."""

    def __reduce__(self):
        return OrderedDict, (), {"get": 3, "items": 3}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (torch.zeros(1).expand(10**12), "more than it has"),
        (torch.zeros(3, device="meta"), "plain values"),
        (torch.zeros(3, 3).to_sparse(), "plain values"),
        (nested(), "more than it has"),
        (circle(), ""),
    ],
    ids=["repeated", "meta", "sparse", "nested", "circle"],
)
def test_values_that_are_not_what_they_seem(value, word, tmp_path, capsys):
    torch.save({"model": {"a": value}}, tmp_path / "m.pth")
    status, _, err = run(cifar_test.main, ["--model_path", tmp_path / "m.pth"], capsys)
    assert (status, len(err.splitlines())) == (2, 1), err
    assert "m.pth" in err and word in err


def test_methods_that_a_file_covers(tmp_path, capsys):
    torch.save({"model": Covered()}, tmp_path / "m.pth")
    refused_by_all(tmp_path / "m.pth", capsys, "m.pth")


# Checkpoints that describe something else -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 10**9}, ["depth is 1000000000", "3 blocks"]),
        ({"embed_dim": 3 * 10**7}, ["pos_embed is 1x16x24"]),
        ({"num_register_tokens": 10**9}, ["register_tokens is 1x2x24"]),
        ({"mlp_ratio": 999.0}, ["mlp.fc1.weight is 48x24"]),
        ({"patch_size": (1, 1)}, ["pos_embed is 1x16x24"]),
        ({"cls_pos": None}, ["cls_token is 1x1x24"]),
        ({"dist_pos": 0}, ["dist_token is missing"]),
        ({"num_heads": -3}, ["num_heads is -3"]),
        ({"no_such": 1}, ["no_such is unknown"]),
        ({"timm_name": "hf-hub:evil/model"}, ["no model hf-hub:evil/model"]),
        ({"timm_name": "local-dir:/etc"}, ["no model local-dir:/etc"]),
        ({"timm_name": "dynamic_vit_cifar"}, ["no model dynamic_vit_cifar"]),
        ({"timm_name": "resnet18"}, ["unknown"]),
    ],
)
def test_model_args_against_the_weights(change, words, good, tmp_path, capsys, monkeypatch):
    """Told before any memory is taken: these models would need up to 10^15 bytes."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network"))
    good["model_args"] |= change
    torch.save(good, tmp_path / "m.pth")
    for main in (cifar_test.main, visualize_attention.main):
        status, _, err = run(main, ["--model_path", tmp_path / "m.pth"], capsys)
        assert (status, len(err.splitlines())) == (2, 1), err
        assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "args",
    [{"pretrained": True}, {"checkpoint_path": "/etc/passwd"}, {"img_size": (99999, 99999)}, {"num_classes": 10**12}],
)
def test_arguments_of_timm(args):
    model_args = {"timm_name": "resnet18", "num_classes": 2} | args
    with pytest.raises(ValueError, match=r"model_args|no such model|timm cannot build"):
        model_from_checkpoint({"model": {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "model_args": model_args})


def test_shapes_of_a_bare_state_dict(good):
    """Each weight in turn is one number, empty, or of another width; then there are 200 empty blocks."""
    state = good["model"]
    changes = [{name: tensor} for name in state for tensor in (torch.zeros(()), torch.zeros(0, 3), torch.ones(7))]
    for change in [*changes, {f"blocks.{i}.norm1.weight": torch.zeros(1) for i in range(200)}, {3: torch.zeros(3)}]:
        with pytest.raises(ValueError, match=r"weights|state dict|lacks"):
            model_from_checkpoint(state | change, num_heads=3)


def test_weights_of_very_many_models():
    """Of each, all names would be read: 4 x 10^10."""
    tensor = torch.zeros(1)
    with pytest.raises(ValueError, match="weights of 200000 models in one dictionary"):
        model_from_checkpoint({f"{i}.patch_embed.proj.weight": tensor for i in range(200_000)}, num_heads=3)


@pytest.mark.parametrize("part", [None, "data", "model_args", "args"])
def test_each_entry_damaged(part, good, tmp_path, capsys):
    """Whatever stands in its place or is missing, a reader tests the model or says one line."""
    names = list(good if part is None else good[part]) if part != "args" else ["epochs", "data_path"]
    tests = ["--model_path", tmp_path / "m.pth"]
    draws = [*tests, "--image_path", tmp_path / "absent.png"]  # so that it ends before it draws
    for name in names:
        for value in ("absent", None, "../../evil", 10**30, [[1], ["a"]], float("nan"), torch.zeros(2)):
            damaged = copy.deepcopy(good)
            inner = damaged if part is None else damaged[part]
            inner[name] = value
            if value == "absent" if isinstance(value, str) else False:
                del inner[name]
            torch.save(damaged, tmp_path / "m.pth")
            for main, argv in ((cifar_test.main, tests), (visualize_attention.main, draws)):
                status, out, err = run(main, argv, capsys)
                assert status in (0, 2), (name, value, err)
                assert len(err.splitlines()) == status // 2, err


def test_a_folder_that_a_checkpoint_names_gets_no_download(good, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network"))
    (tmp_path / "home").mkdir()
    good["data"]["name"], good["args"]["data_path"] = "CIFAR10", str(tmp_path / "home")
    torch.save(good, tmp_path / "m.pth")
    for main in (cifar_test.main, visualize_attention.main):
        status, _, err = run(main, ["--model_path", tmp_path / "m.pth"], capsys)
        assert (status, len(err.splitlines())) == (2, 1), err
        assert "--data_path" in err
    assert not list((tmp_path / "home").iterdir())


def test_class_names_that_are_markup(good, trained, tmp_path, capsys):
    for name in ("</script><script>alert(1)</script>", r"$\frac{$", "\x1b[2J\ud800", "n" * 1000):
        good["data"]["classes"] = [name] * 10
        torch.save(good, tmp_path / "m.pth")
        Image.new("RGB", (32, 32)).save(tmp_path / "i.png")
        argv = ["--model_path", tmp_path / "m.pth", "--image_path", tmp_path / "i.png", "--output_dir", tmp_path]
        for form in ("html", "png"):
            assert run(visualize_attention.main, [*argv, "--format", form], capsys)[0] == 0
        assert "<script>alert" not in (tmp_path / "attention_i.html").read_text()
        counts = np.eye(10, dtype=int)
        print_confusion(counts, good["data"]["classes"], True, True)
        write_pdf([confusion_figure(counts, good["data"]["classes"], name)], tmp_path / "confusion.pdf")
        capsys.readouterr().out.encode()


# No regular file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "dangling", "long"])
def test_no_regular_file(kind, trained, tmp_path, capsys):
    path = tmp_path / f"{'x' * 300 if kind == 'long' else 'x'}.png"
    {
        "pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero"),
        "dangling": lambda: path.symlink_to(tmp_path / "nowhere"), "long": lambda: None,
    }[kind]()  # fmt: skip
    refused_by_all(path, capsys, path.name)
    with pytest.raises(BadInput):
        read_image(path)
    with pytest.raises(BadInput):
        read_record(path)
    if kind != "long":
        argv = ["--model_path", trained / "model.pth", "--annotations", path, "--output_dir", tmp_path]
        assert run(discover_objects.main, argv, capsys)[0] == 2


def test_a_pipe_in_a_folder_of_images(photos, tmp_path, capsys):
    for file in photos.rglob("*.png"):
        (tmp_path / file.relative_to(photos)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.relative_to(photos)).symlink_to(file)
    os.mkfifo(tmp_path / "train" / "red" / "pipe.png")
    argv = [*TINY, "--data_set", "FOLDER", "--data_path", tmp_path, "--model_path", tmp_path / "m.pth"]
    status, _, err = run(cifar_main.main, argv, capsys)
    assert (status, len(err.splitlines())) == (2, 1), err
    assert "pipe.png" in err


# Images -----------------------------------------------------------------------------------------------------------


def test_all_turns_of_exif(tmp_path):
    upright = Image.fromarray(np.arange(6 * 4, dtype=np.uint8).reshape(6, 4) * 10).convert("RGB")
    back = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    for value, turn in {**back, 0: None, 99: None}.items():
        exif = Image.Exif()
        exif[0x0112] = value
        (upright if turn is None else upright.transpose(turn)).save(tmp_path / "i.png", exif=exif)
        assert read_image(tmp_path / "i.png").tobytes() == upright.tobytes(), value


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bits(ending, tmp_path):
    values = np.array([[0, 257, 1000, 12850, 32896, 65534, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"i.{ending}")
    assert np.array(read_image(tmp_path / f"i.{ending}"))[0, :, 2].tolist() == [0, 1, 4, 50, 128, 255, 255]


def test_16_bits_with_a_transparent_value(tmp_path):
    Image.fromarray(np.array([[256, 1000, 59392]], np.uint16)).save(tmp_path / "i.png", transparency=1000)
    assert np.array(read_image(tmp_path / "i.png"))[0, :, 0].tolist() == [1, 255, 231]


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "one.png", transparency=1)
    image.save(tmp_path / "one.gif", transparency=1)
    image.save(tmp_path / "half.png", transparency=bytes([255, 0, 128]))
    for name, last in (("one.png", (0, 0, 200)), ("one.gif", (0, 0, 200)), ("half.png", (127, 127, 227))):
        seen = read_image(tmp_path / name)
        assert [seen.getpixel((x, 0)) for x in range(3)] == [(200, 0, 0), (255, 255, 255), last], name


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tiff"])
def test_animations_show_their_first_frame(ending, tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"i.{ending}", save_all=True, append_images=frames[1:])
    red, green, blue = read_image(tmp_path / f"i.{ending}").getpixel((4, 4))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_cut_images(ending, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"i.{ending}")
    content = (tmp_path / f"i.{ending}").read_bytes()
    for percent in range(0, 100, 10):
        (tmp_path / f"i.{ending}").write_bytes(content[: len(content) * percent // 100])
        with pytest.raises(BadInput, match="cannot read the image"):
            read_image(tmp_path / f"i.{ending}")


def png(width, height, content):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def test_bombs(trained, tmp_path, capsys):
    """Sides that the file does not have, and 300 MB of zeros in 300 kB."""
    for name, content in (
        ("declared.png", png(2**31 - 1, 2**31 - 1, b"")),
        ("short.png", png(9000, 9000, b"")),
        ("packed.png", png(10_000, 10_000, bytes(10**8))),
    ):
        (tmp_path / name).write_bytes(content)
        argv = ["--model_path", trained / "model.pth", "--output_dir", tmp_path, "--image_path", tmp_path / name]
        status, _, err = run(visualize_attention.main, argv, capsys)
        assert (status, len(err.splitlines())) == (2, 1), err
        assert name in err


def test_postscript_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Image.new("RGB", (4, 4)).save(tmp_path / "i.eps")
    with pytest.raises(BadInput, match=r"i\.eps"):
        read_image(tmp_path / "i.eps")
    assert not (tmp_path / "executed").exists()


# Archives ---------------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize(("name", "folder", "file"), [
    ("CIFAR10", "cifar-10-batches-py", "data_batch_1"), ("CIFAR100", "cifar-100-python", "train"),
    ("CIFAR10", "cifar-10-batches-py", "batches.meta"),
])  # fmt: skip
def test_a_cifar_file_that_carries_code(name, folder, file, tmp_path):
    (tmp_path / folder).mkdir()
    for each in (file, "test_batch", "test"):
        (tmp_path / folder / each).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    for train in (True, False):
        with pytest.raises(BadInput, match=f"{folder} is damaged"):
            read_split(name, tmp_path, train, (32, 32))
    assert not (tmp_path / "executed").exists()


def test_a_cifar_archive_that_is_not_the_one(tmp_path, monkeypatch):
    """Cut, or with a path that leads out: not unpacked, and there is no network to get another."""

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    root = tmp_path / "data"
    root.mkdir()
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(__file__, "../executed")
    whole = (root / "cifar-10-python.tar.gz").read_bytes()
    for content in (whole, whole[: len(whole) // 2], gzip.compress(b"")):
        (root / "cifar-10-python.tar.gz").write_bytes(content)
        with pytest.raises(BadInput, match="cannot be downloaded"):
            read_split("CIFAR10", root, True, (32, 32))
    assert {file.name for file in tmp_path.rglob("*")} == {"data", "cifar-10-python.tar.gz"}


# JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"cls_pos"', b"\xff\x00", b"[1, 2]", b"3", b"{}", b"[" * 200_000])
def test_damaged_results_of_a_sweep(content, tmp_path):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"result\.json cannot be read.*remove"):
        read_record(tmp_path / "result.json")


def test_a_result_of_a_sweep_with_a_wrong_entry(tmp_path):
    names = ("cls_pos reg_pos num_reg seed val_top1 best_epoch test_top1 test_top5 test_loss test_images params flops "
             "repeats images_per_s train_seconds artefact_share artefacts_begin_at cls_to_patches cls_to_registers "
             "cls_to_itself").split()  # fmt: skip
    record = dict.fromkeys(names, 1)
    (tmp_path / "result.json").write_text(json.dumps(record))
    assert read_record(tmp_path / "result.json") == record
    for name in names:
        for damaged in ({k: v for k, v in record.items() if k != name}, record | {name: "../.."}):
            (tmp_path / "result.json").write_text(json.dumps(damaged))
            with pytest.raises(BadInput, match=f"{name} missing or wrong"):
                read_record(tmp_path / "result.json")


def test_paths_in_annotations_are_only_names(trained, tmp_path, capsys):
    """A file outside the folder of images is neither read nor drawn, whatever `file_name` says."""
    (tmp_path / "set" / "images").mkdir(parents=True)
    for path in (tmp_path / "secret.png", tmp_path / "set" / "images" / "mine.png"):
        Image.new("RGB", (32, 32)).save(path)
    images = [{"id": 1, "file_name": "../../secret.png"}, {"id": 2, "file_name": str(tmp_path / "secret.png")}]
    images += [{"id": 3, "file_name": "../images/mine.png"}]
    boxes = [{"image_id": i, "bbox": [1, 1, 9, 9]} for i in (1, 2, 3)]
    (tmp_path / "set" / "a.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    argv = ["--model_path", trained / "model.pth", "--annotations", tmp_path / "set" / "a.json"]
    assert run(discover_objects.main, [*argv, "--output_dir", tmp_path / "out"], capsys)[0] == 0
    found = json.loads((tmp_path / "out" / "objects.json").read_text())["images"]
    assert [Path(each["file"]).name for each in found] == ["mine.png"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"objects.json", "objects.pdf"}
