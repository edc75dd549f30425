"""Models of timm's, wherever their weights come from, with what the looking scripts ask of a model.

model = ForeignViT(create("timm:vit_small_patch16_dinov3.lvd1689m"), "vit_small_patch16_dinov3")
attention_maps(model, images, blocks=[11])
"""

import copy
import math
import socket
from urllib.parse import urlparse
from urllib.request import getproxies

import huggingface_hub
import torch
import torch.nn as nn
from timm import create_model
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.layers import to_2tuple
from timm.models import is_model

from checkpoints.files import load_checkpoint
from checkpoints.names import listed
from checkpoints.weights import load_weights
from inspection.attention import attention_shapes, blocks_of
from models_dynamic import TokenLayout
from utils import BadInput, printable, say

SOURCES = ("timm:", "hf-hub:", "local-dir:")


class ForeignViT(nn.Module):
    """A model of timm's, seen as a DynamicViT is: `depth`, `blocks`, `token_layout`, `grid_size`, entry blocks.

    What it is made of, it is asked: its names for tokens and grid, and one forward pass that shows its attention.
    Blocks whose attention is not torch's own function are left out, and the others counted from 0. An attention
    pooling (SigLIP) is one more block, `pool_pos`, after the last one.

    Raises:
        ValueError: there is no attention over all patches to be seen (convolutions, windows, several resolutions).
    """

    def __init__(self, model: nn.Module, name: str, img_size):
        super().__init__()
        self.model, self.name, img_size = model.eval(), name, to_2tuple(img_size)
        self.num_classes = getattr(model, "num_classes", 0)
        own = blocks_of(model) if hasattr(model, "blocks") else []
        weight, channels = next(model.parameters()), model.pretrained_cfg["input_size"][0]
        black = torch.zeros(1, channels, *img_size, device=weight.device, dtype=weight.dtype)
        shapes = attention_shapes(model, black) if own else {}
        resizable = hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size")
        grid = model.patch_embed.dynamic_feat_size(img_size) if resizable else (0, 0)
        prefix = getattr(model, "num_prefix_tokens", 0)
        length = prefix + grid[0] * grid[1]
        pooling = getattr(model, "attn_pool", None) is not None  # the last of its blocks, maybe of the patches alone
        keys = {i: keys[2] if len(keys) == 4 else None for i, (_, keys) in shapes.items()}
        wanted = {i: {length, length - prefix} if pooling and i == len(own) - 1 else {length} for i in keys}
        if not keys or any(keys[i] not in wanted[i] for i in keys):
            raise ValueError(
                f"the attention of {name} cannot be seen: it has no blocks that attend to all patches (convolution, "
                f"windows, several resolutions); ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, EVA, BEiT and CaiT have them"
            )
        self._shown = sorted(shapes)
        self._queries, self._keys = [shapes[i][0][2] for i in self._shown], list(keys.values())
        self.depth, self.grid_size = len(self._shown) - pooling, tuple(grid)
        self.pool_pos = self.depth if pooling else None
        self.cls_only = self._queries[0] < length  # CaiT's class attention
        self.hidden = len(own) - len(self._shown)
        has = {token: getattr(model, f"{token}_token", None) is not None for token in ("cls", "dist")}
        self.cls_pos, self.dist_pos = (0 if has[token] else None for token in ("cls", "dist"))
        self.num_register_tokens = prefix - sum(has.values())
        self.reg_pos = 0 if self.num_register_tokens else None
        named = to_2tuple(getattr(getattr(model, "patch_embed", None), "patch_size", 0))
        # timm leaves out pixels that make no whole patch; the patches of hybrids are of a convnet's features.
        patch = tuple(p if p and side // p == n else side // n for side, n, p in zip(img_size, grid, named))
        heads = shapes[self._shown[0]][0][1]
        self.model_args = {"timm_name": name, "img_size": img_size, "patch_size": patch, "num_heads": heads}

    @property
    def blocks(self) -> list[nn.Module]:
        own = blocks_of(self.model)
        return [own[i] for i in self._shown]

    def token_layout(self, block: int) -> TokenLayout:
        """Layout at the input of `block`: timm has [CLS | distillation | registers | patches]."""
        prefix, total = (self.cls_pos is not None) + (self.dist_pos is not None), self.num_register_tokens
        first, count = prefix + total, math.prod(self.grid_size)
        patches, length = slice(first, first + count), first + count
        if block == self.pool_pos:
            behind = self._keys[block]
            return TokenLayout(None, slice(behind - count, behind), None, behind, pool=slice(0, self._queries[block]))
        if not 0 <= block < self.depth:
            raise ValueError(f"block {block} is outside the model: its blocks are 0..{self.depth - 1}")
        cls = slice(0, 1) if self.cls_pos is not None else None
        if self.cls_only:
            return TokenLayout(cls, patches, None, length, queries=self._queries[block])
        dist = slice(prefix - 1, prefix) if self.dist_pos is not None else None
        registers = slice(prefix, first) if total else None
        return TokenLayout(cls, patches, registers, length, dist, numbers=tuple(range(total)))

    def forward(self, images):
        logits = self.model(images)
        return sum(logits) / len(logits) if isinstance(logits, tuple) else logits

    def at_size(self, img_size) -> "ForeignViT":
        """The same weights for images of another size, positions resampled by timm. Raises ValueError if it cannot."""
        model = copy.deepcopy(self.model)
        try:
            model.set_input_size(img_size=tuple(img_size))
            return ForeignViT(model, self.name, img_size)
        except (AttributeError, AssertionError, RuntimeError) as error:
            size = "{} x {} pixels".format(*img_size)
            raise ValueError(f"{self.name} cannot take images of {size}: {error}") from None


def own_model(model: nn.Module) -> nn.Module:
    """The model itself, out of a `ForeignViT` and of `test_time_registers.WithRegisters`."""
    model = getattr(model, "inner", model)
    return model.model if isinstance(model, ForeignViT) else model


def create(source: str, weights=None, img_size=None, key=None) -> nn.Module:
    """A model of timm's from `timm:NAME`, `hf-hub:USER/REPO` or `local-dir:FOLDER`, in eval mode.

    Its pretrained weights are downloaded by timm, unless `weights` names a file (`key`: which of its sets of weights).
    Raises BadInput for what timm does not know, and for weights that cannot be had.
    """
    name = source.removeprefix("timm:")
    if source.startswith("timm:") and not is_model(name):
        raise BadInput(f"timm has no model {name}; timm.list_models('*vit*') lists names")
    if not _hub_is_there():
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # what is in its cache, or an error, without minutes of retries
    try:
        model = create_model(name, pretrained=weights is None, img_size=img_size)
    except TypeError as error:
        if "img_size" in str(error):
            raise BadInput(f"--input_size: {source} is made for one size; leave it out") from None
        raise
    except Exception as error:  # of timm, huggingface_hub, urllib, safetensors and their libraries
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if not source.startswith("local-dir:") and not _hub_is_there():
            reason = "no network"
        raise BadInput(
            f"cannot get the weights of {source} ({reason}); connect to the network, or give a file: "
            f"--model_path timm:NAME --weights FILE"
        ) from None
    if weights is not None:
        try:
            report = load_weights(model, load_checkpoint(weights), key)
        except ValueError as error:
            raise BadInput(f"--weights {weights}: {error}") from None
        for names, problem in ((report.left_out, "left out of the file"), (report.new, "not in the file, so random")):
            if names:
                say(printable(f"note: {weights}: {problem}: {listed(names)}"))
    return model.eval()


def _hub_is_there() -> bool:
    """Whether the name of the model hub is known here, or a proxy would know it."""
    host = urlparse(huggingface_hub.constants.ENDPOINT).hostname
    try:
        return bool(getproxies()) or bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def data_of(model: nn.Module, img_size) -> dict:
    """What a checkpoint says of its data: input and normalisation as timm has them, names of ImageNet's classes."""
    config, subset = model.pretrained_cfg, infer_imagenet_subset(model)
    classes = list(config.get("label_names") or (ImageNetInfo(subset).label_descriptions() if subset else []))
    classes = [words.partition(",")[0] for words in classes]  # of synonyms the first
    return {
        "name": None, "classes": classes, "input_size": tuple(img_size), "mean": config["mean"], "std": config["std"],
        "crop_pct": config.get("crop_pct") or 1.0, "interpolation": config.get("interpolation") or "bicubic",
    }  # fmt: skip
