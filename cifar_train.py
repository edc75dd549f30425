"""`train_model`: training on small images in memory. `cifar_main.py` is what a user starts."""

from pathlib import Path

from timm.utils import random_seed

import utils
from datasets import ImageData
from loading.memory import MemoryLoader, TrainTransform, load_data
from models_dynamic import DynamicViT
from training import flags, run_folder
from training.loop import Run, run_epochs
from training.setup import build_model, load_finetune, make_step, report_run


def train_from_flags(args, device, data: ImageData | None = None, until=None) -> dict:
    """`train_model` on the model, and the data if they are not given, that the flags of `cifar_main.py` describe."""
    input_size = build_model(args, 10, "meta").model_args["img_size"]  # wrong flags show before data are read
    with run_folder.locked(args.output_dir, args.model_path):
        resume = run_folder.checkpoint_to_resume(args, args.model_path)
        if data is None:
            data = load_data(args.data_set, args.data_path, input_size, **flags.of_data(args))
        random_seed(args.seed)  # Mixup draws from NumPy, for one
        model = build_model(args, len(data.classes))
        if args.finetune and not resume:
            load_finetune(model, args.finetune)
        report_run(model, data)
        random_seed(args.seed, utils.rank())
        return train_model(model, data, args, device, resume, until)


def train_model(model: DynamicViT, data: ImageData, args, device, resume=None, until=None) -> dict:
    """Train `model` on images in memory, as `run_epochs` does; the best weights go to `args.model_path`.

    Args:
        model: on the CPU or `device`, not wrapped.
        args: the flags of `cifar_main.py`.
        resume: the checkpoint to resume from.
        until: see `Run`.

    Returns and raises what `run_epochs` does.
    """
    best_path = Path(args.model_path)
    utils.writable_folder(best_path.parent)
    model.to(device)
    description = data.description()
    share = dict(batch_size=args.batch_size, **utils.own_share())
    batches = MemoryLoader(
        data.train.to(device), description, transform=TrainTransform(description, args.aug, args.hflip, args.reprob),
        passes=args.repeats, seed=args.seed, balanced=args.balance == "sampler", **share,
    )  # fmt: skip
    val_batches = MemoryLoader(data.val.to(device), description, **share) if data.val else None
    step = make_step(args, model, batches, len(data.classes))
    run = Run(model, batches, val_batches, description, args, device, best_path, resume, until)
    return run_epochs(run, step)
