"""Test a trained model. The checkpoint has everything: the model, the data, the normalisation.

    python cifar_test.py --model_path ./models/best_model.pth
    python cifar_test.py --model_path ./models/best_model.pth --predict ./photos  # images without labels
    python cifar_test.py --model_path ./models/best_model.pth --per_class --confusion --errors

Prints `Test accuracy: NN.NN% (top-5 NN.NN%) on N images of CIFAR10`. --confusion and --errors write pages into
--output_dir.
"""

from pathlib import Path

import utils
from checkpoints.models import load_model
from datasets import MAX_PIXELS
from inspection.inputs import names_of
from inspection.pages import write_pdf
from loading.decode import add_max_pixels
from training.errors import confusion_figure, error_pages, print_confusion
from training.predictions import write_predictions
from training.scoring import score
from utils import say


def test_model(
    model_path, data_path=None, device=None, batch_size=256, per_class=False, confusion=False, max_pixels=MAX_PIXELS,
    errors=0, output_dir="./errors",
) -> dict:  # fmt: skip
    """`score` a checkpoint and print the result; pages of `errors` misclassified images go into `output_dir`.

    Returns:
        What `evaluate` does; in a single process also `hits` (M,), whether each image was classified correctly.

    Raises:
        BadInput: no checkpoint of this project, or its images are not there.
    """
    folder = utils.writable_folder(output_dir) if confusion or errors else None
    model, checkpoint = load_model(model_path)
    data = checkpoint["data"]
    device = device or utils.pick_device()
    result, split = score(
        model, checkpoint, data_path, device, batch_size, keep_predictions=True, max_pixels=max_pixels
    )
    accuracy = f"{result['top1']:.2f}% (top-5 {result['top5']:.2f}%)"
    say(f"Test accuracy: {accuracy} on {result['images']} images of {data['name']}")
    if utils.world_size() == 1:
        result["hits"] = result["predictions"] == split.labels
    else:
        per_class = confusion = errors = False  # each process has a part of the predictions
    if per_class or confusion:
        from sklearn.metrics import confusion_matrix

        counts = confusion_matrix(split.labels, result["predictions"], labels=range(len(data["classes"])))
        print_confusion(counts, data["classes"], per_class, confusion)
    about = f"{names_of([model_path])[0]}: {accuracy} on {data['name']}"
    if confusion:
        write_pdf(iter([confusion_figure(counts, data["classes"], about)]), folder / "confusion.pdf")
        say(f"wrote {folder / 'confusion.pdf'}")
    if errors and result["hits"].all():
        say("No image is misclassified, so there are no pages of errors")
    elif errors:
        write_pdf(error_pages(model, data, split, result["predictions"], errors, about), folder / "errors.pdf")
        say(f"wrote {folder / 'errors.pdf'}")
    return result


def main(argv=None):
    parser = utils.ArgumentParser(description="Test a model that cifar_main.py trained, on its dataset's test images.")
    parser.add_argument("--model_path", default="./models/best_model.pth", help="checkpoint")
    parser.add_argument("--data_path", help="folder of the dataset, if it is not where it was in training")
    add_max_pixels(parser)
    parser.add_argument("--batch_size", type=utils.number(int, 1), default=256, help="images at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--per_class", action="store_true", help="print the accuracy of each class")
    parser.add_argument("--predict", metavar="FOLDER", help="classify the images in a folder in place of the test")
    parser.add_argument("--predictions", metavar="FILE", default="predictions.csv", help="CSV file of --predict")
    parser.add_argument("--confusion", action="store_true", help="print the confusion matrix, and draw it")
    parser.add_argument(
        "--errors", type=utils.number(int, 1), nargs="?", const=40, default=0, metavar="N", help="pages of the N "
        "misclassified images of which the model was surest (without N: 40)",
    )  # fmt: skip
    parser.add_argument("--output_dir", default="./errors", help="folder for confusion.pdf and errors.pdf")
    args = parser.parse_args(argv)
    device = utils.pick_device(args.device)
    if args.predict:
        model, checkpoint = load_model(args.model_path)
        path = Path(args.predictions)
        utils.writable_folder(path.parent)
        count = write_predictions(model, checkpoint, args.predict, path, device, args.batch_size, args.max_pixels)
        return say(f"{path}: predictions for {count} images")
    test_model(
        args.model_path, args.data_path, device, args.batch_size, args.per_class, args.confusion, args.max_pixels,
        args.errors, args.output_dir,
    )  # fmt: skip


if __name__ == "__main__":
    utils.run_script(main)
