"""The pages of a sweep: sweep.pdf, and its first page as sweep.png."""

from pathlib import Path
from textwrap import fill

import numpy as np
import torch

import utils
from checkpoints.models import load_model
from datasets import ImageData
from inspection.map_pages import draw_page
from inspection.pages import ATTENTION, COLOURS, MapCell, Page, Row, headed_figure, write_pdf
from loading.memory import MemoryLoader
from sweep import results
from sweep.cells import GridCell, describe_cls
from sweep.prediction import predictions
from training.film import token_maps

IMAGES = 3  # on the page of attention maps
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
    figures = [heat_maps(summary, about), marginal_curves(records, about), accuracy_and_flops(summary, about)]
    found = predictions(records)
    figures += [prediction_page(found, about)] if found["cells"] else []
    page = attention_page(folder, records, summary, data) if summary["best"] else None
    figures += [] if page is None else [draw_page(page, vmax=page.top())]
    write_pdf(iter(figures), folder / "sweep.pdf")
    utils.write_atomically(folder / "sweep.png", lambda file: figures[0].savefig(file, format="png", dpi=130))


def heat_maps(summary, about):
    """The verdict's measure over cls_pos x reg_pos, for each number of registers: mean, standard deviation, seeds."""
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    rows, accuracy = summary["groups"], summary["measure"] == "accuracy"
    fell = [row | {"primary": None} for row in (summary["halving"] or {"fell": ()})["fell"]]
    counts = list(dict.fromkeys(map(results.panel_of, [*rows, *fell])))  # panels
    means = [row["primary"]["mean"] for row in rows if row["primary"]] or [0]
    scale = Normalize(min(means), max(means) if max(means) > min(means) else min(means) + 1)
    panels = {c: [row for row in [*rows, *fell] if results.panel_of(row) == c] for c in counts}
    columns = {c: results.in_order(row["cls_pos"] for row in panels[c]) for c in counts}
    lines = {c: results.in_order(row["reg_pos"] for row in panels[c]) for c in counts}
    widths = [len(columns[c]) for c in counts]
    width = max(7.5, sum(widths) + 0.75 * len(counts) + 1.2)  # inches
    names = {c: fill(results.panel_name(c), max(14, 15 * len(columns[c]))) for c in counts}
    titles = 0.14 * max(name.count("\n") for name in names.values())
    height = 0.7 * max(map(len, lines.values())) + 2.9 + titles
    what = "Accuracy on the test images in %" if accuracy else f"{summary['measure']} (see docs/SWEEP.md)"
    reading = (
        f"{what}: mean over seeds ± standard deviation, and the number of seeds. Frame: the best cell"
        f"{' on the held-out images' if accuracy else ''}. {summary['verdict']}"
    )
    name = "the accuracy" if accuracy else summary["measure"]
    figure = headed_figure((width, height), f"Where the tokens enter, and {name}", about, reading)
    inside = dict(left=0.8 / width, right=1 - 0.2 / width, top=1 - (1.35 + titles) / height, bottom=1.55 / height)
    panes = figure.subplots(1, len(counts), squeeze=False, width_ratios=widths, gridspec_kw=inside)[0]
    for c, axes in zip(counts, panes):
        shown = np.full((len(lines[c]), len(columns[c])), np.nan)
        for row in panels[c]:
            x, y = columns[c].index(row["cls_pos"]), lines[c].index(row["reg_pos"])
            if "rung" in row:
                axes.text(x, y, f"fell at\nrung {row['rung']}", ha="center", va="center", fontsize=8, color="0.4")
            if not row["primary"]:
                continue
            shown[y, x] = row["primary"]["mean"]
            words = results.mean_and_sd(row["primary"]).replace(" ", "\n", 1) + f"\nn = {row['primary']['n']}"
            colour = "black" if scale(shown[y, x]) > 0.55 else "white"
            axes.text(x, y, words, ha="center", va="center", fontsize=8, color=colour)
            if results.position_of(row) == summary["best"]:
                axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="red", linewidth=2))
        image = axes.imshow(shown, COLOURS, scale, aspect="auto")
        axes.set(facecolor="0.94", xlabel="CLS enters at block", ylabel="registers at block" if c[0] else "")
        axes.set_xticks(range(len(columns[c])), map(utils.flag_value, columns[c]))
        axes.set_yticks(range(len(lines[c])), ["-" if y is None else str(y) for y in lines[c]])
        axes.tick_params(length=0)
        axes.set_title(names[c], fontsize=8 if "\n" in names[c] else 10, loc="left")
    figure.colorbar(image, ax=panes, pad=0.02, label="test accuracy (%)" if accuracy else name)
    return figure


def marginal_curves(records, about):
    """Accuracy over one position, averaged over the other, with confidence intervals; of ordinary designs, if any."""
    records = [r for r in records if not results.describe_design(*results.panel_of(r)[1:])] or records
    reading = (
        "Mean over all values of the other position, then over the seeds that have all of these cells; bars: 95 % "
        f"interval of each such mean over seeds and test images (none with fewer than {results.MIN_SEEDS} seeds). "
        "Do not compare bars: cells share seeds and test images, so their differences are paired, see the table."
    )
    figure = headed_figure((9.5, 5), "One position at a time", about, reading)
    axes = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.08, right=0.97, top=0.8, bottom=0.27, wspace=0.08)
    for ax, along, title in zip(axes, ("cls_pos", "reg_pos"), ("class token", "registers")):
        found = {c: curve for c, curve in results.margins(records, along).items() if c[0] or along == "cls_pos"}
        order = results.in_order(x for curve in found.values() for x in curve)
        for i, (count, curve) in enumerate(found.items()):
            xs = np.array([order.index(x) for x in curve]) + 0.06 * (i - (len(found) - 1) / 2)
            means = [point["mean"] for point in curve.values()]
            half = [0 if point["low"] is None else point["mean"] - point["low"] for point in curve.values()]
            ax.errorbar(xs, means, yerr=half, marker="o", capsize=3, label=results.panel_name(count))
        ax.set_xticks(range(len(order)), map(utils.flag_value, order))
        ax.set(xlabel=f"{title} enter{'s' if title == 'class token' else ''} at block")
        ax.set_title(f"Over the position of the {title}", fontsize=10, loc="left")
        ax.grid(alpha=0.3)
        if found:
            ax.legend(fontsize=8)
    axes[0].set_ylabel("test accuracy (%)")
    return figure


def accuracy_and_flops(summary, about):
    """Test accuracy over the FLOPs of a forward pass."""
    from matplotlib import colormaps

    reading = (
        "Floating-point operations of the matrix products in a forward pass of one image (multiplications and "
        "additions). Bars: standard deviation over seeds. Up and to the left is better."
    )
    figure = headed_figure((9.5, 5.2), "Accuracy against cost", about, reading)
    ax = figure.add_axes((0.08, 0.24, 0.7, 0.58))
    rows = summary["groups"]
    positions = results.in_order(row["cls_pos"] for row in rows)
    counts = list(dict.fromkeys(map(results.panel_of, rows)))
    colours = colormaps["plasma"](np.linspace(0, 0.9, len(positions)))
    for row in rows:
        colour = colours[positions.index(row["cls_pos"])]
        marker = MARKERS[counts.index(results.panel_of(row)) % len(MARKERS)]
        x, tested = row["flops"] / 1e6, row["test_top1"]
        ax.errorbar(x, tested["mean"], yerr=tested["sd"] or 0, marker=marker, color=colour, capsize=2)
    handles = [ax.plot([], [], "o", color=c, label=describe_cls(p))[0] for p, c in zip(positions, colours)]
    handles += [
        ax.plot([], [], m, color="0.4", label=fill(results.panel_name(c), 28))[0] for c, m in zip(counts, MARKERS)
    ]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=7)
    ax.set(xlabel="MFLOPs of a forward pass", ylabel="test accuracy (%)")
    ax.grid(alpha=0.3)
    return figure


def prediction_page(found, about):
    """What the causal curve of CLS at 0 predicts for CLS at k, and the cell that was trained so. `found`: predictions.

    A point a cell, with its k beside it.
    """
    reading = (
        "Across: minus the top-1 that the cell with CLS at 0 (same registers, same seed) loses where CLS is replaced "
        "by its initial token at the output of block k - 1. Up: the accuracy of the cell trained with CLS at k (the "
        "number) minus that of the cell with CLS at 0. Dashed: equal. Bars: 95 % over images, paired. "
        + found["verdict"]
    )
    figure = headed_figure((9.5, 6.6), "Does a trained model say where CLS can enter?", about, reading)
    ax = figure.add_axes((0.08, 0.26, 0.7, 0.6))
    groups = {}
    for cell in found["cells"]:
        registers = results.label(cell).partition(", ")[2]
        groups.setdefault(registers, []).append(cell)
    for i, (registers, cells) in enumerate(groups.items()):
        x, y = (np.array([cell[name] for cell in cells]) for name in ("predicted", "measured"))
        bars = [
            np.abs(np.array([cell[f"{name}_interval"] or [cell[name]] * 2 for cell in cells]) - values[:, None]).T
            for name, values in (("predicted", x), ("measured", y))
        ]
        style = dict(fmt=MARKERS[i % len(MARKERS)], color=f"C{i % 10}", markersize=4, elinewidth=0.6)
        ax.errorbar(x, y, xerr=bars[0], yerr=bars[1], label=registers, **style)
        for cell in cells:
            at = cell["predicted"], cell["measured"]
            ax.annotate(str(cell["cls_pos"]), at, (4, 4), textcoords="offset points", fontsize=8)
    ax.axline((0, 0), slope=1, color="0.5", linestyle="--", linewidth=1)
    ax.set(xlabel="predicted change of top-1 (points)", ylabel="measured change of top-1 (points)")
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
    ax.grid(alpha=0.3)
    return figure


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
    rows = []
    pair = [groups[best][seeds[0]], base[seeds[0]]]
    models = [load_model(path_of(folder, record)) for record in pair]
    few = data.val.part(range(min(IMAGES, len(data.val))))
    for i in range(len(few)):
        for record, (model, checkpoint) in zip(pair, models):
            images, _ = next(iter(MemoryLoader(few, checkpoint["data"], len(few))))
            maps = torch.from_numpy(token_maps(model, images[i : i + 1])["cls"][0])
            enters = record["cls_pos"]
            maps_at = ((f"block {b}", None if b < enters else m) for b, m in enumerate(maps))
            cells = [MapCell(name, shown, f"enters at block {enters}") for name, shown in maps_at]
            name = f"{results.label(record)}\nclass: {data.classes[int(few.labels[i])]}"
            rows.append(Row(name, few.images[i], cells))
    title = f"The class token in the best cell, and with all tokens from block 0 (seed {seeds[0]})"
    return Page("sweep", title, rows, "held-out images, mean over heads", f"{ATTENTION}, mean over heads")


def path_of(folder, record) -> Path:
    return Path(folder) / "cells" / GridCell(**results.position_of(record), seed=record["seed"]).name / "model.pth"
