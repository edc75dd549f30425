"""The cells of a sweep: each has a folder, and is trained once, by the first process that locks it.

<output_dir>/cells/cls6_reg3_x4_seed0/   the run that cifar_main.py would make; lock, settings.json
<output_dir>/cells/cls6_reg3_x4_seed0/result.json   there once the cell is finished, and never half written
"""

import base64
import copy
import gc
import hashlib
import json
import shutil
import time
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

import utils
from checkpoints.files import load_checkpoint
from checkpoints.models import load_model
from checkpoints.schema import CELL_RESULT, first_wrong
from cifar_test import test_model
from cifar_train import train_from_flags
from datasets import ImageData
from engine import TrainingStep, train_one_epoch
from sweep.measures import measured
from training import run_folder
from training.film import write_film
from training.run_log import git_revision, plain_args, read_json_lines
from training.setup import amp_dtype, build_model, make_optimizer, plain_attention_on_cpu
from utils import BadInput, RunFailed, say

OF_THE_SWEEP = (  # flags that its cells do not see
    "seeds", "dry_run", "mix", "shard", "gpus", "workers", "launcher", "jobs", "cluster", "partition", "timeout",
    "measure", "halving", "eta",
)  # fmt: skip


@dataclass(frozen=True)
class GridCell:
    cls_pos: int | None  # None: no class token
    reg_pos: int | None  # None: no registers
    num_reg: int
    seed: int
    reg_end: int | None = None  # None: registers stay
    cls_mode: str = "token"
    reg_mode: str = "token"
    class_attention: int = 0  # a field with a default is one of `DESIGN`: a flag of the model

    @property
    def has_tokens(self) -> bool:
        return self.cls_pos is not None or self.num_reg > 0

    @property
    def key(self) -> tuple:
        """All but the seed, which cells of one position share."""
        return tuple(getattr(self, name) for name in AXES)

    @property
    def name(self) -> str:
        where = "" if self.reg_pos is None else f"_reg{self.reg_pos}"
        more = "".join(f"_{SHORT.get(k, k)}{getattr(self, k)}" for k in DESIGN if getattr(self, k) != DESIGN[k])
        return f"cls{utils.flag_value(self.cls_pos)}{where}_x{self.num_reg}{more}_seed{self.seed}"

    @property
    def flags(self) -> dict:
        """The model's flags."""
        return {name: getattr(self, name) for name in AXES} | {"reg_pos": self.reg_pos or 0}

    def __str__(self):
        return f"{describe_positions(*self.key)}, seed {self.seed}"


# What a cell has beside positions and registers, and its value in a cell of an earlier revision.
DESIGN = {field.name: field.default for field in fields(GridCell) if field.default is not MISSING}
SHORT = {"reg_end": "end", "cls_mode": "cls", "reg_mode": "reg", "class_attention": "ca"}  # in names of folders
WORDS = {
    "reg_end": "leaving at {}", "cls_mode": "CLS only reads", "reg_mode": "registers only read",
    "class_attention": "class attention in the last {}",
}  # fmt: skip
AXES = ("cls_pos", "reg_pos", "num_reg", *DESIGN)
# Flags that do not change the result of a cell. All others, the data and the code are its settings.
NOT_SETTINGS = (
    *AXES, *OF_THE_SWEEP, "output_dir", "data_path", "device", "num_threads", "log_to", "viz_every", "viz_images",
    "save_steps", "keep", "max_pixels", "bad_images",
)  # fmt: skip


def describe_cls(cls_pos) -> str:
    return "no CLS" if cls_pos is None else f"CLS at {cls_pos}"


def describe_registers(count) -> str:
    return {0: "no registers", 1: "1 register"}.get(count, f"{count} registers")


def describe_positions(cls_pos, reg_pos, num_reg, *design) -> str:
    """'CLS at 4, 2 registers at 0'"""
    where = f" at {reg_pos}" if num_reg else ""
    return ", ".join([describe_cls(cls_pos), describe_registers(num_reg) + where, *describe_design(*design)])


def describe_design(*design) -> list[str]:
    """Words for those values of `DESIGN` that are not the default."""
    pairs = zip(DESIGN.items(), design)
    return [WORDS.get(name, f"{name} {{}}").format(value) for (name, usual), value in pairs if value != usual]


def grid(args) -> list[GridCell]:
    """All cells of the flags, ordered by seed; equal models appear once, and what no model can be is left out.

    Raises BadInput if that is all, and for a position that is outside the model.
    """
    depth = model_of(GridCell(None, None, 0, 0), args).depth
    values = (getattr(args, name) for name in ("num_reg", "cls_pos", "reg_pos", *DESIGN))
    cells = [GridCell(cls, reg, count, args.seeds[0], *design) for count, cls, reg, *design in product(*values)]
    cells, problems = dict.fromkeys(_canonical(cell, depth) for cell in cells), {}
    for cell in list(cells):
        ordinary = replace(cell, **DESIGN)
        if cell != ordinary:  # these two may only lack such a block
            model_of(ordinary, args)
            model_of(replace(ordinary, reg_pos=0, reg_end=cell.reg_end), args)
        try:
            model_of(cell, args)
        except BadInput as error:
            if cell == ordinary:
                raise
            problems[cell] = error
            del cells[cell]
    first = next(map(str, problems.values()), "")
    if not cells:
        raise BadInput(f"no cell of this grid can be a model: {first}")
    if problems:
        utils.note_once("the grid", f"{utils.counted(len(problems), 'combination')} left out, as in {first}")
    return [replace(cell, seed=seed) for seed in args.seeds for cell in cells]


def _canonical(cell: GridCell, depth) -> GridCell:
    """The cell with the defaults for what changes nothing in its model."""
    if not cell.num_reg:
        cell = replace(cell, reg_pos=None, reg_end=None, reg_mode="token")
    if cell.reg_end == depth:
        cell = replace(cell, reg_end=None)
    if cell.cls_pos is None:
        return replace(cell, cls_mode="token", class_attention=0)
    alone = cell.class_attention and cell.cls_pos == depth - cell.class_attention  # no other token attends to anything
    return replace(cell, cls_mode="token") if alone and cell.reg_mode == "token" else cell


def folder_of(cell: GridCell, args) -> Path:
    return Path(args.output_dir) / "cells" / cell.name


def finished(cell: GridCell, args) -> bool:
    return (folder_of(cell, args) / "result.json").is_file()


def reached(cell: GridCell, args, epochs) -> bool:
    """Whether a cell is finished, or has been trained up to that epoch of several."""
    records = [] if epochs >= args.epochs else read_json_lines(folder_of(cell, args) / "log.txt")
    return finished(cell, args) or any(record.get("epoch", 0) >= epochs for record in records)


def cell_args(cell: GridCell, args):
    """The flags of `cifar_main.py` for one cell."""
    mine, folder = copy.copy(args), folder_of(cell, args)
    for name in OF_THE_SWEEP:
        vars(mine).pop(name, None)
    vars(mine).update(cell.flags | {"seed": cell.seed})
    mine.output_dir, mine.model_path = str(folder), str(folder / "model.pth")
    mine.overwrite, mine.resume = True, None
    if not cell.has_tokens:
        mine.viz_every = mine.viz_images = None  # it has no maps
    if args.equal_flops:
        first = GridCell(0, 0 if cell.num_reg else None, cell.num_reg, cell.seed)
        mine.repeats = args.repeats * flops(first, args) / flops(cell, args)
    return mine


def model_of(cell: GridCell, args):
    """The cell's model without weights. Raises BadInput for flags that do not fit together."""
    mine = copy.copy(args)
    vars(mine).update(cell.flags)
    try:
        return build_model(mine, 10, "meta")
    except BadInput as error:
        raise BadInput(f"{cell}: {error}") from None


def flops(cell: GridCell, args) -> int:
    return model_of(cell, args).forward_flops()


def settings(args, data: ImageData) -> dict:
    """Everything that must be equal for two cells to be compared."""
    found = {name: value for name, value in plain_args(args).items() if name not in NOT_SETTINGS}
    if args.finetune:
        found["finetune"] = hashlib.sha256(Path(args.finetune).read_bytes()).hexdigest()
    found |= {f"data: {name}": value for name, value in data.description().items()}
    return json.loads(json.dumps(found | {"code": git_revision()}))


def differences(saved: dict, current: dict) -> list[str]:
    names = [name for name in sorted({*saved, *current}) if saved.get(name) != current.get(name)]
    return [f"{name} was {str(saved.get(name))[:40]}, is now {str(current.get(name))[:40]}" for name in names]


def check_settings(args, current: dict):
    """Raise BadInput if the folder has cells of other settings, unless --mix."""
    for file in sorted(Path(args.output_dir).glob("cells/*/settings.json")):
        other = differences(read_record(file), current)
        if other and not args.mix:
            more = f", and {len(other) - 4} more" if len(other) > 4 else ""
            raise BadInput(
                f"{file.parent} was trained with other settings ({'; '.join(other[:4])}{more}), so its accuracy cannot "
                "be compared: give another --output_dir, or --mix to put both into one table"
            )


def read_record(file) -> dict:
    """A settings.json or result.json. Raises BadInput for one that is damaged or lacks something."""
    try:
        if not file.is_file():  # a pipe would never end
            raise ValueError("it is no file")
        record = json.loads(file.read_text())
        if wrong := wrong_result(record) if file.name == "result.json" else first_wrong(record, {}):
            raise ValueError(f"{wrong} missing or wrong")
        return record
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} cannot be read ({error}); remove {file.parent} to train that cell anew") from None


def wrong_result(record) -> str | None:
    """The first part of a result.json that is missing or wrong."""
    if wrong := first_wrong(record, CELL_RESULT):
        return wrong
    hits = hits_of(record)
    if hits is not None and abs(100 * hits.mean() - record["test_top1"]) >= 1e-6:
        return "test_hits"
    curve, ends, entry = record.get("causal_cost"), record.get("causal_cost_interval"), record["cls_pos"]
    if curve is ends is None:
        return None
    absent = [[value is None for value in values or ()] for values in (curve, ends)]
    begins = entry is not None and absent[0] == absent[1] == [True] * entry + [False] * (len(absent[0]) - entry)
    return None if begins else "causal_cost"


def packed(hits) -> str:
    """Booleans (n,) as text: one bit each, in base64; the inverse of `hits_of`."""
    return base64.b64encode(np.packbits(hits)).decode()


def hits_of(record) -> np.ndarray | None:
    """Which of the test images a cell classified correctly, (n,) booleans; None for a cell of an earlier revision.

    Raises ValueError for hits of another number of images.
    """
    if "test_hits" not in record:
        return None
    count, text = record["test_images"], record["test_hits"]
    data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    if type(count) is not int or count < 1 or len(data) != -(-count // 8):
        raise ValueError("test_hits missing or wrong")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool)


def run_cells(cells, args, data: ImageData, current: dict, device, after, epochs) -> tuple[list[GridCell], ...]:
    """Train and test the cells that no process has finished or locked; calls `after(cell)` after each.

    `epochs`: how far; cells that are not trained whole are not tested.

    Returns the cells that other processes have locked, and those that failed (a loss that is not finite).
    """
    busy, failed = [], []
    if args.viz_every and any(not cell.has_tokens and not finished(cell, args) for cell in cells):
        utils.note_once("no tokens", "--viz_every draws nothing for cells without CLS and registers")
    for cell in cells:
        if reached(cell, args, epochs):
            continue
        try:
            with run_folder.locked(folder_of(cell, args)):
                if reached(cell, args, epochs):  # by another process meanwhile
                    continue
                run_cell(cell, args, data, current, device, epochs)
                after(cell)
        except run_folder.InUse:
            busy.append(cell)
        except RunFailed as error:
            say(f"{cell.name} failed: {error}")
            failed.append(cell)
    return busy, failed


def run_cell(cell: GridCell, args, data: ImageData, current: dict, device, epochs):
    """Do what `cifar_main.py` does with this cell's flags, up to that epoch; after the last, write the record."""
    folder = folder_of(cell, args)
    saved = folder / "settings.json"
    if saved.is_file() and differences(read_record(saved), current):  # only with --mix: cannot be resumed
        for file in folder.iterdir():
            if file.name not in ("lock", "running.json"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
    utils.write_text(saved, json.dumps(current, indent=1))
    mine = cell_args(cell, args)
    mine.resume = resumable(folder)
    if device.type != "cpu":  # there, all cells share the images
        gc.collect()  # matplotlib's errors keep the frames of the cell before, and these its images on the GPU
    try:
        best = train_from_flags(mine, device, data, epochs)
    except BadInput as error:
        if mine.resume is None or mine.resume not in str(error):
            raise
        advice = "move that file away to resume from an older one, or to train anew"
        raise BadInput(f"{error.problem}; {advice}") from None
    if epochs < args.epochs:
        return
    start = time.monotonic()
    tested = test_model(mine.model_path, args.data_path, device, args.batch_size, max_pixels=args.max_pixels)
    write_film(mine)
    record = {**asdict(cell), **_scores(mine, best, tested), **measured(mine.model_path, data, device)}
    record["measure_seconds"] = time.monotonic() - start
    utils.write_text(folder / "result.json", json.dumps(record, indent=1))
    for file in run_folder.checkpoints(folder):  # the largest files, and nothing is left to resume
        file.unlink()


def resumable(folder) -> str | None:
    """The checkpoint that a cell resumes from; None to train it from its beginning.

    Damaged checkpoints are moved aside. Without the best weights so far, the resumed cell could end with worse ones.
    """
    found, path = run_folder.checkpoints(folder), run_folder.newest_readable(folder)
    try:
        if path is not None and load_checkpoint(path).get("best"):
            load_checkpoint(folder / "model.pth")
    except BadInput as error:
        say(error.problem)
        path = None
    if path is None and found:
        say(f"{folder.name} cannot be resumed; it is trained from its beginning")
    return None if path is None else str(path)


def _scores(mine, best, tested) -> dict:
    epochs = [r for r in read_json_lines(Path(mine.output_dir) / "log.txt") if "epoch" in r]
    model, _ = load_model(mine.model_path)
    seconds = sum(epoch["seconds"] for epoch in epochs)
    return {
        "val_top1": best["val_top1"], "best_epoch": best["epoch"], "test_top1": tested["top1"],
        "test_top5": tested["top5"], "test_loss": tested["loss"], "test_images": tested["images"],
        "test_hits": packed(tested["hits"]),
        "params": sum(p.numel() for p in model.parameters()), "flops": model.forward_flops(), "repeats": mine.repeats,
        "images_per_s": sum(e["images_per_s"] * e["seconds"] for e in epochs) / seconds, "train_seconds": seconds,
    }  # fmt: skip


def seconds_left(cells, args, data: ImageData, device) -> float:
    """Seconds that the unfinished `cells` take one after another, from the finished ones: their seconds per FLOP of
    training, and those of their test and measures.

    If none is finished, of training alone, from a few steps of the first one.
    """
    left = [cell for cell in cells if not finished(cell, args)]
    if not left:
        return 0.0
    records = [read_record(file) for file in Path(args.output_dir).glob("cells/*/result.json")]
    rates = [record["train_seconds"] / (record["flops"] * record["repeats"]) for record in records]
    work = sum(flops(cell, args) * cell_args(cell, args).repeats for cell in left)
    if not rates:
        return work * _seconds_per_flop(left[0], args, data, device)
    after = np.mean([record.get("measure_seconds", 0) for record in records])
    return float(work * np.mean(rates) + len(left) * after)


def _seconds_per_flop(cell, args, data, device, steps=4) -> float:
    """Seconds of a whole training per FLOP and pass, measured on random images; the first epoch of two warms up."""
    mine = cell_args(cell, args)
    mine.lr = mine.warmup_lr = mine.min_lr = 0.0
    model, dtype = build_model(mine, len(data.classes)).to(device), amp_dtype(args.amp, device)
    plain_attention_on_cpu(model, device, dtype)
    labels = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    batches = [(torch.randn(args.batch_size, 3, *data.input_size, device=device), labels)] * steps
    optimizer, scheduler = make_optimizer(model, mine, batches)
    step = TrainingStep(model, torch.nn.CrossEntropyLoss(), optimizer, scheduler, amp_dtype=dtype)
    measured = [train_one_epoch(step, batches) for _ in range(2)][1]
    return measured["seconds"] / measured["images"] * len(data.train) * args.epochs / model.forward_flops()
