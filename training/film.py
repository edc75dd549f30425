"""What the tokens attend to in held-out images while a model trains: `--viz_every N`, `--viz_images I...`.

`<output_dir>/attention/` gets, after every N-th epoch, `epoch_0010.npz` with the maps as arrays, and `epoch_0010.png`
with a row for each token below each image; at the end `attention.pdf`, the same of at most `PAGES` pages, and a film of
each token over all epochs, `attention_cls.gif`, ... of at most `GIF_BYTES`.
These are drawn from the .npz files alone, so that those of a resumed run show all of its epochs.
"""

import io
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import utils
from datasets import denormalise, resize
from inspection import inputs
from inspection.fonts import use_fonts
from inspection.pages import by_token, token_name, write_pdf
from inspection.strips import Group, Strip, draw_strips, top_of
from models_dynamic import SIZES, DynamicViT
from training.run_log import run_name
from training.scoring import eval_batches
from utils import BadInput

EPOCH = re.compile(r"epoch_(\d{4,})\.(npz|png)")
FILM = re.compile(r"attention\.pdf|attention_(cls|dist|reg\d+)\.gif")
TOKEN = re.compile(r"cls|dist|reg\d+")
FOLDER = "attention"
SIDE, LETTERS = 128, 18  # at most: pixels of an image's longer side, characters of a class name
PAGES, ROWS = 10, 10  # at most: pages of attention.pdf, rows of one (unless one image has more)
GIF_BYTES = 1_000_000
FRAMES, FRAME_MS, LAST_MS = 40, 600, 3000  # of a GIF: the largest number; duration of each, and of the last


class Film:
    """Hooks that `run_epochs` calls in every process; the first one draws. Without --viz_every it only removes files.

    Raises BadInput if there is nothing to draw.
    """

    def __init__(self, args, model, val_batches, data, resumed):
        self.args, self.data, self.folder = args, data, Path(args.output_dir) / FOLDER
        self.val_batches, self.resumed = val_batches, resumed
        self.numbers = _chosen_images(args, self.folder if resumed else None, model, val_batches)
        if self.numbers:
            utils.writable_folder(self.folder)

    def begin(self, model, epoch, step):
        """Remove files of other runs, and draw the untrained or resumed model. `epoch`, `step`: so many are done.

        `model`: the one that is validated and saved, not wrapped; training changes its weights in place.
        """
        if not utils.is_main():
            return
        for file in self.folder.glob("*"):
            drawn = EPOCH.fullmatch(file.name)
            fresh = not self.resumed and (drawn or FILM.fullmatch(file.name))
            if fresh or (drawn and int(drawn[1]) > epoch):
                file.unlink()
        if self.numbers:
            self.model = model
            self._read_images()
            if not self._file(epoch).exists():
                self.after(epoch, step)

    def after(self, epoch, step):
        """Draw this epoch if it is an N-th or the last one."""
        last = epoch >= self.args.epochs or step == self.args.max_steps
        if not self.numbers or (epoch % self.args.viz_every and not last):
            return
        from matplotlib.image import imsave

        saved, file = self._maps_and_captions(epoch), self._file(epoch)
        utils.write_atomically(file, lambda out: np.savez_compressed(out, **saved))
        tops = {key: top_of(saved[key]) for key in _tokens(saved)}
        parts = pages_of(len(self.numbers), len(tops))
        sheet = np.concatenate([rendered(_page(saved, tops, part, self.args)) for part in parts])
        utils.write_atomically(file.with_suffix(".png"), lambda out: imsave(out, sheet, format="png"))
        utils.say(f"wrote {file.with_suffix('.png')}")

    def _file(self, epoch) -> Path:
        return self.folder / f"epoch_{epoch:04}.npz"

    def _read_images(self):
        """The images as validation prepares them for the model, and, smaller, for display."""
        split, data, device = self.val_batches.split, self.data, next(self.model.parameters()).device
        few = split.part(self.numbers)
        self.images, labels = next(iter(eval_batches(few, data, device, len(few))))
        self.labels = labels.tolist()
        shown = denormalise(self.images, data["mean"], data["std"])
        scale = min(1, SIDE / max(shown.shape[2:]))
        shown = resize(shown, [round(side * scale) for side in shown.shape[2:]])
        self.shown = shown.round().to("cpu", torch.uint8).numpy()

    @torch.no_grad()
    def _maps_and_captions(self, epoch) -> dict:
        """The content of the pages of this epoch, as arrays."""
        training = self.model.training
        with utils.full_precision():
            maps = token_maps(self.model, self.images)
            logits = self.model.eval()(self.images).cpu()
        self.model.train(training)
        classes = [utils.shortened(name, LETTERS) for name in self.data["classes"]]
        captions = [
            f"true: {inputs.class_name(label, classes)}, {inputs.prediction(row, classes)}"
            for label, row in zip(self.labels, logits)
        ]
        which = ", ".join(map(str, self.numbers[:10])) + ", ..." * (len(self.numbers) > 10)
        about = f"held-out images {which} of {self.data['name']}" + "; EMA weights" * bool(self.args.ema)
        return maps | {
            "epoch": epoch, "images": self.numbers, "labels": self.labels, "logits": logits.numpy(),
            "pictures": self.shown, "captions": captions, "about": about,
        }  # fmt: skip


def _chosen_images(args, folder, model, val_batches) -> list[int]:
    """Indices of held-out images, none without --viz_every. Raises BadInput if there is nothing to draw."""
    if not args.viz_every:
        if args.viz_images:
            raise BadInput("--viz_images chooses the images of --viz_every; also give --viz_every N")
        return []
    if not isinstance(model, DynamicViT):
        raise BadInput(f"--viz_every cannot draw timm's models; leave it out, or give --model {next(iter(SIZES))}")
    if model.cls_pos is model.dist_pos is model.reg_pos is None:
        raise BadInput("--viz_every draws attention of CLS and registers, and this model has none; give --num_reg 4")
    if val_batches is None:
        raise BadInput("--viz_every needs held-out images, and --val_size 0 holds none out; leave out one of the two")
    count = len(val_batches.split)
    for i in args.viz_images or ():
        if i >= count:
            raise BadInput(f"--viz_images {i}: there is no such image, the held-out images are 0..{count - 1}")
    numbers = list(args.viz_images or range(min(4, count)))
    for file in () if folder is None else _epochs(folder):
        with np.load(file) as saved:
            before = saved["images"].tolist()
        if before != numbers:
            images = utils.flag_value(before)
            raise BadInput(f"{file} is of other images; give --viz_images {images}, or move its folder away")
    return numbers


def token_maps(model: DynamicViT, images: Tensor) -> dict[str, np.ndarray]:
    """{'cls', 'dist', 'reg0', ...: (B, blocks, gh, gw)}: means over heads; NaN where it does not attend."""
    found, maps = model.attention_maps(images, range(model.depth)), {}
    for block in reversed(range(model.depth)):
        for key, heads in by_token(found[block]).items():
            absent = np.full((len(images), model.depth, *model.grid_size), np.nan, np.float32)
            maps.setdefault(key, absent)[:, block] = heads.mean(dim=1).cpu()
    return maps


def _epochs(folder) -> list[Path]:
    files = [file for file in folder.glob("epoch_*.npz") if EPOCH.fullmatch(file.name)]
    return sorted(files, key=lambda file: int(file.stem.removeprefix("epoch_")))


def _tokens(saved) -> list[str]:
    return [key for key in saved if TOKEN.fullmatch(key)]


def pages_of(images, tokens) -> list[range]:
    """Which images stand on each page of an epoch."""
    a_page = max(1, ROWS // tokens)
    return [range(k, min(k + a_page, images)) for k in range(0, images, a_page)]


def _page(saved, tops, images, args):
    """A figure of one epoch: a row for each token of `tops` ({key: brightest share}) below each of `images`."""
    registers, groups = sum(token.startswith("reg") for token in _tokens(saved)), []
    for i in images:
        strips = [Strip(token_name(key, registers), saved[key][i], top) for key, top in tops.items()]
        groups.append(Group(str(saved["captions"][i]), saved["pictures"][i], strips))
    columns = [f"block {b}" for b in range(saved[next(iter(tops))].shape[1])]
    title = f"{run_name(args.output_dir)}: epoch {int(saved['epoch'])} of {args.epochs}"
    return draw_strips(title, str(saved["about"]), columns, groups)


def write_film(args):
    """One PDF, and a GIF for each token, of all epochs with maps; one colour scale for all epochs of a token.

    May take minutes: call it where no other process waits.
    """
    folder = Path(args.output_dir) / FOLDER
    files = _epochs(folder) if args.viz_every and utils.is_main() else []
    if not files:
        return
    every = [_read(file) for file in files]
    tops = {key: top_of(np.stack([saved[key] for saved in every])) for key in _tokens(every[0])}
    images = len(every[0]["images"])
    parts = pages_of(images, len(tops))[:PAGES]
    in_pdf = spread(every, PAGES // len(parts))
    figures = (_page(saved, tops, part, args) for saved in in_pdf for part in parts)
    write_pdf(figures, folder / "attention.pdf")
    for key, top in tops.items():
        shown = spread(every, FRAMES)
        frames = [rendered(_page(saved, {key: top}, range(min(images, ROWS)), args)) for saved in shown]
        gif = _gif(frames)
        utils.write_atomically(folder / f"attention_{key}.gif", lambda out, gif=gif: out.write(gif))
    gifs = ", ".join(f"attention_{key}.gif" for key in tops)
    some = "" if len(in_pdf) == len(files) else f", {len(in_pdf)} of them in attention.pdf"
    utils.say(f"wrote {folder / 'attention.pdf'} and {gifs}: {len(files)} epochs{some}")


def _read(file) -> dict:
    with np.load(file) as saved:
        return dict(saved)


def spread(items, count) -> list:
    """At most `count` of them, evenly, with the first and the last; the last if it is one."""
    return [items[i] for i in sorted({round(i) for i in np.linspace(len(items) - 1, 0, min(count, len(items)))})]


def rendered(figure) -> np.ndarray:
    """(h, w, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(100)
    canvas = FigureCanvasAgg(use_fonts(figure))
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _gif(frames: list[np.ndarray]) -> bytes:
    """Smaller, and then with fewer frames, until it fits into `GIF_BYTES`."""
    from PIL import Image

    pictures, shrink = [Image.fromarray(frame) for frame in frames], 1.0
    while True:
        size = [round(shrink * side) for side in pictures[0].size]
        small = [p.resize(size, Image.Resampling.LANCZOS).quantize(64, dither=Image.Dither.NONE) for p in pictures]
        durations, out = [FRAME_MS] * (len(small) - 1) + [LAST_MS], io.BytesIO()
        small[0].save(out, "GIF", save_all=True, append_images=small[1:], loop=0, duration=durations, optimize=True)
        if out.tell() <= GIF_BYTES or (shrink <= 0.5 and len(pictures) == 1):
            return out.getvalue()
        if shrink > 0.5:
            shrink *= 0.8
        else:
            pictures = spread(pictures, max(1, len(pictures) // 2))
