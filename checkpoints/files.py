"""Checkpoint files: written whole or not at all, and read without running anything that is in them."""

import os
import pickle
import re
import warnings
from pathlib import Path

import torch

from checkpoints import schema
from utils import BadInput, write_atomically


def save_checkpoint(path, checkpoint: dict, make_room=None):
    """Write a dictionary of tensors and plain values so that a crash never leaves half a file."""
    write_atomically(path, lambda file: torch.save(checkpoint, file), make_room)


def load_checkpoint(path) -> dict:
    """Read a checkpoint or a state dict (.safetensors too) to the CPU. No code in the file is ever run.

    Raises BadInput for a file that is missing, cut off, of another kind, that carries code or asks for far more memory
    than it has bytes, or whose description of a model, of data or of a run is not one that `save_checkpoint` is given.
    """
    path = Path(path)
    if not os.path.isfile(path):  # a pipe or a device may never end
        raise BadInput(f"there is no checkpoint {path}; give the path of a file that training wrote")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        schema.check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on foreign pickles; the error below says enough
            with torch.serialization.safe_globals(schema.DROPPED):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = schema.plain(checkpoint, path.stat().st_size)
    except schema.Suspicious as error:
        raise BadInput(f"{path} {error}") from None
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL ([\w.]{1,200})", str(error)):
            raise BadInput(
                f"{path} carries code or Python objects, which are not loaded: {refused[1]}; "
                "save only the weights, as in torch.save(model.state_dict(), FILE)"
            ) from None
        raise BadInput(f"{path} is no checkpoint, or a damaged one; give another file") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # torch, zipfile and safetensors raise many kinds for damaged files
        raise BadInput(f"{path} is no checkpoint, or a damaged one; give another file") from None
    if not isinstance(checkpoint, dict):
        raise BadInput(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint; give another file")
    if "model_args" in checkpoint and (wrong := schema.wrong_part(checkpoint)):
        raise BadInput(f"{path} is damaged or not of this project: {wrong} is missing or not as training writes it")
    return checkpoint
