"""Runs that are killed, stopped, starved of disk, started twice or fed with numbers that are none.

The same faults in large numbers: make faults (tests/faults/).
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import cifar_main
import cifar_train
import datasets
import engine
import faults
import main_distillation
import utils
import visualize_attention
from checkpoints.files import load_checkpoint, save_checkpoint
from conftest import ROOT, STUDENT, noise, run, tiny
from engine import NotFinite, TrainingStep, train_one_epoch
from forked import TINY, Faults, differences, light_curves
from loading.memory import CHUNK, MemoryLoader, TrainTransform
from training import loop, run_folder, run_log
from training.run_log import read_json_lines
from training.state import TrainingState

DIGITS = [*TINY, "--epochs", "2"]


class Still:
    """A scheduler that leaves the rate alone."""

    def step_update(self, step):
        pass


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """How the run of `TINY` ends if nothing happens to it."""
    return faults.undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Curves are not drawn; what --deterministic switched on is off again after the test."""
    monkeypatch.setattr(run_log, "plot_curves", lambda *_: None)
    yield
    torch.use_deterministic_algorithms(False)


# Kills, signals, disks --------------------------------------------------------------------------------------------


def whole(row):
    assert row.survived == row.injected > 0, row


def test_killed_at_random_moments(tmp_path):
    whole(faults.soak(tmp_path, 4, seed=1))


@pytest.mark.parametrize(("how", "each"), [("kill", 31), (errno.ENOSPC, 61)])
def test_killed_or_refused_while_writing(tmp_path, how, each):
    whole(faults.at_every_write(tmp_path, how, each))


def test_sigterm_of_a_process(tmp_path, expected):
    """Status 128 + the number, a whole checkpoint in the middle of an epoch, and the same end."""
    whole(faults.a_signal(tmp_path, signal.SIGTERM, expected))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_signals(tmp_path, expected, number):
    def before():
        light_curves()
        work, calls = loop.TrainingState.checkpoint, []

        def checkpoint(state):
            calls.append(1)
            if len(calls) == 2:  # while it saves step 4: the step after it is taken, then the run ends
                os.kill(os.getpid(), number)
            return work(state)

        loop.TrainingState.checkpoint = checkpoint

    status, out, err = faults.run([*TINY, "--model_path", tmp_path / "model.pth"], before=before)
    assert status == 128 + number and "epoch 0, and 5 batches" in err and "--resume resumes it" in err, out + err
    assert faults.go_on(tmp_path, TINY, expected) == []


@pytest.mark.parametrize(
    ("main", "more"),
    [
        (visualize_attention.main, ["--layer_num", "2"]), (visualize_attention.main, ["--format", "html"]),
    ],
)  # fmt: skip
def test_what_looks_at_models_writes_whole_files_or_none(trained, tmp_path, main, more):
    """A full disk at each third of what is written: one line with a path, nothing half written."""
    argv, log = ["--model_path", trained / "model.pth", "--device", "cpu", *more, "--output_dir"], tmp_path / "actions"
    assert faults.run([*argv, tmp_path / "all"], main, Faults(tmp_path / "all", log=log))[0] == 0
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "all").iterdir()}
    count = len(log.read_text().splitlines())
    for at in range(1, count, -(-count // 3)):
        folder = tmp_path / str(at)
        status, out, err = faults.run([*argv, folder], main, Faults(folder, at, errno.ENOSPC))
        if status:
            assert status in (1, 2) and len(err.splitlines()) == 1 and str(folder) in err, out + err
            assert "No space left on device" in err
        for file in folder.iterdir() if folder.exists() else ():
            assert abs(file.stat().st_size - sizes[file.name]) < 200, file  # but for dates


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    code = "import time, signal, os; from training.signals import StopSignals\n"
    code += "with StopSignals():\n os.kill(os.getpid(), 2); print('noted'); os.kill(os.getpid(), 2); print('never')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (130, "") or (done.returncode, done.stdout.strip()) == (
        130,
        "noted",
    )
    assert "the last checkpoint is whole" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_in_validation_ends_the_run_before_the_next_epoch(tmp_path, expected):
    """The epoch is not trained again: it is validated when the run is resumed."""

    def before():
        light_curves()
        work = loop.evaluate

        def evaluate(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return work(*args, **kwargs)

        loop.evaluate = evaluate

    status, out, err = faults.run([*TINY, "--model_path", tmp_path / "model.pth"], before=before)
    assert status == 143 and "epoch 1/3" not in out and "epoch 0, and 10 batches" in err, out + err
    assert faults.go_on(tmp_path, TINY, expected) == []


def test_torchrun_starts_killed_processes_again(tmp_path):
    whole(faults.ranks(tmp_path, 2, (1, 5)))


def test_one_process_told_to_stop_stops_all(tmp_path):
    """Both save the same step; the run resumes in as many processes, not in another number of them."""
    argv = [
        *TINY,
        "--batch_size",
        "32",
        "--epochs",
        "50",
        "--save_steps",
        "1000",
        "--model_path",
        tmp_path / "model.pth",
    ]
    process = faults.started(*argv, processes=2)
    faults.until_epoch(process, 1)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    start = time.monotonic()
    os.kill(int(ranks[1]), signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - start < 60
    assert err.count("stopped by SIGTERM") >= 2 and "exitcode  : 143" in err
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth")
    assert checkpoint["batch"] > 0 and len(checkpoint["processes"]) == 2
    status, _, err = faults.run([*argv, "--resume"])
    assert status == 2 and "processes was 2, is now 1" in err


def test_the_newest_checkpoint_is_damaged(tmp_path, expected):
    whole(faults.damaged_newest(tmp_path, expected, shares=(0, 5, 9)))


def test_no_checkpoint_is_whole(tmp_path, capsys):
    for name in ("checkpoint.pth", "checkpoint_1.pth"):
        (tmp_path / name).write_bytes(b"nothing")
    status, out, err = run(cifar_main.main, [*DIGITS, "--model_path", tmp_path / "m.pth", "--resume"], capsys)
    assert status == 2 and "is whole; --overwrite trains anew" in err
    assert "checkpoint.damaged now, and checkpoint_1.pth is tried" in out
    assert "checkpoint_1.damaged now\n" in out  # there is none before it


# Checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_rotate(tmp_path):
    for n in range(5):
        run_folder.save(tmp_path, {"n": n}, keep=3)
    run_folder.save(tmp_path, {"n": 5}, keep=2)
    names = [file.name for file in run_folder.checkpoints(tmp_path)]
    assert names == ["checkpoint.pth", "checkpoint_1.pth"]
    assert [load_checkpoint(tmp_path / name)["n"] for name in names] == [5, 4]
    (tmp_path / "checkpoint_x.pth").write_text("somebody's")
    (tmp_path / "checkpoint_10.pth").write_text("old")
    (tmp_path / "checkpoint_9.pth").write_text("old")
    assert [file.name for file in run_folder.checkpoints(tmp_path)][2:] == ["checkpoint_9.pth", "checkpoint_10.pth"]


def test_other_flags_are_another_run(tmp_path, capsys):
    argv = [*DIGITS, "--epochs", "1", "--model_path", tmp_path / "a" / "m.pth"]
    assert run(cifar_main.main, argv, capsys)[0] == 0
    before = {f: f.read_bytes() for f in (tmp_path / "a").iterdir()}
    status, _, err = run(cifar_main.main, [*argv, "--resume", "--lr", "1e-3"], capsys)
    assert status == 2 and "--lr was 0.002, is now 0.001" in err and "--overwrite resumes with these" in err
    assert before == {f: f.read_bytes() for f in (tmp_path / "a").iterdir()}
    status, out, err = run(cifar_main.main, [*argv, "--resume", "--epochs", "2"], capsys)  # longer, and said
    assert status == 0 and "--epochs was 1, is now 2" in out, err
    elsewhere = [*argv, "--resume", tmp_path / "a" / "checkpoint.pth", "--lr", "1e-3", "--epochs", "3"]
    status, out, err = run(cifar_main.main, [*elsewhere, "--model_path", tmp_path / "b" / "m.pth"], capsys)
    assert status == 0 and "--lr was 0.002, is now 0.001" in out, err
    log = read_json_lines(tmp_path / "b" / "log.txt")
    assert log[0]["args"]["lr"] == 1e-3 and [r["epoch"] for r in log[1:]] == [2, 3]


def test_overwriting_leaves_nothing_to_go_on_from(tmp_path, capsys):
    """A run that is killed before its first checkpoint must not go on with the one that it was to replace."""
    argv = [*DIGITS, "--model_path", tmp_path / "m.pth"]
    assert run(cifar_main.main, argv, capsys)[0] == 0

    def dies(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    status, _, _ = faults.run([*argv, "--overwrite"], before=lambda: setattr(loop, "train_one_epoch", dies))
    assert status == 137
    assert not run_folder.checkpoints(tmp_path) and not (tmp_path / "m.pth").exists()


def test_data_that_changed(photos, tmp_path, capsys):
    """Another number of images, or other classes."""
    import shutil

    data = shutil.copytree(photos, tmp_path / "data")
    argv = [*TINY, "--data_set", "FOLDER", "--data_path", data, "--epochs", "1", "--batch_size", "4"]
    argv += ["--model_path", tmp_path / "m" / "m.pth"]
    assert run(cifar_main.main, argv, capsys)[0] == 0
    (data / "test" / "red" / "0.png").unlink()
    argv_eval = ["--eval", "--device", "cpu", "--model_path", tmp_path / "m" / "m.pth"]
    status, out, err = run(cifar_main.main, argv_eval, capsys)
    assert status == 0 and "note: 5 test images are here, 6 were there" in out, err
    (data / "train" / "red" / "0.png").unlink()
    status, _, err = run(cifar_main.main, [*argv, "--resume"], capsys)
    assert status == 2 and "the data of" in err and "'train': 17" in err


def test_a_checkpoint_with_anything_wrong_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    """Each part of one from the middle of an epoch, and the parts of those, missing or of another kind."""
    argv = [*DIGITS, "--save_steps", "3", "--model_path", tmp_path / "a" / "m.pth"]

    def stop(state):
        save(state)
        raise utils.RunFailed("planted")

    save = TrainingState.save
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", stop)
        assert run(cifar_main.main, argv, capsys)[0] == 1
    good = load_checkpoint(tmp_path / "a" / "checkpoint.pth")
    assert good["batch"] == 3

    def reached(*_):
        raise SystemExit(0)

    monkeypatch.setattr(loop, "wrap", reached)
    argv = [*argv, "--model_path", tmp_path / "b" / "m.pth", "--resume", tmp_path / "c.pth"]

    def resumed(checkpoint):
        save_checkpoint(tmp_path / "c.pth", checkpoint)
        status, _, err = run(cifar_main.main, argv, capsys)
        assert (status, err) == (0, "") or (status == 2 and len(err.splitlines()) == 1 and "c.pth" in err), err
        return status

    assert resumed(good) == 0
    refused = set()
    for value in ("x", 2**70):
        for name in good:
            if resumed({**good, name: value}) == 2:
                refused.add(name)
        for part in good["processes"][0]:
            resumed({**good, "processes": [{**good["processes"][0], part: value}]})
    for name in good:
        resumed({key: part for key, part in good.items() if key != name})
    assert refused >= good.keys() - {"scaler"}  # which is not used without float16
    assert not (tmp_path / "b" / "log.txt").exists()


# One run a folder -------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused(tmp_path, capsys):
    process = faults.started(*TINY, "--epochs", "500", "--model_path", tmp_path / "model.pth")
    try:
        faults.until_epoch(process, 1)
        for more in ([], ["--resume"], ["--overwrite"]):
            argv = [*TINY, "--epochs", "500", "--output_dir", tmp_path, "--model_path", tmp_path / "other.pth", *more]
            status, _, err = run(cifar_main.main, argv, capsys)
            assert status == 2 and f"process {process.pid} on {socket.gethostname()}" in err, err
    finally:
        process.kill()
        process.communicate()
    argv = [*TINY, "--epochs", "500", "--model_path", tmp_path / "model.pth", "--resume", "--max_steps", "1"]
    status, out, err = run(cifar_main.main, [*argv, "--overwrite"], capsys)
    assert (
        status == 0 and f"process {process.pid} on {socket.gethostname()}" in out and "removing its stale lock" in out
    ), err
    assert not {"lock", "running.json"} & {file.name for file in tmp_path.iterdir()}


def test_the_best_model_elsewhere_is_locked_too(tmp_path):
    best = tmp_path / "models" / "best.pth"
    best.parent.mkdir()

    def hold(folder, path):
        """In another process."""

        def main(_):
            with run_folder.locked(tmp_path / folder, best.with_name(path)):
                pass

        return faults.run([], main)

    with run_folder.locked(tmp_path / "a", best):
        assert hold("b", "best.pth")[0] == 2 and f"process {os.getpid()} on" in hold("b", "best.pth")[2]
        assert hold("a", "other.pth")[0] == 2
        assert hold("b", "other.pth")[0] == 0
        with run_folder.locked(tmp_path / "a"):  # by the same process, as a sweep does
            pass
    with run_folder.locked(tmp_path / "b", best):
        pass
    assert [file.name for file in best.parent.iterdir()] == []


# Numbers ----------------------------------------------------------------------------------------------------------


def batches_with(model, *bad, count=5):
    """Batches of noise; those with the numbers `bad` are not finite."""
    images, labels = noise(model), torch.tensor([0, 1])
    return [(images * float("nan") if i in bad else images + i, labels) for i in range(count)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1), Still()


def test_the_batch_that_was_not_finite_is_told_and_its_step_not_taken():
    model, good = tiny(), tiny()
    criterion = torch.nn.CrossEntropyLoss()
    with pytest.raises(
        NotFinite, match=r"the loss is nan in batch 2 \(step 2\), norm of the gradient nan, .* 0\.1"
    ) as error:
        train_one_epoch(TrainingStep(model, criterion, *sgd(model)), batches_with(model, 2))
    assert error.value.batch["batch"] == 2 and error.value.batch["images"].isnan().all()
    train_one_epoch(TrainingStep(good, criterion, *sgd(good)), batches_with(good)[:2])
    assert differences(model.state_dict(), good.state_dict()) == []


def test_a_gradient_that_is_not_finite_though_the_loss_is():
    model = tiny()
    model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFinite, match=r"the loss is \d.* in batch 0 .*, norm of the gradient (inf|nan)"):
        train_one_epoch(TrainingStep(model, torch.nn.CrossEntropyLoss(), *sgd(model)), batches_with(model))


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_bad_steps_are_left_out(accum_steps):
    """As if their batches had not been there."""
    model, good = tiny(), tiny()
    criterion, seen = torch.nn.CrossEntropyLoss(), []
    report = train_one_epoch(
        TrainingStep(model, criterion, *sgd(model), accum_steps), batches_with(model, 1, count=6), skip_bad=2,
        on_step=lambda step, _: seen.append(step),
    )  # fmt: skip
    assert report["skipped"] == 1 and report["step"] == 6 // accum_steps
    assert seen == ([1, 3, 4, 5, 6] if accum_steps == 1 else [2, 3])
    rest = batches_with(good, count=6)
    del rest[1 if accum_steps == 1 else slice(0, 2)]
    fewer = train_one_epoch(TrainingStep(good, criterion, *sgd(good), accum_steps), rest)
    assert differences(model.state_dict(), good.state_dict()) == [] and report["loss"] == fewer["loss"]
    with pytest.raises(NotFinite):
        train_one_epoch(TrainingStep(tiny(), criterion, *sgd(model)), batches_with(model, 1, 2, 3), skip_bad=2)


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
    watch = engine._Watch("", sgd(tiny())[0], skip_bad=0)
    about = (3, [(3, 1, torch.tensor(float("nan")))], torch.tensor(1.0), 0.1)
    answers = [Late(100) for _ in range(engine.LAG)]
    for answer in answers:
        watch.waiting.append((torch.tensor(False), answer, about))
        watch._look(engine.LAG)
    assert len(watch.waiting) == engine.LAG and not any(answer.waited for answer in answers)
    watch.waiting.append((torch.tensor(True), Late(0), about))
    watch._look(engine.LAG)
    assert answers[0].waited and not answers[1].waited
    with pytest.raises(NotFinite, match="batch 3"):
        watch.finish()


def never_answers(monkeypatch):
    """A CPU that is as a GPU far behind: whether steps were finite is known when the epoch ends."""
    look = engine._Watch._look
    monkeypatch.setattr(engine._Watch, "_look", lambda watch, lag: look(watch, lag) if lag == 0 else None)
    monkeypatch.setattr(engine._Watch, "sees", lambda watch, *batch: setattr(watch, "batch", batch))


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

    train_one_epoch(TrainingStep(model, torch.nn.CrossEntropyLoss(), *sgd(model), accum_steps), Batches())
    assert max(kept) == 1


def test_an_older_batch_that_was_not_finite_is_reported_in_numbers(tmp_path, monkeypatch, capsys):
    never_answers(monkeypatch)
    with pytest.raises(NotFinite, match=r"the loss is nan in batch 2 \(step 2\)") as error:
        train_one_epoch(TrainingStep(tiny(), torch.nn.CrossEntropyLoss(), *sgd(tiny())), batches_with(tiny(), 2))
    assert "images" not in error.value.batch and error.value.batch["batch"] == 2
    with pytest.raises(NotFinite) as error:  # the newest one
        train_one_epoch(TrainingStep(tiny(), torch.nn.CrossEntropyLoss(), *sgd(tiny())), batches_with(tiny(), 4))
    assert error.value.batch["images"].isnan().all()
    planted(monkeypatch, 3)
    argv = [*DIGITS, "--mixup", "0", "--cutmix", "0", "--model_path", tmp_path / "m.pth", "--save_steps", "100"]
    status, _, err = run(cifar_main.main, argv, capsys)
    path = tmp_path / "bad_batch_step3_process0.pth"
    assert status == 1 and f"{path} has its numbers (a GPU keeps only the newest batch), " in err, err
    assert load_checkpoint(path)["lr"] > 0


def test_a_bad_batch_in_the_middle_of_a_group_is_kept_on_a_cpu():
    for bad in (4, 5, 6):
        with pytest.raises(NotFinite, match=rf"in batch {bad} \(step 1\)") as error:
            train_one_epoch(
                TrainingStep(tiny(), torch.nn.CrossEntropyLoss(), *sgd(tiny()), accum_steps=4),
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
    argv = [*DIGITS, "--mixup", "0", "--cutmix", "0", "--model_path", tmp_path / "m.pth"]
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


# Going on in the middle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 5, 9, 10])
def test_a_loader_begins_anywhere(first, monkeypatch):

    monkeypatch.setitem(CHUNK, "cpu", 3 * 16 * 16 * 12)  # three batches of four images in a piece
    split = datasets.Split(torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8), torch.arange(40))
    data = {"input_size": (16, 16), "mean": [0.5] * 3, "std": [0.2] * 3}
    loader = MemoryLoader(split, data, 4, TrainTransform(data), seed=3)
    loader.set_epoch(2)
    batches = list(loader)
    loader.set_epoch(2, first)
    rest = list(loader)
    assert len(loader) == len(batches) == 10 and len(rest) == 10 - first
    assert differences(rest, batches[first:]) == []


def test_pictures_go_on_in_the_middle_of_an_epoch_whatever_the_workers(tmp_path, capsys):
    """RandAugment, repeated augmentation, erasing, Mixup, the distillation script: killed after step 7 of 11."""
    argv = [
        *STUDENT,
        "--epochs",
        "2",
        "--save_steps",
        "7",
        "--batch_size",
        "32",
        "--max_steps",
        "20",
        "--deterministic",
    ]

    def go(folder, *more, dies=False):
        def before():
            light_curves()
            if dies:
                save = run_folder.save

                def last(*args):
                    save(*args)
                    os.kill(os.getpid(), signal.SIGKILL)

                run_folder.save = last

        status, out, err = faults.run([*argv, "--output_dir", folder, *more], main_distillation.main, before)
        assert status == (137 if dies else 0), out + err
        return out

    go(tmp_path / "whole")
    go(tmp_path / "cut", "--num_workers", "2", dies=True)
    assert "and 7 batches" in go(tmp_path / "cut", "--num_workers", "1", "--resume")
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "cut"))
    for key in ("model", "optimizer", "step", "epoch"):
        assert differences(one[key], other[key]) == [], key
    assert differences(*([p["random"] for p in c["processes"]] for c in (one, other))) == []


def test_the_same_command_twice_has_the_same_log_and_weights(tmp_path, expected):
    assert differences(expected, faults.undisturbed(tmp_path)) == []


# Logs -------------------------------------------------------------------------------------------------------------


def test_a_log_is_mended(tmp_path):
    """A half line, bytes that are none, an epoch that the checkpoint does not know, one that is not written yet."""
    header, log = {"args": {"lr": 1}}, tmp_path / "log.txt"
    lines = [json.dumps(record).encode() for record in (header, {"epoch": 1, "a": 1}, {"epoch": 2}, {"epoch": 3})]
    log.write_bytes(b"\n".join([lines[0], lines[1], b"\xff\xfe{}", b"17", lines[3], b'{"epoch": 4, "tr']))
    run_folder.resume_log(tmp_path, header, 2, {"epoch": 2, "b": 2})
    records = read_json_lines(log)
    assert records == [header | {"job": None}, {"epoch": 1, "a": 1}, {"epoch": 2, "b": 2}]
    assert log.read_text().count("\n") == 3


def test_no_flag_of_a_run_is_forgotten_by_the_comparison():
    """What may differ between a run and its continuation is listed, and is a flag of one of the scripts."""
    known = {
        action.dest
        for parser in (cifar_main.get_parser(), main_distillation.get_parser())
        for action in parser._actions
    }
    assert set(run_folder.MAY_DIFFER) | set(run_folder.MAY_GROW) <= known
    assert {"lr", "seed", "batch_size", "mixup", "amp", "max_steps", "skip_bad_steps"} <= known - set(
        run_folder.MAY_DIFFER
    )
