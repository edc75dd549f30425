"""Started by torchrun: a run of cifar_main.py, one process of which is killed once; torchrun then starts all again.

torchrun --nproc_per_node=2 --max-restarts=1 rank_dies.py RANK STEP FLAGS...      (RANK -1: none is killed)
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import cifar_main
import utils
from training import signals


def main(rank, step, *argv):
    torch.set_num_threads(1)
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (rank, "0"):
        agreed, calls = signals.StopSignals.agreed, []

        def dies(stop, wait=False):
            calls.append(1)
            if len(calls) == int(step):
                os.kill(os.getpid(), signal.SIGKILL)
            return agreed(stop, wait)

        signals.StopSignals.agreed = dies
    cifar_main.main(list(argv))


if __name__ == "__main__":
    utils.run_script(main, *sys.argv[1:])
