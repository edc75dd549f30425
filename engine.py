"""One epoch of training, and evaluation: the only place where a training step is run."""

import sys
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import RunFailed, autocast, is_main, say, sum_over_ranks


def train_one_epoch(
    model,
    batches,
    criterion,
    optimizer,
    scheduler,
    *,
    step=0,
    last_step=None,
    accum_steps=1,
    mixup=None,
    amp_dtype=None,
    scaler=None,
    clip_grad=None,
    on_step=None,
    title="",
) -> dict:
    """Train on every batch once. The device is never waited for between two reports of progress.

    Args:
        model: may be wrapped by DDP or torch.compile.
        batches: sized iterable of (images (B, 3, h, w), labels (B,)) on the model's device.
        criterion: (logits (B, K), labels or, after `mixup`, class shares (B, K)) -> mean loss.
        scheduler: a timm scheduler that counts optimizer steps; its rate is set before each step.
        step: optimizer steps taken so far; `last_step`: stop when so many are taken.
        accum_steps: batches for one optimizer step.
        on_step: called with the number of steps taken, after each (EMA).

    Returns:
        `loss` (mean over this process's images), `images`, `seconds`, `step`.

    Raises:
        RunFailed: the loss is not finite. The weights are then spoiled; nothing is saved here.
    """
    model.train()
    report = _Progress(title, len(batches), optimizer)
    for i, (images, labels) in enumerate(batches):
        if step == last_step:
            break
        group = min(accum_steps, len(batches) - i // accum_steps * accum_steps)  # the last group may be smaller
        complete = i % accum_steps == group - 1
        if mixup is not None:
            images, labels = mixup(images, labels)
        with nullcontext() if complete or not hasattr(model, "no_sync") else model.no_sync():
            with autocast(images.device, amp_dtype):
                loss = criterion(model(images), labels)
            (loss if scaler is None else scaler.scale(loss)).div(group).backward()
        if complete:
            scheduler.step_update(step)
            _optimizer_step(model, optimizer, scaler, clip_grad)
            step += 1
            if on_step is not None:
                on_step(step)
        report.update(loss.detach(), len(images), step)
    return report.close() | {"step": step}


def _optimizer_step(model, optimizer, scaler, clip_grad):
    if scaler is not None:
        scaler.unscale_(optimizer)
    if clip_grad:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


class _Progress:
    """Sums the loss on the device; reads it, which waits for the device, only to show it: twice a second on a
    terminal, in a line each half minute elsewhere."""

    def __init__(self, title, batches, optimizer):
        terminal = sys.stderr.isatty()
        self.title, self.batches, self.optimizer = title, batches, optimizer
        self.interval = 0.5 if terminal else 30.0
        self.bar = tqdm(total=batches, desc=title, unit="batch", leave=False, disable=not (terminal and is_main()))
        self.start = self.shown = time.monotonic()
        self.done = self.images = self.step = 0
        self.loss_sum = 0.0

    def update(self, loss, images, step):
        self.loss_sum = self.loss_sum + loss * images
        self.images, self.done, self.step = self.images + images, self.done + 1, step
        self.bar.update()
        if time.monotonic() - self.shown >= self.interval:
            loss, rate = self._loss(), self.images / (time.monotonic() - self.start)
            lr = self.optimizer.param_groups[0]["lr"]
            line = f"loss {loss:.4f}, lr {lr:.2e}, {rate:,.0f} images/s"
            self.bar.set_postfix_str(line)
            if self.bar.disable:
                say(f"{self.title}: batch {self.done}/{self.batches}, {line}")
            self.shown = time.monotonic()

    def _loss(self) -> float:
        loss = float(self.loss_sum) / max(self.images, 1)
        if loss != loss or loss in (float("inf"), float("-inf")):
            lr = self.optimizer.param_groups[0]["lr"]
            raise RunFailed(f"the loss is {loss} in step {self.step} or before, at learning rate {lr:.3g}")
        return loss

    def close(self) -> dict:
        self.bar.close()
        loss = self._loss()
        return {"loss": loss, "images": self.images, "seconds": time.monotonic() - self.start}


@torch.no_grad()
def evaluate(model, batches, keep_predictions=False) -> dict:
    """Score a model in full precision, every image once, over all processes.

    Returns:
        `loss` (mean cross-entropy), `top1` and `top5` in per cent, `images`; with `keep_predictions` also
        `predictions` (M,), the classes this process predicted, in the order of its batches.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    loss, counts, predictions = torch.zeros((), device=device), torch.zeros(3, dtype=torch.long, device=device), []
    for images, labels in batches:
        logits = model(images).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        hits = ranked == labels[:, None]
        loss += F.cross_entropy(logits, labels, reduction="sum")
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.ones_like(labels).sum()])
        if keep_predictions:
            predictions.append(ranked[:, 0])
    model.train(was_training)
    top1, top5, images = sum_over_ranks(counts).tolist()
    loss = sum_over_ranks(loss).item() / images
    result = {"loss": loss, "top1": 100 * top1 / images, "top5": 100 * top5 / images, "images": images}
    if keep_predictions:
        result["predictions"] = torch.cat(predictions).cpu()
    return result
