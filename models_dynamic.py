"""A Vision Transformer whose class token and register tokens enter at a block of your choice.

    model = DynamicViT(img_size=224, patch_size=16, embed_dim=384, num_heads=6, cls_pos=6, reg_pos=3)
    logits = model(images)                              # (B, 3, h, w) -> (B, K)
    maps = model.attention_maps(images, blocks=[6, 11])  # what CLS and the registers attend to
    maps[11].cls                                        # (B, H, gh, gw)

Letters: B batch, N tokens now in the sequence, P patches, R registers, D width, H heads, d head width,
K classes; h, w pixels; gh, gw the grid of patches. Blocks are counted from 0.

Sources: ViT (arXiv 2010.11929), DeiT and its distillation token (2012.12877), CaiT, a class token that enters late
(2103.17239), "Vision Transformers Need Registers" (2309.16588), DINOv3 (2508.10104). Blocks and layers are timm's.
"""

import operator
from functools import partial
from inspect import signature
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp, SwiGLU, to_2tuple
from timm.layers import resample_abs_pos_embed as resample_positions
from timm.layers.pool1d import global_pool_nlc
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer, _cfg
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from inspection.attention import AttentionMaps, attention_maps, attention_rows, set_fused_attention
from tokens.blocks import STEMS, TokenAttention, TokenBlock
from tokens.layout import TokenLayout, all_alike, check_block, check_modes, check_sizes, registers_at

# register_model appends the registered sizes (and would make a list of them alone).
__all__ = ["SIZES", "AttentionMaps", "DynamicViT", "TokenLayout", "set_fused_attention", "vit_register_dynamic_viz"]

TOKENS = ("cls_token", "dist_token", "register_tokens")
PLACES = ("cls_pos", "dist_pos", "reg_pos", "reg_end", "num_register_tokens")  # cannot be set
HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")

SIZES = {
    "dynamic_vit_tiny_patch16_224": dict(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "dynamic_vit_small_patch16_224": dict(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "dynamic_vit_base_patch16_224": dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12),
    # ViT of "Vision Transformer for Small-Size Datasets" (arXiv 2112.13492): 2.7 M parameters.
    "dynamic_vit_cifar": dict(
        img_size=32, patch_size=4, num_classes=10, embed_dim=192, depth=9, num_heads=12, mlp_ratio=2.0
    ),
}


class DynamicViT(nn.Module):
    """Vision Transformer with a chosen entry block for the class, the distillation and the register tokens.

    Args:
        img_size, patch_size: pixels, one number or (h, w); the patches must tile the image.
        num_classes: K; 0 leaves out the head, and the forward pass returns the classified token.
        num_register_tokens: R; 0 means that there is no such parameter, and `reg_pos` is ignored.
        cls_pos: CLS is present at the input of this block, 0..depth-1; None: no class token.
        reg_pos: the same for the registers: one block for all, or one for each of them.
        reg_end: registers are absent from this block on, 1..depth, one or one for each; None: they stay.
        dist_pos: the same for DeiT's distillation token, which has a head of its own.
        cls_mode, reg_mode: "reader": CLS (and the distillation token), or the registers, attend to all tokens, and
            only readers attend to them.
        class_attention: in so many last blocks only CLS (and the distillation token) attends and is updated (CaiT).
        drop_rate, attn_drop_rate: dropout of positions, projections and MLPs; of attention weights.
        drop_path_rate: stochastic depth, growing linearly from 0 to this rate at the last block.
        init_values: initial LayerScale (CaiT); None: no LayerScale.
        norm_layer: a model with its own cannot be described by `model_args`; None: LayerNorm with `norm_eps`.
        global_pool: "token" (CLS), "avg" (the mean of the patches) or "", as in timm; None: CLS, if there is one.
        fc_norm: normalise the mean of the patches rather than the patches, as timm's ViTs with global_pool="avg" do.
        qk_norm: LayerNorm of queries and keys (ViT-22B, arXiv 2302.05442).
        rope: rotary positions on the patches in DINOv3's form, in place of a position embedding.
        swiglu: SwiGLU in place of the MLP with GELU (arXiv 2002.05202; timm's layer).
        stem: "conv": convolutions in place of the patch projection, "deep": three times as many; see `ConvStem`.

    Raises:
        ValueError: a position outside the blocks, or sizes or modes that do not go together.
    """

    _registers: list[list[int]]  # for TorchScript

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        num_register_tokens: int = 4,
        cls_pos: int | None = 0,
        reg_pos: int | tuple[int, ...] = 0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        norm_layer=None,
        dist_pos: int | None = None,
        global_pool: str | None = None,
        fc_norm: bool = False,
        qk_norm: bool = False,
        rope: bool = False,
        swiglu: bool = False,
        norm_eps: float = 1e-6,
        stem: str = "patch",
        reg_end: int | tuple[int, ...] | None = None,
        cls_mode: str = "token",
        reg_mode: str = "token",
        class_attention: int = 0,
    ):
        args = {name: value for name, value in locals().items() if name not in ("self", "__class__", "norm_layer")}
        super().__init__()
        args |= {name: tuple(to_2tuple(args[name])) for name in ("img_size", "patch_size")}
        check_sizes(args)
        self._own_norm = norm_layer is not None
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=norm_eps)
        self.depth, self.embed_dim = depth, embed_dim
        self.num_features = self.head_hidden_size = embed_dim  # timm's names
        self.num_register_tokens = num_register_tokens
        self._place_tokens(args)

        if stem not in STEMS:
            raise ValueError(f"stem {stem!r} is none of {', '.join(STEMS)}")
        self.patch_embed = STEMS[stem](args["img_size"], args["patch_size"], in_chans, embed_dim)
        counts = (0 if rope else self.patch_embed.num_patches, cls_pos is not None, dist_pos is not None)
        for name, count in zip(("pos_embed", *TOKENS), (*counts, num_register_tokens)):
            if count:
                setattr(self, name, nn.Parameter(torch.empty(1, count, embed_dim)))
        self.rope = RotaryEmbeddingDinoV3(embed_dim // num_heads, feat_shape=list(self.grid_size)) if rope else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(self._block(i, norm_layer) for i in range(depth))
        self.norm = nn.Identity() if fc_norm else norm_layer(embed_dim)
        self.fc_norm = norm_layer(embed_dim) if fc_norm else nn.Identity()
        self.reset_classifier(num_classes)
        info = dict(num_chs=embed_dim, reduction=max(args["patch_size"]))
        self.feature_info = [dict(module=f"blocks.{i}", **info) for i in range(depth)]
        self.grad_checkpointing = False
        self._init_weights()

    def _place_tokens(self, args: dict):
        """Which tokens are present at which block, and which is classified; `_args` describes that."""
        depth, cls_pos, dist_pos = args["depth"], args["cls_pos"], args["dist_pos"]
        self.cls_pos = None if cls_pos is None else check_block(cls_pos, depth, "cls_pos")
        self.dist_pos = None if dist_pos is None else check_block(dist_pos, depth, "dist_pos")
        entries = (self.cls_pos, self.dist_pos)
        self._entries = tuple(depth if entry is None else entry for entry in entries)  # depth: never
        places = registers_at(args["reg_pos"], args["reg_end"], self.num_register_tokens, depth)
        starts, ends, self._registers = places
        self.reg_pos, self.reg_end = all_alike(starts), all_alike(ends)  # None: no registers
        self.num_prefix_tokens = (self.cls_pos is not None) + (self.dist_pos is not None)  # in front of the patches
        self.global_pool = args["global_pool"]
        if self.global_pool is None:
            self.global_pool = "avg" if cls_pos is None else "token"
        check_modes(args, self._registers, self.global_pool)
        reg_end = None if self.reg_end == depth else self.reg_end
        self._args = args | dict(
            cls_pos=self.cls_pos, dist_pos=self.dist_pos, reg_pos=self.reg_pos or 0, reg_end=reg_end
        )

    def __setattr__(self, name, value):
        if name in PLACES and hasattr(self, "blocks"):  # the tokens would stay where they are
            other = f"DynamicViT(**model.model_args | dict({name}=...))"
            raise AttributeError(f"{name} cannot be set: build {other}, and give it this model's state_dict()")
        super().__setattr__(name, value)

    def _block(self, i: int, norm_layer) -> TokenBlock:
        args, (cls, dist, registers) = self._args, self._present(i)
        block = TokenBlock(
            args["embed_dim"], args["num_heads"], args["mlp_ratio"], args["qkv_bias"], args["qk_norm"],
            proj_drop=args["drop_rate"], attn_drop=args["attn_drop_rate"], init_values=args["init_values"],
            drop_path=args["drop_path_rate"] * i / max(self.depth - 1, 1), norm_layer=norm_layer,
            act_layer=nn.SiLU if args["swiglu"] else nn.GELU, mlp_layer=SwiGLU if args["swiglu"] else Mlp,
            attn_layer=TokenAttention,
        )  # fmt: skip
        block.attn.front = (cls + dist) * (args["cls_mode"] == "reader")
        block.attn.back = registers * (args["reg_mode"] == "reader")
        block.queries = self._queries(i)
        return block

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Random, not zero: registers that start equal get equal gradients and stay equal for ever.
        for name in sorted(self.no_weight_decay()):  # a set's order differs from process to process
            nn.init.trunc_normal_(getattr(self, name), std=0.02)

    @torch.jit.unused
    @property
    def model_args(self) -> dict:
        """Plain values from which `DynamicViT(**model_args)` builds this model again."""
        if self._own_norm:
            raise ValueError("a model with its own norm_layer cannot be described by plain values")
        return {name: arg for name, arg in self._args.items() if name in ALWAYS or arg != DEFAULTS[name]}

    @torch.jit.unused
    @property
    def grid_size(self) -> tuple[int, int]:
        """(gh, gw)."""
        return self.patch_embed.grid_size

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are tokens or positions; timm's optimizers ask for them."""
        return {name for name in ("pos_embed", *TOKENS) if hasattr(self, name)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """The layer of each parameter, as timm's VisionTransformer has it: for rates that decay from layer to layer.

        A token that enters at block k is in the layer whose output it joins: block k - 1, or the stem. Registers are
        one parameter, and enter with the first of them.
        """
        registers = self.reg_pos if isinstance(self.reg_pos, tuple) else (self.reg_pos or 0,)
        entry = dict(zip(TOKENS, (*self._entries, min(registers))))
        late = [(f"^{name}", (block - 1,)) for name, block in entry.items() if block]
        stem = "|".join(["patch_embed", "pos_embed", *(name for name, block in entry.items() if not block)])
        return dict(stem=f"^(?:{stem})", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,)), *late])

    def set_grad_checkpointing(self, enable: bool = True):
        """Keep only the inputs of the blocks for the backward pass and compute the rest again: less memory."""
        self.grad_checkpointing = enable

    def get_classifier(self):
        return self.head if self.dist_pos is None else (self.head, self.head_dist)  # as timm's DeiT

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        """New heads for `num_classes` (0: none), as timm's models have it."""
        if global_pool is not None:
            self.global_pool = self._args["global_pool"] = global_pool
        self.num_classes = self._args["num_classes"] = num_classes
        for name in ("head", "head_dist")[: 1 + (self.dist_pos is not None)]:
            head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
            setattr(self, name, head.to(next(self.patch_embed.parameters())))

    def set_input_size(self, img_size: int | tuple[int, int]):
        """For images of another size, as in timm: the patch positions are resampled (bicubic)."""
        img_size, old_grid = to_2tuple(img_size), self.grid_size
        check_sizes(self._args | {"img_size": img_size})
        self.patch_embed.set_input_size(img_size)
        self._args["img_size"] = tuple(img_size)
        if self.rope is not None:
            self.rope.update_feat_shape(list(self.grid_size))
        elif self.grid_size != old_grid:
            positions = resample_positions(self.pos_embed, self.grid_size, old_grid, num_prefix_tokens=0)
            self.pos_embed = nn.Parameter(positions.detach(), requires_grad=self.pos_embed.requires_grad)

    def token_layout(self, block: int) -> TokenLayout:
        """Layout of the sequence at the input of `block`. Raises ValueError outside 0..depth-1."""
        cls, dist, registers = self._present(check_block(block, self.depth))
        counts = (cls, dist, self.patch_embed.num_patches, registers)
        ends = list(accumulate(counts))
        cls, dist, patches, registers = (slice(end - n, end) if n else None for n, end in zip(counts, ends))
        numbers = tuple(self._registers[operator.index(block)])
        return TokenLayout(cls, patches, registers, ends[-1], dist, None, numbers, self._queries(block) or None)

    def forward_flops(self) -> int:
        """Multiplications and additions in the matrix products of `forward` for one image.

        A formula, since sweeps ask for it often and without weights: torch's FlopCounterMode takes a forward pass.
        """
        args, width, (h, w), flops = self._args, self.embed_dim, self._args["img_size"], 0
        mlp = (3 if args["swiglu"] else 2) * int(width * args["mlp_ratio"])
        for conv in self.patch_embed.modules():
            if isinstance(conv, nn.Conv2d):
                h, w = h // conv.stride[0], w // conv.stride[1]
                flops += 2 * h * w * conv.weight.numel()
        for block in range(self.depth):
            tokens = self.token_layout(block).length
            rows = self._queries(block) or (self._classified() if block == self.depth - 1 else None) or tokens
            front, back = self.blocks[block].attn.front, self.blocks[block].attn.back
            pairs = rows * tokens - max(0, min(rows, tokens - back) - front) * (front + back)
            flops += 2 * width * (tokens * 3 * width + rows * (width + mlp)) + 4 * pairs * width
        return flops + 2 * width * self.num_classes * (1 + (self.dist_pos is not None))

    def _classified(self) -> int | None:
        """How many first tokens of the last block the heads read; None: all."""
        patches = self.patch_embed.num_patches if self.global_pool == "avg" else 0
        return self.num_prefix_tokens + patches if self.global_pool else None

    @torch.jit.unused
    def _needed(self) -> int | None:
        """How many first tokens the last block has to compute; None: all, since somebody watches its modules.

        Hooks on all modules at once do not count: torch's FLOP counter has such, and would count what is not done.
        """
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        watched = any(getattr(module, kind) for module in self.blocks[-1].modules() for kind in hooks)
        return None if watched else self._classified()

    def _queries(self, block: int) -> int:
        """How many first tokens attend at `block`, alone; 0: all do."""
        return self.num_prefix_tokens * (block >= self.depth - self._args["class_attention"])

    def _present(self, block: int) -> tuple[int, int, int]:
        """How many class, distillation and register tokens there are at the input of `block`."""
        return int(block >= self._entries[0]), int(block >= self._entries[1]), len(self._registers[block])

    def _enter(self, x: Tensor, block: int) -> Tensor:
        """The sequence with the tokens added that enter at `block`, without the registers that leave."""
        at_cls, at_dist = self._entries
        if hasattr(self, "dist_token") and block == at_dist:  # after CLS, in front of the patches
            first = int(block > at_cls)
            x = torch.cat([x[:, :first], self.dist_token.expand(x.shape[0], -1, -1), x[:, first:]], dim=1)
        if hasattr(self, "cls_token") and block == at_cls:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if hasattr(self, "register_tokens"):
            before, now = self._registers[block - 1], self._registers[block]
            if before != now:
                first = x.shape[1] - len(before)
                parts = [x[:, :first]]
                for n in now:
                    if n in before:
                        at = first + before.index(n)
                        parts.append(x[:, at : at + 1])
                    else:
                        parts.append(self.register_tokens[:, n : n + 1].expand(x.shape[0], -1, -1))
                x = torch.cat(parts, dim=1)
        return x

    def _rotations(self, block: int) -> Tensor | None:
        """Sines and cosines of the positions, (N, 2d), which leave all tokens but the patches as they are."""
        if self.rope is None:
            return None
        cls, dist, registers = self._present(block)
        sines, cosines = self.rope.get_embed().chunk(2, dim=-1)  # (P, d)
        around = [0, 0, cls + dist, registers]
        return torch.cat([F.pad(sines, around), F.pad(cosines, around, value=1.0)], dim=-1)

    def _features(self, images: Tensor, rows: int | None, outputs: list[Tensor] | None = None) -> Tensor:
        """(B, N, D), normalised, of the last block's first `rows` tokens (None: all); `outputs` gets every block's."""
        x = self.patch_embed(images)  # (B, P, D)
        if hasattr(self, "pos_embed"):
            x = x + self.pos_embed
        x = self.pos_drop(x)
        for i, block in enumerate(self.blocks):
            x = self._enter(x, i)
            rope = self._rotations(i)
            some = rows if i == self.depth - 1 else None
            if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
                x = checkpointed(block, x, rope, some, use_reentrant=False)
            else:
                x = block(x, rope, some)
            if outputs is not None:
                outputs.append(x)
        return self.norm(x)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, N, D): every token after the last block, normalised, in its layout."""
        return self._features(images, None)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) of the last layout -> (B, K) logits; `pre_logits`: (B, D), what the head classifies.

        With a distillation token, training gives the logits of both heads, and evaluation their mean (DeiT).
        """
        pooled = global_pool_nlc(x[:, : self._classified()], self.global_pool, self.num_prefix_tokens)
        pooled = self.fc_norm(pooled)
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if not hasattr(self, "head_dist") or self.global_pool == "":
            return logits
        of_dist = self.head_dist(x[:, self.num_prefix_tokens - 1])
        if self.training and not torch.jit.is_scripting():
            return logits, of_dist
        return (logits + of_dist) / 2

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, K) logits; see `forward_head`, for which alone the last block computes."""
        rows = None if torch.jit.is_scripting() else self._needed()
        return self.forward_head(self._features(images, rows))

    def forward_intermediates(
        self, x: Tensor, indices=None, return_prefix_tokens=False, norm=False, stop_early=False, output_fmt="NCHW",
        intermediates_only=False, output_dict=False, attn_mask=None,
    ):  # fmt: skip
        """As timm's VisionTransformer has it: the patches that leave some blocks, (B, D, gh, gw) or (B, P, D).

        `return_prefix_tokens`: with each, the other tokens that have entered by then. All blocks are always run.
        """
        if attn_mask is not None or output_fmt not in ("NCHW", "NLC"):
            raise ValueError("there is no attention mask here, and the formats are NCHW and NLC")
        outputs: list[Tensor] = []
        last, found, others = self._features(x, None, outputs), [], []
        for i in sorted(set(feature_take_indices(len(outputs), indices)[0])):
            y, patches = self.norm(outputs[i]) if norm else outputs[i], self.token_layout(i).patches
            others.append(torch.cat([y[:, : patches.start], y[:, patches.stop :]], dim=1))
            y = y[:, patches]
            found.append(y.mT.unflatten(2, self.grid_size).contiguous() if output_fmt == "NCHW" else y)
        if output_dict:
            parts = {"image_intermediates": found}
            parts |= {"image_intermediates_prefix": others} if return_prefix_tokens else {}
            return parts if intermediates_only else parts | {"image_features": last}
        found = list(zip(found, others)) if return_prefix_tokens else found
        return found if intermediates_only else (last, found)

    get_intermediate_layers = VisionTransformer.get_intermediate_layers
    prune_intermediate_layers = VisionTransformer.prune_intermediate_layers

    def attention(self, images: Tensor, block: int) -> Tensor:
        """(B, 3, h, w) -> (B, H, N, N): softmaxed, rows attend to columns; see `attention_rows`."""
        return attention_rows(self, images, [block])[block]

    def attention_maps(self, images: Tensor, blocks, patches=()) -> dict[int, AttentionMaps]:
        """(B, 3, h, w) -> {block: AttentionMaps}; see `inspection.attention.attention_maps`."""
        return attention_maps(self, images, blocks, patches)


DEFAULTS = {name: parameter.default for name, parameter in signature(DynamicViT).parameters.items()}
ALWAYS = tuple(DEFAULTS)[: tuple(DEFAULTS).index("global_pool")]  # in `model_args`; of later ones, what is no default
vit_register_dynamic_viz = DynamicViT  # the name that users of the reference implementation know


# Registered sizes: timm.create_model("dynamic_vit_small_patch16_224", cls_pos=6, reg_pos=3) ---------------------


default_cfgs = generate_default_cfgs({
    name: _cfg(
        num_classes=size.get("num_classes", 1000), input_size=(3, size["img_size"], size["img_size"]),
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
    )
    for name, size in SIZES.items()
})  # fmt: skip


def _register(name: str):
    def create(pretrained=False, **kwargs):
        # timm.create_model drops arguments that are None, so "none" is how to ask it for no class token.
        if kwargs.get("cls_pos") == "none":
            kwargs["cls_pos"] = None
        if kwargs.get("dist_pos") is not None:
            heads = {"classifier": ("head", "head_dist")}
            kwargs["pretrained_cfg_overlay"] = heads | (kwargs.get("pretrained_cfg_overlay") or {})
        features = dict(out_indices=3, feature_cls="getter")
        return build_model_with_cfg(DynamicViT, name, pretrained, feature_cfg=features, **(SIZES[name] | kwargs))

    create.__name__ = create.__qualname__ = name
    globals()[name] = register_model(create)  # which also adds the name to __all__


for _name in SIZES:
    _register(_name)
