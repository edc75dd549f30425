"""Draw what the class token, the distillation token and each register attend to at one block, as PDF (or PNG) pages.

    python visualize_attention.py --model_path ./models/best_model.pth --layer_num 5 --output_dir ./attention_maps
    python visualize_attention.py --image_path my_photo.jpg --layer_num 5 --tokens cls --overlay
    python visualize_attention.py --model_path foreign.pth --num_heads 6 --cls_pos 6 --reg_pos 3 --image_path photo.jpg

One file an image; its first page is the class token, the next one the distillation token if the model has it, then one
page a register. The maps are the attention that the
model used: softmaxed over all tokens, rows of the tokens, columns of the patches.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import torch

import utils
from cifar_test import test_split
from datasets import (
    DATA_SETS,
    check_number,
    crop_box,
    eval_transform,
    find_split,
    fit_image,
    image_files,
    read_image,
    read_picture,
    read_split,
)  # fmt: skip
from models_dynamic import DynamicViT, model_from_checkpoint
from utils import BadInput, number

FOREIGN = ("num_heads", "cls_pos", "reg_pos", "dist_pos")  # flags that only a bare state dict needs
PICTURE_SIDE = 512  # pixels of the longer side of the picture on a page


@dataclass
class Picture:
    name: str  # for file names
    shown: torch.Tensor  # (3, ., .) uint8, as a person sees it
    model_input: torch.Tensor  # (3, h, w) uint8, before normalisation
    label: int | None


@dataclass
class Page:
    key: str  # 'cls', 'dist', 'reg0', ...
    title: str
    maps: torch.Tensor  # (H, gh, gw)


# From a checkpoint and images to pages ---------------------------------------------------------------------------


def load(args) -> tuple[DynamicViT, dict, dict]:
    """(model, description of its data, checkpoint)."""
    checkpoint = utils.load_checkpoint(args.model_path)
    given = {flag: getattr(args, flag) for flag in FOREIGN if hasattr(args, flag)}
    try:
        model = model_from_checkpoint(checkpoint, **given)
    except ValueError as error:
        raise BadInput(f"{args.model_path}: {error}") from None
    if not isinstance(model, DynamicViT):
        name = model.model_args["timm_name"]
        raise BadInput(f"{args.model_path} is timm's {name}; only the attention of this project's models is drawn")
    if "data" in checkpoint:
        if args.mean or args.std or args.data_set:
            raise BadInput(f"{args.model_path} says its own data; leave out --mean, --std and --data_set")
        return model, checkpoint["data"], checkpoint
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    data = {
        "name": args.data_set, "classes": [], "input_size": model.model_args["img_size"],
        "mean": args.mean or IMAGENET_DEFAULT_MEAN, "std": args.std or IMAGENET_DEFAULT_STD,
    }  # fmt: skip
    return model, data, checkpoint


def pictures(args, data, checkpoint) -> list[Picture]:
    """The images that the flags ask for."""
    if args.image_path:
        files = []
        for path in map(Path, args.image_path):
            files += image_files(path) if path.is_dir() else [path]
        if not files:
            raise BadInput(f"there are no images in {', '.join(args.image_path)}")
        return [_as_seen(read_image(file), data, file.stem) for file in files]
    if data["name"] is None:
        raise BadInput(f"{args.model_path} does not say its data set; give --image_path FILE, or --data_set")
    name = f"{data['name']}_test{args.img_num}"
    if "crop_pct" in data:  # read and cropped one at a time, as the model saw it
        split, _ = find_split(data["name"], args.data_path or checkpoint["args"]["data_path"], False)
        check_number(args.img_num, len(split))
        return [_as_seen(read_picture(split, args.img_num), data, name, int(split.labels[args.img_num]))]
    if "data" in checkpoint:
        split = test_split(checkpoint, args.data_path, [args.img_num])
        image, label = split.images[0], int(split.labels[0])
    else:
        (image,), (label,), data["classes"] = read_split(
            data["name"], args.data_path, False, data["input_size"], [args.img_num]
        )
    return [Picture(name, image, image, int(label))]


def _as_seen(image, data, name, label=None) -> Picture:
    """A PIL image: the part of it that the model sees, in more pixels for the page than for the model."""
    crop = {key: data[key] for key in ("crop_pct", "interpolation") if key in data}
    box = crop_box(image.width, image.height, data["input_size"], data.get("crop_pct", 1.0))
    scale = min(1, PICTURE_SIDE / max(box[2] - box[0], box[3] - box[1]))
    shown = fit_image(image, (round((box[3] - box[1]) * scale), round((box[2] - box[0]) * scale)), **crop)
    return Picture(name, shown, fit_image(image, data["input_size"], **crop), label)


def wanted_tokens(model, block, tokens) -> list[str]:
    """Which of 'cls', 'dist' and 'reg' to draw at `block`: those asked for, else all that are there.

    Raises BadInput for a block outside the model, and for a token that was asked for and is not there.
    """
    try:
        layout = model.token_layout(block)
    except ValueError as error:
        raise BadInput(f"--layer_num: {error}") from None
    enters = {"cls": model.cls_pos, "dist": model.dist_pos, "reg": model.reg_pos}
    words = {"cls": "the class token", "dist": "the distillation token", "reg": "the registers"}
    parts = {"cls": layout.cls, "dist": layout.dist, "reg": layout.registers}
    there = [token for token, part in parts.items() if part is not None]
    for token in tokens or enters:
        if token in there:
            continue
        if enters[token] is None:
            problem = f"this model has no {words[token].removeprefix('the ')}"
            instead = f"--tokens {there[0]}" if there else "a model with tokens"
        else:
            problem = f"{words[token]} only enter{'s' * (token != 'reg')} at block {enters[token]}"
            instead = f"--layer_num {enters[token]} or later (to {model.depth - 1})"
            instead += f", or --tokens {there[0]}" if there else ""
        if tokens or not there:
            raise BadInput(f"nothing to draw for {token!r} at block {block}: {problem}; ask for {instead}")
        if enters[token] is not None:
            utils.say(f"note: {problem}; it is not drawn at block {block}")
    return [token for token in there if token in (tokens or enters)]


def pages(model, maps, block, tokens) -> list[Page]:
    """Titles and maps of one image (batch index 0), class token first."""
    found = []
    if "cls" in tokens:
        found.append(Page("cls", f"Class token at block {block} (entered at block {model.cls_pos})", maps.cls[0].cpu()))
    if "dist" in tokens:
        title = f"Distillation token at block {block} (entered at block {model.dist_pos})"
        found.append(Page("dist", title, maps.dist[0].cpu()))
    if "reg" in tokens:
        total = model.num_register_tokens
        for r, heads in enumerate(maps.registers[0]):
            title = f"Register {r} (of {total}) at block {block} (entered at block {model.reg_pos})"
            found.append(Page(f"reg{r}", title, heads.cpu()))
    return found


def caption(logits, label, classes) -> str:
    """'true: cat' and 'predicted: dog (61.3%)', as far as they are known."""

    def name(k):
        return classes[k] if k < len(classes) else f"class {k}"

    lines = [] if label is None else [f"true: {name(label)}"]
    if logits is not None:
        confidence, k = logits.softmax(dim=-1).max(dim=-1)
        lines.append(f"predicted: {name(int(k))} ({100 * float(confidence):.1f}%)")
    return "\n".join(lines)


# From pages to files ---------------------------------------------------------------------------------------------

MAP_SIDE, SCALE_WIDTH, TITLE_HEIGHT = 1.9, 0.75, 0.58  # inches: longer side of a map, its colour scale, its title
LEFT, RIGHT, TOP, BOTTOM = 0.35, 0.1, 0.65, 0.45  # inches: margins of a page


def draw_page(page: Page, shown, text, overlay):
    """A matplotlib figure: the picture, the mean over heads, each head; every map with its own colour scale."""
    from matplotlib.figure import Figure

    height, width = shown.shape[1:]
    map_h, map_w = (side * MAP_SIDE / max(height, width) for side in (height, width))
    cell_h, cell_w = map_h + TITLE_HEIGHT, max(map_w + SCALE_WIDTH, 1.5)
    cells = [None, ("mean over heads", page.maps.mean(dim=0))]
    cells += [(f"head {i}", attention) for i, attention in enumerate(page.maps)]
    # The number of columns that makes the page about 1.5 times as wide as high.
    columns = min(range(1, len(cells) + 1), key=lambda c: abs(c * cell_w / (math.ceil(len(cells) / c) * cell_h) - 1.5))
    columns = max(columns, min(len(cells), math.ceil(6.5 / cell_w)))  # the title needs that width
    rows = math.ceil(len(cells) / columns)
    page_w, page_h = max(columns * cell_w + LEFT + RIGHT, 7.0), rows * cell_h + TOP + BOTTOM
    figure = Figure(figsize=(page_w, page_h))
    figure.text(LEFT / page_w, 1 - 0.3 / page_h, page.title, fontsize=13, weight="bold", va="center")
    figure.text(
        LEFT / page_w, 0.2 / page_h, fontsize=7.5, color="0.35", va="center",
        s="Colour: share of the token's attention on each patch, in %, after softmax over all tokens. Each map has a "
        "scale of its own.",
    )  # fmt: skip
    picture = shown.permute(1, 2, 0).numpy()
    for i, cell in enumerate(cells):
        left = LEFT + i % columns * cell_w
        bottom = page_h - TOP - (i // columns + 1) * cell_h + 0.08
        axes = figure.add_axes((left / page_w, bottom / page_h, map_w / page_w, map_h / page_h))
        axes.set_axis_off()
        if cell is None or overlay:
            axes.imshow(picture, interpolation="nearest", extent=(0, width, height, 0))
        if cell is None:
            lines = [line for part in (text or "image").split("\n") for line in wrap(part, int(15 * cell_w))]
            axes.set_title("\n".join(lines[:3]), fontsize=8, loc="left")
            continue
        name, attention = cell
        drawn = axes.imshow(
            100 * attention.numpy(), interpolation="nearest", extent=(0, width, height, 0), cmap="viridis",
            alpha=0.6 if overlay else 1.0, vmin=0,
        )  # fmt: skip
        axes.set_title(f"{name}\n{100 * float(attention.sum()):.0f}% on patches", fontsize=8, loc="left")
        scale = figure.add_axes(((left + map_w + 0.06) / page_w, bottom / page_h, 0.09 / page_w, map_h / page_h))
        # One image; matplotlib's own colour bar is 256 small areas, which take longer to write than all of the page.
        scale.imshow(
            [[level] for level in range(256)], cmap="viridis", origin="lower", aspect="auto",
            extent=(0, 1, 0, drawn.norm.vmax or 1),
        )  # fmt: skip
        scale.set_xticks([])
        scale.yaxis.tick_right()
        scale.yaxis.get_major_locator().set_params(nbins=4)
        scale.tick_params(labelsize=6.5, length=2, pad=1.5)
    return figure


def write_pages(figures: dict, stem: Path, kind: str) -> list[Path]:
    """Write {key: figure} as one PDF, or as one PNG each; returns the files."""
    if kind == "png":
        files = [stem.with_name(f"{stem.name}_{key}.png") for key in figures]
        for file, figure in zip(files, figures.values()):
            utils.write_atomically(file, lambda out, f=figure: f.savefig(out, format="png", dpi=160))
        return files
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import PdfPages

    def write(out):
        # fonttype 42 keeps the words searchable.
        with rc_context({"pdf.fonttype": 42}), PdfPages(out) as pdf:
            for figure in figures.values():
                pdf.savefig(figure, dpi=200)

    file = stem.with_name(f"{stem.name}.pdf")
    utils.write_atomically(file, write)
    return [file]


def visualize(args):
    model, data, checkpoint = load(args)
    tokens = wanted_tokens(model, args.layer_num, args.tokens)
    device = utils.pick_device(args.device)
    folder = utils.writable_folder(args.output_dir)
    model.to(device)
    used = set()
    for picture in pictures(args, data, checkpoint):
        images = eval_transform(picture.model_input[None].to(device), data)
        maps = model.attention_maps(images, [args.layer_num])[args.layer_num]
        with torch.no_grad():
            logits = model(images)[0].cpu() if model.num_classes else None
        text = caption(logits, picture.label, data["classes"])
        found = pages(model, maps, args.layer_num, tokens)
        figures = {p.key: draw_page(p, picture.shown, text, args.overlay) for p in found}
        name, n = picture.name, 1
        while name in used:  # images of the same name from several folders
            n += 1
            name = f"{picture.name}_{n}"
        used.add(name)
        for file in write_pages(figures, folder / f"attention_{name}_block{args.layer_num}", args.format):
            utils.say(f"wrote {file}: {', '.join(figures) if args.format == 'pdf' else file.stem.rsplit('_', 1)[1]}")


def token_list(text):
    """An argparse type: 'cls,reg' -> ['cls', 'reg']."""
    tokens = [token.strip() for token in text.split(",")]
    if not set(tokens) <= {"cls", "dist", "reg"}:
        raise utils.argparse.ArgumentTypeError(f"{text!r} is not cls, dist or reg, or several with commas: cls,reg")
    return tokens


def main(argv=None):
    parser = utils.ArgumentParser(
        description="Draw what the class, distillation and register tokens attend to at one block."
    )
    parser.add_argument("--model_path", default="best_model.pth", help="checkpoint of this project, or a state dict")
    parser.add_argument("--layer_num", type=number(int), default=2, help="block, counted from 0")
    parser.add_argument("--output_dir", default=".", help="folder for the pages")
    parser.add_argument("--image_path", nargs="+", metavar="FILE", help="images, or folders of them")
    parser.add_argument("--img_num", type=number(int, 0), default=0, help="else: image of the test set")
    parser.add_argument("--data_path", help="folder of the data set, if it is not where it was in training")
    parser.add_argument(
        "--tokens", type=token_list, help="of cls, dist and reg, as in cls,reg (default: all that are there)"
    )
    parser.add_argument("--overlay", action="store_true", help="draw the maps over the image")
    parser.add_argument("--format", choices=("pdf", "png"), default="pdf")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    group = parser.add_argument_group("only for a bare state dict from elsewhere (its shapes tell the rest)")
    missing = dict(default=utils.argparse.SUPPRESS)
    group.add_argument("--num_heads", type=number(int, 1), help="heads of each block; needed", **missing)
    group.add_argument("--cls_pos", type=utils.position, help="block that CLS enters at, or none (0)", **missing)
    group.add_argument("--reg_pos", type=number(int, 0), help="block that the registers enter at (0)", **missing)
    group.add_argument(
        "--dist_pos", type=number(int, 0), help="block that the distillation token enters at (0)", **missing
    )
    group.add_argument("--data_set", choices=DATA_SETS, type=str.upper, help="take --img_num from this data set")
    group.add_argument("--mean", type=number(float), nargs=3, help="of its normalisation, 0..1 (default: ImageNet's)")
    group.add_argument("--std", type=number(float, above=0), nargs=3, help="of its normalisation")
    visualize(parser.parse_args(argv))


if __name__ == "__main__":
    utils.run_script(main)
