"""Ablations: the accuracy when registers, or the attention to them, are replaced at test time.

`registers`: the registers at the input of every block from their entry block on. `cls_attention_to_registers`: the
attention of the class token to each register, in every block that has both; the rest of its row is rescaled so that it
adds up to 1 again. They are replaced by zero, by the mean over all images, or by the values of another image.

Zero is out of distribution, so it costs more than the token's information: the mean keeps what all images share, and
another image's values keep everything but what belongs to this image.
"""

from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from inspection.attention import trace
from inspection.bootstrap import bootstrap, gather
from inspection.statistics import NAMES
from models_dynamic import DynamicViT
from tokens.layout import blocks_with
from utils import BadInput

KINDS = {  # where it is replaced, as `trace` has it, in each block that has these tokens; what: see `values_of`
    "registers": ("tokens", ("registers",)),
    "cls_attention_to_registers": ("attention", ("registers", "cls")),
}
REPLACEMENTS = ("zero", "mean", "another image's")


def check(model: DynamicViT, kinds):
    """Raise BadInput unless the model has a head, and the tokens to replace."""
    if not model.num_classes:
        raise BadInput("--ablate compares accuracies, and this model has no head")
    for kind in kinds:
        needs = {token: set(blocks_with(model, token)) for token in KINDS[kind][1]}
        for token, blocks in needs.items():
            if not blocks:
                raise BadInput(f"--ablate {kind}: this model has no {NAMES[token]}; leave it out")
        if not set.intersection(*needs.values()):
            names = " and ".join(NAMES[token] for token in needs)
            raise BadInput(f"--ablate {kind}: {names} are together at no block of this model; leave it out")


def ablate(model: DynamicViT, batches, kinds) -> dict:
    """Accuracies of the unchanged model, and with each replacement, on the same images.

    Args:
        batches: a function that returns batches of (images (B, 3, h, w) normalised, labels (B,)), each time the same,
            of at least two images. "Another image" is the previous one, for the first image the last one: their order
            should be random.

    Returns:
        {"clean": accuracy, kind: {replacement: {"accuracy": , "difference": , "interval": , "changed": }}} in per cent;
        "difference" is minus what it costs, with its 95% interval over images; "changed" is the share of predictions
        that differ from the unchanged model's.
    """
    sums, last, count = {}, {}, 0
    for images, _ in tqdm(batches(), "ablation: means", leave=False, disable=None):
        _, seen = recorded(model, images, kinds)
        for key, values in seen.items():
            sums[key] = sums.get(key, 0) + values.sum(dim=0)
            last[key] = values[-1:]
        count += len(images)
    means = {key: total / count for key, total in sums.items()}

    def of_batch(images, labels):
        logits, seen = recorded(model, images, kinds)
        clean = logits.argmax(dim=1)
        found = {"clean": clean == labels}
        others = {key: torch.cat([last[key], values[:-1]]) for key, values in seen.items()}
        last.update({key: values[-1:] for key, values in seen.items()})
        zeros = {key: torch.zeros_like(values) for key, values in means.items()}
        for kind in kinds:
            for name, new in zip(REPLACEMENTS, (zeros, means, others)):
                predicted = replaced(model, images, kind, new).argmax(dim=1)
                found |= {("right", kind, name): predicted == labels, ("changed", kind, name): predicted != clean}
        return found

    percent = {key: 100.0 * values for key, values in gather(batches, "ablation", of_batch).items()}
    clean, result = percent["clean"], {kind: {} for kind in kinds}
    for kind in kinds:
        for name in REPLACEMENTS:
            right, changed = percent["right", kind, name], percent["changed", kind, name]
            result[kind][name] = {
                "accuracy": float(right.mean()), "difference": float((right - clean).mean()),
                "interval": bootstrap(right - clean).tolist(), "changed": float(changed.mean()),
            }  # fmt: skip
    return {"images": count, "clean": float(clean.mean()), **result}


def values_of(kind, x: Tensor, layout) -> Tensor:
    """What is replaced, as a view: the registers (B, R, D) in the input of a block (B, N, D); the attention of CLS to
    them (B, H, R) in its attention (B, H, N, N)."""
    return x[:, layout.registers] if kind == "registers" else x[:, :, layout.cls.start, layout.registers]


def recorded(model, images, kinds) -> tuple:
    """(logits, {(kind, block): the model's own `values_of` it})."""
    seen = {}

    def see(place, i, x):
        layout = model.token_layout(i)
        for kind in kinds:
            where, needs = KINDS[kind]
            if where == place and all(getattr(layout, token) is not None for token in needs):
                seen[kind, i] = values_of(kind, x, layout).clone()

    logits = trace(model, images, **{where: partial(see, where) for where in {KINDS[kind][0] for kind in kinds}})
    return logits, seen


def replaced(model, images, kind, new):
    """Logits with the values of `new` (see `recorded`) in place of the model's own."""

    def put(i, x):
        if (kind, i) in new:
            x, layout = x.clone(), model.token_layout(i)
            values = values_of(kind, x, layout)
            if kind == "cls_attention_to_registers":
                rest = (1 - values.sum(dim=-1, keepdim=True)).clamp_min(1e-12)
                x[:, :, layout.cls.start] *= (1 - new[kind, i].sum(dim=-1, keepdim=True)) / rest
            values.copy_(new[kind, i])
            return x

    return trace(model, images, **{KINDS[kind][0]: put})
