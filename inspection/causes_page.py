"""The page of the causal depth curve, drawn from what `causes.measure` returns."""

from inspection.pages import headed_figure
from inspection.ridge import PROBED
from inspection.statistics_pages import WORDS, block_axis, draw_curve, mark_absent


def page(result, about):
    """A row for the class token, with its effective rank, and one for the registers; `about`: below the title."""
    kinds, labelled, probed = result["tokens"], result["labelled"], result["probe"]
    judged = any(by_name["zero"]["cost"] for by_name in kinds.values())
    cost = "top-1 lost (points)" if labelled else "predictions changed (%)"
    first = {"cost": cost, "divergence_bits": "divergence (bits)"}
    titles = first if judged else {"output_cosine": "cosine of outputs"}
    titles["patch_cosine"] = "cosine of final patches"
    if probed:
        titles["probe"] = "accuracy of a probe (%)"
    titles["effective_rank"] = "effective rank"
    figure = headed_figure(
        (11, 7), "Up to which block does it not matter what a token holds?",
        f"{about}; causes: {result['images']} images" + (f", top-1 {result['top1']:.2f}% intact" if labelled else ""),
        "The token is replaced at the output of one block, and the blocks after it run on. Bands: 95% bootstrap "
        f"intervals over images; dashed: {result['epsilon']:g}. The model may never meet zero or a Gaussian. What "
        "other tokens have read from it before stays with them. Effective rank: of the unchanged tokens. Grey: absent."
        + " Probe: ridge regression on the unchanged token; dotted: chance. Readable is not yet used." * bool(probed),
        (0.01, 0.15, 0.98, 0.75),
    )  # fmt: skip
    grid = figure.subplots(len(kinds), len(titles), squeeze=False)
    for row, (kind, by_name) in zip(grid, kinds.items()):
        for axes, (key, title) in zip(row, titles.items()):
            axes.set_title(f"{WORDS[kind]}:\n{title}", fontsize=9)
            if key == "probe":
                _draw(axes, PROBED[kind], probed["accuracy"][kind], probed["interval"][kind])
                axes.axhline(probed["chance"], color="0.3", linestyle=":", linewidth=1)
                continue
            for name, values in by_name.items() if key in by_name["zero"] else [("unchanged", result)]:
                _draw(axes, name, values[key], values["cost_interval"] if key == "cost" else None)
        if judged:
            row[0].axhline(result["epsilon"], color="0.3", linestyle="--", linewidth=1)
        cosine = row[list(titles).index("patch_cosine")]
        cosine.set_ylim(min(cosine.get_ylim()[0], 0.99), 1.001)  # a millionth is not a difference
        handles = [line for line in cosine.lines if not line.get_label().startswith("_")]
        row[-1].set_visible(kind == "cls")
    place = dict(loc="lower center", bbox_to_anchor=(0.5, 0.11))
    figure.legend(handles=handles, **place, ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _draw(axes, name, values, interval=None):
    """A curve over the blocks with its band, grey where the token is absent."""
    draw_curve(axes, values, interval, label=name, linewidth=1.2)
    mark_absent(axes, values)
    block_axis(axes, len(values))
