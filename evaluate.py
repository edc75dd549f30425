"""Score a model on ImageNet's validation images, ReaL, V2, A, R, Sketch, or images of your own, in timm's columns.

    python evaluate.py --model_path timm:deit_small_patch16_224 --sets imagenet=/data/imagenet real=/data/imagenet
    torchrun --nproc_per_node=4 evaluate.py --model_path models/imagenet/best_checkpoint.pth --sets v2=/data/imagenetv2
    python evaluate.py --model_path models/best_model.pth --sets cifar10.1=/data/cifar10.1

A set is NAME=PATH: images in class folders, in tar files, or what else --data_path of main_distillation.py takes.
Writes results-NAME.csv, one for each set, with a row for each model.
"""

import re
from argparse import ArgumentTypeError

from timm.data import ImageNetInfo, infer_imagenet_subset

import utils
from checkpoints.models import load_model
from datasets import WHOLE_IMAGE
from inspection.foreign import SOURCES, create, data_of
from inspection.inputs import DEFAULT_MODEL, model_file
from loading.decode import THREADS, add_max_pixels
from training.evaluation_sets import FILES, read_set, result_row, score_set, write_results
from training.setup import on_channels_last
from utils import BadInput, number, say


def named_set(text):
    """An argparse type: 'NAME=PATH' -> (NAME, PATH)."""
    name, equals, path = text.partition("=")
    if not equals or not path or not re.fullmatch(r"[\w.-]+", name):
        raise ArgumentTypeError(f"{text!r} is no set; give NAME=PATH, as in imagenet=/data/imagenet")
    return name.lower(), path


def get_parser():
    parser = utils.ArgumentParser(description="Score a model on sets of images, in the columns of timm's results.")
    parser.add_argument(
        "--model_path", default=DEFAULT_MODEL, type=model_file, metavar="MODEL", help="checkpoint of this project, or "
        "a model of timm's: timm:NAME, hf-hub:USER/REPO or local-dir:FOLDER (default: best_model.pth, or else "
        "models/best_model.pth)",
    )  # fmt: skip
    parser.add_argument("--weights", metavar="FILE", help="for timm:NAME, in place of the weights that timm downloads")
    parser.add_argument(
        "--sets", nargs="+", required=True, type=named_set, metavar="NAME=PATH",
        help=f"{', '.join(FILES)}, or a name of your own",
    )  # fmt: skip
    parser.add_argument("--output_dir", default="results", help="for results-NAME.csv; rows of other models are kept")
    parser.add_argument("--name", help="of the model in the table (default: its name in timm, or its file)")
    parser.add_argument("--input_size", type=utils.image_size, help="of a model of timm's, pixels (default: its own)")
    parser.add_argument(
        "--eval_crop_ratio", type=number(float, 0, 1, above=0), help="share of the shorter side (default: the model's)"
    )
    parser.add_argument("--batch_size", type=number(int, 1), default=128, help="images at a time, in each process")
    parser.add_argument("--num_workers", type=number(int, 0, 1024), default=THREADS, help="reading processes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add_max_pixels(parser)
    return parser


def load(args):
    """(model in eval mode, description of its images with `crop_pct` and the names of its classes)."""
    if args.model_path.startswith(SOURCES):
        model = create(args.model_path, args.weights, args.input_size)
        data = data_of(model, args.input_size or model.pretrained_cfg["input_size"][1:])
        if subset := infer_imagenet_subset(model):
            data["classes"] = ImageNetInfo(subset).label_names()
    elif args.weights or args.input_size:
        raise BadInput("--weights and --input_size are for a model of timm's, as timm:NAME; leave them out")
    else:
        model, checkpoint = load_model(args.model_path)
        data = WHOLE_IMAGE | checkpoint["data"]
    if not data["classes"]:
        raise BadInput(f"the classes of {args.model_path} have no names; give a model of ImageNet's, or a checkpoint")
    return on_channels_last(model), data | ({"crop_pct": args.eval_crop_ratio} if args.eval_crop_ratio else {})


def main(argv=None):
    args = get_parser().parse_args(argv)
    names = [name for name, _ in args.sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(f"there are two sets {twice[0]}, and one results-{twice[0]}.csv; give each a name of its own")
    device = utils.pick_device(args.device)
    utils.init_distributed(device)
    model, data = load(args)
    name = args.name or args.model_path.removeprefix("timm:")
    sets = {name: read_set(name, path, data["classes"], args.max_pixels) for name, path in args.sets}
    model, folder = model.to(device), utils.writable_folder(args.output_dir)
    say(f"{name}\n{'set':12} {'images':>8} {'top-1':>7} {'top-5':>7}")
    files = []
    for each, (split, valid) in sets.items():
        result = score_set(model, data, split, valid, device, args.batch_size, args.num_workers)
        say(f"{each:12} {result['images']:8,} {result['top1']:7.2f} {result['top5']:7.2f}")
        if utils.is_main():
            files.append(write_results(folder, each, result_row(model, name, data, result)))
    say(f"wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    utils.run_script(main)
