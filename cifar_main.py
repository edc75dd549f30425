"""Train a Vision Transformer whose class and register tokens enter at blocks of your choice, then test it.

    python cifar_main.py --data_path ./data/CIFAR10 --model_path ./models/best_model.pth
    python cifar_main.py --data_set DIGITS --cls_pos 4 --reg_pos 2 --model_path ./models/late.pth   # needs no download
    python cifar_main.py --data_path ./my_photos --input_size 64 --patch_size 8                     # train/ and test/

The same command again tests the model that is now there. `--overwrite` trains anew, `--resume` goes on, `--eval` only
tests. On several GPUs: torchrun --nproc_per_node=4 cifar_main.py ...
"""

from pathlib import Path

import torch

import utils
from cifar_test import load_model, test_model
from cifar_train import train_model
from datasets import DATA_SETS, detect_data_set, load_data
from models_dynamic import SIZES, DynamicViT
from utils import BadInput, number, say

# Flags of the model that were not given are not in the namespace: its size in `SIZES`, then the class, has the default.
MODEL_FLAGS = {
    "num_reg": "num_register_tokens", "cls_pos": "cls_pos", "reg_pos": "reg_pos", "embed_dim": "embed_dim",
    "depth": "depth", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio", "patch_size": "patch_size",
    "input_size": "img_size", "init_values": "init_values", "drop_path": "drop_path_rate",
}  # fmt: skip


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

    missing = dict(default=utils.argparse.SUPPRESS)
    group = parser.add_argument_group("model (default: that of --model)")
    group.add_argument("--model", choices=sorted(SIZES), default="dynamic_vit_cifar", help="size")
    group.add_argument("--num_reg", type=number(int, 0), help="register tokens (4)", **missing)
    group.add_argument("--cls_pos", type=utils.position, help="block that CLS enters at, or none (0)", **missing)
    group.add_argument("--reg_pos", type=number(int, 0), help="block that the registers enter at (0)", **missing)
    group.add_argument("--embed_dim", type=number(int, 1), help="width", **missing)
    group.add_argument("--depth", type=number(int, 1), help="blocks", **missing)
    group.add_argument("--num_heads", type=number(int, 1), help="heads", **missing)
    group.add_argument("--mlp_ratio", type=number(float, above=0), help="hidden width of the MLP / width", **missing)
    group.add_argument("--patch_size", type=utils.image_size, help="pixels, 4 or 4x8 (height x width)", **missing)
    group.add_argument("--input_size", type=utils.image_size, help="pixels, 32 or 32x48 (height x width)", **missing)
    group.add_argument(
        "--init_values", type=number(float, above=0), help="initial LayerScale (no LayerScale)", **missing
    )
    group.add_argument(
        "--drop_path", type=number(float, 0, 0.99), default=0.1, help="stochastic depth at the last block"
    )

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=number(int, 1), default=100)
    group.add_argument("--batch_size", type=number(int, 1), default=128, help="images at a time, in each process")
    group.add_argument(
        "--lr", type=number(float, above=0), default=1e-3, help="peak learning rate of AdamW; not scaled"
    )
    group.add_argument("--weight_decay", type=number(float, 0), default=0.05, help="not of biases, norms, tokens")
    group.add_argument("--warmup_epochs", type=number(float, 0), help="linear warm-up (default: a tenth of --epochs)")
    group.add_argument("--smoothing", type=number(float, 0, 0.99), default=0.1, help="label smoothing")
    group.add_argument("--ema", type=number(float, 0, 0.999999), default=0.0, help="decay of averaged weights, 0: none")
    group.add_argument("--clip_grad", type=number(float, 0), default=0.0, help="largest norm of the gradient, 0: any")
    group.add_argument("--accum_steps", type=number(int, 1), default=1, help="batches for one step")
    group.add_argument("--max_steps", type=number(int, 1), help="stop after so many steps (for a smoke run)")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    group.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="precision of training")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--num_threads", type=number(int, 1), help="CPU threads (default: torch's)")
    group.add_argument("--seed", type=number(int, 0, 2**31), default=0)
    group.add_argument("--deterministic", action="store_true", help="deterministic kernels only")
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


def given_model_args(args) -> dict:
    """Those arguments of the model that the user gave."""
    return {arg: getattr(args, flag) for flag, arg in MODEL_FLAGS.items() if hasattr(args, flag)}


def build_model(args, num_classes, device="cpu") -> DynamicViT:
    """The model that the flags describe; on the device 'meta' only its description, without weights."""
    try:
        with torch.device(device):
            return DynamicViT(**(SIZES[args.model] | {"num_classes": num_classes} | given_model_args(args)))
    except ValueError as error:
        raise BadInput(str(error)) from None


def describe(model: DynamicViT) -> str:
    cls = "no class token" if model.cls_pos is None else f"CLS enters at block {model.cls_pos}"
    registers = (
        f"{model.num_register_tokens} registers at block {model.reg_pos}"
        if model.num_register_tokens
        else "no registers"
    )
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{model.depth} blocks, width {model.embed_dim}, {size:.2f} M parameters, {cls}, {registers}"


def check_same_model(args, data_given, everything):
    """Refuse to test a model that is not what the flags ask for; all of them, or only those that were given."""
    model, checkpoint = load_model(args.model_path)
    there = checkpoint["model_args"]
    wanted = build_model(args, there["num_classes"], "meta").model_args
    if not everything:
        wanted = {name: wanted[name] for name in given_model_args(args)}
    other = [f"{name} is {there.get(name)}, not {value}" for name, value in wanted.items() if there.get(name) != value]
    if checkpoint["data"]["name"] != args.data_set and (everything or data_given):
        other.append(f"it is of {checkpoint['data']['name']}, not {args.data_set}")
    if other:
        raise BadInput(
            f"{args.model_path} is another model than these flags ask for ({'; '.join(other)}): "
            "give another --model_path, or --overwrite to train anew"
        )
    say(f"{args.model_path} ({describe(model)}): epoch {checkpoint['epoch']} of {checkpoint['args']['epochs']}")


def train(args, device):
    unfinished = Path(args.output_dir) / "checkpoint.pth"
    if not (args.overwrite or args.resume) and unfinished.exists():
        raise BadInput(
            f"{unfinished} is there, of another run: --resume goes on with it, --overwrite trains anew; "
            "or give another --output_dir"
        )
    if args.resume and not Path(args.resume).is_file():
        raise BadInput(f"--resume: there is no {args.resume}; leave out --resume to begin")
    input_size = build_model(args, 10, "meta").model_args["img_size"]  # wrong flags show before data are read
    utils.writable_folder(args.output_dir)
    utils.writable_folder(Path(args.model_path).parent)
    utils.amp_dtype(args.amp, device)
    with utils.main_first():
        data = load_data(args.data_set, args.data_path, input_size, args.val_size)
    utils.seed_everything(args.seed)
    model = build_model(args, len(data.classes))
    sizes = data.description()["images"]
    say(f"{describe(model)}; {data.name}: " + ", ".join(f"{n} {part}" for part, n in sizes.items()) + " images")
    utils.seed_everything(args.seed + utils.rank())
    train_model(model, data, args, device)


def main(argv=None):
    args = get_parser().parse_args(argv)
    data_path, data_given = args.data_path, bool(args.data_path or args.data_set)
    resolve(args)
    device = utils.pick_device(args.device)
    utils.init_distributed(device)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    if args.deterministic:
        utils.make_deterministic()
    there = Path(args.model_path).is_file()
    if args.eval:
        check_same_model(args, data_given, everything=False)
    elif there and not (args.overwrite or args.resume):
        check_same_model(args, data_given, everything=True)
        say("It is only tested now: --overwrite trains anew, --resume goes on with its training.")
    else:
        train(args, device)
    test_model(args.model_path, data_path, device, args.batch_size)


if __name__ == "__main__":
    utils.run_script(main)
