"""The epochs of a run: training, validation, saving. Both training scripts call `run_epochs`."""

from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import utils
from checkpoints.files import save_checkpoint
from engine import NotFinite, Position, TrainingStep, evaluate, peak_rate, train_one_epoch
from training import run_folder
from training.film import Film
from training.log_to import open_logs
from training.run_log import RunLogger, environment, peak_memory, plain_args, reset_peak_memory
from training.setup import updates_per_epoch
from training.signals import StopSignals
from training.state import TrainingState, weights_of
from utils import RunFailed, Stopped, say


@dataclass
class Run:
    """What a run has, beside the step that it repeats.

    Args:
        model: on `device`, not wrapped; with `model_args`, from which it can be built again.
        batches: see `engine.train_one_epoch`; with `set_epoch(epoch, batch)`.
        val_batches: the same for `engine.evaluate`, or None.
        data: the description of the data in a checkpoint.
        args: the flags in `flags.add_training_flags` and `add_machine_flags`, `epochs`, `output_dir`.
        best_path: for the weights with the best validation accuracy; without validation images the last ones.
        resume: the checkpoint to resume from, or None.
        until: end after this epoch of the whole schedule, as a run that is stopped there; None: after the last one.
    """

    model: torch.nn.Module
    batches: Any
    val_batches: Any
    data: dict
    args: Namespace
    device: torch.device
    best_path: Path
    resume: str | None = None
    until: int | None = None


def run_epochs(run: Run, step: TrainingStep) -> dict:
    """Train, validate after each epoch, and write:

    `run.best_path`, and in `args.output_dir` `checkpoint.pth` (to resume from), `log.txt` (JSON lines),
    `training_curves.png/.pdf` and, with --viz_every, the pages of `training.film`.

    Returns:
        The metrics of the saved weights.

    Raises:
        BadInput: the checkpoint to resume from is of another model or other data; a folder cannot be written.
        RunFailed: a loss that is not finite.
        Stopped: by a signal; the run is saved.
    """
    args, model = run.args, run.model
    utils.writable_folder(args.output_dir)
    reset_peak_memory(run.device)  # a sweep has a run after another in one process
    ema = ModelEmaV3(model, decay=args.ema, use_warmup=True) if args.ema else None
    shown = ema.module if ema else model
    film = Film(args, model, run.val_batches, run.data, resumed=bool(run.resume))
    state = TrainingState(model, step.optimizer, step.scaler, ema, run.data, args)
    wrap(step, args, run.data["input_size"], ema)
    if run.resume:
        state.restore(run.resume)
        if state.best is not None and not run.best_path.is_file():  # resumed in another folder, for instance
            say(f"note: {run.best_path}, the best weights so far, is missing; the best of the epochs to come is saved")
            state.best = None
    with open_logs(args, state.epoch if run.resume else None) as log_to, StopSignals() as stop:
        logger = RunLogger(utils.main_decides(lambda: start_log(run, state, step.amp_dtype)), log_to)
        with gathered(shown):
            film.begin(shown, state.epoch, state.step)
        hooks = StepHooks(state, stop, run.val_batches)
        for epoch in range(state.epoch, run.until or args.epochs):
            if args.max_steps and state.step >= args.max_steps:
                break
            title = f"epoch {epoch + 1}/{args.epochs}"
            trained = train_epoch(run, step, state, hooks, epoch, title)
            metrics = epoch_metrics(epoch + 1, trained, step, run, ema, hooks)
            say(epoch_line(title, metrics))
            if state.end_epoch(metrics, trained["skipped"], run.val_batches is None):
                best = {"model": weights_of(shown), **state.about()}
                if utils.is_main():
                    save_checkpoint(run.best_path, best)
            state.save()
            with gathered(shown):
                if utils.is_main():
                    logger.add(metrics)
                    film.after(epoch + 1, state.step)
        logger.draw()
        utils.barrier()  # nobody tests before the result is written
        if number := stop.agreed(wait=True):
            raise Stopped(number, f"training is done and saved; test {run.best_path}")
    return state.best


def train_epoch(run: Run, step: TrainingStep, state: TrainingState, hooks, epoch, title) -> dict:
    """What `train_one_epoch` returns for this epoch, or for the rest of it."""
    run.batches.set_epoch(epoch, state.batch)
    first_update = epoch * updates_per_epoch(run.batches, run.args)
    try:
        trained = train_one_epoch(
            step, run.batches, start=Position(state.step, state.batch, state.sums, first_update),
            last_step=run.args.max_steps, skip_bad=max(run.args.skip_bad_steps - state.skipped, 0),
            on_step=hooks.after_step, title=title,
        )  # fmt: skip
    except NotFinite as error:
        raise bad_batch_error(error, title, state) from None
    state.step, state.batch, state.sums = trained["step"], len(run.batches), trained["sums"]
    return trained


class StepHooks:
    """Called between two batches: updates the EMA weights, saves, ends the run after a signal."""

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
        raise Stopped(number, f"{self.state.kept}; the same command with --resume resumes it")


def start_log(run: Run, state: TrainingState, amp_dtype) -> Path:
    header = {
        "args": plain_args(run.args), "model_args": run.model.model_args, "data": run.data, "amp": str(amp_dtype),
        "device": str(run.device), "processes": utils.world_size(), **environment(run.device),
    }  # fmt: skip
    if run.resume:
        return run_folder.resume_log(run.args.output_dir, header, state.epoch, state.metrics)
    return run_folder.begin_log(run.args.output_dir, run.best_path, header)


def wrap(step: TrainingStep, args, input_size, ema: ModelEmaV3 | None = None):
    """Put FSDP2 or DDP, and torch.compile around the step's model, as processes and flags ask for."""
    if args.fsdp:
        shard(step, ema)
    elif utils.world_size() > 1:
        step.model = DistributedDataParallel(step.model, gradient_as_bucket_view=True)
        rebuild_ddp_buckets(step, input_size)
    if args.compile:
        torch.compiler.reset()  # of a sweep's cells, whose forward pass is one function, torch compiles eight, no more
        step.model = torch.compile(step.model)


def shard(step: TrainingStep, ema: ModelEmaV3 | None):
    """Leave each process its share of every parameter; a block's are gathered when it is that block's turn (FSDP2)."""
    names = {parameter: name for name, parameter in step.model.named_parameters()}
    mesh = init_device_mesh(next(iter(names)).device.type, (utils.world_size(),))
    for model in (step.model,) if ema is None else (step.model, ema.module):
        model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no channels-last weights
        for block in getattr(model, "blocks", ()):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    shares = dict(step.model.named_parameters())
    for group in step.optimizer.param_groups:
        group["params"] = [shares[names[parameter]] for parameter in group["params"]]
    if ema is not None:
        ema.foreach = False  # of shares and whole buffers together


@contextmanager
def gathered(model):
    """Meanwhile every process has all weights of an FSDP model, and may call it more or less often than the others."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def rebuild_ddp_buckets(step: TrainingStep, input_size):
    """Let DDP see one gradient, after which it arranges its buckets anew, once.

    How gradients lie in buckets decides in which order three or more processes add them up, so that a resumed run
    would otherwise round its first step in another way than the one that never stopped.
    """
    device, training = next(step.model.parameters()).device, step.model.training
    step.model.eval()  # nothing is drawn
    step.backward(torch.zeros(2, 3, *input_size, device=device), torch.zeros(2, dtype=torch.long, device=device))
    step.model.zero_grad()
    step.model.train(training)


def bad_batch_error(error: NotFinite, title, state: TrainingState) -> RunFailed:
    """The error for the user, with the batch that led to it in a file."""
    path = Path(state.args.output_dir) / f"bad_batch_step{error.batch['step']}_process{utils.rank()}.pth"
    save_checkpoint(path, error.batch)
    has = "that batch" if "images" in error.batch else "its numbers (a GPU keeps only the newest batch)"
    return RunFailed(f"{title}: {error}; {path} has {has}, {state.kept}. Try a lower --lr, or --clip_grad 1")


def epoch_metrics(epoch, trained, step: TrainingStep, run: Run, ema, hooks) -> dict:
    """One epoch's record in the log. With EMA, `val_*` are those of the EMA weights, which are what is saved."""
    metrics = {
        "epoch": epoch, "step": trained["step"], "train_loss": trained["loss"],
        "lr": peak_rate(step.optimizer), "grad_norm": trained["grad_norm"],
        "seconds": round(trained["seconds"], 3), "images_per_s": round(trained["images"] / trained["seconds"], 1),
        "data_wait": round(100 * trained["data_wait"], 2), "memory_mib": round(peak_memory(run.device), 1),
    }  # fmt: skip
    if trained["skipped"]:
        metrics["skipped"] = trained["skipped"]
    for model in (run.model, *([] if ema is None else [ema.module])) if utils.world_size() > 1 else ():
        distribute_bn(model, utils.world_size())  # from the first process: each has its own statistics

    def validated(model):
        with gathered(model):
            return evaluate(model, run.val_batches, on_batch=hooks.in_validation())

    if run.val_batches is not None:
        scored = validated(run.model)
        if ema is not None:
            metrics |= {"raw_val_loss": scored["loss"], "raw_val_top1": scored["top1"]}
            scored = validated(ema.module)
        metrics |= {"val_loss": scored["loss"], "val_top1": scored["top1"], "val_top5": scored["top5"]}
    return metrics


def epoch_line(title, metrics) -> str:
    words = [f"train loss {metrics['train_loss']:.4f}"]
    if "val_top1" in metrics:
        words += [f"val loss {metrics['val_loss']:.4f}", f"val accuracy {metrics['val_top1']:.2f}%"]
    if "raw_val_top1" in metrics:
        words[-1] += f" (EMA; without {metrics['raw_val_top1']:.2f}%)"
    words += [f"lr {metrics['lr']:.2e}", f"{metrics['images_per_s']:,.0f} images/s", f"{metrics['seconds']:.1f} s"]
    return f"{title}: " + ", ".join(words)
