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
from models_dynamic import SIZES, DynamicViT, set_fused_attention
from training.run_log import environment

DATA = {"input_size": (32, 32), "mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]}
SMALL, CIFAR = "dynamic_vit_small_patch16_224", "dynamic_vit_cifar"
LABEL = {SMALL: "224/16 width 384", CIFAR: "32/4 width 192", "dynamic_vit_tiny_patch16_224": "224/16 width 192",
         "dynamic_vit_base_patch16_224": "224/16 width 768"}  # fmt: skip
HERE = Path(__file__).parent


# What is raced ----------------------------------------------------------------------------------------------------


class Textbook(nn.Module):
    """A Vision Transformer as it is taught: explicit (N, N) attention, every token in every block."""

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0, num_classes=1000, registers=4):
        super().__init__()
        D, hidden, self.heads = embed_dim, int(embed_dim * mlp_ratio), num_heads
        self.patches = nn.Conv2d(3, D, patch_size, patch_size)
        self.positions = nn.Parameter(torch.randn(1, (img_size // patch_size) ** 2, D) * 0.02)
        self.cls, self.registers = (nn.Parameter(torch.randn(1, n, D) * 0.02) for n in (1, registers))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(D, eps=1e-6), "qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D),
                "norm2": nn.LayerNorm(D, eps=1e-6),
                "mlp": nn.Sequential(nn.Linear(D, hidden), nn.GELU(), nn.Linear(hidden, D)),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(D, eps=1e-6), nn.Linear(D, num_classes)

    def attention(self, block, x):
        B, N, D = x.shape
        q, k, v = block["qkv"](x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5).softmax(dim=-1)  # (B, H, N, N)
        return block["proj"]((weights @ v).transpose(1, 2).reshape(B, N, D))

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.cls.expand(len(x), -1, -1), x, self.registers.expand(len(x), -1, -1)], dim=1)
        for block in self.blocks:
            x = x + self.attention(block, block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x)[:, 0])


def ours(size, device, **kwargs):
    return DynamicViT(**(SIZES[size] | kwargs)).to(device)


def timms(size, device):
    return VisionTransformer(**SIZES[size], reg_tokens=4, no_embed_class=True).to(device)


def textbook(size, device):
    return Textbook(**SIZES[size]).to(device)


class Still:
    """A schedule that leaves the rate alone."""

    def step_update(self, step):
        pass


def random_batch(size, batch, device):
    pixels, classes = SIZES[size]["img_size"], SIZES[size].get("num_classes", 1000)
    return torch.randn(batch, 3, pixels, pixels, device=device), torch.randint(classes, (batch,), device=device)


def training(model, batches, device, dtype=None, compiled=False):
    """A function that takes a training step with each batch: the engine's, with AdamW."""
    if dtype is not None and device.type == "cpu":
        set_fused_attention(model, False)  # as in training: see `run_epochs`
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type != "mps")
    model = torch.compile(model) if compiled else model
    step = TrainingStep(model, nn.CrossEntropyLoss(), optimizer, Still(), amp_dtype=dtype)
    return lambda: train_one_epoch(step, batches)


def inference(model, images, device, dtype=None, compiled=False):
    model.eval()
    model = torch.compile(model) if compiled else model

    def run():
        with torch.no_grad(), utils.autocast(device, dtype):
            model(images)

    return run


# Racing ------------------------------------------------------------------------------------------------------------


def race(mine, peer, rounds, device) -> tuple[list[float], list[float]]:
    """Seconds of each call of the two, one after the other; who begins changes from round to round. Two warm up."""
    seconds = {mine: [], peer: []}
    for turn in range(-2, rounds):
        for contender in (mine, peer) if turn % 2 else (peer, mine):
            start = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):  # no bar of progress for each step
                contender()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[contender].append(time.perf_counter() - start)
    return seconds[mine], seconds[peer]


def rates(name, unit, mine, peer, args, device, target="", work=(1, 1)) -> dict:
    """A row where more is better: the amount of `work` (of ours, of the peer's) a second."""
    seconds = race(mine, peer, args.rounds, device)
    figures = [amount / median(times) for amount, times in zip(work, seconds)]
    ratio = median(work[0] / work[1] * b / a for a, b in zip(*seconds))
    return dict(name=name, unit=unit, ours=figures[0], peer=figures[1], ratio=ratio, target=target)


def times(name, mine, peer, args, device, target="") -> dict:
    """A row of seconds, where less is better."""
    seconds = race(mine, peer, args.rounds, device)
    ratio = median(a / b for a, b in zip(*seconds))
    return dict(name=name, unit="s", ours=median(seconds[0]), peer=median(seconds[1]), ratio=ratio, target=target)


def sizes_here(args, device) -> dict[str, int]:
    """Models to race and their batches."""
    sizes = {"dynamic_vit_tiny_patch16_224": 512, SMALL: 256, "dynamic_vit_base_patch16_224": 128, CIFAR: 1024}
    if device.type == "cpu":
        sizes = {SMALL: 8, CIFAR: 64}
    return {size: args.batch or batch for size, batch in sizes.items()}


def precision(dtype) -> str:
    return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def matmul(device, dtype):
    """(function, operations): one large product, the physical limit of everything here."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype or torch.float32) for _ in range(2))
    return lambda: a @ b, 2 * n**3


def train_rows(args, device):
    """Training steps: against timm's and the textbook's; late tokens; bfloat16; the share of the peak."""
    rows, low = [], utils.amp_dtype("auto", device)
    for size, images in sizes_here(args, device).items():
        batch = [random_batch(size, images, device)]

        def add(name, mine, peer, target, size=size, work=(images, images), unit="images/s"):
            rows.append(rates(f"training {LABEL[size]}, {name}", unit, mine, peer, args, device, target, work))

        mine = training(ours(size, device), batch, device)
        add("fp32, against timm", mine, training(timms(size, device), batch, device), ">= 1.05")
        add("fp32, against textbook", mine, training(textbook(size, device), batch, device), ">= 1.12")
        late = training(ours(size, device, cls_pos=6, reg_pos=3), batch, device)
        add("fp32, CLS at 6 and registers at 3, against 0/0", late, mine, ">= 1")
        product, operations = matmul(device, None)
        work = (3 * images * ours(size, "meta").forward_flops() / 1e9, operations / 1e9)
        add("fp32, against one large product", mine, product, "", work=work, unit="GFLOP/s")
        if low is not None:
            in_low = training(ours(size, device), batch, device, low)
            add(f"{precision(low)}, against our fp32", in_low, mine, ">= 1.6" if size == SMALL else ">= 1.3")
            add(
                f"{precision(low)}, against timm in {precision(low)}",
                in_low,
                training(timms(size, device), batch, device, low),
                "",
            )
            product, _ = matmul(device, low)
            target = ">= 0.55" if size == SMALL else ""
            add(f"{precision(low)}, against one large product", in_low, product, target, work=work, unit="GFLOP/s")
    return rows


def compile_rows(args, device):
    """Training steps with torch.compile, in the precision of training."""
    rows, low = [], utils.amp_dtype("auto", device)
    for size, images in sizes_here(args, device).items():
        batch, work = [random_batch(size, images, device)], (images, images)
        name = f"training {LABEL[size]}, {precision(low)}, compiled, against"
        compiled = training(ours(size, device), batch, device, low, compiled=True)
        plain = training(ours(size, device), batch, device, low)
        its = training(timms(size, device), batch, device, low, compiled=True)
        rows.append(rates(f"{name} not compiled", "images/s", compiled, plain, args, device, work=work))
        rows.append(rates(f"{name} timm compiled", "images/s", compiled, its, args, device, work=work))
    return rows


def infer_rows(args, device):
    """Forward passes, and compiled: in fp32, on a GPU in its lower precision."""
    rows, low = [], utils.amp_dtype("auto", device) if device.type == "cuda" else None
    for size, batch in sizes_here(args, device).items():
        images = random_batch(size, batch, device)[0]

        def add(name, mine, peer, target, size=size, work=(batch, batch)):
            name = f"inference {LABEL[size]}, {precision(low)}, {name}"
            rows.append(rates(name, "images/s", mine, peer, args, device, target, work))

        mine = inference(ours(size, device), images, device, low)
        add("against timm", mine, inference(timms(size, device), images, device, low), ">= 1.05")
        add("against textbook", mine, inference(textbook(size, device), images, device, low), ">= 1.12")
        compiled = [inference(make(size, device), images, device, low, compiled=True) for make in (ours, timms)]
        add("compiled, against timm compiled", *compiled, "")
    return rows


def maps_rows(args, device):
    """All attention maps in one pass, against a forward pass; their memory at 1024 pixels."""
    images, model = random_batch(SMALL, 8, device)[0], ours(SMALL, device).eval()
    name, forward = "maps of 12 blocks at 224 px, against a forward pass", inference(model, images, device)
    rows = [times(name, lambda: model.attention_maps(images, range(12)), forward, args, device, "<= 1.35")]
    extra = in_child("maps_1024", device) - in_child("forward_1024", device)
    one_map = 12 * (4096 + 5) ** 2 * 4 / 2**20
    name = "maps at 1024 px, extra memory, against one N x N map"
    return [*rows, dict(name=name, unit="MiB", ours=extra, peer=one_map, ratio=extra / one_map, target="<= 0.05")]


# Memory: each measurement in a process of its own ------------------------------------------------------------------


def large(device):
    image = torch.randn(1, 3, 1024, 1024, device=device)
    return ours("dynamic_vit_base_patch16_224", device, img_size=1024).eval(), image


def maps_1024(device):
    model, image = large(device)
    model.attention_maps(image, range(12))


def forward_1024(device):
    model, image = large(device)
    with torch.no_grad():
        model(image)


def step_ours(device):
    training(ours(SMALL, device), [random_batch(SMALL, 8, device)], device)()


def step_timm(device):
    training(timms(SMALL, device), [random_batch(SMALL, 8, device)], device)()


CHILDREN = {f.__name__: f for f in (maps_1024, forward_1024, step_ours, step_timm)}


def in_child(name, device) -> float:
    """MiB that one of `CHILDREN` takes on top of the imports: the median of three processes."""
    command = [sys.executable, __file__, "--child", name, "--device", str(device)]
    run = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    return median(float(done.stdout) for done in run)


def memory_rows(args, device):
    """The largest memory of a training step."""
    mine, its = in_child("step_ours", device), in_child("step_timm", device)
    name = f"memory of a training step {LABEL[SMALL]}, fp32, against timm"
    return [dict(name=name, unit="MiB", ours=mine, peer=its, ratio=mine / its, target="<= 1")]


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


class Pictures(torch.utils.data.Dataset):
    """PIL images, transformed one by one."""

    def __init__(self, images, transform):
        from PIL import Image

        self.pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.transform = transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return self.transform(self.pictures[i]), i % 10


def train_loader(images, aug="trivial", reprob=0.25, hflip=0.5):
    labels = torch.arange(len(images), device=images.device) % 10
    return MemoryLoader(Split(images, labels), DATA, 128, TrainTransform(DATA, aug, hflip, reprob))


def load_rows(args, device):
    """Images/s of the loader with one CPU core (or the GPU) against PIL with one; waiting in training."""
    rows, images, threads = [], smooth_images(6400), torch.get_num_threads()
    torch.set_num_threads(1)
    for name, aug, reprob, target in (
        ("crop, flip, normalise", "none", 0.0, ">= 8"), ("full default augmentation", "trivial", 0.25, ">= 4"),
    ):  # fmt: skip
        loader = train_loader(images.to(device), aug, reprob)
        pictures = Pictures(images[:640], pil_transform(aug, reprob))
        rows.append(rates(
            f"loading 32 px, one core, {name}, against PIL", "images/s", lambda loader=loader: [None for _ in loader],
            lambda pictures=pictures: [pictures[i] for i in range(640)], args, device,
            target if device.type == "cpu" else ">= 100", (6400, 640),
        ))  # fmt: skip
    torch.set_num_threads(threads)
    run = recipe_epoch(device)
    run()
    waited, name = run()["data_wait"], "waiting for data, share of the default CIFAR training"
    return [*rows, dict(name=name, unit="", ours=waited, peer=1.0, ratio=waited, target="<= 0.05")]


def recipe_epoch(device, count=1280):
    """A function that trains the default CIFAR model on `count` images through the loader."""
    loader = train_loader(smooth_images(count).to(device))
    return training(ours(CIFAR, device, drop_path_rate=0.1), loader, device, utils.amp_dtype("auto", device))


def epoch_rows(args, device):
    """Training through the loaders: the default recipe against upsampling to 224 pixels, width 384, patch 16."""
    pictures = Pictures(smooth_images(96), pil_transform("trivial", 0.25, 224))
    loader = torch.utils.data.DataLoader(pictures, 32, num_workers=2, persistent_workers=True)
    moved = type("Moved", (), {  # the batches on the device
        "__iter__": lambda self: ((images.to(device), labels.to(device)) for images, labels in loader),
        "__len__": lambda self: len(loader),
    })()  # fmt: skip

    reference = training(ours(SMALL, device, num_classes=10), moved, device, utils.amp_dtype("auto", device))
    name = "training through the loader, against 224 px by PIL"
    return [rates(name, "images/s", recipe_epoch(device), reference, args, device, work=(1280, 96))]


# Starting ----------------------------------------------------------------------------------------------------------


def photo_command(folder: Path) -> list[str]:
    """visualize_attention.py on one photograph with a model of 224 pixels, 6 heads and 4 registers."""
    from PIL import Image

    model = ours(SMALL, "cpu", num_classes=10)
    data = DATA | {"name": "FOLDER", "classes": list("abcdefghij"), "input_size": (224, 224)}
    save_checkpoint(folder / "m.pth", {"model": model.state_dict(), "model_args": model.model_args, "data": data})
    pixels = F.interpolate(smooth_images(1).float(), size=(480, 640), mode="bicubic")[0].clamp(0, 255).to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / "photo.jpg")
    paths = ["--model_path", folder / "m.pth", "--image_path", folder / "photo.jpg", "--output_dir", folder]
    return [HERE / "visualize_attention.py", *paths, "--layer_num", "5"]


def start_rows(args, device):
    """--help of each script, and pages of one photograph, against importing torch, torchvision and timm."""

    def process(*command):
        return lambda: subprocess.run([sys.executable, *map(str, command)], capture_output=True, check=True)

    imports, cpu = process("-c", "import torch, torchvision, timm"), torch.device("cpu")
    scripts = ("cifar_main.py", "cifar_test.py", "main_distillation.py", "visualize_attention.py")
    args = utils.argparse.Namespace(rounds=min(args.rounds, 5))  # each takes seconds
    rows = [
        times(f"{script} --help, against imports", process(HERE / script, "--help"), imports, args, cpu, "<= 1.15")
        for script in scripts
    ]
    with tempfile.TemporaryDirectory() as folder:
        photo, alone = race(process(*photo_command(Path(folder))), imports, args.rounds, cpu)
    extra, name = median(a - b for a, b in zip(photo, alone)), "a PDF of one photo on top of imports, against 3 s"
    return [*rows, dict(name=name, unit="s", ours=extra, peer=3.0, ratio=extra / 3, target="<= 1")]


ROWS = {
    "train": train_rows, "compile": compile_rows, "infer": infer_rows, "maps": maps_rows, "memory": memory_rows,
    "load": load_rows, "epoch": epoch_rows, "start": start_rows,
}  # fmt: skip


WIDTH = 76  # of a row's name


def met(row) -> str:
    if not row["target"]:
        return ""
    sign, bound = row["target"].split()
    return "met" if (row["ratio"] >= float(bound) if sign == ">=" else row["ratio"] <= float(bound)) else "MISSED"


def show(rows):
    for row in rows:
        figures = (f"{row[key]:,.{3 if row[key] < 10 else 1}f}" for key in ("ours", "peer"))
        line = f"{row['name']:{WIDTH}}" + " ".join(f"{figure:>10}" for figure in figures)
        print(f"{line} {row['unit']:9}{row['ratio']:7.3f}  {row['target']} {met(row)}".rstrip(), flush=True)


def main(argv=None):
    parser = utils.ArgumentParser(description="Race this project against timm, PIL and the textbook on this machine.")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}")
    parser.add_argument("--rounds", type=utils.number(int, 1), default=9)
    parser.add_argument(
        "--batch", type=utils.number(int, 1), help="images in training and inference (default: 8 to 1024)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--num_threads", type=utils.number(int, 1), help="CPU threads (default: torch's)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--child", choices=CHILDREN, help="only print the memory that this takes")
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
        found = ROWS[name](args, device)
        show(found)
        rows += found
    if args.json:
        record = {"rows": rows, "rounds": args.rounds, "device": str(device), **environment(device)}
        utils.write_atomically(args.json, lambda file: file.write(json.dumps(record, indent=1).encode()))


if __name__ == "__main__":
    utils.run_script(main)
