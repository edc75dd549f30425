"""The epochs of a run: training, validation, saving. Both training scripts call `run_epochs`."""

from itertools import count
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import utils
from checkpoints.files import save_checkpoint
from engine import NotFinite, evaluate, train_one_epoch
from models_dynamic import set_fused_attention
from training import run_folder
from training.film import Film
from training.run_log import RunLogger, environment, plain_args
from training.setup import updates_per_epoch
from training.signals import StopSignals
from training.state import TrainingState
from utils import RunFailed, Stopped, say


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
    utils.reset_peak_memory(device)  # a sweep has a run after another in one process
    amp_dtype = utils.amp_dtype(args.amp, device)
    if device.type == "cpu" and amp_dtype is not None:
        set_fused_attention(model, False)  # torch's fused kernel is several times slower in bfloat16 on CPUs
    scaler = torch.amp.GradScaler(device.type) if amp_dtype is torch.float16 else None
    ema = ModelEmaV3(model, decay=args.ema, use_warmup=True) if args.ema else None
    shown = ema.module if ema else model
    maps = Film(args, model, val_batches, description)
    state = TrainingState(model, optimizer, scaler, ema, description, args)
    if args.resume:
        state.restore(args.resume)
        if state.best is not None and not Path(best_path).is_file():  # gone on with in another folder, for instance
            say(f"note: {best_path}, the best weights so far, is not there; the best of the epochs to come will be")
            state.best = None
    wrapped = wrap(model, args, description)
    log = utils.main_decides(lambda: start_log(folder, best_path, state, device, amp_dtype))
    record = RunLogger(log, args.tensorboard, state.epoch)
    maps.begin(shown, state.epoch, state.step)
    with StopSignals() as stop:
        checks = StepHooks(state, stop, val_batches)
        for epoch in range(state.epoch, args.epochs):
            if args.max_steps and state.step >= args.max_steps:
                break
            batches.set_epoch(epoch, state.batch)
            title = f"epoch {epoch + 1}/{args.epochs}"
            try:
                trained = train_one_epoch(
                    wrapped, batches, criterion, optimizer, scheduler, step=state.step, last_step=args.max_steps,
                    first_update=epoch * updates_per_epoch(len(batches), args), accum_steps=args.accum_steps,
                    mixup=mixup, teacher=teacher, amp_dtype=amp_dtype, scaler=scaler, clip_grad=args.clip_grad,
                    skip_bad=max(args.skip_bad_steps - state.skipped, 0), on_step=checks.after_step, done=state.batch,
                    sums=state.sums, title=title,
                )  # fmt: skip
            except NotFinite as error:
                raise bad_batch_error(error, title, state) from None
            state.step, state.batch, state.sums = trained["step"], len(batches), trained["sums"]
            metrics = epoch_metrics(epoch + 1, trained, optimizer, device, model, ema, val_batches, checks)
            say(epoch_line(title, metrics))
            state.epoch, state.batch, state.sums, state.metrics = epoch + 1, 0, None, metrics
            state.skipped += trained["skipped"]
            better = state.best is None or val_batches is None or selection_key(metrics) > selection_key(state.best)
            if better:
                state.best = metrics
                if utils.is_main():
                    save_checkpoint(best_path, {"model": shown.state_dict(), **state.about()})
            state.save()
            if utils.is_main():
                record.add(metrics)
                maps.after(epoch + 1, state.step)
        record.draw()
        utils.barrier()  # nobody goes on to test before the result is written
        if number := stop.agreed(wait=True):
            raise Stopped(number, f"training is done and saved; test {best_path}")
    return state.best


class StepHooks:
    """What is looked at between two batches: averaged weights, whether to save, whether to end."""

    def __init__(self, state: TrainingState, stop: StopSignals, val_batches):
        self.state, self.stop, self.every = state, stop, state.args.save_steps
        # Processes may have one batch more or less to validate, and ask each other equally often.
        self.rounds = 0 if val_batches is None else min(utils.gather(len(val_batches)))

    def after_step(self, step, progress):
        state = self.state
        if state.ema is not None:
            state.ema.update(state.model, step)
        number = self.stop.agreed()
        if number or (self.every and step % self.every == 0):
            state.step, state.batch, state.sums = step, progress.done, progress.sums()
            state.save()
        if number:
            self._end(number)

    def in_validation(self):
        """A function for `evaluate` to call after each batch."""
        turns = count()

        def after_batch():
            if next(turns) < self.rounds and (number := self.stop.agreed()):
                self.state.save()
                self._end(number)

        return after_batch

    def _end(self, number):
        utils.barrier()  # until it is saved
        raise Stopped(number, f"{self.state.kept}; the same command with --resume goes on")


def start_log(folder, best_path, state, device, amp_dtype) -> Path:
    header = {
        "args": plain_args(state.args), "model_args": state.model.model_args, "data": state.description,
        "amp": str(amp_dtype), "device": str(device), "processes": utils.world_size(), **environment(device),
    }  # fmt: skip
    if state.args.resume:
        return run_folder.resume_log(folder, header, state.epoch, state.metrics)
    return run_folder.begin_log(folder, best_path, header)


def wrap(model, args, description):
    """The model as training calls it."""
    wrapped = model
    if utils.world_size() > 1:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        rebuild_ddp_buckets(wrapped, description)
    return torch.compile(wrapped) if args.compile else wrapped


def rebuild_ddp_buckets(wrapped, description):
    """Let DDP see one gradient, after which it arranges its buckets anew, once.

    How gradients lie in buckets decides in which order three or more processes add them up, so that a run that goes on
    would otherwise round its first step in another way than the one that never stopped.
    """
    device, training = next(wrapped.parameters()).device, wrapped.training
    outputs = wrapped.eval()(torch.zeros(2, 3, *description["input_size"], device=device))
    sum(logits.sum() for logits in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    wrapped.zero_grad()
    wrapped.train(training)


def bad_batch_error(error: NotFinite, title, state: TrainingState) -> RunFailed:
    """The error for the user, with the batch that led to it in a file."""
    path = Path(state.args.output_dir) / f"bad_batch_step{error.batch['step']}_process{utils.rank()}.pth"
    save_checkpoint(path, error.batch)
    has = "that batch" if "images" in error.batch else "its numbers (a GPU keeps only the newest batch)"
    return RunFailed(f"{title}: {error}; {path} has {has}, {state.kept}. Try a lower --lr, or --clip_grad 1")


def epoch_metrics(epoch, trained, optimizer, device, model, ema, val_batches, checks) -> dict:
    """One epoch's record in the log. With EMA, `val_*` are the figures of the EMA weights, which are what is saved."""
    metrics = {
        "epoch": epoch, "step": trained["step"], "train_loss": trained["loss"], "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": trained["grad_norm"], "seconds": round(trained["seconds"], 3),
        "images_per_s": round(trained["images"] / trained["seconds"], 1),
        "data_wait": round(100 * trained["data_wait"], 2), "memory_mib": round(utils.peak_memory(device), 1),
    }  # fmt: skip
    if trained["skipped"]:
        metrics["skipped"] = trained["skipped"]
    utils.broadcast_buffers(model)
    if val_batches is not None:
        scored = evaluate(model, val_batches, on_batch=checks.in_validation())
        if ema is not None:
            metrics |= {"raw_val_loss": scored["loss"], "raw_val_top1": scored["top1"]}
            scored = evaluate(ema.module, val_batches, on_batch=checks.in_validation())
        metrics |= {"val_loss": scored["loss"], "val_top1": scored["top1"], "val_top5": scored["top5"]}
    return metrics


def selection_key(metrics):
    return metrics["val_top1"], -metrics["val_loss"]


def epoch_line(title, metrics) -> str:
    words = [f"train loss {metrics['train_loss']:.4f}"]
    if "val_top1" in metrics:
        words += [f"val loss {metrics['val_loss']:.4f}", f"val accuracy {metrics['val_top1']:.2f}%"]
    if "raw_val_top1" in metrics:
        words[-1] += f" (EMA; without {metrics['raw_val_top1']:.2f}%)"
    words += [f"lr {metrics['lr']:.2e}", f"{metrics['images_per_s']:,.0f} images/s", f"{metrics['seconds']:.1f} s"]
    return f"{title}: " + ", ".join(words)
