"""Pages of photos with the boxes that were discovered in them."""

import math

from tqdm import tqdm

from inspection.fonts import letter_count

COLUMNS, ROWS, SIDE = 4, 3, 320  # of a page, in images; pixels of an image's longer side on it
BOX, TRUTH, SEED = "#ff2d55", "#00e5ff", "#ffd60a"  # colours


def one_line(name) -> str:
    return " ".join(name.encode("utf-8", "replace").decode().split())


def boxes_pages(items, total, examine, title, args):
    """Figures of the first --max_drawn images, made while all are examined; `examine`: item -> (record, PIL image)."""
    shown = []
    for done, item in enumerate(tqdm(items, "images", total, leave=False, disable=None), start=1):
        result, image = examine(item)
        if done <= args.max_drawn:
            image.thumbnail((SIDE, SIDE))
            shown.append((result, image))
        if len(shown) == COLUMNS * ROWS:
            yield draw_boxes_page(title, shown, args.annotations is not None)
            shown = []
    if shown:
        yield draw_boxes_page(title, shown, args.annotations is not None)


def draw_boxes_page(title, shown, annotated):
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    page_w, cell_w, cell_h = 11.6, 2.85, 2.75  # inches
    page_h = 0.7 + cell_h * math.ceil(len(shown) / COLUMNS)
    figure = Figure(figsize=(page_w, page_h))
    figure.text(0.15 / page_w, 1 - 0.2 / page_h, title, fontsize=10, weight="bold", va="center")
    lines = [Line2D([], [], color=BOX, lw=2, label="discovered box")]
    lines += [Line2D([], [], color=BOX, lw=2, ls=":", label="arbitrary")] * any(r["arbitrary"] for r, _ in shown)
    lines += [Line2D([], [], color=TRUTH, lw=2, ls="--", label="annotated box")] * annotated
    lines += [Line2D([], [], color=SEED, marker="s", ls="", mec="black", label="seed patch")]
    below = (0.05 / page_w, 1 - 0.42 / page_h)
    figure.legend(handles=lines, loc="center left", bbox_to_anchor=below, ncols=4, fontsize=8, frameon=False)
    for i, (result, image) in enumerate(shown):
        row, column = divmod(i, COLUMNS)
        left, bottom = 0.15 + column * cell_w, page_h - 0.6 - (row + 1) * cell_h
        axes = figure.add_axes((left / page_w, bottom / page_h, 2.7 / page_w, 2.3 / page_h))
        draw_boxes(axes, result, image)
        score = "" if result["best_iou"] is None else f", IoU {result['best_iou']:.2f}"
        below = ["arbitrary"] * result["arbitrary"] + [result["verdict"] + score] * annotated
        words = "\n".join(filter(None, (short(result["name"]), ": ".join(below))))
        axes.set_title(words, fontsize=7.5, loc="left")
    return figure


def short(name) -> str:
    fit = 40 * len(name) // max(letter_count(name), 1)
    return name if len(name) <= fit else f"{name[: round(0.6 * fit)]}...{name[-round(0.325 * fit) :]}"


def draw_boxes(axes, result, image):
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    (width, height), (gw, gh), (x, y) = result["size"], result["grid"], result["seed"]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="none")
    axes.set(xlim=(-0.01 * width, 1.01 * width), ylim=(1.01 * height, -0.01 * height), anchor="NW")
    axes.set_axis_off()
    seed = (x * width / gw, y * height / gh, (x + 1) * width / gw, (y + 1) * height / gh)
    styles = [(seed, SEED, "-", 1), *((box, TRUTH, "--", 1.4) for box in result["annotated"])]
    for box, colour, style, thick in [*styles, (result["box"], BOX, ":" if result["arbitrary"] else "-", 1.8)]:
        outline = Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, ec=colour, ls=style, lw=thick)
        outline.set_path_effects([withStroke(linewidth=thick + 1, foreground="black", alpha=0.5)])
        axes.add_patch(outline)
