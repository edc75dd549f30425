"""What a checkpoint, the state of a run and a cell of a sweep may hold: files are checked before they are believed.

See `checkpoints.files.load_checkpoint`.
"""

import zipfile

import torch

from tokens.blocks import STEMS
from tokens.layout import MODES


class Suspicious(Exception):
    """What is wrong with a file, in words that follow its name."""


class Dropped:
    """In place of an object that stands beside weights: takes what a pickle gives, keeps nothing, does nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


def a_dictionary(*_):
    """In place of a defaultdict."""
    return {}


# Objects that people save beside weights, in files that are read all the same: none of these classes is called.
DROPPED = [
    *((Dropped, f"builtins.{name}") for name in ("list", "dict", "int", "float")),  # what a defaultdict begins with
    *((Dropped, f"{module}.{kind}Path") for module in ("pathlib", "pathlib._local")
      for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")),
    *((Dropped, f"numpy.{name}") for name in ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")),
    (Dropped, "argparse.Namespace"), (a_dictionary, "collections.defaultdict"),
]  # fmt: skip


def check_archive(path):
    """Refuse a zip archive that is damaged, or whose parts are larger than itself: compressed, or several in one place.

    torch.load compares no checksums, so that a byte which a disk lost would go unnoticed into the weights.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":  # the older format of torch, which checks its sizes while it reads
            return
    with zipfile.ZipFile(path) as archive:
        parts = sum(part.file_size for part in archive.infolist())
        if parts > path.stat().st_size:
            raise Suspicious(f"unpacks to {parts / 2**20:.0f} MiB, more than it has; torch.save does not compress")
        if archive.testzip() is not None:
            raise Suspicious("is damaged: a checksum is wrong; give another file")


def plain(checkpoint, size_of_file):
    """What a file held, as dictionaries, lists and tuples that are no more than that, and whole tensors.

    Objects of `DROPPED` become None.

    Without any code a file may still say that a tensor is one number 10^12 times, that a list contains itself, or that
    the method `get` of a dictionary is 3.
    """
    values, size, most = 0, 0, 10 * size_of_file  # some tensors may have several names

    def unpacked(value):
        nonlocal values, size
        values += 1
        if isinstance(value, torch.Tensor):
            value = torch.Tensor.detach(value)  # without attributes
            if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized or value.is_nested:
                raise Suspicious("holds tensors without plain values (meta, sparse or quantized); save others")
            size += value.nbytes
        if values > 2**20 or size > most:
            raise Suspicious("unpacks to far more than it has bytes; give a file that torch.save wrote")
        if isinstance(value, dict):
            return {key: unpacked(item) for key, item in dict.items(value)}
        if isinstance(value, list | tuple):
            return (list if isinstance(value, list) else tuple)(map(unpacked, value))
        return None if isinstance(value, Dropped) else value

    return unpacked(checkpoint)


# What files may hold: a predicate, a list of one (for each element), or a dictionary; names with "?" may be missing.


def whole(low=0, high=2**40):
    return lambda value: type(value) is int and low <= value <= high


def real(low=-(2.0**40), high=2.0**40):
    return lambda value: type(value) in (int, float) and low <= value <= high  # not NaN


def number(value):
    return type(value) in (int, float)


def text(value):
    return type(value) is str


def optional(kind):
    return lambda value: value is None or kind(value)


def one_of(*choices):
    return lambda value: type(value) is type(choices[0]) and value in choices


def several(kind, count=None):
    return lambda value: isinstance(value, list | tuple) and count in (None, len(value)) and all(map(kind, value))


def named(kind):
    """A dictionary with names of any kind of text."""
    return lambda value: isinstance(value, dict) and all(map(text, value)) and all(map(kind, value.values()))


def simple(value):
    return value is None or type(value) is bool or text(value) or real()(value) or several(whole())(value)


def blocks(value):
    """A block, or one for each register."""
    return whole()(value) or several(whole())(value)


POSITIVE, SHARE, BOOL = real(low=1e-30), real(0, 1), one_of(True, False)
MODEL_ARGS = {  # the first checkpoints had no dist_pos
    "img_size": several(whole(1), 2), "patch_size": several(whole(1), 2), "in_chans": one_of(3),
    "num_classes": whole(), "embed_dim": whole(1), "depth": whole(1), "num_heads": whole(1),
    "mlp_ratio": real(0, 1e3), "qkv_bias": BOOL, "num_register_tokens": whole(),
    "cls_pos": optional(whole()), "reg_pos": blocks, "dist_pos?": optional(whole()), "reg_end?": blocks,
    "drop_rate": SHARE, "attn_drop_rate": SHARE, "drop_path_rate": SHARE, "init_values": optional(real(-1e3, 1e3)),
    "global_pool?": one_of("token", "avg"), "fc_norm?": BOOL, "qk_norm?": BOOL, "rope?": BOOL, "swiglu?": BOOL,
    "norm_eps?": POSITIVE, "stem?": one_of(*STEMS), "cls_mode?": one_of(*MODES), "reg_mode?": one_of(*MODES),
    "class_attention?": whole(),
}  # fmt: skip
# Of one of timm's models: others of its arguments read files or the network.
TIMM_ARGS = {
    "timm_name": text, "num_classes": whole(), "img_size?": several(whole(1), 2), "drop_path_rate?": SHARE,
    "init_values?": optional(real(-1e3, 1e3)),
}  # fmt: skip
DATA = {
    "name": lambda value: text(value) and value.replace("_", "").isalnum(),  # it is put into names of files
    "classes": several(text), "images?": named(whole()), "input_size": several(whole(1, 2**14), 2),
    "mean": several(real(), 3), "std": several(POSITIVE, 3), "test_folder?": one_of("test", "val"),
    "test_size?": POSITIVE, "test_files?": text, "crop_pct?": real(1e-30, 1),
    "class_map?": lambda value: value is True or several(text)(value),  # True: in old ones
    "interpolation?": one_of("bicubic", "bilinear", "lanczos"),
}  # fmt: skip
CHECKPOINT = {
    "model": named(torch.is_tensor), "model_args": named(simple), "data?": DATA,
    "args?": {"epochs": whole(), "data_path?": optional(text)}, "epoch?": whole(),
    "metrics?": optional(named(lambda _: True)), "ema?": optional(named(torch.is_tensor)),
}  # fmt: skip
SUMS = dict.fromkeys(("loss", "images", "norm", "norms", "waited", "seconds"), number) | {"skipped": whole()}


def state_schema(validates: bool) -> dict:
    """Of a checkpoint to resume from, what `CHECKPOINT` does not have. `validates`: the run has held-out images."""
    names = ("epoch", "train_loss", *(("val_top1", "val_loss") if validates else ()))
    metrics = optional(conforms(dict.fromkeys(names, number)))
    return {
        "epoch": whole(), "step": whole(), "batch": whole(), "skipped": whole(), "metrics": metrics, "best": metrics,
        "processes": [{"sums": optional(conforms(SUMS))}],
    }  # fmt: skip


CELL_RESULT = dict.fromkeys(
    ("val_top1", "best_epoch", "test_top1", "test_top5", "test_loss", "test_images", "params", "flops", "repeats",
     "images_per_s", "train_seconds", "artefact_share"), number,
) | dict.fromkeys(
    ("artefacts_begin_at", "cls_to_patches", "cls_to_registers", "cls_to_itself"), optional(number)
) | dict.fromkeys(  # cells of an earlier revision have none of these
    ("sinks_on_cls?", "sinks_on_registers?", "sinks_on_patches?", "hit_ratio?", "corloc?", "knn_iou?"),
    optional(real(0, 100)),
) | dict.fromkeys(
    ("causal_depth?", "causal_depth_low?", "causal_depth_high?"), optional(whole(-1))
) | {
    "measure_seconds?": number, "causal_cost?": optional(several(optional(real(-100, 100)))),
    "causal_cost_interval?": optional(several(optional(several(real(-100, 100), 2)))),
} | {"cls_pos": optional(whole()), "reg_pos": optional(whole()), "num_reg": whole(), "seed": whole()} | {
    "reg_end?": optional(whole()), "cls_mode?": one_of(*MODES), "reg_mode?": one_of(*MODES),
    "class_attention?": whole(),
}  # fmt: skip


def first_wrong(value, schema, where="") -> str | None:
    """The dotted name of the first part of `value` that is missing or not as the schema has it."""
    if callable(schema):
        return None if schema(value) else where
    if isinstance(schema, list):
        parts = value if isinstance(value, list | tuple) else [None]
        return next((wrong for part in parts if (wrong := first_wrong(part, schema[0], where))), None)
    if not isinstance(value, dict):
        return where or "it"
    for key, kind in schema.items():
        name = key.removesuffix("?")
        here = f"{where}.{name}" if where else name
        if name not in value and key == name:
            return here
        if name in value and (wrong := first_wrong(value[name], kind, here)):
            return wrong
    return None


def conforms(schema):
    return lambda value: first_wrong(value, schema, "it") is None


def wrong_part(checkpoint: dict) -> str | None:
    """The first part of a checkpoint that describes its model which is not as `save_checkpoint` is given it."""
    if wrong := first_wrong(checkpoint, CHECKPOINT):
        return wrong
    model_args, data, ema = checkpoint["model_args"], checkpoint.get("data"), checkpoint.get("ema")
    if data is not None:
        if len(data["classes"]) != model_args.get("num_classes"):
            return "data.classes"
        if model_args.get("img_size", data["input_size"]) != data["input_size"]:
            return "data.input_size"
        for pair in (("test_size", "test_files"), ("crop_pct", "interpolation")):
            there = [name in data for name in pair]
            if any(there) and not all(there):
                return f"data.{pair[there.index(False)]}"
    if ema is not None:
        shapes = [{name: t.shape for name, t in weights.items()} for weights in (checkpoint["model"], ema)]
        if shapes[0] != shapes[1]:
            return "ema"
    return None
