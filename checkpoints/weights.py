"""Weights from elsewhere (DeiT, timm, DINO, Hugging Face, other checkpoints of this project) into a model."""

import math
import re
import sys
from typing import NamedTuple

import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed as resample_positions
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from checkpoints.names import PATCHES, find_weights, listed, shape_text, to_this_project, without_chunks
from models_dynamic import HEADS, TOKENS, DynamicViT


class LoadReport(NamedTuple):
    """Names of parameters: taken over, the same at another resolution or number, not taken over, as initialised."""

    loaded: list[str]
    resampled: list[str]
    left_out: list[str]
    new: list[str]


# What a model may lack or have in addition without being another model.
_OPTIONAL = (*TOKENS, *HEADS)
# Of pretraining, and what stands after the blocks: no map needs it.
_UNUSED = re.compile(
    r"(mask_token$|decoder|predictor|projector|pooler|attn_pool|fc_norm|last_layer|dino|ibot|lm_head|local_cls_norm)"
    r"|rope_embed\.periods$|head\.(?!(weight|bias)$)"
)


def load_weights(model: nn.Module, checkpoint: dict, weights_key=None) -> LoadReport:
    """Load a checkpoint of this project, or weights of a ViT as people save them, into `model`.

    They may stand in any wrapping (`find_weights`, also of `weights_key`) and under the names of timm, DINOv2, DINOv3
    or Hugging Face, wherever the model's tokens enter. A class-position embedding is folded into the class token (the
    two are only ever used as a sum), and the patch positions are resampled to the model's grid (timm's bicubic). A
    head for another number of classes is left as initialised, as are tokens that the file does not have; of registers
    in another number the first ones are taken over. Decoders, and other heads, are left out. Into one of timm's models
    goes a file of the same model, as timm itself converts it.

    Raises:
        ValueError: anything else does not fit; it lists the names and shapes, and nothing is loaded.
    """
    state, report = match_to_model(model, checkpoint, weights_key)
    model.load_state_dict(state, strict=False)
    return report


def match_to_model(model: nn.Module, checkpoint: dict, weights_key=None) -> tuple[dict, LoadReport]:
    """What of a file's weights goes into `model`, under its names and in its shapes. See `load_weights`."""
    own = model.state_dict()
    if isinstance(model, DynamicViT):
        state, old_grid = convert_keys(checkpoint, model.grid_size, weights_key=weights_key)
        resampled = []
        if "pos_embed" in state and old_grid != model.grid_size:
            state["pos_embed"] = resample_positions(state["pos_embed"], model.grid_size, old_grid, num_prefix_tokens=0)
            resampled.append("pos_embed")
        if "register_tokens" in state and "register_tokens" in own:
            theirs, mine = state["register_tokens"], own["register_tokens"]
            if theirs.shape[1] != mine.shape[1] and theirs.shape[2] == mine.shape[2]:
                state["register_tokens"] = torch.cat([theirs, mine[:, theirs.shape[1] :]], dim=1)[:, : mine.shape[1]]
                resampled.append("register_tokens")
        heads, optional = HEADS, _OPTIONAL
    else:
        state = find_weights(checkpoint, weights_key, PATCHES if PATCHES in own else next(iter(own)))
        state, resampled, heads = _timm_state(state, model)
        optional = heads
    left_out = [n for n in state if n not in own and (n in optional or _UNUSED.match(n))]
    left_out += [n for n in heads if n in state and n in own and state[n].shape != own[n].shape]
    state = {n: t for n, t in state.items() if n not in left_out}
    differ = [n for n, t in state.items() if n in own and t.shape != own[n].shape]
    misfits = [f"{n} is {shape_text(state[n])}, here {shape_text(own[n])}" for n in differ]  # the width, the patch size
    misfits += [f"{n} {shape_text(t)} is unknown here" for n, t in state.items() if n not in own]
    new = [n for n in own if n not in state]
    misfits += [f"{n} {shape_text(own[n])} is missing" for n in new if n not in optional]
    if misfits:
        raise ValueError(f"these weights do not fit the model: {listed(misfits, 6, '; ')}")
    return state, LoadReport([n for n in state if n not in resampled], resampled, left_out, new)


def _timm_state(state: dict, model: nn.Module) -> tuple[dict, list[str], list[str]]:
    """(weights for a model of timm's, names that timm resampled, names of the model's heads)."""
    shapes = {n: t.shape for n, t in state.items()}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        if isinstance(model, VisionTransformer):
            state = without_chunks(state)
            if "pos_embed" in state and model.pos_embed is not None:
                _check_timm_resamples(state["pos_embed"], model)
        try:
            state = convert(state, model)
        except Exception as error:  # many kinds, where names or shapes are not as timm expects
            raise ValueError(f"timm cannot convert these weights for the model: {error!r}") from None
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    names = [f"{head}.{kind}" for head in heads for kind in ("weight", "bias")]
    return state, [n for n, t in state.items() if n in shapes and t.shape != shapes[n]], names


def _check_timm_resamples(positions: Tensor, model: VisionTransformer):
    """Raise ValueError for positions of another grid that is not square: timm would take them for square."""
    theirs, own = positions.shape[1] if positions.dim() == 3 else 0, model.pos_embed.shape[1]
    patches = theirs - (own - model.patch_embed.num_patches)
    if theirs != own and math.isqrt(max(patches, 0)) ** 2 != patches:
        raise ValueError(f"pos_embed has {theirs} rows, here {own}, and timm resamples only those of square images")


def convert_keys(checkpoint: dict, like=None, img_size=None, weights_key=None) -> tuple[dict, tuple[int, int] | None]:
    """(weights under this project's names, grid of their position embedding).

    `like`, or the grid of `img_size`, is preferred if it fits; see `split_positions`.
    """
    state = to_this_project(find_weights(checkpoint, weights_key))
    if PATCHES not in state:
        raise ValueError(f"these are no weights of a Vision Transformer: there is no {PATCHES}")
    _check_shapes(state)
    if "pos_embed" in state and "patch_size" in checkpoint.get("model_args", ()):
        size, patch = checkpoint["model_args"]["img_size"], checkpoint["model_args"]["patch_size"]
        return state, (size[0] // patch[0], size[1] // patch[1])
    patch = tuple(state[PATCHES].shape[2:])
    if img_size is not None and not any(side % p for side, p in zip(img_size, patch)):
        like = (img_size[0] // patch[0], img_size[1] // patch[1])
    if "pos_embed" not in state:
        return state, like

    # Which rows of the position embedding belong to tokens: none, CLS (and DeiT's distillation token), or all.
    classes = ("cls_token" in state) + ("dist_token" in state)
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    positions = state["pos_embed"]
    prefix, grid = split_positions(state, classes, registers, like)
    for row, name in enumerate(n for n in TOKENS[:2] if n in state):
        if prefix:
            state[name] = state[name] + positions[:, row : row + 1]
    if prefix > classes:
        state["register_tokens"] = state["register_tokens"] + positions[:, classes:prefix]
    state["pos_embed"] = positions[:, prefix:]
    return state, grid


def _check_shapes(state: dict):
    """Raise ValueError unless what the rest is read off has the dimensions of its kind."""
    proj = state[PATCHES]
    width = proj.shape[0] if proj.dim() else None
    wanted = {
        PATCHES: (width, None, None, None), "cls_token": (1, 1, width), "dist_token": (1, 1, width),
        "register_tokens": (1, None, width), "pos_embed": (1, None, width), "blocks.0.mlp.fc1.weight": (None, None),
        "blocks.0.mlp.fc1_g.weight": (None, None), "head.weight": (None, None),
    }  # fmt: skip
    for name, sides in wanted.items():
        found = tuple(state[name].shape) if name in state else sides
        if len(found) != len(sides) or any(here == 0 or side not in (None, here) for here, side in zip(found, sides)):
            raise ValueError(f"these are no weights of a Vision Transformer: {name} has the shape {found}")


def split_positions(state: dict, classes: int, registers: int, like) -> tuple[int, tuple[int, int]]:
    """(number of leading rows of the positions that belong to tokens, grid of the rest), which no file says.

    The grid `like` decides where the rows fit it, else the grid is square: after a row for each class token (DeiT,
    timm, DINOv2), or without (DeiT III, timm's with registers, this project's). Raises ValueError where none is
    square, and where the rows may be read in several ways.
    """
    length, prefixes = state["pos_embed"].shape[1], dict.fromkeys((0, classes, classes + registers))
    for prefix in prefixes:
        if like is not None and length - prefix == math.prod(like):
            return prefix, like
    found = [(n, grid) for n in prefixes for grid in _grids(length - n) if grid[0] == grid[1]]
    if classes and found and found[0][0] == 0:
        # n * n rows are also one row and (n - 1) x (n + 1) patches: only the sort of model says that this is not meant.
        no_rows = bool(registers) or "blocks.0.ls1.gamma" in state
        found += [(classes, (h, w)) for h, w in _grids(length - classes) if not (no_rows and w - h == 2)]
    if len(found) == 1:
        return found[0]
    found = found or [(n, grid) for n in prefixes for grid in _grids(length - n)]
    words = ", or ".join(f"{h}x{w} patches" + f" after {n} for tokens" * bool(n) for n, (h, w) in found[:4])
    (ph, pw), (h, w) = state[PATCHES].shape[2:], found[-1][1] if found else (1, length)
    raise ValueError(
        f"pos_embed has {length} rows, {f'which may be {words}' if words else 'of no usual grid'}; "
        f"give the size of the images that they are for, as in --input_size {h * ph}x{w * pw}"
    )


def _grids(count: int) -> list[tuple[int, int]]:
    """Grids (gh, gw) of `count` patches that are up to twice as wide as high."""
    return [(h, count // h) for h in range(1, math.isqrt(max(count, 0)) + 1) if count % h == 0 and count <= 2 * h * h]
