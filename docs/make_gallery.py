"""Every picture of docs/gallery: pages drawn by commands, and a contact sheet of all kinds of pages.

    make demo && make sweep
    python docs/make_gallery.py --weights dinov2_vits14.safetensors

Takes the models of the demo (--demo FOLDER) and of a sweep (--sweep FOLDER), and DINOv2's ViT-S/14, whose weights timm
downloads where --weights names no file. Needs pdftoppm (poppler) and chromium. A picture whose source is missing is
left out, and reported; on a sheet its place is empty.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
CELL, TEXT, COLUMNS = (330, 250), 36, 4  # pixels of a picture on the sheet, and of the text under it
DINO = "--model_path timm:vit_small_patch14_dinov2 --input_size 224"
ANALYSIS = "analyze_tokens.py {model} --ablate registers --num_images 360"
# What it shows; its command, whose pages go to a folder; the file that is shown; its page, or the width of the window.
KINDS = [
    ("heads of a block", f"visualize_attention.py {DINO} --image_path {{photo}} --layer_num 11", "*.pdf", 1),
    ("over the photo", f"visualize_attention.py {DINO} --image_path {{photo}} --layer_num 11 --overlay", "*.pdf", 1),
    ("native shape", f"visualize_attention.py {DINO} --image_path {{photo}} --layer_num 11 --fit native", "*.pdf", 1),
    ("logarithmic", f"visualize_attention.py {DINO} --image_path {{photo}} --layer_num 8 --log", "*.pdf", 1),
    ("through the blocks", f"visualize_attention.py {DINO} --image_path {{photo}} --pages blocks", "*.pdf", 1),
    ("rollout", f"visualize_attention.py {DINO} --image_path {{photo}} --pages rollout", "*.pdf", 1),
    ("all tokens of a block", "visualize_attention.py {model} --layer_num 5 --pages tokens", "*.pdf", 1),
    ("for a class", "visualize_attention.py {model} --pages class", "*.pdf", 1),
    ("two models", "visualize_attention.py --compare {file} {other} --layer_num 5", "*.pdf", 1),
    ("viewer, 1400 pixels", f"visualize_attention.py {DINO} --image_path {{photo}} --format html", "*.html", 1400),
    ("viewer, 390 pixels", "visualize_attention.py {model} --format html", "*.html", 390),
    ("viewer, two models", "visualize_attention.py --compare {file} {other} --format html", "*.html", 1400),
    ("objects", f"discover_objects.py {DINO} --image_path {{photos}}", "*.pdf", 1),
    *((f"statistics, page {n}", ANALYSIS, "*.pdf", n) for n in range(1, 7)),
    ("confusions", "cifar_test.py {model} --confusion --errors", "confusion.pdf", 1),
    ("surest errors", "cifar_test.py {model} --confusion --errors", "errors.pdf", 1),
    ("a sweep", "", "{sweep}/sweep.pdf", 1),
    ("a sweep, its maps", "", "{sweep}/sweep.pdf", -1),
    ("a sweep to explore", "", "{sweep}/sweep.html", 1400),
    ("curves", "", "{demo}/training_curves.pdf", 1),
    ("a film", "", "{demo}/attention/attention.pdf", -1),
]
# The file in docs/gallery; its command, file and page as above; its width in pixels (None: a film, as it is).
PICTURES = [
    ("blocks.png", f"visualize_attention.py {DINO.replace('224', '224x336')} --image_path {{photo}} "
     "--layer_num 2 5 8 11 --pages blocks", "*.pdf", 1, 950),
    ("viewer.png", f"visualize_attention.py {DINO} --image_path {{photos}} --layer_num all --format html", "*.html",
     1280, 1280),
    ("where_attention_goes.png", ANALYSIS, "*.pdf", 5, 950),
    ("read_outs.png", ANALYSIS, "*.pdf", 7, 950),
    ("objects.png", f"discover_objects.py {DINO} --image_path {{photos}}", "*.pdf", 1, 1160),
    ("positions.png", "", "{sweep}/sweep.pdf", 1, 1160),
    ("film.webp", "", "{demo}/attention/attention_cls.gif", 1, None),
    ("../attention_demo.png", "visualize_attention.py {model} --layer_num 5", "*.pdf", 1, 950),
]  # fmt: skip


def picture(file: Path, which, folder: Path) -> Image.Image:
    """A page of a PDF (-1: the last one), or an HTML file in a window of so many pixels."""
    if file.suffix == ".html":
        shot = folder / "shot.png"
        size = f"--window-size={which},{1000 if which > 500 else 844}"
        chromium = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", size, "--virtual-time-budget=5000"]
        subprocess.run([*chromium, f"--screenshot={shot}", file.resolve().as_uri()], check=True, capture_output=True)
        return Image.open(shot).convert("RGB")
    subprocess.run(["pdftoppm", "-r", "150", "-png", file, folder / "page"], check=True)
    pages = sorted(folder.glob("page*.png"))
    return Image.open(pages[which - 1 if which > 0 else which]).convert("RGB")


class Pages:
    """The files that commands write; each command runs once."""

    def __init__(self, weights, values):
        self.weights, self.values, self.folders = weights, values, {}

    def file(self, command, name) -> Path | None:
        """The first file of the command (where it is empty: the file) that is called so, None without one."""
        if not command:
            files = [Path(name.format(**self.values))]
            return files[0] if files[0].exists() else None
        if command not in self.folders:
            folder = self.folders[command] = Path(tempfile.mkdtemp())
            words = [word.format(**self.values) for word in shlex.split(command)]
            words += ["--weights", self.weights] if self.weights and "timm:" in command else []
            run = [sys.executable, *words, "--output_dir", str(folder)]
            done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                print(f"{' '.join(words)}: {done.stderr.strip()}")
        return next(iter(sorted(self.folders[command].glob(name))), None)

    def picture(self, title, command, name, which) -> Image.Image | None:
        """The picture of one of `KINDS`, None where its source is missing."""
        file = self.file(command, name)
        if file is None:
            print(f"left out: {title}")
            return None
        with tempfile.TemporaryDirectory() as scratch:
            return picture(file, which, Path(scratch))


def sheet(pages: Pages) -> Image.Image:
    """All kinds of pages in rows, each with its command; one whose source is missing is an empty place."""
    font = ImageFont.load_default(12)
    cell_w, cell_h = CELL[0] + 16, CELL[1] + TEXT + 16
    page = Image.new("RGB", (COLUMNS * cell_w, -(-len(KINDS) // COLUMNS) * cell_h), "white")
    draw = ImageDraw.Draw(page)
    for n, kind in enumerate(KINDS):
        left, top = n % COLUMNS * cell_w + 8, n // COLUMNS * cell_h + 8
        command = kind[1].replace(f"{DINO} --image_path", "").format(**dict.fromkeys(pages.values, "..."))
        image = pages.picture(*kind)
        if image is None:
            image, command = Image.new("RGB", CELL, "#eee"), "not there"
        image.thumbnail(CELL, Image.Resampling.LANCZOS)
        page.paste(image, (left, top))
        draw.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline="#bbb")
        draw.text((left, top + CELL[1] + 3), kind[0], "black", font)
        draw.text((left, top + CELL[1] + 19), command[:54], "#666", font)
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", default="demo")
    parser.add_argument("--other", help="a second model, for two side by side (default: the demo's)")
    parser.add_argument("--sweep", default="sweeps/digits")
    parser.add_argument("--photo", default="docs/cat.jpg")
    parser.add_argument("--photos", default="docs/cat.jpg", help="a folder, for objects and the viewer")
    parser.add_argument("--weights", help="file of DINOv2's ViT-S/14")
    parser.add_argument("--only", nargs="+", help="names of pictures, such as film.webp (default: all)")
    parser.add_argument("--output_dir", default=ROOT / "docs" / "gallery", type=Path)
    args = parser.parse_args()
    model = Path(args.demo, "best_model.pth").resolve()
    values = {
        "photo": Path(args.photo).resolve(), "photos": Path(args.photos).resolve(), "file": model,
        "model": f"--model_path={model}", "other": Path(args.other or model).resolve(),
        "sweep": Path(args.sweep).resolve(), "demo": Path(args.demo).resolve(),
    }  # fmt: skip
    pages = Pages(args.weights, values)
    wanted = args.only or [*(name for name, *_ in PICTURES), "contact_sheet.jpg"]
    for name, *source, width in PICTURES:
        if name not in wanted:
            continue
        if width is None:
            with Image.open(pages.file(*source[:2])) as film:  # the same pixels in a third of the bytes
                film.save(args.output_dir / name, save_all=True, lossless=True, method=6)
        elif (image := pages.picture(name, *source)) is not None:
            image.thumbnail((width, 9999), Image.Resampling.LANCZOS)
            few = image.quantize(256, method=Image.Quantize.MAXCOVERAGE)  # others lose the colours of thin lines
            image.quantize(palette=few, dither=Image.Dither.NONE).save(args.output_dir / name, optimize=True)
    for name in wanted:
        if name == "contact_sheet.jpg":
            sheet(pages).save(args.output_dir / name, quality=60, optimize=True)


if __name__ == "__main__":
    main()
