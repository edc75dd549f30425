"""Weights in the wrappings and under the names that people save them, as one state dict."""

import re

import torch
from torch import Tensor

import utils

PATCHES = "patch_embed.proj.weight"
_HF_PATCHES = ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.weight")
MOST_SETS = 1000  # in one dictionary; a ResNet's first name ends many others
_HF_HEAD = re.compile(r"(cls_|distillation_)?classifier\.(weight|bias)")
# Hugging Face's ViT, DeiT, DINOv2 and DINOv3, in files and in state dicts of transformers 5.
_HF_NAMES = (
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"), (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""), (r"^(model\.)?(encoder\.)?layers?\.", "blocks."), (r"^layernorm\.", "norm."),
    (r"\.attention\.attention\.", ".attention."), (r"\.attention\.(query|q_proj)\.", ".attn.q_"),
    (r"\.attention\.(key|k_proj)\.", ".attn.k_"), (r"\.attention\.(value|v_proj)\.", ".attn.v_"),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."), (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^(cls_)?classifier\.", "head."), (r"^distillation_classifier\.", "head_dist."),
)  # fmt: skip
# timm's tokens and Eva (DINOv3, EVA), DINOv2 and DINOv3 as Meta saves them.
_NAMES = (
    (r"^(reg_token|storage_tokens)$", "register_tokens"), (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.attn\.([qkv])_proj\.", r".attn.\1_"), (r"\.mlp\.w1\.", ".mlp.fc1_g."), (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)  # fmt: skip


def find_weights(checkpoint: dict, weights_key=None, anchor=PATCHES) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without the prefixes that wrappers leave; names of Hugging Face as timm's.

    It is where a patch embedding (or the tensor `anchor`) stands, in whatever dictionaries and after whatever prefix.
    If there are several, `weights_key` chooses, the dotted name of one or its first words, else those of EMA or of a
    teacher are taken. What is not taken is printed.

    Raises:
        ValueError: no or several sets of weights are found, or not all of their values are tensors.
    """
    if "model_args" in checkpoint:  # of this project
        if checkpoint.get("ema"):
            utils.say("note: this checkpoint is for resuming; its weights without EMA are used, not those of EMA")
        return dict(checkpoint["model"])
    everything = {name or "the file itself": (weights, rest) for name, weights, rest in _sets(checkpoint, anchor)}
    if not everything:
        shapes = [f"{name} {shape_text(t)}" for name, t in _tensors(checkpoint)]
        found = f"its tensors are {listed(shapes)}" if shapes else "it has no tensors with names"
        kind = "of a Vision Transformer" if anchor == PATCHES else "of this model"
        raise ValueError(f"these are no weights {kind}: there is no {anchor}; {found}")
    wanted = [n for n in everything if weights_key is None or f"{n}.".startswith(f"{weights_key}.")]
    if not wanted:
        raise ValueError(f"there are no weights in {weights_key!r}, but in {listed(everything)}; correct weights_key")
    averaged = [n for n in wanted if {"ema", "teacher"} & set(re.split(r"[._]", n.lower()))]
    if len(wanted) > 1 and not averaged:
        raise ValueError(
            f"there are several sets of weights, {listed(wanted)}; choose one with weights_key (--weights_key)"
        )
    taken = (averaged or wanted)[0]
    weights, rest = everything[taken]
    rest = [n for n in everything if n != taken] + rest
    if rest:
        chooses = "; --weights_key chooses" * (len(everything) > 1)
        utils.say(utils.printable(f"note: the weights in {taken} are taken, not {listed(rest)}{chooses}"))
    wrong = [str(n) for n, t in weights.items() if not (isinstance(n, str) and isinstance(t, Tensor))]
    if wrong:
        raise ValueError(f"this is no state dict: not all of its values are tensors, with names; see {listed(wrong)}")
    if any(n in weights for n in _HF_PATCHES):
        up = ".mlp.fc1_x." if any(".gate_proj." in n for n in weights) else ".mlp.fc1."
        weights = _with_qkv(_renamed(weights, (*_HF_NAMES, (r"\.mlp\.up_proj\.", up))))
    return dict(weights)


def without_chunks(weights: dict) -> dict[str, Tensor]:
    """DINOv2 saves its blocks in chunks, `blocks.0.5.`, but numbers them without."""
    return _renamed(weights, [(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1")])


def to_this_project(weights: dict) -> dict[str, Tensor]:
    """Weights of `find_weights` under the names of a DynamicViT; those for which it has none keep their own."""
    state = _with_qkv(_renamed(without_chunks(weights), _NAMES))
    for name in [n for n in state if n.endswith(".attn.qkv.bias_mask")]:  # DINOv3's: the bias of keys is not used
        del state[name]
        bias = name.removesuffix("_mask")
        if bias in state:
            q, k, v = _parts(bias, state[bias], 3)
            state[bias] = torch.cat([q, torch.zeros_like(k), v])
    for name in [n for n in state if ".mlp.w12." in n]:  # DINOv2's SwiGLU
        first, second = (name.replace("w12", part) for part in ("fc1_g", "fc1_x"))
        state[first], state[second] = _parts(name, state.pop(name), 2)
    return state


def shape_text(tensor) -> str:
    return "x".join(map(str, tensor.shape))


def listed(words, most=8, comma=", ") -> str:
    words = list(words)
    return comma.join(words[:most] + [f"and {len(words) - most} more"] * (len(words) > most))


def _sets(part: dict, anchor, path=()):
    """(dotted name, weights, names beside them) of each set of weights in nested dictionaries."""
    names = [n for n, t in part.items() if isinstance(n, str) and isinstance(t, Tensor)]
    anchors = (anchor, *_HF_PATCHES) if anchor == PATCHES else (anchor,)
    prefixes = {n.removesuffix(a) for n in names for a in anchors if f".{n}".endswith(f".{a}")}
    if len(prefixes) > MOST_SETS:  # each costs a pass over all names
        raise ValueError(f"these are weights of {len(prefixes)} models in one dictionary; save those of one")
    # The outermost ones: the name conv1.weight stands at the beginning of a ResNet and in each of its blocks.
    prefixes = [p for p in sorted(prefixes) if not any(p != other and p.startswith(other) for other in prefixes)]
    for prefix in prefixes:
        weights = {n.removeprefix(prefix): part[n] for n in names if n.startswith(prefix)} if prefix else part
        heads = {}
        if any(n in weights for n in _HF_PATCHES):
            parent = re.sub(r"[^.]+\.$", "", prefix)
            heads = {n: n.removeprefix(parent) for n in names if n.startswith(parent)}
            heads = {n: new for n, new in heads.items() if _HF_HEAD.fullmatch(new)}
            weights = weights | {new: part[n] for n, new in heads.items()}
        beside = [n for n in names if n not in heads and not n.startswith(tuple(prefixes))]
        first_words = dict.fromkeys(".".join(n.split(".")[:2]) for n in beside)
        yield ".".join((*path, prefix)).strip("."), weights, list(first_words)
    for key, value in part.items():
        if isinstance(value, dict):
            yield from _sets(value, anchor, (*path, str(key)))


def _tensors(part: dict, path=()):
    """(dotted name, tensor) of all tensors in nested dictionaries."""
    for key, value in part.items():
        if isinstance(value, Tensor):
            yield ".".join((*path, str(key))), value
        elif isinstance(value, dict):
            yield from _tensors(value, (*path, str(key)))


def _renamed(state: dict, names) -> dict[str, Tensor]:
    """`state` with each regular expression in its names replaced; raises ValueError if two names become the same."""
    renamed = {}
    for name, tensor in state.items():
        new = name
        for old, other in names:
            new = re.sub(old, other, new)
        if new in renamed:
            raise ValueError(f"{name} stands in these weights under a second name, too: {new}")
        renamed[new] = tensor
    return renamed


def _with_qkv(state: dict) -> dict[str, Tensor]:
    """Weights and biases of queries, keys and values as one; keys without a bias, as in EVA, get zeros."""
    for name in [n for n in state if re.search(r"\.attn\.q_(weight|bias)$", n)]:
        stem, kind = name.rsplit("q_", 1)
        parts = [state.pop(f"{stem}{part}_{kind}", None) for part in "qkv"]
        if parts[1] is None and kind == "bias":
            parts[1] = torch.zeros_like(parts[0])
        if any(t is None or t.shape != parts[0].shape or not t.dim() for t in parts):
            raise ValueError(f"{name} {shape_text(parts[0])} has no keys and values of its shape beside it")
        state[f"{stem}qkv.{kind}"] = torch.cat(parts)
    return state


def _parts(name, tensor, count) -> tuple[Tensor, ...]:
    if not tensor.dim() or len(tensor) % count:
        raise ValueError(f"{name} {shape_text(tensor)} does not consist of {count} equal parts")
    return tensor.chunk(count)
