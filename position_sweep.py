"""Where should the tokens enter? Train and test the whole grid of positions, and compare.

    python position_sweep.py                                    # a small grid on digits, some minutes on two cores
    python position_sweep.py --data_set CIFAR10 --cls_pos 0 2 4 6 8 none --reg_pos 0 4 8 --num_reg 0 1 4 \\
        --seeds 0 1 2 --epochs 30 --output_dir sweeps/cifar10
    python position_sweep.py --from models/best_model.pth --epochs 3 --output_dir sweeps/scan    # surgery: a first scan

The same command resumes where it was stopped, also in the middle of a cell. Several processes may work in one folder.
Flags of model and recipe are those of cifar_main.py.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from checkpoints.files import load_checkpoint
from loading.memory import load_data
from sweep import explorer, halving, pages, results
from sweep.cells import AXES, check_settings, finished, flops, grid, model_of, run_cells, seconds_left, settings
from sweep.measures import PRIMARY
from tokens.layout import MODES
from training import flags, signals, slurm
from training.setup import start
from utils import BadInput, RunFailed, Stopped, number, say

# Without --data_set and --data_path: the model and recipe of `make demo`, with larger patches (the scans have 8 x 8
# pixels, so these still are 2 x 2 of them) and fewer epochs.
DIGITS = dict(
    data_set="DIGITS", embed_dim=96, depth=6, num_heads=3, patch_size=(8, 8), epochs=12, repeats=3, batch_size=64,
    lr=2e-3, mixup=0.0, cutmix=0.0, reprob=0.0, output_dir="sweeps/digits",
)  # fmt: skip
SAVED = "its progress is saved; the same command resumes"


def shard(text):
    """An argparse type: '0/4' -> (0, 4)."""
    part, _, count = text.partition("/")
    count = number(int, 1)(count)
    return number(int, 0, count - 1)(part), count


def get_parser():
    parser = utils.ArgumentParser(
        description="Train and test every position of the class token and of the registers, and compare.",
        epilog="The same command resumes where it was stopped.",
        conflict_handler="resolve",  # positions and seeds are lists here
    )
    group = parser.add_argument_group("grid")
    flags.add_small_image_flags(parser)
    group.add_argument("--cls_pos", type=utils.position, nargs="+", default=[0, 2, 4], metavar="BLOCK",
                       help="blocks that CLS enters at, or none")  # fmt: skip
    group.add_argument("--reg_pos", type=number(int, 0), nargs="+", default=[0, 2], metavar="BLOCK",
                       help="blocks that the registers enter at")  # fmt: skip
    group.add_argument("--num_reg", type=number(int, 0), nargs="+", default=[4], metavar="R", help="register tokens")
    group.add_argument("--reg_end", type=utils.position, nargs="+", default=[None], metavar="BLOCK", help="that the "
                       "registers leave at, or none (default: none)")  # fmt: skip
    for flag in ("--cls_mode", "--reg_mode"):
        group.add_argument(flag, choices=MODES, nargs="+", default=["token"], help="reader: it only reads (default: "
                           "token)")  # fmt: skip
    group.add_argument(
        "--class_attention",
        type=number(int, 0),
        nargs="+",
        default=[0],
        metavar="K",
        help="in the last K blocks only CLS is updated (default: 0)",
    )
    group.add_argument("--seeds", "--seed", type=number(int, 0, 2**31), nargs="+", default=[0, 1, 2], dest="seeds",
                       help="each position is trained with each seed")  # fmt: skip
    group.add_argument("--equal_flops", action="store_true", help="cells with cheaper blocks train on more images, "
                       "up to the FLOPs of 0/0")  # fmt: skip
    group.add_argument("--from", "--finetune", dest="finetune", metavar="FILE", help="start each cell from these "
                       "weights, their tokens moved")  # fmt: skip
    group.add_argument("--output_dir", default="sweeps/grid", help="a folder for this grid")
    group.add_argument("--measure", choices=PRIMARY, default="accuracy", help="what the verdict is on; all others are "
                       "exploratory (default: accuracy)")  # fmt: skip
    group.add_argument("--halving", action="store_true", help="successive halving: only the best positions by "
                       "held-out accuracy, and 0/0, are trained whole")  # fmt: skip
    group.add_argument("--eta", type=number(int, 2), default=3, metavar="N", help="with --halving, one of N positions "
                       "survives, and trains for N times as long (default: 3)")  # fmt: skip
    group.add_argument("--mix", action="store_true", help="allow cells of other settings in one table")
    group.add_argument("--dry_run", action="store_true", help="only list the cells, and estimate the time left")
    group = parser.add_argument_group("several processes (they may also be started by hand in the same folder)")
    divided = group.add_mutually_exclusive_group()
    divided.add_argument("--shard", type=shard, metavar="I/N", help="only cells I, I + N, I + 2 N, ..., counted from 0")
    divided.add_argument("--gpus", type=number(int, 1), metavar="N", help="one process for each of N GPUs")
    divided.add_argument("--workers", type=number(int, 1), metavar="N", help="N processes, which share the cores, or "
                         "one GPU")  # fmt: skip
    divided.add_argument("--launcher", choices=("submitit",), help="submit --jobs shards as a SLURM array, each with a "
                       "GPU unless --device cpu")  # fmt: skip
    group.add_argument("--jobs", type=number(int, 1), default=1, help="shards to submit")
    group.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="local: on this machine")
    group.add_argument("--partition", help="of the cluster")
    group.add_argument("--timeout", type=number(int, 1), default=4320, help="minutes for a job")
    return parser


def parse(argv=None):
    """The flags; without a dataset, those of a small grid on digits are the defaults."""
    named = get_parser().parse_known_args(argv)[0]
    digits = named.data_set is None and named.data_path is None
    args = flags.parse_with_recipe(get_parser(), argv, **DIGITS if digits else {})
    flags.resolve(args)
    for name in (*AXES, "seeds"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if args.val_size == 0:
        raise BadInput("--val_size 0 holds nothing out, but the best cell is chosen on held-out images; leave it out")
    if args.measure in results.JUDGED and args.data_set != "DIGITS_SCENES":
        raise BadInput(
            f"--measure {args.measure} needs boxes and masks, which only DIGITS_SCENES has; give another one"
        )
    for name in ("shard", "mix", "max_steps"):
        if args.halving and getattr(args, name):
            raise BadInput(f"--halving compares all cells after whole epochs of the same training; leave out --{name}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("a cell is trained by one process; start without torchrun, and give --gpus N for N GPUs")
    if (args.gpus or args.launcher) and args.device.startswith("cuda:"):
        raise BadInput(f"--device {args.device} is one GPU, but each process has its own; leave it out")
    if args.gpus and args.gpus > len(visible_gpus()):
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        listed = "" if given is None else f" (CUDA_VISIBLE_DEVICES={given})"
        raise BadInput(f"--gpus {args.gpus}: there are {len(visible_gpus())} GPUs{listed}; give at most as many")
    return args


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: numbers, or UUIDs."""
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if given is None else (name.strip() for name in given.split(","))
    return [name for name in names if name][:count]  # CUDA ignores names after an invalid one


def duration(seconds) -> str:
    minutes = round(seconds / 60)
    if not minutes:
        return "less than 1 min"
    return f"about {minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"about {minutes} min"


def about(args, data, cell) -> str:
    sizes = data.description()["images"]
    epochs = utils.counted(args.epochs, "epoch") + (f" of {args.repeats:g} passes" if args.repeats != 1 else "")
    start = " from one trained model" if args.finetune else ""
    model = model_of(cell, args)
    return (
        f"{model.depth} blocks of width {model.embed_dim}, {epochs}{start}; {data.name}: "
        f"{sizes['train']} train, {sizes['val']} held-out, {sizes['test']} test images"
    )


def list_cells(cells, args, data, device):
    left, seconds = to_do(cells, args, data, device)
    for cell in cells:
        state = "finished" if finished(cell, args) else "to do" if cell in left else "fell"
        say(f"{state:9} {flops(cell, args) / 1e6:8.2f} MFLOPs  {cell}")
    if args.halving:
        *before, (last, _) = halving.rungs(cells, args)
        stay = "".join(f"{utils.counted(stay, 'position')} after epoch {epochs}, " for epochs, stay in before)
        say(f"halving: there stay {stay}and they are trained up to epoch {last}, as is 0/0")
    say(f"{len(cells)} cells, {len(left)} to do: {duration(seconds)} of training by one process")


def to_do(cells, args, data, device):
    """`unfinished`, and the seconds that they take one process."""
    left, share = unfinished(cells, args)
    return left, seconds_left(left, args, data, device) * share


def unfinished(cells, args):
    """The cells that are neither finished nor of a position that fell; the share of their epochs that is still due."""
    now = halving.standing(cells, args) if args.halving else None
    return [cell for cell in (now.left if now else cells) if not finished(cell, args)], now.share if now else 1


def show_finished(bar, cells, args):
    """The total leaves out the cells of positions that fell."""
    bar.n = sum(finished(cell, args) for cell in cells)
    bar.total = bar.n + len(unfinished(cells, args)[0])
    bar.refresh()


def write_results(args, data, cells, pictures=True):
    folder, words, halved = Path(args.output_dir), about(args, data, cells[0]), halving.about(cells, args)
    summary = results.write_tables(folder, {"data_and_recipe": words}, args.measure, halved)
    if not pictures:
        return
    pages.draw_sweep(folder, data, words, args.measure, halved)
    explorer.write_explorer(folder, data, words, args.measure, halved)
    if summary["groups"]:
        say(f"\n{results.markdown(summary)}\nwrote results.csv, .json, .md and sweep.pdf, .png, .html in {folder}")


def work(args, data, current, cells, device):
    """Train the unfinished ones of `cells` in this process."""
    mine = cells[args.shard[0] :: args.shard[1]] if args.shard else cells
    with tqdm(total=len(mine), initial=sum(finished(c, args) for c in mine), unit="cell", disable=None) as bar:

        def after(cell):
            if not finished(cell, args):  # a rung before the last one
                return
            show_finished(bar, mine, args)
            write_results(args, data, cells, pictures=False)
            left, seconds = to_do(mine, args, data, device)
            if left:
                say(f"finished {cell}; {len(left)} of {len(mine)} cells left, {duration(seconds)}\n")

        def train(some, epochs):
            return run_cells(some, args, data, current, device, after, epochs)

        try:
            busy, failed = halving.run_halving(mine, args, train) if args.halving else train(mine, args.epochs)
        except Stopped as stopped:
            raise Stopped(stopped.number, SAVED) from None
    write_results(args, data, cells)
    if busy := [cell for cell in busy if not finished(cell, args)]:
        say(f"other processes are training {utils.counted(len(busy), 'cell')}: {', '.join(c.name for c in busy)}")
    if failed:
        raise RunFailed(f"{utils.counted(len(failed), 'cell')} failed, see above: {', '.join(c.name for c in failed)}")


def command(argv, without) -> list[str]:
    """This command line without some flags that take a value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in without:
        parser.add_argument(f"--{name}")
    return [sys.executable, str(Path(__file__).resolve()), *parser.parse_known_args(argv)[1]]


def with_workers(args, argv, data, cells):
    """Start --gpus or --workers processes; each takes the next cell that no other has locked."""
    if args.gpus:
        names = {f"gpu{i}": {"CUDA_VISIBLE_DEVICES": gpu} for i, gpu in enumerate(visible_gpus()[: args.gpus])}
    else:
        names = {f"worker{i}": {} for i in range(args.workers)}
        if not args.num_threads:
            argv = [*argv, "--num_threads", str(max(1, torch.get_num_threads() // args.workers))]
    logs = utils.writable_folder(Path(args.output_dir) / "workers")
    workers = []
    try:
        with signals.signals_raise(SAVED):
            for name, own in names.items():
                log = logs / f"{name}.log"
                with open(log, "w") as file:
                    mine = command(argv, {"gpus", "workers"})
                    worker = subprocess.Popen(mine, stdout=file, stderr=file, env=os.environ | own)
                workers.append((worker, log))
            say(f"{len(names)} processes; what they print goes to {logs}")
            with tqdm(total=len(cells), unit="cell", disable=None) as bar:
                while any(worker.poll() is None for worker, _ in workers):
                    show_finished(bar, cells, args)
                    time.sleep(1)
    finally:
        for worker, _ in workers:
            worker.terminate()
        for worker, _ in workers:
            worker.wait()  # until its step is saved
    write_results(args, data, cells)
    bad = [str(log) for worker, log in workers if worker.returncode]
    if bad:
        logs = ", ".join(bad)
        raise RunFailed(f"{len(bad)} of {len(names)} processes failed; see the end of {logs}. The same command resumes")


def submit(args, argv):
    logs = Path(args.output_dir).resolve() / "submitit"
    executor = slurm.executor(
        logs, args.cluster, name="position-sweep", cpus_per_task=args.num_threads or 4,
        gpus_per_node=int(args.device != "cpu"), timeout_min=args.timeout, slurm_partition=args.partition,
    )  # fmt: skip
    task = slurm.Command(command(argv, {"launcher", "jobs", "cluster", "partition", "timeout"}))
    parts = [[] if args.halving else ["--shard", f"{part}/{args.jobs}"] for part in range(args.jobs)]
    jobs = executor.map_array(task, parts)
    slurm.say_where(jobs, logs)
    if args.cluster == "local":
        slurm.wait(jobs, logs)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    cells = grid(args)
    if args.halving:
        halving.rungs(cells, args)  # wrong flags show before data are read
    device = start(args)
    utils.writable_folder(args.output_dir)
    if args.finetune:
        load_checkpoint(args.finetune)  # a wrong file shows before data are read
    input_size = model_of(cells[0], args).model_args["img_size"]
    data = load_data(args.data_set, args.data_path, input_size, **flags.of_data(args))
    current = settings(args, data)
    check_settings(args, current)
    if args.dry_run:
        list_cells(cells, args, data, device)
    elif args.launcher:
        submit(args, argv)
        if args.cluster == "local":
            write_results(args, data, cells)
    elif args.gpus or args.workers:
        with_workers(args, argv, data, cells)
    else:
        work(args, data, current, cells, device)


if __name__ == "__main__":
    utils.run_script(main)
