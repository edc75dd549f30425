"""Train on ImageNet or images like it, on one device or many, with DeiT's recipes and, if wanted, a teacher.

    torchrun --nnodes=1 --nproc_per_node=4 main_distillation.py --distributed --num_reg 4 --cls_pos 6 --reg_pos 3
    python main_distillation.py --data-set DIGITS --model dynamic_vit_cifar --epochs 10 --output_dir models/digits
    python main_distillation.py --eval --resume models/imagenet/best_checkpoint.pth

--data-path is a folder with train/<class>/ and val/<class>/. The best epoch is chosen on images held out of train/;
val/ is looked at once, at the end. --model takes the sizes of this project and any of timm's models.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

import timm
import torch
from timm.utils import random_seed

import utils
from checkpoints.files import load_checkpoint
from checkpoints.models import load_model
from datasets import DATA_SETS, DIGITS, WHOLE_IMAGE, check_classes
from engine import TrainingStep, autocast, train_one_epoch
from loading.files import FileLoader, load_file_data, picture_transform
from loading.labels import class_map
from models_dynamic import SIZES
from training import film, flags, run_folder
from training.loop import Run, run_epochs, wrap
from training.run_log import print_what_was_written
from training.scoring import score
from training.setup import (
    amp_dtype,
    build_model,
    check_same_model,
    check_timm_model,
    describe,
    load_finetune,
    make_optimizer,
    make_step,
    on_channels_last,
    plain_attention_on_cpu,
    report_run,
    start,
)
from training.teachers import check_whole, images_of, make_teacher
from utils import BadInput, number, say

# DeiT (arXiv 2012.12877, table 9). AdamW at 5e-4 for each 512 images a step.
DEIT = dict(
    epochs=300, batch_size=128, opt="adamw", lr=5e-4, weight_decay=0.05, warmup_epochs=5, min_lr=1e-5, smoothing=0.1,
    drop_path=0.1, aa="rand-m9-mstd0.5-inc1", color_jitter=0.4, reprob=0.25, mixup=0.8, cutmix=1.0, mix_prob=1.0,
    repeated_aug=True, eval_crop_ratio=0.875,
)  # fmt: skip
# Defaults of the flags. Where a recipe was published for a number of images a step, `step_images` has it.
RECIPES = {
    "deit": DEIT,
    # DeiT III (2204.07118), ViT-S on ImageNet-1k as in its README. ViT-B there has --lr 3e-3 --drop-path 0.2
    # --input-size 192. LAMB itself clips the gradient at a norm of 1.
    "deit3": DEIT | dict(
        epochs=800, batch_size=256, opt="lamb", lr=4e-3, unscale_lr=True, step_images=2048, smoothing=0.0,
        drop_path=0.05, aa="none", color_jitter=0.3, reprob=0.0, bce_loss=True, ThreeAugment=True,
        eval_crop_ratio=1.0, init_values=1e-4,
    ),
    # "Better plain ViT baselines for ImageNet-1k" (2205.01580): 90 epochs, 76.5 % there with ViT-S/16. Its decay of
    # 1e-4 is multiplied by the schedule alone, torch's also by the rate, here 1e-3 for 1024 images a step.
    "fast": DEIT | dict(
        epochs=90, weight_decay=0.1, warmup_epochs=8, min_lr=0.0, smoothing=0.0, drop_path=0.0, aa="rand-m10-n2",
        color_jitter=0.0, reprob=0.0, mixup=0.2, cutmix=0.0, repeated_aug=False, clip_grad=1.0,
    ),
}  # fmt: skip
BEST = "best_checkpoint.pth"
COMMAND = "torchrun --nnodes=1 --nproc_per_node=4 main_distillation.py --distributed"


def get_parser():
    parser = utils.ArgumentParser(
        description="Train a Vision Transformer whose tokens enter at chosen blocks, or one of timm's models.",
        epilog="Defaults are those of --recipe: see also --recipe deit3 --help.",
    )
    flag = parser.add_argument_group("what to do").add_argument
    flag("--output_dir", default="./models/imagenet", help="checkpoints, log.txt and the curves")
    flag("--distributed", action="store_true", help=f"insist on torchrun: {COMMAND}")
    flag("--overwrite", action="store_true", help="train anew though a run is there")
    flag("--resume", nargs="?", const="", metavar="FILE", help="resume from FILE, or the newest undamaged one")
    flag("--eval", action="store_true", help="only test the model of --resume, of --finetune, or of --output_dir")
    flag("--throughput", action="store_true", help="only measure images/s, on random images")
    flag("--recipe", choices=RECIPES, default="deit", help="defaults of the flags below")
    add_image_flags(parser)
    add_model_and_training_flags(parser)
    flag = flags.add_machine_flags(parser).add_argument
    flag(
        "--fsdp", action="store_true", help="with torchrun: each process keeps only its share of weights, gradients "
        "and optimizer state, for models that outgrow one device (FSDP2)",
    )  # fmt: skip
    flag("--grad_checkpointing", action="store_true", help="less memory, a third more work")
    return parser


SWITCH = dict(action=argparse.BooleanOptionalAction, default=False)


def add_image_flags(parser):
    group = parser.add_argument_group("data")
    flag = group.add_argument
    flag("--data_set", choices=("IMNET", *DATA_SETS), type=str.upper, help="default: IMNET")
    flag(
        "--data_path", help="folder with train/ and val/, folders or tar files of a class each; or wds/FOLDER, "
        "hfds/NAME, torch/NAME, see docs/IMAGENET.md (default: ./data/imagenet, ./data/CIFAR10, ./data/CIFAR100)",
    )  # fmt: skip
    flag(
        "--class_map", metavar="FILE", help="the classes, one a line in the order of the labels, perhaps fewer than "
        "the data have; or a .txt that timm has, as mini_imagenet_synsets.txt",
    )  # fmt: skip
    flags.add_data_flags(group)
    flag("--aa", help="timm's augmentation policy, or none")
    flag("--color_jitter", type=number(float, 0), help="strength; only without --aa")
    flag("--ThreeAugment", **SWITCH, help="DeiT III's grey, solarize or blur in place of --aa")
    flag("--src", **SWITCH, help="simple random crop in place of the random resized crop")
    flag("--no_aug", action="store_true", help="whole images, unchanged; no erasing and mixing either")
    flag(
        "--interpolation", "--train_interpolation", choices=("bicubic", "bilinear", "lanczos", "random"),
        help="of resizing (default: bicubic); in evaluation, random is bicubic",
    )  # fmt: skip
    flag("--repeated_aug", **SWITCH, help="three draws of each image, of a third of the images")
    flag("--mix_switch_prob", "--mixup_switch_prob", type=number(float, 0, 1), default=0.5,
                       help="share of CutMix, where both are on")  # fmt: skip
    flag(
        "--eval_crop_ratio", type=number(float, 0, 1, above=0), help="share of the shorter side that evaluation sees "
        "(default: the recipe's; 1 for CIFAR and DIGITS)",
    )  # fmt: skip
    flag("--num_workers", type=number(int, 0, 1024), help="reading processes (default: CPU cores, at most 10)")


def add_model_and_training_flags(parser):
    group = flags.add_model_flags(parser)
    flag = group.add_argument
    flag("--model", default="dynamic_vit_tiny_patch16_224", help=f"{', '.join(SIZES)}, or one of timm's")
    flag("--dist_pos", type=utils.position, help="block of DeiT's distillation token (none)")

    group = parser.add_argument_group("training")
    flag = group.add_argument
    flag("--lr", type=number(float, above=0), help="peak learning rate for 512 images a step")
    flag("--unscale_lr", **SWITCH, help="--lr as it is, whatever the number of images a step")
    flag("--warmup_lr", type=number(float, 0), default=1e-6, help="where the warm-up begins")
    flag("--min_lr", type=number(float, 0), help="where the cosine ends")
    flag("--bce_loss", **SWITCH, help="binary cross-entropy, each class by itself")
    flag("--attn_only", action="store_true", help="train attention, head and positions only (2203.09795)")
    flags.add_training_flags(group)

    flag = parser.add_argument_group("distillation").add_argument
    flag("--teacher_model", metavar="NAME", help="one of timm's models")
    flag(
        "--teacher_path", metavar="FILE", help="its weights, or a checkpoint of this project (default: timm's download)"
    )
    flag("--distillation_type", choices=("none", "soft", "hard"), default="none", help="how it teaches")
    flag("--distillation_alpha", type=number(float, 0, 1), default=0.5, help="weight of the teacher")
    flag("--distillation_tau", type=number(float, above=0), default=1.0, help="temperature, for soft")


def parse(argv=None):
    """The flags, with the defaults of the recipe that they name; so has --help."""
    parser, argv = get_parser(), sys.argv[1:] if argv is None else argv
    first = parser.parse_args([arg for arg in argv if arg not in ("-h", "--help")])
    recipe = dict(RECIPES[first.recipe])
    if first.model not in SIZES:
        recipe.pop("init_values", None)  # timm's model has LayerScale if its name asks for it
    step_images = recipe.pop("step_images", None)
    parser.set_defaults(interpolation="bicubic", **recipe)
    args = parser.parse_args(argv)
    resolve(args, first)
    images = args.batch_size * args.accum_steps * int(os.environ.get("WORLD_SIZE", 1))
    if not args.unscale_lr:
        args.lr *= images / 512
    elif first.lr is None and step_images not in (None, images) and os.environ.get("RANK", "0") == "0":
        print(f"note: --lr {args.lr:g} was published for {step_images} images a step, here are {images}", flush=True)
    return args


def resolve(args, given):
    """Fill in the defaults that depend on other flags. `given`: the flags without the recipe."""
    for flag in ("distributed", "fsdp"):
        if getattr(args, flag) and "RANK" not in os.environ:
            raise BadInput(f"--{flag} needs torchrun, which starts the processes; type: {COMMAND} ...")
    small = args.data_set is not None and args.data_set not in ("IMNET", "FOLDER")
    if given.eval_crop_ratio is None and small:
        args.eval_crop_ratio = 1.0
    if args.hflip is None:
        args.hflip = 0.0 if args.data_set in DIGITS else 0.5
    if given.warmup_epochs is None:
        args.warmup_epochs = min(args.warmup_epochs, args.epochs / 10)
    if args.no_aug:
        args.mixup = args.cutmix = args.reprob = 0.0
    flags.check_training(args)
    if not (args.eval or args.throughput):
        if (args.distillation_type != "none") != bool(args.teacher_model or args.teacher_path):
            raise BadInput(
                "distillation takes a teacher and a kind: --teacher_path FILE --distillation_type soft, or hard"
            )
        if getattr(args, "dist_pos", None) is not None and args.distillation_type == "none":
            raise BadInput("--dist_pos: the distillation token learns from a teacher; give --teacher_path FILE")
    if args.num_workers is None:
        args.num_workers = min(10, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if not (args.eval and not args.finetune):  # else the checkpoint names its dataset
        args.data_set = args.data_set or "IMNET"
        args.data_path = args.data_path or ("./data/imagenet" if args.data_set == "IMNET" else None)
    if args.resume == "" and args.eval:
        args.resume = str(Path(args.output_dir) / run_folder.NEWEST)
    if args.eval:  # what was asked for, whatever a file has
        asked = {"crop_pct": given.eval_crop_ratio, "interpolation": given.interpolation}
        args.asked_crop = {name: value.replace("random", "bicubic") if isinstance(value, str) else value
                           for name, value in asked.items() if value is not None}  # fmt: skip


def input_size(args) -> tuple[int, int]:
    """Of the model that the flags describe; wrong flags show here, before any data are read."""
    if args.model in SIZES:
        return build_model(args, 10, "meta").model_args["img_size"]
    check_timm_model(args)
    return getattr(args, "input_size", None) or timm.get_pretrained_cfg(args.model).input_size[1:]


def read_data(args):
    """The dataset of the flags, of the size of their model."""
    crop = dict(crop_pct=args.eval_crop_ratio, interpolation=args.interpolation.replace("random", "bicubic"))
    wanted = class_map(args.class_map) if args.class_map else None
    return load_file_data(
        args.data_set, args.data_path, input_size(args), **crop, **flags.of_data(args), classes=wanted
    )


def make_model(args, num_classes, resume=None):
    """The model of the flags, on the CPU, with the weights of --finetune unless it gets those of a resumed run."""
    random_seed(args.seed)
    model, new = build_model(args, num_classes), []
    if args.finetune and not args.throughput and (args.attn_only or not resume):  # --attn_only asks what is new
        new = load_finetune(model, args.finetune).new
    if args.attn_only:
        trained = ("head", "pos_embed", *new)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".attn." in name or name.startswith(trained)
        if not any(".attn." in name for name, _ in model.named_parameters()):
            raise BadInput(f"--attn_only: {args.model} has no attention")
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if hasattr(model, "set_distilled_training"):  # timm's distilled models give both heads' logits only if asked to
        model.set_distilled_training(args.distillation_type != "none")
    return on_channels_last(model)


def train(args, device):
    """Train, and leave the best weights in best_checkpoint.pth."""
    with run_folder.locked(args.output_dir):
        resume = run_folder.checkpoint_to_resume(args, Path(args.output_dir) / BEST)
        data = read_data(args)
        teacher = make_teacher(args, data, device)
        model = make_model(args, len(data.classes), resume)
        report_run(model, data)
        random_seed(args.seed, utils.rank())
        model.to(device)
        batches, val_batches = make_loaders(args, data, device)
        step = make_step(args, model, batches, len(data.classes), teacher)
        best_path = Path(args.output_dir) / BEST
        run_epochs(Run(model, batches, val_batches, data.description(), args, device, best_path, resume), step)


def make_loaders(args, data, device) -> tuple[FileLoader, FileLoader | None]:
    transform = picture_transform(
        data.input_size, args.aa, args.color_jitter, args.hflip, args.interpolation, args.ThreeAugment, args.src,
        args.no_aug,
    )  # fmt: skip
    share = dict(batch_size=args.batch_size, device=device, workers=args.num_workers, **utils.own_share())
    train = FileLoader(
        data.train, data.description(), transform=transform, repeats=3 if args.repeated_aug else 1, reprob=args.reprob,
        seed=args.seed, balanced=args.balance == "sampler", **share,
    )  # fmt: skip
    return train, FileLoader(data.val, data.description(), **share) if data.val else None


def test(path, args, device):
    """Print the accuracy of a checkpoint on the test images; of its EMA weights too, if it is one to resume from."""
    model, checkpoint = load_model(path)
    if args.eval:
        check_same_model(path, checkpoint, asked_model(args), "leave these flags out")
        if args.class_map:
            check_classes(class_map(args.class_map), checkpoint["data"]["classes"], "--class_map", "the model")
        if args.asked_crop:
            checkpoint["data"] = WHOLE_IMAGE | checkpoint["data"] | args.asked_crop
    _print_score("Accuracy", model, checkpoint, args, device)
    if checkpoint.get("ema"):
        model.load_state_dict(checkpoint["ema"])
        _print_score("EMA accuracy", model, checkpoint, args, device)


def asked_model(args) -> dict:
    """What --eval asks of a checkpoint's model, which needs no flag: see `check_same_model`."""
    asked = flags.given_model_args(args)
    if args.model not in SIZES:
        asked["timm_name"] = args.model
    elif args.model != get_parser().get_default("model"):
        asked = SIZES[args.model] | asked
    if args.data_set:
        asked["data_set"] = args.data_set
    # Those left out are of training, perhaps a recipe's, or of the data.
    return {n: value for n, value in asked.items() if n not in ("drop_path_rate", "init_values", "num_classes")}


def _print_score(title, model, checkpoint, args, device):
    result, _ = score(
        model, checkpoint, args.data_path, device, args.batch_size, args.num_workers, max_pixels=args.max_pixels
    )  # fmt: skip
    say(f"{title}: top-1 {result['top1']:.2f} top-5 {result['top5']:.2f} on {result['images']} images")


def evaluate_only(args, device):
    """`test` a checkpoint, or the model of the flags with the weights of --finetune, on images as that file wants them.

    Raises BadInput unless that file has all of the model, for the classes of the data.
    """
    if args.resume or not args.finetune:
        return test(args.resume or Path(args.output_dir) / BEST, args, device)
    data, checkpoint, whose = read_data(args), load_checkpoint(args.finetune), f"--eval --finetune {args.finetune}"
    about = images_of(checkpoint, args.model, data, whose)
    model = build_model(args, len(data.classes))
    for name, value in checkpoint.get("model_args", {}).items():  # what the shapes of weights do not show
        here = model.model_args.get(name, value)
        if name in ("num_heads", "timm_name") and here != value:
            raise BadInput(f"{whose}: its {name} is {value}, here {here}; give the flags of its model")
    check_whole(load_finetune(model, args.finetune), whose, len(data.classes))
    wanted = {key: about[key] for key in ("mean", "std", "crop_pct", "interpolation") if key in about}
    description = data.description() | wanted | args.asked_crop
    _print_score("Accuracy", on_channels_last(model), {"data": description}, args, device)


def throughput(args, device, rounds=5, steps=5):
    """Print images/s of training steps and of inference, on random images that lie on the device: medians."""
    size, dtype = input_size(args), amp_dtype(args.amp, device)
    model = make_model(args, 1000).to(device)
    plain_attention_on_cpu(model, device, dtype)
    images = torch.randn(args.batch_size, 3, *size, device=device)
    batches = [(images, torch.randint(1000, (args.batch_size,), device=device))] * steps
    slow = argparse.Namespace(**vars(args) | {"lr": 1e-5, "warmup_lr": 0.0, "min_lr": 0.0})
    step = TrainingStep(model, sum_of_losses, *make_optimizer(model, slow, batches), amp_dtype=dtype)
    wrap(step, args, size)
    trained, inferred = [], []
    for _ in range(rounds + 1):  # the first one warms up
        done = train_one_epoch(step, batches)
        trained.append(done["images"] / done["seconds"])
        step.model.eval()
        with torch.no_grad(), autocast(device, dtype):
            start = time.perf_counter()
            for _ in range(steps):
                logits = step.model(images)
            logits.sum().item()  # waits for the device
        inferred.append(args.batch_size * steps * utils.world_size() / (time.perf_counter() - start))
    say(describe(model))
    precision = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    setting = f"batch {args.batch_size}, {size[0]} x {size[1]} pixels, {precision}, {device}"
    rates = f"training {median(trained[1:]):,.1f} images/s, inference {median(inferred[1:]):,.1f} images/s"
    say(f"Throughput: {rates} ({setting}, {utils.world_size()} process{'es' * (utils.world_size() > 1)})")


def sum_of_losses(outputs, labels):
    """Of each head that the model has."""
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(torch.nn.functional.cross_entropy(logits, labels) for logits in heads)


def main(argv=None):
    args = parse(argv)
    device = start(args)
    if args.throughput:
        throughput(args, device)
    elif args.eval:
        evaluate_only(args, device)
    else:
        train(args, device)
        test(Path(args.output_dir) / BEST, args, device)
        film.write_film(args)
        print_what_was_written(Path(args.output_dir), Path(args.output_dir) / BEST)


if __name__ == "__main__":
    utils.run_script(main)
