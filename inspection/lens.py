"""Lens: what the model would answer if it ended at an earlier block, and how large its activations are.

The final norm and the head are put on CLS, on the mean patch and on the distillation token at the output of each block:
the logit lens of nostalgebraist (2020), "interpreting GPT: the logit lens". A mean patch is the mean of the normalised
patches, as a model that classifies their mean has it; so the last block's lens on the token that is classified gives
the logits. Massive activations by Sun et al., "Massive Activations in Large Language Models" (arXiv 2402.17762).
"""

from collections import Counter

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from inspection.attention import trace
from inspection.bootstrap import bootstrap, gather
from inspection.foreign import own_model
from inspection.pages import headed_figure
from inspection.statistics import NAMES, parts_of
from inspection.statistics_pages import LINES, WORDS, block_axis, draw_curve, few_ticks

LARGE, TIMES = 100, 1000  # there: massive is above 100, and at least about 1,000 times the median


class Readout:
    """The end of a DynamicViT or a ForeignViT: its last norm and heads."""

    def __init__(self, model):
        own = own_model(model)
        self.norm, self.fc_norm = own.norm, getattr(own, "fc_norm", None) or nn.Identity()
        # Behind an attention pooling the head is for what the pooling makes of the tokens.
        if not model.num_classes or getattr(model, "pool_pos", None) is not None:
            self.heads = {}
            return
        has = {"cls": model.cls_pos is not None, "dist": model.dist_pos is not None, "patches": True}
        self.heads = {kind: getattr(own, f"head_{kind}", own.head) for kind in has if has[kind]}

    def normalised(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D): each token as if it were the one that is classified."""
        return self.fc_norm(self.norm(x))

    def logits(self, x: Tensor, layout) -> dict[str, Tensor]:
        """(B, N, D) at the output of a block -> {kind of token: (B, K)} of those that are there and have a head."""
        x = self.norm(x)
        tokens = {kind: x[:, part].mean(dim=1) for kind, part in parts_of(layout).items() if kind in self.heads}
        return {kind: self.heads[kind](self.fc_norm(token)) for kind, token in tokens.items()}


@torch.no_grad()
def measure(model, batches) -> dict:
    """Lists have an entry for each block, None where the token is absent. Accuracies and shares are in per cent.

    Returns:
        {"lenses": {token: {"accuracy", "agreement" with the final prediction, both with intervals}}, "cosine": of CLS
        with the patches, "before" and "after" the last norm, "largest": three of |activation|, "median", "massive":
        images with a massive activation, "largest_in": the kind of token that the largest is in}.
    """
    readout, layouts = Readout(model), [model.token_layout(i) for i in range(model.depth)]

    def of_batch(images, labels):
        answers, found = {}, {}

        def output(i, x):
            if i < model.depth:  # not of an attention pooling
                answers.update({(kind, i): y.argmax(dim=1) for kind, y in readout.logits(x, layouts[i]).items()})
                found.update({(name, i): values for name, values in _sizes(x, layouts[i], readout).items()})

        final = trace(model, images, output=output).argmax(dim=1)
        found |= {("agreement", *key): answer == final for key, answer in answers.items()}
        if labels is not None and model.num_classes:
            found |= {("accuracy", *key): answer == labels for key, answer in answers.items()}
            found["top1"] = final == labels
        return found

    rows = gather(batches, "lens", of_batch)
    return _summary(rows, model.depth, [kind for kind in NAMES if kind in readout.heads]) | {
        "images": len(rows["median", 0]), "tokens": [layout.length for layout in layouts],
        "top1": 100 * float(rows["top1"].mean()) if "top1" in rows else None,
    }  # fmt: skip


def _sizes(x, layout, readout) -> dict[str, Tensor]:
    """Of each image: (B, 3) and (B,) of |activation| over all tokens and dimensions, the kind of token, cosines."""
    size = x.abs().flatten(1)
    largest, places = size.topk(3, dim=1)
    kinds = torch.zeros(layout.length, dtype=torch.long, device=x.device)
    for n, kind in enumerate(NAMES):
        if kind in parts_of(layout):
            kinds[parts_of(layout)[kind]] = n
    found = {"largest": largest, "median": size.median(dim=1).values, "kind": kinds[places[:, 0] // x.shape[2]]}
    for name, y in (("before", x), ("after", readout.normalised(x))) if layout.cls is not None else ():
        found[name] = F.cosine_similarity(y[:, layout.cls], y[:, layout.patches], dim=-1).mean(dim=1)
    return found


def _summary(rows, depth, lenses) -> dict:
    def of_blocks(statistic, *key):
        return [statistic(rows[(*key, i)]) if (*key, i) in rows else None for i in range(depth)]

    def average(values):
        return values.mean(axis=0).tolist()

    def percent(values):
        return 100 * float(values.mean())

    def ends(values):
        return bootstrap(100.0 * values).tolist()

    found: dict = {NAMES[kind]: {} for kind in lenses}
    for kind in lenses:
        for name in ("accuracy", "agreement"):
            if (name, kind, depth - 1) in rows:
                found[NAMES[kind]] |= {name: of_blocks(percent, name, kind)}
                found[NAMES[kind]] |= {f"{name}_interval": of_blocks(ends, name, kind)}
    massive, kinds = [], []
    for i in range(depth):
        first, median = rows["largest", i][:, 0], rows["median", i]
        massive.append(percent((first > LARGE) & (first >= TIMES * median)))
        counted = Counter(rows["kind", i].tolist())
        kinds.append({kind: 100 * counted[n] / len(first) for n, kind in enumerate(NAMES) if counted[n]})
    return {
        "lenses": found, "cosine": {name: of_blocks(average, name) for name in ("before", "after")},
        "largest": of_blocks(average, "largest"), "median": of_blocks(average, "median"),
        "massive": massive, "largest_in": kinds,
    }  # fmt: skip


def lines(result) -> list[str]:
    """From which block each lens gives what the model answers in the end, and the massive activations."""
    found = []
    for token, lens in result["lenses"].items():
        agree = lens["agreement"]
        begins = next(i for i in range(len(agree) + 1) if all(v is not None and v >= 90 for v in agree[i:]))
        words = f"from block {begins} on" if begins < len(agree) else "at no block"
        found.append(f"Lens on the {token}: the final prediction in 90% of the images {words}")
    massive = [i for i, share in enumerate(result["massive"]) if share >= 50]
    if not massive:
        return [*found, "Massive activations: none"]
    i = max(massive, key=lambda i: result["largest"][i][0])
    where = max(result["largest_in"][i], key=result["largest_in"][i].get)
    largest = f"{result['largest'][i][0]:.0f} in the {WORDS[where]} at block {i} (median {result['median'][i]:.2g})"
    return [*found, f"Massive activations: in {len(massive)} blocks from {massive[0]} on; largest {largest}"]


def page(result, about):
    """Accuracy and agreement, cosines, and the sizes of activations; `about`: the line below the title."""
    figure = headed_figure(
        (11, 7), "What would the model answer at each block?", about,
        "Lens: the last norm and the head on a token at the output of each block; at the last block this is the model "
        "itself, if that token is classified. Bands: 95% bootstrap intervals over images. A lens that is wrong early "
        "shows that the head cannot read the token there, not that the token holds nothing: see the probes. Massive "
        f"activations are above {LARGE} and {TIMES:,} times the median. A line begins where its token enters.",
        (0.01, 0.12, 0.98, 0.78),
    )  # fmt: skip
    (top, side), (cosines, sizes) = figure.subplots(2, 2, height_ratios=(1 if result["lenses"] else 0.001, 1))
    for axes, name in ((top, "accuracy"), (side, "agreement")):
        for token, lens in result["lenses"].items():
            if name in lens:
                draw_curve(axes, lens[name], lens[name + "_interval"], color=LINES[token], label=token)
        axes.set(ylabel="%", ylim=(0, 102), title=f"lens: {name}{' with the final prediction' * (name != 'accuracy')}")
    if result["top1"] is not None:
        top.axhline(result["top1"], color="0.4", linestyle="--", linewidth=1, label="the model")
    for name, values in result["cosine"].items():
        cosines.plot(np.array(values, float), ".-", label=f"{name} the last norm")
    cosines.set(title="cosine of CLS with the patches, mean", ylim=(-1.05, 1.05))
    for n, values in enumerate(zip(*result["largest"])):
        sizes.plot(values, ".-", color="tab:red", alpha=1 - 0.3 * n, label=f"largest {n + 1}")
    sizes.plot(result["median"], ".-", color="0.3", label="median")
    sizes.set(title="|activation|, mean over images", yscale="log")
    few_ticks(sizes)
    for axes in (top, side, cosines, sizes):
        block_axis(axes, len(result["tokens"]))
        if axes.lines:
            axes.legend(fontsize=7, frameon=False)
        else:
            axes.set_visible(False)
    return figure
