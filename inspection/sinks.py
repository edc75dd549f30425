"""Sinks: which heads look at one token with nearly all queries, and does that token bring anything?

A head has a sink in an image at s = argmax_j of the mean over queries i of A_ij, if at least `queries` of the queries
give it at least `attention`. With u_j = W_O^h v_j, what token j brings through the head: *NOP* if |u_s| is at most
`nop` of the other tokens' mean norm (the head is switched off), *broadcast* if it is at least `broadcast` of it (all
get the same message), else *between*: arXiv 2606.08105.
"""

import math

import numpy as np
import torch
from torch import Tensor

from inspection.attention import watch_calls
from inspection.bootstrap import bootstrap, gather, mean
from inspection.pages import headed_figure
from inspection.statistics import NAMES, parts_of
from inspection.statistics_pages import ABSENT, HUES, WORDS, draw_curve
from tokens.layout import blocks_with
from utils import BadInput

EFFECTS = {"nop": "NOP", "between": "between", "broadcast": "broadcast"}  # of sinks, and their names
MARKS = ("sink", *EFFECTS)  # the first is the sum of the others
COLOURS = {"nop": "0.25", "between": "tab:olive", "broadcast": "tab:green"}
ENTRIES = ("cls", "registers")  # from whose entry block distances are counted


def check(model):
    """Raise BadInput for blocks whose output projection W_O is not at `attn.proj`."""
    if any(not hasattr(getattr(block, "attn", None), "proj") for block in model.blocks[: model.depth]):
        raise BadInput("sinks: the blocks of this model have no attn.proj, which the norms are of")


@torch.no_grad()
def measure(model, batches, queries=0.9, attention=0.5, nop=0.2, broadcast=0.5) -> dict:
    """Shares of the head-images (each head in each image) of a block that have a sink, and of what kind.

    Returns:
        {"kinds": {kind of token: {mark: [share for each block], f"{mark}_interval": [[lower, upper], ...]}}, "all": the
        same for all tokens together, "distance": {"cls": [blocks since CLS entered, negative before], ...}, ...};
        None: that token is absent.
    """
    weights = [block.attn.proj for block in model.blocks[: model.depth]]
    parts = [parts_of(model.token_layout(i)) for i in range(model.depth)]
    heads = model.model_args["num_heads"]

    def of_batch(images, labels):
        seen = torch.zeros(len(images), model.depth, len(NAMES), len(MARKS), dtype=torch.int16)

        def see(i, call):
            if i < model.depth:  # attention pooling is no block of the sequence
                column, own, others = sinks(call.weights(), call.value, weights[i].weight, queries, attention)
                off, sent = own <= nop * others, own >= broadcast * others
                marks = (column >= 0, off, ~off & ~sent, ~off & sent)
                for k, kind in enumerate(NAMES):
                    part = parts[i].get(kind, slice(0, 0))
                    inside = (column >= part.start) & (column < part.stop)
                    seen[:, i, k] = torch.stack([(inside & mark).sum(dim=1) for mark in marks], dim=1).short().cpu()

        watch_calls(model, images, see)
        return {"sinks": seen}

    shares = gather(batches, "sinks", of_batch)["sinks"] / heads  # (images, blocks, kinds, marks)
    entry = {kind: min(blocks_with(model, kind), default=None) for kind in ENTRIES}
    return {
        "images": len(shares), "heads": heads,
        "thresholds": {"queries": queries, "attention": attention, "nop": nop, "broadcast": broadcast},
        "distance": {n: None if at is None else [i - at for i in range(model.depth)] for n, at in entry.items()},
        "all": _summary(shares.sum(axis=2), [True] * model.depth),
        "kinds": {
            kind: _summary(shares[:, :, k], [kind in there for there in parts])
            for k, kind in enumerate(NAMES) if any(kind in there for there in parts)
        },
    }  # fmt: skip


def sinks(attn: Tensor, value: Tensor, weight: Tensor, queries=0.9, attention=0.5) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, M, N), (B, H, N, d), W_O (D, H * d) -> (B, H) each: the sink's column (-1: none), |u| of the column with
    the most attention, mean |u| of the others."""
    B, H, M, N = attn.shape
    column = attn.mean(dim=2).argmax(dim=-1, keepdim=True)  # (B, H, 1)
    given = attn.gather(3, column[..., None].expand(-1, -1, M, 1)).squeeze(3)
    has = (given >= attention).sum(dim=2) >= math.ceil(queries * M - 1e-9)
    of_heads = weight.unflatten(1, (H, value.shape[-1])).transpose(0, 1)  # (H, D, d)
    # The same norms from d numbers as from D. On the CPU: not every MPS has it, and none is faster.
    triangles = torch.linalg.qr(of_heads.float().cpu(), mode="r").R.to(value.device)
    norms = (value.float() @ triangles.mT).norm(dim=-1)  # (B, H, N)
    others = norms.scatter(2, column, 0).sum(dim=2) / max(N - 1, 1)
    return column.squeeze(2).where(has, -1), norms.gather(2, column).squeeze(2), others


def _summary(shares, present) -> dict:
    """Means over images and their intervals, from (images, blocks, marks); None where the token is not `present`."""
    means, ends = mean(shares), bootstrap(shares)
    found = {}
    for m, mark in enumerate(MARKS):
        found[mark] = [float(v) if there else None for v, there in zip(means[:, m], present)]
        found[f"{mark}_interval"] = [v.tolist() if there else None for v, there in zip(ends[:, :, m].T, present)]
    return found


def lines(result) -> list[str]:
    every, totals = result["all"]["sink"], {mark: sum(result["all"][mark]) for mark in MARKS}
    depth = len(every)
    if not totals["sink"]:
        return ["Sinks: none"]
    parts = ((WORDS[k], sum(v or 0 for v in f["sink"]) / depth) for k, f in result["kinds"].items())
    words = ", ".join(f"{name} {100 * share:.1f}%" for name, share in parts)
    most = max(range(depth), key=every.__getitem__)
    share = f"{100 * totals['sink'] / depth:.1f}% of all heads and images"
    found = [f"Sinks: in {share} ({words}), most at block {most} ({100 * every[most]:.1f}%)"]
    shares = (f"{100 * totals[effect] / totals['sink']:.1f}% {name}" for effect, name in EFFECTS.items())
    found.append(f"Of the sinks: {', '.join(shares)}")
    for kind, distances in result["distance"].items():
        own = [v or 0 for v in result["kinds"].get(kind, {"sink": [0]})["sink"]]
        if any(own):
            most = max(range(depth), key=own.__getitem__)
            found.append(f"Sinks on {WORDS[kind]}: most {distances[most]} blocks after entry ({100 * own[most]:.1f}%)")
    return found


def page(result, about):
    """Above: sinks by kind of token, and by what they bring. Below: by the distance from an entry block."""
    from matplotlib.ticker import MaxNLocator

    limits = result["thresholds"]
    if not any(result["all"]["sink"]):
        words = f"No head gives {limits['attention']:g} or more of {100 * limits['queries']:g}% of its queries to one"
        return headed_figure((11, 1.4), "Attention sinks: none", about, f"{words} token, in any image.")
    figure = headed_figure(
        (11, 7), "Attention sinks", about,
        f"A head has a sink in an image if at least {100 * limits['queries']:g}% of its queries give one token "
        f"{limits['attention']:g} or more. NOP: what that token brings (its value through the head's output "
        f"projection) has at most {limits['nop']:g} of the others' mean norm, so the head is off; broadcast: at least "
        f"{limits['broadcast']:g}, so all tokens get its message. Bands: 95% by bootstrap over images. "
        "Grey: the token has not entered.", (0.01, 0.12, 0.98, 0.77),
    )  # fmt: skip
    plots = figure.subplots(2, 2, sharey="row")
    kinds = result["kinds"]
    _bars(plots[0, 0], {WORDS[k]: (f["sink"], HUES[k]) for k, f in kinds.items()}, "by the kind of the sink's token")
    effects = {name: (result["all"][effect], COLOURS[effect]) for effect, name in EFFECTS.items()}
    _bars(plots[0, 1], effects, "by what the sink brings")
    for axes, entry in zip(plots[1], ENTRIES):
        distances = result["distance"][entry]
        axes.set(title=f"from the entry of the {WORDS[entry]}", ylabel="% of heads and images")
        if distances is None:
            axes.text(0.5, 0.5, f"no {WORDS[entry]} in this model", ha="center", transform=axes.transAxes)
            continue
        axes.axvspan(distances[0] - 0.5, -0.5, color=ABSENT, linewidth=0)
        for kind, found in kinds.items():
            ends = [v and _percent(v) for v in found["sink_interval"]]
            label = f"sinks on {WORDS[kind]}"
            draw_curve(axes, _percent(found["sink"]), ends, distances, color=HUES[kind], label=label)
        axes.set(xlim=(distances[0] - 0.5, distances[-1] + 0.5), ylim=(0, None), xlabel="blocks since it entered")
        axes.legend(frameon=False)
    for axes in plots.flat:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _percent(shares) -> np.ndarray:
    return 100 * np.array(shares, float)


def _bars(axes, parts, title):
    base = 0.0
    for label, (shares, colour) in parts.items():
        values = np.nan_to_num(_percent(shares))
        axes.bar(range(len(values)), values, bottom=base, color=colour, label=label)
        base = base + values
    axes.set(title=title, xlabel="block", ylabel="% of heads and images", ylim=(0, max(1, 1.1 * base.max())))
    axes.legend(frameon=False)
