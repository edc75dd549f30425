"""sweep.html: the grid of a sweep to explore in a browser, one file that never uses the network.

Each cell's measures, curves, and attention maps on the same held-out images, two cells side by side.
"""

import base64
import json
from pathlib import Path

import numpy as np
import torch

import utils
from checkpoints.models import load_model
from datasets import ImageData
from inspection.attention import can_be_seen
from inspection.html import data_uri
from loading.memory import MemoryLoader
from sweep import results
from sweep.measures import PRIMARY, TITLES
from sweep.pages import path_of
from training.film import token_maps
from training.run_log import read_json_lines
from utils import flag_value

TEMPLATE = Path(__file__).with_name("explorer.html")
IMAGES = 4


@utils.full_precision()
@torch.no_grad()
def write_explorer(folder, data: ImageData, about: str, measure="accuracy", halved=None) -> int | None:
    """Write sweep.html from the finished cells in `folder`; returns its size in bytes, None without any cell.

    `measure`: what the verdict and the differences are of, see `measures.PRIMARY`.
    """
    from matplotlib import colormaps

    records = results.collect(folder)
    if not records:
        return None
    summary, source = results.summarise(records, measure, halved), data.val or data.test
    compared, unit = TITLES[PRIMARY[measure][0]]
    few = source.part(range(min(IMAGES, len(source))))
    groups, fell = results.grouped(records), halved["fell"] if halved else []
    content = {
        "about": about, "verdict": summary["verdict"], "measures": TITLES,
        "compared": {"name": compared, "unit": " points" if unit == "%" else unit},
        "colours": colormaps["viridis"](range(256), bytes=True)[:, :3].tobytes().hex(),
        "images": [
            {"src": data_uri(image), "name": data.classes[int(label)]} for image, label in zip(few.images, few.labels)
        ],
        "cells": [_cell(folder, row, groups[results.key_of(row)], summary, few) for row in summary["groups"]],
        "fell": [_place(row) | {"epochs": row["epochs"], "val_top1": row["val_top1"]} for row in fell],
    }  # fmt: skip
    # Class names may hold anything: without "<" none can end its script element.
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("<!-- data -->", text)
    utils.write_text(Path(folder) / "sweep.html", page)
    return len(page.encode())


def _place(row) -> dict:
    """Where a position stands in the grids."""
    return {
        "label": results.label(row), "panel": results.panel_name(results.panel_of(row)),
        "column": flag_value(row["cls_pos"]), "line": "-" if row["reg_pos"] is None else str(row["reg_pos"]),
    }  # fmt: skip


def _cell(folder, row, group, summary, few) -> dict:
    """One position of the grid, with all its seeds; the maps are those of the first seed."""
    against, first = row["against_0_0"], group[min(group)]
    best = "best held-out" if summary["measure"] == "accuracy" else "best"
    curves = {}
    for seed, record in group.items():
        log = path_of(folder, record).with_name("log.txt")
        epochs = [line for line in read_json_lines(log) if "epoch" in line] if log.is_file() else []
        curves[seed] = [epoch["val_top1"] for epoch in epochs if "val_top1" in epoch]
    return _place(row) | {
        "best": best if results.position_of(row) == summary["best"] else "",
        "base": results.key_of(row) == results.baseline_of(results.key_of(row)),
        "seeds": sorted(group), "curves": curves,
        "values": {name: [_value(group[seed], name) for seed in sorted(group)] for name in TITLES},
        "against": against and {name: against[name] for name in ("mean", "low", "high", "lacks")},
        "seed": min(group), "maps": _maps(path_of(folder, first), few),
    }  # fmt: skip


def _value(record, name):
    return record["flops"] / 1e6 if name == "flops" else record.get(name)


def _maps(path, few) -> dict | None:
    """{"grid", "depth", "tokens": {key: [block][image] of None, if absent, or {"top", "data"}}}; None without any.

    A map's values are `top` times its bytes / 255: the attention on each patch, a mean over heads.
    """
    if not path.is_file():
        return None
    model, checkpoint = load_model(path)
    if not can_be_seen(model):
        return None
    images, _ = next(iter(MemoryLoader(few, checkpoint["data"], len(few))))
    found = token_maps(model, images)
    tokens = {
        key: [[_packed(maps[i, block]) for i in range(len(few))] for block in range(model.depth)]
        for key, maps in sorted(found.items())
    }
    return {"grid": list(model.grid_size), "depth": model.depth, "tokens": tokens}


def _packed(values: np.ndarray) -> dict | None:
    if np.isnan(values).any():
        return None
    top = float(values.max())
    levels = np.round(values / max(top, 1e-38) * 255).astype(np.uint8)
    return {"top": top, "data": base64.b64encode(levels.tobytes()).decode()}
