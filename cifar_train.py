"""`train_model`: the epochs, validation, saving. `cifar_main.py` is what a user starts."""

from pathlib import Path

import utils
from datasets import ImageData
from loading.memory import MemoryLoader, TrainTransform, load_data
from models_dynamic import DynamicViT
from training import flags, run_folder
from training.loop import run_epochs
from training.setup import build_model, load_finetune, make_mixup_and_loss, make_optimizer, say_what


def train_from_flags(args, device, data: ImageData | None = None) -> dict:
    """`train_model` on the model, and the data if they are not given, that the flags of `cifar_main.py` describe."""
    input_size = build_model(args, 10, "meta").model_args["img_size"]  # wrong flags show before data are read
    utils.writable_folder(Path(args.model_path).parent)
    with run_folder.locked(args.output_dir, args.model_path):
        run_folder.checkpoint_to_resume(args, args.model_path)
        if data is None:
            data = load_data(args.data_set, args.data_path, input_size, **flags.of_data(args))
        utils.seed_everything(args.seed)
        model = build_model(args, len(data.classes))
        if args.finetune and not args.resume:
            load_finetune(model, args.finetune)
        say_what(model, data)
        utils.seed_everything(args.seed + utils.rank())
        return train_model(model, data, args, device)


def train_model(model: DynamicViT, data: ImageData, args, device) -> dict:
    """Train `model` on images in memory, as `run_epochs` does; the best weights go to `args.model_path`.

    Args:
        model: on the CPU or `device`, not wrapped.
        args: the flags of `cifar_main.py`.

    Returns:
        The metrics of the saved weights.

    Raises:
        BadInput: the checkpoint to resume from is of another model or other data; a folder cannot be written.
        RunFailed: a loss that is not finite.
    """
    utils.writable_folder(Path(args.model_path).parent)
    model.to(device)
    description = data.description()
    batches, val_batches = _loaders(data, description, args, device)
    optimizer, scheduler = make_optimizer(
        model, args, len(batches), opt="adamw", lr=args.lr, warmup_lr=1e-6, min_lr=1e-6
    )
    mixup, criterion = make_mixup_and_loss(args, batches.batch_size, len(data.classes))
    return run_epochs(
        model, batches, val_batches, criterion, optimizer, scheduler, description, args, device,
        best_path=Path(args.model_path), mixup=mixup,
    )  # fmt: skip


def _loaders(data, description, args, device) -> tuple[MemoryLoader, MemoryLoader | None]:
    share = dict(batch_size=args.batch_size, rank=utils.rank(), world_size=utils.world_size())
    transform = TrainTransform(description, args.aug, args.hflip, args.reprob)
    train = MemoryLoader(
        data.train.to(device), description, transform=transform, passes=args.repeats, seed=args.seed, **share
    )
    return train, MemoryLoader(data.val.to(device), description, **share) if data.val else None
