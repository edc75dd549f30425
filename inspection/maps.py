"""Which tokens' maps are drawn, the maps of one image, and what stands on their pages."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

import utils
from inspection import inputs
from inspection.attention import maps_of, rolled_shares, rollout_maps, watch_calls
from inspection.class_maps import grad_cam, relevance
from inspection.fitting import how_fitted
from inspection.pages import ATTENTION, TIMES_PATCHES, MapCell, Page, Row, by_token, token_name
from tokens.layout import blocks_with
from utils import BadInput

KINDS = ("cls", "dist", "reg", "pool")
PAGES = {  # see `pages_of`
    "heads": "a page for each token and block", "blocks": "one token through all blocks",
    "tokens": "all tokens at one block", "rollout": "attention rollout", "class": "which patches speak for a class",
}  # fmt: skip
HTML_PAGES = ("rollout", "class")  # what the HTML file shows beside all heads, blocks and tokens
WORDS = {
    "cls": "the class token", "dist": "the distillation token", "reg": "the registers", "pool": "the attention pooling",
}  # fmt: skip
ROLLOUT = "share of the token's content that came from each patch, in %, by attention rollout up to that block"
CLASS = "share of what speaks for the class, in % of the whole map, from gradients of its logit"


@dataclass
class Token:
    """One row of attention to draw."""

    key: str  # 'cls', 'dist', 'reg0', 'patch3-5'
    name: str
    blocks: list[int]  # those that it is present at; none: the model has no such token
    mark: tuple[int, int] | None = None  # x, y of a patch


@dataclass
class ImageMaps:
    """One image under one model."""

    shown: Tensor  # (3, ., .) uint8
    caption: str  # its class and the prediction
    about: str  # its name, and what of it the model sees
    maps: dict[int, dict[str, Tensor]]  # block -> key of a token -> (H, gh, gw)
    rollout: dict[int, dict[str, Tensor]]  # block -> key of a token -> (gh, gw)
    classes: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # class -> method -> (gh, gw)


def blocks_of(model, token) -> list[int]:
    """The blocks that one of `KINDS`, or a register, is present at."""
    pool = getattr(model, "pool_pos", None)  # SigLIP's, after the last block
    if token == "pool":
        return [] if pool is None else [pool]
    return blocks_with(model, "registers" if token == "reg" else token)


def parts_at(model, block) -> set[str]:
    """Which of `KINDS` attend at `block`."""
    layout = model.token_layout(block)
    registers = layout.registers if layout.queries is None else None  # in class attention they do not
    parts = {"cls": layout.cls, "dist": layout.dist, "reg": registers, "pool": layout.pool}
    return {kind for kind, part in parts.items() if part is not None}


def kinds_to_draw(model, blocks, asked) -> list[str]:
    """Which of `KINDS` to draw: those asked for, else all that are present at one of `blocks`.

    Raises BadInput for a requested token that is present at none of them, and if there are no tokens at all.
    """
    there = {kind: [i for i in blocks_of(model, kind) if kind in parts_at(model, i)] for kind in KINDS}
    last, present = max(blocks), [kind for kind in KINDS if set(there[kind]) & set(blocks)]
    at = f"at block {last}" if len(blocks) == 1 else f"at blocks {', '.join(map(str, blocks))}"
    for kind in [kind for kind in asked or KINDS if kind not in present]:
        if not there[kind]:
            problem = f"this model has no {WORDS[kind].removeprefix('the ')}"
            pool = f"the attention pooling, --layer_num {there['pool'][0]}" if there["pool"] else "a model with tokens"
            instead = f"--tokens {present[0]}" if present else f"{pool}, or --patch x,y"
        elif "pool" in (kind, *present):
            problem = f"{WORDS[kind]} {'have' if kind == 'reg' else 'has'} no queries there"
            instead = f"--layer_num {there[kind][0]}"
        else:
            problem = _why_not(model, kind, there[kind], last)
            later = "" if there[kind][-1:] == there[kind][:1] else f" or later (to {there[kind][-1]})"
            instead = f"--layer_num {there[kind][0]}{later}" + (f", or --tokens {present[0]}" if present else "")
        if asked or not present:
            raise BadInput(f"nothing to draw for {kind!r} {at}: {problem}; ask for {instead}")
        if there[kind] and kind != "pool":
            utils.say(f"note: {problem}; it is not drawn {at}, but with --layer_num {there[kind][-1]}")
    return [kind for kind in present if kind in (asked or KINDS)]


def _why_not(model, kind, there, block) -> str:
    """Why a kind of token that is present at the blocks `there` does not attend at `block`."""
    plural = "" if kind == "reg" else "s"
    if block in blocks_of(model, kind):
        return f"{WORDS[kind]} do not attend at block {block}, whose class attention is of CLS alone"
    if block < there[0]:
        return f"{WORDS[kind]} only enter{plural} at block {there[0]}"
    return f"{WORDS[kind]} leave{plural} at block {there[-1] + 1}"


def tokens_of(model, kinds, patches) -> list[Token]:
    """The rows of attention to draw, class token first, chosen patches last."""
    total = model.num_register_tokens
    keys = {"cls": ["cls"], "dist": ["dist"], "reg": [f"reg{r}" for r in range(total)], "pool": ["pool"]}
    keys = [key for kind in KINDS if kind in kinds for key in keys[kind]]
    found = [Token(key, token_name(key, total), blocks_of(model, key)) for key in keys]
    everywhere = list(range(model.depth))
    return found + [Token(f"patch{x}-{y}", f"Patch {x},{y} (column, row)", everywhere, (x, y)) for x, y in patches]


def image_maps(model, data, image, blocks, patches, rollout, targets=(), keep=None) -> ImageMaps:
    """Read an `InputImage`, and compute its maps and its caption in one pass.

    Args:
        targets: classes for pages of classes, None for the predicted one; each takes two passes with gradients.
        keep: called with (block, attention (H, M, N), rolled shares (N, P) or None) of each of `blocks`.
    """
    pixels, device = image.read(), next(model.parameters()).device
    images = inputs.model_input([pixels], [image], data, device)
    found, rolled, roll = {}, {}, rolled_shares(model)

    def of_image(maps):
        return {key: heads[0].cpu() for key, heads in by_token(maps, patches).items()}

    def see(i, call):
        shares = roll(i, call.weights()) if rollout else None
        if i in blocks:
            found[i] = of_image(maps_of(model, patches, i, call))
            if rollout:
                rolled[i] = {key: heads[0] for key, heads in of_image(rollout_maps(model, patches, i, shares)).items()}
            if keep is not None:
                keep(i, call.weights()[0].cpu(), shares[0].cpu() if rollout else None)

    with torch.no_grad():  # without a head nobody asks for what comes after the last block
        needs, last = None if rollout else blocks, None if model.num_classes else max(blocks)
        logits = watch_calls(model, images, see, needs=needs, last=last)
    logits = logits[0].cpu() if model.num_classes else None
    lines = [] if image.label is None else [f"true: {inputs.class_name(image.label, data['classes'])}"]
    lines += [] if logits is None else [inputs.prediction(logits, data["classes"])]

    classes = {}
    for k in [int(logits.argmax()) if target is None else target for target in targets]:
        by_class = {
            "gradient x attention": relevance(model, images, k),
            f"Grad-CAM, input of block {model.depth - 1}": grad_cam(model, images, model.depth - 1, k),
        }
        classes[inputs.class_name(k, data["classes"])] = {
            method: m[0].cpu() / m.sum().clamp_min(1e-30).cpu() for method, m in by_class.items()
        }
    about = f"{utils.printable(image.title)}, {how_fitted(image, pixels, data)}"
    return ImageMaps(inputs.as_seen(pixels, image, data), "\n".join(lines), about, found, rolled, classes)


def pages_of(kinds_of_pages, seen: ImageMaps, tokens, blocks, heads=None, name=""):
    """The pages of one image under one model.

    Args:
        heads: numbers of heads to draw; None: the mean over heads, and each; []: only the mean.
        name: of the model, for the head of each page.
    """
    about = f"model: {name}; image: {seen.about}"

    def row(token, block, label):
        return Row(label, seen.shown, _cells(token, seen.maps[block], block, heads))

    def there(token, block):  # attention pooling is a block of its own, and the tokens have no rows there
        return ("pool" in seen.maps[block]) == (token.key == "pool")

    if "heads" in kinds_of_pages:
        for block in blocks:
            for token in tokens:
                if token.key in seen.maps[block]:
                    rows = [row(token, block, "")]
                    yield Page(f"block{block}_{token.key}", _title(token, block), rows, seen.caption, about)
    if "blocks" in kinds_of_pages:
        for token in tokens:
            rows = [row(token, block, f"block {block}") for block in blocks if there(token, block)]
            yield Page(f"blocks_{token.key}", f"{_title(token)} through the blocks", rows, seen.caption, about)
    if "tokens" in kinds_of_pages:
        for block in blocks:
            rows = [row(token, block, token.name) for token in tokens if there(token, block)]
            if rows:
                yield Page(f"block{block}_tokens", f"All tokens at block {block}", rows, seen.caption, about)
    if "rollout" in kinds_of_pages:
        rows = []
        for token in tokens:
            cells = [
                MapCell(f"block {block}", seen.rollout[block].get(token.key), _absent(token, block), token.mark)
                for block in blocks if there(token, block)
            ]  # fmt: skip
            rows.append(Row(token.name, seen.shown, cells))
        yield Page("rollout", "Attention rollout from the first block on", rows, seen.caption, about, ROLLOUT)
    if "class" in kinds_of_pages:
        rows = [
            Row(name if len(seen.classes) > 1 else "", seen.shown, [MapCell(n, m) for n, m in maps.items()])
            for name, maps in seen.classes.items()
        ]
        yield Page("class", f"What speaks for: {', '.join(seen.classes)}", rows, seen.caption, about, CLASS)


def _title(token, block=None):
    if token.key == "pool":
        return f"{token.name} after the last block"
    entered = "" if token.mark else f" (entered at block {token.blocks[0]})"
    return token.name + ("" if block is None else f" at block {block}") + entered


def _absent(token, block) -> str:
    if not token.blocks:
        return "absent: not in this model"
    if block < token.blocks[0]:
        return f"absent: enters at block {token.blocks[0]}"
    return f"absent: left at block {token.blocks[-1] + 1}" if block > token.blocks[-1] else "absent: only CLS attends"


def _cells(token, maps, block, chosen=None) -> list[MapCell]:
    """The mean over heads, and each head, or those of them that are chosen; one empty cell for an absent token."""
    heads = maps.get(token.key)
    if heads is None:
        return [MapCell("", None, _absent(token, block))]
    named = [] if chosen else [("mean over heads", heads.mean(dim=0))]
    for i in range(len(heads)) if chosen is None else chosen:
        named.append((f"head {i}", heads[i] if i < len(heads) else None))
    return [MapCell(name, attention, "not in this model", token.mark) for name, attention in named]


def compared_pages(names, models, images, asked, blocks, patches, one_scale, heads=None):
    """The same image, block and token under several models, one per row.

    `one_scale`: models with different numbers of patches are shown as attention times that number; in per cent, the
    model with the fewest patches would leave the others black.
    """
    colour = TIMES_PATCHES if one_scale and len({math.prod(m.grid_size) for m in models}) > 1 else ATTENTION
    kinds = [k for k in KINDS if any(blocks_of(model, k) for model in models) and k in (asked or KINDS)]
    of_models = [{token.key: token for token in tokens_of(model, kinds, patches)} for model in models]
    keys = {key: token.name for tokens in of_models for key, token in tokens.items()}  # in order, each once
    for block in blocks:
        for key, name in keys.items():
            rows = []
            for label, seen, tokens in zip(names, images, of_models):
                token = tokens.get(key) or Token(key, name, [])
                predicted = seen.caption.split("\n")[-1]
                rows.append(Row(f"{label}\n{predicted}", seen.shown, _cells(token, seen.maps[block], block, heads)))
            title = f"{name.split(' (of')[0]} at block {block} under {len(models)} models"
            yield Page(f"block{block}_{key}", title, rows, about=f"image: {images[0].about}", colour=colour)
