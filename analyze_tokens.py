"""What the tokens of a trained model do, over many images: norms, artefacts, attention, what can be read off them.

    python analyze_tokens.py --model_path ./models/best_model.pth --output_dir ./analysis
    python analyze_tokens.py --model_path ./models/best_model.pth --ablate registers cls_attention_to_registers
    python analyze_tokens.py --model_path foreign.pth --num_heads 6 --image_path my_photos

Images of the checkpoint's test set, drawn at random, or those of --image_path (without classes: no read-outs, no
ablation). Writes analysis.json with every figure and analysis.pdf with a page each, and prints a table.
"""

import json
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from inspection import inputs, interventions
from inspection.statistics import TokenStatistics, probe_accuracies
from inspection.statistics_pages import data_name, draw_pages
from training.run_log import environment
from training.setup import describe
from utils import BadInput, number, say

BATCH = 64
ATTENTION = 16_000_000  # numbers in the attention of a batch, at most (but for one image)


def batches_of(pictures, model, data, device, failed):
    """A function: () -> (images, labels or None) batches, read as they are needed; `failed`: see `looking.readable`."""
    tokens = max(model.token_layout(i).length for i in range(model.depth))
    size = max(1, min(BATCH, ATTENTION // (model.model_args["num_heads"] * tokens**2)))

    def batches():
        there = inputs.readable(pictures, failed)
        while part := list(islice(there, size)):
            images = inputs.model_input([picture.read() for picture in part], part, data, device)
            labels = None if part[0].label is None else torch.tensor([p.label for p in part], device=device)
            yield images, labels

    return batches


def chosen_pictures(args, data, checkpoint):
    """--num_images of the images, in random order: a part of one class folder after another would be of few classes."""
    found = inputs.find_images(args, data, checkpoint)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(args.seed)).tolist()
    found = [found[i] for i in order[: args.num_images or None]]
    if args.ablate and found[0].label is None:
        raise BadInput("--ablate compares accuracies, and the images of --image_path have no classes; give --data_path")
    if args.ablate and len(found) < 2:
        raise BadInput("--ablate takes what another image has, and there is only one; raise --num_images")
    return found


@utils.full_precision()
def analyze(args) -> dict:
    """The figures that go to analysis.json."""
    device = utils.pick_device(args.device)
    model, data, checkpoint = inputs.load(args.model_path, args)
    if args.ablate:
        interventions.check(model, args.ablate)
    found = chosen_pictures(args, data, checkpoint)
    folder = utils.writable_folder(args.output_dir)
    failed = []
    batches = batches_of(found, model.to(device), data, device, failed)
    statistics, right = TokenStatistics(model, args.readout_images), 0
    with tqdm(total=len(found), desc="analysing", unit="image", leave=False, disable=None) as bar:
        for images, labels in batches():
            logits = statistics.add(images, labels)
            right += 0 if labels is None or not model.num_classes else int((logits.argmax(dim=1) == labels).sum())
            bar.update(len(images))
    if args.ablate and statistics.images < 2:
        raise BadInput(f"--ablate takes what another image has, and only one can be read; {failed[0]}")
    labelled = found[0].label is not None
    figures = {
        "model": {"path": str(args.model_path), "is": describe(model), "args": model.model_args},
        "data": {
            "name": data["name"], "images": len(found), "seed": args.seed, "input_size": list(data["input_size"]),
            "image_path": args.image_path, "chosen": [picture.name for picture in found[:10]], "left_out": failed,
        },
        "accuracy": 100 * right / statistics.images if labelled and model.num_classes else None,
        **statistics.result(),
        "readout": probe_accuracies(statistics.features, statistics.labels, model.depth) if statistics.labels else None,
        "ablation": interventions.ablate(model, batches, args.ablate) if args.ablate else None,
        "environment": environment(device),
    }  # fmt: skip
    write(figures, folder)
    return figures


def write(figures, folder: Path):
    text = json.dumps(figures, indent=1, allow_nan=False)
    utils.write_atomically(folder / "analysis.json", lambda file: file.write(text.encode()))
    draw_pages(figures, folder / "analysis.pdf")


# The table -------------------------------------------------------------------------------------------------------


def table(figures) -> str:
    """A line a block; '-' where a token is absent."""
    norms, readout = figures["norms"], figures["readout"]
    columns = {"block": [str(i) for i in range(len(figures["tokens"]))], "tokens": [str(n) for n in figures["tokens"]]}

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
    add("artefacts", [100 * found["share"] for found in figures["artefacts"]["blocks"]], "{:.2f}%")
    add("distance", mean(figures["distance"]), "{:.1f}px")
    add("CLS entropy", mean(figures["entropy"].get("cls", ())), "{:.2f}")
    for kind, title in (("patches", "patches"), ("registers", "registers"), ("cls", "itself"), ("dist", "dist")):
        shares = mean(figures["cls_attention"].get(kind, ()))
        add(f"CLS to {title}", [None if share is None else 100 * share for share in shares], "{:.1f}%")
    for token, values in (readout or {"linear": {}})["linear"].items():
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


def report(figures, folder):
    """Print the table, and in words what does not fit in it."""
    accuracy = "" if figures["accuracy"] is None else f"; {figures['accuracy']:.2f}% of them are classified right"
    say(f"{figures['model']['is']}; {figures['images']} images of {data_name(figures)}{accuracy}")
    say()
    say(table(figures))
    say()
    begins = figures["artefacts"]["begins_at_block"]
    say("Artefacts: none at any block" if begins is None else f"Artefacts: from block {begins} on")
    for kind in interventions.KINDS if figures["ablation"] else ():
        if kind in figures["ablation"]:
            changes = (f"{name} {f['accuracy']:.2f}%" for name, f in figures["ablation"][kind].items())
            say(f"Accuracy with {kind} replaced: {', '.join(changes)}; as it is {figures['ablation']['clean']:.2f}%")
    if figures["readout"] is None:
        say("No read-outs: they need images with classes, 5 of a class (see --num_images, --readout_images)")
    say(f"wrote {folder / 'analysis.json'} and {folder / 'analysis.pdf'}")


def main(argv=None):
    parser = utils.ArgumentParser(description="Measure what the tokens of a trained model do, over many images.")
    parser.add_argument("--output_dir", default="./analysis", help="folder for analysis.json and analysis.pdf")
    inputs.add_image_flags(parser)
    parser.add_argument("--num_images", type=number(int, 0), default=1000, help="how many, at random; 0: all")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of that choice")
    parser.add_argument(
        "--readout_images", type=number(int, 0), default=1000, help="of how many of them the class is read off the "
        "tokens; their tokens are kept in memory; 0: no read-outs",
    )  # fmt: skip
    parser.add_argument(
        "--ablate", nargs="+", choices=interventions.KINDS, help="also the accuracy with these replaced by zero, by "
        "the mean over images and by another image's",
    )  # fmt: skip
    inputs.add_checkpoint_flags(parser)
    args = parser.parse_args(argv)
    figures = analyze(args)
    report(figures, Path(args.output_dir))
    inputs.report_failed(figures["data"]["left_out"], figures["data"]["images"])


if __name__ == "__main__":
    utils.run_script(main)
