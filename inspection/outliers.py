"""What outlier patches hold, against normal ones of the same images: table 1 of "Vision Transformers Need Registers"
(arXiv 2309.16588).

Outliers are the artefacts of `inspection.statistics.RULE` at the output of the last block. Linear probes predict from
one token where it is, the pixels of its patch, and the class of the image; half of the images teach, the others are
judged. Outliers that stand where neighbours look alike, and know the image but neither place nor pixels, are what the
paper describes: patches that the model uses as registers.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inspection.bootstrap import with_interval
from inspection.statistics import TokenStatistics

KINDS = ("outlier", "normal")
ALPHAS = np.logspace(-1, 5, 7)  # of the ridge, chosen by generalised cross-validation
FEWEST = 20  # images with outliers


def find_threshold(model, batches) -> dict:
    """{"threshold": the norm from which a patch is an outlier, "share" of the patches that are}, over all images."""
    statistics = TokenStatistics(model, probe_images=0, attention=False)
    for images, *_ in batches():
        statistics.add(images)
    last = statistics.result()["artefacts"]["blocks"][-1]
    return {name: last[name] for name in ("threshold", "share")}


def neighbour_cosine(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, P, D) -> (B, P): the mean cosine of each patch with those above, below, left and right of it."""
    unit = F.normalize(x, dim=-1).unflatten(1, grid)  # (B, gh, gw, D)
    total, count = torch.zeros_like(unit[..., 0]), torch.zeros_like(unit[..., 0])
    for dim in (1, 2):
        n = grid[dim - 1] - 1
        pairs = (unit.narrow(dim, 0, n) * unit.narrow(dim, 1, n)).sum(dim=-1)
        for first in (0, 1):
            total.narrow(dim, first, n).add_(pairs)
            count.narrow(dim, first, n).add_(1)
    return (total / count.clamp_min(1)).flatten(1)


def pixels_of(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 3, h, w) -> (B, P, 3 * ph * pw)."""
    patch = images.shape[2] // grid[0], images.shape[3] // grid[1]
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


def draw(norms, threshold, values: dict[str, Tensor], most: int, chance: torch.Generator) -> dict | None:
    """As many outliers as normal patches of one image, at most `most`, in random order; None if it has not both.

    Args:
        norms: (P,). values: {name: (P, ...)}.

    Returns:
        {kind: {name: (n, ...), "place": (n,) number of the patch}}.
    """
    order = torch.randperm(len(norms), generator=chance)
    above = norms.cpu().double()[order] >= threshold
    kinds = dict(zip(KINDS, (order[above], order[~above])))
    n = min(most, *map(len, kinds.values()))
    if n == 0:
        return None
    found = {}
    for kind, places in kinds.items():
        places = places[:n]
        found[kind] = {name: v[places.to(v.device)].cpu().numpy() for name, v in values.items()}
        found[kind]["place"] = places.numpy()
    return found


def compare(images: list[dict], labels: list[int] | None, grid: tuple[int, int]) -> dict | None:
    """{quantity: {kind: {"value", "interval" over images}}}; None with fewer than 20 images.

    Quantities: "position" and "class", accuracies in per cent ("class" is None without at least two classes); "away",
    how far the predicted place is off, in patches; "pixels", the share of their variance that is reconstructed, in per
    cent (below 0: worse than the mean patch); "error", the root mean square of that in normalised pixels; "cosine" with
    the neighbours at the input.

    Args:
        images: what `draw` returned, with "tokens", "pixels" and "cosine". labels: of these.
    """
    if len(images) < FEWEST:
        return None
    found = {name: {} for name in ("position", "away", "class", "pixels", "error", "cosine")}
    for kind in KINDS:
        own = [image[kind] for image in images]
        cosine = with_interval([image["cosine"].mean() for image in own])
        measured = _places(own, grid) | _classes(own, labels) | _pixels(own) | {"cosine": cosine}
        for name, value in measured.items():
            found[name][kind] = value
    return {name: kinds or None for name, kinds in found.items()}


def _explained(sums) -> float:
    """In per cent, from rows of squared errors, and of squared distances from the mean."""
    errors, spread, _ = sums.sum(axis=0)
    return 100 * (1 - errors / max(spread, 1e-12))


def _root(sums) -> float:
    errors, _, count = sums.sum(axis=0)
    return np.sqrt(errors / count)


def _taught(probe, taught: list, targets: list):
    from sklearn.dummy import DummyClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    target = np.concatenate(targets)
    if target.ndim == 1 and len(np.unique(target)) == 1:  # all outliers in one place
        probe = DummyClassifier()
    return make_pipeline(StandardScaler(), probe).fit(np.concatenate(taught), target)


def _places(images, grid):
    from sklearn.linear_model import RidgeClassifierCV

    probe = _taught(RidgeClassifierCV(ALPHAS), *zip(*((image["tokens"], image["place"]) for image in images[::2])))
    rows = []
    for image in images[1::2]:
        wrong = np.subtract(*(np.unravel_index(n, grid) for n in (probe.predict(image["tokens"]), image["place"])))
        away = np.hypot(*wrong)
        rows.append((100 * (away == 0).mean(), away.mean()))
    right, away = np.array(rows).T
    return {"position": with_interval(right), "away": with_interval(away)}


def _classes(images, labels):
    from sklearn.linear_model import RidgeClassifierCV

    if labels is None or len(set(labels[::2])) < 2:
        return {}
    ones = [image["tokens"][:1] for image in images]  # drawn at random
    probe = _taught(RidgeClassifierCV(ALPHAS), ones[::2], [[label] for label in labels[::2]])
    return {"class": with_interval(100.0 * (probe.predict(np.concatenate(ones[1::2])) == labels[1::2]))}


def _pixels(images):
    from sklearn.linear_model import RidgeCV

    probe = _taught(RidgeCV(ALPHAS), *zip(*((image["tokens"], image["pixels"]) for image in images[::2])))
    middle = np.concatenate([image["pixels"] for image in images[::2]]).mean(axis=0)
    rows = []
    for image in images[1::2]:
        errors = (probe.predict(image["tokens"]) - image["pixels"], middle - image["pixels"])
        rows.append([*(float(np.square(error).sum()) for error in errors), image["pixels"].size])
    return {"pixels": with_interval(rows, _explained), "error": with_interval(rows, _root)}
