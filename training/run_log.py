"""What a run writes for a reader: lines of JSON, curves."""

import csv
import io
import json
import math
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

import utils
from inspection.pages import write_pdf
from utils import RunFailed, write_atomically

CURVES_EVERY = 30  # seconds, at least; and after the last epoch


class RunLogger:
    """What the first process writes of each epoch: a line of the log, what `log_to` writes, sometimes the curves."""

    def __init__(self, log: Path, log_to=()):
        self.log, self.log_to, self.drawn, self.epochs = log, log_to, -math.inf, None

    def add(self, metrics):
        try:
            with open(self.log, "a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise RunFailed(f"cannot write {self.log}: {error.strerror}") from None
        if perf_counter() - self.drawn > CURVES_EVERY:  # a page takes a second, small epochs little more
            self.draw()
        for add in self.log_to:
            add(metrics)

    def draw(self):
        if not utils.is_main():
            return
        epochs = [record for record in read_json_lines(self.log) if "epoch" in record]
        if epochs and len(epochs) != self.epochs:
            plot_curves(epochs, self.log.parent)
            self.drawn, self.epochs = perf_counter(), len(epochs)


def print_what_was_written(folder: Path, model_path):
    """The end of a run: where its files are, and the command that draws."""
    utils.say(f"model: {model_path}; curves: {folder / 'training_curves.png'}; log: {folder / 'log.txt'}")
    drawing = f"python visualize_attention.py --model_path {shlex.quote(Path(model_path).as_posix())} --format html"
    utils.say(f"look at what its tokens attend to: {drawing}")


def plain_args(args) -> dict:
    """An argparse namespace as plain values."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in sorted(vars(args).items())}


def git_revision() -> str:
    """Of this code; '-dirty' if files were changed since, 'unknown' if it is no repository."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace").stdout.strip() or "unknown"
    except OSError:  # no git here
        return "unknown"


def environment(device) -> dict:
    """Versions, git revision and the hardware of `device`: what a log needs to be understood later."""
    import timm
    import torchvision

    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "timm": timm.__version__, "numpy": np.__version__, "git": git_revision(), "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _hardware(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):  # Linux; Python itself knows only the architecture there
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def reset_peak_memory(device):
    """`peak_memory` counts from now on, where the system can do that (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM


def peak_memory(device) -> float:
    """MiB: the largest amount that tensors took on a GPU since `reset_peak_memory`, elsewhere that of this process.

    NaN where the system does not report it (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):  # a process that was just started by a large one has the other's size below, not here
        if found := re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()):
            return int(found[1]) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def read_json_lines(path) -> list[dict]:
    """The records of a log; lines that are none, such as a last one that a crash cut off, are left out.

    None of a file that is not there.
    """
    records, content = [], b""
    with suppress(FileNotFoundError):
        content = Path(path).read_bytes()
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # bytes that are no UTF-8 are a ValueError, too
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def write_csv(path, columns, rows):
    """A table with a column for each name in `columns`, from dictionaries; what they lack stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    utils.write_text(path, text.getvalue())


def selection_key(metrics):
    """What the best epoch has the largest of."""
    return metrics["val_top1"], -metrics["val_loss"]


PANELS = (  # of the training curves: title, label of the axis, lines
    ("Loss", "loss", {"train_loss": "training (augmented)", "val_loss": "validation"}),
    ("Validation accuracy", "top-1 (%)", {"val_top1": "validation", "raw_val_top1": "without EMA"}),
    ("Learning rate", "at the end of the epoch", {"lr": "learning rate"}),
    ("Gradient", "norm, mean over the epoch", {"grad_norm": "before clipping"}),
    ("Speed", "images/s, all processes", {"images_per_s": "training"}),
    ("Waiting for data", "share of the time (%)", {"data_wait": "waiting"}),
)


def run_name(folder) -> str:
    """The last two folders of its path, as a title."""
    return utils.shortened(utils.printable("/".join(Path(folder).absolute().parts[-2:])), 40)


def plot_curves(epochs: list[dict], folder):
    """Draw `training_curves.pdf` and `.png` from the epoch records of a log."""
    figure, folder = curves(epochs, run_name(folder)), Path(folder)
    write_pdf([figure], folder / "training_curves.pdf")
    write_atomically(folder / "training_curves.png", lambda file: figure.savefig(file, format="png", dpi=120))


def curves(epochs: list[dict], name):
    """A matplotlib figure of `PANELS` of run `name`; the epoch with the best validation accuracy is marked in each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11.69, 6.6), layout="constrained")
    judged = [record for record in epochs if record.get("val_top1") is not None]
    best = max(judged, key=selection_key, default=None)  # the first of equal ones
    words = f": best epoch {best['epoch']}, validation accuracy {best['val_top1']:.2f}%" if best else ""
    figure.suptitle(name + words, fontsize=11)
    numbers = [record["epoch"] for record in epochs]
    for axes, (title, label, lines) in zip(figure.subplots(2, 3).flat, PANELS):
        for key, name in lines.items():
            values = np.array([record.get(key) for record in epochs], dtype=float)  # NaN where it was not measured
            if not np.isnan(values).all():
                axes.plot(numbers, values, marker=".", label=name)
        if len(axes.lines) > 1:
            axes.legend()
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        elif best is not None:
            axes.axvline(best["epoch"], color="0.4", linestyle=":", linewidth=1)
        axes.set(title=title, xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if title == "Learning rate" and min(record.get("lr") or 0 for record in epochs) > 0:
            axes.set_yscale("log")
        if title in ("Speed", "Waiting for data"):
            axes.set_ylim(bottom=0)
    return figure
