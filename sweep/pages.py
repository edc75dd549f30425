"""The pages of a sweep: sweep.pdf, and its first page as sweep.png."""

import math
from pathlib import Path
from textwrap import fill

import numpy as np
import torch

import utils
from checkpoints.models import load_model
from datasets import ImageData
from inspection.attention import can_be_seen
from inspection.pages import headed_figure, write_pdf
from inspection.strips import Group, Strip, draw_strips, top_of
from loading.memory import MemoryLoader
from sweep import results
from sweep.cells import GridCell, describe_cls
from sweep.prediction import predictions
from training.film import token_maps

DIFFERENCES = ("#b35806", "0.88", "#542788")  # less, none, more: the ends of PuOr, and grey
IMAGES = 3  # on the page of attention maps
WIDEST, PANEL_GAP, PAGE_SIDES = 15.5, 0.75, 1.5  # inches of heat maps whose 8 points are 6 at A4
MARKERS = "osD^vP*X<>dph8"


def draw_sweep(folder, data: ImageData, about: str, measure="accuracy", halved=None):
    """Write sweep.pdf and sweep.png from the finished cells in `folder`.

    `about`: a line on data and recipe; `measure`: one of `measures.PRIMARY`, of the verdict and the heat maps;
    `halved`: see `results.summarise`.
    """
    folder, records = Path(folder), results.collect(folder)
    if not records:
        return
    summary = results.summarise(records, measure, halved)
    figures = [*heat_maps(summary, about), marginal_curves(records, about), accuracy_and_flops(summary, about)]
    figures = [figure for figure in figures if figure is not None]
    found = predictions(records)
    figures += [prediction_page(found, about)] if found["cells"] else []
    page = attention_page(folder, records, summary, data) if summary["best"] else None
    figures += [] if page is None else [page]
    write_pdf(iter(figures), folder / "sweep.pdf")
    utils.write_atomically(folder / "sweep.png", lambda file: figures[0].savefig(file, format="png", dpi=130))


def heat_maps(summary, about) -> list:
    """The verdict's measure over cls_pos x reg_pos, for each number of registers: mean, standard deviation, seeds.

    A cell's colour is its difference from 0/0, where that is beyond the noise; all others are grey. Figures with as
    many panels as can be read at A4.
    """
    fell = [row | {"primary": None} for row in (summary["halving"] or {"fell": ()})["fell"]]
    panels, sheets, width = {}, [], math.inf
    for row in [*summary["groups"], *fell]:
        panels.setdefault(results.panel_of(row), []).append(row)
    for panel, rows in panels.items():
        own = len({row["cls_pos"] for row in rows}) + PANEL_GAP
        if width + own > WIDEST:
            sheets.append({})
            width = PAGE_SIDES
        sheets[-1][panel], width = rows, width + own
    pages = [f" ({n} of {len(sheets)})" if len(sheets) > 1 else "" for n in range(1, len(sheets) + 1)]
    return [_heat_map(sheet, page, summary, about) for sheet, page in zip(sheets, pages)]


def _heat_map(panels, page, summary, about):
    """`panels`: {panel: its rows}."""
    from matplotlib.colors import LinearSegmentedColormap

    columns = {c: results.in_order(row["cls_pos"] for row in rows) for c, rows in panels.items()}
    lines = {c: results.in_order(row["reg_pos"] for row in rows) for c, rows in panels.items()}
    widths = [len(columns[c]) for c in panels]
    width = max(8, sum(widths) + PANEL_GAP * len(panels) + PAGE_SIDES)  # inches
    names = {c: fill(results.panel_name(c), max(14, 13 * len(columns[c]))) for c in panels}
    titles = 0.14 * max(name.count("\n") for name in names.values())
    accuracy = summary["measure"] == "accuracy"
    name, reading = "the accuracy" if accuracy else summary["measure"], _reading(summary)
    reading_h = 0.16 * (1 + len(reading) // int(15.5 * width))
    height = 0.75 * max(map(len, lines.values())) + 2.1 + titles + reading_h
    figure = headed_figure((width, height), f"Where the tokens enter, and {name}{page}", about, reading)
    inside = dict(
        left=0.8 / width, right=1 - 0.3 / width, top=1 - (1.1 + titles) / height, bottom=(0.8 + reading_h) / height
    )
    panes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths, gridspec_kw=inside)[0]
    colours = LinearSegmentedColormap.from_list("differences", DIFFERENCES)
    differences = [abs(row["against_0_0"]["mean"]) for row in summary["groups"] if _beyond_noise(row)]
    largest = max(differences, default=1)
    for (c, rows), axes in zip(panels.items(), panes):
        shown = np.zeros((len(lines[c]), len(columns[c])))
        for row in rows:
            x, y = columns[c].index(row["cls_pos"]), lines[c].index(row["reg_pos"])
            shown[y, x] = row["against_0_0"]["mean"] if _beyond_noise(row) else 0
            _write_cell(axes, x, y, row, summary, abs(shown[y, x]) > 0.6 * largest)
        image = axes.imshow(shown, colours, vmin=-largest, vmax=largest, aspect="auto")
        axes.set(xlabel="CLS enters at block", ylabel="registers at block" if c[0] else "")
        axes.set_xticks(range(len(columns[c])), map(utils.flag_value, columns[c]))
        axes.set_yticks(range(len(lines[c])), ["-" if y is None else str(y) for y in lines[c]])
        axes.tick_params(length=0)
        axes.set_title(names[c], fontsize=8 if "\n" in names[c] else 10, loc="left")
    if differences:  # else all is grey
        bar = figure.colorbar(image, ax=panes, pad=0.02)
        bar.set_label("points against 0/0" if accuracy else f"{name} against 0/0", fontsize=8)
        bar.ax.yaxis.get_major_locator().set_params(nbins=3)
    return figure


def _reading(summary) -> str:
    accuracy = summary["measure"] == "accuracy"
    what = "Accuracy on the test images in %" if accuracy else f"{summary['measure']} (see docs/SWEEP.md)"
    return (
        f"{what}: mean over seeds ± standard deviation, number of seeds, and the difference from 0/0 with as many "
        "registers. Grey: within the noise of seeds"
        f"{' and test images' if accuracy else ''}, or too few seeds to know. Red frame: the best cell"
        f"{' on the held-out images' if accuracy else ''}; dashed: tied with it. {summary['verdict']}"
    )


def _beyond_noise(row) -> bool:
    against = row.get("against_0_0")
    return against is not None and against["low"] is not None and not against["low"] <= 0 <= against["high"]


def _write_cell(axes, x, y, row, summary, dark):
    """The words in a cell of a heat map, and its frame."""
    from matplotlib.patches import Rectangle

    if "rung" in row:
        axes.text(x, y, f"fell at\nrung {row['rung']}", ha="center", va="center", fontsize=8, color="0.4")
    if not row["primary"]:
        if "rung" not in row:  # such as a hit ratio without CLS
            axes.text(x, y, "no such\nvalue", ha="center", va="center", fontsize=8, color="0.4")
        return
    words = results.mean_and_sd(row["primary"]).replace(" ", "\n", 1) + f"\nn = {row['primary']['n']}"
    against = row["against_0_0"]
    words += "" if against is None else f"\n{against['mean']:+.2f}"
    axes.text(x, y, words, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    position = results.position_of(row)
    if position == summary["best"] or position in summary["tied"]:
        style = "-" if position == summary["best"] else "--"
        frame = dict(fill=False, edgecolor="tab:red", linewidth=2, linestyle=style)
        axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, **frame))


def marginal_curves(records, about):
    """Accuracy over one position, averaged over the other, with confidence intervals; of ordinary designs, if any.

    A position with a single value has no curve; None if neither has one.
    """
    records = [r for r in records if not results.describe_design(*results.panel_of(r)[1:])] or records
    reading = (
        "Mean over all values of the other position, then over the seeds that have all of these cells; bars: 95 % "
        f"interval of each such mean over seeds and test images (none with fewer than {results.MIN_SEEDS} seeds). "
        "Do not compare bars: cells share seeds and test images, so their differences are paired, see the table."
    )
    titles = {"cls_pos": "class token", "reg_pos": "registers"}
    found_along = {}
    for along in titles:
        found = {c: curve for c, curve in results.margins(records, along).items() if c[0] or along == "cls_pos"}
        if len({x for curve in found.values() for x in curve}) > 1:
            found_along[along] = found
    if not found_along:
        return None
    figure = headed_figure((9.5, 5), "One position at a time", about, reading)
    axes = figure.subplots(1, len(found_along), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.08, right=0.79, top=0.8, bottom=0.27, wspace=0.08)
    panels = list(dict.fromkeys(panel for found in found_along.values() for panel in found))
    handles = {}
    for ax, (along, found) in zip(axes, found_along.items()):
        title = titles[along]
        order = results.in_order(x for curve in found.values() for x in curve)
        for i, (count, curve) in enumerate(found.items()):
            xs = np.array([order.index(x) for x in curve]) + 0.06 * (i - (len(found) - 1) / 2)
            means = [point["mean"] for point in curve.values()]
            half = [0 if point["low"] is None else point["mean"] - point["low"] for point in curve.values()]
            style = dict(marker="o", capsize=3, color=f"C{panels.index(count) % 10}")
            handles[fill(results.panel_name(count), 26)] = ax.errorbar(xs, means, yerr=half, **style)
        ax.set_xticks(range(len(order)), map(utils.flag_value, order))
        ax.set(xlabel=f"{title} enter{'s' if title == 'class token' else ''} at block")
        ax.set_title(f"Over the position of the {title}", fontsize=10, loc="left")
        ax.grid(alpha=0.3)
    if len(handles) > 1:
        axes[-1].legend(handles.values(), handles, loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=7)
    axes[0].set_ylabel("test accuracy (%)")
    return figure


def accuracy_and_flops(summary, about):
    """Test accuracy over the FLOPs of a forward pass."""
    reading = (
        "Floating-point operations of the matrix products in a forward pass of one image (multiplications and "
        "additions). Bars: standard deviation over seeds. Up and to the left is better."
    )
    figure = headed_figure((9.5, 5.2), "Accuracy against cost", about, reading)
    ax = figure.add_axes((0.08, 0.24, 0.7, 0.58))
    rows = summary["groups"]
    positions = results.in_order(row["cls_pos"] for row in rows)
    counts = list(dict.fromkeys(map(results.panel_of, rows)))
    colours = _colours(positions)
    for row in rows:
        colour = colours[row["cls_pos"]]
        marker = MARKERS[counts.index(results.panel_of(row)) % len(MARKERS)]
        x, tested = row["flops"] / 1e6, row["test_top1"]
        ax.errorbar(x, tested["mean"], yerr=tested["sd"] or 0, marker=marker, color=colour, capsize=2)
    _legend(ax, colours, map(results.panel_name, counts))
    ax.set(xlabel="MFLOPs of a forward pass", ylabel="test accuracy (%)")
    ax.xaxis.get_major_locator().set_params(nbins=6)
    ax.grid(alpha=0.3)
    return figure


def _colours(positions) -> dict:
    """A colour for each position of CLS."""
    from matplotlib import colormaps

    return dict(zip(positions, colormaps["plasma"](np.linspace(0, 0.9, len(positions)))))


def _legend(ax, colours, names):
    """Right of the axes: the colour of each position of CLS, and the marker of each of `names`."""
    handles = [ax.plot([], [], "o", color=colour, label=describe_cls(p))[0] for p, colour in colours.items()]
    handles += [ax.plot([], [], m, color="0.4", label=fill(name, 28))[0] for name, m in zip(names, MARKERS)]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=7)


def prediction_page(found, about):
    """What the causal curve of CLS at 0 predicts for CLS at k, and the cell that was trained so. `found`: predictions.

    A point a cell, in the colour of its k.
    """
    reading = (
        "Across: minus the top-1 that the cell with CLS at 0 (same registers, same seed) loses where CLS is replaced "
        "by its initial token at the output of block k - 1. Up: the accuracy of the cell trained with CLS at k (the "
        "colour) minus that of the cell with CLS at 0. Dashed, where in view: equal. Bars: 95 % over images, paired. "
        + found["verdict"]
    )
    figure = headed_figure((9.5, 6.6), "Does a trained model say where CLS can enter?", about, reading)
    ax = figure.add_axes((0.08, 0.26, 0.7, 0.6))
    registers = list(dict.fromkeys(map(_registers, found["cells"])))
    colours = _colours(results.in_order(cell["cls_pos"] for cell in found["cells"]))
    for cell in found["cells"]:
        x, y = cell["predicted"], cell["measured"]
        bars = [
            np.abs(np.subtract(cell[f"{name}_interval"] or [cell[name]] * 2, cell[name]))[:, None]
            for name in ("predicted", "measured")
        ]
        marker = MARKERS[registers.index(_registers(cell)) % len(MARKERS)]
        style = dict(marker=marker, color=colours[cell["cls_pos"]], markersize=4, elinewidth=0.6)
        ax.errorbar(x, y, xerr=bars[0], yerr=bars[1], **style)
    limits = ax.axis()  # those of the cells: the line may be far away
    ax.axline((0, 0), slope=1, color="0.5", linestyle="--", linewidth=1)
    ax.axis(limits)
    ax.set(xlabel="predicted change of top-1 (points)", ylabel="measured change of top-1 (points)")
    _legend(ax, colours, registers)
    ax.grid(alpha=0.3)
    return figure


def _registers(cell) -> str:
    return results.label(cell).partition(", ")[2]


@utils.full_precision()
@torch.no_grad()
def attention_page(folder, records, summary, data: ImageData):
    """Maps of the class token in the best cell and in its 0/0 cell; None without such a pair."""
    best = results.key_of(summary["best"])
    groups = results.grouped(records)
    base = groups.get(results.baseline_of(best), {})
    seeds = sorted(groups[best].keys() & base.keys())
    if best[0] is None or not seeds or best == results.baseline_of(best):
        return None
    pair, groups_of_maps = [groups[best][seeds[0]], base[seeds[0]]], []
    models = [load_model(path_of(folder, record)) for record in pair]
    if not all(can_be_seen(model) for model, _ in models):
        return None
    few = data.val.part(range(min(IMAGES, len(data.val))))
    of_cells = [
        token_maps(model, next(iter(MemoryLoader(few, checkpoint["data"], len(few))))[0])["cls"]
        for model, checkpoint in models
    ]
    names = [results.label(record).replace(", ", ",\n", 1) for record in pair]
    for i in range(len(few)):
        strips = [Strip(name, maps[i], top_of(maps)) for name, maps in zip(names, of_cells)]
        groups_of_maps.append(Group(f"class: {data.classes[int(few.labels[i])]}", few.images[i].numpy(), strips))
    columns = [f"block {b}" for b in range(of_cells[0].shape[1])]
    title = "The class token in the best cell, and with all tokens from block 0"
    return draw_strips(title, f"held-out images, seed {seeds[0]}", columns, groups_of_maps)


def path_of(folder, record) -> Path:
    return Path(folder) / "cells" / GridCell(**results.position_of(record), seed=record["seed"]).name / "model.pth"
