"""A contact sheet of every kind of page, each drawn by the command under it: docs/gallery/contact_sheet.jpg.

    make demo && make sweep
    python docs/make_gallery.py --weights dinov2_vits14.safetensors

Takes the models of the demo (--demo FOLDER) and of a sweep (--sweep FOLDER), and DINOv2's ViT-S/14, whose weights timm
downloads where --weights names no file. Needs pdftoppm (poppler) and chromium. A picture whose source is missing is
left out, and reported.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
CELL, LINES, COLUMNS = (560, 420), 2, 4  # pixels of a picture on the sheet; lines of text under it
DINO = "--model_path timm:vit_small_patch14_dinov2 --input_size 224"
# What it shows; its command, where {o} is a folder for its pages; the file that is shown, and which page.
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
    *(
        (f"statistics, page {n}", "analyze_tokens.py {model} --ablate registers --num_images 200", "*.pdf", n)
        for n in range(1, 7)
    ),
    ("confusions", "cifar_test.py {model} --confusion --errors", "confusion.pdf", 1),
    ("surest errors", "cifar_test.py {model} --confusion --errors", "errors.pdf", 1),
    ("a sweep", "", "{sweep}/sweep.pdf", 1),
    ("a sweep, its maps", "", "{sweep}/sweep.pdf", -1),
    ("a sweep to explore", "", "{sweep}/sweep.html", 1400),
    ("curves", "", "{demo}/training_curves.pdf", 1),
    ("a film", "", "{demo}/attention/attention.pdf", 1),
]


def picture(file: Path, which, folder: Path) -> Image.Image:
    """A page of a PDF (-1: the last one), or an HTML file in a window of so many pixels."""
    if file.suffix == ".html":
        shot = folder / "shot.png"
        size = f"--window-size={which},{1000 if which > 500 else 844}"
        chromium = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", size, "--virtual-time-budget=5000"]
        subprocess.run([*chromium, f"--screenshot={shot}", file.resolve().as_uri()], check=True, capture_output=True)
        return Image.open(shot).convert("RGB")
    subprocess.run(["pdftoppm", "-r", "110", "-png", file, folder / "page"], check=True)
    pages = sorted(folder.glob("page*.png"))
    return Image.open(pages[which - 1 if which > 0 else which]).convert("RGB")


def drawn(kind, values, weights, pages: dict) -> Image.Image | None:
    """The picture of one of `KINDS`, None where its source is missing; `pages`: {command: folder}, of what has run."""
    title, command, name, which = kind
    if command and command not in pages:
        folder = pages[command] = Path(tempfile.mkdtemp())
        words = [word.format(**values) for word in shlex.split(command)]
        words += ["--weights", weights] if weights and "timm:" in command else []
        run = [sys.executable, *words, "--output_dir", str(folder)]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            print(f"{title}: {' '.join(words)}: {done.stderr.strip()}")
    files = sorted(pages[command].glob(name) if command else [Path(name.format(**values))])
    if not files or not files[0].exists():
        print(f"left out: {title}")
        return None
    with tempfile.TemporaryDirectory() as scratch:
        return picture(files[0], which, Path(scratch))


def sheet(pictures: list[tuple[str, str, Image.Image]]) -> Image.Image:
    """(title, command, picture) in rows."""
    font, text_h = ImageFont.load_default(14), 20 * LINES + 8
    cell_w, cell_h = CELL[0] + 16, CELL[1] + text_h + 16
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * cell_w, rows * cell_h), "white")
    draw = ImageDraw.Draw(page)
    for n, (title, command, image) in enumerate(pictures):
        left, top = n % COLUMNS * cell_w + 8, n // COLUMNS * cell_h + 8
        image.thumbnail(CELL, Image.Resampling.LANCZOS)
        page.paste(image, (left, top))
        draw.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline="#bbb")
        draw.text((left, top + CELL[1] + 4), title, "black", font)
        draw.text((left, top + CELL[1] + 24), command[:84], "#666", font)
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", default="demo")
    parser.add_argument("--other", help="a second model, for two side by side (default: the demo's)")
    parser.add_argument("--sweep", default="sweeps/digits")
    parser.add_argument("--photo", default="docs/cat.jpg")
    parser.add_argument("--photos", default="docs/cat.jpg", help="a folder, for objects")
    parser.add_argument("--weights", help="file of DINOv2's ViT-S/14")
    parser.add_argument("--output", default=str(ROOT / "docs" / "gallery" / "contact_sheet.jpg"))
    args = parser.parse_args()
    model = Path(args.demo, "best_model.pth").resolve()
    values = {
        "photo": Path(args.photo).resolve(), "photos": Path(args.photos).resolve(), "file": model,
        "model": f"--model_path={model}", "other": Path(args.other or model).resolve(),
        "sweep": Path(args.sweep).resolve(), "demo": Path(args.demo).resolve(),
    }  # fmt: skip
    pages, pictures = {}, []
    for kind in KINDS:
        image = drawn(kind, values, args.weights, pages)
        if image is not None:
            pictures.append((kind[0], kind[1].replace(DINO, "...").format(**dict.fromkeys(values, "...")), image))
    sheet(pictures).save(args.output, quality=80)
    print(f"wrote {args.output}: {len(pictures)} of {len(KINDS)} kinds")


if __name__ == "__main__":
    main()
