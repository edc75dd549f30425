"""Started by torchrun from test_processes.py: several runs in one job, since starting processes takes longest.

    torchrun --nproc_per_node=2 processes.py JOBS.json

JOBS.json is a list of {"argv": [...]} (a run of main_distillation), {"score": FILE, "to": FILE} (the exact figures of a
checkpoint's test) and {"die": "kill" or "raise"}, after which rank 1 dies in the first epoch of the run that follows.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import main_distillation
import utils
from checkpoints.models import load_model
from training import loop
from training.scoring import score


def dies(how):
    def train_one_epoch(*args, **kwargs):
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("planted in rank 1")

    return train_one_epoch


def main():
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "argv" in job:
            main_distillation.main(job["argv"])
        elif "score" in job:
            utils.init_distributed(torch.device("cpu"))
            model, checkpoint = load_model(job["score"])
            figures, _ = score(model, checkpoint, None, torch.device("cpu"), batch_size=2)
            if utils.is_main():
                Path(job["to"]).write_text(json.dumps(figures))
        elif os.environ["RANK"] == "1":
            loop.train_one_epoch = dies(job["die"])


if __name__ == "__main__":
    utils.run_script(main)
