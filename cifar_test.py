"""Test a trained model. The checkpoint says everything: the model, the data, the normalisation.

    python cifar_test.py --model_path ./models/best_model.pth
    python cifar_test.py --model_path ./models/best_model.pth --per_class --confusion

Prints `Test accuracy: NN.NN% (top-5 NN.NN%) on N images of CIFAR10`.
"""

import os

import torch

import flags
import utils
from datasets import MAX_PIXELS, Loader, PictureLoader, check_classes, find_split, read_split
from engine import evaluate
from models_dynamic import model_from_checkpoint
from utils import BadInput, say


def load_model(path):
    """(model in eval mode, checkpoint) from a checkpoint of this project. Raises BadInput if it is none."""
    checkpoint = utils.load_checkpoint(path)
    lacks = {"model", "model_args", "data", "args", "epoch"} - checkpoint.keys()
    if lacks:
        raise BadInput(f"{path} was not written by this project's training: it lacks {', '.join(sorted(lacks))}")
    try:
        return model_from_checkpoint(checkpoint), checkpoint
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None


def data_folder(checkpoint, given):
    """The folder of a checkpoint's images: `given`, else the one that the checkpoint names. None: the usual one.

    Raises BadInput where CIFAR would be downloaded to a folder that only the checkpoint names.
    """
    path, name = checkpoint.get("args", {}).get("data_path"), checkpoint["data"]["name"]
    if given or path is None:
        return given
    if name in ("CIFAR10", "CIFAR100"):
        import torchvision

        folder = os.path.join(path, getattr(torchvision.datasets, name).base_folder)
        if not os.path.isdir(folder):
            raise BadInput(f"there is no {folder}, where training had the images; give --data_path")
    return path


def score(
    model, checkpoint, data_path, device, batch_size, workers=0, keep_predictions=False, max_pixels=MAX_PIXELS
):  # fmt: skip
    """Score `model` on the test images of a checkpoint's data set, every image once, in full precision.

    Returns:
        `evaluate`'s figures, and the true labels of all images.
    """
    data, path = checkpoint["data"], data_folder(checkpoint, data_path)
    share = dict(batch_size=batch_size, rank=utils.rank(), world_size=utils.world_size())
    if "crop_pct" in data:
        split, classes = find_split(data["name"], path, False, data, max_pixels)
        batches = PictureLoader(split, data, device=device, workers=workers, **share)
    else:
        split, classes = read_split(data["name"], path, False, data["input_size"], data, max_pixels)
        batches = Loader(split.to(device), data, **share)
    check_classes(classes, data["classes"], "the test images", "the model")
    there = data.get("images", {}).get("test", len(split))
    if len(split) != there:
        say(f"note: {len(split)} test images are here, {there} were there in training")
    return evaluate(model.to(device), batches, keep_predictions), split.labels


def test_model(
    model_path, data_path=None, device=None, batch_size=256, per_class=False, confusion=False, max_pixels=MAX_PIXELS
) -> dict:  # fmt: skip
    """`score` a checkpoint and print the result.

    Returns:
        `evaluate`'s figures; in a single process also `hits` (M,), whether each image was classified correctly.

    Raises:
        BadInput: no checkpoint of this project, or its images are not there.
    """
    model, checkpoint = load_model(model_path)
    data = checkpoint["data"]
    result, labels = score(
        model, checkpoint, data_path, device or utils.pick_device(), batch_size, 0, True, max_pixels
    )  # fmt: skip
    accuracy = f"{result['top1']:.2f}% (top-5 {result['top5']:.2f}%)"
    say(f"Test accuracy: {accuracy} on {result['images']} images of {data['name']}")
    if utils.world_size() == 1:
        result["hits"] = result["predictions"] == labels
    if (per_class or confusion) and utils.world_size() == 1:
        _print_confusion(labels, result["predictions"], data["classes"], per_class, confusion)
    return result


def _print_confusion(labels, predictions, classes, per_class, confusion):
    from sklearn.metrics import confusion_matrix

    counts = torch.from_numpy(confusion_matrix(labels, predictions, labels=range(len(classes))))
    classes = [utils.printable(name) for name in classes]
    width = max(map(len, classes))
    if per_class:
        print("\nAccuracy of each class")
        for name, row, right in zip(classes, counts, counts.diagonal().tolist()):
            total = int(row.sum())
            print(f"  {name:{width}}  {100 * right / max(total, 1):6.2f}%  ({right} of {total})")
    if confusion:
        cell = max(4, len(str(int(counts.max()))) + 1)
        print("\nConfusion matrix: rows are true classes, columns the predicted ones in the same order")
        for name, row in zip(classes, counts.tolist()):
            print(f"  {name:{width}} " + "".join(f"{n:{cell}}" for n in row))


def main(argv=None):
    parser = utils.ArgumentParser(description="Test a model that cifar_main.py trained, on its data set's test images.")
    parser.add_argument("--model_path", default="./models/best_model.pth", help="checkpoint")
    parser.add_argument("--data_path", help="folder of the data set, if it is not where it was in training")
    flags.add_max_pixels(parser)
    parser.add_argument("--batch_size", type=utils.number(int, 1), default=256, help="images at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--per_class", action="store_true", help="print the accuracy of each class")
    parser.add_argument("--confusion", action="store_true", help="print the confusion matrix")
    args = parser.parse_args(argv)
    device = utils.pick_device(args.device)
    test_model(
        args.model_path, args.data_path, device, args.batch_size, args.per_class, args.confusion, args.max_pixels
    )  # fmt: skip


if __name__ == "__main__":
    utils.run_script(main)
