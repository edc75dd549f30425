"""`train_model`: the epochs, validation, saving. `cifar_main.py` is what a user starts."""

import math
from pathlib import Path
from time import perf_counter

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import flags
import utils
from datasets import ImageData, Loader, TrainTransform, load_data
from engine import evaluate, train_one_epoch
from models_dynamic import DynamicViT, set_fused_attention
from training_maps import TrainingMaps
from utils import BadInput, RunFailed, say

CURVES_EVERY = 30  # seconds, at least; and after the last epoch


def train_from_flags(args, device, data: ImageData | None = None) -> dict:
    """`train_model` on the model, and the data if they are not given, that the flags of `cifar_main.py` describe."""
    flags.check_folder(args)
    input_size = flags.build_model(args, 10, "meta").model_args["img_size"]  # wrong flags show before data are read
    utils.writable_folder(Path(args.model_path).parent)
    if data is None:
        with utils.main_first():
            data = load_data(args.data_set, args.data_path, input_size, args.val_size)
    utils.seed_everything(args.seed)
    model = flags.build_model(args, len(data.classes))
    if args.finetune:
        flags.load_finetune(model, args.finetune)
    flags.say_what(model, data)
    utils.seed_everything(args.seed + utils.rank())
    return train_model(model, data, args, device)


def train_model(model: DynamicViT, data: ImageData, args, device) -> dict:
    """Train `model` on images in memory, as `run_epochs` does; the best weights go to `args.model_path`.

    Args:
        model: on the CPU or `device`, not wrapped.
        args: the flags of `cifar_main.py`.

    Returns:
        The metrics of the saved weights.

    Raises:
        BadInput: the checkpoint to resume from is of another model or other data; a folder cannot be written.
        RunFailed: a loss that is not finite.
    """
    utils.writable_folder(Path(args.model_path).parent)
    model.to(device)
    description = data.description()
    batches, val_batches = _loaders(data, description, args, device)
    optimizer, scheduler = make_optimizer(
        model, args, len(batches), opt="adamw", lr=args.lr, warmup_lr=1e-6, min_lr=1e-6
    )
    mixup, criterion = make_mixup_and_loss(args, batches.batch_size, len(data.classes))
    return run_epochs(
        model, batches, val_batches, criterion, optimizer, scheduler, description, args, device,
        best_path=Path(args.model_path), mixup=mixup,
    )  # fmt: skip


def run_epochs(
    model, batches, val_batches, criterion, optimizer, scheduler, description, args, device, *, best_path, mixup=None,
    teacher=None,
) -> dict:  # fmt: skip
    """Train on `batches`, validate after each epoch, and write:

    `best_path` (the weights with the best validation accuracy; without validation images the last ones), and in
    `args.output_dir` `checkpoint.pth` (to resume from), `log.txt` (JSON lines), `training_curves.png/.pdf` and,
    with --viz_every, the pages of `training_maps`.

    Args:
        model: on `device`, not wrapped; with `model_args`, from which it can be built again.
        batches: see `engine.train_one_epoch`; with `set_epoch(epoch)`.
        val_batches: the same for `engine.evaluate`, or None.
        description: what a checkpoint says about its data.
        args: the flags in `flags.add_training_flags` and `add_machine_flags`, `epochs`, `output_dir`, `resume`.

    Returns and raises what `train_model` does.
    """
    folder = utils.writable_folder(args.output_dir)
    amp_dtype = utils.amp_dtype(args.amp, device)
    if device.type == "cpu" and amp_dtype is not None:
        set_fused_attention(model, False)  # torch's fused kernel is several times slower in bfloat16 on CPUs
    scaler = torch.amp.GradScaler(device.type) if amp_dtype is torch.float16 else None
    ema = ModelEmaV3(model, decay=args.ema, use_warmup=True) if args.ema else None
    shown = ema.module if ema else model
    maps = TrainingMaps(args, model, val_batches, description)
    state = {"epoch": 0, "step": 0, "best": None}
    if args.resume:
        state |= _resume(args.resume, model, description, args, optimizer, scaler, ema)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if utils.world_size() > 1 else model
    if args.compile:
        wrapped = torch.compile(wrapped)

    log = folder / "log.txt"
    if utils.is_main() and not (args.resume and log.exists()):
        log.unlink(missing_ok=True)
        utils.append_json(log, {
            "args": utils.plain_args(args), "model_args": model.model_args, "data": description,
            "amp": str(amp_dtype), "device": str(device), "processes": utils.world_size(), **utils.environment(),
        })  # fmt: skip
    board = utils.tensorboard(folder) if args.tensorboard and utils.is_main() else None
    best, step, drawn = state["best"], state["step"], -math.inf
    maps.begin(shown, state["epoch"], step)
    for epoch in range(state["epoch"], args.epochs):
        if step == args.max_steps:
            break
        batches.set_epoch(epoch)
        title = f"epoch {epoch + 1}/{args.epochs}"
        try:
            trained = train_one_epoch(
                wrapped, batches, criterion, optimizer, scheduler, step=step, last_step=args.max_steps,
                accum_steps=args.accum_steps, mixup=mixup, teacher=teacher, amp_dtype=amp_dtype, scaler=scaler,
                clip_grad=args.clip_grad, on_step=None if ema is None else lambda taken: ema.update(model, taken),
                title=title,
            )  # fmt: skip
        except RunFailed as error:
            kept = f"{folder / 'checkpoint.pth'} holds the weights of epoch {epoch}" if epoch else "nothing was saved"
            raise RunFailed(f"{title}: {error}; {kept}. Try a lower --lr, or --clip_grad 1") from None
        step = trained["step"]
        metrics = _metrics(epoch + 1, trained, optimizer, device, model, ema, val_batches)
        say(_line(title, metrics))
        better = best is None or val_batches is None or _rank(metrics) > _rank(best)
        best = metrics if better else best
        if utils.is_main():
            about = {
                "model_args": model.model_args, "data": description, "args": utils.plain_args(args), "epoch": epoch + 1,
                "metrics": metrics,
            }  # fmt: skip
            if better:
                utils.save_checkpoint(best_path, {"model": shown.state_dict(), **about})
            training = {"step": step, "best": best, **_training_state(optimizer, scaler, ema)}
            utils.save_checkpoint(folder / "checkpoint.pth", {"model": model.state_dict(), **about, **training})
            utils.append_json(log, metrics)
            last = epoch + 1 == args.epochs or step == args.max_steps
            if last or perf_counter() - drawn > CURVES_EVERY:  # a page takes a second, small epochs little more
                utils.plot_curves([r for r in utils.read_json_lines(log) if "epoch" in r], folder)
                drawn = perf_counter()
            if board is not None:
                for name, value in metrics.items():
                    board.add_scalar(name, value, epoch + 1)
                board.flush()
            maps.after(epoch + 1, step)
    utils.barrier()  # nobody goes on to test before the result is written
    return best


def _loaders(data, description, args, device) -> tuple[Loader, Loader | None]:
    share = dict(batch_size=args.batch_size, rank=utils.rank(), world_size=utils.world_size())
    transform = TrainTransform(description, args.aug, args.hflip, args.reprob)
    train = Loader(
        data.train.to(device), description, transform=transform, passes=args.repeats, seed=args.seed, **share
    )
    return train, Loader(data.val.to(device), description, **share) if data.val else None


def make_optimizer(model, args, batches_per_epoch, *, opt, lr, warmup_lr, min_lr):
    """timm's optimizer, without decay of biases, norms and tokens, and its cosine schedule, counted in its steps."""
    device = next(model.parameters()).device
    fused = {"fused": True} if opt in ("adam", "adamw", "sgd") and device.type in ("cpu", "cuda") else {}
    optimizer = create_optimizer_v2(model, opt=opt, lr=lr, weight_decay=args.weight_decay, **fused)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=warmup_lr,
        min_lr=min_lr, step_on_epochs=False, updates_per_epoch=-(-batches_per_epoch // args.accum_steps),
    )  # fmt: skip
    return optimizer, scheduler


def make_mixup_and_loss(args, batch_size, classes, switch_prob=0.5, bce=False):
    """timm's Mixup (None without it) and the loss; label smoothing is done by one of the two."""
    mixup, smoothing = None, args.smoothing
    if args.mixup or args.cutmix:
        if batch_size % 2:
            raise BadInput("MixUp and CutMix pair images, and here is only one; give --mixup 0 --cutmix 0")
        mixup = Mixup(
            args.mixup, args.cutmix, prob=args.mix_prob, switch_prob=switch_prob, label_smoothing=args.smoothing,
            num_classes=classes,
        )  # fmt: skip
        smoothing = 0.0
    if bce:
        return mixup, BinaryCrossEntropy(smoothing=smoothing)
    return mixup, torch.nn.CrossEntropyLoss(label_smoothing=smoothing)


def _metrics(epoch, trained, optimizer, device, model, ema, val_batches) -> dict:
    """One epoch's record in the log. With EMA, `val_*` are the figures of the EMA weights, which are what is saved."""
    metrics = {
        "epoch": epoch, "step": trained["step"], "train_loss": trained["loss"], "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": trained["grad_norm"], "seconds": round(trained["seconds"], 3),
        "images_per_s": round(trained["images"] / trained["seconds"], 1),
        "data_wait": round(100 * trained["data_wait"], 2), "memory_mib": round(utils.peak_memory(device), 1),
    }  # fmt: skip
    utils.broadcast_buffers(model)
    if val_batches is not None:
        scored = evaluate(model, val_batches)
        if ema is not None:
            metrics |= {"raw_val_loss": scored["loss"], "raw_val_top1": scored["top1"]}
            scored = evaluate(ema.module, val_batches)
        metrics |= {"val_loss": scored["loss"], "val_top1": scored["top1"], "val_top5": scored["top5"]}
    return metrics


def _rank(metrics):
    return metrics["val_top1"], -metrics["val_loss"]


def _line(title, metrics) -> str:
    words = [f"train loss {metrics['train_loss']:.4f}"]
    if "val_top1" in metrics:
        words += [f"val loss {metrics['val_loss']:.4f}", f"val accuracy {metrics['val_top1']:.2f}%"]
    if "raw_val_top1" in metrics:
        words[-1] += f" (EMA; without {metrics['raw_val_top1']:.2f}%)"
    words += [f"lr {metrics['lr']:.2e}", f"{metrics['images_per_s']:,.0f} images/s", f"{metrics['seconds']:.1f} s"]
    return f"{title}: " + ", ".join(words)


def _training_state(optimizer, scaler, ema) -> dict:
    """What `_resume` puts back, beside the weights."""
    return {
        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None,
        "ema": ema.module.state_dict() if ema else None, "random": utils.random_states(),
    }  # fmt: skip


def _resume(path, model, description, args, optimizer, scaler, ema) -> dict:
    """Put everything back as it was when the checkpoint was written; returns epochs and steps done, and the best."""
    saved = utils.load_checkpoint(path)
    if "optimizer" not in saved or "model_args" not in saved:
        raise BadInput(f"{path} cannot be resumed from: it has no optimizer state; give the run's checkpoint.pth")
    for what, there, here in (
        ("model", saved["model_args"], model.model_args),
        ("data", saved["data"], description),
        ("--ema", {"ema": bool(saved["ema"])}, {"ema": bool(ema)}),
    ):
        other = [f"{k} is {there.get(k)} there, {here[k]} here" for k in here if there.get(k) != here[k]]
        if other:
            raise BadInput(f"--resume: the {what} of {path} differs: {'; '.join(other)}; give the same flags")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if scaler is not None and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    if ema is not None:
        ema.module.load_state_dict(saved["ema"])
    utils.set_random_states(saved["random"])
    if saved["epoch"] >= args.epochs:
        say(f"{path} has all {saved['epoch']} epochs; --epochs with a larger number goes on")
    else:
        say(f"going on after epoch {saved['epoch']} of {path}")
    return {name: saved[name] for name in ("epoch", "step", "best")}
