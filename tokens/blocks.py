"""The parts that a DynamicViT is made of: timm's block and attention, for sequences whose tokens come, go and read.

Letters: B batch, H heads, N tokens, D width, d head width.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Attention, ConvNormAct, PatchEmbed, apply_rot_embed_cat
from timm.models.vision_transformer import Block
from torch import Tensor, _assert
from torch.overrides import handle_torch_function, has_torch_function_variadic


def reader_attention(query, key, value, front: int, back: int, dropout_p: float = 0.0, fused: bool = True) -> Tensor:
    """Attention whose first `front` and last `back` tokens only read: they see all tokens, the others not them.

    Two calls without a mask, so that the other tokens are computed as if there were no readers.

    Args:
        query: (B, H, M, d), of the first M of the N tokens.
        key, value: (B, H, N, d).
        fused: False takes plain products.

    Returns:
        (B, H, M, d).
    """
    if has_torch_function_variadic(query, key, value):  # a recorder is there
        tensors = query, key, value
        return handle_torch_function(reader_attention, tensors, *tensors, front, back, dropout_p, fused)
    last = key.shape[2] - back
    reading = torch.cat([query[:, :, :front], query[:, :, last:]], dim=2)
    read = _attended(reading, key, value, dropout_p, fused)
    seen = [x[:, :, front:last] for x in (query, key, value)]
    others = _attended(seen[0], seen[1], seen[2], dropout_p, fused)
    return torch.cat([read[:, :, :front], others, read[:, :, front:]], dim=2)


def _attended(query, key, value, dropout_p: float, fused: bool) -> Tensor:
    if fused:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)
    attn = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
    return F.dropout(attn, dropout_p) @ value


class ConvStem(PatchEmbed):
    """Patches by 3 x 3 convolutions of stride 2, and a projection of 1 x 1 (Xiao et al., arXiv 2106.14881).

    The convolutions' widths double up to `embed_dim`. It takes the place of timm's `PatchEmbed`.

    Args:
        more: convolutions of stride 1 after each one of stride 2, of the same width.
    """

    def __init__(self, img_size, patch_size, in_chans: int, embed_dim: int, more: int = 0):
        super().__init__(img_size, patch_size, in_chans, embed_dim)
        halvings = self.patch_size[0].bit_length() - 1
        if set(self.patch_size) != {2**halvings} or not halvings:
            raise ValueError(f"a convolutional stem needs square patches of 2, 4, 8, ... pixels, not {patch_size}")
        widths = [in_chans, *(max(1, embed_dim >> i) for i in reversed(range(halvings)))]
        steps = [step for a, b in pairwise(widths) for step in [(a, b, 2), *[(b, b, 1)] * more]]
        layers = [ConvNormAct(a, b, kernel_size=3, stride=s, act_layer=nn.ReLU) for a, b, s in steps]
        del self.proj  # to stand after the convolutions, in the order of the forward pass
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(embed_dim, embed_dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, P, D)."""
        h, w = self.img_size
        _assert(x.shape[2] == h, f"this model takes images of {h} x {w} pixels")
        _assert(x.shape[3] == w, f"this model takes images of {h} x {w} pixels")
        return self.proj(self.stem(x)).flatten(2).transpose(1, 2)


class TokenAttention(Attention):
    """timm's attention, with rotary positions, and on demand for the first tokens alone: all are still attended to."""

    front = back = 0  # how many first and last tokens only read; see `reader_attention`

    def forward(self, x: Tensor, rope: Tensor | None = None, rows: int | None = None) -> Tensor:
        """(B, N, D), sines and cosines (N, 2d), number of first tokens (None: all) -> (B, rows, D)."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q = apply_rot_embed_cat(q, rope, half=True).type_as(v)
            k = apply_rot_embed_cat(k, rope, half=True).type_as(v)
        q, dropout = q[:, :, :rows], self.attn_drop.p if self.training else 0.0  # (B, H, rows, d)
        if self.front + self.back > 0:
            x = reader_attention(q, k, v, self.front, self.back, dropout, self.fused_attn)
        elif self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class TokenBlock(Block):
    """timm's block, with rotary positions, and on demand for the first tokens alone."""

    queries = 0  # CaiT's class attention: only so many first tokens attend and are updated; 0: all

    def forward(self, x: Tensor, rope: Tensor | None = None, rows: int | None = None) -> Tensor:
        """Shapes as of `TokenAttention`."""
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles the rest of a condition
            if rows is not None and isinstance(x, torch.fx.Proxy):
                # In a graph, the first softmax and the last value are of all tokens, and the logits those of `forward`.
                every, some = self._output(x, rope, None), self._output(x, rope, rows)
                every.contiguous()
                return some
        return self._output(x, rope, rows)

    def _output(self, x: Tensor, rope: Tensor | None, rows: int | None) -> Tensor:
        first = self.queries if self.queries > 0 else rows
        y = x[:, :first] + self.drop_path1(self.ls1(self.attn(self.norm1(x), rope, first)))
        y = y + self.drop_path2(self.ls2(self.mlp(self.norm2(y))))
        return torch.cat([y, x[:, self.queries :]], dim=1) if self.queries > 0 and rows is None else y


STEMS = {"patch": PatchEmbed, "conv": ConvStem, "deep": partial(ConvStem, more=2)}
