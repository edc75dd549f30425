"""What a tested model confuses: the confusion matrix as a picture, and pages of misclassified images."""

import numpy as np
import torch

import utils
from datasets import denormalise
from inspection.inputs import class_name
from inspection.pages import headed_figure
from training.scoring import eval_batches

ACROSS, DOWN = 8, 5  # images of a page
SIDE, BELOW = 1.1, 0.55  # inches of one, and of the words below it
NAMED, NUMBERED = 40, 20  # classes, at most: with names, with numbers in the cells
LETTERS = 12  # of a class name


def short(k, classes) -> str:
    return utils.shortened(class_name(k, classes), LETTERS)


def print_confusion(counts: np.ndarray, classes, per_class, confusion):
    """Print the accuracy of each class, the matrix, or both. `counts`: (K, K) images, rows are true classes."""
    classes = [utils.printable(name) for name in classes]
    width = max(map(len, classes))
    if per_class:
        print("\nAccuracy of each class")
        for name, row, right in zip(classes, counts, counts.diagonal()):
            print(f"  {name:{width}}  {100 * right / max(row.sum(), 1):6.2f}%  ({right} of {row.sum()})")
    if confusion:
        cell = max(4, len(str(counts.max())) + 1)
        print("\nConfusion matrix: rows are true classes, columns the predicted ones in the same order")
        for name, row in zip(classes, counts):
            print(f"  {name:{width}} " + "".join(f"{n:{cell}}" for n in row))


def confusion_figure(counts: np.ndarray, classes, about):
    """Rows are true classes; the colour is the share of a class's images that are taken for each other class."""
    k = len(counts)
    side = min(6.5, max(3.5, 0.45 * k))
    figure = headed_figure(
        (side + 3.2, side + 2.8), "Confusion matrix", about,
        "Rows: true classes; columns: predicted. Colour: % of the images of the row; the diagonal, which is right, "
        + ("is grey. Numbers: images." if k <= NUMBERED else "is grey."),
        rect=(0.01, 0.1, 0.98, 0.78),
    )  # fmt: skip
    axes = figure.subplots()
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = np.where(np.eye(k, dtype=bool), np.nan, shares)
    top = float(np.nanmax(wrong)) or 1.0
    axes.set_facecolor("0.85")
    drawn = axes.imshow(wrong, cmap="Blues", vmin=0, vmax=top)
    figure.colorbar(drawn, ax=axes, label="% of the images of a class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    if k <= NAMED:
        names = [short(i, classes) for i in range(k)]
        axes.set_xticks(range(k), names, rotation=90, fontsize=8)
        axes.set_yticks(range(k), names, fontsize=8)
    for (y, x), count in np.ndenumerate(counts if k <= NUMBERED else counts[:0]):
        if count:
            colour = "white" if x != y and shares[y, x] > 0.6 * top else "black"
            axes.text(x, y, str(count), ha="center", va="center", fontsize=7.5, color=colour)
    return figure


@torch.no_grad()
def error_pages(model, data, split, predictions, count, about):
    """Figures of the `count` misclassified images of which the model was surest; none if all are right."""
    wrong = (predictions != split.labels.cpu()).nonzero().flatten()
    sure = torch.cat([m.softmax(dim=1).amax(dim=1).cpu() for _, m in _run(model, data, split, wrong)] or [wrong])
    order = sure.argsort(descending=True, stable=True)[:count]
    words = f"{about}; {len(wrong)} of {utils.counted(len(split), 'test image')} are wrong"
    per_page = ACROSS * DOWN
    for start in range(0, len(order), per_page):
        part = order[start : start + per_page]
        which = f"{words}, here {start + 1} to {start + len(part)}, the surest first"
        pictures = torch.cat([images for images, _ in _run(model, data, split, wrong[part])])
        yield _page(pictures, wrong[part], sure[part], data["classes"], predictions, split.labels, which)


def _run(model, data, split, numbers):
    """Batches of (images (B, 3, h, w) uint8 as the model saw them, logits (B, K)) of the images with these numbers."""
    if not len(numbers):
        return
    few, device = split.part(numbers.tolist()), next(model.parameters()).device
    with utils.full_precision():
        for images, _ in eval_batches(few, data, device, batch_size=256):
            shown = denormalise(images, data["mean"], data["std"]).round().to("cpu", torch.uint8)
            yield shown, model.eval()(images).float()


def _page(pictures, numbers, sure, classes, predictions, labels, about):
    rows = -(-len(pictures) // ACROSS)
    width, height = ACROSS * (SIDE + 0.16) + 0.5, 1.3 + rows * (SIDE + BELOW)
    reading = "Below each: its number among the test images, its class, and what the model takes it for (probability)."
    figure = headed_figure((width, height), "Misclassified images", about, reading)
    for n, picture in enumerate(pictures):
        row, column = divmod(n, ACROSS)
        left, bottom = 0.33 + column * (SIDE + 0.16), height - 0.8 - SIDE - row * (SIDE + BELOW)
        axes = figure.add_axes((left / width, bottom / height, SIDE / width, SIDE / height))
        axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_axis_off()
        i = int(numbers[n])
        true, taken = (short(int(k[i]), classes) for k in (labels, predictions))
        words = f"no. {i}\ntrue: {true}\nas: {taken} ({100 * float(sure[n]):.0f}%)"
        figure.text(left / width, (bottom - 0.04) / height, words, fontsize=7, va="top")
    return figure
