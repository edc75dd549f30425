"""Devices and processes: what utils.py says of a machine."""

import io
import sys

import pytest
import torch

import utils
import visualize_attention
from datasets import Split
from loading.memory import load_data
from runs import run


def test_images_that_fill_the_device(capsys):
    """The advice is not a smaller batch."""

    class Large(torch.Tensor):
        def to(self, *_):
            raise torch.OutOfMemoryError("planted")

    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8).as_subclass(Large)
    status, _, err = run(lambda _: Split(images, torch.zeros(2)).to("cuda"), [[]], capsys)
    assert status == 1 and "2 images" in err and "--input_size" in err and "--batch_size" not in err


@pytest.mark.parametrize(
    ("main", "argv", "word"), [(visualize_attention.main, ["--model_path", "x"], "--input_size takes less")]
)
def test_advice_names_flags_that_the_script_has(monkeypatch, capsys, main, argv, word):
    def fails(_):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(visualize_attention, "visualize", fails)
    status, _, err = run(main, argv, capsys)
    assert status == 1 and word in err and "--batch_size" not in err


@pytest.mark.parametrize(
    "words",
    [
        "MPS backend out of memory (MPS allocated: 9 GB)",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_a_device_without_memory_is_one_line(monkeypatch, capsys, words):
    """Not all of torch's errors for that have a class of their own."""

    def fails(_):
        raise RuntimeError(f"{words}\nmore lines")

    monkeypatch.setattr(visualize_attention, "visualize", fails)
    status, _, err = run(visualize_attention.main, ["--model_path", "x"], capsys)
    assert status == 1 and len(err.splitlines()) == 1 and f"out of memory ({words})" in err


def test_nobody_waits_while_a_folder_is_decoded(monkeypatch, photos, tmp_path):
    """NCCL waits ten minutes for the first process: that is for downloads."""

    def asked(_):
        raise utils.RunFailed("the first process")

    monkeypatch.setattr(utils, "main_decides", asked)
    assert len(load_data("FOLDER", photos, (8, 8), 0).train) == 20
    with pytest.raises(utils.RunFailed):
        load_data("CIFAR10", tmp_path, (32, 32))


def test_others_are_released_when_the_first_process_fails(monkeypatch):
    def refuses():
        raise utils.BadInput("planted")

    released = []
    monkeypatch.setattr(utils.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(utils.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(utils.dist, "broadcast_object_list", released.append)
    with pytest.raises(utils.BadInput, match="planted"):
        utils.main_decides(refuses)
    assert [str(error) for _, error in released] == ["planted"]


def test_a_line_is_printed_by_the_first_process_that_has_it(monkeypatch, tmp_path, capsys):
    for rank in "01":
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        for words in ("the same", f"of rank {rank}"):
            status, _, err = run(utils.ArgumentParser().error, [words], capsys)
            assert status == 2 and bool(err) == (words != "the same" or rank == "0")


def test_one_gpu_for_all_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run(lambda _: utils.pick_device("cuda:1"), [[]], capsys)
    assert status == 2 and "--device cuda" in err and "CUDA_VISIBLE_DEVICES" in err


def test_the_gpu_of_a_process(monkeypatch, capsys):
    """Of two processes the second one takes the second GPU; where srun shows each process its own alone, that one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for count, index in ((2, 1), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert utils.pick_device().index == index
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun shows all of them to each
    status, _, err = run(lambda _: utils.pick_device(), [[]], capsys)
    assert status == 2 and "no GPU 1; they are 0..0, one for each process" in err


def test_a_process_that_fails_does_not_wait_for_its_peers(monkeypatch, capsys):
    """Under NCCL, destroying the group would wait for processes that wait for this one."""
    destroyed = []
    monkeypatch.setattr(utils.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(utils.dist, "destroy_process_group", lambda: destroyed.append(1))

    def fails(_):
        raise utils.RunFailed("planted")

    assert run(fails, [[]], capsys)[0] == 1 and not destroyed
    assert run(lambda _: None, [[]], capsys)[0] == 0 and destroyed


def test_processes_of_a_mac_are_on_the_cpu(monkeypatch):
    """Gloo, which connects them, takes no tensors of MPS."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert utils.pick_device().type == "mps"
    monkeypatch.setenv("RANK", "0")
    assert utils.pick_device().type == "cpu"
    with pytest.raises(utils.BadInput, match="--device mps: there is no mps here; use --device cpu"):
        utils.pick_device("mps")


def test_help_shows_each_default_as_the_command_line_takes_it(capsys):
    parser = utils.ArgumentParser(prog="x")
    for name, default in (("seed", 0), ("blocks", [0, 2]), ("share", (0.9, 0.5)), ("none", None), ("empty", [])):
        parser.add_argument(f"--{name}", default=default, help=f"{name} of it")
    parser.add_argument("--switch", action="store_true", help="on or off")
    words = " ".join(parser.format_help().split())
    assert "seed of it (default: 0)" in words and "blocks of it (default: 0 2)" in words
    assert "share of it (default: 0.9 0.5)" in words and words.count("default") == 3


def test_a_size_that_was_typed_half_is_refused():
    assert utils.image_size("32") == (32, 32) and utils.image_size("32X48") == (32, 48)
    with pytest.raises(utils.argparse.ArgumentTypeError, match="not a whole number"):
        utils.image_size("32x")


def test_a_misspelt_flag_gets_the_one_that_was_meant(capsys):
    parser = utils.ArgumentParser(prog="x")
    parser.add_argument("--layer_num")
    for given, meant in (("--leyer_num=2", True), ("--layer-nun", True), ("--unlike_it", False), ("layer_num", False)):
        status, _, err = run(parser.parse_args, [given], capsys)
        assert status == 2 and ("did you mean --layer_num?" in err) == meant, err


def test_letters_that_the_output_lacks(monkeypatch):
    """Windows writes to a file or a pipe in cp1252; a folder's name may be of other letters."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    utils.say("93 \u00b1 3: \u732b")
    assert out.buffer.getvalue() == b"93 \xb1 3: \\u732b\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as a notebook's
    utils.say("\u732b")
    assert sys.stdout.getvalue() == "\u732b\n"


def test_text_with_bytes_that_are_no_letters(tmp_path):
    """A file's name on Linux may have them."""
    utils.write_text(tmp_path / "a", "\u00e9\udcff")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\\udcff"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("cannot write mode F as PNG"), "cannot write mode F as PNG"),  # Pillow's
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), "is the disk full?"),
        (RuntimeError("of the program itself"), None),
    ],
)
def test_what_cannot_be_written(tmp_path, error, words):
    def write(file):
        file.write(b"half")
        raise error

    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(utils.RunFailed if words else RuntimeError) as failed:
        utils.write_atomically(tmp_path / "a", write)
    line = f"cannot write {tmp_path / 'a'}: {words}; the file that was there is unchanged"
    assert str(failed.value) == (line if words else "of the program itself")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]
