"""The epochs of a run: what is trained, validated, chosen and saved, as the command lines run them."""

from argparse import Namespace
from types import SimpleNamespace

import torch

import cifar_main
import cifar_test
import engine
from checkpoints.files import load_checkpoint
from runs import DIGITS, TINY, noise, run, tiny
from training import loop
from training.run_log import read_json_lines

PRINTED = r"Test accuracy: \d+\.\d\d% \(top-5 \d+\.\d\d%\) on 360 images of DIGITS"


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
    assert "--overwrite trains anew, --resume resumes" in out
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
    argv = ["--eval", "--data_set", "CIFAR10", "--device", "cpu", "--model_path", trained / "model.pth"]
    status, out, err = run(cifar_main.main, argv, capsys)
    assert (status, out) == (2, "") and "data_set is DIGITS, not CIFAR10" in err


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


def test_without_validation_the_last_epoch_is_the_result(tmp_path, capsys, curves):
    status, out, _ = run(cifar_main.main, [*DIGITS, "--val_size", "0", "--model_path", tmp_path / "m.pth"], capsys)
    assert status == 0
    assert "val accuracy" not in out
    last, result = load_checkpoint(tmp_path / "checkpoint.pth"), load_checkpoint(tmp_path / "m.pth")
    assert result["epoch"] == 2
    assert all(torch.equal(t, last["model"][n]) for n, t in result["model"].items())


def test_averaged_weights_are_what_is_validated_and_saved(tmp_path, capsys, curves):
    status, out, _ = run(cifar_main.main, [*DIGITS, "--ema", "0.9", "--model_path", tmp_path / "m.pth"], capsys)
    assert status == 0
    assert "(EMA; without" in out
    last, result = load_checkpoint(tmp_path / "checkpoint.pth"), load_checkpoint(tmp_path / "m.pth")
    assert any(not torch.equal(t, last["model"][n]) for n, t in result["model"].items())
    if result["epoch"] == 2:
        assert all(torch.equal(t, last["ema"][n]) for n, t in result["model"].items())
    metrics = result["metrics"]
    assert metrics["raw_val_loss"] != metrics["val_loss"]


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


def test_images_of_ones_own(photos, tmp_path, capsys):
    """A folder, sizes that are not square, every augmentation, upsampling."""
    given = "--input_size 16x24 --aug rand --epochs 1 --num_reg 0 --accum_steps 2 --clip_grad 1 --cls_pos none".split()
    argv = [*TINY, *given, "--data_path", photos, "--model_path", tmp_path / "m.pth"]
    status, out, err = run(cifar_main.main, argv, capsys)
    assert status == 0, err
    assert "on 6 images of FOLDER" in out
    assert load_checkpoint(tmp_path / "m.pth")["model_args"]["img_size"] == (16, 24)
    assert run(cifar_test.main, ["--model_path", tmp_path / "m.pth", "--device", "cpu"], capsys)[1] in out


def test_more_models_than_torch_compiles_of_one_function(monkeypatch):
    """The cells of a sweep have one forward pass between them."""
    graphs, compiled = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend=lambda g, _: graphs.append(g) or g))
    with torch._dynamo.config.patch(recompile_limit=1):
        for cls_pos in range(3):
            model = tiny(cls_pos=cls_pos)
            loop.wrap(step := SimpleNamespace(model=model), Namespace(fsdp=False, compile=True), (16, 24))
            step.model(noise(model))
            assert len(graphs) == cls_pos + 1


def test_averaged_batch_statistics_are_shared(monkeypatch):
    """Or the images of other processes would be scored with others than those that are saved."""
    shared, ema = [], Namespace(module=tiny())
    monkeypatch.setattr(loop.utils, "world_size", lambda: 2)
    monkeypatch.setattr(loop, "distribute_bn", lambda model, processes: shared.append(model))
    run = Namespace(model=tiny(), device=torch.device("cpu"), val_batches=None)
    step = Namespace(optimizer=torch.optim.SGD(run.model.parameters()))
    trained = dict.fromkeys(("step", "loss", "grad_norm", "seconds", "images", "data_wait", "skipped"), 1)
    loop.epoch_metrics(1, trained, step, run, ema, hooks=None)
    loop.epoch_metrics(1, trained, step, run, None, hooks=None)
    assert shared == [run.model, ema.module, run.model]
