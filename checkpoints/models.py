"""A model from a checkpoint: one of this project, one of timm's, or read off the shapes of a bare state dict."""

import copy
import math
import os
from functools import partial

import torch
import torch.nn as nn
from timm import create_model
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, is_model

import utils
from checkpoints.files import load_checkpoint
from checkpoints.names import PATCHES, find_weights, listed, shape_text
from checkpoints.schema import MODEL_ARGS, TIMM_ARGS, first_wrong
from checkpoints.weights import convert_keys, load_weights, match_to_model
from datasets import CIFAR
from models_dynamic import SIZES, DynamicViT
from utils import BadInput


def load_model(path):
    """(model in eval mode, checkpoint) from a checkpoint of this project. Raises BadInput if it is none."""
    checkpoint = load_checkpoint(path)
    lacks = {"model", "model_args", "data", "args", "epoch"} - checkpoint.keys()
    if lacks:
        raise BadInput(f"{path} was not written by this project's training: it lacks {', '.join(sorted(lacks))}")
    try:
        return model_from_checkpoint(checkpoint), checkpoint
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None


def data_folder(checkpoint, given):
    """The folder of a checkpoint's images: `given`, else the one that the checkpoint names. None: the usual one.

    Raises BadInput where CIFAR would be downloaded to a folder that only the checkpoint names.
    """
    path, name = checkpoint.get("args", {}).get("data_path"), checkpoint["data"]["name"]
    if given or path is None:
        return given
    if name in CIFAR:
        folder = os.path.join(path, CIFAR[name])
        if not os.path.isdir(folder):
            raise BadInput(f"there is no {folder}, where training had the images; give --data_path")
    return path


def at_size(model: DynamicViT, img_size) -> DynamicViT:
    """The same model for images of another size, in eval mode: the weights are shared, the positions resampled.

    Raises ValueError for a size that the patches do not tile, or whose positions do not fit into the memory.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    other = copy.deepcopy(model, shared)
    try:
        other.set_input_size(img_size)
    except (RuntimeError, TypeError, OverflowError):  # torch's, for what it cannot allocate or count
        h, w = to_2tuple(img_size)
        raise ValueError(f"images of {h} x {w} pixels are too large") from None
    return other.eval()


def timm_model(timm_name: str, num_classes: int, img_size=None, **kwargs) -> nn.Module:
    """A model of timm's that can say how it is built (`model_args`), as a DynamicViT can.

    `img_size` is passed on only to models that are made for one size. Raises ValueError if timm cannot build it.
    """
    config = get_pretrained_cfg(timm_name)
    args = {"num_classes": num_classes, **kwargs}
    if img_size is not None and config is not None and config.fixed_input_size:
        args["img_size"] = tuple(img_size)
    try:
        model = create_model(timm_name, **args)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"timm cannot build {timm_name} with {args}: {error}") from None
    model.model_args = {"timm_name": timm_name, **args}
    return model


def model_from_checkpoint(checkpoint: dict, img_size=None, weights_key=None, **given) -> nn.Module:
    """The model that a checkpoint describes, with its weights, in eval mode.

    A checkpoint of this project says everything about its model (a DynamicViT, or one of timm's models). The
    other arguments are for weights from elsewhere. What is left out of these is printed.

    Args:
        img_size: (h, w), the size of the model if the weights have positions for its number of patches; else they
            must be those of a square image.
        weights_key: which of several sets of weights, see `find_weights`.
        given: arguments of DynamicViT that no shape shows: `num_heads` must be given, tokens enter at block 0 unless
            `cls_pos`, `reg_pos` or `dist_pos` is.

    Raises:
        ValueError: the weights do not fit, an argument is missing or contradicts the checkpoint, or the positions
            may be read in several ways.
    """
    if "model_args" in checkpoint:
        if given or weights_key is not None:
            names = ", ".join([*given, *["weights_key"] * (weights_key is not None)])
            raise ValueError(f"the checkpoint itself says how its model is built; leave out {names}")
        build = validated_builder(checkpoint["model_args"], checkpoint["model"])
    else:
        checkpoint = find_weights(checkpoint, weights_key)
        if "num_heads" not in given:
            raise ValueError("the shapes of a bare state dict do not say how many heads it has; give --num_heads")
        build = partial(DynamicViT, **(_args_from_shapes(checkpoint, img_size) | given))
    try:
        with torch.device("meta"):  # names and shapes: a model that the weights are not of takes no memory
            shapes = build()
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"there is no such model: {error}") from None
    if "model_args" in checkpoint:
        check_same_shapes(checkpoint["model"], shapes.state_dict())
    else:
        match_to_model(shapes, checkpoint)
    model = build()
    report = load_weights(model, checkpoint)
    if report.new:
        raise ValueError(f"the checkpoint lacks {', '.join(report.new)}")
    if report.left_out:
        names = listed(dict.fromkeys(n.split(".")[0] for n in report.left_out))
        utils.say(utils.printable(f"note: left out of the weights, since no map needs it: {names}"))
    return model.eval()


def check_same_shapes(state: dict, own: dict):
    """Raise ValueError unless names and shapes are the same: of a model's own weights nothing is resampled."""
    other = [f"{n} is {shape_text(t)}" for n, t in state.items() if n not in own or t.shape != own[n].shape]
    other += [f"{n} is missing" for n in own if n not in state]
    if other:
        raise ValueError(f"the weights are not those of the model in model_args: {listed(other, 3, '; ')}")


PROBLEM = "model_args do not describe a model"


def check_model_args(args: dict):
    """Raise ValueError unless a model can be built again from its `model_args` in a checkpoint.

    They are those of a DynamicViT, all of them, or of one of timm's models: others of timm's arguments read files or
    the network.
    """
    name, wanted = args.get("timm_name"), MODEL_ARGS
    if name is not None:
        if not isinstance(name, str) or not is_model(name) or name in SIZES:
            raise ValueError(f"{PROBLEM}: timm has no model {name}")
        config, wanted = get_pretrained_cfg(name), TIMM_ARGS
        if config and config.fixed_input_size:
            wanted = wanted | {"img_size": wanted["img_size?"]}
    unknown = args.keys() - {key.removesuffix("?") for key in wanted}
    wrong = min(unknown, default=None) or first_wrong(args, wanted)
    if wrong:
        how = "unknown" if wrong in unknown else repr(args[wrong]) if wrong in args else "missing"
        raise ValueError(f"{PROBLEM}: {wrong} is {how}; checkpoints/schema.py has what they may be")


def validated_builder(args: dict, state: dict):
    """A function that builds the model of `check_model_args`, whose weights are `state`."""
    check_model_args(args)
    depth, registers = _depth(state), state.get("register_tokens", torch.empty(1, 0, 0))
    if args.get("depth", depth) != depth:
        raise ValueError(f"{PROBLEM}: depth is {args['depth']}, the weights have {depth} blocks")
    if args.get("num_register_tokens", 0) > registers.numel():  # the model lists them before it has shapes
        found = f"register_tokens is {shape_text(registers)}"
        raise ValueError(f"{PROBLEM}: num_register_tokens is {args['num_register_tokens']}, but {found}")
    return partial(timm_model if "timm_name" in args else DynamicViT, **args)


def _depth(state: dict) -> int:
    return sum(n.startswith("blocks.") and n.endswith(".norm1.weight") for n in state)


def _args_from_shapes(weights: dict, img_size) -> dict:
    """Arguments of DynamicViT as far as a bare state dict's shapes show them; see `model_from_checkpoint`."""
    state, grid = convert_keys(weights, img_size=img_size)
    width, channels, *patch = state[PATCHES].shape
    if channels != 3:
        raise ValueError(
            f"these weights are for images of {channels} channels, not 3: {PATCHES} is {shape_text(state[PATCHES])}"
        )
    swiglu = "blocks.0.mlp.fc1_g.weight" in state
    first = f"blocks.0.mlp.fc1{'_g' * swiglu}.weight"
    rope = "pos_embed" not in state  # DINOv3
    lacking = [first, *(["cls_token", "register_tokens", "blocks.0.ls1.gamma"] if rope else [])]
    lacking = [n for n in lacking if n not in state]
    problem = f"they lack {', '.join(['pos_embed'] * rope + lacking)}" if lacking else None
    if "blocks.0.gamma_1" in weights and not rope:  # timm's Eva: no buffer shows that it has rotary positions, too
        problem = "they have both pos_embed and blocks.0.gamma_1"
    if problem:
        advice = "give --model_path timm:NAME --weights FILE"
        raise ValueError(f"these weights are not of a plain Vision Transformer, or DINOv3: {problem}; {advice}")
    hidden = state[first].shape[0]
    ratio = hidden / width
    known_head = "head.weight" in state and state["head.weight"].shape[1] == width
    fc_norm = "fc_norm.weight" in state and "norm.weight" not in state
    modern = dict(
        fc_norm=fc_norm, global_pool="avg" if fc_norm else None, qk_norm="blocks.0.attn.q_norm.weight" in state,
        rope=rope, norm_eps=1e-5 if rope else None, swiglu=swiglu,
    )  # fmt: skip
    return dict(
        img_size=(grid[0] * patch[0], grid[1] * patch[1]) if grid else tuple(max(224 // p, 1) * p for p in patch),
        patch_size=tuple(patch),
        in_chans=channels,
        num_classes=state["head.weight"].shape[0] if known_head and "attn_pool.q.weight" not in state else 0,
        embed_dim=width,
        depth=_depth(state),
        mlp_ratio=ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        num_register_tokens=state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        cls_pos=0 if "cls_token" in state else None,
        dist_pos=0 if "dist_token" in state else None,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
        **{name: value for name, value in modern.items() if value},
    )
