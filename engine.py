"""One epoch of training, and evaluation: the only place where a training step is run."""

import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import RunFailed, full_precision, is_main, say, sum_over_ranks, world_size

LAG = 4  # steps that a GPU may be behind with its answer whether a step was finite, before it is waited for


class NotFinite(RunFailed):
    """A loss or a gradient that is not finite.

    `batch`: what led to it, as plain values (`loss`, `grad_norm`, `batch`, its number, `step`, `lr`), and its `images`
    and `labels` if it was the newest batch, or on a CPU.
    """

    def __init__(self, message, batch):
        super().__init__(message)
        self.batch = batch


def peak_rate(optimizer) -> float:
    """The learning rate now; with layer-wise decay that of the last layer, the largest."""
    return max(group["lr"] for group in optimizer.param_groups)


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()


@dataclass
class TrainingStep:
    """What an optimizer step takes, and how it is taken.

    Args:
        model: may be wrapped by DDP, FSDP2 or torch.compile.
        criterion: (what the model returns, labels (B,) or, after `mixup`, class shares (B, K)) -> mean loss. With
            a `teacher`, images -> logits (B, K), those are its third argument.
        scheduler: a timm scheduler that counts optimizer steps; its rate is set before each step.
        accum_steps: batches for one optimizer step.
        clip_grad: largest norm of the gradient; 0 or None: any.
    """

    model: torch.nn.Module
    criterion: Callable
    optimizer: torch.optim.Optimizer
    scheduler: Any
    accum_steps: int = 1
    mixup: Callable | None = None
    teacher: Callable | None = None
    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    clip_grad: float | None = None

    def backward(self, images, labels, of=1, last=True) -> torch.Tensor:
        """Add the gradient of one `of` so many batches; returns the loss, detached. `last`: an update follows."""
        if hasattr(self.model, "set_requires_gradient_sync"):  # FSDP2's no_sync
            self.model.set_requires_gradient_sync(last)
        with nullcontext() if last or not hasattr(self.model, "no_sync") else self.model.no_sync():
            with autocast(images.device, self.amp_dtype):
                more = () if self.teacher is None else (self._teacher_logits(images),)
                loss = self.criterion(self.model(images), labels, *more)
            (loss if self.scaler is None else self.scaler.scale(loss)).div(of).backward()
        return loss.detach()

    @torch.no_grad()
    def _teacher_logits(self, images):
        return self.teacher(images)

    def gradient_norm(self) -> torch.Tensor:
        """The norm of the gradient before it was clipped, on its device."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip_grad:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2: each process has a part of it

    def update(self, good=True):
        """Take the step if it is `good`; in any case forget the gradient."""
        if self.scaler is not None:
            if good:
                self.scaler.step(self.optimizer)
            self.scaler.update()
        elif good:
            self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass
class Position:
    """Where in a run `train_one_epoch` begins.

    Args:
        step: optimizer steps taken so far.
        batch, sums: what `progress` gave, to resume in the middle of an epoch.
        first_update: the place in the schedule at which this epoch begins: the steps of so many epochs like this one,
            whatever the batch size and the number of processes of those before it. None: the steps that were taken.
    """

    step: int = 0
    batch: int = 0
    sums: dict | None = None
    first_update: int | None = None


def train_one_epoch(
    parts: TrainingStep, batches, *, start: Position | None = None, last_step=None, skip_bad=0, on_step=None, title=""
) -> dict:
    """Train on every batch once. The device is never waited for between two reports of progress (but with `skip_bad`).

    Args:
        batches: sized iterable of (images (B, 3, h, w), labels (B,)) on the model's device. In the middle of an epoch
            it begins at batch `start.batch`, but its length is that of the whole epoch.
        last_step: stop when so many steps are taken.
        skip_bad: leave out so many steps whose loss or gradient is not finite; they count as steps for the schedule.
        on_step: called after each step, not after one that was left out, with the number of steps taken and the
            progress of the epoch: `progress.done` batches, and `progress.sums()`.

    Returns:
        `loss` (mean) and `images`, over all processes; `grad_norm` (mean over the steps, before clipping), `seconds`,
        `data_wait` (share of them that this process spent waiting for batches), `step`, `skipped` (steps left out),
        `sums` (of this process).

    Raises:
        NotFinite: as the name says, and it was not to be skipped. On a CPU that step was not taken; on a GPU, which
            is not waited for, it was, and some more: the weights are spoiled. Nothing is saved here.
    """
    start, accum = start or Position(), parts.accum_steps
    step, group = start.step, []
    first_update = step - start.batch // accum if start.first_update is None else start.first_update
    parts.model.train()
    watch = Watch(title, parts.optimizer, skip_bad, start.sums["skipped"] if start.sums else 0)
    progress = Progress(title, len(batches), parts.optimizer, watch, start.batch, start.sums)
    for i, (images, labels) in enumerate(progress.timed(batches), start.batch):
        if last_step is not None and step >= last_step:
            break
        size = min(accum, len(batches) - i // accum * accum)  # the last group may be smaller
        complete = i % accum == size - 1
        if parts.mixup is not None:
            images, labels = parts.mixup(images, labels)
        loss = parts.backward(images, labels, size, last=complete)
        group.append((i, len(images), loss))
        watch.sees(i, images, labels, loss)
        if complete:
            parts.scheduler.step_update(first_update + i // accum)
            norm = parts.gradient_norm()
            good = watch.allows(step, group, norm, overflow_is_usual=parts.scaler is not None)
            parts.update(good)
            progress.add(group, norm, good)
            step, group = step + 1, []
            if good and on_step is not None:
                on_step(step, progress)
    return progress.close() | {"step": step, "skipped": watch.skipped}


class Watch:
    """Looks whether loss and gradient of each step are finite, without waiting for a GPU, whose answer comes later.

    With `skip_bad` it waits: a step to be left out must be known before it is taken. Of the steps that a GPU has not
    answered for it keeps numbers, and of the batches only the newest: several of them could fill its memory.
    """

    def __init__(self, title, optimizer, skip_bad, skipped=0):
        self.title, self.optimizer, self.skip_bad = title, optimizer, skip_bad
        self.skipped, self.waiting, self.batch = skipped, deque(), None

    def sees(self, i, images, labels, loss):
        """Keep batch `i` in place of the one before it, unless that is known to be the bad one of this step."""
        if self.batch is None or loss.device.type != "cpu" or self.batch[3].isfinite():
            self.batch = (i, images, labels, loss)

    def allows(self, step, group, norm, overflow_is_usual) -> bool:
        """Whether to take the step. `overflow_is_usual`: of gradients, in float16; its scaler leaves such steps out."""
        bad = ~torch.stack([loss for *_, loss in group]).isfinite().all()
        if not overflow_is_usual:
            bad = bad | ~norm.isfinite()
        about = (step, group, norm, peak_rate(self.optimizer))
        if self.skip_bad:  # all processes leave out the same steps
            if not sum_over_ranks(bad.float()).item():
                return True
            error = self._error(*about)
            if self.skipped == self.skip_bad:
                raise error
            self.skipped, self.batch = self.skipped + 1, None
            say(f"{self.title}: {error}; skipped, {self.skipped} of {self.skip_bad}")
            return False
        answered = None
        if bad.is_cuda:
            stream = torch.cuda.current_stream(bad.device)
            bad, answered = bad.to("cpu", non_blocking=True), stream.record_event()
        self.waiting.append((bad, answered, about))
        self.look(LAG)
        return True

    def look(self, lag):
        """At the answers that are there, waiting for all but the last `lag` of them."""
        while self.waiting:
            bad, answered, about = self.waiting[0]
            if answered is not None and len(self.waiting) <= lag and not answered.query():
                return
            if answered is not None:
                answered.synchronize()
            self.waiting.popleft()
            if bad:
                raise self._error(*about)

    def _error(self, step, group, norm, lr) -> NotFinite:
        i, _, loss = next((entry for entry in group if not entry[2].isfinite()), group[-1])
        batch = {"loss": float(loss), "grad_norm": float(norm), "batch": i, "step": step, "lr": lr}
        if self.batch is not None and self.batch[0] == i:
            batch |= {"images": self.batch[1].cpu(), "labels": self.batch[2].cpu()}
        where = f"the loss is {float(loss):.4g} in batch {i} (step {step})"
        return NotFinite(f"{where}, norm of the gradient {float(norm):.3g}, learning rate {lr:.3g}", batch)


class Progress:
    """Sums loss and gradient norms on the device; reads them, which waits for the device, only to show them: twice a
    second on a terminal, in a line each half minute elsewhere."""

    def __init__(self, title, batches, optimizer, watch, done=0, sums=None):
        terminal = sys.stderr.isatty()
        self.title, self.batches, self.optimizer, self.watch, self.done = title, batches, optimizer, watch, done
        self.interval = 0.5 if terminal else 30.0
        disable = not (terminal and is_main())
        self.bar = tqdm(total=batches, initial=done, desc=title, unit="batch", leave=False, disable=disable)
        self.so_far = dict.fromkeys(("loss", "images", "norm", "norms", "waited", "seconds"), 0.0) | (sums or {})
        self.shown = time.perf_counter()
        self.start = self.shown - self.so_far["seconds"]

    def sums(self) -> dict:
        """What a new one needs to resume here. Waits for the device; raises NotFinite if a step was not."""
        self.watch.look(lag=0)
        sums = {name: float(value) for name, value in self.so_far.items()}
        return sums | {"seconds": time.perf_counter() - self.start, "skipped": self.watch.skipped}

    def timed(self, batches):
        """The batches, and the time spent waiting for them."""
        batches, end = iter(batches), object()
        while True:
            start = time.perf_counter()
            batch = next(batches, end)
            self.so_far["waited"] += time.perf_counter() - start
            if batch is end:
                return
            yield batch

    def add(self, group, norm, good):
        """The batches of one step. Losses of a step that was left out do not count."""
        sums, finite = self.so_far, norm.isfinite()  # with float16, the scaler leaves out a step with another norm
        sums["norm"] = sums["norm"] + torch.where(finite, norm, 0.0)
        sums["norms"] = sums["norms"] + finite
        for _, images, loss in group if good else ():
            sums["loss"] = sums["loss"] + loss * images
            sums["images"] += images
        self.done += len(group)
        self.bar.update(len(group))
        if time.perf_counter() - self.shown >= self.interval:
            rate = world_size() * sums["images"] / (time.perf_counter() - self.start)
            loss, lr = float(sums["loss"]) / max(sums["images"], 1), peak_rate(self.optimizer)
            line = f"loss {loss:.4f}, lr {lr:.2e}, {rate:,.0f} images/s"
            self.bar.set_postfix_str(line)
            if self.bar.disable:
                say(f"{self.title}: batch {self.done}/{self.batches}, {line}")
            self.shown = time.perf_counter()

    def close(self) -> dict:
        """The sums of this process, and means over all of them."""
        sums = self.sums()
        self.bar.close()
        device = self.optimizer.param_groups[0]["params"][0].device
        loss, images = sum_over_ranks(torch.tensor([sums["loss"], sums["images"]], device=device)).tolist()
        return {
            "loss": loss / max(images, 1), "images": int(images), "grad_norm": sums["norm"] / max(sums["norms"], 1),
            "seconds": sums["seconds"], "data_wait": sums["waited"] / max(sums["seconds"], 1e-9), "sums": sums,
        }  # fmt: skip


@torch.no_grad()
def evaluate(model, batches, keep_predictions=False, on_batch=None) -> dict:
    """Score a model in full precision, every image once, over all processes. `on_batch()` is called after each batch.

    Labels are (B,), or with several right answers (B, L), filled up with -1; then there is no loss.

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
            hits = (ranked[:, :, None] == labels.view(len(labels), 1, -1)).any(dim=2)  # (B, 5)
            if labels.ndim == 1:
                loss += F.cross_entropy(logits, labels, reduction="sum")
            counts += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), torch.ones_like(ranked[:, 0]).sum()])
            if keep_predictions:
                predictions.append(ranked[:, 0])
            if on_batch is not None:
                on_batch()
    model.train(was_training)
    top1, top5, images = sum_over_ranks(counts).tolist()
    loss = sum_over_ranks(loss).item() / images
    result = {"loss": loss, "top1": 100 * top1 / images, "top5": 100 * top5 / images, "images": images}
    if keep_predictions:
        result["predictions"] = torch.cat(predictions).cpu()
    return result
