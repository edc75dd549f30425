"""Measure this machine: python bench.py

    python bench.py --rows train,maps --rounds 9 --json bench.json
    python bench.py --device cuda

Each row races this project against a peer in one process, in turn, so that drift cancels, and prints the medians and
the median of the ratios of single rounds; the last line is the verdict. docs/PERFORMANCE.md explains the rows.
"""

import contextlib
import io
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median

import timm
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler import CosineLRScheduler
from torch import nn
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

import utils
from datasets import Split
from engine import TrainingStep, autocast, train_one_epoch
from inspection.attention import attention_rows, set_fused_attention
from loading.memory import MemoryLoader, TrainTransform
from models_dynamic import SIZES, DynamicViT
from training.run_log import environment, peak_memory, reset_peak_memory
from training.setup import amp_dtype, fast_kernels, plain_attention_on_cpu

DATA = {"input_size": (32, 32), "mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]}
SMALL, CIFAR = "dynamic_vit_small_patch16_224", "dynamic_vit_cifar"
FOREIGN = ("vit_small_patch14_dinov2", "vit_small_patch16_dinov3")
COMPILED = "default"  # torch.compile's mode
RACE = 5.0  # seconds after which a race ends, if it has had three rounds
LABEL = {SMALL: "224/16 width 384", CIFAR: "32/4 width 192", "dynamic_vit_tiny_patch16_224": "224/16 width 192",
         "dynamic_vit_base_patch16_224": "224/16 width 768"}  # fmt: skip


@dataclass
class Race:
    """Two functions to time, in turn."""

    name: str
    ours: Callable
    peer: Callable
    target: str = ""  # of the ratio
    images: int | None = None  # in a call; None: the row is in seconds


def measured(name, unit, ours, peer, target="") -> dict:
    return {"name": name, "unit": unit, "ours": ours, "peer": peer, "ratio": ours / peer, "target": target}


def run_race(entry: Race, rounds, device) -> dict:
    """The row: medians of seconds or of images per second, and the median of the ratios of single rounds.

    Who begins changes from round to round. Two rounds warm up. A race of `RACE` seconds ends early, after
    three rounds at least.
    """
    seconds, begin = {entry.ours: [], entry.peer: []}, time.perf_counter()
    for turn in range(-2, rounds):
        if turn == 0:
            begin = time.perf_counter()
        if turn >= 3 and time.perf_counter() - begin > RACE:
            break
        for contender in (entry.ours, entry.peer) if turn % 2 else (entry.peer, entry.ours):
            start = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):  # hides the progress bar of each epoch
                contender()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[contender].append(time.perf_counter() - start)
    unit, values = "s", list(seconds.values())
    if entry.images is not None:
        unit, values = "images/s", [[entry.images / each for each in times] for times in values]
    row = measured(entry.name, unit, *map(median, values), entry.target)
    return row | {"ratio": median(a / b for a, b in zip(*values))}


# Models and steps --------------------------------------------------------------------------------------------------


def ours(size, device, **kwargs):
    return DynamicViT(**(SIZES[size] | kwargs)).to(device)


def timms(size, device):
    return VisionTransformer(**SIZES[size], reg_tokens=4, no_embed_class=True).to(device)


def random_batch(size, batch, device):
    pixels, classes = SIZES[size]["img_size"], SIZES[size].get("num_classes", 1000)
    return torch.randn(batch, 3, pixels, pixels, device=device), torch.randint(classes, (batch,), device=device)


def training(model, batches, device, dtype=None, mode=None):
    """A function that takes a training step with each batch: the engine's, with AdamW. `mode`: of torch.compile."""
    plain_attention_on_cpu(model, device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type != "mps")
    model = compiled(model, mode)
    schedule = CosineLRScheduler(optimizer, t_initial=2)  # counts epochs, and sees none
    step = TrainingStep(model, nn.CrossEntropyLoss(), optimizer, schedule, amp_dtype=dtype)
    return lambda: train_one_epoch(step, batches)


def compiled(model, mode):
    """`mode`: of torch.compile; None: not compiled.

    Models of a class have one forward pass between them, and torch compiles that for few of them, and for images of a
    second size without their size: what it has compiled before goes. Models are compiled when they are first called.
    """
    if mode is not None:
        torch.compiler.reset()
        model = torch.compile(model, mode=mode)
    return model


def inference(model, images, device, dtype=None, mode=None):
    model = compiled(model.eval(), mode)

    def run():
        with torch.no_grad(), autocast(device, dtype):
            model(images)

    return run


def sizes_here(args, device) -> dict[str, int]:
    """Models to race and their batches. In training in fp32 one takes about 16 GiB; on smaller GPUs they are halved."""
    sizes = {"dynamic_vit_tiny_patch16_224": 512, SMALL: 256, "dynamic_vit_base_patch16_224": 128, CIFAR: 1024}
    if device.type == "cpu":
        sizes = {SMALL: 8, CIFAR: 64}
    elif device.type == "cuda":
        halvings = math.ceil(math.log2(20 * 2**30 / torch.cuda.get_device_properties(device).total_memory))
        sizes = {size: max(1, batch >> max(halvings, 0)) for size, batch in sizes.items()}
    return {size: args.batch or batch for size, batch in sizes.items()}


def precision(dtype) -> str:
    return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


# Rows --------------------------------------------------------------------------------------------------------------


def train_rows(args, device):
    """Training steps: against timm's; late tokens; the lower precision of this machine."""
    low = amp_dtype("auto", device)
    for size, count in sizes_here(args, device).items():
        batch, name = [random_batch(size, count, device)], f"training {LABEL[size]}, fp32"
        mine = training(ours(size, device), batch, device)
        yield Race(f"{name}, against timm", mine, training(timms(size, device), batch, device), ">= 1.05", count)
        late = training(ours(size, device, cls_pos=6, reg_pos=3), batch, device)
        yield Race(f"{name}, CLS at 6 and registers at 3, against 0/0", late, mine, ">= 1", count)
        if low is None:
            continue
        name, target = f"training {LABEL[size]}, {precision(low)}", ">= 1.6" if size == SMALL else ">= 1.3"
        in_low, its = (training(make(size, device), batch, device, low) for make in (ours, timms))
        yield Race(f"{name}, against our fp32", in_low, mine, target, count)
        yield Race(f"{name}, against timm in {precision(low)}", in_low, its, "", count)


def compile_rows(args, device):
    """Training steps with torch.compile, in the precision of training."""
    low = amp_dtype("auto", device)
    for size, count in sizes_here(args, device).items():
        batch, name = [random_batch(size, count, device)], f"training {LABEL[size]}, {precision(low)}, compiled"
        mine, its = (training(make(size, device), batch, device, low, mode=COMPILED) for make in (ours, timms))
        plain = training(ours(size, device), batch, device, low)
        yield Race(f"{name}, against not compiled", mine, plain, "", count)
        yield Race(f"{name}, against timm compiled", mine, its, "", count)


def infer_rows(args, device):
    """Forward passes, and compiled: in fp32, on a GPU in its lower precision."""
    low = amp_dtype("auto", device) if device.type == "cuda" else None
    for size, count in sizes_here(args, device).items():
        images, name = random_batch(size, count, device)[0], f"inference {LABEL[size]}, {precision(low)}"
        mine, its = (inference(make(size, device), images, device, low) for make in (ours, timms))
        yield Race(f"{name}, against timm", mine, its, ">= 1.05", count)
        mine, its = (inference(make(size, device), images, device, low, mode=COMPILED) for make in (ours, timms))
        yield Race(f"{name}, compiled, against timm compiled", mine, its, "", count)


def maps_rows(args, device):
    """All attention maps in one pass, against a forward pass."""
    images, model = random_batch(SMALL, 8, device)[0], ours(SMALL, device).eval()
    name, forward = "maps of 12 blocks at 224 px, against a forward pass", inference(model, images, device)
    yield Race(name, lambda: model.attention_maps(images, range(model.depth)), forward, "<= 1.15")


def graph_rows(args, device):
    """Forward passes and training steps as CUDA graphs, against compiled without."""
    low, graphs = amp_dtype("auto", device), "reduce-overhead"
    for size, count in sizes_here(args, device).items() if device.type == "cuda" else ():
        batch = random_batch(size, count, device)
        name = f"{LABEL[size]}, {precision(low)}, CUDA graphs, against compiled without"
        mine, plain = (inference(ours(size, device), batch[0], device, low, mode) for mode in (graphs, COMPILED))
        yield Race(f"inference {name}", mine, plain, "", count)
        mine, plain = (training(ours(size, device), [batch], device, low, mode) for mode in (graphs, COMPILED))
        yield Race(f"training {name}", mine, plain, "", count)


def foreign_rows(args, device):
    """The attention of CLS and registers in all blocks of timm's models, against its unfused attention and hooks: time,
    and memory in a process of its own."""
    for name in FOREIGN:
        for side in (224, 518):
            races = [functions(name, side, device) for functions in (recorded, hooked)]
            title = f"attention of CLS, {name.removeprefix('vit_')}, {side} px, against hooks"
            yield Race(title, *races, "<= 1")
            took = [apart(peak_of, make, name, side, device) for make in (recorded, hooked)]
            yield measured(f"memory of {title}", "MiB", *took, "<= 1")


def foreign(name, side, device):
    """(timm's model with random weights for images of `side` pixels, less if its patches ask for it; an image)"""
    side -= side % to_2tuple(timm.create_model(name, depth=1).patch_embed.patch_size)[0]
    model = timm.create_model(name, img_size=side).eval().to(device)
    return model, torch.randn(1, 3, side, side, device=device)


def recorded(name, side, device):
    """A function: {block: (1, H, tokens before the patches, N)}, from the recorder."""
    model, image = foreign(name, side, device)
    return lambda: attention_rows(model, image, range(len(model.blocks)), [slice(0, model.num_prefix_tokens)])


def hooked(name, side, device):
    """The same from hooks after each explicit softmax, which see all rows, and keep a copy of those wanted."""
    model, image = foreign(name, side, device)
    set_fused_attention(model, False)
    found = {}
    for i, block in enumerate(model.blocks):
        block.attn.attn_drop.register_forward_hook(
            lambda module, args, attn, i=i: found.update({i: attn[:, :, : model.num_prefix_tokens].clone()})
        )

    @torch.no_grad()
    def run():
        model(image)
        return found

    return run


def peak_of(make, name, side, device) -> float:
    """MiB that a call takes, on top of the model and the imports."""
    function = make(name, side, device)
    reset_peak_memory(device)
    before = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else peak_memory(device)
    function()
    return peak_memory(device) - before


def memory_rows(args, device):
    """The largest memory of a training step: the median of three processes that take nothing but one."""
    took = [median(apart(step_memory, make, device) for _ in range(3)) for make in (ours, timms)]
    yield measured(f"memory of a training step {LABEL[SMALL]}, fp32, against timm", "MiB", *took, "<= 1")


def apart(function, *args):
    """What it returns in a process of its own, which is over before anything else is measured."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def step_memory(make, device) -> float:
    """MiB, on top of the imports."""
    before = peak_memory(device)
    training(make(SMALL, device), [random_batch(SMALL, 8, device)], device)()
    return peak_memory(device) - before


def pil_transform():
    """What `TrainTransform` does, image by image."""
    return transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.TrivialAugmentWide(),
        transforms.ToTensor(), transforms.Normalize(DATA["mean"], DATA["std"]),
        transforms.RandomErasing(0.25, scale=(0.02, 0.4), ratio=(0.3, 3.3)),
    ])  # fmt: skip


def load_rows(args, device):
    """Images/s of the loader with one CPU core (or the GPU) against PIL with one; waiting in training."""
    coarse = torch.rand(1280, 3, 8, 8) * 255
    images = F.interpolate(coarse, size=32, mode="bilinear").to(torch.uint8)  # of as many values as photographs
    split = Split(images, torch.arange(len(images)) % 10).to(device)
    loader, transform = MemoryLoader(split, DATA, 128, TrainTransform(DATA)), pil_transform()
    pictures, threads = [to_pil_image(image) for image in images], torch.get_num_threads()
    torch.set_num_threads(1)
    name, target = "loading 32 px, one core, full default augmentation, against PIL", ">= 4"
    yield Race(
        name, lambda: list(loader), lambda: [transform(picture) for picture in pictures],
        target if device.type == "cpu" else ">= 100", len(images),
    )  # fmt: skip
    torch.set_num_threads(threads)
    run = training(ours(CIFAR, device, drop_path_rate=0.1), loader, device, amp_dtype("auto", device))
    run()
    yield measured("waiting for data, share of the default CIFAR training", "", run()["data_wait"], 1.0, "<= 0.05")


ROWS = {
    "maps": maps_rows, "load": load_rows, "memory": memory_rows, "foreign": foreign_rows, "train": train_rows,
    "infer": infer_rows, "compile": compile_rows, "graphs": graph_rows,
}  # fmt: skip


# Wiring ------------------------------------------------------------------------------------------------------------

WIDTH = 76  # of a row's name


def met(row) -> str:
    if not row["target"]:
        return ""
    sign, bound = row["target"].split()
    return "met" if (row["ratio"] >= float(bound) if sign == ">=" else row["ratio"] <= float(bound)) else "MISSED"


def verdict(rows, left_out, minutes) -> str:
    """All rows in a line."""
    aims = [(row, met(row)) for row in rows if row["target"]]
    missed = [f"{row['name']} ({row['ratio']:.3f}, not {row['target']})" for row, how in aims if how == "MISSED"]
    line = f"verdict: {len(aims) - len(missed)} of {utils.counted(len(aims), 'target')} met, "
    line += utils.counted(len(rows), "row")
    line += f"; missed: {'; '.join(missed)}" if missed else ""
    return line + (f"; left out after {minutes:g} minutes: {', '.join(left_out)}" if left_out else "")


def show(row):
    numbers = (f"{row[key]:,.{3 if row[key] < 10 else 1}f}" for key in ("ours", "peer"))
    line = f"{row['name']:{WIDTH}}" + " ".join(f"{number:>10}" for number in numbers)
    print(f"{line} {row['unit']:9}{row['ratio']:7.3f}  {row['target']} {met(row)}".rstrip(), flush=True)


def main(argv=None):
    parser = utils.ArgumentParser(description="Race this project against timm and PIL on this machine.")
    flag = parser.add_argument
    flag("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    flag("--rounds", type=utils.number(int, 1), default=9, help="of each race, at most")
    flag("--batch", type=utils.number(int, 1), help="images in training and inference (default: 8 to 1024)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    flag("--minutes", type=utils.number(float, above=0), default=4.5, help="begin no row after this time")
    flag("--json", metavar="FILE", help="also write the rows there, after each one")
    args = parser.parse_args(argv)
    device = utils.pick_device(args.device)
    fast_kernels(device)  # as training does
    unknown = set(args.rows.split(",")) - set(ROWS)
    if unknown:
        raise utils.BadInput(f"--rows: there is no {', '.join(sorted(unknown))}; choose of {','.join(ROWS)}")
    print(f"{'':{WIDTH}}{'ours':>10} {'peer':>10} {'unit':9}{'ratio':>7}  target")
    rows, left_out, end = [], [], time.monotonic() + 60 * args.minutes
    for name in args.rows.split(","):
        for entry in ROWS[name](args, device):
            if rows and time.monotonic() > end:
                left_out.append(name)
                break
            rows.append(run_race(entry, args.rounds, device) if isinstance(entry, Race) else entry)
            show(rows[-1])
            if args.json:
                record = {"rows": rows, "rounds": args.rounds, "device": str(device), **environment(device)}
                utils.write_text(args.json, json.dumps(record, indent=1))
    print(verdict(rows, left_out, args.minutes))


if __name__ == "__main__":
    utils.run_script(main)
