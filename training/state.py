"""All that a run has to remember, in memory and in a checkpoint, so that a resumed run is one that never stopped."""

import random
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

import utils
from checkpoints.files import load_checkpoint
from checkpoints.schema import first_wrong, state_schema
from training import run_folder
from training.run_log import plain_args, selection_key
from utils import BadInput, say

WHOLE_TENSORS = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of FSDP, in the first process only


def weights_of(model) -> dict:
    """The model's state dict; all processes of FSDP have a part in it, and the first one gets it."""
    return get_model_state_dict(model, options=WHOLE_TENSORS) if isinstance(model, FSDPModule) else model.state_dict()


def load_weights_of(model, weights: dict):
    """Put a state dict, which every process has, into a model or its shares."""
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, dict(weights), options=WHOLE_TENSORS)
    else:
        model.load_state_dict(weights)


class TrainingState:
    """Counts, the best so far, and the parts that training changes.

    `epoch` whole epochs are done, `step` steps, `batch` batches of the epoch after those, whose progress so far is
    `sums` (see `engine.train_one_epoch`), and `skipped` steps of earlier epochs were left out. `metrics` are the last
    epoch's, `best` those of the saved weights.
    """

    def __init__(self, model, optimizer, scaler, ema, description, args):
        self.model, self.optimizer, self.scaler, self.ema = model, optimizer, scaler, ema
        self.description, self.args = description, args
        self.epoch = self.step = self.batch = self.skipped = 0
        self.sums = self.metrics = self.best = None
        self.kept = "nothing was saved"  # in words

    def about(self) -> dict:
        """What every checkpoint has beside the weights."""
        return {
            "model_args": self.model.model_args, "data": self.description, "args": plain_args(self.args),
            "epoch": self.epoch, "metrics": self.metrics,
        }  # fmt: skip

    def checkpoint(self) -> dict:
        """To resume from. All processes have a part in it; with FSDP, only the first one has the tensors."""
        return {  # the model first: FSDP's is in its shares afterwards, as its optimizer wants it, also in a validation
            "model": weights_of(self.model), **self.about(), "best": self.best, "step": self.step,
            "batch": self.batch, "skipped": self.skipped, "optimizer": self._optimizer_state(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema": weights_of(self.ema.module) if self.ema else None,
            "processes": utils.gather({"random": random_states(), "sums": self.sums}),
        }  # fmt: skip

    def end_epoch(self, metrics, skipped, last_is_best) -> bool:
        """Count an epoch. Returns whether its weights are the best so far, and so to be saved."""
        self.epoch, self.batch, self.sums, self.metrics = metrics["epoch"], 0, None, metrics
        self.skipped += skipped
        if self.best is None or last_is_best or selection_key(metrics) > selection_key(self.best):
            self.best = metrics
        return self.best is metrics

    def save(self):
        """Write the newest checkpoint of the run's folder."""
        checkpoint = self.checkpoint()
        if utils.is_main():
            run_folder.save(self.args.output_dir, checkpoint, self.args.keep)
        self.kept = self._words(Path(self.args.output_dir) / run_folder.NEWEST)

    def _words(self, path) -> str:
        return f"{path} holds the weights of epoch {self.epoch}{f', and {self.batch} batches' * bool(self.batch)}"

    def restore(self, path):
        """Put everything back as it was when the checkpoint was written.

        Raises BadInput for one that is no such thing, damaged, or of another model, other data or another run.
        """
        saved = load_checkpoint(path)
        if "optimizer" not in saved or "model_args" not in saved:
            raise BadInput(f"{path} cannot be resumed from: it has no optimizer state; give the run's checkpoint.pth")
        if "processes" not in saved:
            raise BadInput(f"{path} cannot be resumed from: an earlier revision of this project wrote it")
        try:
            # Also what is not used at once, so that nothing is met later that training would not have written.
            if wrong := first_wrong(saved, state_schema(bool(self.description["images"]["val"]))):
                raise ValueError(f"{wrong} is missing or wrong")
            self._check(path, saved)
            self._restore(path, saved)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if "out of memory" in str(error):  # of a GPU
                raise
            raise BadInput(f"{path} is damaged ({type(error).__name__}: {error}); give another checkpoint") from None
        self.kept = self._words(path)
        if self.epoch >= self.args.epochs:
            say(f"{path} has all {self.epoch} epochs; a larger --epochs resumes it")
        else:
            say(f"resuming after epoch {self.epoch}{f' and {self.batch} batches' * bool(self.batch)} of {path}")

    def _check(self, path, saved):
        for what, there, here in (
            ("model", saved["model_args"], self.model.model_args),
            ("data", saved["data"], self.description),
            ("--ema", {"ema": bool(saved["ema"])}, {"ema": bool(self.ema)}),
        ):
            names = here | there  # what is off in one of the two is missing there
            names.pop("class_map", None)  # True in old checkpoints; the classes that it chose are compared
            other = [f"{k} is {there.get(k)} there, {here.get(k)} here" for k in names if there.get(k) != here.get(k)]
            if other:
                raise BadInput(f"the {what} of {path} differs: {'; '.join(other)}; give the same flags")
        run_folder.check_same_run(path, saved, self.args)

    def _restore(self, path, saved):
        load_weights_of(self.model, saved["model"])
        self._restore_optimizer(path, saved)
        if self.scaler is not None and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            load_weights_of(self.ema.module, saved["ema"])
        for name in ("epoch", "step", "batch", "skipped", "metrics", "best"):
            setattr(self, name, saved[name])
        if len(saved["processes"]) == utils.world_size() and saved["args"].get("seed") == self.args.seed:
            mine = saved["processes"][utils.rank()]
            self.sums = mine["sums"]
            set_random_states(mine["random"])

    def _restore_optimizer(self, path, saved):
        """Its state, with its groups as the flags are now; no state where that is of another optimizer."""
        there, here = saved["args"], plain_args(self.args)
        decide = ("opt", "attn_only", "finetune", "layer_decay")
        changed = [name for name in decide if there.get(name) != here.get(name)]
        old, groups = saved["optimizer"]["param_groups"], self.optimizer.state_dict()["param_groups"]
        other = [len(group["params"]) for group in old] != [len(group["params"]) for group in groups]
        if "opt" in changed or (other and changed):
            say(f"note: --{changed[0]} was {there.get(changed[0])}: the optimizer begins with a fresh state")
            return
        if other:
            raise BadInput(f"{path} cannot be resumed from: an earlier revision of this project wrote its optimizer")
        # Of the rest some, like Lookahead's steps, is state; the rate is set before each step.
        flagged = ("initial_lr", "lr_scale", "weight_decay", "fused")
        groups = [was | {key: now[key] for key in flagged if key in now} for was, now in zip(old, groups)]
        self._load_optimizer(saved["optimizer"] | {"param_groups": groups})

    def _optimizer_state(self) -> dict:
        """The optimizer's state dict, whose parameters are numbers; torch's functions for FSDP have names there."""
        if not isinstance(self.model, FSDPModule):
            return self.optimizer.state_dict()
        named = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE_TENSORS).get("state", {})
        state = {i: named[name] for i, name in enumerate(self._parameters()) if name in named}
        return self.optimizer.state_dict() | {"state": state}

    def _load_optimizer(self, saved):
        if not isinstance(self.model, FSDPModule):
            self.optimizer.load_state_dict(saved)
            for parameter, state in self.optimizer.state.items():  # fused kernels pair values by their place in memory
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:  # FSDP's are contiguous
                        state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            return
        names = self._parameters()
        state = {names[i]: of_parameter for i, of_parameter in saved["state"].items()}
        groups = [group | {"params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
        named = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(self.model, self.optimizer, named, options=WHOLE_TENSORS)
        for group, old in zip(self.optimizer.param_groups, saved["param_groups"]):  # torch has made lists of tuples
            group.update((key, value) for key, value in old.items() if key != "params")

    def _parameters(self) -> list[str]:
        """Names of the optimizer's parameters, in the order of its state dict."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]


def random_states() -> dict:
    """The states of all global generators of this process, as values that a checkpoint may hold."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # of the process's own GPU
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_random_states(states):
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if states.get("mps") is not None and torch.backends.mps.is_available():  # older checkpoints have none
        torch.mps.set_rng_state(states["mps"])
