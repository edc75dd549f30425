"""Run main_distillation.py on a SLURM cluster, one process for each GPU (pip install submitit).

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --job_dir jobs/late --recipe deit3 --cls_pos 6

Flags that are not listed in --help go to main_distillation.py, whose --output_dir is --job_dir. A job that SLURM stops
at its time limit, or to make room, saves in the middle of its epoch, is requeued and resumes there.
"""

import runpy
import signal
import sys
from pathlib import Path

import utils
from training import run_folder, slurm
from utils import number

SCRIPT = Path(__file__).with_name("main_distillation.py")


class Task:
    """What every process of the job does; submitit calls `checkpoint` when the job is about to be stopped."""

    def __init__(self, job_dir, argv):
        self.job_dir, self.argv = job_dir, argv

    def __call__(self):
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        resume = ["--resume"] if run_folder.checkpoints(self.job_dir) else []
        sys.path.insert(0, str(SCRIPT.parent))
        sys.argv = [str(SCRIPT), "--distributed", *self.argv, "--output_dir", str(self.job_dir), *resume]
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            if end.code in (1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM):
                raise RuntimeError(f"{SCRIPT.name} ended with status {end.code}; its message is above") from None
            if end.code in (128 + signal.SIGUSR1, 128 + signal.SIGUSR2):
                # The run has answered submitit's signal and is saved. Now submitit answers it, too: the first process
                # requeues the job and exits. The others exit without a result, and without a status that ends the job.
                signal.raise_signal(end.code - 128)
                sys.exit(0)
            raise  # submitit's own, while the run was not training

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def main(argv=None):
    parser = utils.ArgumentParser(description="Submit main_distillation.py to SLURM; other flags are passed on to it.")
    parser.add_argument("--job_dir", required=True, help="a folder of its own, that all nodes see: checkpoints, logs")
    parser.add_argument("--nodes", type=number(int, 1), default=1, help="machines")
    parser.add_argument("--ngpus", type=number(int, 1), default=8, help="GPUs, and so processes, on each node")
    parser.add_argument("--cpus", type=number(int, 1), default=10, help="CPU cores for each process")
    parser.add_argument("--timeout", type=number(int, 1), default=4320, help="minutes")
    parser.add_argument("--partition", help="of the cluster")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="local: on this machine")
    parser.add_argument("--wait", action="store_true", help="wait for the end, and fail if the job did")
    args, passed_on = parser.parse_known_args(argv)
    job_dir = utils.writable_folder(args.job_dir).resolve()
    logs = job_dir / "submitit"
    executor = slurm.executor(
        logs, args.cluster, name="late-tokens", nodes=args.nodes, tasks_per_node=args.ngpus, cpus_per_task=args.cpus,
        gpus_per_node=args.ngpus, timeout_min=args.timeout, slurm_partition=args.partition,
    )  # fmt: skip
    jobs = [executor.submit(Task(job_dir, passed_on))]
    slurm.say_where(jobs, logs)
    if args.wait:
        slurm.wait(jobs, logs)


if __name__ == "__main__":
    utils.run_script(main)
