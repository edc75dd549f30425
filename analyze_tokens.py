"""Statistics of the tokens of a trained model over many images: norms, artefacts, attention, linear and kNN probes.

    python analyze_tokens.py --model_path ./models/best_model.pth --output_dir ./analysis
    python analyze_tokens.py --model_path ./models/best_model.pth --ablate registers cls_attention_to_registers
    python analyze_tokens.py --model_path foreign.pth --num_heads 6 --image_path my_photos

Images of the checkpoint's test set, drawn at random, or those of --image_path (without classes: no probes, no
ablation). Writes analysis.json with all numbers and analysis.pdf with a page for each statistic, and prints a table.
"""

import json
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from inspection import inputs, interventions
from inspection.statistics import TokenStatistics, probe_accuracies
from inspection.statistics_pages import data_name, write_statistics_pages
from training.run_log import environment
from training.setup import describe
from utils import BadInput, number, say

BATCH = 64
ATTENTION = 16_000_000  # elements of the attention of a batch, at most (unless it is of one image)


def batches_of(found, model, data, device, failed):
    """A function: () -> batches of (images, labels or None), read when needed; `failed`: see `inputs.readable`."""
    tokens = max(model.token_layout(i).length for i in range(model.depth))
    size = max(1, min(BATCH, ATTENTION // (model.model_args["num_heads"] * tokens**2)))

    def batches():
        images_left = inputs.readable(found, failed)
        while part := list(islice(images_left, size)):
            images = inputs.model_input([image.read() for image in part], part, data, device)
            labels = None if part[0].label is None else torch.tensor([image.label for image in part], device=device)
            yield images, labels

    return batches


def choose_images(args, data, checkpoint):
    """--num_images of the images, in random order, since files come class by class."""
    found = inputs.find_images(args, data, checkpoint)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(args.seed)).tolist()
    found = [found[i] for i in order[: args.num_images or None]]
    if args.ablate and found[0].label is None:
        raise BadInput("--ablate compares accuracies, and the images of --image_path have no classes; give --data_path")
    if args.ablate and len(found) < 2:
        raise BadInput("--ablate needs at least two images; raise --num_images, or give more")
    return found


@utils.full_precision()
def analyze(args) -> dict:
    """The content of analysis.json."""
    device = utils.pick_device(args.device)
    model, data, checkpoint = inputs.load(args.model_path, args)
    if getattr(model, "cls_only", False):
        raise BadInput(f"in {model.name} only CLS attends in the blocks that can be seen; see visualize_attention.py")
    if args.ablate:
        interventions.check(model, args.ablate)
    found = choose_images(args, data, checkpoint)
    folder = utils.writable_folder(args.output_dir)
    failed = []
    batches = batches_of(found, model.to(device), data, device, failed)
    statistics, correct = TokenStatistics(model, args.readout_images), 0
    with tqdm(total=len(found), desc="analysing", unit="image", leave=False, disable=None) as bar:
        for images, labels in batches():
            logits = statistics.add(images, labels)
            correct += 0 if labels is None or not model.num_classes else int((logits.argmax(dim=1) == labels).sum())
            bar.update(len(images))
    if args.ablate and statistics.images < 2:
        raise BadInput(f"--ablate needs at least two images, and only one can be read; {failed[0]}")
    labelled = found[0].label is not None
    results = {
        "model": {"path": str(args.model_path), "is": describe(model), "args": model.model_args},
        "data": {
            "name": data["name"], "images": len(found), "seed": args.seed, "input_size": list(data["input_size"]),
            "image_path": args.image_path, "chosen": [image.name for image in found[:10]], "left_out": failed,
        },
        "accuracy": 100 * correct / statistics.images if labelled and model.num_classes else None,
        **statistics.result(),
        "readout": probe_accuracies(statistics.features, statistics.labels, model.depth) if statistics.labels else None,
        "ablation": interventions.ablate(model, batches, args.ablate) if args.ablate else None,
        "environment": environment(device),
    }  # fmt: skip
    text = json.dumps(results, indent=1, allow_nan=False)
    utils.write_atomically(folder / "analysis.json", lambda file: file.write(text.encode()))
    write_statistics_pages(results, folder / "analysis.pdf")
    return results


def table(results) -> str:
    """A line per block; '-' where a token is absent."""
    norms = results["norms"]
    columns = {"block": [str(i) for i in range(len(results["tokens"]))], "tokens": [str(n) for n in results["tokens"]]}

    def add(title, values, form):
        if any(value is not None for value in values):
            columns[title] = ["-" if value is None else form.format(value) for value in values]

    def mean(values):
        return [None if heads is None else sum(heads) / len(heads) for heads in values]

    def middle(kind):
        return [None if found is None else found["quantiles"]["0.5"] for found in norms.get(kind, ())]

    add("patch norm", middle("patches"), "{:.1f}")
    add("CLS norm", middle("cls"), "{:.1f}")
    add("reg norm", middle("registers"), "{:.1f}")
    add("artefacts", [100 * found["share"] for found in results["artefacts"]["blocks"]], "{:.2f}%")
    add("distance", mean(results["distance"]), "{:.1f}px")
    add("CLS entropy", mean(results["entropy"].get("cls", ())), "{:.2f}")
    for kind, title in (("patches", "patches"), ("registers", "registers"), ("cls", "itself"), ("dist", "dist")):
        shares = mean(results["cls_attention"].get(kind, ()))
        add(f"CLS to {title}", [None if share is None else 100 * share for share in shares], "{:.1f}%")
    for token, values in (results["readout"] or {"linear": {}})["linear"].items():
        add(f"linear: {token}", values, "{:.1f}%")
    return "\n".join(_lines(columns))


def _lines(columns) -> list[str]:
    """Columns under titles of up to three lines."""
    heads = {title: title.split(" ") for title in columns}
    height = max(map(len, heads.values()))
    heads = {title: [""] * (height - len(parts)) + parts for title, parts in heads.items()}
    widths = {title: max(map(len, [*heads[title], *values])) for title, values in columns.items()}
    rows = [[heads[title][line] for title in columns] for line in range(height)]
    rows += list(zip(*columns.values()))
    return ["  ".join(value.rjust(widths[title]) for title, value in zip(columns, row)) for row in rows]


def report(results, folder):
    """Print the table, the ablation, and where the files are."""
    accuracy = "" if results["accuracy"] is None else f"; {results['accuracy']:.2f}% of them are classified correctly"
    say(f"{results['model']['is']}; {results['images']} images of {data_name(results)}{accuracy}")
    say()
    say(table(results))
    say()
    begins = results["artefacts"]["begins_at_block"]
    say("Artefacts: none" if begins is None else f"Artefacts: from block {begins} on")
    for kind in interventions.KINDS if results["ablation"] else ():
        if kind in results["ablation"]:
            changes = (f"{name} {f['accuracy']:.2f}%" for name, f in results["ablation"][kind].items())
            say(f"Accuracy with {kind} replaced: {', '.join(changes)}; unchanged {results['ablation']['clean']:.2f}%")
    if results["readout"] is None:
        say("No probes: they need images with classes, 5 per class (see --num_images, --readout_images)")
    say(f"wrote {folder / 'analysis.json'} and {folder / 'analysis.pdf'}")


def main(argv=None):
    parser = utils.ArgumentParser(description="Measure the tokens of a trained model over many images.")
    parser.add_argument("--output_dir", default="./analysis", help="folder for analysis.json and analysis.pdf")
    inputs.add_image_flags(parser)
    parser.add_argument("--num_images", type=number(int, 0), default=1000, help="number of images, at random; 0: all")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of that random choice")
    parser.add_argument(
        "--readout_images", type=number(int, 0), default=1000, help="number of images for the linear and kNN "
        "probes of the tokens, which are kept in memory; 0: no probes",
    )  # fmt: skip
    parser.add_argument(
        "--ablate", nargs="+", choices=interventions.KINDS, help="also the accuracy with these replaced by zero, by "
        "the mean over images and by the values of another image",
    )  # fmt: skip
    inputs.add_checkpoint_flags(parser)
    args = parser.parse_args(argv)
    results = analyze(args)
    report(results, Path(args.output_dir))
    inputs.report_failed(results["data"]["left_out"], results["data"]["images"])


if __name__ == "__main__":
    utils.run_script(main)
