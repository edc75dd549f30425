"""What any Vision Transformer attends to: the one way to attention in this project.

    rows = attention_rows(model, images, blocks=[3, 11], rows=[0])   # {3: (B, H, 1, N), 11: ...}: CLS of timm's ViTs
    maps = attention_maps(model, images, blocks=[11])                # {11: AttentionMaps}: cut up by the token layout
    trace(model, images, attention=lambda block, attn: print(block, attn.shape))

A recorder is shown every call of `F.scaled_dot_product_attention` during the model's own forward pass, and computes
the wanted rows of the softmax from exactly the queries, keys, mask and scale of that call. So it sees rotary
positions, normalised queries, adapters and hooks without knowing of them, in all models whose blocks call this
function: a DynamicViT, and timm's VisionTransformer, Eva (DINOv3, EVA-02, PE), Beit, and Cait's class attention.

Letters: B batch, H heads, M queries, N tokens, P patches, R registers, D width, d head width; gh, gw the grid.
"""

import copy
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokens.blocks import reader_attention
from tokens.layout import check_block


@dataclass
class AttentionMaps:
    """Attention from CLS, the distillation token, each register, chosen patches and a pooling query to every patch, at
    one block.

    Each row was softmaxed over the whole sequence, so what it lacks to a sum of 1 went to those tokens.
    A token that is absent is None, and so are the patches if none were chosen; in class attention, where CLS alone
    attends, so are registers and patches.
    """

    cls: Tensor | None = None  # (B, H, gh, gw)
    registers: Tensor | None = None  # (B, number of registers that are present, H, gh, gw)
    dist: Tensor | None = None  # (B, H, gh, gw)
    patches: Tensor | None = None  # (B, number of chosen patches, H, gh, gw)
    pool: Tensor | None = None  # (B, H, gh, gw)
    numbers: tuple[int, ...] = ()  # of `registers`, in their order


class AttentionCall(NamedTuple):
    """The arguments of a call of `F.scaled_dot_product_attention`."""

    query: Tensor  # (B, H, M, d)
    key: Tensor  # (B, H, N, d)
    value: Tensor  # (B, H, N, d)
    attn_mask: Tensor | None = None  # (..., M, N): True where a query sees a key, or a number to add
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def weights(self, rows=None) -> Tensor:
        """(B, H, number of rows, N): the softmaxed attention of some queries (slices or numbers; None: of all)."""
        query, key, mask = self.query, self._of_heads(self.key), self.attn_mask
        if self.is_causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if rows is not None:
            query = _take(query, rows)
            mask = mask if mask is None or mask.shape[-2] == 1 else _take(mask, rows)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = query * scale @ key.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)

    def mixed(self, attention: Tensor) -> Tensor:
        """(B, H, M, N) -> (B, H, M, d): the result of the call with this attention."""
        return attention @ self._of_heads(self.value)

    def _of_heads(self, x: Tensor) -> Tensor:
        """Keys or values of every head, which groups of heads may share."""
        return x.repeat_interleave(self.query.shape[1] // x.shape[1], dim=1) if self.enable_gqa else x


def _one_call(query, key, value, front, back, dropout_p, fused) -> AttentionCall:
    """The arguments of `reader_attention` as those of one attention with a mask."""
    places = torch.arange(key.shape[2], device=key.device)
    reads = (places < front) | (places >= key.shape[2] - back)
    return AttentionCall(query, key, value, reads[: query.shape[2], None] | ~reads, dropout_p)


def _take(x: Tensor, rows) -> Tensor:
    return torch.cat([x[..., row if isinstance(row, slice) else [row], :] for row in rows], dim=-2)


class Recorder(TorchFunctionMode):
    """Shows `see(block, call)` each attention of `block`; a tensor that it returns takes the place of the result."""

    def __init__(self, see):
        super().__init__()
        self.see, self.block = see, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        call = {F.scaled_dot_product_attention: AttentionCall, reader_attention: _one_call}.get(function)
        if call is not None and self.block is not None:
            result = self.see(self.block, call(*args, **(kwargs or {})))
            if result is not None:
                return result
        return function(*args, **(kwargs or {}))


class _Enough(Exception):
    """Ends a forward pass whose rest nobody asked for."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules whose attention is seen, in order: blocks, CaiT's class-attention blocks, attention pooling."""
    pool = getattr(model, "attn_pool", None)
    return [*model.blocks, *getattr(model, "blocks_token_only", ()), *([] if pool is None else [pool])]


def set_fused_attention(model: nn.Module, on: bool):
    """Fused attention (the default) or plain products, here and in timm's models; the same values to rounding."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = on


@contextmanager
def as_evaluated(model: nn.Module):
    """Dropout and stochastic depth off, attention through the one function; afterwards every module is as it was."""
    before = [(module, module.training, getattr(module, "fused_attn", None)) for module in model.modules()]
    model.eval()
    set_fused_attention(model, True)
    try:
        yield
    finally:
        for module, training, fused in before:
            module.training = training
            if fused is not None:
                module.fused_attn = fused


def watch_calls(
    model: nn.Module, images: Tensor, see=None, *, tokens=None, output=None, last: int | None = None, needs=None
):  # fmt: skip
    """The model's forward pass in evaluation mode; gradients flow where torch has them enabled.

    `see(i, call)` is shown the `AttentionCall` of block i; a tensor (B, H, M, d) that it returns takes the place of
    the result. `tokens`, `output`, `last` and what is returned are those of `trace`. `needs`: the blocks that must
    have such a call (None: all that are run), else `unseen` is raised: a result would silently lack them.
    """
    shown = set()

    def seen(i, call):
        shown.add(i)
        result = None if see is None else see(i, call)
        if i == last and output is None:
            raise _Enough
        return result

    recorder = Recorder(seen)

    def watch(i, block, hooks):
        def before(_, args):
            recorder.block = i
            new = None if tokens is None else tokens(i, args[0])
            return None if new is None else (new, *args[1:])

        def after(_, args, x):
            recorder.block = None
            if see is not None and i not in shown and (needs is None or i in needs):
                raise unseen(model, i)
            new = None if output is None else output(i, x)
            if i == last:
                raise _Enough
            return new

        hooks.enter_context(block.register_forward_pre_hook(before))
        hooks.enter_context(block.register_forward_hook(after))

    with suppress(_Enough), ExitStack() as hooks:
        for i, block in enumerate(blocks_of(model)):
            watch(i, block, hooks)
        with as_evaluated(model), recorder:
            return model(images)


def unseen(model: nn.Module, block: int) -> ValueError:
    kind = type(blocks_of(model)[block]).__name__
    return ValueError(
        f"the attention of block {block} ({kind}) cannot be seen: it does not call F.scaled_dot_product_attention"
    )


@torch.no_grad()
def attention_rows(model: nn.Module, images: Tensor, blocks, rows=None) -> dict[int, Tensor]:
    """(B, 3, h, w) -> {block: (B, H, number of rows, N)}: softmaxed attention, in one forward pass, without dropout.

    Args:
        model: a DynamicViT, or a model of timm's.
        rows: slices or numbers of the tokens that attend; None: all. Only these rows are ever computed.

    Raises:
        ValueError: a block outside the model, or one whose attention does not go through
            `F.scaled_dot_product_attention`.
    """
    return _recorded(model, images, blocks, lambda i, call: call.weights(rows))


def projections(model: nn.Module, images: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, h, w) -> queries, keys and values of `block`, each (B, H, N, d), as its attention takes them.

    Raises ValueError as `attention_rows` does.
    """
    return _recorded(model, images, [block], lambda i, call: call[:3])[block]


@torch.no_grad()
def _recorded(model, images, blocks, keep) -> dict:
    """{block: keep(block, its AttentionCall)} of one forward pass, which ends after the last of `blocks`."""
    wanted = {check_block(block, len(blocks_of(model))) for block in blocks}
    found = {}

    def see(i, call):
        if i in wanted:
            found[i] = keep(i, call)

    if wanted:
        watch_calls(model, images, see, last=max(wanted), needs=wanted)
    return found


@torch.no_grad()
def attention_shapes(model: nn.Module, images: Tensor) -> dict[int, tuple[torch.Size, torch.Size]]:
    """{block: shapes of its queries (B, H, M, d) and keys (B, H, N, d)} of the blocks whose attention can be seen.

    `images`: (B, 3, h, w) on any device; the forward pass is one on the meta device, which computes shapes alone.
    """
    shapes: dict = {}

    def see(i, call):
        shapes[i] = call.query.shape, call.key.shape

    weights = {id(x): x.to("meta") for x in chain(model.parameters(), model.buffers())}
    try:
        watch_calls(copy.deepcopy(model, weights), images.to("meta"), see, needs=())
    except (RuntimeError, NotImplementedError):  # a model that reads values, or has tensors that are no buffers
        shapes.clear()
        watch_calls(model, images, see, needs=())
    return shapes


def can_be_seen(model) -> bool:
    """Whether the attention of every block of a DynamicViT can be; a sweep leaves out what needs it, else."""
    weights = next(model.parameters())
    images = weights.new_zeros(1, model.model_args["in_chans"], *model.model_args["img_size"])
    return len(attention_shapes(model, images)) == len(model.blocks)


def attention_maps(model: nn.Module, images: Tensor, blocks, patches=()) -> dict[int, AttentionMaps]:
    """(B, 3, h, w) -> {block: AttentionMaps}, in one forward pass and without any (N, N) matrix.

    Args:
        model: one with `token_layout(block)` and `grid_size`: a DynamicViT or a ForeignViT.
        patches: (x, y) of patches whose maps are wanted too, column and row in the grid, counted from 0.

    Raises ValueError for a block outside the model, and for a patch outside the grid.
    """

    return _recorded(model, images, blocks, partial(maps_of, model, patches))


def maps_of(model: nn.Module, patches, block: int, call: AttentionCall) -> AttentionMaps:
    """The maps of one call; see `attention_maps`."""
    patch_columns = model.token_layout(block).patches
    return _cut_maps(model, patches, block, lambda rows: call.weights(rows)[..., patch_columns])


def _cut_maps(model, patches, block, of_rows) -> AttentionMaps:
    """`of_rows`: places of tokens in the sequence -> (B, H, number of those tokens, P)."""
    layout, (gh, gw) = model.token_layout(block), model.grid_size
    every = layout.queries is None
    parts = {name: getattr(layout, name) for name in ("cls", "dist", "pool", *["registers"] * every)}
    rows = {name: [part] for name, part in parts.items() if part is not None}
    for x, y in patches if layout.pool is None and every else ():
        if not (0 <= x < gw and 0 <= y < gh):
            raise ValueError(f"patch {x},{y} is outside the grid: x is 0..{gw - 1}, y is 0..{gh - 1}")
        at = layout.patches.start + y * gw + x
        rows.setdefault("patches", []).append(slice(at, at + 1))
    if not rows:
        return AttentionMaps()
    attn = of_rows([part for parts in rows.values() for part in parts])
    attn = attn.unflatten(-1, (gh, gw)).transpose(1, 2)  # (B, rows, H, gh, gw)
    counts = [sum(part.stop - part.start for part in parts) for parts in rows.values()]
    maps = dict(zip(rows, attn.split(counts, dim=1)))
    for name in maps.keys() & {"cls", "dist", "pool"}:  # of one token
        maps[name] = maps[name][:, 0]
    return AttentionMaps(**maps, numbers=layout.numbers if "registers" in maps else ())


def enter(shares: Tensor | None, before, layout, like: Tensor) -> Tensor:
    """(B, N, P): the patches' shares in each token at a block with `layout`, from those of the block `before` it.

    A token that enters has none, one that leaves is gone; in the first block (`before` is None) each patch has itself.
    `like`: (B, ...).
    """
    entered = like.new_zeros(len(like), layout.length, layout.patches.stop - layout.patches.start)
    if before is None:
        entered[:, layout.patches] = torch.eye(entered.shape[-1], device=like.device)
        return entered
    for part in ("cls", "dist", "patches"):
        if getattr(before, part) is not None:
            entered[:, getattr(layout, part)] = shares[:, getattr(before, part)]
    for n in {*before.numbers} & {*layout.numbers}:
        old, new = (at.registers.start + at.numbers.index(n) for at in (before, layout))
        entered[:, new] = shares[:, old]
    return entered


def updated(shares: Tensor, flow: Tensor, keep=1.0) -> Tensor:
    """(B, N, P), attention (B, M, N) of the first M tokens -> (B, N, P): `keep` of their own shares, and what flows."""
    own, rest = shares.split([flow.shape[1], shares.shape[1] - flow.shape[1]], dim=1)
    return torch.cat([keep * own + flow @ shares, rest], dim=1)


@torch.no_grad()
def attention_rollout(model: nn.Module, images: Tensor, blocks, patches=()) -> dict[int, AttentionMaps]:
    """(B, 3, h, w) -> {block: AttentionMaps} of one "head": from which patches of the image a token's content has
    come by the end of that block, as far as attention tells.

    Attention rollout (Abnar & Zuidema, arXiv 2005.00928): in each block the mean over heads, averaged with the
    identity for the residual connection; the product over the blocks. A token brings nothing of the patches
    when it enters, so a map adds up to less than 1 by what is left of the tokens themselves.

    Args and errors are those of `attention_maps`.
    """
    wanted = {check_block(block, len(blocks_of(model))) for block in blocks}
    maps, roll = {}, rolled_shares(model)

    def attention(i, attn):
        shares = roll(i, attn)
        if i in wanted:
            maps[i] = rollout_maps(model, patches, i, shares)

    if wanted:
        trace(model, images, attention=attention, last=max(wanted))
    return maps


def rollout_maps(model: nn.Module, patches, block: int, shares: Tensor) -> AttentionMaps:
    """The maps in what `rolled_shares` returns."""
    return _cut_maps(model, patches, block, partial(_take, shares[:, None]))


def rolled_shares(model: nn.Module):
    """A function to be called with (block, attention (B, H, M, N)) of one block after the other, from the first one on:
    (B, N, P), the patches' shares in every token (after a pooling: in its queries); see `attention_rollout`."""
    shares, before = None, None  # those of the block before, and its layout

    def roll(i, attn):
        nonlocal shares, before
        layout = model.token_layout(i)
        if layout.pool is not None:
            shares = attn.mean(dim=1) @ shares[:, -layout.length :]
        else:
            shares = enter(shares, before, layout, attn)
            shares, before = updated(shares, attn.mean(dim=1) / 2, keep=0.5), layout
        return shares

    return roll


@torch.no_grad()
def trace(model: nn.Module, images: Tensor, *, tokens=None, attention=None, output=None, last: int | None = None):
    """The model's forward pass in evaluation mode, to be watched or changed.

    Args:
        tokens: called with (i, x): the input of block i, (B, N, D).
        attention: called with (i, attn): its attention, (B, H, M, N), rows attend to columns.
        output: called with (i, x): its output, (B, N, D).
        last: the block to stop after; by default, the whole model is run.
            What a function returns is used in place of what it was given, unless that is None.

    Returns:
        (B, K) logits, or None if `last` is given.

    Raises ValueError where `attention` is given and that of a block cannot be seen (see the module).
    """

    def see(i, call):
        new = attention(i, call.weights())
        return None if new is None else call.mixed(new)

    if last is not None:
        check_block(last, len(blocks_of(model)))
    return watch_calls(model, images, None if attention is None else see, tokens=tokens, output=output, last=last)
