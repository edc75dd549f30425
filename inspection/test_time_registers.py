"""Registers without training: the neurons that make high-norm patches write into tokens that are added at test time.

"Vision Transformers Don't Need Trained Registers" (arXiv 2506.08010), from the paper: in the MLPs up to the block where
artefacts begin, neurons (inputs of `fc2`) are ranked by their mean |activation| on the artefact patches. The first of
them, the register neurons, are silent on all patches from then on; the largest activation of each over the patches of
an image goes to an added token that enters as zeros. New here: it enters at a block of your choice.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from checkpoints.models import at_size
from inspection import inputs
from inspection.attention import trace
from inspection.foreign import own_model
from inspection.statistics import BEGIN, TokenStatistics
from utils import BadInput, number, say

LEAST, BATCH = 8, 16  # images


def add_flags(parser):
    group = parser.add_argument_group("registers without training (arXiv 2506.08010)")
    group.add_argument("--test_time_registers", type=number(int, 0), default=0, metavar="N", help="add N tokens that "
                       "take over what register neurons write into artefact patches")  # fmt: skip
    group.add_argument("--register_pos", type=number(int, 0), default=0, metavar="BLOCK", help="their entry block")
    group.add_argument("--register_neurons", type=number(int, 1), default=10, metavar="K", help="how many to take")
    group.add_argument("--registers_from", nargs="+", metavar="PATH", help="images, or folders of them, in which the "
                       f"neurons are looked for, at least {LEAST} (default: those that are looked at)")  # fmt: skip


def from_flags(args, model, data, found, checkpoint):
    """The model with the registers that the flags ask for; `found`: the `InputImage`s that are looked at."""
    if not args.test_time_registers:
        if args.registers_from:
            raise BadInput("--registers_from is for --test_time_registers; add that, or leave it out")
        return model
    if getattr(model, "cls_only", False):
        raise BadInput("--test_time_registers: the patches of this model cannot be seen to attend; leave it out")
    if args.registers_from:
        found = inputs.find_images(args, data, checkpoint, files=inputs.image_paths(args.registers_from))
    batches = partial(inputs.batches, found, [], data, next(model.parameters()).device, BATCH)
    return add_registers(model, batches, args.test_time_registers, args.register_pos, args.register_neurons)


def add_registers(model, batches, count=1, entry=0, neurons=10):
    """A `WithRegisters` of the model, and a line about it.

    Args:
        batches: () -> batches of (images (B, 3, h, w) normalised, labels), of at least `LEAST` images.
        count: tokens to add; each neuron writes into one of them, in turn.
        entry: the block that they enter at.
        neurons: how many register neurons to take.

    Raises BadInput for a model without artefacts on these images, and for one that cannot take another token.
    """
    if not 0 <= entry < model.depth:
        raise BadInput(f"--register_pos {entry} is outside the model: its blocks are 0..{model.depth - 1}")
    if any(not hasattr(getattr(block, "mlp", None), "fc2") for block in model.blocks[: model.depth]):
        raise BadInput("--test_time_registers: the blocks of this model have no mlp.fc2, whose inputs are its neurons")
    layout = model.token_layout(model.depth - 1)
    if layout.registers is not None and layout.registers.stop != layout.length:
        raise BadInput("--test_time_registers: the trained registers of this model stand in front of its patches")
    before = _artefacts(model, batches)
    begins = lasting([block["share"] for block in before["blocks"]])
    if begins is None:
        raise BadInput(
            "--test_time_registers: in the second half of this model's blocks no patch of these images is an artefact; "
            "leave it out"
        )
    chosen: dict[int, list[int]] = {}
    for block, n in rank_neurons(model, batches, begins, before["blocks"][begins]["threshold"])[:neurons]:
        chosen.setdefault(block, []).append(n)
    if entry > max(chosen):
        raise BadInput(f"--register_pos {entry}: the register neurons are in blocks up to {max(chosen)}; enter there")
    changed = WithRegisters(model, count, entry, {i: numbers for i, numbers in chosen.items() if i >= entry})
    after = _artefacts(changed, batches)
    shares = (100 * max(block["share"] for block in found["blocks"][begins:]) for found in (before, after))
    where = "; ".join(f"block {i}: {', '.join(map(str, sorted(n)))}" for i, n in sorted(changed.neurons.items()))
    words = "{:.2f}% of the patches, now {:.2f}%".format(*shares)
    say(f"register neurons: {where}. Artefacts from block {begins} on: {words}")
    return changed


def lasting(shares) -> int | None:
    """The block from which on there are artefacts up to the second half of the model; None if there are none there.

    High norms that only early blocks have are not what registers are for.
    """
    some = [i for i, share in enumerate(shares) if share >= BEGIN]
    if not some or 2 * some[-1] < len(shares):
        return None
    return min(i for i in some if all(j in some for j in range(i, some[-1])))


@torch.no_grad()
def _artefacts(model, batches) -> dict:
    statistics = TokenStatistics(model, probe_images=0, attention=False)
    for images, _ in batches():
        try:
            statistics.add(images)
        except RuntimeError as error:  # rotary positions and relative ones have a row for each token
            raise BadInput(f"--test_time_registers: this model cannot take another token ({error})") from None
    if statistics.images < LEAST:
        raise BadInput(f"--test_time_registers looks for artefacts in at least {LEAST} images; give more")
    return statistics.result()["artefacts"]


@torch.no_grad()
def rank_neurons(model, batches, block: int, threshold: float) -> list[tuple[int, int]]:
    """(block, neuron) of the MLPs up to `block`, those first whose mean |activation| is largest on the patches whose
    norm at the output of `block` is above `threshold`."""
    sums, outliers = [0.0] * (block + 1), {}

    def norms(i, x):
        outliers[i] = x[:, model.token_layout(i).patches].norm(dim=-1) > threshold  # (B, P)

    def add(i, hidden):
        on_patches = hidden[:, model.token_layout(i).patches]
        sums[i] = sums[i] + on_patches[outliers[block]].abs().cpu().double().sum(dim=0)

    for images, _ in batches():
        trace(model, images, output=norms, last=block)
        with ExitStack() as hooks:
            for i in range(block + 1):
                hooks.enter_context(_on_hidden(model.blocks[i], partial(add, i)))
            trace(model, images, output=lambda i, x: None, last=block)  # to the end of that block
    numbered = [(i, n) for i, each in enumerate(sums) for n in range(len(each))]
    return [numbered[k] for k in torch.cat(sums).argsort(descending=True, stable=True).tolist()]


def _on_hidden(block, function):
    """Call `function` with the neurons (B, N, hidden) of a block's MLP; what it returns takes their place."""

    def before(module, args):
        new = function(args[0])
        return None if new is None else (new, *args[1:])

    return block.mlp.fc2.register_forward_pre_hook(before)


class WithRegisters(nn.Module):
    """A model with `count` more registers, after all its tokens, from block `entry` on. See the module.

    It is looked at like the model that it is made of, whose modules it changes by hooks: that one is used up.
    """

    def __init__(self, model, count: int, entry: int, neurons: dict[int, list[int]]):
        super().__init__()
        self.inner, self.count, self.entry, self.neurons = model, count, entry, neurons
        self.num_register_tokens = model.num_register_tokens + count
        self.reg_pos = entry if model.reg_pos is None else model.reg_pos
        self._hook()

    def _hook(self):
        blocks, norm = self.inner.blocks, own_model(self.inner).norm
        self.handles = [
            blocks[self.entry].register_forward_pre_hook(self._append),
            *(_on_hidden(blocks[i], partial(self._moved, i)) for i in self.neurons),
            norm.register_forward_pre_hook(self._remove),
        ]

    def __str__(self):
        return f"{self.count} test-time registers at block {self.entry}"

    def at_size(self, img_size) -> "WithRegisters":
        """The same for images of another size; the weights are shared."""
        for handle in self.handles:  # a copy would keep hooks of this model
            handle.remove()
        try:
            own = self.inner.at_size(img_size) if hasattr(self.inner, "at_size") else at_size(self.inner, img_size)
        finally:
            self._hook()
        return WithRegisters(own, self.count, self.entry, self.neurons)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, images):
        return self.inner(images)

    def token_layout(self, block: int):
        """The layout of the model's own tokens, and the new registers after them."""
        own = self.inner.token_layout(block)
        if block < self.entry or own.pool is not None:
            return own
        length, total = own.length + self.count, self.inner.num_register_tokens
        numbers = (*own.numbers, *range(total, total + self.count))
        first = own.length if own.registers is None else own.registers.start
        return replace(own, registers=slice(first, length), length=length, numbers=numbers)

    def _append(self, _, args):
        x = args[0]
        return torch.cat([x, x.new_zeros(len(x), self.count, x.shape[2])], dim=1), *args[1:]

    def _moved(self, block: int, hidden: Tensor) -> Tensor:
        """The block's register neurons: silent on patches, their largest activation at a new register, in turn."""
        part, hidden, numbers = self.token_layout(block).patches, hidden.clone(), self.neurons[block]
        at = hidden.shape[1] - self.count + torch.arange(len(numbers)) % self.count
        on_patches = hidden[:, part][:, :, numbers]  # (B, P, n)
        largest = on_patches.abs().argmax(dim=1, keepdim=True)
        hidden[:, at, numbers] = on_patches.gather(1, largest)[:, 0]
        hidden[:, part.start : part.stop, numbers] = 0
        return hidden

    def _remove(self, _, args):
        """What the model's last norm gets: without the new registers, which it does not know."""
        whole = self.token_layout(self.inner.depth - 1).length
        return args[0][:, : -self.count] if args[0].shape[1] == whole else args[0]
