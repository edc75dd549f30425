"""A run ends when its work ends, with the right status: main_distillation.py with worker processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_with_submitit
import utils
from checkpoints.files import load_checkpoint
from conftest import ROOT, STUDENT, TINY, run
from test_processes import torchrun
from training import slurm
from training.run_log import read_json_lines

WORKERS = ["--model", "dynamic_vit_cifar", "--input_size", "32", "--num_workers", "1", *TINY]
SOON = 30  # seconds from the last line to the end of the process: 10 are promised, tests share a slow machine
# A script under another start method of worker processes, which Python 3.14 has as its default.
START = """
if __name__ == "__main__":
    import multiprocessing, runpy, sys
    multiprocessing.set_start_method(sys.argv[1])
    sys.path.insert(0, sys.argv[2])
    sys.argv = ["main_distillation.py", *sys.argv[3:]]
    import main_distillation, utils
    utils.run_script(main_distillation.main)
"""


@pytest.fixture
def start(tmp_path, photos):
    """A function that starts a training with worker processes in a session of its own."""
    script = tmp_path / "start.py"
    script.write_text(START)
    begun = []

    def start(*argv, method="fork", data=photos):
        command = [sys.executable, script, method, ROOT, *WORKERS, "--data_set", "FOLDER", "--data_path", data]
        command += ["--batch_size", "4", "--val_size", "4", "--output_dir", "run", *argv]
        process = subprocess.Popen(
            list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        begun.append(process)
        return process

    yield start
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def read_until(process, words):
    """Lines of its standard output, to the one that begins with `words` or to the last one."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(words):
            break
    return lines


def status_and_errors(process):
    _, errors = process.communicate(timeout=SOON)
    return process.returncode, errors


def children_of(pid):
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:  # it has ended
                continue
            if int(parent) == pid:
                found.append(int(folder.name))
    return sorted(found)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_stopped_then_resumed_to_the_end(start, tmp_path, method):
    """A signal to the whole process group costs no step and no worker; the resumed run ends by itself."""
    process = start(*"--epochs 1000 --val_size 0".split(), method=method)
    read_until(process, "epoch 2/")
    os.killpg(process.pid, signal.SIGTERM)
    status, errors = status_and_errors(process)
    assert status == 128 + signal.SIGTERM and len(errors.splitlines()) == 1, errors
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert saved["step"] > 0
    more = ["--epochs", str(saved["epoch"] + 2), "--val_size", "0", "--resume", "--overwrite"]
    process = start(*more, method=method)
    lines = read_until(process, "Accuracy")
    assert status_and_errors(process) == (0, ""), lines
    assert lines[-1].startswith("Accuracy: top-1")


def test_broken_images_end_the_run(start, tmp_path, photos):
    """One line names all that a batch has."""
    bad = shutil.copytree(photos, tmp_path / "bad")
    broken = [bad / "train" / name for name in ("blue/1.png", "blue/3.png", "red/0.png", "red/2.png", "red/5.png")]
    for file in broken:
        file.write_bytes(file.read_bytes()[:60])
    process = start(*"--epochs 2 --batch_size 18 --val_size 2 --no-repeated-aug".split(), data=bad)
    read_until(process, "no such line")
    status, errors = status_and_errors(process)
    assert status == 2 and len(errors.splitlines()) == 1 and "Traceback" not in errors, errors
    assert sum(str(file) in errors for file in broken) >= 3 and errors.count("error:") == 1


def test_a_killed_worker_ends_the_run(start):
    process = start("--epochs", "1000")
    read_until(process, "epoch 1/")
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    status, errors = status_and_errors(process)
    assert status == 1 and len(errors.splitlines()) == 1, errors
    assert "a worker process ended" in errors and "--num_workers" in errors


def test_broken_images_end_all_processes(tmp_path, photos):
    """Each of two processes meets them, in the test after the training: what both refuse is printed once."""
    bad = shutil.copytree(photos, tmp_path / "bad")
    for file in (bad / "test").rglob("*.png"):
        file.write_bytes(b"broken")
    argv = [*WORKERS, "--data_set", "FOLDER", "--data_path", bad, "--batch_size", "4", "--val_size", "4"]
    done = torchrun(2, "main_distillation.py", *argv, *"--epochs 1 --max_steps 1".split(), cwd=tmp_path, status=1)
    printed = [line for line in done.stderr.splitlines() if line.startswith("main_distillation.py")]
    assert len(printed) == len(set(printed)) and all("cannot read" in line for line in printed), done.stderr
    assert "BadInput" not in done.stderr


def test_a_preempted_job_saves_is_requeued_and_resumes(tmp_path):
    """submitit's signal reaches two tasks in training, as SLURM sends it."""
    pytest.importorskip("submitit")
    executor = slurm.executor(tmp_path / "submitit", "local", tasks_per_node=2, timeout_min=10)
    argv = [*STUDENT, *"--epochs 6 --batch_size 8 --no_aug".split()]
    job = executor.submit(run_with_submitit.Task(tmp_path / "job", argv))
    log, end = tmp_path / "job" / "log.txt", time.monotonic() + 120
    while not (log.exists() and any("epoch" in record for record in read_json_lines(log))):
        assert time.monotonic() < end and job.state != "FINISHED", job.stderr()
        time.sleep(0.02)
    for task in children_of(int(job.job_id)):
        os.kill(task, signal.SIGUSR2)
    assert job.results() == [None, None]
    assert "stopped by SIGUSR2" in job.stderr() and "this job is" in job.stdout()
    assert "resuming after epoch" in job.stdout() and "Accuracy: top-1" in job.stdout()
    epochs = [record["epoch"] for record in read_json_lines(log) if "epoch" in record]
    assert epochs == [1, 2, 3, 4, 5, 6]


def test_one_gpu_for_all_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run(lambda _: utils.pick_device("cuda:1"), [[]], capsys)
    assert status == 2 and "--device cuda" in err and "CUDA_VISIBLE_DEVICES" in err


def test_a_process_that_fails_does_not_wait_for_its_peers(monkeypatch, capsys):
    """Under NCCL, destroying the group would wait for processes that wait for this one."""
    destroyed = []
    monkeypatch.setattr(utils.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(utils.dist, "destroy_process_group", lambda: destroyed.append(1))

    def fails(_):
        raise utils.RunFailed("planted")

    assert run(fails, [[]], capsys)[0] == 1 and not destroyed
    assert run(lambda _: None, [[]], capsys)[0] == 0 and destroyed
