"""Training and testing: the engine, and the scripts as their command lines run them."""

import json
import math
import time

import pytest
import torch
from timm.scheduler import create_scheduler_v2

import cifar_main
import cifar_test
import cifar_train
import engine
import utils
from conftest import TINY, killed_in_epoch_3, noise, run, shell, tiny
from engine import evaluate, train_one_epoch
from models_dynamic import DynamicViT, model_from_checkpoint
from utils import RunFailed

DIGITS = [*TINY, *"--data_set DIGITS --cls_pos 2 --reg_pos 1 --repeats 1 --epochs 2".split()]
PRINTED = r"Test accuracy: \d+\.\d\d% \(top-5 \d+\.\d\d%\) on 360 images of DIGITS"


class Still:
    """A scheduler that leaves the rate alone."""

    def step_update(self, step):
        pass


def plain(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr), Still()


# Engine ----------------------------------------------------------------------------------------------------------


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
    for _ in range(4):
        step = train_one_epoch(model, batches, torch.nn.CrossEntropyLoss(), optimizer, scheduler, step=step)["step"]
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
        report = train_one_epoch(model, batches, criterion, *plain(model, lr=1e-3), accum_steps=accum_steps)
        assert report["step"] == -(-count // 2)
        assert report["images"] == 2 * count
    for a, b in zip(*(model.parameters() for model in models)):
        assert torch.allclose(a, b, atol=1e-6)


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
    report = train_one_epoch(model, batches, torch.nn.CrossEntropyLoss(), *plain(model, lr=0.0), clip_grad=1e-3)
    assert 0.6 / report["seconds"] * 0.9 < report["data_wait"] < 1
    by_hand = tiny().train()
    torch.nn.functional.cross_entropy(by_hand(noise(by_hand)), torch.tensor([0, 1])).backward()
    norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm()  # before clipping
    assert report["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_the_gradient_is_clipped():
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    batches = [(100 * noise(model), torch.tensor([0, 1]))]
    train_one_epoch(model, batches, torch.nn.CrossEntropyLoss(), *plain(model, lr=1.0), clip_grad=0.01)
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
        train_one_epoch(model, batches, torch.nn.CrossEntropyLoss(), *plain(model))


# Scripts ---------------------------------------------------------------------------------------------------------


def test_what_training_writes(trained):
    log = utils.read_json_lines(trained / "log.txt")
    assert log[0]["args"]["cls_pos"] == 2
    assert log[0]["args"]["aug"] == "none"  # the default of DIGITS
    assert {"torch", "timm", "git", "hardware", "threads"} <= log[0].keys()
    assert [record["epoch"] for record in log[1:]] == [1, 2]
    assert {"train_loss", "val_loss", "val_top1", "lr", "seconds", "images_per_s"} <= log[1].keys()
    for name in ("training_curves.png", "training_curves.pdf", "checkpoint.pth"):
        assert (trained / name).stat().st_size > 1000
    best = utils.load_checkpoint(trained / "model.pth")
    assert set(best) == {"model", "model_args", "data", "args", "epoch", "metrics"}
    assert best["model_args"]["num_heads"] == 3
    assert best["data"]["classes"] == list("0123456789")
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in best["model"])
    assert not [file for file in trained.iterdir() if file.suffix == ".tmp"]


def test_the_same_command_again_tests_and_changes_nothing(trained, capsys):
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in trained.iterdir()}
    status, out, err = run(cifar_main.main, [*DIGITS, "--model_path", trained / "model.pth"], capsys)
    assert status == 0, err
    assert "--overwrite trains anew, --resume goes on" in out
    lines = out.splitlines()
    assert "CLS enters at block 2, 2 registers at block 1" in lines[0]
    for main, argv in ((cifar_main.main, ["--eval", "--device", "cpu"]), (cifar_test.main, ["--device", "cpu"])):
        status, out, _ = run(main, [*argv, "--model_path", trained / "model.pth"], capsys)
        assert status == 0
        assert out.splitlines()[-1] == lines[-1]
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in trained.iterdir()}


def test_a_model_with_other_positions_is_not_tested_in_its_place(trained, capsys):
    argv = [*DIGITS, "--model_path", trained / "model.pth", "--cls_pos", "0"]
    for more in ([], ["--eval"]):
        status, out, err = run(cifar_main.main, argv + more, capsys)
        assert (status, out) == (2, "")
        assert "cls_pos is 2, not 0" in err


def test_classes_and_confusions(trained, capsys):
    status, out, _ = run(
        cifar_test.main,
        ["--model_path", trained / "model.pth", "--device", "cpu", "--per_class", "--confusion"],
        capsys,
    )
    assert status == 0
    lines = out.splitlines()
    accuracy = float(lines[0].split()[2].rstrip("%"))
    per_class = [line for line in lines if " of 3" in line and "(" in line and line.startswith("  ")]
    right, total = (sum(int(n) for n in column) for column in zip(*(
        line.split("(")[1].rstrip(")").split(" of ") for line in per_class)))  # fmt: skip
    assert total == 360
    assert 100 * right / total == pytest.approx(accuracy, abs=0.006)
    start = next(i for i, line in enumerate(lines) if line.startswith("Confusion"))
    matrix = [[int(n) for n in line.split()[1:]] for line in lines[start + 1 : start + 11]]
    assert sum(map(sum, matrix)) == 360
    assert sum(matrix[i][i] for i in range(10)) == right


def test_the_best_epoch_is_chosen_on_held_out_images(tmp_path, monkeypatch, capsys):
    """Planned validation accuracies; training and test accuracy have no say."""
    planned = iter([(50.0, 1.0), (90.0, 1.0), (90.0, 0.5), (70.0, 0.1)])
    weights, sizes = [], []

    def planned_evaluate(model, batches, keep_predictions=False, on_batch=None):
        weights.append({n: t.clone() for n, t in model.state_dict().items()})
        sizes.append(len(batches.split))
        top1, loss = next(planned)
        return {"loss": loss, "top1": top1, "top5": 100.0, "images": 144}

    monkeypatch.setattr(cifar_train, "evaluate", planned_evaluate)
    argv = [*DIGITS, "--epochs", "4", "--model_path", tmp_path / "model.pth", "--max_steps", "40"]
    assert run(cifar_main.main, argv, capsys)[0] == 0
    best = utils.load_checkpoint(tmp_path / "model.pth")
    assert best["epoch"] == 3
    assert all(torch.equal(t, weights[2][n]) for n, t in best["model"].items())
    assert sizes == [144] * 4


def test_without_validation_the_last_epoch_is_the_result(tmp_path, capsys):
    status, out, _ = run(cifar_main.main, [*DIGITS, "--val_size", "0", "--model_path", tmp_path / "m.pth"], capsys)
    assert status == 0
    assert "val accuracy" not in out
    last, result = utils.load_checkpoint(tmp_path / "checkpoint.pth"), utils.load_checkpoint(tmp_path / "m.pth")
    assert result["epoch"] == 2
    assert all(torch.equal(t, last["model"][n]) for n, t in result["model"].items())


def test_averaged_weights_are_what_is_validated_and_saved(tmp_path, capsys):
    status, out, _ = run(cifar_main.main, [*DIGITS, "--ema", "0.9", "--model_path", tmp_path / "m.pth"], capsys)
    assert status == 0
    assert "(EMA; without" in out
    last, result = utils.load_checkpoint(tmp_path / "checkpoint.pth"), utils.load_checkpoint(tmp_path / "m.pth")
    assert any(not torch.equal(t, last["model"][n]) for n, t in result["model"].items())
    if result["epoch"] == 2:
        assert all(torch.equal(t, last["ema"][n]) for n, t in result["model"].items())
    metrics = result["metrics"]
    assert metrics["raw_val_loss"] != metrics["val_loss"]


@pytest.mark.parametrize("more", [[], ["--ema", "0.9"]])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(tmp_path, monkeypatch, capsys, more):
    argv = [*DIGITS, *more, "--epochs", "4", "--drop_path", "0.2"]
    assert run(cifar_main.main, [*argv, "--model_path", tmp_path / "a" / "m.pth"], capsys)[0] == 0

    killed_in_epoch_3(cifar_main.main, [*argv, "--model_path", tmp_path / "b" / "m.pth"])
    (tmp_path / "b" / "m.pth").unlink()
    status, _, err = run(cifar_main.main, [*argv, "--model_path", tmp_path / "b" / "m.pth"], capsys)
    assert status == 2  # an unfinished run is not thrown away
    assert "--resume goes on with it, --overwrite trains anew" in err
    status, out, _ = run(cifar_main.main, [*argv, "--model_path", tmp_path / "b" / "m.pth", "--resume"], capsys)
    assert status == 0
    assert "going on after epoch 2" in out
    whole, resumed = (utils.load_checkpoint(tmp_path / run / "checkpoint.pth") for run in "ab")
    assert all(torch.equal(t, resumed["model"][n]) for n, t in whole["model"].items())
    logs = [utils.read_json_lines(tmp_path / run / "log.txt") for run in "ab"]
    assert [r["epoch"] for r in logs[1][1:]] == [1, 2, 3, 4]
    for one, other in zip(logs[0][1:], logs[1][1:]):
        for key in ("train_loss", "val_loss", "lr", "step"):
            assert one[key] == other[key]
    bests = [utils.load_checkpoint(tmp_path / run / "checkpoint.pth")["best"]["epoch"] for run in "ab"]
    assert bests[0] == bests[1]


def test_resuming_another_model_is_refused(trained, capsys):
    before = {file: file.read_bytes() for file in trained.iterdir()}
    argv = [*DIGITS, "--model_path", trained / "model.pth", "--resume", "--cls_pos", "0"]
    status, _, err = run(cifar_main.main, argv, capsys)
    assert status == 2
    assert "cls_pos is 2 there, 0 here" in err
    assert before == {file: file.read_bytes() for file in trained.iterdir()}


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    planned = iter([{}, {}, {"lr": 1e30}])
    argv = [*DIGITS, "--epochs", "4", "--mixup", "0", "--cutmix", "0", "--model_path", tmp_path / "m.pth"]

    def diverges_in_epoch_3(model, batches, criterion, optimizer, scheduler, **kwargs):
        if next(planned):
            for parameter in model.parameters():
                parameter.data.mul_(float("inf"))
        return engine.train_one_epoch(model, batches, criterion, optimizer, scheduler, **kwargs)

    monkeypatch.setattr(cifar_train, "train_one_epoch", diverges_in_epoch_3)
    status, _, err = run(cifar_main.main, argv, capsys)
    assert status == 1
    assert len(err.splitlines()) == 1
    assert "epoch 3/4: the loss is nan" in err
    assert "holds the weights of epoch 2" in err
    last = utils.load_checkpoint(tmp_path / "checkpoint.pth")
    assert last["epoch"] == 2
    assert all(t.isfinite().all() for t in last["model"].values())


def test_same_seed_same_weights(tmp_path, capsys):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        argv = [*DIGITS, "--epochs", "1", "--deterministic", "--seed", seed, "--model_path", tmp_path / name / "m.pth"]
        assert run(cifar_main.main, argv, capsys)[0] == 0
        states.append(utils.load_checkpoint(tmp_path / name / "checkpoint.pth")["model"]["head.weight"])
    torch.use_deterministic_algorithms(False)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_compiled_training_saves_plain_names(tmp_path, monkeypatch, capsys):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))
    argv = [*DIGITS, "--compile", "--max_steps", "2", "--amp", "off", "--model_path", tmp_path / "m.pth"]
    assert run(cifar_main.main, argv, capsys)[0] == 0
    model = model_from_checkpoint(utils.load_checkpoint(tmp_path / "m.pth"))
    assert model.cls_pos == 2


def test_training_builds_one_model(tmp_path, monkeypatch, capsys):
    """Flags are checked on a description without weights, so a large model stands in memory once."""
    devices = []

    build = DynamicViT.__init__

    def counted(model, *args, **kwargs):
        devices.append(torch.empty(0).device.type)
        build(model, *args, **kwargs)

    monkeypatch.setattr(DynamicViT, "__init__", counted)
    assert run(cifar_main.main, [*DIGITS, "--max_steps", "1", "--model_path", tmp_path / "m.pth"], capsys)[0] == 0
    assert devices == ["meta", "cpu", "meta", "cpu"]  # flags, training; the test of what was saved: shapes, weights


def test_images_of_ones_own(photos, tmp_path, capsys):
    """A folder, sizes that are not square, every augmentation, upsampling."""
    given = "--input_size 16x24 --aug rand --epochs 1 --num_reg 0 --accum_steps 2 --clip_grad 1 --cls_pos none".split()
    argv = [*TINY, *given, "--data_path", photos, "--model_path", tmp_path / "m.pth"]
    status, out, err = run(cifar_main.main, argv, capsys)
    assert status == 0, err
    assert "on 6 images of FOLDER" in out
    assert utils.load_checkpoint(tmp_path / "m.pth")["model_args"]["img_size"] == (16, 24)
    assert run(cifar_test.main, ["--model_path", tmp_path / "m.pth", "--device", "cpu"], capsys)[1] in out


def test_two_processes(tmp_path):
    """As a user types it: no wrapper's names in the checkpoint, and the accuracy that one process finds."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    argv = [*DIGITS, "--model_path", "m.pth", "--batch_size", "64", "--epochs", "1"]
    together = shell("cifar_main.py", *argv, cwd=tmp_path, launcher=launcher)
    checkpoint = utils.load_checkpoint(tmp_path / "m.pth")
    assert not any(name.startswith("module.") for name in checkpoint["model"])
    assert json.loads((tmp_path / "log.txt").read_text().splitlines()[0])["processes"] == 2
    alone = shell("cifar_test.py", "--model_path", "m.pth", "--device", "cpu", cwd=tmp_path)
    assert together.stdout.splitlines()[-1] == alone.stdout.splitlines()[-1]
    assert together.stdout.count("Test accuracy") == 1


def test_a_run_that_begins_with_the_weights_of_another(tmp_path, trained, capsys):
    """The class token enters elsewhere; one step at a rate of almost 0 keeps the first model's weights."""
    path = tmp_path / "model.pth"
    argv = [*DIGITS, "--cls_pos", "0", "--num_reg", "1", "--max_steps", "1", "--lr", "1e-9", "--warmup_epochs", "0"]
    status, out, err = run(cifar_main.main, [*argv, "--finetune", trained / "model.pth", "--model_path", path], capsys)
    assert status == 0, err
    assert "--finetune: loaded" in out and "CLS enters at block 0" in out
    old, new = (utils.load_checkpoint(file)["model"] for file in (trained / "model.pth", path))
    torch.testing.assert_close(new["cls_token"], old["cls_token"], atol=1e-6, rtol=0)
    torch.testing.assert_close(new["register_tokens"], old["register_tokens"][:, :1], atol=1e-6, rtol=0)
    status, _, err = run(cifar_main.main, [*argv, "--finetune", tmp_path / "no.pth", "--overwrite"], capsys)
    assert status == 2 and "there is no checkpoint" in err


def test_quick_epochs_do_not_wait_for_their_curves(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(utils, "plot_curves", lambda epochs, folder: drawn.append(len(epochs)))
    argv = [*DIGITS, "--repeats", "0.1", "--epochs", "4"]
    assert run(cifar_main.main, [*argv, "--model_path", tmp_path / "a" / "m.pth"], capsys)[0] == 0
    assert drawn == [1, 4]
    monkeypatch.setattr(cifar_train, "CURVES_EVERY", 0)
    assert run(cifar_main.main, [*argv, "--model_path", tmp_path / "b" / "m.pth"], capsys)[0] == 0
    assert drawn == [1, 4, 1, 2, 3, 4]
