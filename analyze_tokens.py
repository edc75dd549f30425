"""Statistics of the tokens of a trained model over many images: norms, artefacts, attention, linear and kNN probes.

    python analyze_tokens.py --model_path ./models/best_model.pth --output_dir ./analysis
    python analyze_tokens.py --model_path ./models/best_model.pth --ablate registers cls_attention_to_registers
    python analyze_tokens.py --model_path foreign.pth --num_heads 6 --image_path my_photos

Images of the checkpoint's test set, drawn at random, or those of --image_path (without classes: no probes, no
ablation). Writes analysis.json with all numbers and analysis.pdf with a page for each statistic, and prints a table.
"""

import json
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from inspection import causes, dense, inputs, interventions, lens, outputs, sinks, test_time_registers, truth
from inspection.pages import write_pdf
from inspection.statistics import TokenStatistics, probe_accuracies
from inspection.statistics_pages import about, statistics_pages, where_artefacts
from training.run_log import environment
from training.setup import describe
from utils import BadInput, number, say

STATISTICS = ("norms", "attention")  # of one pass; see inspection/statistics.py
# Each with `measure`, `page`, `lines`, and `check(model)` where a model may lack what it needs.
PARTS = {"causes": causes, "outputs": outputs, "sinks": sinks, "lens": lens, "dense": dense}
DEFAULT = ("norms", "attention", "outputs", "sinks", "lens")  # a minute for 1,000 small images on 2 cores
BATCH = 64
COLUMNS = 100  # of the printed table, in characters
ATTENTION = 16_000_000  # elements of the attention of a batch, at most (unless it is of one image)


def batch_size(model) -> int:
    tokens = max(model.token_layout(i).length for i in range(model.depth))
    return max(1, min(BATCH, ATTENTION // (model.model_args["num_heads"] * tokens**2)))


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
    own = model.to(device)
    model = test_time_registers.from_flags(args, own, data, found, checkpoint)
    is_what = describe(own) + (f", {model}" if model is not own else "")
    parts, folder, failed = chosen_parts(args, model), utils.writable_folder(args.output_dir), []
    annotated = truth.find_truth(args, data, found) if "dense" in parts else None
    batches = partial(inputs.batches, found, failed, data, device, batch_size(model))
    results = {
        "model": {"path": str(args.model_path), "is": is_what, "args": model.model_args},
        "data": {
            "name": data["name"], "images": len(found), "seed": args.seed, "input_size": list(data["input_size"]),
            "image_path": args.image_path, "chosen": [image.name for image in found[:10]], "left_out": failed,
        },
        "what": [*(name for name in STATISTICS if name in args.what), *parts], "refused": [],
    }  # fmt: skip
    if set(STATISTICS) & set(args.what):
        results |= measure_statistics(args, model, batches, len(found))
    options = {
        "causes": {"images": args.causes_images, "epsilon": args.epsilon, "seed": args.seed},
        "dense": {"truth": annotated, "patches": args.dense_patches, "seed": args.seed},
        "sinks": dict(zip(("queries", "attention", "nop", "broadcast"), args.sink)),
    }
    for name, part in list(parts.items()):
        try:
            results[name] = part.measure(model, batches, **options.get(name, {}))
        except BadInput as error:  # which only measuring can find
            if results["what"] == [name]:
                raise
            results["what"].remove(name)
            results["refused"].append(str(error))
            del parts[name]
            continue
        results.setdefault("images", results[name]["images"])
    if args.ablate and results["images"] < 2:
        raise BadInput(f"--ablate needs at least two images, and only one can be read; {failed[0]}")
    results["ablation"] = interventions.ablate(model, batches, args.ablate) if args.ablate else None
    results["environment"] = environment(device)
    utils.write_text(folder / "analysis.json", json.dumps(results, indent=1, allow_nan=False))
    of_parts = (part.page(results[name], about(results)) for name, part in parts.items())
    write_pdf(chain(statistics_pages(results), of_parts), folder / "analysis.pdf")
    return results


def chosen_parts(args, model) -> dict:
    """The parts of --what that this model has; raises BadInput for one that was asked for and that it has not."""
    chosen = {name: PARTS[name] for name in args.what if name in PARTS}
    for name, part in list(chosen.items()):
        try:
            if hasattr(part, "check"):
                part.check(model)
        except BadInput as error:
            if args.what is not DEFAULT:
                raise
            say(f"note: {error}")
            del chosen[name]
    return chosen


def measure_statistics(args, model, batches, count) -> dict:
    """Norms, attention, accuracy and probes, from one pass."""
    statistics, correct, labelled = TokenStatistics(model, args.readout_images), 0, False
    with tqdm(total=count, desc="analysing", unit="image", leave=False, disable=None) as bar:
        for images, labels in batches():
            logits, labelled = statistics.add(images, labels), labels is not None
            correct += int((logits.argmax(dim=1) == labels).sum()) if labelled and model.num_classes else 0
            bar.update(len(images))
    return {
        "accuracy": 100 * correct / statistics.images if labelled and model.num_classes else None,
        **statistics.result(),
        "readout": probe_accuracies(statistics.features, statistics.labels, model.depth) if statistics.labels else None,
    }


def table(results) -> str:
    """A line per block; '-' where a token is absent. Columns that `COLUMNS` has no room for stand in a table below."""
    norms, shares = results["norms"], results["cls_attention"]

    def mean(values):
        return [heads and sum(heads) / len(heads) for heads in values]

    def median(kind):
        return [found and found["quantiles"]["0.5"] for found in norms.get(kind, ())]

    columns = {  # values and their format
        "tokens": (results["tokens"], "{}"),
        "patch norm": (median("patches"), "{:.1f}"),
        "CLS norm": (median("cls"), "{:.1f}"),
        "reg norm": (median("registers"), "{:.1f}"),
        "artefacts": ([100 * found["share"] for found in results["artefacts"]["blocks"]], "{:.2f}%"),
        "distance": (mean(results["distance"]), "{:.1f}px"),
        "CLS entropy": (mean(results["entropy"].get("cls", ())), "{:.2f}"),
    }
    for kind, title in (("patches", "patches"), ("registers", "registers"), ("cls", "itself"), ("dist", "dist")):
        columns[f"CLS to {title}"] = [share and 100 * share for share in mean(shares.get(kind, ()))], "{:.1f}%"
    for token, values in (results["readout"] or {"linear": {}})["linear"].items():
        columns[f"linear: {token}"] = values, "{:.1f}%"
    tables, block = [], {"block": [str(i) for i in range(len(results["tokens"]))]}
    for title, (values, form) in columns.items():
        texts = ["-" if value is None else form.format(value) for value in values]
        if set(texts) <= {"-"}:
            continue
        if not tables or max(map(len, _lines(tables[-1] | {title: texts}))) > COLUMNS:
            tables.append(dict(block))
        tables[-1][title] = texts
    return "\n\n".join("\n".join(_lines(columns)) for columns in tables)


def _lines(columns) -> list[str]:
    """Columns under titles of several lines."""
    heads = {title: title.split(" ") for title in columns}
    height = max(map(len, heads.values()))
    heads = {title: [""] * (height - len(parts)) + parts for title, parts in heads.items()}
    widths = {title: max(map(len, [*heads[title], *values])) for title, values in columns.items()}
    rows = [[heads[title][line] for title in columns] for line in range(height)]
    rows += list(zip(*columns.values()))
    return ["  ".join(value.rjust(widths[title]) for title, value in zip(columns, row)) for row in rows]


def report(results, folder):
    """Print the table, the ablation, and where the files are."""
    accuracy = results.get("accuracy")
    words = "" if accuracy is None else f"; {accuracy:.2f}% of them are classified correctly"
    say(f"{about(results)}{words}")
    if "norms" in results:
        say(f"\n{table(results)}\n")
        say(f"Artefacts: {where_artefacts(results['artefacts'])}")
    for name in results["what"]:
        for line in PARTS[name].lines(results[name]) if name in PARTS else ():
            say(line)
    ablation = results["ablation"] or {}
    for kind in filter(ablation.get, interventions.KINDS):
        changes = ", ".join(f"{name} {found['accuracy']:.2f}%" for name, found in ablation[kind].items())
        say(f"Accuracy with {kind} replaced: {changes}; unchanged {ablation['clean']:.2f}%")
    if "norms" in results and results["readout"] is None:
        say("No probes: they need images with classes, 5 per class (see --num_images, --readout_images)")
    say(f"wrote {folder / 'analysis.json'} and {folder / 'analysis.pdf'}")


def main(argv=None):
    parser = utils.ArgumentParser(description="Measure the tokens of a trained model over many images.")
    flag = parser.add_argument
    flag("--output_dir", default="./analysis", help="folder for analysis.json and analysis.pdf")
    inputs.add_image_flags(parser)
    flag("--num_images", type=number(int, 0), default=1000, help="number of images, at random; 0: all")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of that random choice")
    flag("--readout_images", type=number(int, 0), default=1000, help="number of images for the linear and kNN probes "
         "of the tokens, which are kept in memory; 0: no probes")  # fmt: skip
    flag("--ablate", nargs="+", choices=interventions.KINDS, help="also the accuracy with these replaced by zero, by "
         "the mean over images and by the values of another image")  # fmt: skip
    flag("--what", nargs="+", choices=(*STATISTICS, *PARTS), default=DEFAULT, help="what to measure; causes takes a "
         f"forward pass for each block and replacement (default: {' '.join(DEFAULT)})")  # fmt: skip
    flag("--causes_images", type=number(int, 0), default=256, help="images for causes; 0: all")
    flag("--epsilon", type=number(float, 0), default=1.0,
         help="points of top-1 up to which a replacement is harmless")  # fmt: skip
    flag("--sink", type=number(float, 0), nargs=4, default=(0.9, 0.5, 0.2, 0.5), metavar="SHARE", help="of sinks: the "
         "queries, their attention, and the norms up to which it is a NOP, from which a broadcast")  # fmt: skip
    flag("--dense_patches", type=number(int, 1), default=32, help="of an image, kept for dense's probes")
    truth.add_flags(parser)
    test_time_registers.add_flags(parser)
    inputs.add_checkpoint_flags(parser)
    args = parser.parse_args(argv)
    results = analyze(args)
    report(results, Path(args.output_dir))
    inputs.report_failed(results["data"]["left_out"], results["data"]["images"])
    if refused := "; ".join(results["refused"]):
        if args.what is not DEFAULT:
            raise BadInput(f"all but this is measured: {refused}")
        say(f"note: {refused}")


if __name__ == "__main__":
    utils.run_script(main)
