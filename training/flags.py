"""Flags that the training scripts share, and what they describe: the model, the machine, the folder of a run."""

import sys
from argparse import SUPPRESS

import utils
from datasets import DATA_SETS, DIGITS, TEST_SIZE, detect_data_set
from loading.decode import add_max_pixels
from models_dynamic import SIZES
from tokens.blocks import STEMS
from tokens.layout import MODES, all_alike
from training.log_to import add_log_flags, check_packages
from utils import BadInput, number

# Flags of the model that were not given are not in the namespace: its size in `SIZES`, then the class, has the default.
MODEL_FLAGS = {
    "num_reg": "num_register_tokens", "cls_pos": "cls_pos", "reg_pos": "reg_pos", "dist_pos": "dist_pos",
    "embed_dim": "embed_dim", "depth": "depth", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio",
    "patch_size": "patch_size", "input_size": "img_size", "init_values": "init_values", "drop_path": "drop_path_rate",
    "qk_norm": "qk_norm", "rope": "rope", "swiglu": "swiglu", "stem": "stem", "reg_end": "reg_end",
    "cls_mode": "cls_mode", "reg_mode": "reg_mode", "class_attention": "class_attention",
}  # fmt: skip
# Defaults of the flags for images in memory.
RECIPES = {
    # "Vision Transformer for Small-Size Datasets" (arXiv 2112.13492): 100 epochs of three passes, for a GPU.
    "long": dict(
        epochs=100, repeats=3, batch_size=128, opt="adamw", lr=1e-3, weight_decay=0.05, aug="trivial", drop_path=0.1,
        smoothing=0.1, reprob=0.25, mixup=1.0, cutmix=1.0, mix_prob=0.5,
    ),
    # Ten minutes on two cores; what was tried is in docs/RESULTS.md.
    "quick": dict(
        epochs=9, repeats=1, batch_size=128, opt="nmuon", lr=5e-3, weight_decay=0.05, aug="none", drop_path=0.0,
        smoothing=0.1, reprob=0.0, mixup=0.0, cutmix=0.0, mix_prob=0.5,
        embed_dim=96, depth=6, num_heads=3, stem="deep",
    ),
}  # fmt: skip
OF_ANY_MODEL = ("input_size", "drop_path", "init_values")


def add_model_flags(parser):
    """The flags in `MODEL_FLAGS`, but for `dist_pos`, and --finetune. Returns the group."""
    group = parser.add_argument_group("model (default: that of --model)", argument_default=SUPPRESS)
    flag = group.add_argument
    flag("--num_reg", type=number(int, 0), help="register tokens (4)")
    flag("--cls_pos", type=utils.position, help="block that CLS enters at, or none (0)")
    flag(
        "--reg_pos", type=number(int, 0), nargs="+", metavar="BLOCK", help="block that the registers enter at, or one "
        "for each of them (0)",
    )  # fmt: skip
    flag(
        "--reg_end", type=number(int, 1), nargs="+", metavar="BLOCK", help="block from which on the registers are "
        "absent, or one for each of them (they stay)",
    )  # fmt: skip
    for name, what in (("--cls_mode", "CLS attends"), ("--reg_mode", "registers attend")):
        flag(name, choices=MODES, help=f"reader: {what} to all tokens, and only readers attend to what reads (token)")
    flag(
        "--class_attention", type=number(int, 0), metavar="K", help="in the last K blocks only CLS is updated, as in "
        "CaiT (0)",
    )  # fmt: skip
    flag("--embed_dim", type=number(int, 1, 2**16), help="width")
    flag("--depth", type=number(int, 1, 1000), help="blocks")
    flag("--num_heads", type=number(int, 1), help="heads")
    flag("--mlp_ratio", type=number(float, above=0), help="hidden width of the MLP / width")
    flag("--patch_size", type=utils.image_size, help="pixels, 4 or 4x8 (height x width)")
    flag("--input_size", type=utils.image_size, help="pixels, 32 or 32x48 (height x width)")
    flag("--init_values", type=number(float, above=0), help="initial LayerScale (no LayerScale)")
    flag("--drop_path", type=number(float, 0, 0.99), default=0.1, help="stochastic depth at the last block")
    flag("--qk_norm", action="store_true", help="normalise queries and keys")
    flag("--rope", action="store_true", help="rotary positions on the patches, as in DINOv3")
    flag("--swiglu", action="store_true", help="SwiGLU in place of the MLP")
    words = "conv: convolutions in place of the patch projection; deep: three times as many"
    flag("--stem", choices=tuple(STEMS), help=words)
    flag("--finetune", metavar="FILE", default=None, help="begin with these weights, wherever the tokens enter")
    return group


def add_training_flags(group):
    """What both scripts train with; defaults that depend on the script are not set."""
    flag = group.add_argument
    flag("--epochs", type=number(int, 1), help="the schedule ends with the last one")
    flag("--batch_size", type=number(int, 1), help="images at a time, in each process")
    flag("--opt", help="timm's name of an optimizer")
    flag("--weight_decay", type=number(float, 0), help="not of biases, norms, tokens")
    flag(
        "--layer_decay", type=number(float, 0, 1, above=0), metavar="D", help="multiply --lr by D for each layer "
        "between a parameter and the head, as in BEiT",
    )  # fmt: skip
    flag(
        "--warmup_epochs",
        type=number(float, 0),
        help="linear warm-up (default: a tenth of --epochs, or a recipe's less)",
    )
    flag("--smoothing", type=number(float, 0, 0.99), default=0.1, help="label smoothing")
    flag("--ema", "--model_ema_decay", type=number(float, 0, 0.999999), default=0.0, help="decay of the EMA, 0: none")
    flag("--clip_grad", type=number(float, 0), default=0.0, help="largest norm of the gradient, 0: any")
    flag("--accum_steps", type=number(int, 1), default=1, help="batches for one step")
    flag("--max_steps", type=number(int, 1), help="stop after so many steps (for a smoke run)")
    flag(
        "--skip_bad_steps", type=number(int, 0), default=0, metavar="N",
        help="leave out so many steps whose loss or gradient is not finite, before one ends the run",
    )  # fmt: skip
    flag("--save_steps", type=number(int, 1), metavar="N", help="write checkpoint.pth each N steps, too")
    flag("--keep", type=number(int, 1), default=2, metavar="N", help="checkpoints to keep, the newest")
    add_log_flags(group)
    flag(
        "--viz_every", type=number(int, 1), metavar="N", help="draw what tokens attend to in held-out images, each N "
        "epochs, before the first and after the last one; in the end also as a PDF and animated GIFs",
    )  # fmt: skip
    flag("--viz_images", type=number(int, 0), nargs="+", metavar="I", help="numbers of these images (default: 0 1 2 3)")


def add_data_flags(group):
    """Which images are read (see `of_data`), and what both scripts do with them in training."""
    flag = group.add_argument
    flag(
        "--val_size", type=number(float, 0), help="training images to hold out for choosing the best epoch, a share "
        "or a number; 0: the last epoch is the result (default: 5000 for CIFAR, 0.01 for IMNET, else 0.1; not with "
        "folders val/ and test/: val/ is held out then)",
    )  # fmt: skip
    flag(
        "--test_size", type=number(float, above=0), help="images to test on, a share or a number, where the class "
        f"folders lie in --data_path itself, without train/ and test/ (default: {TEST_SIZE})",
    )  # fmt: skip
    words = "those that cannot be read; skip: leave them out"
    flag("--bad_images", choices=("error", "skip"), default="error", help=words)
    add_max_pixels(group)
    flag(
        "--balance", choices=("none", "sampler", "loss"), default="none", help="for classes of unequal size, all of "
        "which are to count alike: draw the images of a small class more often, or weight their loss",
    )  # fmt: skip
    flag("--hflip", type=number(float, 0, 1), help="mirror images (default: 0.5; 0 for digits)")
    flag("--reprob", type=number(float, 0, 1), help="probability of random erasing")
    flag("--mixup", type=number(float, 0), help="MixUp's alpha, 0 for none")
    flag("--cutmix", type=number(float, 0), help="CutMix's alpha, 0 for none")
    flag("--mix_prob", "--mixup_prob", type=number(float, 0, 1), help="share of batches that are mixed")


def of_data(args) -> dict:
    """The arguments of `load_data` and `load_file_data` that are flags."""
    return {name: getattr(args, name) for name in ("val_size", "test_size", "max_pixels", "bad_images")}


def add_small_image_flags(parser):
    """Data, model, recipe and machine for images in memory: flags of `cifar_main.py` and of a sweep's cells."""
    group = parser.add_argument_group("data")
    flag = group.add_argument
    flag(
        "--data_set", choices=DATA_SETS, type=str.upper, help="default: what --data_path holds, or its name, or CIFAR10"
    )
    flag(
        "--data_path", help="a folder with train/<class>/ and test/<class>/ (or val/), or with <class>/ alone "
        "(default: ./data/CIFAR10 or ./data/CIFAR100, downloaded there if absent)",
    )  # fmt: skip
    add_data_flags(group)
    flag(
        "--aug", choices=("trivial", "rand", "none"),
        help="TrivialAugment or RandAugment (default: the recipe's; none for digits)",
    )  # fmt: skip
    flag(
        "--repeats", type=number(float, above=0), help="times that an epoch goes through the images, each augmented "
        "anew",
    )  # fmt: skip

    group = add_model_flags(parser)
    group.add_argument("--model", choices=sorted(SIZES), default="dynamic_vit_cifar", help="size")

    group = parser.add_argument_group("training")
    flag = group.add_argument
    flag(
        "--recipe", choices=tuple(RECIPES), default="long", help="defaults of the flags: long is for a GPU, quick for "
        "ten minutes on two CPU cores, and a smaller model",
    )  # fmt: skip
    flag("--lr", type=number(float, above=0), help="peak learning rate; not scaled")
    add_training_flags(group)
    add_machine_flags(parser)
    parser.set_defaults(  # what main_distillation.py has flags for
        warmup_lr=1e-6, min_lr=1e-6, mix_switch_prob=0.5, bce_loss=False, fsdp=False,
    )  # fmt: skip


def parse_with_recipe(parser, argv, **defaults):
    """The flags of `add_small_image_flags`; the defaults are those of the recipe that they name, then `defaults`."""
    argv = sys.argv[1:] if argv is None else argv
    named = parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])[0]
    recipe = {name: value for name, value in RECIPES[named.recipe].items() if name != "aug"}  # see `resolve`
    parser.set_defaults(**recipe | defaults)
    return parser.parse_args(argv)


def resolve(args):
    """Fill in the defaults of `add_small_image_flags` that depend on other flags."""
    args.data_set = args.data_set or detect_data_set(args.data_path)
    if args.data_path is None and args.data_set.startswith("CIFAR"):
        args.data_path = f"./data/{args.data_set}"
    digits = args.data_set in DIGITS
    args.aug = args.aug or ("none" if digits else RECIPES[args.recipe]["aug"])
    args.hflip = (0.0 if digits else 0.5) if args.hflip is None else args.hflip
    args.warmup_epochs = args.epochs / 10 if args.warmup_epochs is None else args.warmup_epochs
    check_training(args)


def check_training(args):
    """Raise BadInput for flags that training cannot do together; where nothing is trained, they do not matter."""
    if getattr(args, "eval", False) or getattr(args, "throughput", False):
        return
    check_packages(args.log_to)
    if args.warmup_epochs >= args.epochs:
        raise BadInput(f"--warmup_epochs {args.warmup_epochs} must be less than --epochs {args.epochs}")
    check_pairs(args, args.batch_size)


def check_pairs(args, images):
    """Raise BadInput where MixUp or CutMix is to pair the images of batches of an odd number of `images`."""
    if (args.mixup or args.cutmix) and images % 2:
        few = "" if images == args.batch_size else f", and there are too few images for more than {images} in a batch"
        raise BadInput(
            f"--batch_size {args.batch_size} must be even for MixUp and CutMix, which pair the images of a batch"
            f"{few}; or give --mixup 0 --cutmix 0"
        )


def add_machine_flags(parser):
    """Returns the group."""
    group = parser.add_argument_group("machine")
    flag = group.add_argument
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    flag("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="precision of training")
    flag("--compile", action="store_true", help="torch.compile the model")
    flag("--num_threads", type=number(int, 1, 1024), help="CPU threads (default: torch's)")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of weights, order and augmentation")
    flag("--deterministic", action="store_true", help="deterministic kernels only")
    return group


def given_model_args(args) -> dict:
    """Those arguments of the model that the user gave."""
    given = {arg: getattr(args, flag) for flag, arg in MODEL_FLAGS.items() if hasattr(args, flag)}
    several = ("reg_pos", "reg_end")  # a block, or one for each register
    return given | {name: all_alike(given[name]) for name in several if isinstance(given.get(name), list)}
