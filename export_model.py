"""Write a checkpoint as a folder that timm loads and that can be pushed to a hub as it is, and as an ONNX file.

    python export_model.py models/best_model.pth exported
    python export_model.py models/best_model.pth exported --onnx

The folder has `model.safetensors` and `config.json`: `timm.create_model("local-dir:exported", pretrained=True)` is the
model again, after `import models_dynamic`; timm's `resolve_model_data_config` says how its images are normalised.
"""

import timm
import torch
from timm.models import save_for_hf

import utils
from checkpoints.models import load_model
from datasets import WHOLE_IMAGE
from models_dynamic import SIZES, DynamicViT
from utils import BadInput, RunFailed

BATCHES = (2, 5)  # that an ONNX file is checked with


def from_factory(model):
    """The same model as `timm.create_model` builds it, so that it carries what timm writes into `config.json`."""
    if not isinstance(model, DynamicViT):
        return model
    args = model.model_args | {"cls_pos": "none" if model.cls_pos is None else model.cls_pos}
    same = ("embed_dim", "depth", "num_heads")
    name = next((n for n, size in SIZES.items() if all(size[key] == args[key] for key in same)), next(iter(SIZES)))
    again = timm.create_model(name, **args).eval()
    again.load_state_dict(model.state_dict())
    return again


def write_folder(model, data, folder):
    """Weights and configuration, as timm writes them; `data`: the description of the training data."""
    about = {"input_size": (3, *data["input_size"]), "mean": tuple(data["mean"]), "std": tuple(data["std"])}
    about |= WHOLE_IMAGE | {key: data[key] for key in WHOLE_IMAGE if key in data}
    classes = {"label_names": list(data["classes"])}
    try:
        save_for_hf(from_factory(model), folder, classes, safe_serialization=True, data_config=about)
    except OSError as error:
        raise RunFailed(f"cannot write to {folder}: {error.strerror or error}") from None


def write_onnx(model, size, file):
    """(B, 3, h, w) -> (B, K) logits for any B, compared with the model's own in onnxruntime.

    Raises BadInput without the packages that it needs, RunFailed for other logits.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise BadInput(f"--onnx needs {error.name}; pip install -r requirements-extra.txt") from None
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        model, (torch.zeros(2, 3, *size),), file, input_names=["images"], output_names=["logits"], dynamo=True,
        dynamic_shapes=({0: batch},), external_data=False, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in BATCHES:
        images = torch.randn(count, 3, *size)
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            difference = (model(images) - torch.from_numpy(found)).abs().max().item()
        if not difference < 1e-3:
            raise RunFailed(f"{file} gives other logits than the model, by up to {difference:.2g}; do not use it")
    utils.say(f"wrote {file}, checked with batches of {' and '.join(map(str, BATCHES))}")


def main(argv=None):
    parser = utils.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of this project")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--onnx", action="store_true", help="also write OUT/model.onnx, and check it")
    args = parser.parse_args(argv)
    model, checkpoint = load_model(args.checkpoint)
    folder = utils.writable_folder(args.out)
    if args.onnx:
        write_onnx(model, checkpoint["data"]["input_size"], folder / "model.onnx")
    write_folder(model, checkpoint["data"], folder)
    utils.say(f'wrote {folder}: timm.create_model("local-dir:{folder}", pretrained=True) after import models_dynamic')


if __name__ == "__main__":
    utils.run_script(main)
