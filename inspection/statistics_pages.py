"""The pages of analysis.pdf, drawn from the figures of analysis.json alone; each says below how to read it."""

import math
from textwrap import fill

from inspection.pages import write_pdf

ABSENT = "0.88"  # the grey of what is absent
WORDS = {"cls": "class token", "dist": "distillation token", "registers": "registers", "patches": "patches"}
HUES = {"cls": "tab:red", "dist": "tab:purple", "registers": "tab:orange", "patches": "tab:blue"}
LINES = {"class token": "tab:red", "distillation token": "tab:purple", "mean patch": "tab:blue"}


def draw_pages(figures, file):
    """`figures`: see `analyze_tokens.analyze`. Pages of what was not measured are left out."""
    pages = [norms_page, artefacts_page, entropy_page, distance_page]
    pages += [attention_page] if figures["cls_attention"] and any(figures["cls_attention"]["patches"]) else []
    pages += [similarity_page] if any(figures["register_similarity"]) else []
    pages += [probe_page] if figures["readout"] else []
    pages += [ablation_page] if figures["ablation"] else []
    write_pdf((page(figures) for page in pages), file)


def data_name(figures) -> str:
    data = figures["data"]
    return ", ".join(data["image_path"]) if data["image_path"] else data["name"]


def _page(figures, title, reading, size=(11, 7)):
    """A figure with its title, what it is of, and how to read it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    height = size[1]
    figure.get_layout_engine().set(rect=(0.01, 0.75 / height, 0.98, 1 - 1.45 / height), w_pad=0.08)
    figure.text(0.03, 1 - 0.22 / height, title, fontsize=14, weight="bold", va="top")
    what = f"{figures['model']['is']}; {figures['images']} images of {data_name(figures)}"
    figure.text(0.03, 1 - 0.5 / height, what, fontsize=8.5, color="0.35", va="top")
    figure.text(0.03, 0.66 / height, fill(reading, int(size[0] * 16)), fontsize=8.5, color="0.2", va="top")
    return figure


def _blocks(axes, figures, label=True):
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.5, len(figures["tokens"]) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if label:
        axes.set_xlabel("block")


def _numbers(values):
    return [float("nan") if value is None else value for value in values]


# Norms -----------------------------------------------------------------------------------------------------------


def norms_page(figures):
    kinds = [kind for kind in WORDS if kind in figures["norms"]]
    figure = _page(
        figures, "Norms of the tokens",
        "Each column is a block, at its output: the colour shows how many of the tokens have a norm of that "
        "size (logarithmic), the white dot is their median. A second band far above the main one is a group "
        "of high-norm tokens. The dashed line is the threshold for artefacts. Grey: the token is absent there.",
        (max(11, 3.6 * len(kinds)), 6),
    )  # fmt: skip
    every = [found for kind in kinds for found in figures["norms"][kind] if found]
    low, high = min(f["quantiles"]["0.01"] for f in every) / 1.5, max(f["largest"] for f in every) * 1.5
    plots = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(plots, kinds):
        drawn = _draw_histograms(axes, figures["norms"][kind])
        medians = [None if found is None else found["quantiles"]["0.5"] for found in figures["norms"][kind]]
        axes.plot(_numbers(medians), "o", color="white", markeredgecolor="black", markersize=4)
        if kind == "patches":
            thresholds = [found["threshold"] for found in figures["artefacts"]["blocks"]]
            axes.plot(thresholds, "--", color="tab:red", linewidth=1)
        axes.set(yscale="log", ylim=(low, high), title=WORDS[kind])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if high < 50 * low else "")
        _blocks(axes, figures)
    plots[0].set_ylabel("norm")
    figure.colorbar(drawn, ax=plots, label="tokens, relative to the fullest bin", pad=0.01)
    return figure


def _draw_histograms(axes, blocks, merged=4):
    """Distributions as columns, each to its own largest bin; `merged` bins are drawn as one."""
    from matplotlib.colors import LogNorm

    drawn = None
    for i, found in enumerate(blocks):
        if found is None:
            axes.axvspan(i - 0.5, i + 0.5, color=ABSENT, linewidth=0)
            continue
        histogram = found["histogram"]
        counts, per_decade = histogram["counts"], histogram["bins_per_decade"]
        counts = [sum(counts[k : k + merged]) for k in range(0, len(counts), merged)]
        edges = [histogram["first_edge"] * 10 ** (merged * k / per_decade) for k in range(len(counts) + 1)]
        shares = [[count / max(counts) or float("nan")] for count in counts]
        drawn = axes.pcolormesh(
            [i - 0.45, i + 0.45], edges, shares, cmap="viridis", norm=LogNorm(1e-3, 1), rasterized=True
        )
    return drawn


def artefacts_page(figures):
    blocks = figures["artefacts"]["blocks"]
    begins, rule = figures["artefacts"]["begins_at_block"], figures["artefacts"]["rule"]
    with_some = {i: found for i, found in enumerate(blocks) if found["share"] > 0}
    columns = min(8, max(len(with_some), 1))
    rows = math.ceil(len(with_some) / columns)
    figure = _page(
        figures,
        f"High-norm artefact patches: {'no block has any' if begins is None else f'they begin at block {begins}'}",
        f"Above: share of all patches that are artefacts: {rule}. Below, for the blocks that have any: in which share "
        "of the images each place of the grid is one.",
        (11, 4.4 + 1.9 * rows),
    )
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[2.4, *[1.9] * rows])
    axes, shares = figure.add_subplot(grid[0, :]), [100 * found["share"] for found in blocks]
    axes.bar(range(len(blocks)), shares, color=HUES["patches"])
    axes.set(ylabel="% of patches", ylim=(0, max(*shares, 0.1) * 1.15))
    if not with_some:
        axes.text(0.5, 0.5, "no patch is above its block's threshold", ha="center", transform=axes.transAxes)
    _blocks(axes, figures)
    top = max((max(map(max, found["where"])) for found in with_some.values()), default=1)
    plots = []
    for n, (i, found) in enumerate(with_some.items()):
        plots.append(figure.add_subplot(grid[1 + n // columns, n % columns]))
        percent = [[100 * v for v in row] for row in found["where"]]
        drawn = plots[-1].imshow(percent, vmin=0, vmax=100 * top, cmap="magma")
        plots[-1].set_title(f"block {i}: {100 * found['share']:.2g}%", fontsize=8)
        plots[-1].set_axis_off()
    if plots:
        figure.colorbar(drawn, ax=plots, label="% of images")
    return figure


# Attention -------------------------------------------------------------------------------------------------------


def _draw_heads(figure, axes, blocks, title, label, vmin=0.0, vmax=None):
    """Blocks across, heads upwards; grey where the token is absent."""
    heads = max(len(values) for values in blocks if values is not None)
    table = [[float("nan") if values is None else values[head] for values in blocks] for head in range(heads)]
    axes.set_facecolor(ABSENT)
    drawn = axes.imshow(table, origin="lower", aspect="auto", cmap="viridis", vmin=vmin, vmax=vmax)
    axes.set(title=title, ylabel="head")
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(drawn, ax=axes, label=label)


def entropy_page(figures):
    entropy = figures["entropy"]
    kinds = [kind for kind in ("cls", "patches", "registers", "dist") if kind in entropy]
    largest = math.log(max(figures["tokens"]))
    figure = _page(
        figures, "How widely each head looks: entropy of its attention",
        "In nats, mean over images (and over the tokens of a kind): 0 is attention to one token alone, "
        f"{largest:.2f} is the same to all of the {max(figures['tokens'])} tokens, so e to this power is the "
        "number of tokens looked at. Grey: the token is absent there.", (11, 1.6 + 2.6 * math.ceil(len(kinds) / 2)),
    )  # fmt: skip
    plots = figure.subplots(math.ceil(len(kinds) / 2), 2, squeeze=False)
    for axes, kind in zip(plots.flat, kinds):
        _draw_heads(figure, axes, entropy[kind], f"rows of the {WORDS[kind]}", "nats", vmax=largest)
        _blocks(axes, figures)
    for axes in plots.flat[len(kinds) :]:
        axes.set_axis_off()
    return figure


def distance_page(figures):
    height, width = figures["data"]["input_size"]
    figure = _page(
        figures, "How far each head looks: mean distance of the patches' attention",
        "Distance between the centres of a patch and of the patches that it attends to, weighted by attention,"
        f" mean over patches and images, in pixels of the model's input ({height} x {width}). Left: a dot is a "
        "head, sorted in no way; low dots are local heads. Attention to other tokens is left out.", (11, 5),
    )  # fmt: skip
    left, right = figure.subplots(1, 2)
    for i, heads in enumerate(figures["distance"]):
        left.plot([i] * len(heads), heads, "o", color=HUES["patches"], alpha=0.6, markersize=4)
    left.plot([sum(heads) / len(heads) for heads in figures["distance"]], color="black", linewidth=1, label="mean")
    left.set(ylabel="pixels", ylim=(0, None), title="heads")
    left.legend()
    _blocks(left, figures)
    _draw_heads(figure, right, figures["distance"], "each head", "pixels")
    _blocks(right, figures)
    return figure


def attention_page(figures):
    shares = figures["cls_attention"]
    kinds = [kind for kind in ("patches", "registers", "dist", "cls") if kind in shares]
    names = WORDS | {"cls": "itself"}
    figure = _page(
        figures, "Where the class token's attention goes",
        "Above: mean over heads and images, in %; a block's shares add up to 100. Below: each head. Grey: the "
        "class token is absent there; a kind of tokens that is absent gets none of the bar.", (11, 7),
    )  # fmt: skip
    grid = figure.add_gridspec(2, len(kinds))
    axes = figure.add_subplot(grid[0, :])
    present = [i for i, values in enumerate(shares["patches"]) if values is not None]
    for i in set(range(len(figures["tokens"]))) - set(present):
        axes.axvspan(i - 0.5, i + 0.5, color=ABSENT, linewidth=0)
    base = [0.0] * len(present)
    for kind in kinds:
        heads = [shares[kind][i] or [0.0] for i in present]
        values = [100 * sum(v) / len(v) for v in heads]
        axes.bar(present, values, bottom=base, color=HUES[kind], label=f"to {names[kind]}")
        base = [b + v for b, v in zip(base, values)]
    axes.set(ylabel="% of its attention", ylim=(0, 100))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kinds), frameon=False)
    _blocks(axes, figures)
    for column, kind in enumerate(kinds):
        axes = figure.add_subplot(grid[1, column])
        percent = [None if values is None else [100 * v for v in values] for values in shares[kind]]
        _draw_heads(figure, axes, percent, f"to {names[kind]}", "%")
        _blocks(axes, figures)
    return figure


# Registers, read-outs, ablation ----------------------------------------------------------------------------------


def similarity_page(figures):
    blocks = figures["register_similarity"]
    columns = min(6, len(blocks))
    rows = math.ceil(len(blocks) / columns)
    figure = _page(
        figures, "Do the registers differ?",
        "Cosine between the registers at the output of each block, mean over images: 1 (yellow) off the "
        "diagonal means that two registers carry the same, 0 that they have nothing in common.",
        (11, 1.7 + 1.9 * rows),
    )  # fmt: skip
    plots = figure.subplots(rows, columns, squeeze=False)
    for axes in plots.flat[len(blocks) :]:
        axes.set_axis_off()
    for i, (axes, cosines) in enumerate(zip(plots.flat, blocks)):
        axes.set_xticks([])
        axes.set_yticks([])
        if cosines is None:
            axes.set_facecolor(ABSENT)
            axes.set_box_aspect(1)
            axes.set_title(f"block {i}: absent", fontsize=8)
            continue
        drawn = axes.imshow(cosines, vmin=-1, vmax=1, cmap="viridis")
        axes.set_xticks(range(len(cosines)))
        axes.set_yticks(range(len(cosines)))
        axes.tick_params(labelsize=6)
        others = [v for a, row in enumerate(cosines) for b, v in enumerate(row) if a != b]
        mean = f", mean {sum(others) / len(others):.2f}" if others else ""
        axes.set_title(f"block {i}{mean}", fontsize=8)
    figure.colorbar(drawn, ax=plots, label="cosine")
    return figure


def probe_page(figures):
    readout = figures["readout"]
    figure = _page(
        figures, "What can be read off each token",
        f"Accuracy at telling {readout['classes']} classes from one token at the output of each block, by "
        f"{readout['folds']}-fold cross-validation over {readout['images']} images that are in no other way "
        "used; dashed: always saying the most frequent class. Bars: standard deviation over folds. A line "
        "begins where its token enters.",
        (11, 5.5),
    )  # fmt: skip
    from matplotlib import colormaps

    registers = [token for token in readout["linear"] if token.startswith("register")]
    oranges = colormaps["YlOrBr"]
    hues = LINES | {token: oranges(0.45 + 0.45 * n / max(len(registers), 1)) for n, token in enumerate(registers)}
    titles = {"linear": "linear read-out", "neighbours": "5 nearest neighbours"}
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        for token, values in readout[kind].items():
            spread = readout["deviation_over_folds"][f"{kind}, {token}"]
            axes.errorbar(
                range(len(values)), _numbers(values), _numbers(spread), color=hues[token], marker=".", label=token,
                elinewidth=0.6, linewidth=1.4,
            )  # fmt: skip
        axes.axhline(readout["chance"], color="0.4", linestyle="--", linewidth=1)
        axes.set(title=title, ylabel="accuracy (%)", ylim=(0, 102))
        axes.grid(alpha=0.3)
        _blocks(axes, figures)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def ablation_page(figures):
    found = figures["ablation"]
    kinds = [kind for kind in found if kind not in ("images", "clean")]
    figure = _page(
        figures, "Accuracy when something of the registers is replaced",
        "Replaced in every block from the entry on, at test time: by zero (a value that the model never met, "
        "so this overstates what is lost), by the mean over all images, by what another image has there. The "
        "line is the accuracy as it is. In the bars: the accuracy, and how many of the predictions changed.",
        (11, 4.8),
    )  # fmt: skip
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds):
        names = list(found[kind])
        values = [found[kind][name]["accuracy"] for name in names]
        axes.bar(names, values, color=HUES["registers"], width=0.6)
        for x, name in enumerate(names):
            words = f"{values[x]:.1f}%\n{found[kind][name]['changed']:.1f}% changed"
            axes.text(x, 4, words, ha="center", fontsize=9)
        axes.axhline(found["clean"], color="black", linewidth=1, label=f"as it is: {found['clean']:.1f}%")
        axes.set(ylabel="accuracy (%)", ylim=(0, 102))
        axes.set_title(kind.replace("_", " "), loc="left")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    return figure
