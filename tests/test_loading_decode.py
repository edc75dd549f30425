"""Image files as people have them: depths, colours, orientation, limits, and files that cannot be read."""

import pickle
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

import cifar_main
import cifar_test
import main_distillation
import utils
import visualize_attention
from images import damage, folder_of_images, names, picture
from loading import folders
from loading.decode import crop_box, fit_image, read_image, read_picture
from loading.files import load_file_data
from loading.folders import image_files
from loading.memory import load_data
from runs import STUDENT, TINY, run
from utils import BadInput


def test_a_photo_is_centre_cropped_the_right_way_round(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:5, 10:20, 0] = 250  # the upper half of the centre is red
    found = fit_image(Image.fromarray(wide), (10, 10))
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


RAMP = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(8, 0)


def deep_png(values, path):
    """(h, w, c) uint16: what Pillow cannot write."""
    h, w, channels = values.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, kind, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def deep_tiff(values, path, order):
    """The same as TIFF of three channels, uncompressed."""
    h, w, _ = values.shape
    entries = [(256, 3, 1, w), (257, 3, 1, h), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 200),
               (277, 3, 1, 3), (278, 3, 1, h), (279, 4, 1, h * w * 6)]  # fmt: skip
    short = order + "HHIHH"
    table = [struct.pack(order + "HHII", *e) if e[1] == 4 or e[2] > 1 else struct.pack(short, *e, 0) for e in entries]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 16)
    content = head + struct.pack(order + "HHHH", 16, 16, 16, 0) + struct.pack(order + "H", len(table)) + b"".join(table)
    path.write_bytes((content + bytes(4)).ljust(200, b"\0") + values.astype(order + "u2").tobytes())


@pytest.mark.parametrize(
    ("values", "ending", "note"),
    [
        (RAMP, "tif", None),
        (RAMP * 65535, "tif", "0 to 65535, of no known range"),
        (RAMP * 3 - 1, "tif", "-1 to 2, of no known range"),
        (np.where(RAMP > 0.99, np.nan, RAMP), "tif", None),
        ((RAMP * 255).astype(np.uint16), "png", "above 255: read as 8 bits"),
        ((RAMP * 1023).astype(np.uint16), "tif", "read as 10 bits"),
        ((RAMP * 4095).astype(np.uint16), "png", "read as 12 bits"),
        ((RAMP * 16383).astype(np.uint16), "tif", "read as 14 bits"),
        ((RAMP * 65535).astype(np.uint16), "png", None),
        ((RAMP * 65535).astype(np.int32), "tif", None),
        ((RAMP * 2e9).astype(np.int32), "tif", "of no known range"),
        ((RAMP * 60000 - 30000).astype(np.int32), "tif", "of no known range"),
        ((RAMP * 65535).astype(np.uint16), "jp2", None),
        ((RAMP * 65535).astype(np.int32), "pgm", None),  # Pillow 10 saves no other 16 bits in it
    ],
)
def test_a_ramp_is_a_ramp_in_any_depth(values, ending, note, tmp_path, capsys, monkeypatch):
    """And a note is printed once where its range is not known."""
    monkeypatch.setattr(utils, "NOTED", {})
    for name in ("a", "b"):
        Image.fromarray(values).save(tmp_path / f"{name}.{ending}")
        seen = np.array(read_image(tmp_path / f"{name}.{ending}"))[0, :, 1].astype(int)
        assert np.abs(seen - np.linspace(0, 255, 64))[np.isfinite(values[0])].max() < 3, seen
    out = capsys.readouterr().out
    assert out.count("note: ") == (note is not None) and (note or "") in out


def test_bits_that_a_tiff_declares(tmp_path, capsys):
    """The largest value that it may have; white is zero in some of them."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 4095
    dark = (RAMP * 200).astype(np.uint16)
    Image.fromarray(dark).save(tmp_path / "a.tif", tiffinfo=tags)
    assert np.array(read_image(tmp_path / "a.tif")).max() == round(200 * 255 / 4095)
    assert capsys.readouterr().out == ""
    down, up = np.linspace(255, 0, 64), np.linspace(0, 255, 64)
    unsigned = (RAMP.astype(np.float64) * 4e9).astype(np.uint32).view(np.int32)
    for values, tag, value, wanted in (((RAMP * 65535).astype(np.uint16), 262, 0, down), (unsigned, 339, 1, up)):
        Image.fromarray(values).save(tmp_path / "b.tif")
        content = bytearray((tmp_path / "b.tif").read_bytes())
        entry = content.index(struct.pack("<HHI", tag, 3, 1))
        content[entry + 8 : entry + 10] = struct.pack("<H", value)
        (tmp_path / "b.tif").write_bytes(content)
        assert np.abs(np.array(read_image(tmp_path / "b.tif"))[0, :, 0] - wanted).max() < 3, tag


@pytest.mark.parametrize(("ending", "kind"), [("pgm", np.int32), ("jp2", np.uint16)])
def test_what_pillow_has_scaled_stays_dark(ending, kind, tmp_path):
    Image.fromarray((RAMP * 4095).astype(kind)).save(tmp_path / f"a.{ending}")
    assert np.array(read_image(tmp_path / f"a.{ending}")).max() == 16


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("most", [255, 4095, 65535])
def test_colours_of_16_bits(channels, most, tmp_path):
    values = np.repeat((RAMP * most).astype(np.uint16)[..., None], channels, axis=2)
    if channels != 3:
        values[..., -1] = 65535  # opaque
    deep_png(values, tmp_path / "a.png")
    deep_tiff(values, tmp_path / "a.tif", "<")
    deep_tiff(values, tmp_path / "b.tif", ">")
    for file in sorted(tmp_path.iterdir()) if channels == 3 else [tmp_path / "a.png"]:
        seen = np.array(read_image(file))
        assert np.abs(seen[0, :, 2] - np.linspace(0, 255, 64)).max() < 3, file


def test_a_wrong_exif_tag_is_no_reason_to_refuse(tmp_path):
    """The picture is turned, though its width is a text; and seen, though its orientation is one."""
    image = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint32).astype(np.uint8).reshape(30, 40, 3))
    cases = (0x0100, 2, "wide", True), (0x0112, 2, "upright", False), (0x0112, 7, b"\6", False)
    for tag, kind, value, turned in cases:
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x0112] = 6
        tags.tagtype[tag] = kind
        tags[tag] = value
        exif = b"Exif\0\0II*\0\x08\0\0\0" + tags.tobytes(8)
        for name in ("a.jpg", "a.png", "a.webp"):
            image.save(tmp_path / name, exif=exif)
            assert read_image(tmp_path / name).size == ((30, 40) if turned else (40, 30)), (name, value)
    damaged = PngImagePlugin.PngInfo()
    damaged.add_text("Raw profile type exif", "\nexif\n2\nno hexadecimal digits")
    image.save(tmp_path / "b.png", pnginfo=damaged)
    assert read_image(tmp_path / "b.png").size == (40, 30)


def test_max_pixels(tmp_path, capsys, trained):
    """Looked at before anything is decoded, by each script that reads files, in worker processes too."""
    root = folder_of_images(tmp_path / "data", ["train", "test"])
    Image.new("L", (200, 100)).save(root / "train" / "ant" / "large.png")
    line = "large.png (20000 pixels are more than --max_pixels 19999); raise that"
    assert read_image(root / "train" / "ant" / "large.png", 20_000).size == (200, 100)
    limit = ["--max_pixels", "19999"]
    train = [*TINY, "--data_set", "FOLDER", "--data_path", root, "--max_steps", "1"]
    with pytest.raises(BadInput, match="20000 pixels are more than --max_pixels 19999"):
        load_data("FOLDER", root, (8, 8), max_pixels=19_999)
    lazy = load_file_data("FOLDER", root, (8, 8), max_pixels=19_999, val_size=2, crop_pct=1.0)
    assert {part.max_pixels for part in (lazy.train, lazy.val, lazy.test)} == {19_999}
    lazy = load_file_data("FOLDER", root, (8, 8), max_pixels=19_999, val_size=0)
    spawned = pickle.loads(pickle.dumps(lazy.train))  # as for a worker process
    with pytest.raises(BadInput, match="20000 pixels are more than --max_pixels 19999"):
        [read_picture(spawned, i) for i in range(len(spawned))]
    status, _, err = run(cifar_main.main, [*train, *limit, "--model_path", tmp_path / "m.pth"], capsys)
    assert status == 2 and "large.png (20000 pixels are more than --max_pixels 19999)" in err, err
    look = ["--model_path", trained / "model.pth", "--device", "cpu", "--output_dir", tmp_path / "out"]
    argv = [*look, "--image_path", root / "train" / "ant" / "large.png", *limit]
    status, _, err = run(visualize_attention.main, argv, capsys)
    assert status == 2 and line in err and len(err.splitlines()) == 1, err
    assert run(cifar_main.main, [*train, "--max_pixels", "20000", "--model_path", tmp_path / "m.pth"], capsys)[0] == 0
    Image.new("L", (200, 100)).save(root / "test" / "ant" / "large.png")
    status, _, err = run(cifar_test.main, ["--model_path", tmp_path / "m.pth", "--device", "cpu", *limit], capsys)
    assert status == 2 and line in err, err


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    root = folder_of_images(tmp_path / "data", ["train", "test"])
    pillow_heif.from_pillow(picture((200, 10, 10), (64, 64))).save(root / "train" / "ant" / "a.heic")
    assert read_image(root / "train" / "ant" / "a.heic").getpixel((30, 30))[0] > 180
    assert "a.heic" in [file.name for file in image_files(root / "train" / "ant")]


def test_heic_without_its_package(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypmif1" + bytes(100))  # renamed, as telephones do
    monkeypatch.setattr(folders, "prepare_pillow", lambda: None)
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in ("HEIF", "AVIF")])
    endings = {k: v for k, v in Image.registered_extensions().items() if v != "HEIF"}
    monkeypatch.setattr(Image, "EXTENSION", endings)
    for name in ("a.heic", "a.jpg"):
        with pytest.raises(BadInput, match=f"{name} \\(HEIC takes a package: pip install pillow-heif\\)"):
            read_image(tmp_path / name)
    left_out = Counter()
    assert image_files(tmp_path, left_out) == [tmp_path / "a.jpg"] and left_out == {".heic": 1}
    folders.note_left_out(tmp_path, left_out)
    assert capsys.readouterr().out.endswith(".heic: 1, and HEIC takes a package: pip install pillow-heif\n")


def test_all_unreadable_images_are_named(tmp_path):
    root = folder_of_images(tmp_path, ["train", "test"], count=30)
    damage(root, *(f"train/ant/{i}.png" for i in range(3)), "test/bee/7.png")
    with pytest.raises(BadInput, match=r"^cannot read 4 images: .*skip leaves out training images") as caught:
        load_data("FOLDER", root, (8, 8))
    assert all(name in str(caught.value) for name in ("ant/0.png", "ant/1.png", "ant/2.png", "test/bee/7.png"))
    with pytest.raises(BadInput, match=r"^cannot read the image \S*7.png .*fix or remove it$"):
        load_data("FOLDER", root, (8, 8), bad_images="skip")
    damage(root, *(f"train/bee/{i}.png" for i in range(30)))
    with pytest.raises(BadInput, match="and 14 more; fix or remove them"):
        load_data("FOLDER", root, (8, 8))


@pytest.mark.parametrize("load", [load_data, load_file_data])
def test_unreadable_training_images_are_left_out(load, tmp_path, capsys):
    root = folder_of_images(tmp_path, ["train", "test"], count=10)
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "train" / "ant" / "cut.jpg")
    damage(root, "train/ant/cut.jpg", "train/bee/1.png")
    data = load("FOLDER", root, (8, 8), bad_images="skip", val_size=0)
    assert len(data.train) == 19
    out = capsys.readouterr().out
    assert "note: 2 of 21 training images cannot be read and are left out:\n" in out
    assert "ant/cut.jpg (image file is truncated" in out and "bee/1.png (" in out
    if load is load_file_data:
        assert not any(file.endswith(("cut.jpg", "bee/1.png")) for file in names(data.train))
    damage(root, *(f"train/ant/{i}.png" for i in range(10)))
    with pytest.raises(BadInput, match="no training image of class ant can be read"):
        load("FOLDER", root, (8, 8), bad_images="skip")
    assert "--bad_images" not in capsys.readouterr().out


def test_main_distillation_leaves_out_unreadable_images(tmp_path, capsys):
    root = folder_of_images(tmp_path / "data", ["train", "test"])
    damage(root, "train/ant/1.png")
    argv = [*STUDENT, "--data_set", "FOLDER", "--data_path", root, "--batch_size", "2", "--max_steps", "1"]
    argv += ["--output_dir", tmp_path / "run", "--bad_images", "skip", "--val_size", "2"]
    status, out, err = run(main_distillation.main, argv, capsys)
    assert status == 0, err
    assert "1 of 8 training images cannot be read" in out and "5 train, 2 val, 8 test images" in out
