"""Draw what the class token, the distillation token, each register and chosen patches attend to, as PDF or PNG pages,
or as one HTML file to explore by hand.

    python visualize_attention.py --model_path ./models/best_model.pth --layer_num 5 --output_dir ./attention_maps
    python visualize_attention.py --image_path my_photo.jpg --layer_num 0 5 11 --tokens cls --overlay
    python visualize_attention.py --img_num 0 3 7 --pages blocks tokens rollout --layer_num all
    python visualize_attention.py --img_num 3 --pages class --target cat dog
    python visualize_attention.py --compare early.pth late.pth --layer_num 8 --img_num 3
    python visualize_attention.py --compare small.pth base.pth --num_heads 6 12 --image_path photo.jpg
    python visualize_attention.py --image_path my_photos --layer_num all --format html
    python visualize_attention.py --model_path foreign.pth --num_heads 6 --cls_pos 6 --reg_pos 3 --image_path photo.jpg

One PDF per image. The maps are the attention that the model used: softmaxed over all tokens; rows of the tokens,
columns of the patches.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import utils
from inspection import inputs
from inspection.attention import maps_of, rollout_of, watch_calls
from inspection.class_maps import class_number, grad_cam, relevance
from inspection.html import check_size, encode_image, packed_size, write_viewer
from inspection.pages import ATTENTION, TIMES_PATCHES, MapCell, Page, Row, by_token, draw_page, token_name, write_pages
from tokens.layout import blocks_with
from utils import BadInput, number

KINDS = ("cls", "dist", "reg", "pool")
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
    caption: str
    maps: dict[int, dict[str, Tensor]]  # block -> key of a token -> (H, gh, gw)
    rollout: dict[int, dict[str, Tensor]]  # the same with H = 1
    classes: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # class -> method -> (gh, gw)


def blocks_of(model, token) -> list[int]:
    """The blocks that one of `KINDS`, or a register, is present at."""
    pool = getattr(model, "pool_pos", None)  # SigLIP's, behind the last block
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
    last = max(blocks)
    tokens = set().union(*(parts_at(model, block) for block in blocks))
    present = [kind for kind in KINDS if kind in tokens]
    at = f"at block {last}" if len(blocks) == 1 else f"at blocks {', '.join(map(str, blocks))}"
    for kind in asked or KINDS:
        if kind in present:
            continue
        if not there[kind]:
            problem = f"this model has no {WORDS[kind].removeprefix('the ')}"
            pool = there["pool"]
            instead = f"the attention pooling, --layer_num {pool[0]}" if pool else "a model with tokens"
            instead = f"--tokens {present[0]}" if present else f"{instead}, or --patch x,y"
        elif "pool" in (kind, *present):
            problem = f"{WORDS[kind]} {'have' if kind == 'reg' else 'has'} no queries there"
            instead = f"--layer_num {there[kind][0]}"
        else:
            problem = _why_not(model, kind, there[kind], last)
            instead = f"--layer_num {there[kind][0]}"
            instead += "" if there[kind][-1:] == there[kind][:1] else f" or later (to {there[kind][-1]})"
            instead += f", or --tokens {present[0]}" if present else ""
        if asked or not present:
            raise BadInput(f"nothing to draw for {kind!r} {at}: {problem}; ask for {instead}")
        if there[kind] and kind != "pool":
            utils.say(f"note: {problem}; it is not drawn {at}")
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
        keep: called with (block, attention (H, N, N)) of each of `blocks`.
    """
    pixels, device = image.read(), next(model.parameters()).device
    images = inputs.model_input([pixels], [image], data, device)
    found, rolled, roll = {}, {}, rollout_of(model, patches)

    def see(i, call):
        rolled_out = roll(i, call.weights()) if rollout else None
        if i in blocks:
            found[i] = by_token(maps_of(model, patches, i, call), patches)
            rolled[i] = by_token(rolled_out, patches) if rollout else {}
            if keep is not None:
                keep(i, call.weights()[0].cpu())

    with torch.no_grad():
        logits = watch_calls(model, images, see)[0].cpu()
    logits = logits if model.num_classes else None
    lines = [] if image.label is None else [f"true: {inputs.class_name(image.label, data['classes'])}"]
    lines += [] if logits is None else [inputs.prediction(logits, data["classes"])]

    shown = inputs.as_seen(pixels, image, data)
    classes = {}
    for k in [int(logits.argmax()) if target is None else target for target in targets]:
        by_class = {
            "gradient x attention": relevance(model, images, k),
            f"Grad-CAM, input of block {model.depth - 1}": grad_cam(model, images, model.depth - 1, k),
        }
        classes[inputs.class_name(k, data["classes"])] = {
            method: m[0].cpu() / m.sum().clamp_min(1e-30).cpu() for method, m in by_class.items()
        }
    found, rolled = (
        {i: {key: heads[0].cpu() for key, heads in tokens.items()} for i, tokens in of_blocks.items()}
        for of_blocks in (found, rolled)
    )
    return ImageMaps(shown, "\n".join(lines), found, rolled, classes)


def pages_of(kinds_of_pages, seen: ImageMaps, tokens, blocks):
    """The pages of one image under one model."""

    def row(token, block, label):
        return Row(label, seen.shown, _cells(token, seen.maps[block], block))

    def there(token, block):  # attention pooling is a block of its own, and the tokens have no rows there
        return ("pool" in seen.maps[block]) == (token.key == "pool")

    if "heads" in kinds_of_pages:
        for block in blocks:
            for token in tokens:
                if token.key in seen.maps[block]:
                    rows = [row(token, block, "")]
                    yield Page(f"block{block}_{token.key}", _title(token, block), rows, seen.caption)
    if "blocks" in kinds_of_pages:
        for token in tokens:
            rows = [row(token, block, f"block {block}") for block in blocks if there(token, block)]
            yield Page(f"blocks_{token.key}", f"{_title(token)} through the blocks", rows, seen.caption)
    if "tokens" in kinds_of_pages:
        for block in blocks:
            rows = [row(token, block, token.name) for token in tokens if there(token, block)]
            if not rows:
                continue
            yield Page(f"block{block}_tokens", f"All tokens at block {block}", rows, seen.caption)
    if "rollout" in kinds_of_pages:
        rows = []
        for token in tokens:
            maps = {block: seen.rollout[block].get(token.key) for block in blocks if there(token, block)}
            cells = [
                MapCell(f"block {block}", None if m is None else m[0], _absent(token, block), token.mark)
                for block, m in maps.items()
            ]
            rows.append(Row(token.name, seen.shown, cells))
        yield Page("rollout", "Attention rollout from the first block on", rows, seen.caption, ROLLOUT)
    if "class" in kinds_of_pages:
        rows = [
            Row(name if len(seen.classes) > 1 else "", seen.shown, [MapCell(n, m) for n, m in maps.items()])
            for name, maps in seen.classes.items()
        ]
        yield Page("class", f"What speaks for: {', '.join(seen.classes)}", rows, seen.caption, CLASS)


def _title(token, block=None):
    if token.key == "pool":
        return f"{token.name} behind the last block"
    entered = "" if token.mark else f" (entered at block {token.blocks[0]})"
    return token.name + ("" if block is None else f" at block {block}") + entered


def _absent(token, block) -> str:
    if not token.blocks:
        return "absent: not in this model"
    if block < token.blocks[0]:
        return f"absent: enters at block {token.blocks[0]}"
    return f"absent: left at block {token.blocks[-1] + 1}" if block > token.blocks[-1] else "absent: only CLS attends"


def _cells(token, maps, block) -> list[MapCell]:
    """The mean over heads, and each head; one empty cell for a token that is absent."""
    heads = maps.get(token.key)
    if heads is None:
        return [MapCell("", None, _absent(token, block))]
    named = [("mean over heads", heads.mean(dim=0)), *((f"head {i}", head) for i, head in enumerate(heads))]
    return [MapCell(name, attention, mark=token.mark) for name, attention in named]


def compared_pages(names, models, images, asked, blocks, patches, one_scale):
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
                rows.append(Row(f"{label}\n{predicted}", seen.shown, _cells(token, seen.maps[block], block)))
            title = f"{name.split(' (of')[0]} at block {block} under {len(models)} models"
            yield Page(f"block{block}_{key}", title, rows, colour=colour)


def check(args):
    """Raise BadInput for flags that contradict each other."""
    if args.format == "html":
        given = [f"--{f}" for f in ("pages", "tokens", "patch", "scale", "compare", "overlay") if getattr(args, f)]
        if given:
            raise BadInput(f"--format html has every token and patch, to choose from; leave out {', '.join(given)}")
    if args.compare and len(args.compare) < 2:
        raise BadInput("--compare needs at least two checkpoints: --compare A.pth B.pth")
    if args.target and "class" not in (args.pages or ()):
        raise BadInput("--target is the class of --pages class; add that, or leave out --target")
    if args.compare and args.pages:
        raise BadInput("--compare has pages of its own; leave out --pages")


def load_all(args):
    """[(model, data, checkpoint)] of --model_path or --compare, on the device."""
    device = utils.pick_device(args.device)
    paths = args.compare or [args.model_path]
    flags = [inputs.flags_for_file(args, i, len(paths)) for i in range(len(paths))]
    found = [inputs.load(p, mine, one_of_several=len(paths) > 1) for p, mine in zip(paths, flags)]
    for model, _, _ in found:
        model.to(device)
        gh, gw = model.grid_size
        all_rows = args.patch or args.format == "html" or {"rollout", "class"} & set(args.pages)
        if getattr(model, "cls_only", False) and all_rows:
            raise BadInput(
                f"in {model.name} only CLS attends in the blocks that can be seen; leave out --patch, --pages rollout "
                f"and class, and --format html"
            )
        if "class" in args.pages and not model.num_classes:
            raise BadInput("--pages class: this model has no head, so no classes; leave out class")
        for x, y in args.patch or ():
            if not (x < gw and y < gh):
                raise BadInput(f"--patch {x},{y} is outside the grid: x is 0..{gw - 1}, y is 0..{gh - 1}")
    return found


def page_maker(args, loaded, blocks):
    """A function: image -> its pages. Raises BadInput if there would be none."""
    patches, rollout = args.patch or [], "rollout" in args.pages
    models = [model for model, _, _ in loaded]
    if args.compare:
        names = _short_names(args.compare)
        present = {kind for model in models for kind in KINDS if blocks_of(model, kind)}
        if not (set(args.tokens or KINDS) & present or patches):
            raise BadInput(f"none of these models has {' or '.join(WORDS[k] for k in args.tokens or KINDS)}")

        def compared(image):
            images = [image_maps(model, data, image, blocks, patches, False) for model, data, _ in loaded]
            return compared_pages(names, models, images, args.tokens, blocks, patches, args.scale != "map")

        return compared
    model, data, _ = loaded[0]
    no_rows = args.pages == ["class"] or (patches and not args.tokens)
    tokens = tokens_of(model, [] if no_rows else kinds_to_draw(model, blocks, args.tokens), patches)
    targets = [class_number(text, data["classes"], model.num_classes) for text in args.target or ()]
    targets = (targets or [None]) if "class" in args.pages else []

    def pages(image):
        return pages_of(args.pages, image_maps(model, data, image, blocks, patches, rollout, targets), tokens, blocks)

    return pages


def _short_names(paths) -> list[str]:
    """File names, with as many of their folders as it takes to make them different."""
    for parts in range(1, max(len(Path(path).parts) for path in paths) + 1):
        names = [str(Path(*Path(path).parts[-parts:])) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def draw(args, found, blocks, pages, failed):
    """Write the pages of all images that can be read; see `inputs.readable`."""
    from matplotlib import rcParams

    rcParams["text.parse_math"] = False  # names of classes and files are not TeX
    folder = utils.writable_folder(args.output_dir)
    shared = None
    if args.scale == "shared":
        shared = max(page.largest() for image in inputs.readable(found, failed) for page in pages(image))
    for image in inputs.readable(found, failed):
        keys = []

        def figures(image=image, keys=keys):  # one at a time: a page takes megabytes
            for page in pages(image):
                vmax = {"map": None, "page": page.largest(), "shared": shared}[args.scale]
                keys.append(page.key)
                yield page.key, draw_page(page, args.overlay, vmax, "all pages" if shared else "this page")

        stem = f"{'compared' if args.compare else 'attention'}_{image.name}"
        if args.format == "pdf":
            numbers = "-".join(map(str, blocks))
            stem += f"_{len(blocks)}_blocks" if len(numbers) > 100 else f"_block{'s' * (len(blocks) > 1)}{numbers}"
        for file in write_pages(figures(), folder / stem, args.format):
            drawn = [key.removeprefix(f"block{blocks[0]}_") if len(blocks) == 1 else key for key in keys]
            drawn = ", ".join(drawn) if len(drawn) <= 8 else f"{len(drawn)} pages"
            utils.say(utils.printable(f"wrote {file}" + (f": {drawn}" if args.format == "pdf" else "")))


def write_html(args, model, data, found, blocks, failed):
    """All attention of all images that can be read, in one file; see `inputs.readable`."""
    blocks = [i for i in blocks if model.token_layout(i).pool is None]
    layouts, encoded, heads = {i: model.token_layout(i) for i in blocks}, [], model.model_args["num_heads"]
    check_size(len(found) * packed_size(layouts, heads))
    folder = utils.writable_folder(args.output_dir)
    for image in inputs.readable(found, failed):
        attention = {}
        seen = image_maps(model, data, image, blocks, [], False, keep=attention.__setitem__)
        encoded.append(encode_image(image.name, seen.caption, seen.shown, layouts, attention, model.grid_size))
    about = {
        "depth": model.depth, "heads": heads, "cls_pos": model.cls_pos, "dist_pos": model.dist_pos,
        "registers": [[there[0], there[-1] + 1] for r in range(model.num_register_tokens)
                      if (there := blocks_of(model, f"reg{r}"))],
    }  # fmt: skip
    name = found[0].name if len(found) == 1 else f"{len(encoded)}_images"
    file = folder / f"attention_{name}.html"
    size = write_viewer(file, f"Attention of {Path(args.model_path).name}", about, encoded)
    words = f"({size / 1e6:.1f} MB): {utils.counted(len(encoded), 'image')}, blocks {', '.join(map(str, blocks))}"
    utils.say(utils.printable(f"wrote {file} {words}"))


@utils.full_precision()
def visualize(args):
    loaded = load_all(args)
    model, data, checkpoint = loaded[0]
    least_depth = min((model for model, _, _ in loaded), key=lambda model: model.depth)
    blocks = inputs.chosen_blocks(least_depth, args.layer_num)
    found, failed = inputs.find_images(args, data, checkpoint, args.img_num), []
    pages = None if args.format == "html" else page_maker(args, loaded, blocks)
    if args.format == "html":
        write_html(args, model, data, found, blocks, failed)
    else:
        draw(args, found, blocks, pages, failed)
    inputs.report_failed(failed, len(found))


def token_list(text):
    """An argparse type: 'cls,reg' -> ['cls', 'reg']."""
    tokens = [token.strip() for token in text.split(",")]
    if not set(tokens) <= set(KINDS):
        raise utils.argparse.ArgumentTypeError(f"{text!r} is not cls, dist or reg, or several with commas: cls,reg")
    return tokens


def parse(argv=None):
    """The checked flags, with the defaults that depend on other flags."""
    parser = utils.ArgumentParser(
        description="Draw what the class, distillation and register tokens and patches attend to."
    )
    parser.add_argument("--output_dir", default=".", help="folder for the pages")
    inputs.add_image_flags(parser)
    parser.add_argument(
        "--img_num", type=number(int, 0), nargs="+", default=[0], help="without --image_path: images of the test set"
    )
    parser.add_argument(
        "--layer_num", type=inputs.block, nargs="+", metavar="BLOCK", help="blocks, counted from 0, or all "
        "(default: 2; all for --format html and for --pages blocks and rollout)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=token_list, help="of cls, dist, reg and pool, as in cls,reg (default: all that are present)"
    )
    parser.add_argument(
        "--patch", type=inputs.patch, nargs="+", metavar="X,Y", help="also what these patches attend to (without "
        "--tokens: only that); column and row in the grid of patches, counted from 0",
    )  # fmt: skip
    parser.add_argument(
        "--pages", nargs="+", choices=("heads", "blocks", "tokens", "rollout", "class"), help="heads: a page for each "
        "token and block; blocks: one token through all blocks; tokens: all tokens at one block; rollout: attention "
        "rollout; class: which patches speak for a class (default: heads)",
    )  # fmt: skip
    parser.add_argument(
        "--target", nargs="+", metavar="CLASS", help="names or numbers of the classes of --pages class (default: the "
        "predicted one)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", choices=("map", "page", "shared"), help="a colour scale for each map, for each page, or one for all "
        "pages of this call (default: map; page with --compare)",
    )  # fmt: skip
    parser.add_argument(
        "--compare", nargs="+", metavar="FILE", help="these checkpoints, side by side, instead of --model_path; flags "
        "for a bare state dict take one value, or one per file",
    )  # fmt: skip
    parser.add_argument("--overlay", action="store_true", help="draw the maps over the image")
    parser.add_argument(
        "--format", choices=("pdf", "png", "html"), default="pdf", help="html: one file to explore in a browser"
    )
    inputs.add_checkpoint_flags(parser, several=True)
    args = parser.parse_args(argv)
    check(args)
    args.pages = args.pages or ["heads"]
    whole = args.format == "html" or not set(args.pages) & {"heads", "tokens"}
    args.layer_num = args.layer_num or (["all"] if whole else [2])
    args.scale = args.scale or ("page" if args.compare else "map")
    return args


def main(argv=None):
    visualize(parse(argv))


if __name__ == "__main__":
    utils.run_script(main)
