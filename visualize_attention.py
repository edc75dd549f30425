"""Draw what the class token, the distillation token, each register and chosen patches attend to, as PDF or PNG pages,
or as one HTML file to explore by hand.

    python visualize_attention.py --model_path ./models/best_model.pth --layer_num 5 --output_dir ./attention_maps
    python visualize_attention.py --image_path my_photo.jpg --layer_num 0 5 11 --tokens cls --overlay
    python visualize_attention.py --img_num 0 3 7 --pages blocks tokens rollout --layer_num all
    python visualize_attention.py --compare early.pth late.pth --layer_num 8 --img_num 3
    python visualize_attention.py --image_path my_photos --layer_num all --format html
    python visualize_attention.py --model_path foreign.pth --num_heads 6 --cls_pos 6 --reg_pos 3 --image_path photo.jpg

One PDF per image. The maps are the attention that the model used: softmaxed over all tokens; rows of the tokens,
columns of the patches.
"""

from pathlib import Path

import utils
from inspection import inputs, maps, test_time_registers
from inspection.class_maps import class_number
from inspection.fitting import FITS, fitted
from inspection.html import check_size, encode_image, packed_size, write_viewer
from inspection.map_pages import Look, draw_page, parts_of
from inspection.pages import PERCENTILE, write_pages
from utils import BadInput, number


def check(args):
    """Raise BadInput for flags that contradict each other."""
    if args.format == "html":
        flags = ("tokens", "patch", "scale", "overlay", "log", "percentile", "heads")
        given = [f"--{f}" for f in flags if getattr(args, f) not in (None, False)]
        if given:
            raise BadInput(f"--format html has every token and patch, to choose from; leave out {', '.join(given)}")
        given = sorted(set(args.pages or ()) - set(maps.HTML_PAGES))
        if given:
            raise BadInput(f"--format html has all heads, blocks and tokens; of --pages leave out {', '.join(given)}")
    if args.compare and len(args.compare) < 2:
        raise BadInput("--compare needs at least two checkpoints: --compare A.pth B.pth")
    if args.compare and args.test_time_registers:
        raise BadInput("--test_time_registers is for one model; leave out --compare, or draw it twice")
    if args.target and "class" not in (args.pages or ()):
        raise BadInput("--target is the class of --pages class; add that, or leave out --target")
    if args.fit == "native" and (args.format == "html" or args.patch):
        raise BadInput("with --fit native each image has a grid of its own; leave out --format html and --patch")
    if args.compare and args.pages and args.format != "html":
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
        all_rows = args.patch or {"rollout", "class"} & set(args.pages)
        if getattr(model, "cls_only", False) and all_rows:
            leave_out = "leave out --patch, and --pages rollout and class"
            raise BadInput(f"in {model.name} only CLS attends in the blocks that can be seen; {leave_out}")
        if "class" in args.pages and not model.num_classes:
            raise BadInput("--pages class: this model has no head, so no classes; leave out class")
        for x, y in args.patch or ():
            if not (x < gw and y < gh):
                raise BadInput(f"--patch {x},{y} is outside the grid: x is 0..{gw - 1}, y is 0..{gh - 1}")
    most = max(model.model_args["num_heads"] for model, _, _ in found)
    if args.heads and max(args.heads) >= most:
        raise BadInput(f"--heads {max(args.heads)}: there are the heads 0..{most - 1}")
    return found


def page_maker(args, loaded, blocks):
    """A function: image -> its pages. Raises BadInput if there would be none."""
    patches, rollout = args.patch or [], "rollout" in args.pages
    models = [model for model, _, _ in loaded]
    if args.compare:
        names = _model_names(args)
        present = {kind for model in models for kind in maps.KINDS if maps.blocks_of(model, kind)}
        if not (set(args.tokens or maps.KINDS) & present or patches):
            raise BadInput(f"none of these models has {' or '.join(maps.WORDS[k] for k in args.tokens or maps.KINDS)}")

        def compared(image):
            of_models = [fitted(args.fit, model, data, image) for model, data, _ in loaded]
            images = [maps.image_maps(*own, blocks, patches, False) for own in of_models]
            sized, one_scale = [model for model, _, _ in of_models], args.scale != "map"
            return maps.compared_pages(names, sized, images, args.tokens, blocks, patches, one_scale, args.heads)

        return compared
    model, data, _ = loaded[0]
    no_rows = args.pages == ["class"] or (patches and not args.tokens)
    tokens = maps.tokens_of(model, [] if no_rows else maps.kinds_to_draw(model, blocks, args.tokens), patches)
    targets = [class_number(text, data["classes"], model.num_classes) for text in args.target or ()]
    targets = (targets or [None]) if "class" in args.pages else []

    def pages(image):
        seen = maps.image_maps(*fitted(args.fit, model, data, image), blocks, patches, rollout, targets)
        return maps.pages_of(args.pages, seen, tokens, blocks, args.heads, *_model_names(args))

    return pages


def draw(args, found, blocks, pages, failed):
    """Write the pages of all images that can be read; see `inputs.readable`."""
    folder = utils.writable_folder(args.output_dir)
    shared, look = None, Look(args.overlay, args.log, args.percentile)
    if args.scale == "shared":
        shared = max(page.top(look.percentile) for image in inputs.readable(found, failed) for page in pages(image))
    for image in inputs.readable(found, failed):
        keys = []

        def figures(image=image, keys=keys):  # one at a time: a page takes megabytes
            for whole in pages(image):
                vmax = {"map": None, "page": whole.top(look.percentile), "shared": shared}[args.scale]
                for page in parts_of(whole):
                    keys.append(page.key)
                    yield page.key, draw_page(page, vmax, "all pages" if shared else "this page", look)

        stem = f"{'compared' if args.compare else 'attention'}_{image.name}"
        if args.format == "pdf":
            numbers = "-".join(map(str, blocks))
            stem += f"_{len(blocks)}_blocks" if len(numbers) > 100 else f"_block{'s' * (len(blocks) > 1)}{numbers}"
        for file in write_pages(figures(), folder / stem, args.format):
            drawn = [key.removeprefix(f"block{blocks[0]}_") if len(blocks) == 1 else key for key in keys]
            drawn = ", ".join(drawn) if len(drawn) <= 8 else f"{len(drawn)} pages"
            utils.say(utils.printable(f"wrote {file}" + (f": {drawn}" if args.format == "pdf" else "")))


def write_html(args, loaded, found, failed):
    """All attention of all images that can be read, in one file; see `inputs.readable`."""
    rollout = "rollout" in args.pages
    sizes = [packed_size(_layouts(args, m), m.model_args["num_heads"] + rollout) for m, _, _ in loaded]
    check_size(len(found) * sum(sizes))
    folder, seen = utils.writable_folder(args.output_dir), {}
    for image in inputs.readable(found, failed):
        seen[image.name] = [_encoded(args, model, data, image) for model, data, _ in loaded]
    names, files = [image.name for image in found], [image.file for image in found]
    titles = dict(zip(names, inputs.names_of(files, 1) if all(files) and len(set(files)) == len(files) else names))
    names, blocks = _model_names(args), sorted({i for m, _, _ in loaded for i in _layouts(args, m)})
    stem = found[0].name if len(found) == 1 else f"{len(seen)}_images"
    file = folder / f"{'compared' if args.compare else 'attention'}_{stem}.html"
    pictures = [(utils.printable(titles[name]), views) for name, views in seen.items()]
    about = [_about(name, model) for name, (model, _, _) in zip(names, loaded)]
    title = f"{' and '.join(names)}: {pictures[0][0] if len(pictures) == 1 else f'{len(pictures)} images'}"
    size = write_viewer(file, utils.printable(f"Attention of {title}"), about, pictures)
    words = f"({size / 1e6:.1f} MB): {utils.counted(len(seen), 'image')}, blocks {', '.join(map(str, blocks))}"
    utils.say(utils.printable(f"wrote {file} {words}"))


def _layouts(args, model) -> dict:
    """The layout of each block to show."""
    return {i: model.token_layout(i) for i in inputs.chosen_blocks(model, args.layer_num)}


def _model_names(args) -> list[str]:
    paths = args.compare or [args.model_path]
    weights = [inputs.flags_for_file(args, i, len(paths)).weights for i in range(len(paths))]
    return [f"{name} ({Path(file).name})" if file else name for name, file in zip(inputs.names_of(paths), weights)]


def _encoded(args, model, data, image) -> dict:
    """`encode_image` of one image under one model."""
    layouts, attention, rolled = _layouts(args, model), {}, {}

    def keep(i, attn, shares):
        attention[i] = attn
        if shares is not None:
            rolled[i] = shares

    targets = [class_number(text, data["classes"], model.num_classes) for text in args.target or ()]
    targets = (targets or [None]) if "class" in args.pages else []
    model, data, image = fitted(args.fit, model, data, image)
    seen = maps.image_maps(model, data, image, list(layouts), [], "rollout" in args.pages, targets, keep)
    classes = {f"{method}, {k}": m for k, methods in seen.classes.items() for method, m in methods.items()}
    return encode_image(seen.about, seen.caption, seen.shown, layouts, attention, model.grid_size, rolled, classes)


def _about(name, model) -> dict:
    """What the page says of a model."""
    there = [maps.blocks_of(model, f"reg{r}") for r in range(model.num_register_tokens)]
    return {
        "name": name, "depth": model.depth, "cls_pos": model.cls_pos, "dist_pos": model.dist_pos,
        "pool_pos": getattr(model, "pool_pos", None),
        "registers": [[blocks[0], blocks[-1] + 1] for blocks in there if blocks],
    }  # fmt: skip


@utils.full_precision()
def visualize(args):
    loaded = load_all(args)
    model, data, checkpoint = loaded[0]
    named = zip((model for model, _, _ in loaded), _model_names(args) if args.compare else [""])
    least_depth, name = min(named, key=lambda pair: pair[0].depth)
    blocks = inputs.chosen_blocks(least_depth, args.layer_num, name)
    found, failed = inputs.find_images(args, data, checkpoint, args.img_num), []
    model = test_time_registers.from_flags(args, model, data, found, checkpoint)
    loaded[0] = model, data, checkpoint
    if args.format == "html":
        write_html(args, loaded, found, failed)
    else:
        draw(args, found, blocks, page_maker(args, loaded, blocks), failed)
    inputs.report_failed(failed, len(found))


def token_list(text):
    """An argparse type: 'cls,reg' -> ['cls', 'reg']."""
    tokens = [token.strip() for token in text.split(",")]
    if not set(tokens) <= set(maps.KINDS):
        raise utils.argparse.ArgumentTypeError(f"{text!r} is not cls, dist or reg, or several with commas: cls,reg")
    return tokens


def head_list(text):
    """An argparse type: 'all' -> None, 'mean' -> [], '0,3' -> [0, 3]."""
    if text in ("all", "mean"):
        return None if text == "all" else []
    return [number(int, 0)(part) for part in text.split(",")]


def parse(argv=None):
    """The checked flags, with the defaults that depend on other flags."""
    words = "Draw what the class, distillation and register tokens and patches attend to."
    parser = utils.ArgumentParser(description=words)
    flag = parser.add_argument
    flag("--output_dir", default=".", help="folder for the pages")
    inputs.add_image_flags(parser)
    flag("--img_num", type=number(int, 0), nargs="+", default=[0], help="without --image_path: images of the test set")
    flag("--layer_num", type=inputs.block, nargs="+", metavar="BLOCK", help="blocks, counted from 0, or all (default: "
         "2; all for --format html and for --pages blocks and rollout)")  # fmt: skip
    flag("--tokens", type=token_list, help="of cls, dist, reg and pool, as in cls,reg (default: all that are present)")
    flag("--patch", type=inputs.patch, nargs="+", metavar="X,Y", help="also what these patches attend to (without "
         "--tokens: only that); column and row in the grid of patches, counted from 0")  # fmt: skip
    words = "; ".join(f"{name}: {what}" for name, what in maps.PAGES.items())
    flag("--pages", nargs="+", choices=maps.PAGES,
         help=f"{words} (default: heads; --format html takes {' and '.join(maps.HTML_PAGES)})")  # fmt: skip
    flag("--target", nargs="+", metavar="CLASS",
         help="names or numbers of the classes of --pages class (default: the predicted one)")  # fmt: skip
    flag("--scale", choices=("map", "page", "shared"), help="a colour scale for each map, for each page, or one for "
         "all pages of this call (default: map; page with --compare)")  # fmt: skip
    flag("--compare", nargs="+", metavar="FILE", help="these checkpoints, side by side, instead of --model_path; flags "
         "for a bare state dict take one value, or one per file")  # fmt: skip
    flag("--overlay", action="store_true", help="over the greyed image, the more opaque the more attention")
    flag("--log", action="store_true", help="a logarithmic colour scale")
    flag("--percentile", type=number(float, 50, 100), help="of the values of a map, or of all maps with one scale: the "
         "top of the scale (99)")  # fmt: skip
    flag("--heads", type=head_list, metavar="HEADS", help="mean, all (and the mean), or numbers: 0,3,5 (all)")
    flag("--fit", choices=FITS, default="crop", help="of images of another shape: crop, the middle, as the model was "
         "tested; pad, the whole with bars; native, the whole in its own shape, positions resampled")  # fmt: skip
    flag("--format", choices=("pdf", "png", "html"), default="pdf", help="html: one file to explore in a browser")
    test_time_registers.add_flags(parser)
    inputs.add_checkpoint_flags(parser, several=True)
    args = parser.parse_args(argv)
    check(args)
    args.pages = args.pages or ["heads"]
    whole = args.format == "html" or not set(args.pages) & {"heads", "tokens"}
    args.layer_num = args.layer_num or (["all"] if whole else [2])
    args.scale = args.scale or ("page" if args.compare else "map")
    args.percentile = args.percentile or PERCENTILE
    return args


def main(argv=None):
    visualize(parse(argv))


if __name__ == "__main__":
    utils.run_script(main)
