"""One HTML file to explore a model's attention by hand in a browser: no server, no network.

`viewer.html` is the page; here the attention is packed and put into it.

    pictures = [encode_image("dog", "predicted: dog", shown, layouts, attention, model.grid_size)]
    write_viewer("attention.html", "Attention of best_model.pth", about_the_model, pictures)
"""

import base64
import io
import json
import zlib
from pathlib import Path

import torch
from torch import Tensor

import utils
from inspection.pages import COLOURS
from models_dynamic import TokenLayout
from utils import BadInput

TEMPLATE = Path(__file__).with_name("viewer.html")
LIMIT = 2**30  # bytes of attention, unpacked: what a browser can still hold
SMALL = 64  # pixels: pictures up to this size are kept exactly


def packed_size(layouts: dict[int, TokenLayout], heads: int) -> int:
    """Bytes that the attention of one picture takes in the browser, unpacked."""
    total = 0
    for layout in layouts.values():
        patches = layout.patches.stop - layout.patches.start
        total += heads * layout.length * (patches + 4 * (2 + layout.length - patches))
    return total


def check_size(size: int):
    """Raises BadInput if a file with so many bytes of attention (`packed_size`, all pictures) would be too large."""
    if size > LIMIT:
        raise BadInput(
            f"the attention takes {size / 2**30:.2f} GiB unpacked, more than a browser should hold "
            f"({LIMIT / 2**30:.2f} GiB); choose fewer blocks (--layer_num), fewer images, or a smaller --input_size"
        )


def encode_image(
    name: str, caption: str, shown: Tensor, layouts: dict[int, TokenLayout], attention: dict[int, Tensor],
    grid: tuple[int, int],
) -> dict:  # fmt: skip
    """A picture and its attention as plain values for `write_viewer`.

    Args:
        shown: (3, h, w) uint8, as a person sees it, the part that the model saw.
        layouts: of the blocks in `attention`, and maybe others.
        attention: block -> (H, N, N), softmaxed, rows attend to columns.
        grid: (gh, gw).

    Raises BadInput if it is not finite.
    """
    heads = next(iter(attention.values())).shape[0]
    size = packed_size({block: layouts[block] for block in attention}, heads)
    _, height, width = shown.shape
    return {
        "name": name, "caption": caption, "src": _data_uri(shown), "size": [height, width], "grid": list(grid),
        "heads": heads, "bytes": size,
        "blocks": {block: _encode_block(block, layouts[block], attention[block]) for block in sorted(attention)},
    }  # fmt: skip


def _encode_block(block: int, layout: TokenLayout, attention: Tensor) -> dict:
    """Where the tokens stand, and their attention as zlib's deflated bytes in base64, three arrays after each other:

    scales (H, N) float32; shares (H, N, 1 + number of tokens that are no patches) float32, on all patches together and
    on each of those tokens; levels (H, N, P) uint8. The attention on a patch is its level times the row's scale, and
    so never further off than 1/510 of the row's largest. Registers often draw nearly all of a row: that is why they
    are kept apart, else the patches' share would be rounded away.
    """
    attention = attention.detach().float().cpu()
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
        places |= {f"reg{r}": at for r, at in enumerate(range(layout.registers.start, layout.registers.stop))}
    return {
        "tokens": layout.length, "first": layout.patches.start, "places": places,
        "data": base64.b64encode(packed).decode("ascii"),
    }  # fmt: skip


def _data_uri(shown: Tensor) -> str:
    from PIL import Image

    image, file = Image.fromarray(shown.permute(1, 2, 0).contiguous().cpu().numpy()), io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(file, format="png", optimize=True)
    else:
        image.save(file, format="jpeg", quality=90)
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def write_viewer(path, title: str, model: dict, pictures: list[dict]) -> int:
    """Write the page, atomically, and return its size in bytes.

    Args:
        model: "depth", "heads", "cls_pos", "dist_pos", "reg_pos" (None for what there is not) and "registers".
        pictures: of `encode_image`.

    Raises BadInput if all pictures together are too large for a browser.
    """
    from matplotlib import colormaps

    check_size(sum(picture["bytes"] for picture in pictures))
    colours = colormaps[COLOURS](range(256), bytes=True)[:, :3].tobytes().hex()
    bare = [
        picture | {"blocks": {i: {k: v for k, v in b.items() if k != "data"} for i, b in picture["blocks"].items()}}
        for picture in pictures
    ]
    about = {"title": title, "model": model, "colours": colours, "pictures": bare}
    before, after = TEMPLATE.read_text(encoding="utf-8").split("<!-- data -->\n")
    size = 0

    def write(file):
        nonlocal size
        file.write(before.encode())
        # Names come from anywhere: without "<" none can end the element that it stands in.
        words = json.dumps(about).replace("<", "\\u003c")
        file.write(f'<script type="application/json" id="about">{words}</script>\n'.encode())
        # Each block in an element of its own: a browser's longest string is 512 MiB, and most are never asked for.
        for i, picture in enumerate(pictures):
            for block, content in picture["blocks"].items():
                element = f'<script type="text/plain" id="attention-{i}-{block}">{content["data"]}</script>\n'
                file.write(element.encode())
        file.write(after.encode())
        size = file.tell()

    utils.write_atomically(path, write)
    return size
