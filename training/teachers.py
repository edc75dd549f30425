"""A model to learn from, and the images as it wants them."""

import timm
import torch

import utils
from checkpoints.files import load_checkpoint
from checkpoints.models import load_model, timm_model
from checkpoints.weights import LoadReport, load_weights
from datasets import WHOLE_IMAGE, check_classes
from models_dynamic import SIZES, TOKENS, DynamicViT
from training.setup import amp_dtype, on_channels_last, plain_attention_on_cpu
from utils import BadInput


def make_teacher(args, data, device):
    """Images -> the teacher's logits, or None. Raises BadInput for a teacher that does not fit the data."""
    if args.distillation_type == "none":
        return None
    model, about = _teacher_model(args, data)
    if tuple(about["input_size"]) != tuple(data.input_size) and about["fixed"]:
        wanted, here = (utils.flag_value(tuple(size)) for size in (about["input_size"], data.input_size))
        raise BadInput(f"the teacher sees images of {wanted} pixels, here they are {here}; give --input_size {wanted}")
    model = on_channels_last(model).to(device).eval().requires_grad_(False)
    plain_attention_on_cpu(model, device, amp_dtype(args.amp, device))
    here, there = (
        torch.tensor([mean, std], device=device)[:, :, None, None]
        for mean, std in ((data.mean, data.std), (about["mean"], about["std"]))
    )
    if torch.equal(here, there):
        return model
    # Images come as the student wants them normalised.
    scale, shift = here[1] / there[1], (here[0] - there[0]) / there[1]
    return lambda images: model(images * scale + shift)


def _teacher_model(args, data):
    """(model, `images_of` it, with "fixed": whether it takes images of that size only)."""
    name, path, classes = args.teacher_model, args.teacher_path, len(data.classes)
    checkpoint, fixed = load_checkpoint(path) if path else {}, False
    if "model_args" in checkpoint:
        model, _ = load_model(path)
        its_name = model.model_args.get("timm_name", "a DynamicViT")
        if name not in (None, its_name):
            raise BadInput(f"--teacher_model {name}: {path} is {its_name}; leave that flag out")
        fixed = isinstance(model, DynamicViT) or "img_size" in model.model_args
    elif name is None:
        raise BadInput(f"{path} does not name its model; give --teacher_model NAME")
    elif not timm.is_model(name):
        raise BadInput(f"--teacher_model: timm has no model {name}")
    elif path is None:
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # many kinds: no network, no such weights
            raise BadInput(f"cannot download the teacher {name} ({error}); give --teacher_path FILE") from None
        if model.num_classes != classes:
            raise BadInput(f"the teacher {name} knows {model.num_classes} classes, the data have {classes}")
        fixed = timm.get_pretrained_cfg(name).fixed_input_size
    else:
        try:
            model = timm_model(name, classes, img_size=data.input_size)
            report = load_weights(model, checkpoint)
        except ValueError as error:
            raise BadInput(f"the teacher {name} of {path}: {error}") from None
        check_whole(report, f"the teacher {name} of {path}", classes)
    return model, images_of(checkpoint, name, data, f"the teacher {path}") | {"fixed": fixed}


def images_of(checkpoint, name, data, whose) -> dict:
    """What a model wants of its images, as in a description of data: from a checkpoint of this project, or from timm
    of its model `name`, else it is what training on `data` would want.

    Raises BadInput for a checkpoint of other classes than those of the data.
    """
    if {"data", "model_args"} <= checkpoint.keys():
        check_classes(checkpoint["data"]["classes"], data.classes, whose, "the data")
        return WHOLE_IMAGE | checkpoint["data"]
    config = None if name in SIZES else timm.get_pretrained_cfg(name)
    if config is None:
        return data.description()
    return {"mean": config.mean, "std": config.std, "input_size": config.input_size[1:]}


def check_whole(report: LoadReport, whose, classes):
    """Raise BadInput unless all weights of a file went into the model, and the model has no others."""
    names = [name for name in report.left_out if name != "mask_token"] or report.new
    names += [name for name in report.resampled if name == "register_tokens"]
    if set(names) & set(TOKENS):
        raise BadInput(f"{whose} has other tokens than the model of the flags: see {', '.join(names)}; give its flags")
    if names:
        raise BadInput(f"{whose} is not for the {classes} classes of the data: see its {', '.join(names)}")
