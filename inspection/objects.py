"""LOST (arXiv 2109.14279): the box of an object from the features of patches."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

import utils
from datasets import normalise
from inspection.attention import projections
from inspection.fitting import fitting_size, sized
from utils import BadInput

SAME = 0.5  # intersection over union from which an object is found
FEATURES = ("queries", "keys", "values")  # in the order of DynamicViT.projections


@dataclass
class Found:
    """An object in one image, in patches."""

    seed: tuple[int, int]  # column, row
    box: tuple[int, int, int, int]  # left, upper, right, lower; right and lower are just outside
    degree: int  # of the seed
    similar: int  # patches that expand the seed, itself among them
    component: int  # patches of the object
    quartile: float  # a quarter of the products of features are below this, before the bias
    arbitrary: bool  # the seed correlates with all patches, or with none but itself
    features: str = ""  # one of `FEATURES`
    centred: bool = False  # the features' mean over patches was taken off


def lost(features: Tensor, grid: tuple[int, int], k_patches=100, bias=0.0) -> Found:
    """LOST (Simeoni et al., BMVC 2021, arXiv 2109.14279) on the features (P, D) of the patches of a grid (gh, gw).

    The degree of a patch is the number of patches with which its product is at least 0 (the paper's rule; the published
    code counts those above 0). The seed is the patch of lowest degree, the first one in reading order among equals. It
    is expanded by those of the `k_patches` patches of lowest degree that have a positive product with it. Patches whose
    products with all of these add up to more than 0 form the mask; its 4-connected component with the seed is the
    object.

    `bias` is added to every product. LOST assumes that object and background differ in sign; a component that all
    features share makes every product positive, and a negative bias removes it ("Vision Transformers Need Registers",
    section 3.3).
    """
    products = features @ features.T + bias  # (P, P)
    degrees = (products >= 0).sum(dim=1)
    order = degrees.argsort(stable=True)
    seed = int(order[0])
    similar = order[:k_patches]
    similar = similar[products[seed, similar] > 0]
    mask = products[similar].sum(dim=0) > 0
    mask[seed] = True  # a negative bias may outweigh the seed's own square
    parts, _ = scipy.ndimage.label(mask.unflatten(0, grid).cpu().numpy())
    row, column = divmod(seed, grid[1])
    rows, columns = np.nonzero(parts == parts[row, column])
    return Found(
        seed=(column, row), degree=int(degrees[seed]), similar=len(similar), component=len(rows),
        box=(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1),
        quartile=float(products.flatten().cpu().kthvalue(math.ceil(products.numel() / 4)).values) - bias,
        arbitrary=int(degrees[seed]) <= 1 or int(degrees[seed]) == len(features),
    )  # fmt: skip


def discovered(model, image, data, block, args) -> Found:
    """LOST on a PIL image, with a rule for what LOST assumes, that object and background differ in sign.

    With --bias, or where the seed is not arbitrary without it: as in the paper, on the keys or --features. Else a
    component that all patches share has to go: their mean is taken off, of --features or the values. Of DINOv2's keys
    and values that leaves the fewest boxes that are the whole image; see docs/ANALYSIS.md.
    """

    def search(kind, centred=False):
        features = patch_features(model, image, data, block, kind)
        features = features - features.mean(dim=0) if centred else features
        found = lost(features, model.grid_size, args.k_patches, args.bias or 0.0)
        return replace(found, features=kind, centred=centred)

    found = search(args.features or "keys")
    if args.bias is None and found.arbitrary:
        found = search(args.features or "values", centred=True)
    return found


def model_sizes(model, args) -> Callable:
    """A function: (width, height) of an image -> the model for it. Raises BadInput for less than two patches."""
    patch, own = model.model_args["patch_size"], model.model_args["img_size"]
    if args.input_size and args.max_side:
        raise BadInput("with --input_size images have one size, with --max_side each keeps its shape; leave one out")
    longer = args.max_side or max(own)
    if longer < 2 * max(patch):
        flag = "--input_size" if args.input_size else "--max_side"
        raise BadInput(f"{longer} pixels are less than two patches; give {flag} {2 * max(patch)} or more")

    def resized(size):
        try:
            return sized(model)(size)
        except ValueError as error:
            raise BadInput(f"--max_side {longer}: {error}") from None

    return lambda *size: model if args.input_size else resized(fitting_size(*size, longer, patch))


def patch_features(model, image, data, block, kind) -> Tensor:
    """A PIL image, squeezed to the model's size -> (P, H * d): the patches' queries, keys or values."""
    from PIL import Image

    h, w = model.model_args["img_size"]
    image = image.resize((w, h), Image.Resampling[data.get("interpolation", "bicubic").upper()])
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(next(model.parameters()).device)
    of_heads = projections(model, normalise(images, data["mean"], data["std"]), block)[FEATURES.index(kind)]
    features = of_heads[0, :, model.token_layout(block).patches].transpose(0, 1).flatten(1)
    if not features.isfinite().all():
        raise utils.RunFailed(f"the {kind} of block {block} are not all finite; the weights may be damaged")
    return features
