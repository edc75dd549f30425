"""Segmentation of patches: can the class of the object under a patch be read from its token?

Patches of half of the images teach a kNN probe (20 neighbours by cosine) and a multinomial logistic one, which then
label those of the other half, as in "Vision Transformers Need Registers" (arXiv 2309.16588) and DINO (2104.14294).
"""

import warnings

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from inspection.bootstrap import bootstrap
from inspection.truth import IGNORED

NEIGHBOURS = 20


def patch_labels(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """(h, w) uint8 -> (P,) int64: the class of most pixels of each patch of a grid (gh, gw), of equals the lower one.

    Where most are to be ignored, so is the patch.
    """
    gh, gw = grid
    cells = mask.long().unflatten(0, (gh, -1)).unflatten(2, (gw, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
    return torch.from_numpy(stats.mode(cells.cpu().numpy(), axis=1).mode)


def draw(tokens: Tensor, mask: Tensor, grid, most: int, chance: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The tokens (n, D) and labels (n,) of at most so many of an image's patches (P, D), without ignored ones."""
    labels = patch_labels(mask, grid)
    kept = torch.randperm(len(labels), generator=chance)
    kept = kept[labels[kept] != IGNORED][:most]
    return tokens.cpu()[kept].numpy(), labels[kept].numpy()


def segment(images: list[tuple[np.ndarray, np.ndarray]]) -> dict | None:
    """Each second image teaches, the others are judged; None if that leaves less than two classes or two images.

    Args:
        images: tokens (n, D) and labels (n,) of each.

    Returns:
        {"classes": in the masks, "images": judged, "patches": judged, "probes": {probe: {"accuracy" of the patches and
        "iou", the mean over classes, in per cent, with intervals over images; "iou_of_each" class}}}.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images = [image for image in images if len(image[1])]
    taught, judged = images[::2], images[1::2]
    if len(judged) < 2:
        return None
    tokens, labels = map(np.concatenate, zip(*taught))
    if len(np.unique(labels)) < 2:
        return None
    classes = np.unique(np.concatenate([labels, *(own for _, own in judged)]))
    probes = {
        "kNN": KNeighborsClassifier(min(NEIGHBOURS, len(labels)), metric="cosine"),
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3)),
        "most frequent class": DummyClassifier(strategy="most_frequent"),
    }
    found, ends = {}, np.cumsum([len(own) for _, own in judged])[:-1]
    for name, probe in probes.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of a probe do not matter
            predicted = probe.fit(tokens, labels).predict(np.concatenate([own for own, _ in judged]))
        pairs = zip(np.split(predicted, ends), (own for _, own in judged))
        found[name] = _scores(np.stack([_counts(*pair, classes) for pair in pairs]), classes)
    return {"classes": classes.tolist(), "images": len(judged), "patches": len(predicted), "probes": found}


def _counts(predicted, labels, classes) -> np.ndarray:
    """(3, K) of an image: patches that are rightly of each class, that are of it, and that are said to be."""
    of_class, said = labels[:, None] == classes, predicted[:, None] == classes
    return np.stack([each.sum(axis=0) for each in (of_class & said, of_class, said)])


def _accuracy(counts) -> float:
    right, labelled, _ = counts.sum(axis=0)
    return 100 * right.sum() / labelled.sum()


def _ious(counts) -> np.ndarray:
    """(K,), NaN for a class that is nowhere."""
    right, labelled, said = counts.sum(axis=0)
    union = labelled + said - right
    return 100 * np.where(union, right, np.nan) / np.maximum(union, 1)


def _mean_iou(counts) -> float:
    return np.nanmean(_ious(counts))


def _scores(counts, classes) -> dict:
    each = {str(k): None if np.isnan(iou) else float(iou) for k, iou in zip(classes, _ious(counts))}
    return {
        "accuracy": float(_accuracy(counts)), "accuracy_interval": bootstrap(counts, _accuracy).tolist(),
        "iou": float(_mean_iou(counts)), "iou_interval": bootstrap(counts, _mean_iou).tolist(), "iou_of_each": each,
    }  # fmt: skip
