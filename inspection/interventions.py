"""Ablations: the accuracy when registers, or the attention to them, are replaced at test time.

`registers`: the registers at the input of every block from their entry block on. `cls_attention_to_registers`: the
attention of the class token to each register, in every block that has both; the rest of its row is rescaled so that it
adds up to 1 again. They are replaced by zero, by the mean over all images, or by the values of another image.

Zero is out of distribution, so it costs more than the token's information: the mean keeps what all images share, and
another image's values keep everything but what belongs to this image.
"""

import torch
from tqdm import tqdm

from inspection.attention import trace
from inspection.bootstrap import bootstrap, gather
from models_dynamic import DynamicViT
from utils import BadInput

KINDS = ("registers", "cls_attention_to_registers")
REPLACEMENTS = ("zero", "mean", "another image's")


def check(model: DynamicViT, kinds):
    """Raise BadInput unless the model has a head, and the tokens to replace."""
    if not model.num_classes:
        raise BadInput("--ablate compares accuracies, and this model has no head")
    if model.reg_pos is None:
        raise BadInput("--ablate: this model has no registers")
    if "cls_attention_to_registers" in kinds and model.cls_pos is None:
        raise BadInput("--ablate cls_attention_to_registers: this model has no class token; try --ablate registers")


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


def recorded(model, images, kinds) -> tuple:
    """(logits, {(kind, block): (B, R, D) registers at the block's input, or (B, H, R) attention of CLS to them})."""
    seen = {}

    def tokens(i, x):
        layout = model.token_layout(i)
        if layout.registers is not None:
            seen["registers", i] = x[:, layout.registers].clone()

    def attention(i, attn):
        layout = model.token_layout(i)
        if layout.registers is not None and layout.cls is not None:
            seen["cls_attention_to_registers", i] = attn[:, :, layout.cls, layout.registers].squeeze(-2).clone()

    logits = trace(model, images, tokens=tokens, attention=attention)
    return logits, {key: values for key, values in seen.items() if key[0] in kinds}


def replaced(model, images, kind, new):
    """Logits with the values of `new` (see `recorded`) in place of the model's own."""

    def tokens(i, x):
        if ("registers", i) in new:
            x = x.clone()
            x[:, model.token_layout(i).registers] = new["registers", i]
            return x

    def attention(i, attn):
        if ("cls_attention_to_registers", i) in new:
            layout, given = model.token_layout(i), new["cls_attention_to_registers", i].unsqueeze(-2)
            attn = attn.clone()
            row = attn[:, :, layout.cls]  # (B, H, 1, N), a view
            rest = (1 - row[..., layout.registers].sum(dim=-1, keepdim=True)).clamp_min(1e-12)
            row *= (1 - given.sum(dim=-1, keepdim=True)) / rest
            row[..., layout.registers] = given
            return attn

    changes = {"tokens": tokens} if kind == "registers" else {"attention": attention}
    return trace(model, images, **changes)
