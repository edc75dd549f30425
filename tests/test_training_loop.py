"""Training and testing: the engine, and the scripts as their command lines run them."""

import json
import math
import time

import pytest
import torch
from timm.scheduler import create_scheduler_v2

import cifar_main
import cifar_test
import engine
import main_distillation
import utils
from checkpoints.files import load_checkpoint, save_checkpoint
from checkpoints.models import model_from_checkpoint
from conftest import STUDENT, TINY, killed_in_epoch_3, noise, run, shell, tiny
from engine import Position, TrainingStep, evaluate, train_one_epoch
from models_dynamic import DynamicViT
from training import loop, run_folder, run_log
from training.run_log import read_json_lines
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


# Scripts ---------------------------------------------------------------------------------------------------------


def test_what_training_writes(trained):
    log = read_json_lines(trained / "log.txt")
    assert log[0]["args"]["cls_pos"] == 2
    assert log[0]["args"]["aug"] == "none"  # the default of DIGITS
    assert {"torch", "timm", "git", "hardware", "threads"} <= log[0].keys()
    assert [record["epoch"] for record in log[1:]] == [1, 2]
    assert {"train_loss", "val_loss", "val_top1", "lr", "seconds", "images_per_s"} <= log[1].keys()
    for name in ("training_curves.png", "training_curves.pdf", "checkpoint.pth"):
        assert (trained / name).stat().st_size > 1000
    best = load_checkpoint(trained / "model.pth")
    assert set(best) == {"model", "model_args", "data", "args", "epoch", "metrics"}
    assert best["model_args"]["num_heads"] == 3
    assert best["data"]["classes"] == list("0123456789")
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in best["model"])
    assert not [file for file in trained.iterdir() if file.suffix == ".tmp"]


def test_the_same_command_again_tests_and_changes_nothing(trained, capsys):
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in trained.iterdir()}
    status, out, err = run(cifar_main.main, [*DIGITS, "--model_path", trained / "model.pth"], capsys)
    assert status == 0, err
    assert "--overwrite trains anew, --resume resumes its training" in out
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

    monkeypatch.setattr(loop, "evaluate", planned_evaluate)
    argv = [*DIGITS, "--epochs", "4", "--model_path", tmp_path / "model.pth", "--max_steps", "40"]
    assert run(cifar_main.main, argv, capsys)[0] == 0
    best = load_checkpoint(tmp_path / "model.pth")
    assert best["epoch"] == 3
    assert all(torch.equal(t, weights[2][n]) for n, t in best["model"].items())
    assert sizes == [144] * 4


def test_without_validation_the_last_epoch_is_the_result(tmp_path, capsys):
    status, out, _ = run(cifar_main.main, [*DIGITS, "--val_size", "0", "--model_path", tmp_path / "m.pth"], capsys)
    assert status == 0
    assert "val accuracy" not in out
    last, result = load_checkpoint(tmp_path / "checkpoint.pth"), load_checkpoint(tmp_path / "m.pth")
    assert result["epoch"] == 2
    assert all(torch.equal(t, last["model"][n]) for n, t in result["model"].items())


def test_averaged_weights_are_what_is_validated_and_saved(tmp_path, capsys):
    status, out, _ = run(cifar_main.main, [*DIGITS, "--ema", "0.9", "--model_path", tmp_path / "m.pth"], capsys)
    assert status == 0
    assert "(EMA; without" in out
    last, result = load_checkpoint(tmp_path / "checkpoint.pth"), load_checkpoint(tmp_path / "m.pth")
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
    assert "--resume resumes it, --overwrite trains anew" in err
    status, out, _ = run(cifar_main.main, [*argv, "--model_path", tmp_path / "b" / "m.pth", "--resume"], capsys)
    assert status == 0
    assert "resuming after epoch 2" in out
    whole, resumed = (load_checkpoint(tmp_path / run / "checkpoint.pth") for run in "ab")
    assert all(torch.equal(t, resumed["model"][n]) for n, t in whole["model"].items())
    logs = [read_json_lines(tmp_path / run / "log.txt") for run in "ab"]
    assert [r["epoch"] for r in logs[1][1:]] == [1, 2, 3, 4]
    for one, other in zip(logs[0][1:], logs[1][1:]):
        for key in ("train_loss", "val_loss", "lr", "step"):
            assert one[key] == other[key]
    bests = [load_checkpoint(tmp_path / run / "checkpoint.pth")["best"]["epoch"] for run in "ab"]
    assert bests[0] == bests[1]


def test_resuming_another_model_is_refused(trained, capsys):
    before = {file: file.read_bytes() for file in trained.iterdir()}
    argv = [*DIGITS, "--model_path", trained / "model.pth", "--resume", "--cls_pos", "0"]
    status, _, err = run(cifar_main.main, argv, capsys)
    assert status == 2
    assert "cls_pos is 2 there, 0 here" in err
    assert before == {file: file.read_bytes() for file in trained.iterdir()}


def begun(main, argv, capsys):
    """(status, output, error, what `train_one_epoch` is called with): a run up to its first step."""
    seen = {}

    def first_epoch(parts, batches, start, **kwargs):
        seen.update(kwargs, **vars(parts), batches=batches, first_update=start.first_update)
        raise utils.RunFailed("reached")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_one_epoch", first_epoch)
        status, out, err = run(main, argv, capsys)
    return status, out, err, seen


def rates(seen, steps):
    """The rate at each of so many steps of the schedule from the epoch's beginning on."""
    found = []
    for step in range(steps):
        seen["scheduler"].step_update(seen["first_update"] + step)
        found.append(seen["optimizer"].param_groups[1]["lr"])
    return found


def group(seen):
    """The hyperparameters of the weights that decay."""
    return seen["optimizer"].param_groups[1]


def transform(seen):
    return seen["batches"].transform


def pictures(seen):
    return str(seen["batches"].batches.loader.dataset.transform)


REFUSED = None
# What each flag that makes another run does to `--resume --overwrite` after the first epoch of a run: it takes effect,
# or is refused. (flag, value): a check of what the next epoch is trained with.
OF_BOTH = {
    ("epochs", 4): lambda seen: seen["scheduler"].t_initial == 4 * len(seen["batches"]),
    ("batch_size", 32): lambda seen: seen["batches"].batch_size == 32,
    ("lr", 0.5): lambda seen: max(rates(seen, 30)) > 0.01,
    ("weight_decay", 5): lambda seen: group(seen)["weight_decay"] == 5 and seen["optimizer"].state,
    ("weight_decay", 0): lambda seen: group(seen)["weight_decay"] == 0 and seen["optimizer"].state,
    ("warmup_epochs", 1.5): lambda seen: rates(seen, 4) == sorted(rates(seen, 4)),
    ("smoothing", 0.3): lambda seen: seen["mixup"].label_smoothing == 0.3,
    ("mixup", 0.3): lambda seen: seen["mixup"].mixup_alpha == 0.3,
    ("cutmix", 0.3): lambda seen: seen["mixup"].cutmix_alpha == 0.3,
    ("mix_prob", 0.3): lambda seen: seen["mixup"].mix_prob == 0.3,
    ("clip_grad", 3): lambda seen: seen["clip_grad"] == 3,
    ("accum_steps", 3): lambda seen: seen["accum_steps"] == 3 and seen["first_update"] == -(-len(seen["batches"]) // 3),
    ("max_steps", 100): lambda seen: seen["last_step"] == 100,
    ("skip_bad_steps", 7): lambda seen: seen["skip_bad"] == 7,
    ("amp", "bf16"): lambda seen: seen["amp_dtype"] == torch.bfloat16,
    ("seed", 5): lambda seen: torch.initial_seed() == 5,
    ("deterministic", ""): lambda _: torch.are_deterministic_algorithms_enabled(),
    ("ema", 0): REFUSED,
    ("ema", 0.5): lambda seen: seen["on_step"].__self__.state.ema.decay == 0.5,
    ("finetune", "model.pth"): REFUSED,
    ("val_size", 100): REFUSED,
    ("test_size", 0.3): REFUSED,
    ("data_set", "FOLDER"): REFUSED,
    ("model", "dynamic_vit_tiny_patch16_224"): REFUSED,
    **dict.fromkeys((
        ("num_reg", 1), ("cls_pos", 1), ("reg_pos", 1), ("embed_dim", 48), ("depth", 2), ("num_heads", 2),
        ("mlp_ratio", 3), ("patch_size", 16), ("input_size", 64), ("init_values", 1e-4), ("drop_path", 0.3)), REFUSED),
}  # fmt: skip
OF_SMALL_IMAGES = {
    ("aug", "rand"): lambda seen: transform(seen).aug == "rand",
    ("hflip", 0.3): lambda seen: transform(seen).hflip == 0.3,
    ("reprob", 0.3): lambda seen: transform(seen).reprob == 0.3,
    ("repeats", 2): lambda seen: seen["batches"].passes == 2 and seen["first_update"] == len(seen["batches"]),
}
OF_PICTURES = {
    ("aa", "rand-m7"): lambda seen: "RandAugment" in pictures(seen),
    ("color_jitter", 0.3): lambda seen: "ColorJitter" in pictures(seen),
    ("ThreeAugment", ""): lambda seen: "aussian" in pictures(seen),
    ("src", ""): lambda seen: "ResizeKeepRatio" in pictures(seen),
    ("no_aug", ""): lambda seen: seen["mixup"] is None and "partial" in pictures(seen),
    ("hflip", 0.3): lambda seen: "p=0.3" in pictures(seen),
    ("interpolation", "bilinear"): REFUSED,
    ("eval_crop_ratio", 0.5): REFUSED,
    ("reprob", 0.3): lambda seen: seen["batches"].batches.random_erasing.erasing.probability == 0.3,
    ("repeated_aug", ""): lambda seen: type(seen["batches"].draws.numbers).__name__ == "RepeatAugSampler",
    ("mix_switch_prob", 0.3): lambda seen: seen["mixup"].switch_prob == 0.3,
    ("opt", "sgd"): lambda seen: "nesterov" in group(seen) and not seen["optimizer"].state,
    ("unscale_lr", ""): lambda seen: max(rates(seen, 30)) > 4e-4,
    ("recipe", "fast"): REFUSED,  # for its stochastic depth
    ("warmup_lr", 3e-4): lambda seen: seen["scheduler"].warmup_lr_init == 3e-4,
    ("min_lr", 3e-4): lambda seen: seen["scheduler"].lr_min == 3e-4,
    ("bce_loss", ""): lambda seen: "Binary" in type(seen["criterion"]).__name__,
    ("distillation_type", "soft"): lambda seen: seen["teacher"] is not None and seen["criterion"].kind == "soft",
    ("distillation_alpha", 0.3): lambda seen: seen["criterion"].alpha == 0.3,
    ("distillation_tau", 3): lambda seen: seen["criterion"].tau == 3,
    ("teacher_path", "checkpoint.pth"): lambda seen: seen["teacher"] is not None,
    ("teacher_model", "resnet10t"): REFUSED,
    ("dist_pos", 1): REFUSED,
    ("attn_only", ""): lambda seen: not seen["optimizer"].state and sum(
        parameter.requires_grad for parameter in seen["model"].parameters()) == sum(
        len(group["params"]) for group in seen["optimizer"].param_groups),
    ("grad_checkpointing", ""): lambda seen: seen["model"]._grad_checkpointing,
}  # fmt: skip


@pytest.fixture(scope="module")
def after_one_epoch(tmp_path_factory):
    """For each script: its `main`, the command line of a run of one epoch, and its folder."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("small", "pictures")}
    common = "--batch_size 64 --lr 1e-3 --ema 0.9 --weight_decay 0.05 --amp off".split()
    small = [*TINY, *common, "--data_set", "DIGITS", "--repeats", "0.5", "--model_path", folders["small"] / "model.pth"]
    pictures = [*STUDENT, *common, "--no-repeated-aug", "--aa", "none", "--output_dir", folders["pictures"]]
    runs = {"small": (cifar_main.main, small), "pictures": (main_distillation.main, pictures)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "plot_curves", lambda *_: None)
        for main, argv in runs.values():
            main([str(arg) for arg in [*argv, "--epochs", "1"]])
    return {name: (*runs[name], folders[name]) for name in runs}


def test_every_flag_of_a_run_is_in_a_table_of_what_it_does_to_a_resumed_one():
    """A new flag: say there what it does, or add it to `run_folder.MAY_DIFFER`."""
    for main, table in ((cifar_main, OF_SMALL_IMAGES), (main_distillation, OF_PICTURES)):
        flags = {action.dest for action in main.get_parser()._actions} - {"help", *run_folder.MAY_DIFFER}
        assert flags == {name for name, _ in OF_BOTH | table}


@pytest.mark.parametrize(
    ("kind", "flag", "value"),
    [("small", *case) for case in OF_BOTH | OF_SMALL_IMAGES] + [("pictures", *case) for case in OF_BOTH | OF_PICTURES],
)
def test_a_flag_of_a_resumed_run_takes_effect_or_is_refused(kind, flag, value, after_one_epoch, capsys):
    main, argv, folder = after_one_epoch[kind]
    before = {file: file.read_bytes() for file in folder.iterdir() if file.suffix == ".pth"}
    check = (OF_BOTH | (OF_SMALL_IMAGES if kind == "small" else OF_PICTURES))[flag, value]
    more = [f"--{flag}", *([folder / value] if flag in ("finetune", "teacher_path") else [value] * (value != ""))]
    if flag in ("distillation_alpha", "distillation_tau", "teacher_model", "distillation_type", "teacher_path"):
        for name, default in (("teacher_path", folder / "checkpoint.pth"), ("distillation_type", "soft")):
            more += [] if flag == name else [f"--{name}", default]
    try:
        status, out, err, seen = begun(main, [*argv, "--epochs", "3", "--resume", "--overwrite", *more], capsys)
        if check is REFUSED:
            assert status == 2 and seen == {} and ": error: " in err, out + err
        else:
            assert status == 1 and f"--{flag} was " in out and check(seen), out + err
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(err.splitlines()) == 1 and before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize("more", [["--batch_size", "32"], ["--accum_steps", "2"], ["--repeats", "1"], ["processes"]])
def test_the_schedule_is_at_the_share_of_the_epochs_that_are_done(tmp_path, capsys, more):
    """Whatever the number of steps in an epoch is from there on: half of the cosine, then its end."""
    argv = [*DIGITS, "--repeats", "0.5", "--epochs", "4", "--warmup_epochs", "0", "--model_path", tmp_path / "m.pth"]
    killed_in_epoch_3(cifar_main.main, argv)
    if more == ["processes"]:  # a run of two, whose epochs had half as many steps
        saved = load_checkpoint(tmp_path / "checkpoint.pth")
        saved |= {"processes": 2 * saved["processes"], "step": saved["step"] // 2}
        save_checkpoint(tmp_path / "checkpoint.pth", saved)
        more = []
    argv += ["--resume", "--overwrite", *more]
    status, out, err, seen = begun(cifar_main.main, argv, capsys)
    assert "not as in" in out and seen["first_update"] == seen["scheduler"].t_initial / 2
    used = rates(seen, seen["scheduler"].t_initial // 2)
    assert used[0] == pytest.approx((1e-3 + 1e-6) / 2) and used == sorted(used, reverse=True)
    assert run(cifar_main.main, argv, capsys)[0] == 0
    assert read_json_lines(tmp_path / "log.txt")[-1]["lr"] == pytest.approx(used[-1])


@pytest.mark.parametrize("more", ["--batch_size 32", "--accum_steps 3", "--repeats 2", "--seed 1", "processes"])
def test_other_batches_do_not_begin_in_the_middle_of_an_epoch(tmp_path, capsys, monkeypatch, more):
    argv = [*DIGITS, "--save_steps", "2", "--model_path", tmp_path / "m.pth", "--overwrite"]
    save = run_folder.save

    def stops(*args):
        save(*args)
        raise utils.RunFailed("planted")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", stops)
        assert run(cifar_main.main, argv, capsys)[0] == 1
    if more == "processes":
        saved = load_checkpoint(tmp_path / "checkpoint.pth")
        save_checkpoint(tmp_path / "checkpoint.pth", saved | {"processes": 2 * saved["processes"]})
        more = "--lr 1e-3"
    status, _, err, seen = begun(cifar_main.main, [*argv, "--resume", *more.split()], capsys)
    assert status == 2 and seen == {} and len(err.splitlines()) == 1
    assert "in the middle of an epoch" in err and " was " in err and "from a checkpoint at the end of an epoch" in err


def test_thawed_weights_begin_with_a_fresh_optimizer(tmp_path, capsys, trained):
    argv = [*STUDENT, "--cls_pos", "2", "--reg_pos", "1", "--epochs", "3", "--output_dir", tmp_path]
    frozen = ["--finetune", trained / "model.pth", "--attn_only"]
    killed_in_epoch_3(main_distillation.main, [*argv, *frozen])
    argv += ["--resume", "--overwrite"]
    status, out, err, seen = begun(main_distillation.main, [*argv, *frozen[:2]], capsys)
    assert status == 1 and "--attn_only was True: the optimizer begins with a fresh state" in out, out + err
    assert not seen["optimizer"].state and all(p.requires_grad for p in seen["model"].parameters())
    (tmp_path / "moved.pth").write_bytes((trained / "model.pth").read_bytes())
    status, _, err, _ = begun(main_distillation.main, [*argv, "--finetune", tmp_path / "moved.pth"], capsys)
    assert status == 2 and "but the weights are those of" in err
    status, out, _, seen = begun(main_distillation.main, [*argv, *frozen], capsys)
    assert seen["optimizer"].state and "fresh" not in out


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    planned = iter([{}, {}, {"lr": 1e30}])
    argv = [*DIGITS, "--epochs", "4", "--mixup", "0", "--cutmix", "0", "--model_path", tmp_path / "m.pth"]

    def diverges_in_epoch_3(parts, batches, **kwargs):
        if next(planned):
            for parameter in parts.model.parameters():
                parameter.data.mul_(float("inf"))
        return engine.train_one_epoch(parts, batches, **kwargs)

    monkeypatch.setattr(loop, "train_one_epoch", diverges_in_epoch_3)
    status, _, err = run(cifar_main.main, argv, capsys)
    assert status == 1
    assert len(err.splitlines()) == 1
    assert "epoch 3/4: the loss is nan" in err
    assert "holds the weights of epoch 2" in err
    last = load_checkpoint(tmp_path / "checkpoint.pth")
    assert last["epoch"] == 2
    assert all(t.isfinite().all() for t in last["model"].values())


def test_same_seed_same_weights(tmp_path, capsys):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        argv = [*DIGITS, "--epochs", "1", "--deterministic", "--seed", seed, "--model_path", tmp_path / name / "m.pth"]
        assert run(cifar_main.main, argv, capsys)[0] == 0
        states.append(load_checkpoint(tmp_path / name / "checkpoint.pth")["model"]["head.weight"])
    torch.use_deterministic_algorithms(False)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_compiled_training_saves_plain_names(tmp_path, monkeypatch, capsys):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))
    argv = [*DIGITS, "--compile", "--max_steps", "2", "--amp", "off", "--model_path", tmp_path / "m.pth"]
    assert run(cifar_main.main, argv, capsys)[0] == 0
    model = model_from_checkpoint(load_checkpoint(tmp_path / "m.pth"))
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
    assert load_checkpoint(tmp_path / "m.pth")["model_args"]["img_size"] == (16, 24)
    assert run(cifar_test.main, ["--model_path", tmp_path / "m.pth", "--device", "cpu"], capsys)[1] in out


def test_two_processes(tmp_path):
    """As a user types it: no wrapper's names in the checkpoint, and the accuracy that one process finds."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    argv = [*DIGITS, "--model_path", "m.pth", "--batch_size", "64", "--epochs", "1"]
    together = shell("cifar_main.py", *argv, cwd=tmp_path, launcher=launcher)
    checkpoint = load_checkpoint(tmp_path / "m.pth")
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
    old, new = (load_checkpoint(file)["model"] for file in (trained / "model.pth", path))
    torch.testing.assert_close(new["cls_token"], old["cls_token"], atol=1e-6, rtol=0)
    torch.testing.assert_close(new["register_tokens"], old["register_tokens"][:, :1], atol=1e-6, rtol=0)
    status, _, err = run(cifar_main.main, [*argv, "--finetune", tmp_path / "no.pth", "--overwrite"], capsys)
    assert status == 2 and "there is no checkpoint" in err


def test_quick_epochs_do_not_wait_for_their_curves(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(run_log, "plot_curves", lambda epochs, folder: drawn.append(len(epochs)))
    argv = [*DIGITS, "--repeats", "0.1", "--epochs", "4"]
    assert run(cifar_main.main, [*argv, "--model_path", tmp_path / "a" / "m.pth"], capsys)[0] == 0
    assert drawn == [1, 4]
    monkeypatch.setattr(run_log, "CURVES_EVERY", 0)
    assert run(cifar_main.main, [*argv, "--model_path", tmp_path / "b" / "m.pth"], capsys)[0] == 0
    assert drawn == [1, 4, 1, 2, 3, 4]
