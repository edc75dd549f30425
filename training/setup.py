"""What the flags of a run describe: device, model, optimizer, schedule, loss."""

import os
from pathlib import Path

import timm
import torch
from timm.data import Mixup
from timm.layers import to_2tuple
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import utils
from checkpoints.files import load_checkpoint
from checkpoints.models import check_model_args, timm_model
from checkpoints.weights import LoadReport, load_weights
from datasets import class_weights
from engine import TrainingStep
from inspection.attention import set_fused_attention
from models_dynamic import SIZES, DynamicViT
from training import flags
from training.flags import MODEL_FLAGS, OF_ANY_MODEL, given_model_args
from training.losses import DistillationLoss, WeightedLoss
from utils import BadInput

FSDP_OPTIMIZERS = ("adam", "adamw", "lamb", "lion", "nadamw", "sgd")  # tested; some of timm's fail with shares


def updates_per_epoch(batches, args) -> int:
    return -(-len(batches) // args.accum_steps)


def make_step(args, model, batches, classes: int, teacher=None) -> TrainingStep:
    """Optimizer, schedule, Mixup, loss and precision as the flags say, for `model` on its device."""
    device = next(model.parameters()).device
    optimizer, scheduler = make_optimizer(model, args, batches)
    weights = class_weights(batches.split.labels, classes).to(device) if args.balance == "loss" else None
    mixup, criterion = make_mixup_and_loss(args, batches.batch_size, classes, weights)
    if teacher is not None:
        criterion = DistillationLoss(criterion, args.distillation_type, args.distillation_alpha, args.distillation_tau)
    dtype = amp_dtype(args.amp, device)
    plain_attention_on_cpu(model, device, dtype)
    scaler = torch.amp.GradScaler(device.type) if dtype is torch.float16 else None
    return TrainingStep(
        model, criterion, optimizer, scheduler, args.accum_steps, mixup, teacher, dtype, scaler, args.clip_grad
    )


def make_optimizer(model, args, batches):
    """timm's optimizer, without decay of biases, norms and tokens, and its cosine schedule, counted in its steps.

    Raises BadInput if there is no such optimizer, or not for FSDP2.
    """
    if args.fsdp and args.opt not in FSDP_OPTIMIZERS:
        raise BadInput(f"--fsdp was not tested with --opt {args.opt}; give one of {', '.join(FSDP_OPTIMIZERS)}")
    device = next(model.parameters()).device
    has_fused = ("adam", "adamw") if args.fsdp else ("adam", "adamw", "sgd")  # FSDP2's shares: not SGD (torch 2.14)
    fused = {"fused": True} if args.opt in has_fused and device.type in ("cpu", "cuda") else {}
    try:  # the groups are the same without decay, so that a run can be resumed with it, and the other way round
        optimizer = create_optimizer_v2(
            model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay or 1.0, layer_decay=args.layer_decay,
            **fused,
        )  # fmt: skip
    except (ValueError, AssertionError) as error:
        raise BadInput(f"--opt {args.opt}: {error}; timm.optim.list_optimizers() names all") from None
    if not args.weight_decay:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=args.warmup_lr,
        min_lr=args.min_lr, step_on_epochs=False, updates_per_epoch=updates_per_epoch(batches, args),
    )  # fmt: skip
    return optimizer, scheduler


def make_mixup_and_loss(args, batch_size, classes: int, weights=None):
    """timm's Mixup (None without it) and the loss; label smoothing is done by one of the two.

    `weights`: of the classes in the loss, (K,); None: all alike.
    """
    mixup, smoothing = None, args.smoothing
    if args.mixup or args.cutmix:
        flags.check_pairs(args, batch_size)
        mixup = Mixup(
            args.mixup, args.cutmix, prob=args.mix_prob, switch_prob=args.mix_switch_prob, label_smoothing=smoothing,
            num_classes=classes,
        )  # fmt: skip
        smoothing = 0.0
    reduction = "mean" if weights is None else "none"
    if args.bce_loss:
        loss = BinaryCrossEntropy(smoothing=smoothing, reduction=reduction)
    else:
        loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction=reduction)
    return mixup, loss if weights is None else WeightedLoss(loss, weights)


def start(args) -> torch.device:
    """Device, processes and threads as the flags say."""
    device = utils.pick_device(args.device)
    utils.init_distributed(device)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    if args.deterministic:
        make_deterministic()
    else:
        fast_kernels(device)
    amp_dtype(args.amp, device)  # raises BadInput now rather than after the data are read
    return device


def fast_kernels(device):
    """On CUDA, the fastest convolutions, and TF32 for what autocast leaves in float32; not in `evaluate`."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def make_deterministic():
    """Only deterministic kernels, on every device, for the price of some speed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def amp_dtype(choice, device) -> torch.dtype | None:
    """The precision of matrix products in training: None is full precision.

    'auto' is bfloat16 where the device multiplies faster in it: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX.
    """
    if choice == "fp16" and device.type != "cuda":
        raise BadInput(f"--amp fp16 needs a CUDA device, this is {device.type}; use --amp auto")
    if choice != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        try:
            flags = Path("/proc/cpuinfo").read_text()
        except OSError:
            return None
        return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else None
    return None


def plain_attention_on_cpu(model, device, dtype):
    """Plain products where torch's fused kernel is several times slower: in bfloat16 on CPUs."""
    if device.type == "cpu" and dtype is not None:
        set_fused_attention(model, False)


def on_channels_last(model):
    """Convolutions are faster with the channels last; a DynamicViT has few of them."""
    return model if isinstance(model, DynamicViT) else model.to(memory_format=torch.channels_last)


def build_model(args, num_classes, device="cpu") -> torch.nn.Module:
    """The model that the flags describe: one of `SIZES`, or of timm's models.

    On the device 'meta' it is only a description, without weights.
    """
    given = given_model_args(args) | {"num_classes": num_classes}
    try:
        if args.model in SIZES:
            given = SIZES[args.model] | given
            check_model_fits(**given)
            with torch.device(device):
                model = DynamicViT(**given)
        else:
            check_timm_model(args)
            if not args.drop_path:
                del given["drop_path_rate"]  # not every model has it
            model = timm_model(args.model, **given)
        check_model_args(model.model_args)  # now rather than when its checkpoint is read, after the training
        return model
    except ValueError as error:
        raise BadInput(str(error)) from None


def check_model_fits(img_size, patch_size, embed_dim, depth, mlp_ratio=4.0, num_register_tokens=4, **_):
    """Raise BadInput for a model whose weights alone are more than the memory, where the system reports its size."""
    (h, w), (ph, pw) = to_2tuple(img_size), to_2tuple(patch_size)
    in_blocks = depth * embed_dim * (4 * embed_dim + 2 * int(embed_dim * mlp_ratio))
    wanted = 4 * (in_blocks + embed_dim * (3 * ph * pw + h * w // (ph * pw) + num_register_tokens))
    if hasattr(os, "sysconf") and wanted > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise BadInput(
            f"a model of {depth} blocks, width {embed_dim}, MLP ratio {mlp_ratio:g}, {num_register_tokens} registers "
            f"and {h} x {w} pixels in patches of {ph} x {pw} does not fit into the memory; choose a smaller one"
        )


def load_finetune(model, path) -> LoadReport:
    """Put the weights in the file `path` into `model`, and print what went where."""
    try:
        report = load_weights(model, load_checkpoint(path))
    except ValueError as error:
        raise BadInput(f"--finetune {path}: {error}") from None
    for what, names in zip(("resampled", "left out", "new"), (report.resampled, report.left_out, report.new)):
        utils.say(f"--finetune: {what}: {', '.join(names) or 'nothing'}")
    utils.say(f"--finetune: loaded {len(report.loaded)} of the model's {len(model.state_dict())} tensors as they are")
    return report


def check_same_model(path, checkpoint, wanted: dict, advice):
    """Raise BadInput, with `advice`, unless a checkpoint's model and `data_set` have the values `wanted`."""
    about = checkpoint["data"]
    there = {"img_size": about["input_size"], "data_set": about["name"]} | checkpoint["model_args"]
    wanted = wanted | {name: to_2tuple(wanted[name]) for name in ("img_size", "patch_size") if wanted.get(name)}
    other = [f"{name} is {there.get(name)}, not {value}" for name, value in wanted.items() if there.get(name) != value]
    if other:
        raise BadInput(f"{path} is another model than the flags ask for ({'; '.join(other)}); {advice}")


def check_timm_model(args):
    """Raise BadInput unless the flags describe one of timm's models."""
    sizes = ", ".join(SIZES)
    if not timm.is_model(args.model):
        raise BadInput(f"there is no model {args.model}; choose one of {sizes}, or of timm's models")
    foreign = [f"--{flag}" for flag in MODEL_FLAGS if hasattr(args, flag) and flag not in OF_ANY_MODEL]
    if foreign:
        raise BadInput(f"{', '.join(foreign)}: timm's {args.model} has no such choice; use one of {sizes}")


def describe(model) -> str:
    size = sum(p.numel() for p in model.parameters()) / 1e6
    if not isinstance(model, DynamicViT):
        return f"{model.model_args['timm_name']} of timm, {size:.2f} M parameters"
    args, count = model.model_args, model.num_register_tokens

    def blocks(value):
        return utils.flag_value(list(value) if isinstance(value, tuple) else value)

    cls = "no class token" if model.cls_pos is None else f"CLS enters at block {model.cls_pos}"
    registers = f"{count} registers at block {blocks(model.reg_pos)}" if count else "no registers"
    more = [f"leaving at {blocks(args['reg_end'])}"] if "reg_end" in args else []
    more += [f"distillation token at block {model.dist_pos}"] if model.dist_pos is not None else []
    more += [f"{name} only read" for name, mode in (("CLS", "cls_mode"), ("registers", "reg_mode")) if mode in args]
    more += [f"class attention in the last {args['class_attention']}"] if "class_attention" in args else []
    words = ", ".join([f"{size:.2f} M parameters", cls, registers, *more])
    return f"{model.depth} blocks, width {model.embed_dim}, {words}"


def report_run(model, data):
    """The line that a run begins with."""
    sizes = data.description()["images"]
    utils.say(f"{describe(model)}; {data.name}: " + ", ".join(f"{n} {part}" for part, n in sizes.items()) + " images")
