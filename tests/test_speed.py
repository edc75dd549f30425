"""What makes it fast, counted instead of timed; bench.py itself, on few rounds."""

import json
import multiprocessing
from argparse import Namespace
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from datasets import Split
from loading.memory import MemoryLoader, TrainTransform
from models_dynamic import set_fused_attention
from runs import noise, run, tiny

DATA = {"input_size": (32, 32), "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


@pytest.mark.parametrize("cls_pos", [None, 0, 2, 3])
@pytest.mark.parametrize("reg_pos", [0, 3])
@pytest.mark.parametrize("dist_pos", [None, 1])
def test_flops_are_those_of_the_formula(cls_pos, reg_pos, dist_pos):
    """What torch counts in a forward pass of three images; the shortcut of the last block is in both."""
    model = tiny(cls_pos=cls_pos, reg_pos=reg_pos, dist_pos=dist_pos, num_register_tokens=2, mlp_ratio=2.0)
    set_fused_attention(model, False)  # torch does not count its fused attention on every device
    with FlopCounterMode(display=False) as counter:
        model(noise(model, 3))
    assert counter.get_total_flops() == 3 * model.forward_flops()


def test_flops_by_hand():
    """One block of the smallest model, as docs/PERFORMANCE.md adds it up."""
    model = tiny(depth=2, cls_pos=1, num_register_tokens=0)  # 24 patches of 4 x 4, width 24, MLP 96, 5 classes
    first = 2 * 24 * 24 * (4 * 24 + 2 * 96) + 4 * 24 * 24 * 24
    last = 2 * 25 * 24 * 3 * 24 + 2 * 24 * (24 + 2 * 96) + 4 * 25 * 24  # keys, queries and values of all tokens
    assert model.forward_flops() == 2 * 24 * 48 * 24 + first + last + 2 * 24 * 5


def test_late_tokens_are_cheaper():
    flops = [tiny(cls_pos=pos, reg_pos=pos).forward_flops() for pos in range(4)]
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == 4


def test_maps_store_no_attention_matrix():
    """No softmax over rows of all tokens, and no tensor of N x N elements, at any block."""
    model = tiny(cls_pos=1, reg_pos=2, dist_pos=0, num_register_tokens=2)
    images = noise(model)
    softmax, rows = torch.Tensor.softmax, []

    def spy(tensor, *args, **kwargs):
        rows.append(tensor.shape[-2:])
        return softmax(tensor, *args, **kwargs)

    with mock.patch.object(torch.Tensor, "softmax", spy):
        model.attention_maps(images, range(4))
    assert [tuple(shape) for shape in rows] == [(1, 25), (2, 26), (4, 28), (4, 28)]


def test_the_loader_calls_python_for_pieces_not_for_images():
    """Twenty times the images in one piece: as many calls."""
    calls = []
    for count in (10, 200):
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        split = Split(images, torch.zeros(count, dtype=torch.long))
        loader = MemoryLoader(split, DATA, count, TrainTransform(DATA, "rand", 0.5, 0.25))
        with torch.profiler.profile() as profile:
            for _ in loader:
                pass
        calls.append(sum(event.count for event in profile.key_averages()))
    assert calls[1] < 2 * calls[0], calls


def test_bench(tmp_path, capsys, monkeypatch):
    """A row of each kind on tiny shapes: ours, the peer's, the ratio, and whether the target is met."""
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 7, "num_heads": 2, "num_classes": 10}
    monkeypatch.setattr(bench, "SIZES", {bench.SMALL: sizes, bench.CIFAR: sizes})
    processes = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: processes)  # which know the sizes above
    monkeypatch.setattr(bench, "FOREIGN", ["test_vit"])
    argv = ["--rows", "train,maps,memory,load,foreign,graphs", "--rounds", "1", "--batch", "2", "--device", "cpu"]
    argv += ["--json", tmp_path / "b.json"]
    status, out, err = run(bench.main, argv, capsys)
    assert status == 0, err
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert rows[0]["name"] == "training 224/16 width 384, fp32, against timm"
    for row in rows:
        assert row["name"] in out
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"], rel=1e-6)
    memory = next(row for row in rows if row["unit"] == "MiB")
    assert min(memory["ours"], memory["peer"]) > 0
    names = [f"attention of CLS, test_vit, {side} px, against hooks" for side in (224, 518)]
    assert [row["name"] for row in rows[-4:]] == [what + name for name in names for what in ("", "memory of ")]
    assert f"targets met, {len(rows)} rows" in out.splitlines()[-1]
    assert bench.met({"target": ">= 2", "ratio": 1.9}) == "MISSED"
    assert bench.met({"target": "<= 2", "ratio": 1.9}) == "met"
    assert "there is no nonsense" in run(bench.main, ["--rows", "nonsense"], capsys)[2]


@pytest.mark.parametrize(("gib", "batch"), [(79, 256), (23.6, 256), (15.7, 128), (7.6, 64)])
def test_batches_fit_a_smaller_card(monkeypatch, gib, batch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Namespace(total_memory=gib * 2**30))
    assert bench.sizes_here(Namespace(batch=None), torch.device("cuda", 0))[bench.SMALL] == batch
    assert bench.sizes_here(Namespace(batch=3), torch.device("cuda", 0))[bench.SMALL] == 3


def test_every_model_is_compiled_for_its_own_size(monkeypatch):
    """Not for images of any size after the first one's, nor left as it is after a few models."""
    graphs, whole = [], torch.compile

    def backend(graph, inputs):
        graphs.append(all(isinstance(value, torch.Tensor) for value in inputs))  # else a size is one of them
        return graph

    monkeypatch.setattr(torch, "compile", lambda model, mode: whole(model, backend=backend))
    with torch._dynamo.config.patch(recompile_limit=1):
        for side in (16, 24, 32):
            model = tiny(img_size=(side, side), depth=2)
            bench.inference(model, noise(model), torch.device("cpu"), mode="default")()
    assert graphs == [True] * 3


def test_verdict():
    rows = [
        {"name": "a", "ratio": 1.2, "target": ">= 1"}, {"name": "b", "ratio": 1.2, "target": "<= 1"},
        {"name": "c", "ratio": 3.0, "target": ""},
    ]  # fmt: skip
    assert bench.verdict(rows[::2], [], 5) == "verdict: 1 of 1 target met, 2 rows"
    line = bench.verdict(rows, ["train", "load"], 0.5)
    assert line.endswith("3 rows; missed: b (1.200, not <= 1); left out after 0.5 minutes: train, load")


def test_no_row_begins_after_the_time_is_over(capsys, monkeypatch):
    """But the first one; and a race ends after three rounds when its seconds are over."""
    calls = []
    races = [bench.Race(name, lambda: calls.append(1), lambda: None) for name in "ab"]
    monkeypatch.setattr(bench, "ROWS", {"x": lambda *_: races, "y": lambda *_: races})
    monkeypatch.setattr(bench, "RACE", 0.0)
    status, out, err = run(bench.main, ["--rows", "x,y", "--minutes", "1e-9", "--device", "cpu"], capsys)
    assert out.splitlines()[-1] == "verdict: 0 of 0 targets met, 1 row; left out after 1e-09 minutes: x, y", err
    assert len(calls) == 2 + 3


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224"])
def test_hooks_see_what_the_recorder_sees(name):
    found = []
    for make in (bench.recorded, bench.hooked):
        torch.manual_seed(0)
        found.append(make(name, 60, torch.device("cpu"))())  # 48 or 56 pixels
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    assert all(torch.allclose(found[0][i], found[1][i], atol=1e-6) for i in found[0])


def test_the_peers_are_the_same_model():
    """As many parameters, the same logits from the same weights: what is raced is the arithmetic alone."""
    size, device = "dynamic_vit_cifar", torch.device("cpu")
    mine, its = bench.ours(size, device), bench.timms(size, device)
    state = mine.state_dict()
    state["reg_token"] = state.pop("register_tokens")
    its.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(its.eval()(images), mine.eval()(images), atol=1e-5)
