"""One HTML file to explore a model's attention in a browser: no server, no network.

`viewer.html` is the page; here the attention is packed and put into it.

    images = [encode_image("dog", "predicted: dog", shown, layouts, attention, model.grid_size)]
    write_viewer("attention.html", "Attention of best_model.pth", about_the_model, images)
"""

import base64
import io
import json
import zlib
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
SMALL = 64  # pixels: images up to this size are stored losslessly


def packed_size(layouts: dict[int, TokenLayout], heads: int) -> int:
    """Bytes of the unpacked attention of one image in the browser."""
    total = 0
    for layout in layouts.values():
        patches = layout.patches.stop - layout.patches.start
        total += heads * layout.length * (patches + 4 * (2 + layout.length - patches))
    return total


def check_size(size: int):
    """Raises BadInput if this is too much attention for one file: the sum of `packed_size` over all images."""
    if size > LIMIT:
        raise BadInput(
            f"the attention takes {size / 2**30:.2f} GiB unpacked, more than a browser should hold "
            f"({LIMIT / 2**30:.2f} GiB); choose fewer blocks (--layer_num), fewer images, or a smaller --input_size"
        )


def encode_image(
    name: str, caption: str, shown: Tensor, layouts: dict[int, TokenLayout], attention: dict[int, Tensor],
    grid: tuple[int, int],
) -> dict:  # fmt: skip
    """An image and its attention as plain values for `write_viewer`.

    Args:
        shown: (3, h, w) uint8, for display, the part that the model saw.
        layouts: of at least the blocks in `attention`.
        attention: block -> (H, N, N), softmaxed, rows attend to columns.
        grid: (gh, gw).

    Raises BadInput if it is not finite.
    """
    heads = next(iter(attention.values())).shape[0]
    size = packed_size({block: layouts[block] for block in attention}, heads)
    _, height, width = shown.shape
    return {
        "name": name, "caption": caption, "src": data_uri(shown), "size": [height, width], "grid": list(grid),
        "heads": heads, "bytes": size,
        "blocks": {block: _encode_block(block, layouts[block], attention[block]) for block in sorted(attention)},
    }  # fmt: skip


def _encode_block(block: int, layout: TokenLayout, attention: Tensor) -> dict:
    """Positions of the tokens, and their attention as zlib's deflated bytes in base64, three arrays in a row:

    scales (H, N) float32; shares (H, N, 1 + number of tokens that are no patches) float32, on all patches together and
    on each of those tokens; levels (H, N, P) uint8. The attention on a patch is its level times the row's scale, and
    so never further off than 1/510 of the row's largest. Registers often receive nearly all of a row: stored as levels
    too, they would round the patches to zero.
    """
    attention, queries = attention.detach().float().cpu(), attention.shape[1]
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
    places = {kind: part.start for kind in ("cls", "dist") if (part := getattr(layout, kind)) is not None}
    if layout.registers is not None:
        places |= {f"reg{r}": at for at, r in enumerate(layout.numbers, layout.registers.start)}
    return {
        "tokens": layout.length, "first": layout.patches.start, "places": places, "queries": queries,
        "data": base64.b64encode(packed).decode("ascii"),
    }  # fmt: skip


def data_uri(shown: Tensor) -> str:
    from torchvision.transforms.functional import to_pil_image

    image, file = to_pil_image(shown.cpu()), io.BytesIO()
    kind, options = ("png", {"optimize": True}) if max(image.size) <= SMALL else ("jpeg", {"quality": 90})
    image.save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def write_viewer(path, title: str, model: dict, images: list[dict]) -> int:
    """Write the page, atomically, and return its size in bytes.

    Args:
        model: "depth", "heads", "cls_pos", "dist_pos" (None if absent), and "registers": entry block and end of each.
        images: of `encode_image`.

    Raises BadInput if all images together are too large for a browser.
    """
    from matplotlib import colormaps

    check_size(sum(image["bytes"] for image in images))
    colours = colormaps[COLOURS](range(256), bytes=True)[:, :3].tobytes().hex()
    without_data = [
        image | {"blocks": {i: {k: v for k, v in b.items() if k != "data"} for i, b in image["blocks"].items()}}
        for image in images
    ]
    about = {"title": title, "model": model, "colours": colours, "pictures": without_data}
    before, after = TEMPLATE.read_text(encoding="utf-8").split("<!-- data -->\n")
    size = 0

    def write(file):
        nonlocal size
        file.write(before.encode())
        # Names may hold anything: without "<" none can end its script element.
        text = json.dumps(about).replace("<", "\\u003c")
        file.write(f'<script type="application/json" id="about">{text}</script>\n'.encode())
        # Each block in an element of its own: a browser's longest string is 512 MiB, and most blocks are never shown.
        for i, image in enumerate(images):
            for block, content in image["blocks"].items():
                element = f'<script type="text/plain" id="attention-{i}-{block}">{content["data"]}</script>\n'
                file.write(element.encode())
        file.write(after.encode())
        size = file.tell()

    utils.write_atomically(path, write)
    return size
