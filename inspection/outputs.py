"""What the output is made of: what CLS takes from patches, registers and itself in the last attention.

The attention of CLS is cut into parts: its weights on the tokens of one kind are kept, and the others are zero, without
renormalisation. Each part is compared with the whole, once as what the attention adds to the residual stream, once as
the output of the model (with the skip path, the MLP and the last norm), by linear CKA (inspection/cka.py):
arXiv 2505.05892.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inspection.attention import Recorder, as_evaluated, watch_calls
from inspection.bootstrap import bootstrap, gather
from inspection.cka import CKA
from inspection.lens import Readout
from inspection.pages import headed_figure
from inspection.statistics import parts_of
from inspection.statistics_pages import HUES, WORDS, block_axis, draw_curve
from utils import BadInput

PARTS = WORDS | {"cls": "itself", "none": "nothing", "bias": "biases", "skip": "skip path"}


def check(model):
    """Raise BadInput unless CLS attends in the last block, and this block is a known one."""
    if model.token_layout(model.depth - 1).cls is None:
        raise BadInput("outputs: this model has no class token, whose attention could be cut into parts")
    if not hasattr(model.blocks[model.depth - 1], "mlp"):
        raise BadInput("outputs: attention and MLP of the last block cannot be told apart in this model")


@torch.no_grad()
def measure(model, batches) -> dict:
    """Mean norms with intervals, CKA with the whole, and for each block the cosine of its CLS with the last block's.

    Returns:
        {"norms": {"skip", each part, "bias", "attention": {"mean", "interval"}}, "cka": {"attention", "output":
        {part: see `CKA.result`}}, "cosine", "cosine_interval", "rest": mean norm of what the attention adds to its
        parts and biases, relative to the attention: 0 unless there is a norm after the weighted sum, ...}
    """
    check(model)
    readout, cka = Readout(model), {"attention": CKA(), "output": CKA()}

    def of_batch(images, labels):
        cls, skip, added, outputs = decompose(model, images)
        whole, bias = added.pop("attention"), added["none"]
        parts = {name: values - bias for name, values in added.items() if name != "none"}
        cka["attention"].add(parts, whole)
        outputs = {name: readout.normalised(x[:, None])[:, 0] for name, x in outputs.items()}
        cka["output"].add(outputs, outputs.pop("attention"))
        norms = {"skip": skip, **parts, "bias": bias, "attention": whole, "rest": whole - bias - sum(parts.values())}
        found = {("norm", name): values.norm(dim=-1).cpu().double() for name, values in norms.items()}
        last = cls[model.depth - 1]
        return found | {("cosine", i): F.cosine_similarity(x, last, dim=-1).cpu().double() for i, x in cls.items()}

    rows = gather(batches, "outputs", of_batch)
    cosines, rest = [rows.get(("cosine", i)) for i in range(model.depth)], rows.pop(("norm", "rest"))
    return {
        "images": len(rest), "tokens": [model.token_layout(i).length for i in range(model.depth)],
        "norms": {
            name: {"mean": float(values.mean()), "interval": bootstrap(values).tolist()}
            for (what, name), values in rows.items() if what == "norm"
        },
        "rest": float(rest.mean() / max(rows["norm", "attention"].mean(), 1e-12)),
        "cka": {name: each.result() for name, each in cka.items()},
        "cosine": [None if values is None else float(values.mean()) for values in cosines],
        "cosine_interval": [None if values is None else bootstrap(values).tolist() for values in cosines],
    }  # fmt: skip


@torch.no_grad()
def decompose(model, images) -> tuple[dict, Tensor, dict, dict]:
    """One forward pass, and the last block again for CLS alone with parts of its attention.

    Returns:
        ({block: CLS at its output}, CLS at the input of the last block, {part: what the attention adds to that}, {part:
        CLS at the output of the last block}), all (B, D). Parts are kinds of tokens, "attention" (all of them) and
        "none": what its biases add.
    """
    last, cls, seen = model.depth - 1, {}, {}
    at = model.token_layout(last).cls
    parts = parts_of(model.token_layout(last)) | {"attention": slice(None), "none": slice(0)}

    def see(i, call):
        if i == last:
            row = call.weights([at])  # (B, H, 1, N)
            mixed = torch.stack([row[..., p] @ call.value[..., p, :] for p in parts.values()], dim=1)
            seen["mixed"] = mixed.flatten(0, 1)  # (B * parts, H, 1, d)

    def tokens(i, x):
        if i == last:
            seen["skip"] = x[:, at]

    def output(i, x):
        if model.token_layout(i).cls is not None:
            cls[i] = x[:, model.token_layout(i).cls.start]

    watch_calls(model, images, see, tokens=tokens, output=output, last=last, needs=[last])
    block, recorder = model.blocks[last], Recorder(lambda i, call: seen["mixed"])
    recorder.block = last
    x = seen["skip"].repeat_interleave(len(parts), dim=0)  # (B * parts, 1, D): CLS alone, once for each part
    with as_evaluated(model), recorder:
        whole = block(x)
        with block.mlp.register_forward_hook(lambda module, args, y: torch.zeros_like(y)):
            added = block(x) - x
    whole, added = (values.unflatten(0, (-1, len(parts)))[:, :, 0] for values in (whole, added))  # (B, parts, D)
    added, outputs = ({name: values[:, n] for n, name in enumerate(parts)} for values in (added, whole))
    if not torch.allclose(outputs["attention"], cls[last], rtol=1e-3, atol=1e-3 * float(cls[last].abs().max())):
        raise BadInput("outputs: the last block of this model does more with its attention than add it to CLS")
    return cls, seen["skip"][:, 0], added, outputs


def lines(result) -> list[str]:
    """The parts of the last attention: CKA of the output that keeps one, and norms."""
    output, norms = result["cka"]["output"], result["norms"]
    kept = [f"{PARTS[n]} {v['debiased']:.2f}" for n, v in output.items() if v["debiased"] is not None]
    sizes = [f"{PARTS[name]} {values['mean']:.2f}" for name, values in norms.items() if name != "attention"]
    found = [f"Debiased CKA of the output that keeps a part of the last attention: {', '.join(kept) or 'undefined'}"]
    found.append(f"Norms there: {', '.join(sizes)}; all of the attention {norms['attention']['mean']:.2f}")
    return found + [f"The parts do not add up: {100 * result['rest']:.0f}% of the norm"] * (result["rest"] > 0.01)


def page(result, about):
    """CKA and norms of the parts, and the cosine of each block's CLS with the last; `about`: below the title."""
    figure = headed_figure(
        (11, 6.2), "What is the output made of?", about,
        "CLS's attention in the last block, with its weights on tokens of one kind kept and the others zero. Linear "
        "CKA with the whole: 1 is the same up to rotation and scale. Filled: debiased (0: unrelated); outlined: "
        "biased, high if images are few. 'Nothing' keeps the skip path alone. Black, bands: 95% bootstrap intervals.",
        (0.01, 0.13, 0.98, 0.76),
    )  # fmt: skip
    figure.get_layout_engine().set(h_pad=0.08)
    (attention, output), (norms, cosine) = figure.subplots(2, 2)
    for axes, name, title in ((attention, "attention", "what attention adds"), (output, "output", "final output")):
        values = result["cka"][name]
        names = [PARTS[part] for part in values]
        for word, style in (("debiased", dict(alpha=0.8)), ("cka", dict(fill=False))):
            colours = [HUES.get(part, "0.5") for part in values]
            lengths = np.array([v[word] for v in values.values()], float)
            axes.barh(names, lengths, **style, color=colours, edgecolor="0.3")
        axes.axvline(0, color="0.3", linewidth=0.6)
        axes.set(xlim=(None, 1.05))
        axes.set_title(f"CKA: {title}", fontsize=10)
    values = result["norms"]
    means = np.array([v["mean"] for v in values.values()])
    ends = np.abs(np.array([v["interval"] for v in values.values()]).T - means)
    names, colours = [PARTS.get(n, "attention") for n in values], [HUES.get(n, "0.5") for n in values]
    norms.barh(names, means, xerr=ends, color=colours)
    norms.set_title("mean norm of what is added", fontsize=10)
    draw_curve(cosine, result["cosine"], result["cosine_interval"], color=HUES["cls"])
    cosine.set_title("cosine of CLS with that of the last block", fontsize=10)
    block_axis(cosine, len(result["tokens"]))
    for axes in (attention, output, norms):
        axes.invert_yaxis()  # the first part at the top
    return figure
