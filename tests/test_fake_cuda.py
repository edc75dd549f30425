"""What only a GPU would show, without one: tensors that are left on the CPU, and waiting.

A whole training step runs on the meta device, where a value that is read and a CPU tensor raise; loaders, evaluation
and maps run on a GPU that is not there (`fake_cuda`).
"""

import inspect
from argparse import Namespace
from unittest import mock

import pytest
import torch
from timm.utils import ModelEmaV3
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import cifar_main
import datasets
import engine
from datasets import Split
from fake_cuda import CUDA, FakeCuda, Waits
from images import DATA
from inspection import sinks
from inspection.attention import attention_maps, attention_rollout, attention_rows
from inspection.statistics import Norms, TokenStatistics
from loading import augment, files, memory, workers
from loading.memory import MemoryLoader, TrainTransform
from runs import TINY, tiny
from training import flags
from training.setup import build_model, make_step


class Done(Exception):
    """The end of an epoch, where values are read."""


@pytest.fixture(autouse=True)
def no_constants():
    """Means and deviations are kept for each device; those on a device that is not there must not stay."""
    datasets.channels.cache_clear()
    yield
    datasets.channels.cache_clear()


def split_on(device, count=16):
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8).to(device, non_blocking=True)
    return Split(images, (torch.arange(count) % 10).to(device, non_blocking=True))


# The training step, on the meta device ---------------------------------------------------------------------------


@pytest.fixture
def train(monkeypatch):
    """A function: trains an epoch of four batches on the meta device as the flags say; `on_batch(step)` before it."""

    def end(progress):
        raise Done(progress.done)

    monkeypatch.setitem(memory.CHUNK, "meta", 4_000_000)
    monkeypatch.setattr(engine.Watch, "look", lambda watch, lag: None)  # which reads answers that have come
    monkeypatch.setattr(engine.Progress, "close", end)

    def run(words="", change=lambda step: None):
        argv = [*TINY, *"--data_set DIGITS --batch_size 4 --epochs 2 --repeats 1 --amp off".split(), *words.split()]
        args = flags.parse_with_recipe(cifar_main.get_parser(), argv)
        cifar_main.resolve(args)
        model = build_model(args, 10)
        ema = ModelEmaV3(model, decay=0.9, use_warmup=True)  # makes a generator, which the meta device has not
        model.to("meta"), ema.module.to("meta")
        transform = TrainTransform(DATA, args.aug, args.hflip, args.reprob)
        step = make_step(args, model, batches := MemoryLoader(split_on("meta"), DATA, 4, transform), 10)
        change(step)
        with pytest.raises(Done, match="4"):
            engine.train_one_epoch(step, batches, on_step=lambda taken, _: ema.update(model, taken))

    return run


RUNS = [
    "", "--aug rand --mixup 0 --cutmix 0", "--aug none --opt sgd --clip_grad 1 --accum_steps 2 --reprob 0",
    "--cls_pos 2 --reg_pos 1 --drop_path 0.2", "--cls_pos none --num_reg 0", "--cls_mode reader --reg_pos 2",
    "--class_attention 1", "--init_values 0.1 --opt lamb",
]  # fmt: skip


@pytest.mark.parametrize("words", RUNS)
def test_a_training_step_reads_no_value_and_no_cpu_tensor(train, words):
    train(words)


def test_a_value_that_is_read_in_training_raises(train):
    def reads(step):
        criterion = step.criterion
        step.criterion = lambda logits, labels: criterion(logits, labels) * logits.mean().item()

    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        train(change=reads)


def test_a_cpu_tensor_in_training_raises(train):
    def mixes(step):
        step.model.blocks[1].register_forward_pre_hook(lambda _, args: (args[0] + torch.ones(24),))

    with pytest.raises(RuntimeError, match="device"):
        train(change=mixes)


def test_an_answer_is_awaited_on_the_card_of_the_loss(monkeypatch):
    """Which need not be the current one."""
    asked, card = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: asked.append(device) or mock.Mock())
    monkeypatch.setattr(engine.Watch, "look", lambda watch, lag: None)
    with FakeCuda(strict=False):
        loss = torch.zeros((), device=card)
        optimizer = torch.optim.SGD([torch.zeros(1, device=card)])
        watch = engine.Watch("", optimizer, skip_bad=0)
        assert watch.allows(0, [(0, 4, loss)], loss, overflow_is_usual=False)
    assert asked == [card] and watch.waiting[0][0].device.type == "cpu"


def test_mps_is_waited_for(monkeypatch):
    """It reads what it copies when its time comes, and that may be free by then."""
    copies = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, **how: copies.append((device.type, how)) or x)
    for kind in ("cuda", "mps"):
        augment.draw(torch.Generator(), mock.MagicMock(device=torch.device(kind), __len__=lambda _: 3))
    assert copies == [("cuda", {"non_blocking": True}), ("mps", {"non_blocking": False})]
    sources = [inspect.getsource(module) for module in (augment, memory, files, workers)]
    assert [text.count("non_blocking") for text in sources] == [1, 0, 0, 0]


def test_files_on_mps(monkeypatch):
    """Batches are moved before they are prefetched; the noise of erasing is drawn where it is seeded, on the CPU."""
    prefetched = Namespace(random_erasing=Namespace())
    monkeypatch.setattr(
        files, "PrefetchLoader", lambda loader, *_, **__: setattr(prefetched, "loader", loader) or prefetched
    )
    for kind, to, draws in (("cuda", None, "cuda"), ("mps", "mps", "cpu"), ("cpu", None, "cpu")):
        prefetched.random_erasing = erasing = Namespace()
        data = Split(torch.zeros(4), torch.zeros(4))
        files.FileLoader(data, DATA, 2, torch.device(kind), transform=lambda image: image, reprob=0.5)
        assert prefetched.loader.to == (to and torch.device(to)) and erasing.device == torch.device(draws)
    loader = workers.WorkerLoader([(torch.zeros(3), 1), (torch.ones(3), 2)], 2)
    assert {x.device.type for batch in loader for x in batch} == {"cpu"}
    loader.to = torch.device("meta")
    assert {x.device.type for batch in loader for x in batch} == {"meta"}


# Forward passes, on a GPU that is not there ----------------------------------------------------------------------


def batches_of(gpu, transform):
    """The devices of all batches but those of the first epoch, which makes constants and may wait."""
    gpu.strict = False
    loader = MemoryLoader(split_on(CUDA, 256), DATA, 64, transform)
    list(loader)
    gpu.strict = True
    return {x.device for batch in loader for x in batch}


@pytest.mark.parametrize("aug", ["trivial", "rand", "none", None])
def test_the_loader_does_not_wait(aug):
    with FakeCuda() as gpu:
        assert batches_of(gpu, TrainTransform(DATA, aug) if aug else None) == {CUDA}


FAULTS = {
    "reads": (lambda x: x + x.float().mean().item(), DataDependentOutputException),
    "shape": (lambda x: x[x.float().sum((1, 2, 3)) > 0], DynamicOutputShapeException),
    "mixes": (lambda x: x + torch.ones(3, 32, 32), RuntimeError),
    "waits": (lambda x: x + torch.ones(3, 32, 32).to(x.device), Waits),
    "fetches": (lambda x: x.cpu(), Waits),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_the_loader_raise(fault):
    bad, error = FAULTS[fault]
    with FakeCuda() as gpu:
        gpu.strict = True
        loader = MemoryLoader(split_on(CUDA), DATA, 4, lambda images, draws: bad(images))
        with pytest.raises(error):
            list(loader)


MODELS = {
    "late": dict(cls_pos=2, reg_pos=1, num_register_tokens=2),
    "pooled": dict(cls_pos=None, num_register_tokens=0),
    "readers": dict(cls_mode="reader", reg_pos=1, num_register_tokens=2),
    "class attention": dict(class_attention=1, num_register_tokens=1),
    "leaving": dict(reg_pos=1, reg_end=3, num_register_tokens=2),
}


def on_gpu(**kwargs):
    gpu = FakeCuda(strict=False)
    with gpu:
        model = tiny(**kwargs).to(CUDA)
    return gpu, model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_and_maps_stay_on_the_gpu(name):
    gpu, model = on_gpu(**MODELS[name])
    with gpu:
        images = torch.zeros(2, 3, 16, 24, device=CUDA)
        gpu.strict = True
        assert model(images).device == CUDA
        assert model.forward_features(images).device == CUDA
        every = range(model.depth)
        assert {x.device for x in attention_rows(model, images, every).values()} == {CUDA}
        maps = [attention_maps(model, images, every, [(1, 2)]), attention_rollout(model, images, every)]
        parts = [part for found in maps for at in found.values() for part in vars(at).values()]
        assert {part.device for part in parts if isinstance(part, torch.Tensor)} == {CUDA}


def test_statistics_leave_the_gpu_as_sums_only(monkeypatch):
    """No CPU tensor meets the maps; histograms, made on the CPU of values that are not there, are left out."""
    gpu, model = on_gpu(reg_pos=1, num_register_tokens=2)
    monkeypatch.setattr(Norms, "add", lambda norms, values: None)
    with gpu:
        images = torch.zeros(2, 3, 16, 24, device=CUDA)
        statistics = TokenStatistics(model)
        assert statistics.add(images).device == CUDA
        assert statistics.moments["distance", 0].sum.device.type == "cpu"
        sinks.measure(model, lambda: [(images, None)])


def test_evaluation_reads_at_its_end_only(monkeypatch):
    gpu, model = on_gpu()
    data = DATA | {"input_size": (16, 24)}
    with gpu:
        split = Split(torch.zeros(8, 3, 16, 24, dtype=torch.uint8, device=CUDA), torch.zeros(8).long().to(CUDA))
        batches = list(MemoryLoader(split, data, 4))
        gpu.strict, ended = True, []
        monkeypatch.setattr(engine, "sum_over_ranks", lambda sums: ended.append(sums.device) or torch.ones(sums.shape))
        assert engine.evaluate(model, batches)["images"] == 1
    assert ended == [CUDA, CUDA]
