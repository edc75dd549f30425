"""Which tokens stand where in a sequence, block by block: `[CLS | distillation | patches | registers]`; and which
arguments of a DynamicViT go together."""

import operator
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """Where each kind of token stands in a sequence `[CLS | distillation | patches | registers]`; None if absent."""

    cls: slice | None
    patches: slice
    registers: slice | None
    length: int
    dist: slice | None = None
    pool: slice | None = None  # queries of an attention pooling, which are no tokens of the sequence
    numbers: tuple[int, ...] = ()  # of the registers that are present, in their order
    queries: int | None = None  # only so many first tokens attend, and are updated; None: all

    def __str__(self) -> str:
        names = {"cls": "CLS", "dist": "distillation"}
        parts = sorted((p.start, p.stop - 1, names.get(n, n)) for n, p in vars(self).items() if isinstance(p, slice))
        words = [f"{name} {first}" + f"..{last}" * (last > first) for first, last, name in parts]
        return f"{' | '.join(words)} ({self.length} tokens)"


def check_block(block, depth: int, what: str = "block") -> int:
    """`block` as a number of one of `depth` blocks. Raises ValueError outside 0..depth-1."""
    block = operator.index(block)
    if not 0 <= block < depth:
        also = ", or None for no such token" if what in ("cls_pos", "dist_pos") else ""
        raise ValueError(f"{what} {block} is outside the model: its blocks are 0..{depth - 1}{also}")
    return block


def blocks_with(model, token: str) -> list[int]:
    """The blocks of a model at whose input 'cls', 'dist', 'registers', or 'reg2', the register of that number, is."""
    number = int(token[3:]) if token[:3] == "reg" and token[3:].isdecimal() else None
    layouts = map(model.token_layout, range(model.depth))
    there = [getattr(at, token) is not None if number is None else number in at.numbers for at in layouts]
    return [i for i, present in enumerate(there) if present]


def one_each(blocks: int | tuple[int, ...], count: int, what: str) -> list[int]:
    """A block for each of `count` registers, from one for all or as many as there are registers."""
    blocks = list(blocks) if isinstance(blocks, list | tuple) else [blocks] * count
    if count and len(blocks) != count:
        raise ValueError(f"{what} has {len(blocks)} blocks for {count} registers; give one for all, or one for each")
    return [operator.index(block) for block in blocks][:count]


def all_alike(blocks: list[int]) -> int | tuple[int, ...] | None:
    """One block where all are the same; None without any."""
    return tuple(blocks) if len(set(blocks)) > 1 else next(iter(blocks), None)


def registers_at(reg_pos, reg_end, count: int, depth: int) -> tuple[list[int], list[int], list[list[int]]]:
    """Entry block and end of each register, and the numbers of those that are present at each block.

    The last list, [-1], is that in front of the first block: nobody.
    """
    starts = [check_block(n, depth, "reg_pos") for n in one_each(reg_pos, count, "reg_pos")]
    ends = one_each(depth if reg_end is None else reg_end, count, "reg_end")
    for start, end in zip(starts, ends):
        if not start < end <= depth:
            raise ValueError(f"a register that enters at block {start} leaves at {start + 1}..{depth}, not at {end}")
    present = [[n for n, (a, b) in enumerate(zip(starts, ends)) if a <= i < b] for i in range(depth)]
    return starts, ends, [*present, []]


def check_sizes(args: dict):
    """Raise ValueError for sizes of a DynamicViT (its arguments `args`) that do not go together."""
    (h, w), (ph, pw), heads = args["img_size"], args["patch_size"], args["num_heads"]
    if args["embed_dim"] % heads:
        raise ValueError(f"width {args['embed_dim']} is not divisible by {heads} heads")
    if h % ph or w % pw or 0 in (h, w):
        raise ValueError(f"an image of {h} x {w} pixels is not divisible into patches of {ph} x {pw}")
    if int(args["embed_dim"] * args["mlp_ratio"]) < 1:
        raise ValueError(f"an MLP ratio of {args['mlp_ratio']} leaves no hidden unit")
    if args["num_register_tokens"] < 0:
        raise ValueError(f"the number of registers must be at least 0, not {args['num_register_tokens']}")
    if args["rope"] and args["embed_dim"] // heads % 4:
        raise ValueError(f"rotary positions need heads of a multiple of 4, not {args['embed_dim'] // heads}")


MODES = ("token", "reader")


def check_modes(args: dict, registers: list[list[int]], classified: str):
    """Raise ValueError for a token that would reach nothing that is classified.

    Args:
        args: the arguments of a DynamicViT.
        registers: the last result of `registers_at`.
        classified: the model's `global_pool`.
    """
    depth, count, cls_pos = args["depth"], args["class_attention"], args["cls_pos"]
    if classified not in ("token", "avg", "") or (classified == "token" and cls_pos is None):
        raise ValueError(f"global_pool {classified!r} is none of 'token' (with a class token), 'avg' and ''")
    for name in ("cls_mode", "reg_mode"):
        if args[name] not in MODES:
            raise ValueError(f"{name} {args[name]!r} is none of {', '.join(MODES)}")
    if not 0 <= count <= depth:
        raise ValueError(f"class_attention is {count}, but the model has {depth} blocks")
    if (count or args["cls_mode"] == "reader") and classified != "token":
        raise ValueError("a CLS that only reads, and class attention, need a class token that is classified")
    last = max([args[name] for name in ("cls_pos", "dist_pos") if args[name] is not None], default=0)
    if count and last > depth - count:
        raise ValueError(f"class attention begins at block {depth - count}, before the token of block {last} enters")
    if args["reg_mode"] == "reader" and args["num_register_tokens"]:
        seen = {n for present in registers[cls_pos:-1] for n in present} if args["cls_mode"] == "reader" else set()
        if len(seen) < args["num_register_tokens"]:
            raise ValueError(
                "registers that only read are seen by nobody but a CLS that only reads, while both are present: "
                "give cls_mode='reader', and registers that stay until it has entered"
            )
