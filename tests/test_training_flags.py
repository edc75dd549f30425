"""What each flag does to a run that is resumed with another value of it."""

import pytest
import torch

import cifar_main
import main_distillation
import utils
from checkpoints.files import load_checkpoint, save_checkpoint
from runs import DIGITS, STUDENT, TINY, killed_in_epoch_3, run
from training import loop, run_folder
from training.run_log import read_json_lines


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
    ("layer_decay", 0.5): lambda seen: group(seen)["lr_scale"] == 1 / 16 and not seen["optimizer"].state,
    ("balance", "loss"): lambda seen: "weights" in vars(seen["criterion"]),
    ("warmup_epochs", 1.5): lambda seen: rates(seen, 4) == sorted(rates(seen, 4)),
    ("smoothing", 0.3): lambda seen: seen["mixup"].label_smoothing == 0.3,
    ("mixup", 0.3): lambda seen: seen["mixup"].mixup_alpha == 0.3,
    ("cutmix", 0.3): lambda seen: seen["mixup"].cutmix_alpha == 0.3,
    ("mix_prob", 0.3): lambda seen: seen["mixup"].mix_prob == 0.3,
    ("clip_grad", 3): lambda seen: seen["clip_grad"] == 3,
    ("accum_steps", 3): lambda seen: seen["accum_steps"] == 3 and seen["first_update"] == -(-len(seen["batches"]) // 3),
    ("max_steps", 100): lambda seen: seen["last_step"] == 100,
    ("skip_bad_steps", 7): lambda seen: seen["skip_bad"] == 7,
    ("opt", "sgd"): lambda seen: "nesterov" in group(seen) and not seen["optimizer"].state,
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
        ("mlp_ratio", 3), ("patch_size", 16), ("input_size", 64), ("init_values", 1e-4), ("drop_path", 0.3),
        ("qk_norm", ""), ("rope", ""), ("swiglu", ""), ("stem", "conv"), ("reg_end", 2), ("cls_mode", "reader"),
        ("reg_mode", "reader"), ("class_attention", 1)), REFUSED),
}  # fmt: skip


OF_SMALL_IMAGES = {
    ("aug", "rand"): lambda seen: transform(seen).aug == "rand",
    ("hflip", 0.3): lambda seen: transform(seen).hflip == 0.3,
    ("reprob", 0.3): lambda seen: transform(seen).reprob == 0.3,
    ("balance", "sampler"): lambda seen: seen["batches"].balanced,
    ("recipe", "quick"): REFUSED,  # for its model
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
    ("class_map", "classes.txt"): REFUSED,  # in another order
    ("eval_crop_ratio", 0.5): REFUSED,
    ("reprob", 0.3): lambda seen: seen["batches"].batches.random_erasing.erasing.probability == 0.3,
    ("repeated_aug", ""): lambda seen: type(seen["batches"].draws.numbers).__name__ == "RepeatAugSampler",
    ("balance", "sampler"): lambda seen: seen["batches"].draws.balance is not None,
    ("mix_switch_prob", 0.3): lambda seen: seen["mixup"].switch_prob == 0.3,
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
    ("grad_checkpointing", ""): lambda seen: seen["model"].grad_checkpointing,
}  # fmt: skip


@pytest.fixture(scope="module")
def after_one_epoch(tmp_path_factory):
    """For each script: its `main`, the command line of a run of one epoch, and its folder."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("small", "pictures")}
    common = "--batch_size 64 --lr 1e-3 --ema 0.9 --weight_decay 0.05 --amp off".split()
    small = [*TINY, *common, "--data_set", "DIGITS", "--repeats", "0.5", "--model_path", folders["small"] / "model.pth"]
    pictures = [*STUDENT, *common, "--no-repeated-aug", "--aa", "none", "--output_dir", folders["pictures"]]
    runs = {"small": (cifar_main.main, small), "pictures": (main_distillation.main, pictures)}
    (folders["pictures"] / "classes.txt").write_text("".join(f"{9 - n}\n" for n in range(10)))
    for main, argv in runs.values():
        main([str(arg) for arg in [*argv, "--epochs", "1"]])
    return {name: (*runs[name], folders[name]) for name in runs}


def test_every_flag_of_a_run_is_in_a_table_of_what_it_does_to_a_resumed_one():
    """A new flag: say there what it does, or add it to `run_folder.MAY_DIFFER`."""
    for main, table in ((cifar_main, OF_SMALL_IMAGES), (main_distillation, OF_PICTURES)):
        flags = {action.dest for action in main.get_parser()._actions} - {"help", *run_folder.MAY_DIFFER}
        known, where = {name for name, _ in OF_BOTH | table}, "add it to OF_BOTH, or a table below, or to MAY_DIFFER"
        assert flags - known == set(), f"what does a new flag do to a resumed run? {where}"
        assert known - flags == set(), "tables have flags that no script has; remove them"


@pytest.mark.parametrize(
    ("kind", "flag", "value"),
    [("small", *case) for case in OF_BOTH | OF_SMALL_IMAGES] + [("pictures", *case) for case in OF_BOTH | OF_PICTURES],
)
def test_a_flag_of_a_resumed_run_takes_effect_or_is_refused(kind, flag, value, after_one_epoch, capsys):
    main, argv, folder = after_one_epoch[kind]
    before = {file: file.read_bytes() for file in folder.iterdir() if file.suffix == ".pth"}
    check = (OF_BOTH | (OF_SMALL_IMAGES if kind == "small" else OF_PICTURES))[flag, value]
    more = [
        f"--{flag}",
        *([folder / value] if flag in ("finetune", "teacher_path", "class_map") else [value] * (value != "")),
    ]
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


def test_a_model_with_more_than_the_flags_ask_for_is_refused(tmp_path, capsys):
    argv = [*DIGITS, "--model_path", tmp_path / "m.pth"]
    status, _, err = run(cifar_main.main, [*argv, "--qk_norm", "--rope", "--swiglu"], capsys)
    assert status == 0, err
    saved = load_checkpoint(tmp_path / "m.pth")["model_args"]
    assert saved["qk_norm"] and saved["rope"] and saved["swiglu"]
    for more in ([], ["--epochs", "3", "--resume", "--overwrite"]):
        status, _, err = run(cifar_main.main, [*argv, "--rope", "--qk_norm", *more], capsys)
        assert status == 2 and "swiglu is True" in err and "rope is" not in err and len(err.splitlines()) == 1
