"""Pages of attention maps, what all pages share, and the PDF and PNG files they are written to.

A page of maps has rows of maps beside their image. A single row (all heads of one token) is wrapped into lines, with a
colour scale beside each map; several rows (blocks, tokens or models) are one below the other.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill, wrap

from torch import Tensor

import utils
from models_dynamic import AttentionMaps

COLOURS = "viridis"
ATTENTION = "share of the token's attention on each patch, in %, after softmax over all tokens"
TIMES_PATCHES = (
    "the token's attention on each patch, after softmax over all tokens, times the number of patches, which differ; "
    "1 = uniform over patches"
)
LEFT, RIGHT, BOTTOM, SCALE = 0.35, 0.1, 0.45, 2.2  # inches: margins of a page, a colour scale in its head


def token_name(key, registers) -> str:
    """The title of 'cls', 'dist' or 'reg0', ... in a model with so many registers."""
    names = {"cls": "Class token", "dist": "Distillation token", "pool": "Attention pooling"}
    return names.get(key) or f"Register {key.removeprefix('reg')} (of {registers})"


def by_token(maps: AttentionMaps, patches=()) -> dict[str, Tensor]:
    """{'cls', 'dist', 'reg0', 'patch3-5', ...: (B, H, gh, gw)} of the tokens that have entered, and of `patches`."""
    found = {"cls": maps.cls, "dist": maps.dist, "pool": maps.pool}
    if maps.registers is not None:
        found |= {f"reg{r}": heads for r, heads in zip(maps.numbers, maps.registers.unbind(dim=1))}
    if maps.patches is not None:
        found |= {f"patch{x}-{y}": heads for (x, y), heads in zip(patches, maps.patches.unbind(dim=1))}
    return {key: heads for key, heads in found.items() if heads is not None}


@dataclass
class MapCell:
    name: str
    map: Tensor | None  # (gh, gw), shares; None: absent
    absent: str = ""  # the reason
    mark: tuple[int, int] | None = None  # x, y of a patch to frame


@dataclass
class Row:
    label: str
    shown: Tensor  # (3, h, w) uint8: the image
    cells: list[MapCell]


@dataclass
class Page:
    key: str  # for file names: 'block5_cls', 'block5_reg0', ...
    title: str
    rows: list[Row]
    caption: str = ""
    colour: str = ATTENTION  # what a map's colour means

    @property
    def times_patches(self) -> bool:
        """Whether colours show attention times the number of patches, not per cent."""
        return self.colour == TIMES_PATCHES

    def shades(self, attention: Tensor) -> Tensor:
        """The values that the colours of a map show: shares, or multiples of uniform attention."""
        return attention * attention.numel() if self.times_patches else attention

    @property
    def unit(self) -> int:
        """The number on a colour scale for a shade of 1."""
        return 1 if self.times_patches else 100

    def largest(self) -> float:
        maps = [cell.map for row in self.rows for cell in row.cells if cell.map is not None]
        return max((float(self.shades(attention).max()) for attention in maps), default=0)


def draw_page(page: Page, overlay=False, vmax=None, scope="this page"):
    """A matplotlib figure.

    Args:
        overlay: draw the maps over the image.
        vmax: the value of the brightest colour (see `Page.shades`); None: the largest of each map.
        scope: where `vmax` is the largest, for the footer: 'this page' or 'all pages'.
    """
    from matplotlib.figure import Figure

    one_row = len(page.rows) == 1
    bars, side = one_row and vmax is None, 1.9 if one_row else 1.25
    title_h = 0.58 if one_row else 0.42
    shapes = [_fitted(row.shown, side) for row in page.rows]
    cell_w = max(max(w for _, w in shapes) + (0.75 if bars else 0.12), 1.5 if one_row else 1.0)
    cell_h = max(h for h, _ in shapes) + title_h
    count = 1 + max(len(row.cells) for row in page.rows)
    columns = _columns(count, cell_w, cell_h) if one_row else count
    lines = math.ceil(count / columns) if one_row else len(page.rows)
    page_w = max(columns * cell_w + LEFT + RIGHT, 7.0)
    title = wrap(page.title, int(9 * (page_w - LEFT - RIGHT - (0 if vmax is None else SCALE))))[:2]
    caption = "" if one_row else page.caption.replace("\n", ", ")
    top = 0.4 + 0.23 * len(title) + 0.16 * bool(caption)
    page_h = lines * cell_h + top + BOTTOM
    figure = Figure(figsize=(page_w, page_h))
    _write_margins(figure, page, "\n".join(title), caption, vmax, scope, one_row)
    for r, (row, (map_h, map_w)) in enumerate(zip(page.rows, shapes)):
        for c in range(1 + len(row.cells)):
            line, column = divmod(c, columns) if one_row else (r, c)
            left, bottom = LEFT + column * cell_w, page_h - top - (line + 1) * cell_h + 0.08
            box = (left / page_w, bottom / page_h, map_w / page_w, map_h / page_h)
            axes = figure.add_axes(box)
            axes.set_axis_off()
            width = int((15 if one_row else 18) * cell_w)  # of a line of text, in characters
            if c == 0:
                label = page.caption or "image" if one_row and not row.label else row.label
                _draw_image(axes, row.shown, label, width, 8 if one_row else 7)
                _frame_patch(axes, row.cells[0], row.shown)
                continue
            drawn = _draw_map(axes, page, row.cells[c - 1], row.shown, overlay, vmax)
            if bars and drawn is not None:
                scale = figure.add_axes(((left + map_w + 0.06) / page_w, box[1], 0.09 / page_w, box[3]))
                _draw_scale(scale, drawn.norm.vmax or 1)
    return figure


def _fitted(shown, side) -> tuple[float, float]:
    """(height, width) in inches of an image whose longer side is `side`."""
    height, width = shown.shape[1:]
    return height * side / max(height, width), width * side / max(height, width)


def _columns(count, cell_w, cell_h) -> int:
    """The number of columns that makes a page about 1.5 times as wide as high, and wide enough for its title."""
    columns = min(range(1, count + 1), key=lambda c: abs(c * cell_w / (math.ceil(count / c) * cell_h) - 1.5))
    return max(columns, min(count, math.ceil(6.5 / cell_w)))


def _write_margins(figure, page, title, caption, vmax, scope, one_row):
    page_w, page_h = figure.get_size_inches()
    figure.text(LEFT / page_w, 1 - 0.17 / page_h, title, fontsize=13, weight="bold", va="top")
    if caption:
        below = 0.23 + 0.23 * len(title.split("\n"))
        figure.text(LEFT / page_w, 1 - below / page_h, caption, fontsize=8, va="top")
    own = "Each map has its own scale" + ("." if one_row else "; its largest value is above it.")
    words = f"Colour: {page.colour}. {own if vmax is None else f'One scale for {scope}.'}"
    words = fill(words, int(19 * (page_w - LEFT)))
    figure.text(LEFT / page_w, 0.2 / page_h, words, fontsize=7.5, color="0.35", va="center")
    if vmax is not None:
        left, width = page_w - RIGHT - SCALE + 0.25, SCALE - 0.45
        scale = figure.add_axes((left / page_w, 1 - 0.3 / page_h, width / page_w, 0.09 / page_h))
        _draw_scale(scale, page.unit * vmax or 1, across=True)
        if page.times_patches:
            scale.xaxis.set_major_formatter("{x:g}×")


def _draw_image(axes, shown, label, letters, size):
    _show_image(axes, shown)
    lines = [line for part in label.split("\n") for line in wrap(part, letters)]
    axes.set_title("\n".join(lines[:3]), fontsize=size, loc="left")


def _show_image(axes, shown):
    height, width = shown.shape[1:]
    axes.imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, width, height, 0))


def _draw_map(axes, page, cell, shown, overlay, vmax):
    from matplotlib.patches import Rectangle

    one_row = len(page.rows) == 1
    height, width = shown.shape[1:]
    extent, size = (0, width, height, 0), 8 if one_row else 6.5
    if cell.map is None:
        axes.add_patch(Rectangle((0, 0), width, height, facecolor="0.94", edgecolor="0.75", hatch="//", linewidth=0.5))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_title(f"{cell.name}\n{cell.absent}".strip(), fontsize=size, loc="left")
        return None
    if overlay:
        _show_image(axes, shown)
    drawn = axes.imshow(
        page.unit * page.shades(cell.map).numpy(), interpolation="nearest", extent=extent, cmap=COLOURS,
        alpha=0.6 if overlay else 1.0, vmin=0, vmax=None if vmax is None else page.unit * vmax,
    )  # fmt: skip
    _frame_patch(axes, cell, shown)
    total = f"{100 * float(cell.map.sum()):.0f}%"
    words = f"{total} on patches" if one_row or vmax is not None else f"{total}, max {100 * float(cell.map.max()):.3g}%"
    axes.set_title(f"{cell.name}\n{words}", fontsize=size, loc="left")
    return drawn


def _frame_patch(axes, cell, shown):
    from matplotlib.patches import Rectangle

    if cell.mark is not None and cell.map is not None:
        (x, y), (gh, gw), (_, height, width) = cell.mark, cell.map.shape, shown.shape
        box = Rectangle((x * width / gw, y * height / gh), width / gw, height / gh, fill=False, edgecolor="red")
        axes.add_patch(box)


def _draw_scale(axes, top, across=False):
    """A colour scale from 0 to `top` as one image: matplotlib's is 256 areas, slower than all of the page."""
    levels = range(256)
    if across:
        axes.imshow([levels], cmap=COLOURS, aspect="auto", extent=(0, top, 0, 1))
        axes.set_yticks([])
        axes.xaxis.get_major_locator().set_params(nbins=4)
    else:
        axes.imshow([[level] for level in levels], cmap=COLOURS, origin="lower", aspect="auto", extent=(0, 1, 0, top))
        axes.set_xticks([])
        axes.yaxis.tick_right()
        axes.yaxis.get_major_locator().set_params(nbins=4)
    axes.tick_params(labelsize=6.5, length=2, pad=1.5)


def headed_figure(size, title, about, reading, **kwargs):
    """A figure of `size` inches with a title, a line on what it is of and, at the bottom, how to read it."""
    from matplotlib.figure import Figure

    width, height = size
    figure, left = Figure(figsize=size, **kwargs), 0.33 / width
    figure.text(left, 1 - 0.2 / height, title, fontsize=14, weight="bold", va="top")
    figure.text(left, 1 - 0.52 / height, about, fontsize=8.5, color="0.35", va="top")
    figure.text(left, 0.15 / height, fill(reading, int(15.5 * width)), fontsize=8.5, color="0.2", va="bottom")
    return figure


def write_pages(figures, stem: Path, kind: str) -> list[Path]:
    """Write an iterable of (key, figure) as one PDF `stem`.pdf or as one PNG each; returns the files."""
    if kind == "pdf":
        file = stem.with_name(f"{stem.name}.pdf")
        write_pdf((figure for _, figure in figures), file)
        return [file]
    files = []
    for key, figure in figures:
        files.append(stem.with_name(f"{stem.name}_{key}.png"))
        utils.write_atomically(files[-1], lambda out, f=figure: f.savefig(out, format="png", dpi=160))
    return files


def write_pdf(figures, file):
    """Write an iterable of figures, one at a time, as the pages of one PDF with searchable text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import PdfPages

    def write(out):
        with rc_context({"pdf.fonttype": 42}), PdfPages(out) as pdf:
            for figure in figures:
                pdf.savefig(figure, dpi=200)

    utils.write_atomically(file, write)
