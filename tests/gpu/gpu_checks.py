"""The checks of `gpu.py`: functions of a `Machine` that yield `Row`s."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image
from timm.utils import random_seed

import cifar_main
import utils
from checkpoints.files import load_checkpoint
from datasets import Split
from engine import Position, train_one_epoch
from loading.files import FileLoader, load_file_data, picture_transform
from loading.memory import MemoryLoader, TrainTransform
from training import flags
from training.run_log import peak_memory, read_json_lines, reset_peak_memory
from training.setup import build_model, fast_kernels, make_step

ROOT = Path(__file__).resolve().parents[2]
DATA = {"input_size": (32, 32), "mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]}
SMALL = "--embed_dim 24 --depth 3 --num_heads 3 --num_reg 2 --patch_size 8 --batch_size 16"


@dataclass
class Row:
    """A line of the report. `ok` is None for what is only measured."""

    what: str
    value: float
    unit: str = ""
    ok: bool | None = None
    note: str = ""


@dataclass
class Machine:
    device: torch.device
    tiny: bool
    folder: Path
    end: float  # of the time, on the monotonic clock

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        return self.end - time.monotonic()

    def flags(self, words=""):
        """The flags of `cifar_main.py`; the model is a small one in a dry run."""
        argv = f"--data_set CIFAR10 --data_path . {SMALL if self.tiny else ''} {words}".split()
        args = flags.parse_with_recipe(cifar_main.get_parser(), argv)
        cifar_main.resolve(args)
        return args


def prepared(args, device, count, compiled=False):
    """(a training step, its batches): images of a colour for each class in noise, on the device."""
    random_seed(0)
    model = build_model(args, 10).to(device)
    labels = torch.arange(count) % 10
    colours = torch.rand(10, 3, 1, 1) * 128
    images = (colours[labels] + torch.rand(count, 3, 32, 32) * 127).to(torch.uint8)
    transform = TrainTransform(DATA, args.aug, args.hflip, args.reprob)
    batches = MemoryLoader(Split(images, labels).to(device), DATA, args.batch_size, transform)
    step = make_step(args, model, batches, 10)
    step.model = torch.compile(model) if compiled else model
    return step, batches


def losses(args, device, steps=20, change=lambda step: None) -> torch.Tensor:
    """The loss of each of the first steps: the same weights, images and draws on every device."""
    step, batches = prepared(args, device, args.batch_size * steps)
    change(step)
    found, criterion = [], step.criterion

    def recorded(*values):
        loss = criterion(*values)
        found.append(loss.detach())
        return loss

    step.criterion = recorded
    train_one_epoch(step, batches)
    return torch.stack(found).cpu().double()


# Checks: each yields rows ------------------------------------------------------------------------------------------


def precisions(machine):
    """Loss curves against the CPU's in float32; the scaler of float16 after an overflow; TF32 where it may be."""
    words = "--drop_path 0 --warmup_epochs 0" + " --batch_size 64" * (not machine.tiny)
    steps = 5 if machine.tiny else 20
    expected = losses(machine.flags(f"{words} --amp off"), torch.device("cpu"), steps)
    kinds = [("off", 1e-2), ("bf16", 0.1), *[("fp16", 0.1)] * machine.cuda]
    for amp, most in kinds:
        found = losses(machine.flags(f"{words} --amp {amp}"), machine.device, steps)
        apart = float(((found - expected).abs() / expected).max())
        yield Row(f"losses of {steps} steps, --amp {amp}, against the CPU's in fp32", apart, "relative", apart <= most)
    if machine.cuda:
        large = torch.amp.GradScaler("cuda", init_scale=2.0**40)
        scaled = losses(machine.flags(f"{words} --amp fp16"), machine.device, 40, lambda s: setattr(s, "scaler", large))
        good = bool(scaled.isfinite().all()) and large.get_scale() < 2.0**40 and scaled[-1] < scaled[0]
        yield Row("fp16: the scaler after overflows", large.get_scale(), "scale", good, f"loss {scaled[-1]:.3f}")
    a, b = torch.randn(2, 1024, 1024, dtype=torch.double, device=machine.device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")

    def error():
        return float(((a.float() @ b.float()).double() - a @ b).abs().max())

    yield Row("largest error of a product in training (TF32)", error(), "absolute")
    with utils.full_precision():
        exact = error()
    torch.set_float32_matmul_precision(before)
    yield Row("the same within full_precision()", exact, "absolute", exact < 1e-3)


def waiting(machine):
    """Ten training steps of the default recipe during which the device is never waited for."""
    step, batches = prepared(machine.flags(), machine.device, 12 * machine.flags().batch_size)
    train_one_epoch(step, batches)  # makes its constants
    strict = torch.cuda.set_sync_debug_mode if machine.cuda else lambda mode: None
    taken = []

    def after(done, progress):
        taken.append(done)
        if len(taken) == 10:
            strict("default")  # the figures at the end of an epoch are read

    strict("error")
    try:
        train_one_epoch(step, batches, on_step=after)
    finally:
        strict("default")
    yield Row("steps without waiting for the device", len(taken), "steps", len(taken) >= 10 if machine.cuda else None)


def prefetching(machine):
    """Batches through worker processes, pinned memory and the prefetch stream, against those of the CPU."""
    root = Path(tempfile.mkdtemp(dir=machine.folder))
    for part in ("train", "val"):
        for k in range(2):
            (root / part / str(k)).mkdir(parents=True)
            for i in range(16):
                pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(root / part / str(k) / f"{i}.png")
    data = load_file_data("IMNET", str(root), (32, 32), val_size=0)
    transform = picture_transform((32, 32), "rand-m9-mstd0.5-inc1", 0.3, 0.5, "bicubic")
    for name, how in (("training", transform), ("evaluation", None)):
        sides = []
        for device in (machine.device, torch.device("cpu")):
            loader = FileLoader(
                data.train, data.description(), 8, device, how, workers=2 if device.type != "cpu" else 0
            )
            loader.set_epoch(1)
            # Used at once, as a step does: a copy that is not waited for by the stream would show.
            sides.append([((images * 1.0).cpu(), labels.cpu()) for images, labels in loader])
        apart = max(float((a - b).abs().max()) for (a, _), (b, _) in zip(*sides))
        same = len(sides[0]) == len(sides[1]) == 4 and all(map(torch.equal, *([y for _, y in s] for s in sides)))
        yield Row(f"prefetched batches of {name}, against the CPU's", apart, "absolute", same and apart < 1e-4)


def recipe(machine):
    """Images per second of the default recipe on CIFAR-10, and the time that it would take."""
    fast_kernels(machine.device)
    for compiled in (False, True):
        words = ", compiled" if compiled else ""
        args = machine.flags()
        step, batches = prepared(args, machine.device, 256 if machine.tiny else 50_000, compiled)
        warm, steps = (2, 4) if machine.tiny else (20, 200)
        reset_peak_memory(machine.device)
        train_one_epoch(step, batches, last_step=warm)
        trained = train_one_epoch(step, batches, start=Position(step=warm), last_step=warm + steps)
        speed = trained["images"] / trained["seconds"]
        yield Row(f"default recipe, batches of {args.batch_size}{words}", speed, "images/s",
                  note=f"waits for data {100 * trained['data_wait']:.1f} %")  # fmt: skip
        seconds = args.epochs * args.repeats * 50_000 / speed
        yield Row(f"its {args.epochs} epochs of {args.repeats} passes of CIFAR-10{words}", seconds / 60, "minutes")
        yield Row(f"its memory{words}", peak_memory(machine.device), "MiB")


# A run that is killed in the middle of an epoch, after its save at step 12.
KILLED = """
import os, sys, cifar_main, utils
from training import loop
after = loop.StepHooks.after_step
def dies(hooks, step, progress):
    after(hooks, step, progress)
    if step == 13:
        os._exit(9)
loop.StepHooks.after_step = dies
utils.run_script(cifar_main.main, sys.argv[1:])
"""


def last_line(text) -> str:
    return " ".join(text.strip().splitlines()[-1:])


def trained(machine, name, words="", start=("cifar_main.py",), status=0) -> Path:
    """The folder of a run of `cifar_main.py` on digits, in a process of its own or as `start` says."""
    folder = machine.folder / name
    argv = "--data_set DIGITS --aug trivial --epochs 2 --repeats 1 --lr 2e-3 --drop_path 0.2 --save_steps 3".split()
    argv += ["--deterministic", "--device", machine.device.type, *(SMALL.split() if machine.tiny else [])]
    argv += ["--model_path", str(folder.absolute() / "model.pth"), *words.split()]
    started(machine, name, [*start, *argv], status)
    return folder


def started(machine, name, command, status=0):
    """Run `python COMMAND` to its end. Raises RuntimeError for another exit status."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=max(machine.left(), 60),
        check=False,
    )  # fmt: skip
    if done.returncode != status:
        raise RuntimeError(f"{name}: status {done.returncode}: {last_line(done.stderr)}")


def torchrun(processes, script) -> tuple[str, ...]:
    return "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script


def runs(machine):
    """--deterministic twice, a run that is killed and resumed, and one and more processes with NCCL."""

    def apart(one, other):
        one, other = (load_checkpoint(folder / "model.pth")["model"] for folder in (one, other))
        return float(max((one[name].float() - other[name].float()).abs().max() for name in one))

    once = trained(machine, "once")
    distance = apart(once, trained(machine, "twice"))
    yield Row("--deterministic twice: weights apart", distance, "absolute", distance == 0)
    trained(machine, "killed", start=("-c", KILLED), status=9)
    distance = apart(once, trained(machine, "killed", "--resume"))
    yield Row("killed in an epoch and resumed: weights apart", distance, "absolute", distance == 0)
    backend, cards = ("NCCL", torch.cuda.device_count()) if machine.cuda else ("Gloo", 2)
    for processes in sorted({1, cards}):
        folder = trained(machine, f"processes{processes}", start=torchrun(processes, "cifar_main.py"))
        one, several = (read_json_lines(place / "log.txt")[-1]["train_loss"] for place in (once, folder))
        ok = abs(several / one - 1) < (1e-3 if processes == 1 else 0.3)  # each has a batch, so there are fewer steps
        yield Row(f"{backend}, {processes} processes: last training loss", several, "", ok, f"without: {one:.4f}")


def sharded(machine):
    """--fsdp beside DDP: ten steps of main_distillation.py on digits, in a process for each card."""
    processes, losses = torch.cuda.device_count() if machine.cuda else 2, []
    argv = (
        "--data_set DIGITS --model dynamic_vit_cifar --input_size 32 --no_aug --no-repeated-aug --drop_path 0".split()
    )
    argv += "--epochs 1 --max_steps 10 --batch_size 32 --num_workers 1 --val_size 0 --lr 1e-3 --unscale-lr".split()
    argv += ["--device", machine.device.type, *(SMALL.split() if machine.tiny else [])]
    for name, words in (("ddp", ()), ("fsdp", ("--fsdp",))):
        folder = (machine.folder / name).absolute()
        command = [*torchrun(processes, "main_distillation.py"), *argv, "--output_dir", str(folder), *words]
        started(machine, name, command)
        losses.append(read_json_lines(folder / "log.txt")[-1]["train_loss"])
    ok = abs(losses[1] / losses[0] - 1) < 1e-2
    yield Row(f"--fsdp, {processes} processes: training loss of ten steps", losses[1], "", ok, f"DDP: {losses[0]:.4f}")


def racing(machine):
    """Rows of bench.py beside timm: tiny, small and base at 224 pixels, compiled and not, CUDA graphs."""
    file = machine.folder / "bench.json"
    argv = ["--rows", "maps,graphs", "--rounds", "1", "--batch", "2"] if machine.tiny else ["--rounds", "5"]
    # What takes long comes last: a compilation takes most of a minute, and foreign's processes ten seconds each.
    argv += [] if machine.tiny else ["--rows", "train,maps,load,infer,compile,graphs,foreign"]
    argv += ["--device", str(machine.device), "--json", str(file), "--minutes", str(max(machine.left() / 60 - 1, 0.1))]
    command, done = [sys.executable, str(ROOT / "bench.py"), *argv], None
    # A row that begins at the end of the minutes, such as compiling a large model, may be too long.
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, timeout=max(machine.left(), 60), capture_output=True, text=True, check=False)
    for row in json.loads(file.read_text())["rows"] if file.is_file() else ():
        yield Row(row["name"], row["ours"], row["unit"], note=f"ratio {row['ratio']:.3f} {row['target']}".strip())
    if done is not None and done.returncode:
        raise RuntimeError(f"bench.py: status {done.returncode}: {last_line(done.stderr)}")


CHECKS = {check.__name__: check for check in (waiting, precisions, prefetching, recipe, runs, sharded, racing)}
