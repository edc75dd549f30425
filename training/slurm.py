"""Jobs of submitit: on a SLURM cluster, or as processes of this machine (pip install submitit)."""

import os
import subprocess
from pathlib import Path

import utils
from utils import BadInput, RunFailed


def executor(folder: Path, cluster, **parameters):
    """submitit's executor, logs in `folder`; `cluster` is 'slurm' or 'local'. Raises BadInput where there is none."""
    try:
        import submitit
    except ImportError:
        raise BadInput("this needs a package: pip install submitit") from None
    try:
        made = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:  # no SLURM here
        raise BadInput(f"--cluster {cluster}: {error}; try --cluster local") from None
    if cluster == "local":  # it does not look whether there are GPUs; it only sets CUDA_VISIBLE_DEVICES
        parameters.pop("gpus_per_node", None)
    # Jobs import this project wherever they start.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")))
    )
    made.update_parameters(slurm_signal_delay_s=120, **parameters)
    return made


def wait(jobs, folder: Path):
    """Wait for the end of `jobs`. Raises RunFailed if one failed."""
    for job in jobs:
        try:
            job.results()
        except Exception:  # submitit's own kinds, around a traceback
            logs = folder / f"{job.job_id}_*_log.err"
            raise RunFailed(f"job {job.job_id} failed; its messages are in {logs}") from None


def say_where(jobs, folder: Path):
    utils.say(f"job {', '.join(job.job_id for job in jobs)}; logs in {folder}")


class Command:
    """A command line as a job of an array; submitit calls `checkpoint` before it stops the job."""

    def __init__(self, command):
        self.command = command

    def __call__(self, more):
        self.process = subprocess.Popen([*self.command, *more])
        if status := self.process.wait():
            raise RuntimeError(f"{Path(self.command[1]).name} failed with status {status}; see its message above")

    def checkpoint(self, more):
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        self.process.wait()  # until its step is saved
        return DelayedSubmission(Command(self.command), more)
