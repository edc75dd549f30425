"""checkpoints/schema.py: which part of a checkpoint, of a run's state and of a cell's record is named as wrong."""

import copy
import json

import pytest
import torch

from checkpoints.files import load_checkpoint
from checkpoints.schema import CELL_RESULT, MODEL_ARGS, first_wrong, state_schema, wrong_part
from models_dynamic import DEFAULTS

NAN = float("nan")
WRONG = {  # of a checkpoint's parts, by their dotted names
    "model": [3, {"head.weight": 3}, {3: torch.ones(1)}],
    "model_args": [3, {"depth": torch.ones(2)}],
    "data": [3, None],
    "data.name": [3, "../up", ""],
    "data.classes": ["abc", [1, 2], ["a"]],
    "data.images": [3, {"train": -1}, {"train": 2**50}],
    "data.input_size": [32, [32], [32, 2**20], [0, 32], [16, 16]],
    "data.mean": [0.5, [0.5], [0.5, 0.5, "0.5"], [NAN] * 3],
    "data.std": [[0.5], [0.0] * 3, [-1.0] * 3, [NAN] * 3, [float("inf")] * 3],
    "data.test_folder": ["elsewhere", 3],
    "args": [3],
    "args.epochs": [-1, 1.5, "3", True],
    "args.data_path": [3],
    "epoch": [-1, 2**41, "1", True],
    "metrics": [3],
    "ema": [3, {"head.weight": torch.ones(1)}],
}


@pytest.fixture(scope="module")
def whole(trained):
    return load_checkpoint(trained / "checkpoint.pth")


def changed(value, name, new):
    """A copy in which the part with that dotted name is another."""
    value = copy.deepcopy(value)
    *parents, last = name.split(".")
    part = value
    for parent in parents:
        part = part[parent]
    part[last] = new
    return value


def test_what_training_writes_is_whole(whole):
    assert wrong_part(whole) is None
    assert first_wrong(whole["model_args"], MODEL_ARGS) is None
    assert first_wrong(whole, state_schema(validates=True)) is None


def test_every_argument_of_the_model_is_described():
    known = {key.removesuffix("?") for key in MODEL_ARGS}
    assert known == DEFAULTS.keys() - {"norm_layer"}, (
        "add a new argument of DynamicViT to checkpoints/schema.MODEL_ARGS"
    )


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_the_wrong_part_is_named(whole, name, value):
    assert wrong_part(changed(whole, name, value)) == name


@pytest.mark.parametrize(
    ("there", "lacks"),
    [({"test_size": 0.1}, "test_files"), ({"test_files": "a"}, "test_size"), ({"crop_pct": 1.0}, "interpolation")],
)
def test_of_a_pair_both_are_there(whole, there, lacks):
    assert wrong_part(whole | {"data": whole["data"] | there}) == f"data.{lacks}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", -1), ("skipped", None), ("metrics", {"epoch": 1}), ("best", {"epoch": "1", "train_loss": 0.0}),
     ("processes", 3), ("processes", [{}]), ("processes", [{"sums": {"loss": 1.0}}])],
)  # fmt: skip
def test_the_state_of_a_run(whole, name, value):
    assert (first_wrong(whole | {name: value}, state_schema(validates=True)) or "").partition(".")[0] == name


def test_the_record_of_a_cell():
    names = [key.removesuffix("?") for key in CELL_RESULT]
    record = dict.fromkeys(names, 1) | {name: [1.0] for name in names if name == "causal_cost"}
    record |= {"causal_cost_interval": [[0.5, 1.5]], "cls_mode": "token", "reg_mode": "reader"}
    assert first_wrong(json.loads(json.dumps(record)), CELL_RESULT) is None
    for key, name in zip(CELL_RESULT, names):
        lacks = first_wrong({other: value for other, value in record.items() if other != name}, CELL_RESULT)
        assert first_wrong(record | {name: "1"}, CELL_RESULT) == name
        assert lacks == (None if key.endswith("?") else name)  # those with "?" are of later revisions
    assert first_wrong(record | {"cls_pos": None, "cls_to_registers": None}, CELL_RESULT) is None
    assert first_wrong([], CELL_RESULT) == "it"
