"""The page of the causal depth curve, drawn from what `causes.measure` returns."""

import numpy as np

from inspection.pages import headed_figure
from inspection.ridge import PROBED
from inspection.statistics_pages import ABSENT, WORDS

TITLE = "Up to which block does it not matter what a token holds?"


def page(result, about=""):
    """A row for the class token, with its effective rank, and one for the registers; `about`: below the title."""
    kinds, labelled, probed = result["tokens"], result["labelled"], result["probe"]
    if not kinds:
        words = "There is no class token and no register to replace, or no head to judge it by."
        return headed_figure((11, 1.4), TITLE, about or f"{result['images']} images", words)
    judged = any(by_name["zero"]["cost"] for by_name in kinds.values())
    titles = {
        "cost": "top-1 lost (points)" if labelled else "predictions changed (%)",
        "divergence_bits": "divergence (bits)", "output_cosine": "cosine of outputs",
        "patch_cosine": "cosine of final patches", "probe": "accuracy of a probe (%)",
        "effective_rank": "effective rank",
    }  # fmt: skip
    for key in (("output_cosine",) if judged else ("cost", "divergence_bits")) + (() if probed else ("probe",)):
        del titles[key]
    figure = headed_figure(
        (11, 7), TITLE,
        f"{about}; causes: {result['images']} images" + (f", top-1 {result['top1']:.2f}% intact" if labelled else ""),
        "The token is replaced at the output of one block, and the blocks behind it run on. Bands: 95% bootstrap "
        f"intervals over images; dashed: {result['epsilon']:g}. The model may never meet zero or a Gaussian. What "
        "other tokens have read from it before stays with them. Effective rank: of the unchanged tokens. Grey: absent."
        + " Probe: ridge regression on the unchanged token; dotted: chance. Decodable is not used." * bool(probed),
        layout="constrained",
    )  # fmt: skip
    figure.get_layout_engine().set(rect=(0.01, 0.15, 0.98, 0.75), w_pad=0.08)
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


def _draw(axes, name, values, interval):
    """A curve over the blocks with its band, grey where the token is absent."""
    from matplotlib.ticker import MaxNLocator

    blocks = range(len(values))
    (line,) = axes.plot(blocks, np.array(values, float), marker=".", linewidth=1.2, label=name)
    if interval:
        ends = np.array([pair or (np.nan, np.nan) for pair in interval]).T
        axes.fill_between(blocks, *ends, color=line.get_color(), alpha=0.15, linewidth=0)
    for i in blocks:
        if values[i] is None:
            axes.axvspan(i - 0.5, i + 0.5, color=ABSENT, linewidth=0)
    axes.set(xlim=(-0.5, len(values) - 0.5), xlabel="block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
