"""Train a Vision Transformer whose class and register tokens enter at blocks of your choice, then test it.

    python cifar_main.py --data_path ./data/CIFAR10 --model_path ./models/best_model.pth
    python cifar_main.py --data_set DIGITS --cls_pos 4 --reg_pos 2 --model_path ./models/late/model.pth  # no download
    python cifar_main.py --data_path ./my_photos --input_size 64 --patch_size 8 --model_path ./models/photos/model.pth

Each run has a folder of its own. The same command again tests the model that is now there. `--overwrite` trains anew,
`--resume` resumes, `--eval` only tests. On several GPUs: torchrun --nproc_per_node=4 cifar_main.py ...
"""

from pathlib import Path

import utils
from checkpoints.models import load_model
from cifar_test import test_model
from cifar_train import train_from_flags
from training import film, flags, run_folder
from training.run_log import print_what_was_written
from training.setup import build_model, check_same_model, describe, start
from utils import BadInput, say


def get_parser():
    parser = utils.ArgumentParser(
        description="Train a Vision Transformer whose tokens enter at chosen blocks, then test it.",
        epilog="The same command again tests the model that is there and changes nothing.",
    )
    flag = parser.add_argument_group("what to do").add_argument
    flag("--model_path", default="./models/best_model.pth", help="the best model is written here")
    flag("--output_dir", help="folder for checkpoint.pth, log.txt and the curves (default: the model's)")
    flag("--eval", action="store_true", help="only test the model at --model_path")
    flag("--overwrite", action="store_true", help="train anew though a model is there")
    flag("--resume", nargs="?", const="", metavar="FILE", help="resume from FILE, or the newest undamaged one")

    flags.add_small_image_flags(parser)
    return parser


def resolve(args):
    """Fill in the defaults that depend on other flags."""
    flags.resolve(args)
    args.output_dir = args.output_dir or str(Path(args.model_path).parent)
    if Path(args.model_path).is_dir():
        raise BadInput(f"--model_path {Path(args.model_path)} is a folder; give the name of a file in it")


def check_is_asked_for(args, data_given):
    """Refuse to test a model that is not what the flags ask for; all of them, or with --eval those that were given."""
    model, checkpoint = load_model(args.model_path)
    there = checkpoint["model_args"]
    wanted = build_model(args, there["num_classes"], "meta").model_args
    names = wanted | there  # what is off in one of the two is missing there
    if args.eval:
        names = flags.given_model_args(args).keys() - {"drop_path_rate"}  # has a default, and tests do not feel it
    wanted = {name: wanted.get(name) for name in names}
    if data_given or not args.eval:
        wanted["data_set"] = args.data_set
    advice = "give another --model_path, or --overwrite to train anew"
    check_same_model(args.model_path, checkpoint, wanted, advice)
    say(f"{args.model_path} ({describe(model)}): epoch {checkpoint['epoch']} of {checkpoint['args']['epochs']}")


def main(argv=None):
    args = flags.parse_with_recipe(get_parser(), argv)
    data_path, data_given = args.data_path, bool(args.data_path or args.data_set)
    resolve(args)
    device = start(args)
    begins = args.overwrite or args.resume is not None or not Path(args.model_path).is_file()
    trains = not args.eval and (begins or run_folder.started_again(args.output_dir))
    if trains:
        if run_folder.is_checkpoint(Path(args.model_path)):
            raise BadInput(f"--model_path {args.model_path} is what training writes to resume from; give another name")
        train_from_flags(args, device)
    else:
        check_is_asked_for(args, data_given)
        if not args.eval:
            running = run_folder.is_running(args.output_dir)
            what = "another process is training it" if running else "--overwrite trains anew, --resume resumes"
            say(f"It is only tested now: {what}.")
    test_model(args.model_path, data_path, device, args.batch_size, max_pixels=args.max_pixels)
    if trains:
        film.write_film(args)
        print_what_was_written(Path(args.output_dir), args.model_path)


if __name__ == "__main__":
    utils.run_script(main)
