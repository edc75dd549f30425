"""A Vision Transformer whose class token and register tokens enter at a block of your choice.

    model = DynamicViT(img_size=224, patch_size=16, embed_dim=384, num_heads=6, cls_pos=6, reg_pos=3)
    logits = model(images)                              # (B, 3, h, w) -> (B, K)
    maps = model.attention_maps(images, blocks=[6, 11])  # what CLS and the registers attend to
    maps[11].cls                                        # (B, H, gh, gw)

Letters: B batch, N tokens now in the sequence, P patches, R registers, D width, H heads, d head width,
K classes; h, w pixels; gh, gw the grid of patches. Blocks are counted from 0.

Sources: ViT (arXiv 2010.11929), DeiT and its distillation token (2012.12877), CaiT, a class token that enters late
(2103.17239), "Vision Transformers Need Registers" (2309.16588). Blocks and layers are timm's.
"""

import math
import operator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import PatchEmbed, to_2tuple
from timm.models import register_model
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

# register_model appends the registered sizes (and would make a list of them alone).
__all__ = [
    "SIZES", "AttentionMaps", "DynamicViT", "TokenLayout", "set_fused_attention", "vit_register_dynamic_viz",
]  # fmt: skip

DEFAULT_NORM = partial(nn.LayerNorm, eps=1e-6)
TOKENS = ("cls_token", "dist_token", "register_tokens")
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


@dataclass(frozen=True)
class TokenLayout:
    """Where each kind of token stands in a sequence `[CLS | distillation | patches | registers]`; None if absent."""

    cls: slice | None
    patches: slice
    registers: slice | None
    length: int
    dist: slice | None = None


@dataclass
class AttentionMaps:
    """Attention from CLS, the distillation token, each register and chosen patches to every patch, at one block.

    Each row was softmaxed over the whole sequence, so what it lacks to a sum of 1 went to those tokens.
    A token that has not entered yet is None, and so are the patches if none were chosen.
    """

    cls: Tensor | None  # (B, H, gh, gw)
    registers: Tensor | None  # (B, R, H, gh, gw)
    dist: Tensor | None = None  # (B, H, gh, gw)
    patches: Tensor | None = None  # (B, number of chosen patches, H, gh, gw)


class DynamicViT(nn.Module):
    """Vision Transformer with a chosen entry block for the class, the distillation and the register tokens.

    Args:
        img_size: pixels, one number or (h, w); each must be a multiple of the patch size.
        patch_size: pixels, one number or (h, w).
        num_classes: K; 0 leaves out the head, and the forward pass returns the classified token.
        num_register_tokens: R; 0 means that there is no such parameter, and `reg_pos` is ignored.
        cls_pos: CLS is present at the input of this block, 0..depth-1; None: no class token, the mean of the
            patch tokens is classified.
        reg_pos: the same for the registers.
        dist_pos: the same for DeiT's distillation token, which has a head of its own; None: there is none.
        drop_rate: dropout after the position embedding, after the attention's projection and in the MLP.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth, growing linearly from 0 to this rate at the last block.
        init_values: initial LayerScale (CaiT, arXiv 2103.17239); None: no LayerScale.
        norm_layer: a model with another one than the default cannot be described by `model_args`.

    Raises:
        ValueError: a position outside the blocks, a width that the heads do not divide, an image that the
            patches do not tile.
    """

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
        reg_pos: int = 0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        norm_layer=DEFAULT_NORM,
        dist_pos: int | None = None,
    ):
        super().__init__()
        img_size, patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        if embed_dim % num_heads:
            raise ValueError(f"width {embed_dim} is not divisible by {num_heads} heads")
        if img_size[0] % patch_size[0] or img_size[1] % patch_size[1] or 0 in img_size:
            raise ValueError(
                f"an image of {img_size[0]} x {img_size[1]} pixels is not divisible into patches of "
                f"{patch_size[0]} x {patch_size[1]}"
            )
        if int(embed_dim * mlp_ratio) < 1:
            raise ValueError(f"an MLP ratio of {mlp_ratio} leaves no hidden unit")
        if num_register_tokens < 0:
            raise ValueError(f"the number of registers must be at least 0, not {num_register_tokens}")
        self.depth, self.embed_dim, self.num_classes = depth, embed_dim, num_classes
        self.num_register_tokens = num_register_tokens
        self.cls_pos = None if cls_pos is None else self._check_block(cls_pos, "cls_pos")
        self.reg_pos = self._check_block(reg_pos, "reg_pos") if num_register_tokens else None
        self.dist_pos = None if dist_pos is None else self._check_block(dist_pos, "dist_pos")
        self._norm_layer = norm_layer
        self._model_args = dict(
            img_size=tuple(img_size), patch_size=tuple(patch_size), in_chans=in_chans, num_classes=num_classes,
            embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
            num_register_tokens=num_register_tokens, cls_pos=self.cls_pos, reg_pos=self.reg_pos or 0,
            drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate, init_values=init_values,
            dist_pos=self.dist_pos,
        )  # fmt: skip

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, embed_dim))
        if self.cls_pos is not None:
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        if self.dist_pos is not None:
            self.dist_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, mlp_ratio, qkv_bias, proj_drop=drop_rate, attn_drop=attn_drop_rate,
                init_values=init_values, drop_path=drop_path_rate * i / max(depth - 1, 1), norm_layer=norm_layer,
            )
            for i in range(depth)
        )  # fmt: skip
        self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        if self.dist_pos is not None:
            self.head_dist = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._grad_checkpointing = False
        self._init_weights()

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Random, not zero: registers that start equal get equal gradients and stay equal for ever.
        for name in sorted(self.no_weight_decay()):  # a set's order differs from process to process
            nn.init.trunc_normal_(getattr(self, name), std=0.02)

    @property
    def model_args(self) -> dict:
        """Plain values from which `DynamicViT(**model_args)` builds this model again."""
        if self._norm_layer is not DEFAULT_NORM:
            raise ValueError("a model with its own norm_layer cannot be described by plain values")
        return dict(self._model_args)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(gh, gw)."""
        return self.patch_embed.grid_size

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are tokens or positions; timm's optimizers ask for them."""
        return {name for name in ("pos_embed", *TOKENS) if hasattr(self, name)}

    def set_grad_checkpointing(self, enable: bool = True):
        """Keep only the inputs of the blocks for the backward pass and compute the rest again: less memory."""
        self._grad_checkpointing = enable

    def _check_block(self, block, what="block") -> int:
        block = operator.index(block)
        if not 0 <= block < self.depth:
            also = ", or None for no such token" if what in ("cls_pos", "dist_pos") else ""
            raise ValueError(f"{what} {block} is outside the model: its blocks are 0..{self.depth - 1}{also}")
        return block

    def token_layout(self, block: int) -> TokenLayout:
        """Layout of the sequence at the input of `block`. Raises ValueError outside 0..depth-1."""
        block = self._check_block(block)
        counts = (
            self.cls_pos is not None and block >= self.cls_pos,
            self.dist_pos is not None and block >= self.dist_pos,
            self.patch_embed.num_patches,
            self.num_register_tokens if self.reg_pos is not None and block >= self.reg_pos else 0,
        )
        ends = list(accumulate(counts))
        cls, dist, patches, registers = (slice(end - n, end) if n else None for n, end in zip(counts, ends))
        return TokenLayout(cls, patches, registers, ends[-1], dist)

    def forward_flops(self) -> int:
        """Multiplications and additions in the matrix products of `forward` for one image.

        A block of N tokens takes 2 N D^2 (4 + 2 r) for its products with weights (r: the MLP's ratio) and 4 N^2 D for
        its attention; the last one has queries, projection and MLP only for the tokens that are classified.
        A formula, since sweeps ask for it often and without weights: torch's FlopCounterMode takes a forward pass.
        """
        args, width, grid = self._model_args, self.embed_dim, self.patch_embed.num_patches
        mlp = 2 * int(width * args["mlp_ratio"])
        flops = 2 * grid * args["in_chans"] * math.prod(args["patch_size"]) * width  # patches
        for block in range(self.depth):
            layout = self.token_layout(block)
            tokens = rows = layout.length
            if block == self.depth - 1:
                rows = self._classified(layout).stop
            flops += 2 * width * (tokens * 2 * width + rows * (2 * width + mlp)) + 4 * rows * tokens * width
        return flops + 2 * width * self.num_classes * (1 + (self.dist_pos is not None))

    def _enter(self, x: Tensor, block: int) -> Tensor:
        """The sequence with the tokens added that enter at `block`."""
        tokens = [x]
        if block == self.dist_pos:  # behind CLS, in front of the patches
            first = int(self.cls_pos is not None and block > self.cls_pos)
            tokens = [x[:, :first], self.dist_token.expand(len(x), -1, -1), x[:, first:]]
        if block == self.cls_pos:
            tokens.insert(0, self.cls_token.expand(len(x), -1, -1))
        if block == self.reg_pos:
            tokens.append(self.register_tokens.expand(len(x), -1, -1))
        return torch.cat(tokens, dim=1) if len(tokens) > 1 else x

    def _block(self, block: Block, x: Tensor) -> Tensor:
        if self._grad_checkpointing and torch.is_grad_enabled():
            return checkpointed(block, x, use_reentrant=False)
        return block(x)

    def _input_of(self, images: Tensor, block: int, visit=None) -> Tensor:
        """Input of `block`, (B, N, D). `visit(i, x)` is shown the input of every block up to it."""
        x = self.pos_drop(self.patch_embed(images) + self.pos_embed)  # (B, P, D)
        for i in range(block + 1):
            if i:
                x = self._block(self.blocks[i - 1], x)
            x = self._enter(x, i)
            if visit is not None:
                visit(i, x)
        return x

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, N, D): every token after the last block, normalised, in its layout."""
        return self.norm(self.blocks[-1](self._input_of(images, self.depth - 1)))

    @staticmethod
    def _classified(layout: TokenLayout) -> slice:
        """What the heads read: CLS and the distillation token, or everything up to the last patch without CLS."""
        last = layout.patches if layout.cls is None else layout.dist or layout.cls
        return slice(0, last.stop)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, 3, h, w) -> (B, K) logits.

        The last block computes only what is classified: CLS, or the patches where there is no CLS, and the
        distillation token. With that, training gives the logits of both heads, and evaluation their mean (DeiT).
        """
        layout = self.token_layout(self.depth - 1)
        x = self._input_of(images, self.depth - 1)  # (B, N, D)
        return self._classify(_block_rows(self.blocks[-1], x, self._classified(layout)), layout)

    def _classify(self, x: Tensor, layout: TokenLayout) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(x)
        logits = self.head(x[:, layout.cls or layout.patches].mean(dim=1))  # of one token if that is CLS
        if layout.dist is None:
            return logits
        of_dist = self.head_dist(x[:, layout.dist].mean(dim=1))
        return (logits, of_dist) if self.training else (logits + of_dist) / 2

    @torch.no_grad()
    def attention(self, images: Tensor, block: int) -> Tensor:
        """(B, 3, h, w) -> (B, H, N, N): the softmaxed attention of `block`, rows attend to columns, without dropout.

        Raises ValueError outside 0..depth-1.
        """
        block = self._check_block(block)
        with _eval_mode(self):
            x = self._input_of(images, block)
            return _attention_rows(self.blocks[block], x, [slice(None)])

    @torch.no_grad()
    def projections(self, images: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, h, w) -> queries, keys and values of `block`, each (B, H, N, d), in its token layout.

        Raises ValueError outside 0..depth-1.
        """
        block = self._check_block(block)
        with _eval_mode(self):
            x = self._input_of(images, block)
            return tuple(_heads(self.blocks[block].attn, self.blocks[block].norm1(x), 0, 3))

    @torch.no_grad()
    def attention_maps(self, images: Tensor, blocks, patches=()) -> dict[int, AttentionMaps]:
        """(B, 3, h, w) -> {block: AttentionMaps}, in one forward pass and without any (N, N) matrix.

        Args:
            patches: (x, y) of patches whose maps are wanted too, column and row in the grid, counted from 0.

        Raises ValueError for a block outside 0..depth-1, and for a patch outside the grid.
        """
        wanted = {self._check_block(block) for block in blocks}
        maps = {}

        def visit(i, x):
            if i in wanted:
                layout = self.token_layout(i)
                maps[i] = self._cut_maps(
                    layout, patches, lambda rows: _attention_rows(self.blocks[i], x, rows)[..., layout.patches]
                )

        if wanted:
            with _eval_mode(self):
                self._input_of(images, max(wanted), visit)
        return maps

    def _cut_maps(self, layout: TokenLayout, patches, of_rows) -> AttentionMaps:
        """`of_rows`: places of tokens in the sequence -> (B, H, number of those tokens, P)."""
        tokens = {"cls": layout.cls, "dist": layout.dist, "registers": layout.registers}
        rows = {name: [part] for name, part in tokens.items() if part is not None}
        gh, gw = self.grid_size
        for x, y in patches:
            if not (0 <= x < gw and 0 <= y < gh):
                raise ValueError(f"patch {x},{y} is outside the grid: x is 0..{gw - 1}, y is 0..{gh - 1}")
            at = layout.patches.start + y * gw + x
            rows.setdefault("patches", []).append(slice(at, at + 1))
        if not rows:
            return AttentionMaps(None, None)
        attn = of_rows([part for parts in rows.values() for part in parts])
        attn = attn.unflatten(-1, self.grid_size).transpose(1, 2)  # (B, rows, H, gh, gw)
        counts = [sum(part.stop - part.start for part in parts) for parts in rows.values()]
        maps = dict(zip(rows, attn.split(counts, dim=1)))
        one = {name: maps[name][:, 0] if name in maps else None for name in ("cls", "dist")}
        return AttentionMaps(registers=maps.get("registers"), patches=maps.get("patches"), **one)

    @torch.no_grad()
    def attention_rollout(self, images: Tensor, blocks, patches=()) -> dict[int, AttentionMaps]:
        """(B, 3, h, w) -> {block: AttentionMaps} of one "head": from which patches of the image a token's content has
        come by the end of that block, as far as attention tells.

        Attention rollout (Abnar & Zuidema, arXiv 2005.00928): in each block the mean over heads, averaged with the
        identity for the residual connection; the product over the blocks. A token brings nothing of the patches
        when it enters, so a map adds up to less than 1 by what is left of the tokens themselves.

        Args and errors are those of `attention_maps`.
        """
        wanted = {self._check_block(block) for block in blocks}
        if not wanted:
            return {}
        maps, shares = {}, None  # shares: (B, N, P)

        def attention(i, attn):
            nonlocal shares
            layout = self.token_layout(i)
            entered = attn.new_zeros(len(attn), layout.length, self.patch_embed.num_patches)
            if i == 0:
                entered[:, layout.patches] = torch.eye(self.patch_embed.num_patches, device=attn.device)
            else:
                before = self.token_layout(i - 1)
                for part in ("cls", "dist", "patches", "registers"):
                    if getattr(before, part) is not None:
                        entered[:, getattr(layout, part)] = shares[:, getattr(before, part)]
            shares = (attn.mean(dim=1) @ entered + entered) / 2
            if i in wanted:
                maps[i] = self._cut_maps(
                    layout, patches, lambda rows: torch.cat([shares[:, None, part] for part in rows], dim=2)
                )

        self.trace(images, attention=attention, last=max(wanted))
        return maps

    @torch.no_grad()
    def trace(self, images: Tensor, *, tokens=None, attention=None, output=None, last: int | None = None):
        """The forward pass in evaluation mode with all of its attention laid open, to be watched or changed.

        Args:
            tokens: called with (i, x): the input of block i, (B, N, D).
            attention: called with (i, attn): its attention, (B, H, N, N), rows attend to columns.
            output: called with (i, x): its output, (B, N, D).
            last: the block to stop behind; by default, all are run.
                What a function returns is used in place of what it was given, unless that is None.

        Returns:
            (B, K) logits, or None if `last` is given.
        """
        last_block = self.depth - 1 if last is None else self._check_block(last)

        def shown(function, i, value):
            new = None if function is None else function(i, value)
            return value if new is None else new

        with _eval_mode(self):
            x = self.patch_embed(images) + self.pos_embed  # (B, P, D)
            for i in range(last_block + 1):
                x = shown(tokens, i, self._enter(x, i))
                x = _block_rows(self.blocks[i], x, slice(None), lambda attn, i=i: shown(attention, i, attn))
                x = shown(output, i, x)
            return self._classify(x, self.token_layout(last_block)) if last is None else None


vit_register_dynamic_viz = DynamicViT  # the name that users of the reference implementation know


def plain_attention_on_cpu(model: nn.Module, device, amp_dtype):
    """Plain products where torch's fused kernel is several times slower: in bfloat16 on CPUs."""
    if device.type == "cpu" and amp_dtype is not None:
        set_fused_attention(model, False)


def set_fused_attention(model: nn.Module, on: bool):
    """Fused attention (the default) or plain products, here and in timm's models; the same values to rounding."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = on


def _heads(attn: nn.Module, tokens: Tensor, first: int, count: int) -> Tensor:
    """`count` of (query, key, value), from number `first` on: normalised tokens (B, N, D) -> (count, B, H, N, d)."""
    width = attn.num_heads * attn.head_dim
    part = slice(first * width, (first + count) * width)
    bias = None if attn.qkv.bias is None else attn.qkv.bias[part]
    y = F.linear(tokens, attn.qkv.weight[part], bias)
    return y.unflatten(2, (count, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)


def _attention_rows(block: Block, x: Tensor, rows: list[slice]) -> Tensor:
    """Attention of some tokens to all: block input (B, N, D) -> (B, H, number of those tokens, N)."""
    attn, y = block.attn, block.norm1(x)
    queries = _heads(attn, torch.cat([y[:, r] for r in rows], dim=1), 0, 1)[0]
    keys = _heads(attn, y, 1, 1)[0]
    return _softmax_attention(attn, queries, keys)


def _softmax_attention(attn: nn.Module, queries: Tensor, keys: Tensor) -> Tensor:
    return (queries * attn.scale @ keys.transpose(-2, -1)).softmax(dim=-1)


def _block_rows(block: Block, x: Tensor, rows: slice, change=None) -> Tensor:
    """`block(x)[:, rows]` with the same logits and gradients, but queries, projection and MLP for those rows alone.

    `change`: attention (B, H, rows, N) -> what is used in its place.
    """
    attn, y = block.attn, block.norm1(x)
    query = _heads(attn, y[:, rows], 0, 1)[0]
    key, value = _heads(attn, y, 1, 2)
    if change is not None:
        y = change(_softmax_attention(attn, query, key)) @ value
    elif attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)  # (B, H, rows, d)
    else:
        y = attn.attn_drop(_softmax_attention(attn, query, key)) @ value
    y = attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))
    x = x[:, rows] + block.drop_path1(block.ls1(y))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


@contextmanager
def _eval_mode(model: nn.Module):
    """Dropout and stochastic depth off; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# Registered sizes: timm.create_model("dynamic_vit_small_patch16_224", cls_pos=6, reg_pos=3) ---------------------


def _create(name, pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    if pretrained:
        raise ValueError(f"there are no pretrained weights for {name}; see load_weights")
    # timm.create_model drops arguments that are None, so "none" is how to ask it for no class token.
    if kwargs.get("cls_pos") == "none":
        kwargs["cls_pos"] = None
    return DynamicViT(**(SIZES[name] | kwargs))


@register_model
def dynamic_vit_tiny_patch16_224(**kwargs):
    """DeiT-Ti's size: width 192, 12 blocks, 3 heads."""
    return _create("dynamic_vit_tiny_patch16_224", **kwargs)


@register_model
def dynamic_vit_small_patch16_224(**kwargs):
    """DeiT-S's size: width 384, 12 blocks, 6 heads."""
    return _create("dynamic_vit_small_patch16_224", **kwargs)


@register_model
def dynamic_vit_base_patch16_224(**kwargs):
    """DeiT-B's size: width 768, 12 blocks, 12 heads."""
    return _create("dynamic_vit_base_patch16_224", **kwargs)


@register_model
def dynamic_vit_cifar(**kwargs):
    """For images of 32 pixels: patch 4, width 192, 9 blocks, 12 heads, MLP ratio 2."""
    return _create("dynamic_vit_cifar", **kwargs)
