"""Test a trained model. The checkpoint has everything: the model, the data, the normalisation.

    python cifar_test.py --model_path ./models/best_model.pth
    python cifar_test.py --model_path ./models/best_model.pth --per_class --confusion
    python cifar_test.py --model_path ./models/best_model.pth --predict ./photos  # images without labels

Prints `Test accuracy: NN.NN% (top-5 NN.NN%) on N images of CIFAR10`.
"""

from pathlib import Path

import utils
from checkpoints.models import load_model
from datasets import MAX_PIXELS
from loading.decode import add_max_pixels
from training.predictions import write_predictions
from training.scoring import score
from utils import say


def test_model(
    model_path, data_path=None, device=None, batch_size=256, per_class=False, confusion=False, max_pixels=MAX_PIXELS
) -> dict:  # fmt: skip
    """`score` a checkpoint and print the result.

    Returns:
        What `evaluate` does; in a single process also `hits` (M,), whether each image was classified correctly.

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

    counts = confusion_matrix(labels, predictions, labels=range(len(classes)))
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


def predict(args, device):
    """Write what the model of `--model_path` takes the images in a folder for."""
    model, checkpoint = load_model(args.model_path)
    path = Path(args.predictions)
    utils.writable_folder(path.parent)
    count = write_predictions(model, checkpoint, args.predict, path, device, args.batch_size, args.max_pixels)
    say(f"{path}: predictions for {count} images")


def main(argv=None):
    parser = utils.ArgumentParser(description="Test a model that cifar_main.py trained, on its data set's test images.")
    parser.add_argument("--model_path", default="./models/best_model.pth", help="checkpoint")
    parser.add_argument("--data_path", help="folder of the data set, if it is not where it was in training")
    add_max_pixels(parser)
    parser.add_argument("--batch_size", type=utils.number(int, 1), default=256, help="images at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--per_class", action="store_true", help="print the accuracy of each class")
    parser.add_argument("--confusion", action="store_true", help="print the confusion matrix")
    parser.add_argument("--predict", metavar="FOLDER", help="classify the images in a folder in place of the test")
    parser.add_argument("--predictions", metavar="FILE", default="predictions.csv", help="CSV file of --predict")
    args = parser.parse_args(argv)
    device = utils.pick_device(args.device)
    if args.predict:
        return predict(args, device)
    test_model(
        args.model_path, args.data_path, device, args.batch_size, args.per_class, args.confusion, args.max_pixels
    )  # fmt: skip


if __name__ == "__main__":
    utils.run_script(main)
