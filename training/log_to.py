"""Where the metrics of each epoch go beside log.txt: --log_to tensorboard wandb trackio csv.

Each of these is a context manager that has (folder of the run, its id, its flags, epochs so far or None for a new run),
and gives a function that takes one epoch's metrics.
"""

import os
import secrets
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import utils
from training.run_log import plain_args, read_json_lines, write_csv
from utils import BadInput

PROJECT = "vit-token-entry"  # unless WANDB_PROJECT or TRACKIO_PROJECT names another


@contextmanager
def to_tensorboard(folder, name, config, epoch):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, purge_step=(epoch or 0) + 1) as board:

        def add(metrics):
            for key, value in metrics.items():
                board.add_scalar(key, value, metrics["epoch"])
            board.flush()

        yield add


@contextmanager
def to_wandb(folder, name, config, epoch):
    """A resumed run continues under its id. WANDB_MODE=offline needs no network; `wandb sync` sends it later."""
    import wandb

    project, again = os.environ.get("WANDB_PROJECT", PROJECT), {} if epoch is None else {"resume": "allow"}
    try:
        run = wandb.init(project=project, name=folder.name, id=name, dir=folder, config=config, **again)
    except wandb.Error as error:
        raise BadInput(f"--log_to wandb: {error}; type wandb login, or set WANDB_MODE=offline") from None
    with run:  # an error ends it as failed
        yield lambda metrics: run.log(metrics, step=metrics["epoch"])


@contextmanager
def to_trackio(folder, name, config, epoch):
    import trackio

    run = trackio.init(
        os.environ.get("TRACKIO_PROJECT", PROJECT), f"{folder.name}-{name}", config=config, embed=False,
        resume="never" if epoch is None else "allow",
    )  # fmt: skip

    def add(metrics):  # it has a step of its own
        run.log({"steps" if key == "step" else key: value for key, value in metrics.items()}, metrics["epoch"])

    try:
        yield add
    finally:
        trackio.finish()


@contextmanager
def to_csv(folder, name, config, epoch):
    """metrics.csv is log.txt as a table, and so holds what a resumed run has repeated only once."""
    path = folder / "metrics.csv"
    if epoch is None:
        path.unlink(missing_ok=True)

    def add(_):
        records = [record for record in read_json_lines(folder / "log.txt") if "epoch" in record]
        write_csv(path, dict.fromkeys(key for record in records for key in record), records)

    yield add


LOGS = {"tensorboard": to_tensorboard, "wandb": to_wandb, "trackio": to_trackio, "csv": to_csv}


def add_log_flags(group):
    group.add_argument(
        "--log_to", nargs="+", choices=tuple(LOGS), action="extend", default=[], help="also log there: pip install "
        "tensorboard, wandb or trackio; csv: metrics.csv",
    )  # fmt: skip
    group.add_argument("--tensorboard", dest="log_to", action="append_const", const="tensorboard",
                       help="the same as --log_to tensorboard")  # fmt: skip


def check_packages(names):
    """Raise BadInput if the package of one of these logs is missing."""
    for name in names:
        spec = find_spec(name)
        if name != "csv" and (spec is None or spec.origin is None):  # the folder wandb/ of some run is no package
            raise BadInput(f"--log_to {name} needs a package: pip install {name}")


@contextmanager
def open_logs(args, epoch):
    """The functions of the logs in `args.log_to`, in the first process; in the others none.

    Args:
        epoch: epochs so far of a run that is resumed; None: a new one.
    """
    folder, add = Path(args.output_dir), []
    with ExitStack() as stack:

        def enter():
            name = run_id(folder, new=epoch is None) if args.log_to else None
            for log in dict.fromkeys(args.log_to):
                add.append(stack.enter_context(LOGS[log](folder, name, plain_args(args), epoch)))

        utils.main_decides(enter)
        yield add


def run_id(folder, new) -> str:
    """What the logs of other programs know a run by, resumed or not; a file of the run's folder has it."""
    file = folder / "run_id.txt"
    if new or not file.is_file():
        utils.write_text(file, secrets.token_hex(4))
    return file.read_text()
