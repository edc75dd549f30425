"""Causal depth curve: up to which block does it not matter what CLS, or what the registers hold?

At the output of each block the token is replaced, and the rest of the model runs on. `REPLACEMENTS`: zero; the mean
over the images; a Gaussian of that mean and variance, coordinate by coordinate; the token of another image (the
previous one); the token as it entered, the same for all images, which is what a later entry would have brought.
Activation patching, after Vig et al. (2020), "Investigating gender bias in language models using causal mediation
analysis" (arXiv 2004.12265). Beside it, what a linear probe reads from the token there: decodable is not used.
"""

import math
from collections import defaultdict
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from inspection import ridge
from inspection.attention import trace
from inspection.bootstrap import bootstrap, gather, mean
from inspection.causes_page import page as page
from inspection.statistics import Moments
from inspection.statistics_pages import WORDS
from utils import BadInput

KINDS = ("cls", "registers")
INITIAL = "its initial"
REPLACEMENTS = ("zero", "mean", "Gaussian", "another image's", INITIAL)


def check(model):
    """Raise BadInput for a model without tokens to replace."""
    if model.cls_pos is None and model.reg_pos is None:
        raise BadInput("causes: this model has neither a class token nor registers to replace")


def measure(model, batches, images=256, epsilon=1.0, seed=0, kinds=KINDS, replacements=REPLACEMENTS) -> dict:
    """What each replacement at the output of each block does to the output, on the first `images` images (0: all).

    Args:
        kinds, replacements: only these.

    Returns:
        {"tokens": {kind: {replacement: see `summary`}}, "effective_rank": of the intact CLS at each block,
        "probe": see `ridge.probe`, ...}.
        An entry of a list is a block; None: the token is absent, or, without a head, there are no predictions.
    """
    batches, depth = partial(_first, batches, images), model.depth
    given = Replacements(model, batches, seed)

    def of_batch(shown, labels):
        outputs: dict = {}
        logits = trace(model, shown, output=lambda i, x: outputs.update({i: x}))
        intact, found = (logits, outputs[depth - 1]), {}
        if labels is not None:
            found |= {("labels",): labels, ("top1",): logits.argmax(dim=1) == labels}
        for i in range(depth):
            for kind, part in _parts(model, i).items():
                if kind not in kinds:
                    continue
                own = outputs[i][:, part]
                found["token", kind, i] = own.mean(dim=1).cpu().double()
                new = given.of(kind, i, own)
                for name in replacements:
                    x = outputs[i].clone()
                    x[:, part] = new[name]
                    found[kind, name, i] = compare(model, intact, _resumed(model, shown, i, x), labels)
        return found

    rows = gather(batches, "causes", of_batch)
    labelled = ("labels",) in rows and model.num_classes > 0
    features = {key[1:]: values for key, values in rows.items() if key[0] == "token"}

    def judged(kind, name):
        return summary([rows.get((kind, name, i)) for i in range(depth)], epsilon, model.num_classes)

    return {
        "images": given.count, "epsilon": epsilon, "labelled": labelled,
        "top1": 100 * float(rows["top1",].mean()) if labelled else None,
        "effective_rank": [given.rank(i) for i in range(depth)],
        "tokens": {
            kind: {name: judged(kind, name) for name in replacements}
            for kind in kinds if any(kind == one for one, _ in features)
        },
        "probe": ridge.probe(features, rows.get(("labels",), ()), depth, seed),
    }  # fmt: skip


def _first(batches, limit):
    left = limit or math.inf
    for images, labels in batches():
        if left <= 0:
            return
        kept = min(left, len(images))
        yield images[:kept], None if labels is None else labels[:kept]
        left -= kept


def _parts(model, block) -> dict[str, slice]:
    """Where the tokens of `KINDS` stand at the output of `block`; nowhere in an attention pooling."""
    layout = model.token_layout(block)
    return {kind: getattr(layout, kind) for kind in KINDS if getattr(layout, kind) is not None}


class Replacements:
    """What takes a token's place, and the rank of CLS: from a first pass, which keeps sums over the images."""

    def __init__(self, model, batches, seed):
        self.count, self.moments, self.gram = 0, defaultdict(Moments), {}
        self.initial, self.entered, self.last, self.chance = {}, {}, {}, np.random.default_rng(seed)

        def tokens(i, x):  # at its first block, each token is the same for all images
            for kind, part in _parts(model, i).items():
                names = [(kind, n) for n in (model.token_layout(i).numbers if kind == "registers" else [0])]
                for name, token in zip(names, x[:1, part].split(1, dim=1)):
                    self.initial.setdefault(name, token.clone())
                self.entered[kind, i] = torch.cat([self.initial[name] for name in names], dim=1)

        def output(i, x):
            for kind, part in _parts(model, i).items():
                self.last[kind, i], values = x[-1:, part].clone(), x[:, part].cpu().double()  # (B, n, D)
                self.moments[kind, i].add(values)
                if kind == "cls":
                    self.gram[i] = self.gram.get(i, 0) + values[:, 0].T @ values[:, 0]

        for images, _ in tqdm(batches(), "causes: means", leave=False, disable=None):
            trace(model, images, tokens=tokens, output=output)
            self.count += len(images)

    def of(self, kind, i, own: Tensor) -> dict[str, Tensor]:
        """Each replacement of the tokens `own` (B, n, D) of a batch; the batches have to come in order."""
        average, deviation = self.moments[kind, i].mean(), self.moments[kind, i].deviation()
        drawn = average + deviation * torch.from_numpy(self.chance.standard_normal(own.shape))
        others = torch.cat([self.last[kind, i], own[:-1]])
        self.last[kind, i] = own[-1:]
        found = torch.zeros_like(own), average.to(own), drawn.to(own), others, self.entered[kind, i]
        return dict(zip(REPLACEMENTS, found))

    def rank(self, i) -> float | None:
        """Effective rank of the CLS outputs, an image a row: their singular values are roots of the Gram matrix's."""
        return effective_rank(torch.linalg.eigvalsh(self.gram[i]).clamp_min(0).sqrt()) if i in self.gram else None


def effective_rank(singular: Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum: 1 for rank one, n for n equal ones.

    Roy & Vetterli (2007), "The effective rank: a measure of effective dimensionality".
    """
    return float(torch.special.entr(singular / singular.sum().clamp_min(1e-300)).sum().exp())


def _resumed(model, images, block, x) -> tuple[Tensor, Tensor]:
    """(logits, output of the last block) of the pass that continues after `block` with x (B, N, D).

    The blocks before are run on one image alone, since their result is not used: this works for any model's forward.
    """
    last = []

    def output(i, y):
        new = x if i == block else None
        if i == model.depth - 1:
            last.append(y if new is None else new)
        return new

    return trace(model, images[:1], output=output), last[0]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """(B, K), (B, K) probabilities -> (B,): Jensen-Shannon divergence in bits, 0 to 1 (Lin 1991)."""
    entropy = [torch.special.entr(values).sum(dim=-1) for values in ((p + q) / 2, p, q)]
    return ((entropy[0] - (entropy[1] + entropy[2]) / 2) / math.log(2)).clamp_min(0)


def compare(model, intact, changed, labels) -> Tensor:
    """(B, 5): cost, agreement, divergence in bits, cosines of the final patches and of the outputs, for each image."""
    (a, x), (b, y) = intact, changed
    part = model.token_layout(model.depth - 1).patches
    predicted = [logits.argmax(dim=-1) for logits in (a, b)]
    right = [(some == (predicted[0] if labels is None else labels)).float() for some in predicted]
    probabilities = [logits.cpu().double().softmax(dim=-1) for logits in (a, b)]
    found = (
        right[0] - right[1], predicted[0] == predicted[1], divergence(*probabilities),
        F.cosine_similarity(x[:, part], y[:, part], dim=-1).mean(dim=1), F.cosine_similarity(a, b, dim=-1),
    )  # fmt: skip
    return torch.stack([values.cpu().double() for values in found], dim=1)


def summary(rows, epsilon, head) -> dict:
    """Lists with an entry for each block, from what `compare` returned there (None: absent); None without a head.

    "cost": top-1 lost, in points (without labels, predictions changed, in per cent), with a paired interval;
    "harmless_until": the last block up to which that is at most `epsilon`; None in it and in its interval: at none.
    """
    present = [i for i, values in enumerate(rows) if values is not None]  # registers may leave
    values = np.stack([rows[i] for i in present], axis=1)  # (images, blocks, 5)
    cost, agreement, *others = np.moveaxis(values * [100, 100, 1, 1, 1], 2, 0)
    names = ("agreement", "divergence_bits", "patch_cosine", "output_cosine")

    def of_blocks(each):
        values = dict(zip(present, each.tolist()))
        return [values.get(i) for i in range(len(rows))]

    found = {name: of_blocks(mean(each)) for name, each in zip(names, (agreement, *others))}
    judged = ("cost", "cost_interval", "harmless_until", "harmless_interval")
    if not head:
        return found | dict.fromkeys((*names[:2], *judged))

    def until(some):
        return harmless_until(mean(some), epsilon)

    low, high = bootstrap(cost, until)
    blocks = [None if n < 0 else present[n] for n in (until(cost), math.floor(low), math.ceil(high))]
    lists = [of_blocks(each) for each in (mean(cost), bootstrap(cost).T)]
    return found | dict(zip(judged, (*lists, blocks[0], blocks[1:])))


def harmless_until(costs, epsilon) -> int:
    """The last block up to which all costs are at most `epsilon`; -1: not even the first."""
    harmful = np.append(np.asarray(costs) > epsilon + 1e-9, True)
    return int(harmful.argmax()) - 1


def lines(result) -> list[str]:
    """A line for each kind of token: up to which block each replacement is harmless."""
    points = f"point{'s' * (result['epsilon'] != 1)} of top-1"
    what, found = points if result["labelled"] else "% of predictions", []
    for kind, by_name in result["tokens"].items():
        words = []
        for name, values in by_name.items() if by_name["zero"]["cost"] else ():
            until = (values["harmless_until"], *values["harmless_interval"])
            words.append("{} {} ({}..{})".format(name, *("-" if block is None else block for block in until)))
        limit = f"Replacing the {WORDS[kind]} costs at most {result['epsilon']:g} {what} up to block"
        found += [f"{limit} (95% interval; -: at none): {', '.join(words)}"] if words else []
    if result["probe"] or (result["labelled"] and result["tokens"]):
        found += ridge.lines(result["probe"])
    return found or ["Causes: no class token or registers to replace, or no head to judge it by"]
