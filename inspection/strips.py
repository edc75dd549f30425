"""Pages of small maps: below each image a row for each token or model, a column for each block; blank if absent."""

from dataclasses import dataclass

import numpy as np

from inspection.pages import COLOURS, PERCENTILE, headed_figure, percentile_of

SIDE, ACROSS, DOWN = 0.75, 7.6, 7.5  # inches: of a map at most, of all maps of a page
LABEL, GAP, HEAD = 1.45, 0.06, 0.26  # of the text beside a row, between maps, of the line above an image


@dataclass
class Strip:
    label: str  # of at most two lines
    maps: np.ndarray  # (columns, gh, gw) shares; NaN where the token is absent
    top: float  # the share of the brightest colour, see `top_of`


@dataclass
class Group:
    caption: str
    picture: np.ndarray  # (3, h, w) uint8; those of a page have one shape
    strips: list[Strip]


def top_of(maps) -> float:
    """The share of the brightest colour for an array of maps with NaN where a token is absent."""
    return percentile_of(maps) or 1.0


def draw_strips(title, about, columns: list[str], groups: list[Group]):
    """A matplotlib figure, for at least one strip."""
    most = max(10, *(len(group.strips) for group in groups))
    side = min(SIDE, ACROSS / (1 + len(columns)), DOWN / most)
    h, w = groups[0].picture.shape[1:]
    cell = side * h / max(h, w), side * w / max(h, w)  # height, width
    width = max(7.5, 0.66 + LABEL + (1 + len(columns)) * (cell[1] + GAP))
    rows = sum(len(group.strips) for group in groups)
    height = 1.75 + len(groups) * HEAD + rows * (cell[0] + GAP)
    figure = headed_figure(
        (width, height), title, about,
        "Colour: share of the token's attention on each patch, mean over heads, from 0 (dark) to the percentage beside "
        f"the row (brightest): its {PERCENTILE:g}th percentile, and above. Nothing is drawn where a token is absent.",
    )  # fmt: skip

    def axes_at(left, y):
        axes = figure.add_axes((left / width, y / height, cell[1] / width, cell[0] / height))
        axes.set_axis_off()
        return axes

    first, y = 0.33 + cell[1] + GAP + LABEL, height - 0.95
    for c, name in enumerate(columns):
        x = first + c * (cell[1] + GAP)
        figure.text(x / width, y / height, name, fontsize=7.5, va="bottom")
    for group in groups:
        figure.text(0.33 / width, (y - 0.2) / height, group.caption, fontsize=8)
        y -= HEAD
        for n, strip in enumerate(group.strips):
            y -= cell[0] + GAP
            if n == 0:
                axes_at(0.33, y).imshow(np.moveaxis(group.picture, 0, 2), aspect="auto", interpolation="nearest")
            words = f"{strip.label}\nto {100 * strip.top:.3g}%"
            figure.text((first - LABEL) / width, (y + cell[0] / 2) / height, words, fontsize=7.5, va="center")
            for c, shares in enumerate(strip.maps):
                if not np.isnan(shares).any():
                    shown = dict(cmap=COLOURS, vmin=0, vmax=strip.top, aspect="auto", interpolation="nearest")
                    axes_at(first + c * (cell[1] + GAP), y).imshow(shares, **shown)
    return figure
