"""Train a Vision Transformer whose class and register tokens enter at blocks of your choice, then test it.

    python cifar_main.py --data_path ./data/CIFAR10 --model_path ./models/best_model.pth
    python cifar_main.py --data_set DIGITS --cls_pos 4 --reg_pos 2 --model_path ./models/late.pth   # needs no download
    python cifar_main.py --data_path ./my_photos --input_size 64 --patch_size 8                     # train/ and test/

The same command again tests the model that is now there. `--overwrite` trains anew, `--resume` goes on, `--eval` only
tests. On several GPUs: torchrun --nproc_per_node=4 cifar_main.py ...
"""

from pathlib import Path

import flags
import training_maps
import utils
from cifar_test import load_model, test_model
from cifar_train import train_model
from datasets import DATA_SETS, detect_data_set, load_data
from models_dynamic import SIZES
from utils import BadInput, number, say


def get_parser():
    parser = utils.ArgumentParser(
        description="Train a Vision Transformer whose tokens enter at chosen blocks, then test it.",
        epilog="The same command again tests the model that is there and changes nothing.",
    )
    group = parser.add_argument_group("what to do")
    group.add_argument("--model_path", default="./models/best_model.pth", help="the best model is written here")
    group.add_argument("--output_dir", help="folder for checkpoint.pth, log.txt and the curves (default: the model's)")
    group.add_argument("--eval", action="store_true", help="only test the model at --model_path")
    group.add_argument("--overwrite", action="store_true", help="train anew though a model is there")
    group.add_argument(
        "--resume", nargs="?", const="", metavar="FILE", help="go on from checkpoint.pth in --output_dir, or from FILE"
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_set", choices=DATA_SETS, type=str.upper, help="default: what --data_path holds, or its name, or CIFAR10"
    )
    group.add_argument("--data_path", help="default: ./data/CIFAR10 or ./data/CIFAR100; downloaded there if absent")
    group.add_argument(
        "--val_size", type=number(float, 0), help="training images to hold out for choosing the best epoch, a share "
        "or a number; 0: the last epoch is the result (default: 5000 for CIFAR, else 0.1)",
    )  # fmt: skip
    group.add_argument(
        "--aug",
        choices=("trivial", "rand", "none"),
        help="TrivialAugment or RandAugment (default: trivial; none for DIGITS)",
    )
    group.add_argument(
        "--hflip", type=number(float, 0, 1), help="probability of a mirror image (default: 0.5; 0 for DIGITS)"
    )
    group.add_argument("--reprob", type=number(float, 0, 1), default=0.25, help="probability of random erasing")
    group.add_argument("--mixup", type=number(float, 0), default=1.0, help="MixUp's alpha, 0 for none")
    group.add_argument("--cutmix", type=number(float, 0), default=1.0, help="CutMix's alpha, 0 for none")
    group.add_argument(
        "--mix_prob", type=number(float, 0, 1), default=0.5, help="share of batches that are mixed at all"
    )
    group.add_argument(
        "--repeats",
        type=number(int, 1),
        default=3,
        help="times that an epoch goes through the images, each augmented anew",
    )

    group = flags.add_model_flags(parser)
    group.add_argument("--model", choices=sorted(SIZES), default="dynamic_vit_cifar", help="size")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=number(int, 1), default=100)
    group.add_argument("--batch_size", type=number(int, 1), default=128, help="images at a time, in each process")
    group.add_argument(
        "--lr", type=number(float, above=0), default=1e-3, help="peak learning rate of AdamW; not scaled"
    )
    group.add_argument("--weight_decay", type=number(float, 0), default=0.05, help="not of biases, norms, tokens")
    group.add_argument("--warmup_epochs", type=number(float, 0), help="linear warm-up (default: a tenth of --epochs)")
    flags.add_training_flags(group)
    flags.add_machine_flags(parser)
    return parser


def resolve(args):
    """Fill in the defaults that depend on other flags."""
    args.data_set = args.data_set or detect_data_set(args.data_path)
    if args.data_path is None and args.data_set.startswith("CIFAR"):
        args.data_path = f"./data/{args.data_set}"
    digits = args.data_set == "DIGITS"
    args.aug = args.aug or ("none" if digits else "trivial")
    args.hflip = (0.0 if digits else 0.5) if args.hflip is None else args.hflip
    args.warmup_epochs = args.epochs / 10 if args.warmup_epochs is None else args.warmup_epochs
    if args.warmup_epochs >= args.epochs:
        raise BadInput(f"--warmup_epochs {args.warmup_epochs} must be less than --epochs {args.epochs}")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise BadInput(
            f"--batch_size {args.batch_size} must be even for MixUp and CutMix, which pair the images of a batch"
        )
    args.output_dir = args.output_dir or str(Path(args.model_path).parent)
    if args.resume == "":
        args.resume = str(Path(args.output_dir) / "checkpoint.pth")


def check_same_model(args, data_given, everything):
    """Refuse to test a model that is not what the flags ask for; all of them, or only those that were given."""
    model, checkpoint = load_model(args.model_path)
    there = checkpoint["model_args"]
    wanted = flags.build_model(args, there["num_classes"], "meta").model_args
    if not everything:
        wanted = {name: wanted[name] for name in flags.given_model_args(args)}
    other = [f"{name} is {there.get(name)}, not {value}" for name, value in wanted.items() if there.get(name) != value]
    if checkpoint["data"]["name"] != args.data_set and (everything or data_given):
        other.append(f"it is of {checkpoint['data']['name']}, not {args.data_set}")
    if other:
        raise BadInput(
            f"{args.model_path} is another model than these flags ask for ({'; '.join(other)}): "
            "give another --model_path, or --overwrite to train anew"
        )
    say(f"{args.model_path} ({flags.describe(model)}): epoch {checkpoint['epoch']} of {checkpoint['args']['epochs']}")


def train(args, device):
    flags.check_folder(args)
    input_size = flags.build_model(args, 10, "meta").model_args["img_size"]  # wrong flags show before data are read
    utils.writable_folder(Path(args.model_path).parent)
    with utils.main_first():
        data = load_data(args.data_set, args.data_path, input_size, args.val_size)
    utils.seed_everything(args.seed)
    model = flags.build_model(args, len(data.classes))
    flags.say_what(model, data)
    utils.seed_everything(args.seed + utils.rank())
    train_model(model, data, args, device)


def main(argv=None):
    args = get_parser().parse_args(argv)
    data_path, data_given = args.data_path, bool(args.data_path or args.data_set)
    resolve(args)
    device = flags.start(args)
    trains = not args.eval and (args.overwrite or args.resume or not Path(args.model_path).is_file())
    if trains:
        train(args, device)
    else:
        check_same_model(args, data_given, everything=not args.eval)
        if not args.eval:
            say("It is only tested now: --overwrite trains anew, --resume goes on with its training.")
    test_model(args.model_path, data_path, device, args.batch_size)
    if trains:
        training_maps.write_film(args)


if __name__ == "__main__":
    utils.run_script(main)
