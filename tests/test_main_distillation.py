"""Losses, teachers, the distillation token, recipes and fine-tuning: main_distillation.py in one process."""

import argparse
import json
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import random_seed

import cifar_main
import cifar_test
import main_distillation
import utils
import visualize_attention
from checkpoints.files import load_checkpoint, save_checkpoint
from checkpoints.models import load_model, model_from_checkpoint
from checkpoints.weights import load_weights
from datasets import find_split
from engine import TrainingStep, evaluate, train_one_epoch
from loading.files import FileLoader
from main_distillation import RECIPES, parse
from models_dynamic import DynamicViT
from runs import STUDENT, TINY, noise, run, tiny
from training import loop
from training.losses import DistillationLoss
from training.scoring import score
from training.setup import make_mixup_and_loss
from training.teachers import make_teacher

PRINTED = r"Accuracy: top-1 \d+\.\d\d top-5 \d+\.\d\d on 360 images"
LABELS = torch.tensor([0, 1])


class Still:
    """A scheduler that leaves the rate alone."""

    def step_update(self, step):
        pass


def train(capsys, folder, *argv, status=0):
    """A run of main_distillation.py; what it printed, or its error."""
    code, out, err = run(main_distillation.main, [*STUDENT, "--output_dir", folder, *argv], capsys)
    assert code == status, err
    return err if status else out


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A checkpoint of cifar_main.py, far better than chance on DIGITS."""
    path = tmp_path_factory.mktemp("teacher") / "model.pth"
    flags = "--data_set DIGITS --epochs 10 --lr 4e-3 --mixup 0 --cutmix 0 --reprob 0 --drop_path 0 --batch_size 64"
    cifar_main.main([*TINY, *flags.split(), "--model_path", str(path)])
    return path


# Losses ----------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    """Two images, two classes, everything written out."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])  # 1/4, 3/4; 1/2, 1/2
    of_dist = torch.tensor([[0.0, 0.0], [math.log(4), 0.0]])  # 1/2, 1/2; 4/5, 1/5
    of_teacher = torch.tensor([[math.log(9), 0.0], [0.0, math.log(9)]])  # 9/10, 1/10; 1/10, 9/10
    labels = torch.tensor([1, 0])
    base = -(math.log(3 / 4) + math.log(1 / 2)) / 2
    hard = -(math.log(1 / 2) + math.log(1 / 5)) / 2
    loss = DistillationLoss(torch.nn.CrossEntropyLoss(), "hard", alpha=0.25)
    assert loss((logits, of_dist), labels, of_teacher).item() == pytest.approx(0.75 * base + 0.25 * hard)
    # At temperature 2: the teacher is 3/4 to 1/4, the student 1/2, 1/2 and 2/3, 1/3.
    kl = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    kl += 1 / 4 * math.log((1 / 4) / (2 / 3)) + 3 / 4 * math.log((3 / 4) / (1 / 3))
    loss = DistillationLoss(torch.nn.CrossEntropyLoss(), "soft", alpha=0.25, tau=2.0)
    assert loss((logits, of_dist), labels, of_teacher).item() == pytest.approx(0.75 * base + 0.25 * kl / 2 * 4)


def test_soft_distillation_is_per_image():
    """Neither more classes nor more images make it weaker."""
    logits, of_teacher = torch.randn(4, 6), torch.randn(4, 6)
    loss = DistillationLoss(torch.nn.CrossEntropyLoss(), "soft", alpha=1.0)
    once = loss(logits, LABELS.repeat(2), of_teacher)
    twice = loss(logits.repeat(2, 1), LABELS.repeat(4), of_teacher.repeat(2, 1))
    impossible = torch.full((4, 94), -1e4)
    wide = loss(torch.cat([logits, impossible], 1), LABELS.repeat(2), torch.cat([of_teacher, impossible], 1))
    assert torch.allclose(once, twice) and torch.allclose(once, wide)


@pytest.mark.parametrize("mixed", [False, True])
def test_losses_on_the_labels(mixed):
    """Smoothing is done once, by the loss or by Mixup; binary cross-entropy sees each class by itself."""
    args = argparse.Namespace(mixup=0.8 * mixed, cutmix=0.0, mix_prob=1.0, smoothing=0.1, mix_switch_prob=0.5)
    for bce in (False, True):
        args.bce_loss = bce
        mixup, criterion = make_mixup_and_loss(args, 2, 5)
        assert (mixup is not None) == mixed
        logits = torch.randn(2, 5)
        images, labels = torch.randn(2, 3, 4, 4), LABELS
        shares = F.one_hot(LABELS, 5) * 0.9 + 0.1 / 5
        if mixed:
            images, labels = mixup(images, labels)
            shares = labels
            assert labels.sum(1).allclose(torch.ones(2)) and labels.min().item() == pytest.approx(0.02)
        if bce:
            expected = -(shares * F.logsigmoid(logits) + (1 - shares) * F.logsigmoid(-logits)).mean()
        else:
            expected = -(shares * logits.log_softmax(1)).sum(1).mean()
        assert criterion(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("dist_pos", [None, 2])
def test_a_step_of_distillation(kind, dist_pos):
    """The engine's step is the one computed by hand."""
    model, by_hand, teacher = tiny(dist_pos=dist_pos), tiny(dist_pos=dist_pos), tiny(depth=2)
    images = noise(model)
    criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), kind, alpha=0.3, tau=3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = train_one_epoch(TrainingStep(model, criterion, optimizer, Still(), teacher=teacher), [(images, LABELS)])

    by_hand.train()
    outputs = by_hand(images)
    logits, learns = outputs if dist_pos is not None else (outputs, outputs)
    shares = teacher(images).detach()
    if kind == "hard":
        of_teacher = F.nll_loss(learns.log_softmax(1), shares.argmax(1))
    else:
        p, q = (shares / 3).softmax(1), (learns / 3).softmax(1)
        of_teacher = (p * (p / q).log()).sum() / 2 * 9
    loss = 0.7 * F.nll_loss(logits.log_softmax(1), LABELS) + 0.3 * of_teacher
    loss.backward()
    assert report["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.cat([p.grad.flatten() for p in by_hand.parameters()]).norm().item()
    assert report["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for (name, trained), parameter in zip(model.named_parameters(), by_hand.parameters()):
        assert torch.allclose(trained, parameter - 0.1 * parameter.grad, atol=1e-5), name


# The distillation token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls_pos", [None, 0, 1, 3])
@pytest.mark.parametrize("dist_pos", [0, 1, 2])
def test_layout_and_maps_of_the_distillation_token(cls_pos, dist_pos):
    """[CLS | distillation | patches | registers], whichever enters first; its map is its row of the attention."""
    model = tiny(cls_pos=cls_pos, dist_pos=dist_pos, num_register_tokens=2, reg_pos=1)
    images = noise(model)
    maps = model.attention_maps(images, range(4))
    for block in range(4):
        layout = model.token_layout(block)
        cls = int(cls_pos is not None and block >= cls_pos)
        if block < dist_pos:
            assert layout.dist is None and maps[block].dist is None
            continue
        assert layout.dist == slice(cls, cls + 1)
        assert layout.patches == slice(cls + 1, cls + 25)
        attention = model.attention(images, block)
        assert attention.shape[-1] == layout.length
        assert torch.allclose(maps[block].dist.flatten(2), attention[:, :, cls, layout.patches])
        if maps[block].registers is not None:
            assert torch.allclose(
                maps[block].registers.flatten(3), attention[:, :, layout.registers, layout.patches].transpose(1, 2)
            )
    tokens = []
    model.blocks[dist_pos].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    model(images)
    entered = tokens[0][:, model.token_layout(dist_pos).dist]
    assert torch.equal(entered, model.dist_token.expand(2, -1, -1))


def test_a_distilled_deit_computes_as_timms():
    """Its weights, from block 0 on: the same two heads in training, their mean in evaluation."""
    torch.manual_seed(0)
    size = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7)
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", **size).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    ours = DynamicViT(**size, num_register_tokens=0, dist_pos=0).eval()
    report = load_weights(ours, theirs.state_dict())
    assert not report.new and not report.left_out
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)
    theirs.set_distilled_training(True)
    for mine, its in zip(ours.train()(images), theirs.train()(images)):
        assert torch.allclose(mine, its, atol=1e-5)
    again = model_from_checkpoint(theirs.state_dict(), num_heads=3)
    assert again.dist_pos == 0
    assert torch.allclose(again(images), ours.eval()(images))


def test_the_distillation_tokens_head_trains(tmp_path, capsys, teacher):
    """By the command line; the page shows the token, and the checkpoint tests without a flag."""
    argv = ["--teacher_path", teacher, "--distillation_type", "hard", "--dist_pos", "1", "--cls_pos", "2"]
    out = train(capsys, tmp_path / "run", *argv, "--epochs", "1", "--no_aug", "--lr", "1e-2")
    assert "distillation token at block 1" in out
    assert re.search(PRINTED, out)
    random_seed(0)
    first = DynamicViT(**load_checkpoint(tmp_path / "run" / "checkpoint.pth")["model_args"])
    last, _ = load_model(tmp_path / "run" / "checkpoint.pth")
    for name in ("dist_token", "head_dist.weight", "head_dist.bias", "head.weight"):
        assert not torch.equal(first.state_dict()[name], last.state_dict()[name]), name
    path = tmp_path / "run" / "best_checkpoint.pth"
    assert run(cifar_test.main, ["--model_path", path], capsys)[0] == 0
    argv = ["--model_path", path, "--layer_num", "1", "--output_dir", tmp_path, "--device", "cpu"]
    assert "block1.pdf: dist, reg0, reg1" in run(visualize_attention.main, argv, capsys)[1]
    argv = ["--model_path", path, "--layer_num", "0", "--tokens", "dist", "--output_dir", tmp_path]
    assert "the distillation token only enters at block 1" in run(visualize_attention.main, argv, capsys)[2]


# Teachers --------------------------------------------------------------------------------------------------------


def test_a_student_learns_to_agree_with_a_weak_teacher(tmp_path, capsys, teacher):
    """More than one that learns from the labels alone; the teacher is wrong often enough to tell the two apart."""
    path = tmp_path / "weak.pth"
    checkpoint = load_checkpoint(teacher)
    order = torch.tensor([1, 0, 3, 2, 4, 5, 6, 7, 8, 9])  # it takes 0 for 1 and 2 for 3, and the other way round
    for name in ("head.weight", "head.bias"):
        checkpoint["model"][name] = checkpoint["model"][name][order]
    save_checkpoint(path, checkpoint)
    plain = "--epochs 8 --no_aug --lr 4e-3 --unscale-lr --smoothing 0 --embed_dim 48 --drop_path 0".split()
    plain += "--no-repeated-aug --batch_size 64".split()
    distilled = ["--teacher_path", path, "--distillation_type", "soft", "--distillation_alpha", "0.9"]
    train(capsys, tmp_path / "alone", *plain)
    train(capsys, tmp_path / "taught", *plain, *distilled)
    of_teacher = predictions(path)
    agreement = {n: agree(predictions(tmp_path / n / "best_checkpoint.pth"), of_teacher) for n in ("alone", "taught")}
    assert agreement["taught"] > agreement["alone"] + 0.2, agreement


def predictions(path):
    model, checkpoint = load_model(path)
    return score(model, checkpoint, None, torch.device("cpu"), 128, keep_predictions=True)[0]["predictions"]


def agree(these, those):
    return (these == those).float().mean().item()


def test_a_teacher_of_timms_and_its_own_normalisation(tmp_path, capsys):
    """A bare state dict; images are normalised anew for the teacher."""
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=10).eval()
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    argv = ["--teacher_model", "resnet10t", "--teacher_path", tmp_path / "teacher.pth", "--distillation_type", "soft"]
    assert re.search(PRINTED, train(capsys, tmp_path / "run", *argv, "--max_steps", "1"))

    args = parse([str(arg) for arg in [*STUDENT, *argv]])
    data = main_distillation.read_data(args)
    its = make_teacher(args, data, torch.device("cpu"))
    pixels = torch.rand(2, 3, 32, 32)
    here, there = (
        (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        for mean, std in ((data.mean, data.std), (network.pretrained_cfg["mean"], network.pretrained_cfg["std"]))
    )
    with torch.no_grad():
        assert torch.allclose(its(here), network(there), atol=1e-3)
        assert not torch.allclose(network(here), network(there), atol=1e-2)


def test_teachers_that_do_not_fit(tmp_path, capsys, teacher, photos):
    def refused(*argv):
        argv = ["--distillation_type", "soft", *argv]
        return train(capsys, tmp_path / "run", *argv, status=2)

    network = timm.create_model("resnet10t", num_classes=7)
    torch.save(network.state_dict(), tmp_path / "seven.pth")
    resnet = ["--teacher_model", "resnet10t", "--teacher_path"]
    assert "the teacher resnet10t of" in (err := refused(*resnet, tmp_path / "seven.pth"))
    assert "is not for the 10 classes of the data: see its fc.weight" in err
    state = timm.create_model("resnet10t", num_classes=10).state_dict()
    del state["layer1.0.conv1.weight"]
    torch.save(state, tmp_path / "cut.pth")
    assert "layer1.0.conv1.weight 64x64x3x3 is missing" in refused(*resnet, tmp_path / "cut.pth")
    err = refused("--teacher_path", teacher, "--data_set", "FOLDER", "--data_path", photos)
    assert "the data differ in their classes" in err and str(teacher) in err
    assert "give --input_size 32x32" in refused("--teacher_path", teacher, "--input_size", "64")
    assert "is a DynamicViT" in refused("--teacher_path", teacher, "--teacher_model", "resnet10t")
    assert "give --teacher_model NAME" in refused("--teacher_path", tmp_path / "seven.pth")
    assert "timm has no model nonsense" in refused(
        "--teacher_path", tmp_path / "seven.pth", "--teacher_model", "nonsense"
    )
    assert "there is no checkpoint" in refused("--teacher_path", tmp_path / "nothing.pth")
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


# Recipes and runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_each_recipe_runs_a_step(tmp_path, capsys, recipe, curves):
    out = train(capsys, tmp_path, "--recipe", recipe, "--max_steps", "1", "--batch_size", "16")
    assert re.search(PRINTED, out)
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    args = log[0]["args"]
    assert args["recipe"] == recipe
    assert args["epochs"] == RECIPES[recipe]["epochs"]
    scale = 1 if RECIPES[recipe].get("unscale_lr") else 16 / 512  # linear scaling
    assert args["lr"] == pytest.approx(RECIPES[recipe]["lr"] * scale)
    if recipe == "deit3":
        assert args["ThreeAugment"] and args["bce_loss"] and args["opt"] == "lamb"
        assert log[0]["model_args"]["init_values"] == 1e-4
        assert "note: --lr 0.004 was published for 2048 images a step, here are 16" in out
    for key in ("train_loss", "lr", "grad_norm", "images_per_s", "data_wait", "memory_mib", "val_top1", "val_top5"):
        assert isinstance(log[1][key], float), key
    assert {path.name for path in tmp_path.iterdir()} == {
        "best_checkpoint.pth", "checkpoint.pth", "log.txt", "training_curves.pdf", "training_curves.png"
    }  # fmt: skip


def test_single_flags_override_a_recipe():
    args = parse(
        "--recipe deit3 --opt adamw --no-unscale-lr --lr 1e-3 --no-ThreeAugment --aa rand-m7 --batch-size 64".split()
    )
    assert (args.opt, args.ThreeAugment, args.aa, args.bce_loss) == ("adamw", False, "rand-m7", True)
    assert args.lr == pytest.approx(1e-3 * 64 / 512)
    assert parse(["--model", "deit_tiny_patch16_224"]).model == "deit_tiny_patch16_224"
    assert parse("--epochs 20".split()).warmup_epochs == 2


def test_flags_of_the_data_reach_the_loader(tmp_path, capsys, monkeypatch):
    made = []

    def loader(*args, **kwargs):
        made.append(kwargs)
        return FileLoader(*args, **kwargs)

    monkeypatch.setattr(main_distillation, "FileLoader", loader)
    argv = "--max_steps 1 --batch_size 6 --reprob 0.75 --seed 7 --eval_crop_ratio 0.5 --interpolation random".split()
    train(capsys, tmp_path / "repeated", *argv)
    train(capsys, tmp_path / "once", *argv, "--no-repeated-aug")
    assert [kwargs.get("repeats") for kwargs in made] == [3, None, 1, None]
    assert made[0]["reprob"] == 0.75 and made[0]["seed"] == 7 and made[0]["batch_size"] == 6
    data = load_checkpoint(tmp_path / "once" / "checkpoint.pth")["data"]
    assert (data["crop_pct"], data["interpolation"]) == (0.5, "bicubic")


def test_a_model_of_timms_under_the_same_command(tmp_path, capsys):
    """Trained, tested, read back, drawn."""
    model = ["--model", "vit_tiny_patch16_224", "--input_size", "32"]
    argv = ["--data_set", "DIGITS", *model, "--num_workers", "0", "--device", "cpu", "--output_dir", tmp_path]
    status, out, err = run(main_distillation.main, [*argv, "--max_steps", "1", "--batch_size", "16"], capsys)
    assert status == 0, err
    assert out.startswith("vit_tiny_patch16_224 of timm, 5.49 M parameters; DIGITS: 1293 train, 144 val, 360 test")
    path = tmp_path / "best_checkpoint.pth"
    said = re.search(PRINTED, out)[0]
    assert said in run(main_distillation.main, ["--eval", "--resume", path, "--num_workers", "0"], capsys)[1]
    assert run(cifar_test.main, ["--model_path", path], capsys)[0] == 0
    drawn = run(visualize_attention.main, ["--model_path", path, "--output_dir", tmp_path], capsys)
    assert drawn[0] == 0 and "attention_DIGITS_test0_block2.pdf: cls" in drawn[1]


def test_evaluation_tells_the_ema_apart(tmp_path, capsys):
    """`--eval` takes no flag of the model; the best checkpoint holds the EMA's weights."""
    train(capsys, tmp_path, "--ema", "0.9", "--max_steps", "20", "--batch_size", "64", "--lr", "1e-2", "--no_aug")
    argv = ["--eval", "--num_workers", "0", "--device", "cpu", "--output_dir", tmp_path]
    best = run(main_distillation.main, argv, capsys)[1].splitlines()
    note, *last = run(main_distillation.main, [*argv, "--resume"], capsys)[1].splitlines()
    assert "without EMA" in note
    assert [line.split(":")[0] for line in last] == ["Accuracy", "EMA accuracy"]
    assert best == [last[1].replace("EMA a", "A")]
    model, checkpoint = load_model(tmp_path / "checkpoint.pth")
    split, _ = find_split("DIGITS", None, False)
    batches = FileLoader(split, checkpoint["data"], 100, torch.device("cpu"))
    for line, weights in zip(last, (checkpoint["model"], checkpoint["ema"])):
        model.load_state_dict(weights)
        figures = evaluate(model, batches)
        assert line.endswith(f"top-1 {figures['top1']:.2f} top-5 {figures['top5']:.2f} on 360 images")


@pytest.mark.parametrize("more", ["", "--opt lookahead_adamw", "--opt lamb --weight_decay 0"])
def test_resumed_runs_end_as_unstopped_ones(tmp_path, capsys, monkeypatch, more):
    """The same rate at each step, the same weights; what optimizers count in their groups is counted on."""
    argv = f"--recipe deit --epochs 2 --batch_size 64 --ema 0.9 --amp off --seed 3 {more}".split()
    train(capsys, tmp_path / "whole", *argv)
    step = loop.train_one_epoch
    stopped = []

    def one_epoch(*args, **kwargs):
        if stopped:
            raise KeyboardInterrupt
        stopped.append(1)
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_one_epoch", one_epoch)
    assert run(main_distillation.main, [*STUDENT, *argv, "--output_dir", tmp_path / "cut"], capsys)[0] == 130
    monkeypatch.setattr(loop, "train_one_epoch", step)
    train(capsys, tmp_path / "cut", *argv, "--resume", "--num_workers", "2")
    whole, cut = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "cut"))
    assert whole["metrics"]["lr"] == cut["metrics"]["lr"]
    assert whole["metrics"]["train_loss"] == cut["metrics"]["train_loss"]
    for part in ("model", "ema"):
        assert all(torch.equal(weight, cut[part][name]) for name, weight in whole[part].items())


def test_throughput_gradient_checkpointing_and_tensorboard(tmp_path, capsys):
    out = train(capsys, tmp_path, "--throughput", "--batch_size", "4", "--grad_checkpointing", "--dist_pos", "1")
    line = r"Throughput: training [\d,.]+ images/s, inference [\d,.]+ images/s \(batch 4, 32 x 32 pixels, \w+, cpu, 1 "
    assert re.search(line, out)
    assert not any(tmp_path.iterdir())
    pytest.importorskip("tensorboard")
    train(capsys, tmp_path, "--max_steps", "1", "--tensorboard", "--batch_size", "8")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    log = json.loads((tmp_path / "log.txt").read_text().splitlines()[1])
    assert events.Scalars("train_loss")[0].value == pytest.approx(log["train_loss"])


def test_gradient_checkpointing_changes_no_gradient():
    for settings in (dict(cls_pos=2, reg_pos=1), dict(cls_pos=None, dist_pos=2)):
        plain, saving = tiny(**settings).train(), tiny(**settings).train()
        saving.set_grad_checkpointing()
        counts = []
        saving.blocks[0].register_forward_pre_hook(lambda *_, counts=counts: counts.append(1))
        for model in (plain, saving):
            outputs = model(noise(model))
            sum(part.square().sum() for part in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        assert len(counts) == 2  # computed again in the backward pass
        for a, b in zip(plain.parameters(), saving.parameters()):
            assert torch.allclose(a.grad, b.grad, atol=1e-6)


# Fine-tuning -----------------------------------------------------------------------------------------------------


def test_finetune_from_timm_at_another_resolution(tmp_path, capsys):
    """The features are those that timm computes from the same file, at 96 pixels in place of 224."""
    torch.manual_seed(0)
    state = timm.create_model("deit_tiny_patch16_224").state_dict()
    state["pos_embed"] = torch.randn_like(state["pos_embed"])
    torch.save({"model": state}, tmp_path / "deit.pth")
    argv = ["--finetune", tmp_path / "deit.pth", "--data_set", "DIGITS", "--input_size", "96", "--num_reg", "0"]
    args = parse([str(arg) for arg in argv])
    ours = main_distillation.make_model(args, 10).eval()
    out = capsys.readouterr().out
    assert "--finetune: resampled: pos_embed" in out
    assert "--finetune: left out: head.weight, head.bias" in out
    assert "--finetune: new: head.weight, head.bias" in out
    assert "--finetune: loaded 149 of the model's 152 tensors as they are" in out
    theirs = timm.create_model("deit_tiny_patch16_224", img_size=96).eval()
    load_weights(theirs, {"model": state})
    images = torch.randn(2, 3, 96, 96)
    assert torch.allclose(ours.forward_features(images), theirs.forward_features(images), atol=1e-4)


def test_finetune_moves_tokens_and_classes(tmp_path, capsys, trained, photos):
    """A checkpoint of digits for photos: other classes, tokens elsewhere, another size."""
    argv = ["--finetune", trained / "model.pth", "--data_set", "FOLDER", "--data_path", photos, "--input_size", "48"]
    out = train(capsys, tmp_path, *argv, "--cls_pos", "0", "--reg_pos", "2", "--max_steps", "1", "--batch_size", "4")
    assert "CLS enters at block 0, 2 registers at block 2" in out
    assert "left out: head.weight, head.bias" in out
    assert re.search(r"top-5 100.00 on 6 images", out)


def test_attn_only_trains_attention_head_and_positions(tmp_path, capsys, trained):
    argv = ["--finetune", trained / "model.pth", "--attn_only", "--max_steps", "3", "--batch_size", "8", "--lr", "1"]
    train(capsys, tmp_path, *argv, "--cls_pos", "2", "--reg_pos", "1", "--warmup_epochs", "0")
    before, after = (load_checkpoint(p)["model"] for p in (trained / "model.pth", tmp_path / "checkpoint.pth"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if ".attn." in n or n.startswith(("head", "pos_embed"))}


def test_a_finetuned_file_is_tested_without_training(tmp_path, capsys, trained):
    """`--eval --finetune`: the flags say the model, as for a state dict from elsewhere."""
    checkpoint = load_checkpoint(trained / "model.pth")
    torch.save(checkpoint["model"], tmp_path / "bare.pth")
    argv = ["--eval", "--finetune", tmp_path / "bare.pth", "--cls_pos", "2", "--reg_pos", "1"]
    out = train(capsys, tmp_path / "none", *argv)
    alone = run(cifar_test.main, ["--model_path", trained / "model.pth"], capsys)[1]
    top1, top5 = re.search(r"accuracy: ([\d.]+)% \(top-5 ([\d.]+)%\)", alone).groups()
    assert f"Accuracy: top-1 {top1} top-5 {top5} on 360 images" in out
    assert not (tmp_path / "none").exists()


def scored(monkeypatch):
    """The descriptions of the data that models are scored on from here on."""
    descriptions, work = [], main_distillation.score

    def score(model, checkpoint, *args, **kwargs):
        descriptions.append(checkpoint["data"])
        return work(model, checkpoint, *args, **kwargs)

    monkeypatch.setattr(main_distillation, "score", score)
    return descriptions


def test_a_file_is_tested_on_images_as_it_wants_them(tmp_path, capsys, monkeypatch, teacher):
    """Mean and deviation, crop and interpolation are those of the file, unless a flag says otherwise."""
    checkpoint = load_checkpoint(teacher)
    checkpoint["data"] |= {"mean": [0.6, 0.3, 0.3], "std": [0.3, 0.3, 0.6]}
    save_checkpoint(tmp_path / "other.pth", checkpoint)
    alone = run(cifar_test.main, ["--model_path", tmp_path / "other.pth"], capsys)[1]
    assert alone != run(cifar_test.main, ["--model_path", teacher], capsys)[1]
    used = scored(monkeypatch)
    out = train(capsys, tmp_path, "--eval", "--finetune", tmp_path / "other.pth")
    assert re.search(r"accuracy: ([\d.]+)%", alone)[1] in out
    assert (used[-1]["mean"], used[-1]["crop_pct"]) == ([0.6, 0.3, 0.3], 1.0)

    checkpoint["data"] |= {"crop_pct": 0.5, "interpolation": "bilinear"}
    save_checkpoint(tmp_path / "other.pth", checkpoint)
    for how in ("--finetune", "--resume"):
        argv = ["--eval", how, tmp_path / "other.pth"]
        train(capsys, tmp_path, *argv)
        assert (used[-1]["crop_pct"], used[-1]["interpolation"]) == (0.5, "bilinear")
        train(capsys, tmp_path, *argv, "--eval_crop_ratio", "0.9", "--interpolation", "random")
        assert (used[-1]["crop_pct"], used[-1]["interpolation"], used[-1]["std"]) == (0.9, "bicubic", [0.3, 0.3, 0.6])


def test_weights_of_a_model_of_timms_are_tested_with_its_normalisation(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    used = scored(monkeypatch)
    argv = ["--eval", "--finetune", tmp_path / "vit.pth", "--model", "vit_tiny_patch16_224", "--input_size", "32"]
    argv += ["--data_set", "DIGITS", "--num_workers", "0", "--device", "cpu"]
    assert run(main_distillation.main, argv, capsys)[0] == 0
    assert used[0]["mean"] == network.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_files_that_are_not_for_the_data_or_the_flags_are_not_tested(tmp_path, capsys, trained, teacher, photos):
    def refused(path, *argv):
        return train(capsys, tmp_path / "none", "--eval", "--finetune", path, *argv, status=2)

    tokens, of_photos = ["--cls_pos", "2", "--reg_pos", "1"], ["--data_set", "FOLDER", "--data_path", photos]
    err = refused(trained / "model.pth", *tokens, *of_photos)
    assert "only the data have blue, red" in err and "differ in their classes" in err
    checkpoint = load_checkpoint(trained / "model.pth")
    state = checkpoint["model"]
    torch.save(state, tmp_path / "bare.pth")
    assert "is not for the 2 classes of the data: see its head.weight" in refused(
        tmp_path / "bare.pth", *tokens, *of_photos
    )
    torch.save({name: t for name, t in state.items() if not name.startswith("head")}, tmp_path / "headless.pth")
    assert "is not for the 10 classes of the data: see its head.weight" in refused(tmp_path / "headless.pth", *tokens)
    for more, name in ((["--num_reg", "3"], "register_tokens"), (["--num_reg", "0"], "register_tokens"),
                       (["--cls_pos", "none"], "cls_token"), (["--dist_pos", "1"], "dist_token")):  # fmt: skip
        err = refused(tmp_path / "bare.pth", *tokens, *more)
        assert f"other tokens than the model of the flags: see {name}" in err
    assert "its num_heads is 3, here 2; give the flags" in refused(trained / "model.pth", *tokens, "--num_heads", "2")
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_of_another_model_than_asked_for_is_not_tested(capsys, trained):
    argv = ["--eval", "--resume", trained / "model.pth", "--num_workers", "0", "--device", "cpu"]
    for asked, wrong in (
        (["--cls_pos", "0"], "cls_pos is 2, not 0"),
        (["--input_size", "64"], "img_size is (32, 32), not (64, 64)"),
        (["--model", "dynamic_vit_small_patch16_224"], "embed_dim is 24, not 384"),
        (["--model", "resnet10t"], "timm_name is None, not resnet10t"),
        (["--data_set", "CIFAR10"], "data_set is DIGITS, not CIFAR10"),
    ):
        status, out, err = run(main_distillation.main, [*argv, *asked], capsys)
        assert status == 2 and wrong in err and out == ""
    for asked in ([], ["--cls_pos", "2", "--recipe", "deit3"]):
        assert run(main_distillation.main, [*argv, *asked], capsys)[0] == 0


def test_what_only_training_needs_is_not_asked_of_a_test(tmp_path, capsys, trained):
    """An even batch for Mixup, a warm-up shorter than the run, a teacher; and --opt is checked where it is used."""
    argv = "--batch_size 361 --epochs 1 --warmup_epochs 2".split()
    for more in (["--teacher_path", "x.pth"], ["--distillation_type", "soft"]):
        train(capsys, tmp_path, "--eval", "--resume", trained / "model.pth", *argv, *more)
    status, _, err = run(cifar_main.main, [*argv, "--eval", "--model_path", trained / "model.pth"], capsys)
    assert status == 0, err
    train(capsys, tmp_path, "--throughput", "--batch_size", "1", *argv[2:])
    assert "--opt nonsense" in train(capsys, tmp_path, "--throughput", "--opt", "nonsense", status=2)
    for main in (cifar_main.main, main_distillation.main):
        for flag, wrong in (("--batch_size", "--batch_size 361 must be even"), ("--epochs", "must be less than")):
            given = argv[:2] if flag == "--batch_size" else argv[2:]
            status, _, err = run(main, ["--data_set", "DIGITS", *given, "--output_dir", tmp_path], capsys)
            assert status == 2 and wrong in err
    with pytest.raises(utils.BadInput, match="too few images for more than 1 in a batch; or give --mixup 0 --cutmix 0"):
        make_mixup_and_loss(argparse.Namespace(mixup=1, cutmix=0, batch_size=8, smoothing=0.1), 1, 5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--distributed", "--distributed needs torchrun, which starts the processes; type: torchrun --nnodes=1"),
        ("--fsdp", "--fsdp needs torchrun, which starts the processes; type: torchrun --nnodes=1"),
        ("--model nonsense", "there is no model nonsense; choose one of dynamic_vit_tiny_patch16_224"),
        ("--model resnet10t --cls_pos 3", "--cls_pos: timm's resnet10t has no such choice"),
        ("--model resnet10t --attn_only --data_set DIGITS", "--attn_only: resnet10t has no attention"),
        ("--cls_pos 12", "cls_pos 12 is outside the model: its blocks are 0..11"),
        ("--dist_pos 3", "--dist_pos: the distillation token learns from a teacher"),
        ("--teacher_path x.pth", "distillation takes a teacher and a kind"),
        ("--distillation_type soft", "distillation takes a teacher and a kind"),
        ("--data_path nowhere", "there is no folder nowhere/train; give --data_path"),
        ("--data_set DIGITS --opt nonsense --num_workers 0", "--opt nonsense"),
        ("--data_set DIGITS --aa nonsense --num_workers 0", "--aa nonsense is no policy of timm's"),
        ("--batch_size 7", "--batch_size 7 must be even"),
        ("--finetune nothing.pth --data_set DIGITS", "there is no checkpoint nothing.pth"),
        ("--eval", "there is no checkpoint models/imagenet/best_checkpoint.pth"),
        ("--resume", "--resume: there is no models/imagenet/checkpoint.pth"),
        ("--epochs 3 --warmup_epochs 3", "must be less than --epochs 3"),
        ("--recipe swin", "invalid choice: 'swin'"),
        ("--interpolation cubic", "invalid choice: 'cubic'"),
        ("--lr 0", "must be more than 0"),
        ("--amp fp16", "--amp fp16 needs a CUDA device"),
    ],
)
def test_bad_input(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(main_distillation.main, [*argv.split(), "--device", "cpu"], capsys)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert message in err
