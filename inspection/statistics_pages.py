"""The pages of analysis.pdf, drawn from analysis.json alone; each explains at its bottom how to read it."""

import math

import numpy as np

import utils
from inspection.inputs import names_of
from inspection.pages import headed_figure
from inspection.statistics import BEGIN, NAMES

LETTERS = 140  # of the line below a title
MERGED = 4  # bins of norms that are drawn as one
ABSENT = "0.88"  # the grey of absent tokens
WORDS = NAMES | {"patches": "patches"}
HUES = {"cls": "tab:red", "dist": "tab:purple", "registers": "tab:orange", "patches": "tab:blue"}
LINES = {name: HUES[kind] for kind, name in NAMES.items()}


def statistics_pages(results):
    """Figures of what is in `results` (see `analyze_tokens.analyze`) and asked for there."""
    pages = [norms_page, artefacts_page] if "norms" in results["what"] else []
    if "attention" in results["what"]:
        pages += [entropy_page, *[distance_page] * any(results["distance"])]  # none if only CLS attends
        pages += [attention_page] if any(results["cls_attention"]["patches"]) else []
        pages += [similarity_page] if any(results["register_similarity"]) else []
    pages += [probe_page] if results.get("readout") else []
    pages += [ablation_page] if results["ablation"] else []
    return (page(results) for page in pages)


def about(results) -> str:
    """The line below a title: model, images and their source, in at most `LETTERS`."""
    (name,), data = names_of([results["model"]["path"]]), results["data"]
    source = ", ".join(names_of(data["image_path"])) if data["image_path"] else data["name"]
    words = f"{name}: {results['model']['is']}; {results['images']} images of {source}"
    return utils.shortened(words, LETTERS)


def _page(results, title, reading, size=(11, 7)):
    rect = (0.01, 0.75 / size[1], 0.98, 1 - 1.45 / size[1])
    return headed_figure(size, title, about(results), reading, rect)


def block_axis(axes, depth):
    from matplotlib.ticker import MaxNLocator

    axes.set(xlim=(-0.5, depth - 0.5), xlabel="block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_curve(axes, values, interval=None, x=None, **style):
    """A line over the blocks, or over `x`, with a band between lower and upper ends; gaps where a value is None."""
    x = range(len(values)) if x is None else x
    (line,) = axes.plot(x, np.array(values, float), **{"marker": "."} | style)
    if interval:
        ends = np.array([[None, None] if pair is None else pair for pair in interval], float).T
        axes.fill_between(x, *ends, color=line.get_color(), alpha=0.15, linewidth=0)


def mark_absent(axes, values):
    """Grey blocks where the token is absent."""
    for i, value in enumerate(values):
        if value is None:
            axes.axvspan(i - 0.5, i + 0.5, color=ABSENT, linewidth=0)


def norms_page(results):
    kinds = [kind for kind in WORDS if kind in results["norms"]]
    figure = _page(
        results, "Norms of the tokens",
        "Each column is the output of a block: the colour shows how many tokens have that norm (logarithmic), the "
        "white dot is their median. Red steps: each block's own threshold for artefacts; tinted: above it. A group of "
        "high-norm patches is a second band with a gap below it; a band that reaches the step without a gap is only "
        "the tail of all patches. Grey: the token is absent.",
        (max(11, 3.6 * len(kinds)), 6),
    )  # fmt: skip
    every = [found for kind in kinds for found in results["norms"][kind] if found]
    thresholds = [found["threshold"] for found in results["artefacts"]["blocks"]]
    low = min(f["quantiles"]["0.01"] for f in every) / 1.5
    high = max(*(f["largest"] for f in every), *thresholds) * 1.5
    plots = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(plots, kinds):
        if kind == "patches":
            for i, threshold in enumerate(thresholds):
                axes.fill_between([i - 0.5, i + 0.5], threshold, high, color="tab:red", alpha=0.08, linewidth=0)
                axes.plot([i - 0.5, i + 0.5], [threshold] * 2, color="tab:red", linewidth=1.2)
        drawn = _draw_histograms(axes, results["norms"][kind])
        mark_absent(axes, results["norms"][kind])
        medians = [None if found is None else found["quantiles"]["0.5"] for found in results["norms"][kind]]
        axes.plot(np.array(medians, float), "o", color="white", markeredgecolor="black", markersize=4)
        axes.set(yscale="log", ylim=(low, high), title=WORDS[kind])
        few_ticks(axes)
        block_axis(axes, len(results["tokens"]))
    plots[0].set_ylabel("norm")
    figure.colorbar(drawn, ax=plots, label="tokens, relative to the fullest bin", pad=0.01)
    return figure


def few_ticks(axes):
    """Plain numbers at 1, 2 and 5 of each decade of a logarithmic axis, or at 1 if there are many decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_histograms(axes, blocks):
    """Distributions as columns, each to its own largest bin; `MERGED` bins are drawn as one."""
    from matplotlib.colors import LogNorm

    for i, found in enumerate(blocks):
        if found is None:
            continue
        counts, start = found["histogram"]["counts"], found["histogram"]["first_edge"]
        step = 10 ** (MERGED / found["histogram"]["bins_per_decade"])
        counts = [sum(counts[k : k + MERGED]) for k in range(0, len(counts), MERGED)]
        edges = [start * step**k for k in range(len(counts) + 1)]
        shares = [[count / max(counts) or float("nan")] for count in counts]
        style = dict(cmap="viridis", norm=LogNorm(1e-3, 1), rasterized=True)
        drawn = axes.pcolormesh([i - 0.45, i + 0.45], edges, shares, **style)
    return drawn


def where_artefacts(found) -> str:
    """'from block 2 on', 'none in any block', or that they are too few for a beginning."""
    if found["begins_at_block"] is not None:
        return f"from block {found['begins_at_block']} on"
    return f"under {100 * BEGIN:g}% in each block" if any(b["share"] for b in found["blocks"]) else "none in any block"


def artefacts_page(results):
    blocks, rule = results["artefacts"]["blocks"], results["artefacts"]["rule"]
    title = f"High-norm artefact patches: {where_artefacts(results['artefacts'])}"
    with_some = {i: found for i, found in enumerate(blocks) if found["share"] > 0}
    if not with_some:
        return _no_artefacts(results, title)
    columns = min(6, len(with_some))
    rows = math.ceil(len(with_some) / columns)
    figure = _page(
        results,
        title,
        f"Above: share of all patches that are artefacts: {rule}. Below, for the blocks that have any: the share of "
        "images in which each patch is one.",
        (11, 4.4 + 1.9 * rows),
    )
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[2.4, *[1.9] * rows])
    axes, shares = figure.add_subplot(grid[0, :]), [100 * found["share"] for found in blocks]
    axes.bar(range(len(blocks)), shares, color=HUES["patches"])
    axes.set(ylabel="% of patches", ylim=(0, max(shares) * 1.15))
    block_axis(axes, len(results["tokens"]))
    top = max(max(map(max, found["where"])) for found in with_some.values())
    plots = []
    for n, (i, found) in enumerate(with_some.items()):
        plots.append(figure.add_subplot(grid[1 + n // columns, n % columns]))
        percent = [[100 * v for v in row] for row in found["where"]]
        drawn = plots[-1].imshow(percent, vmin=0, vmax=100 * top, cmap="magma")
        plots[-1].set_title(f"block {i}: {100 * found['share']:.2g}%", fontsize=8)
        plots[-1].set_axis_off()
    figure.colorbar(drawn, ax=plots, label="% of images")
    return figure


def _no_artefacts(results, title):
    """A sentence with the block that comes closest."""
    largest = np.array([norms["largest"] for norms in results["norms"]["patches"]])
    thresholds = np.array([found["threshold"] for found in results["artefacts"]["blocks"]])
    i = int(np.argmax(largest / thresholds))
    reading = (
        f"No patch is above its block's threshold. Block {i} comes closest: the largest norm is {largest[i]:.3g}, the "
        f"threshold {thresholds[i]:.3g}. The rule: {results['artefacts']['rule']}."
    )
    return headed_figure((11, 1.6), title, about(results), reading)


def _draw_heads(axes, blocks, title, label, vmax=None):
    """Blocks across, heads upwards; grey where the token is absent."""
    heads = max(len(values) for values in blocks if values is not None)
    table = [values or [None] * heads for values in blocks]
    axes.set_facecolor(ABSENT)
    table = np.array(table, float).T
    drawn = axes.imshow(table, origin="lower", aspect="auto", cmap="viridis", vmin=0.0, vmax=vmax)
    axes.set(title=title, ylabel="head")
    axes.yaxis.get_major_locator().set_params(integer=True)
    block_axis(axes, len(blocks))
    axes.figure.colorbar(drawn, ax=axes, label=label)


def entropy_page(results):
    entropy = results["entropy"]
    kinds = [kind for kind in ("cls", "patches", "registers", "dist") if any(entropy.get(kind, ()))]
    largest = math.log(max(results["tokens"]))
    figure = _page(
        results, "Entropy of the attention of each head",
        "In nats, mean over images (and over the tokens of a kind): 0 is attention to one token alone, "
        f"{largest:.2f} is the same to all of the {max(results['tokens'])} tokens, so e to this power is the "
        "number of tokens attended to. Grey: the token is absent, or does not attend.",
        (11, 1.6 + 2.6 * math.ceil(len(kinds) / 2)),
    )  # fmt: skip
    plots = figure.subplots(math.ceil(len(kinds) / 2), 2, squeeze=False)
    for axes, kind in zip(plots.flat, kinds):
        _draw_heads(axes, entropy[kind], f"rows of the {WORDS[kind]}", "nats", largest)
    for axes in plots.flat[len(kinds) :]:
        axes.set_axis_off()
    return figure


def distance_page(results):
    height, width = results["data"]["input_size"]
    figure = _page(
        results, "Mean attention distance of each head",
        "Distance between the centres of a patch and of the patches that it attends to, weighted by attention,"
        f" mean over patches and images, in pixels of the model's input ({height} x {width}). Left: a dot is a "
        "head, the line is their mean; low dots are local heads. Attention to other tokens is left out.", (11, 5),
    )  # fmt: skip
    left, right = figure.subplots(1, 2)
    for i, heads in enumerate(results["distance"]):
        left.plot([i] * len(heads or ()), heads or (), "o", color=HUES["patches"], alpha=0.6, markersize=4)
    means = [heads and sum(heads) / len(heads) for heads in results["distance"]]
    left.plot(np.array(means, float), color="black", linewidth=1)
    left.set(ylabel="pixels", ylim=(0, None), title="heads, and their mean")
    block_axis(left, len(results["tokens"]))
    _draw_heads(right, results["distance"], "each head", "pixels")
    return figure


def attention_page(results):
    shares = results["cls_attention"]
    kinds = [kind for kind in ("patches", "registers", "dist", "cls") if kind in shares]
    names = WORDS | {"cls": "itself"}
    figure = _page(
        results, "Where the class token's attention goes",
        "Above: mean over heads and images, in %; the shares of a block add up to 100. Below: each head. Grey: the "
        "class token is absent; an absent kind of tokens has no part of the bar.",
    )  # fmt: skip
    grid = figure.add_gridspec(2, len(kinds))
    axes = figure.add_subplot(grid[0, :])
    mark_absent(axes, shares["patches"])
    present = [i for i, values in enumerate(shares["patches"]) if values is not None]
    base = [0.0] * len(present)
    for kind in kinds:
        heads = [shares[kind][i] or [0.0] for i in present]
        values = [100 * sum(v) / len(v) for v in heads]
        axes.bar(present, values, bottom=base, color=HUES[kind], label=f"to {names[kind]}")
        base = [b + v for b, v in zip(base, values)]
    axes.set(ylabel="% of its attention", ylim=(0, 100))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kinds), frameon=False)
    block_axis(axes, len(results["tokens"]))
    for column, kind in enumerate(kinds):
        axes = figure.add_subplot(grid[1, column])
        percent = [values and [100 * v for v in values] for values in shares[kind]]
        _draw_heads(axes, percent, f"to {names[kind]}", "%")
    return figure


def similarity_page(results):
    blocks = results["register_similarity"]
    columns = min(6, len(blocks))
    rows = math.ceil(len(blocks) / columns)
    figure = _page(
        results, "Do the registers differ?",
        "Cosine between the registers at the output of each block, mean over images: 1 (red) off the "
        "diagonal means that two registers are the same up to scale, 0 that they are orthogonal.",
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
        drawn = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_xticks(range(len(cosines)), results["register_numbers"][i])
        axes.set_yticks(range(len(cosines)), results["register_numbers"][i])
        axes.tick_params(labelsize=6)
        others = [v for a, row in enumerate(cosines) for b, v in enumerate(row) if a != b]
        mean = f", mean {sum(others) / len(others):.2f}" if others else ""
        axes.set_title(f"block {i}{mean}", fontsize=8)
    figure.colorbar(drawn, ax=plots, label="cosine")
    return figure


def probe_page(results):
    probes = results["readout"]
    figure = _page(
        results, "Linear and kNN probes of each token",
        f"Accuracy of probes that predict one of {probes['classes']} classes from a token at the output of each block, "
        f"by {probes['folds']}-fold cross-validation over {probes['images']} images; dashed: always predicting the "
        "most frequent class. Bars: standard deviation over folds. A line begins where its token enters.",
        (11, 5.5),
    )  # fmt: skip
    from matplotlib import colormaps

    registers = [token for token in probes["linear"] if token.startswith("register")]
    oranges = colormaps["YlOrBr"]
    hues = LINES | {token: oranges(0.45 + 0.45 * n / len(registers)) for n, token in enumerate(registers)}
    titles = {"linear": "linear probe", "neighbours": "kNN probe, 5 neighbours"}
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        for token, values in probes[kind].items():
            spread = probes["deviation_over_folds"][f"{kind}, {token}"]
            axes.errorbar(
                range(len(values)), np.array(values, float), np.array(spread, float), color=hues[token], label=token,
                marker=".", elinewidth=0.6, linewidth=1.4,
            )  # fmt: skip
        axes.axhline(probes["chance"], color="0.4", linestyle="--", linewidth=1)
        axes.set(title=title, ylabel="accuracy (%)", ylim=(0, 102))
        axes.grid(alpha=0.3)
        block_axis(axes, len(results["tokens"]))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def ablation_page(results):
    """A row for each kind and replacement: the change of accuracy, with its interval."""
    found = results["ablation"]
    kinds = [kind for kind in found if kind not in ("images", "clean")]
    rows = [(kind, name, found[kind][name]) for kind in kinds for name in found[kind]]
    figure = _page(
        results, "What replaced tokens cost",
        "Replaced at test time in every block from the entry block on: by zero (out of distribution, so this "
        "overstates the loss), by the mean over all images, by the values of another image. Dots: accuracy minus that "
        f"of the unchanged model, {found['clean']:.1f}% of {found['images']} images; bars: 95% paired bootstrap "
        "intervals over images. At the right: the share of predictions that changed.",
        (11, 2.4 + 0.42 * len(rows)),
    )  # fmt: skip
    axes, places = figure.subplots(), range(len(rows))
    for y, (_, _, row) in enumerate(rows):
        low, high = row["interval"]
        axes.plot([low, high], [y, y], color=HUES["registers"], linewidth=2)
        axes.plot(row["difference"], y, "o", color=HUES["registers"], markeredgecolor="black")
        axes.text(1.01, y, f"{row['changed']:.1f}% changed", va="center", transform=axes.get_yaxis_transform())
    axes.axvline(0, color="0.3", linewidth=1)
    axes.set_yticks(places, [f"{kind.replace('_', ' ').replace('cls', 'CLS')}: {name}" for kind, name, _ in rows])
    widest = max(0.5, *(abs(end) for *_, row in rows for end in row["interval"]))
    axes.set(xlabel="change of accuracy (points)", ylim=(len(rows) - 0.5, -0.5), xlim=(-1.1 * widest, 1.1 * widest))
    axes.grid(axis="x", alpha=0.3)
    return figure
