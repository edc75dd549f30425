"""One epoch of training, and evaluation: the only place where a training step is run."""

import sys
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import RunFailed, autocast, full_precision, is_main, say, sum_over_ranks, world_size


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
    teacher=None,
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
        criterion: (what the model returns, labels (B,) or, after `mixup`, class shares (B, K)) -> mean loss. With
            a `teacher`, images -> logits (B, K), those are its third argument.
        scheduler: a timm scheduler that counts optimizer steps; its rate is set before each step.
        step: optimizer steps taken so far; `last_step`: stop when so many are taken.
        accum_steps: batches for one optimizer step.
        on_step: called with the number of steps taken, after each (EMA).

    Returns:
        `loss` (mean) and `images`, over all processes; `grad_norm` (mean over the steps, before clipping), `seconds`,
        `data_wait` (share of them that this process spent waiting for batches), `step`.

    Raises:
        RunFailed: the loss is not finite. The weights are then spoiled; nothing is saved here.
    """
    model.train()
    report = _Progress(title, len(batches), optimizer)
    for i, (images, labels) in enumerate(report.timed(batches)):
        if step == last_step:
            break
        group = min(accum_steps, len(batches) - i // accum_steps * accum_steps)  # the last group may be smaller
        complete = i % accum_steps == group - 1
        if mixup is not None:
            images, labels = mixup(images, labels)
        with nullcontext() if complete or not hasattr(model, "no_sync") else model.no_sync():
            with autocast(images.device, amp_dtype):
                more = () if teacher is None else (_logits_of(teacher, images),)
                loss = criterion(model(images), labels, *more)
            (loss if scaler is None else scaler.scale(loss)).div(group).backward()
        if complete:
            scheduler.step_update(step)
            report.add_norm(_optimizer_step(model, optimizer, scaler, clip_grad))
            step += 1
            if on_step is not None:
                on_step(step)
        report.update(loss.detach(), len(images), step)
    return report.close() | {"step": step}


@torch.no_grad()
def _logits_of(teacher, images):
    return teacher(images)


def _optimizer_step(model, optimizer, scaler, clip_grad) -> torch.Tensor:
    """Returns the norm of the gradient before clipping, on its device."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    if clip_grad:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    return norm


class _Progress:
    """Sums loss and gradient norms on the device; reads them, which waits for the device, only to show them: twice a
    second on a terminal, in a line each half minute elsewhere."""

    def __init__(self, title, batches, optimizer):
        terminal = sys.stderr.isatty()
        self.title, self.batches, self.optimizer = title, batches, optimizer
        self.interval = 0.5 if terminal else 30.0
        self.bar = tqdm(total=batches, desc=title, unit="batch", leave=False, disable=not (terminal and is_main()))
        self.start = self.shown = time.monotonic()
        self.done = self.images = self.step = 0
        self.loss_sum = self.norm_sum = self.norms = self.waited = 0.0

    def timed(self, batches):
        """The batches, and the time spent waiting for them."""
        batches, end = iter(batches), object()
        while True:
            start = time.monotonic()
            batch = next(batches, end)
            self.waited += time.monotonic() - start
            if batch is end:
                return
            yield batch

    def add_norm(self, norm):
        finite = norm.isfinite()  # with float16, a step whose gradient is not is left out by the scaler
        self.norm_sum = self.norm_sum + torch.where(finite, norm, 0.0)
        self.norms = self.norms + finite

    def update(self, loss, images, step):
        self.loss_sum = self.loss_sum + loss * images
        self.images, self.done, self.step = self.images + images, self.done + 1, step
        self.bar.update()
        if time.monotonic() - self.shown >= self.interval:
            loss, rate = self._loss(), world_size() * self.images / (time.monotonic() - self.start)
            lr = self.optimizer.param_groups[0]["lr"]
            line = f"loss {loss:.4f}, lr {lr:.2e}, {rate:,.0f} images/s"
            self.bar.set_postfix_str(line)
            if self.bar.disable:
                say(f"{self.title}: batch {self.done}/{self.batches}, {line}")
            self.shown = time.monotonic()

    def _loss(self) -> float:
        return self._checked(float(self.loss_sum) / max(self.images, 1))

    def _checked(self, loss) -> float:
        if loss != loss or loss in (float("inf"), float("-inf")):
            lr = self.optimizer.param_groups[0]["lr"]
            raise RunFailed(f"the loss is {loss} in step {self.step} or before, at learning rate {lr:.3g}")
        return loss

    def close(self) -> dict:
        self.bar.close()
        device = self.optimizer.param_groups[0]["params"][0].device
        sums = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in (self.loss_sum, self.images))
        loss_sum, images = sum_over_ranks(torch.stack(list(sums))).tolist()
        seconds = time.monotonic() - self.start
        return {
            "loss": self._checked(loss_sum / max(images, 1)), "images": int(images), "seconds": seconds,
            "grad_norm": float(self.norm_sum) / max(float(self.norms), 1),
            "data_wait": self.waited / max(seconds, 1e-9),
        }  # fmt: skip


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
    with full_precision():
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
