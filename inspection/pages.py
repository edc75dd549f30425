"""What pages show, what all pages share, and the PDF and PNG files they are written to."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from torch import Tensor

import utils
from inspection.fonts import use_fonts
from models_dynamic import AttentionMaps

COLOURS = "viridis"
PDF = {"pdf.fonttype": 42}  # TrueType: journals refuse matplotlib's Type 3, other programs cannot edit it
PERCENTILE = 99  # of the values, at the top of a scale: a single patch would leave the others dark
ATTENTION = "share of the token's attention on each patch, in %, after softmax over all tokens"
TIMES_PATCHES = (
    "the token's attention on each patch, after softmax over all tokens, times the number of patches, which differ; "
    "1 = uniform over patches"
)


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


def percentile_of(values, percentile=PERCENTILE) -> float:
    """Of an array that may have NaN for what is absent; the largest value where it is 0."""
    values = np.asarray(values)
    return float(np.nanpercentile(values, percentile)) or float(np.nanmax(values))


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
    caption: str = ""  # of the image: its class, the prediction
    about: str = ""  # model, file, crop
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

    def top(self, percentile=100) -> float:
        """The percentile of the shades of all maps; the largest where that is 0."""
        shades = [self.shades(cell.map).flatten() for row in self.rows for cell in row.cells if cell.map is not None]
        return percentile_of(torch.cat(shades), percentile) if shades else 0.0


def headed_figure(size, title, about, reading, rect=None):
    """A figure of `size` inches with a title, a line on what it is of and, at the bottom, how to read it.

    `rect`: where matplotlib's constrained layout puts the plots (left, bottom, width, height; 0..1); None: no layout.
        Beside a reading of three lines: (0.01, 0.75 / height, 0.98, 1 - 1.45 / height), with the height in inches.
    """
    from matplotlib.figure import Figure

    width, height = size
    figure, left = Figure(figsize=size, layout="constrained" if rect else None), 0.33 / width
    if rect:
        figure.get_layout_engine().set(rect=rect, w_pad=0.08)
    figure.text(left, 1 - 0.2 / height, title, fontsize=14, weight="bold", va="top")
    figure.text(left, 1 - 0.52 / height, about, fontsize=8.5, color="0.35", va="top")
    figure.text(left, 0.15 / height, fill(reading, int(15 * (width - 0.66))), fontsize=8.5, color="0.2", va="bottom")
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
        use_fonts(figure)
        utils.write_atomically(files[-1], lambda out, f=figure: f.savefig(out, format="png", dpi=160))
    return files


def write_pdf(figures, file):
    """Write an iterable of figures, one at a time, as the pages of one PDF with searchable text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import PdfPages

    def write(out):
        with rc_context(PDF), PdfPages(out) as pdf:
            for figure in figures:
                pdf.savefig(use_fonts(figure), dpi=200)

    utils.write_atomically(file, write)
