"""Measure this machine: python bench.py

    python bench.py --rows train,maps --rounds 9 --json bench.json
    python bench.py --device cuda

Each row races this project against a peer in one process, in turn, so that drift cancels, and prints the medians and
the median of the ratios of single rounds. docs/PERFORMANCE.md explains the rows.
"""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import utils
from checkpoints.files import save_checkpoint
from datasets import Split
from engine import TrainingStep, train_one_epoch
from loading.memory import MemoryLoader, TrainTransform
from models_dynamic import SIZES, DynamicViT, plain_attention_on_cpu, set_fused_attention
from training.run_log import environment

DATA = {"input_size": (32, 32), "mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]}
SMALL, CIFAR = "dynamic_vit_small_patch16_224", "dynamic_vit_cifar"
LABEL = {SMALL: "224/16 width 384", CIFAR: "32/4 width 192", "dynamic_vit_tiny_patch16_224": "224/16 width 192",
         "dynamic_vit_base_patch16_224": "224/16 width 768"}  # fmt: skip
HERE = Path(__file__).parent


@dataclass
class Race:
    """Two functions to time, in turn."""

    name: str
    ours: Callable
    peer: Callable
    target: str = ""  # of the ratio
    work: tuple[float, float] | None = None  # of a call of each, in `unit`s; None: the row is in seconds
    unit: str = "images"


def measured(name, unit, ours, peer, target="") -> dict:
    """A row of two numbers."""
    return {"name": name, "unit": unit, "ours": ours, "peer": peer, "ratio": ours / peer, "target": target}


def race(mine, peer, rounds, device) -> tuple[list[float], list[float]]:
    """Seconds of each call of the two, one after the other; who begins changes from round to round. Two warm up."""
    seconds = {mine: [], peer: []}
    for turn in range(-2, rounds):
        for contender in (mine, peer) if turn % 2 else (peer, mine):
            start = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):  # hides the progress bar of each epoch
                contender()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[contender].append(time.perf_counter() - start)
    return seconds[mine], seconds[peer]


def run_race(entry: Race, rounds, device) -> dict:
    """The row: medians of seconds or of work per second, and the median of the ratios of single rounds."""
    seconds = race(entry.ours, entry.peer, rounds, device)
    if entry.work is None:
        row, ratios = measured(entry.name, "s", *map(median, seconds), entry.target), (a / b for a, b in zip(*seconds))
    else:
        rates = [[amount / each for each in times] for amount, times in zip(entry.work, seconds)]
        row = measured(entry.name, f"{entry.unit}/s", *map(median, rates), entry.target)
        ratios = (a / b for a, b in zip(*rates))
    return row | {"ratio": median(ratios)}


# Models and steps --------------------------------------------------------------------------------------------------


def ours(size, device, **kwargs):
    return DynamicViT(**(SIZES[size] | kwargs)).to(device)


def timms(size, device):
    return VisionTransformer(**SIZES[size], reg_tokens=4, no_embed_class=True).to(device)


def textbook(size, device):
    """Explicit (N, N) attention, every token in every block."""
    model = timms(size, device)
    set_fused_attention(model, False)
    return model


class ConstantRate:
    """A schedule that leaves the learning rate alone."""

    def step_update(self, step):
        pass


def random_batch(size, batch, device):
    pixels, classes = SIZES[size]["img_size"], SIZES[size].get("num_classes", 1000)
    return torch.randn(batch, 3, pixels, pixels, device=device), torch.randint(classes, (batch,), device=device)


def training(model, batches, device, dtype=None, compiled=False):
    """A function that takes a training step with each batch: the engine's, with AdamW."""
    plain_attention_on_cpu(model, device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type != "mps")
    model = torch.compile(model) if compiled else model
    step = TrainingStep(model, nn.CrossEntropyLoss(), optimizer, ConstantRate(), amp_dtype=dtype)
    return lambda: train_one_epoch(step, batches)


def inference(model, images, device, dtype=None, compiled=False):
    model.eval()
    model = torch.compile(model) if compiled else model

    def run():
        with torch.no_grad(), utils.autocast(device, dtype):
            model(images)

    return run


def sizes_here(args, device) -> dict[str, int]:
    """Models to race and their batches."""
    sizes = {"dynamic_vit_tiny_patch16_224": 512, SMALL: 256, "dynamic_vit_base_patch16_224": 128, CIFAR: 1024}
    if device.type == "cpu":
        sizes = {SMALL: 8, CIFAR: 64}
    return {size: args.batch or batch for size, batch in sizes.items()}


def precision(dtype) -> str:
    return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def matmul(device, dtype):
    """(function, GFLOP): one large product, the physical limit of everything here."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype or torch.float32) for _ in range(2))
    return lambda: a @ b, 2 * n**3 / 1e9


# Rows --------------------------------------------------------------------------------------------------------------


def train_rows(args, device):
    """Training steps: against timm's and the textbook's; late tokens; bfloat16; the share of the peak."""
    low = utils.amp_dtype("auto", device)
    for size, count in sizes_here(args, device).items():
        batch, name, work = [random_batch(size, count, device)], f"training {LABEL[size]}, fp32", (count, count)
        mine = training(ours(size, device), batch, device)
        yield Race(f"{name}, against timm", mine, training(timms(size, device), batch, device), ">= 1.05", work)
        yield Race(f"{name}, against textbook", mine, training(textbook(size, device), batch, device), ">= 1.12", work)
        late = training(ours(size, device, cls_pos=6, reg_pos=3), batch, device)
        yield Race(f"{name}, CLS at 6 and registers at 3, against 0/0", late, mine, ">= 1", work)
        product, operations = matmul(device, None)
        gflop = (3 * count * ours(size, "meta").forward_flops() / 1e9, operations)
        yield Race(f"{name}, against one large product", mine, product, "", gflop, "GFLOP")
        if low is None:
            continue
        name, target = f"training {LABEL[size]}, {precision(low)}", ">= 1.6" if size == SMALL else ">= 1.3"
        in_low, its = (training(make(size, device), batch, device, low) for make in (ours, timms))
        yield Race(f"{name}, against our fp32", in_low, mine, target, work)
        yield Race(f"{name}, against timm in {precision(low)}", in_low, its, "", work)
        target = ">= 0.55" if size == SMALL else ""
        yield Race(f"{name}, against one large product", in_low, matmul(device, low)[0], target, gflop, "GFLOP")


def compile_rows(args, device):
    """Training steps with torch.compile, in the precision of training."""
    low = utils.amp_dtype("auto", device)
    for size, count in sizes_here(args, device).items():
        batch, work = [random_batch(size, count, device)], (count, count)
        name = f"training {LABEL[size]}, {precision(low)}, compiled, against"
        compiled, its = (training(make(size, device), batch, device, low, compiled=True) for make in (ours, timms))
        plain = training(ours(size, device), batch, device, low)
        yield Race(f"{name} not compiled", compiled, plain, "", work)
        yield Race(f"{name} timm compiled", compiled, its, "", work)


def infer_rows(args, device):
    """Forward passes, and compiled: in fp32, on a GPU in its lower precision."""
    low = utils.amp_dtype("auto", device) if device.type == "cuda" else None
    for size, count in sizes_here(args, device).items():
        images, name, work = random_batch(size, count, device)[0], f"inference {LABEL[size]}", (count, count)
        mine, its, plain = (inference(make(size, device), images, device, low) for make in (ours, timms, textbook))
        yield Race(f"{name}, {precision(low)}, against timm", mine, its, ">= 1.05", work)
        yield Race(f"{name}, {precision(low)}, against textbook", mine, plain, ">= 1.12", work)
        mine, its = (inference(make(size, device), images, device, low, compiled=True) for make in (ours, timms))
        yield Race(f"{name}, {precision(low)}, compiled, against timm compiled", mine, its, "", work)


def maps_rows(args, device):
    """All attention maps in one pass, against a forward pass; their memory at 1024 pixels."""
    images, model = random_batch(SMALL, 8, device)[0], ours(SMALL, device).eval()
    name, forward = "maps of 12 blocks at 224 px, against a forward pass", inference(model, images, device)
    yield Race(name, lambda: model.attention_maps(images, range(12)), forward, "<= 1.35")
    extra = in_child("maps_1024", device) - in_child("forward_1024", device)
    one_map = 12 * (4096 + 5) ** 2 * 4 / 2**20
    yield measured("maps at 1024 px, extra memory, against one N x N map", "MiB", extra, one_map, "<= 0.05")


def memory_rows(args, device):
    """The largest memory of a training step."""
    name = f"memory of a training step {LABEL[SMALL]}, fp32, against timm"
    yield measured(name, "MiB", in_child("step_ours", device), in_child("step_timm", device), "<= 1")


def load_rows(args, device):
    """Images/s of the loader with one CPU core (or the GPU) against PIL with one; waiting in training."""
    images, threads = smooth_images(6400), torch.get_num_threads()
    torch.set_num_threads(1)
    for name, aug, reprob, target in (
        ("crop, flip, normalise", "none", 0.0, ">= 8"), ("full default augmentation", "trivial", 0.25, ">= 4"),
    ):  # fmt: skip
        loader, by_pil = (
            train_loader(images.to(device), aug, reprob),
            PilImages(images[:640], pil_transform(aug, reprob)),
        )
        yield Race(
            f"loading 32 px, one core, {name}, against PIL", lambda loader=loader: list(loader),
            lambda by_pil=by_pil: [by_pil[i] for i in range(640)], target if device.type == "cpu" else ">= 100",
            (6400, 640),
        )  # fmt: skip
    torch.set_num_threads(threads)
    run = recipe_epoch(device)
    run()
    yield measured("waiting for data, share of the default CIFAR training", "", run()["data_wait"], 1.0, "<= 0.05")


def epoch_rows(args, device):
    """Training through the loaders: the default recipe against upsampling to 224 pixels, width 384, patch 16."""
    images = PilImages(smooth_images(96), pil_transform("trivial", 0.25, 224))
    loader = OnDevice(images, 32, num_workers=2, persistent_workers=True)
    loader.device = device
    reference = training(ours(SMALL, device, num_classes=10), loader, device, utils.amp_dtype("auto", device))
    name = "training through the loader, against 224 px by PIL"
    yield Race(name, recipe_epoch(device), reference, "", (1280, 96))


def start_rows(args, device):
    """--help of each script, and pages of one photograph, against importing torch, torchvision and timm."""

    def process(*command):
        return lambda: subprocess.run([sys.executable, *map(str, command)], capture_output=True, check=True)

    imports = process("-c", "import torch, torchvision, timm")
    for script in ("cifar_main.py", "cifar_test.py", "main_distillation.py", "visualize_attention.py"):
        yield Race(f"{script} --help, against imports", process(HERE / script, "--help"), imports, "<= 1.15")
    with tempfile.TemporaryDirectory() as folder:
        seconds = race(process(*photo_command(Path(folder))), imports, args.rounds, torch.device("cpu"))
    extra = median(photo - alone for photo, alone in zip(*seconds))
    yield measured("a PDF of one photo on top of imports, against 3 s", "s", extra, 3.0, "<= 1")


ROWS = {
    "train": train_rows, "compile": compile_rows, "infer": infer_rows, "maps": maps_rows, "memory": memory_rows,
    "load": load_rows, "epoch": epoch_rows, "start": start_rows,
}  # fmt: skip


# Memory: each measurement in a process of its own ------------------------------------------------------------------


def maps_1024(device, maps=True):
    image = torch.randn(1, 3, 1024, 1024, device=device)
    model = ours("dynamic_vit_base_patch16_224", device, img_size=1024)
    model.attention_maps(image, range(12)) if maps else inference(model, image, device)()


def training_step(make, device):
    training(make(SMALL, device), [random_batch(SMALL, 8, device)], device)()


CHILDREN = {
    "maps_1024": maps_1024, "forward_1024": partial(maps_1024, maps=False),
    "step_ours": partial(training_step, ours), "step_timm": partial(training_step, timms),
}  # fmt: skip


def in_child(name, device) -> float:
    """MiB that one of `CHILDREN` takes on top of the imports: the median of three processes."""
    command = [sys.executable, __file__, "--child", name, "--device", str(device)]
    run = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    return median(float(done.stdout) for done in run)


# Data --------------------------------------------------------------------------------------------------------------


def smooth_images(count):
    """Noise that was smoothed: as many different values as a photograph, drawn without a data set."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    return F.interpolate(coarse, size=32, mode="bilinear").to(torch.uint8)


def pil_transform(aug, reprob, size=None):
    """What `TrainTransform` does, image by image."""
    from torchvision import transforms

    policy = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    policy += [transforms.TrivialAugmentWide()] if aug == "trivial" else []
    erasing = [transforms.RandomErasing(reprob, scale=(0.02, 0.4), ratio=(0.3, 3.3))] if reprob else []
    larger = [transforms.Resize(size)] if size else []
    tensor = [transforms.ToTensor(), transforms.Normalize(DATA["mean"], DATA["std"])]
    return transforms.Compose([*policy, *larger, *tensor, *erasing])


class PilImages(torch.utils.data.Dataset):
    """PIL images, transformed one by one."""

    def __init__(self, images, transform):
        from torchvision.transforms.functional import to_pil_image

        self.images, self.transform = [to_pil_image(image) for image in images], transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), i % 10


class OnDevice(torch.utils.data.DataLoader):
    """Batches on `device`."""

    device = None

    def __iter__(self):
        return ((images.to(self.device), labels.to(self.device)) for images, labels in super().__iter__())


def train_loader(images, aug="trivial", reprob=0.25):
    labels = torch.arange(len(images), device=images.device) % 10
    return MemoryLoader(Split(images, labels), DATA, 128, TrainTransform(DATA, aug, 0.5, reprob))


def recipe_epoch(device, count=1280):
    """A function that trains the default CIFAR model on `count` images through the loader."""
    loader = train_loader(smooth_images(count).to(device))
    return training(ours(CIFAR, device, drop_path_rate=0.1), loader, device, utils.amp_dtype("auto", device))


def photo_command(folder: Path) -> list[str]:
    """visualize_attention.py on one photograph with a model of 224 pixels, 6 heads and 4 registers."""
    from torchvision.transforms.functional import to_pil_image

    model = ours(SMALL, "cpu", num_classes=10)
    data = DATA | {"name": "FOLDER", "classes": list("abcdefghij"), "input_size": (224, 224)}
    save_checkpoint(folder / "m.pth", {"model": model.state_dict(), "model_args": model.model_args, "data": data})
    to_pil_image(F.interpolate(smooth_images(1), size=(480, 640), mode="bicubic")[0]).save(folder / "photo.jpg")
    paths = ["--model_path", folder / "m.pth", "--image_path", folder / "photo.jpg", "--output_dir", folder]
    return [HERE / "visualize_attention.py", *paths, "--layer_num", "5"]


# Wiring ------------------------------------------------------------------------------------------------------------

WIDTH = 76  # of a row's name


def met(row) -> str:
    if not row["target"]:
        return ""
    sign, bound = row["target"].split()
    return "met" if (row["ratio"] >= float(bound) if sign == ">=" else row["ratio"] <= float(bound)) else "MISSED"


def show(row):
    numbers = (f"{row[key]:,.{3 if row[key] < 10 else 1}f}" for key in ("ours", "peer"))
    line = f"{row['name']:{WIDTH}}" + " ".join(f"{number:>10}" for number in numbers)
    print(f"{line} {row['unit']:9}{row['ratio']:7.3f}  {row['target']} {met(row)}".rstrip(), flush=True)


def main(argv=None):
    parser = utils.ArgumentParser(description="Race this project against timm, PIL and the textbook on this machine.")
    flag = parser.add_argument
    flag("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    flag("--rounds", type=utils.number(int, 1), default=9)
    flag("--batch", type=utils.number(int, 1), help="images in training and inference (default: 8 to 1024)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    flag("--num_threads", type=utils.number(int, 1), help="CPU threads (default: torch's)")
    flag("--json", metavar="FILE", help="also write the rows there")
    flag("--child", choices=CHILDREN, help="only print the memory that this takes")
    args = parser.parse_args(argv)
    device = utils.pick_device(args.device)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    if args.child:
        before = utils.peak_memory(device)
        CHILDREN[args.child](device)
        print(utils.peak_memory(device) - before)
        return
    unknown = set(args.rows.split(",")) - set(ROWS)
    if unknown:
        raise utils.BadInput(f"--rows: there is no {', '.join(sorted(unknown))}; choose of {','.join(ROWS)}")
    print(f"{'':{WIDTH}}{'ours':>10} {'peer':>10} {'unit':9}{'ratio':>7}  target")
    rows = []
    for name in args.rows.split(","):
        for entry in ROWS[name](args, device):
            rows.append(run_race(entry, args.rounds, device) if isinstance(entry, Race) else entry)
            show(rows[-1])
    if args.json:
        record = {"rows": rows, "rounds": args.rounds, "device": str(device), **environment(device)}
        utils.write_text(args.json, json.dumps(record, indent=1))


if __name__ == "__main__":
    utils.run_script(main)
