"""The engine: steps, rates, evaluation, batches that are not finite."""

import math
import time

import pytest
import torch
from timm.scheduler import create_scheduler_v2

import cifar_main
import cifar_train
import engine
from checkpoints.files import load_checkpoint
from engine import NotFinite, Position, TrainingStep, evaluate, train_one_epoch
from forked import TWO_EPOCHS, differences
from runs import noise, run, tiny
from training.run_log import read_json_lines
from utils import RunFailed


def test_the_rate_of_every_step(monkeypatch):
    """Set before the step, a function of the step alone: linear warm-up, then a cosine to the end."""
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=4, warmup_epochs=1, warmup_lr=1e-6, min_lr=1e-6, step_on_epochs=False,
        updates_per_epoch=5,
    )  # fmt: skip
    used = []
    step_of = type(optimizer).step
    monkeypatch.setattr(optimizer, "step", lambda: used.append(optimizer.param_groups[0]["lr"]) or step_of(optimizer))
    batches, step = [(noise(model), torch.tensor([0, 1]))] * 5, 0
    parts = TrainingStep(model, torch.nn.CrossEntropyLoss(), optimizer, scheduler)
    for _ in range(4):
        step = train_one_epoch(parts, batches, start=Position(step))["step"]
    assert step == 20
    expected = [1e-6 + (0.1 - 1e-6) * t / 5 for t in range(5)]
    expected += [1e-6 + (0.1 - 1e-6) * (1 + math.cos(math.pi * t / 20)) / 2 for t in range(5, 20)]
    assert used == pytest.approx(expected)


@pytest.mark.parametrize("count", [4, 5])
def test_accumulated_batches_are_one_large_batch(count):
    """Also in the last group, which may be smaller."""
    images, labels = noise(tiny(), 2 * count), torch.arange(2 * count) % 5
    small = [(images[i : i + 2], labels[i : i + 2]) for i in range(0, 2 * count, 2)]
    large = [(images[i : i + 4], labels[i : i + 4]) for i in range(0, 2 * count, 4)]
    models = tiny(), tiny()
    for model, batches, accum_steps in zip(models, (small, large), (2, 1)):
        criterion = torch.nn.CrossEntropyLoss()
        report = train_one_epoch(
            TrainingStep(model, criterion, *plain(model, lr=1e-3), accum_steps=accum_steps), batches
        )
        assert report["step"] == -(-count // 2)
        assert report["images"] == 2 * count
    for a, b in zip(*(model.parameters() for model in models)):
        assert torch.allclose(a, b, atol=1e-6)


def test_an_epoch_shorter_than_a_tick_of_windows_clock(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)
    model = tiny()
    parts = TrainingStep(model, torch.nn.CrossEntropyLoss(), *plain(model))
    assert train_one_epoch(parts, [(noise(model), torch.tensor([0, 1]))])["seconds"] > 0


def test_evaluation_is_in_full_precision():
    """Though training may round products to TF32, and says so to torch."""
    seen, model = [], tiny()
    model.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        evaluate(model, [(noise(model), torch.tensor([0, 1]))])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


def test_waiting_for_data_and_gradient_norms_are_measured():
    def slow():
        for _ in range(3):
            time.sleep(0.2)
            yield noise(model), torch.tensor([0, 1])

    model = tiny()
    batches = type("Slow", (), {"__iter__": lambda self: slow(), "__len__": lambda self: 3})()
    report = train_one_epoch(
        TrainingStep(model, torch.nn.CrossEntropyLoss(), *plain(model, lr=0.0), clip_grad=1e-3), batches
    )
    assert 0.6 / report["seconds"] * 0.9 < report["data_wait"] < 1
    by_hand = tiny().train()
    torch.nn.functional.cross_entropy(by_hand(noise(by_hand)), torch.tensor([0, 1])).backward()
    norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm()  # before clipping
    assert report["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_the_gradient_is_clipped():
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    batches = [(100 * noise(model), torch.tensor([0, 1]))]
    train_one_epoch(TrainingStep(model, torch.nn.CrossEntropyLoss(), *plain(model, lr=1.0), clip_grad=0.01), batches)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters())]).norm().detach()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_evaluation_by_hand():
    model = tiny(num_classes=3)
    images, labels = noise(model, 7), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    logits = model(images).detach()
    expected = -logits.log_softmax(1)[torch.arange(7), labels].mean()
    model.train()
    found = evaluate(model, [(images[:4], labels[:4]), (images[4:], labels[4:])], keep_predictions=True)
    assert model.training
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["top1"] == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    assert found["top5"] == 100  # of 3 classes
    assert found["images"] == 7
    assert torch.equal(found["predictions"], logits.argmax(1))


def test_a_loss_that_is_not_finite_is_an_error():
    model = tiny()
    batches = [(noise(model), torch.tensor([0, 1])), (noise(model) * float("nan"), torch.tensor([0, 1]))]
    with pytest.raises(RunFailed, match="the loss is nan"):
        train_one_epoch(TrainingStep(model, torch.nn.CrossEntropyLoss(), *plain(model)), batches)


# Batches that are not finite ---------------------------------------------------------------------------------------


def batches_with(model, *bad, count=5):
    """Batches of noise; those with the numbers `bad` are not finite."""
    images, labels = noise(model), torch.tensor([0, 1])
    return [(images * float("nan") if i in bad else images + i, labels) for i in range(count)]


def test_the_batch_that_was_not_finite_is_reported_and_its_step_not_taken():
    model, good = tiny(), tiny()
    criterion = torch.nn.CrossEntropyLoss()
    with pytest.raises(
        NotFinite, match=r"the loss is nan in batch 2 \(step 2\), norm of the gradient nan, .* 0\.1"
    ) as error:
        train_one_epoch(TrainingStep(model, criterion, *plain(model)), batches_with(model, 2))
    assert error.value.batch["batch"] == 2 and error.value.batch["images"].isnan().all()
    train_one_epoch(TrainingStep(good, criterion, *plain(good)), batches_with(good)[:2])
    assert differences(model.state_dict(), good.state_dict()) == []


def test_a_gradient_that_is_not_finite_though_the_loss_is():
    model = tiny()
    model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFinite, match=r"the loss is \d.* in batch 0 .*, norm of the gradient (inf|nan)"):
        train_one_epoch(TrainingStep(model, torch.nn.CrossEntropyLoss(), *plain(model)), batches_with(model))


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_bad_steps_are_left_out(accum_steps):
    """As if their batches had not been there."""
    model, good = tiny(), tiny()
    criterion, seen = torch.nn.CrossEntropyLoss(), []
    report = train_one_epoch(
        TrainingStep(model, criterion, *plain(model), accum_steps), batches_with(model, 1, count=6), skip_bad=2,
        on_step=lambda step, _: seen.append(step),
    )  # fmt: skip
    assert report["skipped"] == 1 and report["step"] == 6 // accum_steps
    assert seen == ([1, 3, 4, 5, 6] if accum_steps == 1 else [2, 3])
    rest = batches_with(good, count=6)
    del rest[1 if accum_steps == 1 else slice(0, 2)]
    fewer = train_one_epoch(TrainingStep(good, criterion, *plain(good), accum_steps), rest)
    assert differences(model.state_dict(), good.state_dict()) == [] and report["loss"] == fewer["loss"]
    with pytest.raises(NotFinite):
        train_one_epoch(TrainingStep(tiny(), criterion, *plain(model)), batches_with(model, 1, 2, 3), skip_bad=2)


class Late:
    """An answer of a GPU, as an event of CUDA: not there for `asked` questions, unless one waits."""

    def __init__(self, asked):
        self.asked, self.waited = asked, False

    def query(self):
        self.asked -= 1
        return self.asked < 0

    def synchronize(self):
        self.waited = True


def test_a_gpu_is_not_waited_for_until_it_is_far_behind():
    watch = engine.Watch("", plain(tiny())[0], skip_bad=0)
    about = (3, [(3, 1, torch.tensor(float("nan")))], torch.tensor(1.0), 0.1)
    answers = [Late(100) for _ in range(engine.LAG)]
    for answer in answers:
        watch.waiting.append((torch.tensor(False), answer, about))
        watch.look(engine.LAG)
    assert len(watch.waiting) == engine.LAG and not any(answer.waited for answer in answers)
    watch.waiting.append((torch.tensor(True), Late(0), about))
    watch.look(engine.LAG)
    assert answers[0].waited and not answers[1].waited
    with pytest.raises(NotFinite, match="batch 3"):
        watch.look(0)


def never_answers(monkeypatch):
    """A CPU that is as a GPU far behind: whether steps were finite is known when the epoch ends."""
    look = engine.Watch.look
    monkeypatch.setattr(engine.Watch, "look", lambda watch, lag: look(watch, lag) if lag == 0 else None)
    monkeypatch.setattr(engine.Watch, "sees", lambda watch, *batch: setattr(watch, "batch", batch))


@pytest.mark.parametrize("accum_steps", [1, 8])
def test_the_watch_keeps_one_batch(monkeypatch, accum_steps):
    """Of the steps that a GPU has not answered for there are numbers; 32 batches could fill its memory."""
    import weakref

    never_answers(monkeypatch)
    model, made, kept = tiny(), [], []

    class Batches:
        def __len__(self):
            return 16

        def __iter__(self):
            for _ in range(16):
                images = noise(model)
                made.append(weakref.ref(images))
                yield images, torch.tensor([0, 1])
                del images
                kept.append(sum(image() is not None for image in made))

    train_one_epoch(TrainingStep(model, torch.nn.CrossEntropyLoss(), *plain(model), accum_steps), Batches())
    assert max(kept) == 1


def test_an_older_batch_that_was_not_finite_is_reported_in_numbers(tmp_path, monkeypatch, capsys):
    never_answers(monkeypatch)
    with pytest.raises(NotFinite, match=r"the loss is nan in batch 2 \(step 2\)") as error:
        train_one_epoch(TrainingStep(tiny(), torch.nn.CrossEntropyLoss(), *plain(tiny())), batches_with(tiny(), 2))
    assert "images" not in error.value.batch and error.value.batch["batch"] == 2
    with pytest.raises(NotFinite) as error:  # the newest one
        train_one_epoch(TrainingStep(tiny(), torch.nn.CrossEntropyLoss(), *plain(tiny())), batches_with(tiny(), 4))
    assert error.value.batch["images"].isnan().all()
    planted(monkeypatch, 3)
    argv = [*TWO_EPOCHS, "--mixup", "0", "--cutmix", "0", "--model_path", tmp_path / "m.pth", "--save_steps", "100"]
    status, _, err = run(cifar_main.main, argv, capsys)
    path = tmp_path / "bad_batch_step3_process0.pth"
    assert status == 1 and f"{path} has its numbers (a GPU keeps only the newest batch), " in err, err
    assert load_checkpoint(path)["lr"] > 0


def test_a_bad_batch_in_the_middle_of_a_group_is_kept_on_a_cpu():
    for bad in (4, 5, 6):
        with pytest.raises(NotFinite, match=rf"in batch {bad} \(step 1\)") as error:
            train_one_epoch(
                TrainingStep(tiny(), torch.nn.CrossEntropyLoss(), *plain(tiny()), accum_steps=4),
                batches_with(tiny(), 1, bad, count=8), skip_bad=1,
            )  # fmt: skip
        assert error.value.batch["images"].isnan().all() and error.value.batch["batch"] == bad


def planted(monkeypatch, *bad):
    """Batches of every run with these numbers of an epoch are not finite."""
    work = cifar_train.MemoryLoader.__iter__

    def batches(loader):
        for i, (images, labels) in enumerate(work(loader), loader.first):
            yield (images * float("nan") if loader.transform and i in bad else images), labels

    monkeypatch.setattr(cifar_train.MemoryLoader, "__iter__", batches)


def test_a_run_with_a_bad_batch(tmp_path, monkeypatch, capsys):
    planted(monkeypatch, 3)
    argv = [*TWO_EPOCHS, "--mixup", "0", "--cutmix", "0", "--model_path", tmp_path / "m.pth"]
    status, _, err = run(cifar_main.main, argv, capsys)
    assert status == 1 and len(err.splitlines()) == 1
    assert "epoch 1/2: the loss is nan in batch 3 (step 3)" in err and "learning rate" in err and "--lr" in err
    assert f"{tmp_path / 'checkpoint.pth'} holds the weights of epoch 0, and 2 batches" in err
    batch = load_checkpoint(tmp_path / "bad_batch_step3_process0.pth")
    assert batch["images"].isnan().all() and batch["images"].shape == (64, 3, 32, 32) and batch["batch"] == 3
    assert all(t.isfinite().all() for t in load_checkpoint(tmp_path / "checkpoint.pth")["model"].values())
    status, out, err = run(cifar_main.main, [*argv, "--overwrite", "--skip_bad_steps", "2"], capsys)
    assert status == 0 and out.count("; skipped") == 2, err
    log = read_json_lines(tmp_path / "log.txt")
    assert [record.get("skipped") for record in log[1:]] == [1, 1]
    status, _, err = run(cifar_main.main, [*argv, "--overwrite", "--skip_bad_steps", "1"], capsys)
    assert status == 1 and "epoch 2/2: the loss is nan" in err


class Still:
    """A scheduler that leaves the rate alone."""

    def step_update(self, step):
        pass


def plain(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr), Still()
