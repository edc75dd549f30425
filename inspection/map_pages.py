"""How a page of attention maps is laid out and drawn: at most A4, its maps as large as the page allows.

A single row (all heads of one token) flows over lines, the image its first cell, with a colour scale beside each map.
Several rows (blocks, tokens, models, images) have their label at the left, and the image once, in the head of the page.
"""

import math
from dataclasses import dataclass, replace
from textwrap import fill

import torch

from inspection.fonts import letter_count, wrapped
from inspection.pages import COLOURS, Page, percentile_of

SHEETS = ((8.27, 11.69), (11.69, 8.27))  # A4 in inches, upright and across
MARGIN, FOOT, BAR, GAP, LARGEST, SMALLEST = 0.35, 0.45, 0.55, 0.1, 2.1, 0.6  # inches; of a map's longer side the last
LABEL, HEAD_IMAGE, SCALE = 1.15, 1.2, 2.2  # at most, of a row's label and the image in the head; of the scale there
LETTER = 0.058  # width of an average character of 7 points
OPAQUE = 0.8  # opacity over an image at the top of the scale
DECADES = 3  # of a logarithmic scale


@dataclass(frozen=True)
class Look:
    """How maps are drawn, whatever they show.

    overlay: over the image, greyed, the more opaque the more attention.
    log: colours for the logarithm, over `DECADES` below the top of the scale.
    percentile: of a map's values, or a page's: the top of its scale.
    """

    overlay: bool = False
    log: bool = False
    percentile: float = 100

    def norm(self, top: float):
        """matplotlib's map of values to 0..1; larger ones than `top` are 1."""
        from matplotlib.colors import LogNorm, Normalize

        top = top or 1
        return LogNorm(top / 10**DECADES, top, clip=True) if self.log else Normalize(0, top, clip=True)


@dataclass(frozen=True)
class _Layout:
    sheet: tuple[float, float]
    columns: int
    map: tuple[float, float]  # height, width
    title: float  # height of the text above a map
    left: float  # width of the column of labels

    @property
    def cell(self):
        """Height and width of a map with its text; its scale is at its right."""
        return self.map[0] + self.title + GAP, (self.sheet[0] - 2 * MARGIN - self.left) / self.columns


def parts_of(page: Page) -> list[Page]:
    """The page, or as many as it takes for its maps to be at least `SMALLEST`; their keys are numbered then."""
    rows = page.rows
    for count in range(1, len(rows) + 1):
        size = math.ceil(len(rows) / count)
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        if max(_layout(replace(page, rows=parts[0]), scaled=True).map) >= SMALLEST:
            break
    if len(parts) == 1:
        return [page]
    return [
        replace(page, rows=part, title=f"{page.title} ({n} of {len(parts)})", key=f"{page.key}_{n}")
        for n, part in enumerate(parts, start=1)
    ]


def draw_page(page: Page, vmax=None, scope="this page", look=Look()):
    """A matplotlib figure, not larger than A4.

    Args:
        vmax: the value at the top of the scale (see `Page.shades`); None: each map has its own.
        scope: what `vmax` is the top of, for the footer: 'this page', 'all pages', ...
    """
    from matplotlib.figure import Figure

    one_row, scaled = len(page.rows) == 1, vmax is not None
    layout, head = _layout(page, scaled), _head_height(page, scaled)
    (cell_h, cell_w), columns = layout.cell, layout.columns
    counts = [len(row.cells) + one_row for row in page.rows]
    row_h = [max(math.ceil(n / columns) * cell_h, _label_height(row, page)) for n, row in zip(counts, page.rows)]
    page_w, page_h = layout.sheet[0], head + sum(row_h) + FOOT
    figure = Figure(figsize=(page_w, page_h))
    _write_head(figure, page, vmax, look)
    _write_foot(figure, page, vmax, scope, look)
    top = page_h - head
    for row, height in zip(page.rows, row_h):
        if not one_row:
            _write_label(figure, page, row, layout, top)
        first = [None] if one_row else []
        for n, cell in enumerate((*first, *row.cells)):
            line, column = divmod(n, columns)
            left = MARGIN + layout.left + column * cell_w
            box = (left, top - line * cell_h - layout.title - layout.map[0], layout.map[1], layout.map[0])
            axes = _axes(figure, box)
            axes.set_axis_off()
            width = int((cell_w - GAP) / LETTER)
            if cell is None:
                _show_image(axes, row.shown)
                _frame_patch(axes, row.cells[0], row.shown)
                _title(axes, _image_title(page, row), width, layout)
                continue
            drawn = _draw_map(axes, page, cell, row.shown, vmax, look, width, layout)
            if one_row and not scaled and drawn is not None:
                bar = _axes(figure, (left + layout.map[1] + 0.06, box[1], 0.09, box[3]))
                _draw_scale(bar, drawn, page, look)
        top -= height
    return figure


def _image_title(page, row) -> str:
    """Above the image of a single row."""
    return "\n".join(filter(None, (row.label, page.caption))) or "image"


def _axes(figure, box):
    """Axes at (left, bottom, width, height) in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))


def _layout(page: Page, scaled) -> _Layout:
    """The sheet and the number of columns with the largest maps, and of these the fewest lines; `scaled`: one scale."""
    one_row = len(page.rows) == 1
    shapes = [row.shown.shape[1:] for row in page.rows]
    aspect = max(h / max(h, w) for h, w in shapes), max(w / max(h, w) for h, w in shapes)
    counts = [len(row.cells) + one_row for row in page.rows]
    title, left = 0.26, (0 if one_row else _label_width(page))
    if one_row:
        title = 0.13 * (2 + _image_title(page, page.rows[0]).count("\n"))
    best = None
    for sheet in SHEETS:
        for columns in range(1, max(counts) + 1):
            lines = sum(math.ceil(n / columns) for n in counts)
            width = (sheet[0] - 2 * MARGIN - left) / columns - (BAR if one_row and not scaled else GAP)
            height = (sheet[1] - _head_height(page, scaled) - FOOT) / lines - title - GAP
            side = min(height / aspect[0], width / aspect[1], LARGEST)
            rank = round(side, 1), -lines
            if best is None or rank > best[0]:
                best = rank, _Layout(sheet, columns, (side * aspect[0], side * aspect[1]), title, left)
    return best[1]


def _same_image(page) -> bool:
    """Whether all rows are of one image, which then stands once, in the head."""
    first = page.rows[0].shown
    return all(row.shown is first or torch.equal(row.shown, first) for row in page.rows)


def _head_image(page) -> tuple[float, float]:
    """Height and width of the image in the head; zeros where it is elsewhere."""
    if len(page.rows) == 1 or not _same_image(page):
        return 0, 0
    h, w = page.rows[0].shown.shape[1:]
    return HEAD_IMAGE * h / max(h, w), HEAD_IMAGE * w / max(h, w)


def _head_lines(page, scaled, page_w=SHEETS[0][0]) -> tuple[list[str], list[str]]:
    """The lines of the title (13 points), and those of what the page is of (7.5 points)."""
    width = page_w - 2 * MARGIN - _head_image(page)[1] - GAP
    title = wrapped(page.title, int(10 * (width - SCALE * scaled)))[:2]
    quiet = [] if len(page.rows) == 1 else page.caption.split("\n")
    quiet = [line for text in (*quiet, page.about) for line in wrapped(text, int(width / (LETTER * 7.5 / 7)))]
    return title, quiet[:6]


def _head_height(page, scaled) -> float:
    """Inches; of the narrower sheet, also where the page is the other one."""
    title, quiet = _head_lines(page, scaled)
    return max(0.35 + 0.23 * len(title) + 0.135 * len(quiet), _head_image(page)[0] + 0.4)


def _write_head(figure, page, vmax, look):
    page_w, page_h = figure.get_size_inches()
    height, width = _head_image(page)
    left = MARGIN + (width + GAP if width else 0)
    if width:
        axes = _axes(figure, (MARGIN, page_h - 0.2 - height, width, height))
        axes.set_axis_off()
        _show_image(axes, page.rows[0].shown)
        _frame_patch(axes, page.rows[0].cells[0], page.rows[0].shown)
    title, quiet = _head_lines(page, vmax is not None, page_w)
    figure.text(left / page_w, 1 - 0.17 / page_h, "\n".join(title), fontsize=13, weight="bold", va="top")
    below = 0.22 + 0.23 * len(title)
    words = dict(fontsize=7.5, color="0.35", va="top", linespacing=1.15)
    if quiet:
        figure.text(left / page_w, 1 - below / page_h, "\n".join(quiet), **words)
    if vmax is not None:
        axes = _axes(figure, (page_w - MARGIN - SCALE + 0.35, page_h - 0.3, SCALE - 0.55, 0.09))
        _draw_scale(axes, page.unit * vmax, page, look, across=True)


def _write_foot(figure, page, vmax, scope, look):
    page_w, page_h = figure.get_size_inches()
    words = f"Colour: {page.colour}. {'Each map has its own scale.' if vmax is None else f'One scale for {scope}.'}"
    words += " Above a map: its sum over patches, then its largest value."
    if look.percentile < 100:
        words += f" Top of a scale: the {look.percentile:g}th percentile of the values; larger ones have its colour."
    words += f" Logarithmic, {DECADES} powers of ten." if look.log else ""
    words = fill(words, int((page_w - 2 * MARGIN) / (0.92 * LETTER)))
    figure.text(MARGIN / page_w, 0.22 / page_h, words, fontsize=7, color="0.35", va="center")


def _label_lines(row) -> list[str]:
    width = int((LABEL - GAP) / LETTER)
    return [line for part in row.label.split("\n") for line in wrapped(part, width)][:6]


def _label_width(page) -> float:
    longest = max(letter_count(line) for row in page.rows for line in ("", *_label_lines(row)))
    return LABEL if not _same_image(page) else longest * LETTER + 2 * GAP


def _label_height(row, page) -> float:
    if len(page.rows) == 1:
        return 0
    image = 0 if _same_image(page) else _row_image(row)[0] + 0.05
    return 0.12 * len(_label_lines(row)) + image + GAP


def _row_image(row) -> tuple[float, float]:
    h, w = row.shown.shape[1:]
    return (LABEL - GAP) * h / max(h, w), (LABEL - GAP) * w / max(h, w)


def _write_label(figure, page, row, layout, top):
    page_w, page_h = figure.get_size_inches()
    lines = _label_lines(row)
    words = dict(fontsize=7, va="top", linespacing=1.15)
    if lines:
        figure.text(MARGIN / page_w, (top - 0.02) / page_h, "\n".join(lines), **words)
    if not _same_image(page):
        height, width = _row_image(row)
        axes = _axes(figure, (MARGIN, top - 0.12 * len(lines) - 0.05 - height, width, height))
        axes.set_axis_off()
        _show_image(axes, row.shown)


def _show_image(axes, shown):
    height, width = shown.shape[1:]
    axes.imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, width, height, 0))


def _title(axes, text, letters, layout):
    lines = [line for part in text.split("\n") for line in wrapped(part, letters)]
    size = 7 if layout.map[1] > 0.8 else 6
    axes.set_title("\n".join(lines[: int(layout.title / 0.12)]), fontsize=size, loc="left", pad=3)


def _draw_map(axes, page, cell, shown, vmax, look, letters, layout):
    """Draw a cell; returns the value at the top of its scale, None for an absent token."""
    from matplotlib.patches import Rectangle

    height, width = shown.shape[1:]
    if cell.map is None:
        axes.add_patch(Rectangle((0, 0), width, height, facecolor="0.94", edgecolor="0.75", hatch="//", linewidth=0.5))
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
        _title(axes, f"{cell.name}\n{cell.absent}".strip(), max(letters, 26), layout)
        return None
    values = page.unit * page.shades(cell.map)
    top = page.unit * vmax if vmax is not None else percentile_of(values, look.percentile)
    norm = look.norm(top)
    if look.overlay:
        grey = shown.float().mean(dim=0, keepdim=True).mul(0.55).add(70).byte().expand(3, -1, -1)
        _show_image(axes, grey)
    axes.imshow(
        values.numpy(), interpolation="nearest", extent=(0, width, height, 0), cmap=COLOURS, norm=norm,
        alpha=OPAQUE * norm(values.numpy()).filled().clip(0, 1) if look.overlay else None,  # a logarithm is rounded
    )  # fmt: skip
    _frame_patch(axes, cell, shown)
    total = f"{100 * float(cell.map.sum()):.0f}%"
    words = f"{total} on patches, max" if letters >= 26 else f"{total}, max" if letters >= 16 else f"{total},"
    name = cell.name if letters >= len(cell.name) else cell.name.split()[0]  # mean over heads
    _title(axes, f"{name}\n{words} {100 * float(cell.map.max()):.2g}%", letters, layout)
    return top


def _frame_patch(axes, cell, shown):
    from matplotlib.patches import Rectangle

    if cell.mark is not None and cell.map is not None:
        (x, y), (gh, gw), (_, height, width) = cell.mark, cell.map.shape, shown.shape
        box = Rectangle((x * width / gw, y * height / gh), width / gw, height / gh, fill=False, edgecolor="red")
        axes.add_patch(box)


def _draw_scale(axes, top, page, look, across=False):
    """A colour scale up to `top` as one image: matplotlib's is 256 areas, slower than all of the page."""
    levels = torch.linspace(0, 1, 256)[None if across else slice(None), slice(None) if across else None].numpy()
    extent = (0, 1, 0, 1)
    if look.overlay:
        axes.set_facecolor("0.5")
    axes.imshow(
        levels, cmap=COLOURS, origin="lower", aspect="auto", extent=extent, vmin=0, vmax=1,
        alpha=OPAQUE * levels if look.overlay else None,
    )  # fmt: skip
    axis, other = (axes.xaxis, axes.yaxis) if across else (axes.yaxis, axes.xaxis)
    other.set_ticks([])
    if not across:
        axes.yaxis.tick_right()
    places, labels = _ticks(top, look.log, "×" if page.times_patches else "%")
    axis.set_ticks(places, labels)
    axes.tick_params(labelsize=6.5, length=2, pad=1.5)


def _ticks(top, log, unit) -> tuple[list[float], list[str]]:
    """Places on a scale from 0 to 1, and what stands there."""
    from matplotlib.ticker import MaxNLocator

    if log:
        places = [n / DECADES for n in range(DECADES + 1)]
        return places, [f"{top * 10 ** (DECADES * (place - 1)):.2g}{unit}" for place in places]
    values = [value for value in MaxNLocator(nbins=4).tick_values(0, top or 1) if 0 <= value <= (top or 1)]
    return [value / (top or 1) for value in values], [f"{value:g}{unit}" for value in values]
