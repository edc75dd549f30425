"""One HTML file to explore the attention of one model, or of several side by side, in a browser: no server, no network.

`viewer.html` is the page and `viewer*.js` its script; here the attention is packed and put into them.

    image = encode_image("dog.jpg, whole image", "predicted: dog", shown, layouts, attention, model.grid_size)
    write_viewer("attention.html", "Attention of late/best_model.pth", [about_the_model], [("dog.jpg", [image])])
"""

import base64
import html
import io
import json
import zlib
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from inspection.pages import COLOURS
from models_dynamic import TokenLayout
from utils import BadInput

TEMPLATE = Path(__file__).with_name("viewer.html")
LIMIT = 2**30  # bytes of attention, unpacked: what a browser can still hold
SCRIPTS = [Path(__file__).with_name(f"{name}.js") for name in ("viewer", "viewer_save", "viewer_page")]
SMALL = 64  # pixels: images up to this size are stored losslessly


def packed_size(layouts: dict[int, TokenLayout], heads: int) -> int:
    """Bytes of the unpacked attention of one image in the browser."""
    total = 0
    for layout in layouts.values():
        layout = _with_queries(layout)
        patches = layout.patches.stop - layout.patches.start
        total += heads * layout.length * (patches + 4 * (2 + layout.length - patches))
    return total


def _with_queries(layout: TokenLayout) -> TokenLayout:
    """In an attention pooling its queries are no tokens: they stand before the tokens, and get nothing."""
    if layout.pool is None:
        return layout
    more, patches = layout.pool.stop, layout.patches
    return replace(layout, patches=slice(patches.start + more, patches.stop + more), length=layout.length + more)


def check_size(size: int):
    """Raises BadInput if this is too much attention for one file: the sum of `packed_size` over all images."""
    if size > LIMIT:
        raise BadInput(
            f"the attention takes {size / 2**30:.2f} GiB unpacked, more than a browser should hold "
            f"({LIMIT / 2**30:.2f} GiB); choose fewer blocks (--layer_num), fewer images, or a smaller --input_size"
        )


def encode_image(
    about: str, caption: str, shown: Tensor, layouts: dict[int, TokenLayout], attention: dict[int, Tensor],
    grid: tuple[int, int], rollout: dict[int, Tensor] | None = None, classes: dict[str, Tensor] | None = None,
) -> dict:  # fmt: skip
    """An image under one model, and its attention, as plain values for `write_viewer`.

    Args:
        about: of the header line: the file, and what of it the model sees.
        shown: (3, h, w) uint8, for display, the part that the model saw.
        layouts: of at least the blocks in `attention`.
        attention: block -> (H, N, N), softmaxed, rows attend to columns; (H, M, N) of the queries of a pooling.
        grid: (gh, gw).
        rollout: block -> (N, P): the patches' shares in each token after that block.
        classes: name -> (gh, gw): maps of classes.

    Raises BadInput if it is not finite.
    """
    heads = max(len(each) for each in attention.values())
    rolled = {block: _among_tokens(layouts[block], shares) for block, shares in (rollout or {}).items()}
    size = packed_size({block: layouts[block] for block in attention}, heads + bool(rolled))
    _, height, width = shown.shape
    return {
        "about": about, "caption": caption, "src": data_uri(shown), "size": [height, width], "grid": list(grid),
        "heads": heads, "bytes": size,
        "attention": {block: _encode_block(block, layouts[block], attention[block]) for block in sorted(attention)},
        "rollout": {block: _encode_block(block, layouts[block], rolled[block]) for block in sorted(rolled)},
        "classes": {name: [float(f"{v:.5g}") for v in m.flatten().tolist()] for name, m in (classes or {}).items()},
    }  # fmt: skip


def _among_tokens(layout: TokenLayout, shares: Tensor) -> Tensor:
    """(N, P) -> (1, N, N), packed as the attention of one head is: tokens that are no patches bring nothing."""
    return F.pad(shares, (layout.patches.start, layout.length - layout.patches.stop))[None]


def _encode_block(block: int, layout: TokenLayout, attention: Tensor) -> dict:
    """Positions of the tokens, and their attention as zlib's deflated bytes in base64, three arrays in a row:

    scales (H, N) float32; shares (H, N, 1 + number of tokens that are no patches) float32, on all patches together and
    on each of those tokens; levels (H, N, P) uint8. The attention on a patch is its level times the row's scale, and
    so never further off than 1/510 of the row's largest. Registers often receive nearly all of a row: stored as levels
    too, they would round the patches to zero.
    """
    attention, (heads, queries, keys) = attention.detach().float().cpu(), attention.shape
    layout = _with_queries(layout)
    attention = F.pad(attention, (layout.length - keys, 0))
    attention = F.pad(attention, (0, 0, 0, layout.length - queries))  # in class attention the others have no row
    if not attention.isfinite().all():
        raise BadInput(f"the attention at block {block} is not finite; these weights or this image are damaged")
    on_patches = attention[:, :, layout.patches]  # (H, N, P)
    other = torch.ones(layout.length, dtype=torch.bool)
    other[layout.patches] = False
    scales = on_patches.amax(dim=-1) / 255
    shares = torch.cat([on_patches.sum(dim=-1, keepdim=True), attention[:, :, other]], dim=-1)
    levels = (on_patches / scales.clamp_min(1e-38)[..., None]).round_().clamp_(max=255).to(torch.uint8)
    arrays = (scales.numpy().astype("<f4"), shares.numpy().astype("<f4"), levels.numpy())
    packed = zlib.compress(b"".join(array.tobytes() for array in arrays))
    places = {kind: part.start for kind in ("cls", "dist", "pool") if (part := getattr(layout, kind)) is not None}
    if layout.registers is not None:
        places |= {f"reg{r}": at for at, r in enumerate(layout.numbers, layout.registers.start)}
    return {
        "tokens": layout.length, "first": layout.patches.start, "places": places, "queries": queries, "heads": heads,
        "data": base64.b64encode(packed).decode("ascii"),
    }  # fmt: skip


def data_uri(shown: Tensor) -> str:
    from torchvision.transforms.functional import to_pil_image

    image, file = to_pil_image(shown.cpu()), io.BytesIO()
    kind, options = ("png", {"optimize": True}) if max(image.size) <= SMALL else ("jpeg", {"quality": 90})
    image.save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def write_viewer(path, title: str, models: list[dict], pictures: list[tuple[str, list[dict]]]) -> int:
    """Write the page, atomically, and return its size in bytes.

    Args:
        models: "name", "depth", "cls_pos", "dist_pos", "pool_pos" (None if absent), and "registers": entry block and
            end of each.
        pictures: a name that tells it apart, and the `encode_image` of each of `models`.

    Raises BadInput if all images together are too large for a browser.
    """
    from matplotlib import colormaps

    check_size(sum(view["bytes"] for _, views in pictures for view in views))
    colours = colormaps[COLOURS](range(256), bytes=True)[:, :3].tobytes().hex()
    data, without = {}, []  # by the id of the element; the pictures
    for i, (name, views) in enumerate(pictures):
        without.append({"name": name, "views": [view.copy() for view in views]})
        for m, view in enumerate(without[-1]["views"]):
            for kind in ("attention", "rollout"):
                data |= {f"{kind}-{m}-{i}-{b}": block["data"] for b, block in view[kind].items()}
                view[kind] = {b: block | {"data": None} for b, block in view[kind].items()}
    about = {"title": title, "models": models, "colours": colours, "pictures": without}
    page = TEMPLATE.read_text(encoding="utf-8").replace("<!-- title -->", html.escape(title))
    script = "\n".join(file.read_text(encoding="utf-8") for file in SCRIPTS)
    before, after = page.replace("<!-- script -->", script).split("<!-- data -->\n")
    size = 0

    def write(file):
        nonlocal size
        file.write(before.encode())
        # Names may hold anything: without "<" none can end its script element.
        text = json.dumps(about).replace("<", "\\u003c")
        file.write(f'<script type="application/json" id="about">{text}</script>\n'.encode())
        # Each block in an element of its own: a browser's longest string is 512 MiB, and most blocks are never shown.
        for key, packed in data.items():
            file.write(f'<script type="text/plain" id="{key}">{packed}</script>\n'.encode())
        file.write(after.encode())
        size = file.tell()

    utils.write_atomically(path, write)
    return size
