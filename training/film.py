"""What the tokens attend to in held-out images while a model trains: `--viz_every N`, `--viz_images I...`.

`<output_dir>/attention/` gets, after every N-th epoch, `epoch_0010.npz` with the maps as arrays, and `epoch_0010.png`
with a page for each token; at the end `attention.pdf`, a page for each token and epoch, and `attention_cls.gif`, ...
These are drawn from the .npz files alone, so that those of a resumed run show all of its epochs.
"""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import utils
from datasets import denormalise, resize
from inspection import inputs
from inspection.map_pages import draw_page
from inspection.pages import ATTENTION, MapCell, Page, Row, by_token, token_name, write_pdf
from loading.files import FileLoader
from loading.memory import MemoryLoader
from models_dynamic import SIZES, DynamicViT
from utils import BadInput

EPOCH = re.compile(r"epoch_(\d{4,})\.(npz|png)")
FILM = re.compile(r"attention\.pdf|attention_(cls|dist|reg\d+)\.gif")
TOKEN = re.compile(r"cls|dist|reg\d+")
FOLDER = "attention"
SIDE, LETTERS = 128, 18  # at most: pixels of an image's longer side, characters of a class name
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
        pages = [_page(saved, key, self.args.epochs) for key in _tokens(saved)]
        sheet = np.concatenate([_pixels(draw_page(page, vmax=page.top())) for page in pages])
        utils.write_atomically(file.with_suffix(".png"), lambda out: imsave(out, sheet, format="png"))
        utils.say(f"wrote {file.with_suffix('.png')}")

    def _file(self, epoch) -> Path:
        return self.folder / f"epoch_{epoch:04}.npz"

    def _read_images(self):
        """The images as validation prepares them for the model, and, smaller, for display."""
        split, data, device = self.val_batches.split, self.data, next(self.model.parameters()).device
        few = split.part(self.numbers)
        from_files = isinstance(self.val_batches, FileLoader)
        loader = FileLoader(few, data, len(few), device) if from_files else MemoryLoader(few, data, len(few))
        self.images, labels = next(iter(loader))
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
        classes = [name if len(name) <= LETTERS else name[: LETTERS - 1] + "…" for name in self.data["classes"]]
        captions = [
            f"true: {inputs.class_name(label, classes)}\n{inputs.prediction(row, classes)}"
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
    """The .npz files in order."""
    files = [file for file in folder.glob("epoch_*.npz") if EPOCH.fullmatch(file.name)]
    return sorted(files, key=lambda file: int(file.stem.removeprefix("epoch_")))


def _tokens(saved) -> list[str]:
    return [key for key in saved if TOKEN.fullmatch(key)]


def _page(saved, key, epochs) -> Page:
    """One token at one epoch: a row for each image, a column for each block."""
    all_maps, pictures, rows = torch.from_numpy(saved[key]), torch.from_numpy(saved["pictures"]), []
    present = (~all_maps[0, :, 0, 0].isnan()).nonzero().flatten().tolist()
    enters = present[0]
    why = [f"absent: enters at block {enters}" if b < enters else "absent" for b in range(all_maps.shape[1])]
    for caption, picture, maps in zip(saved["captions"], pictures, all_maps):
        cells = [MapCell(f"block {b}", m if b in present else None, why[b]) for b, m in enumerate(maps)]
        rows.append(Row(str(caption), picture, cells))
    name = token_name(key, sum(token.startswith("reg") for token in _tokens(saved)))
    title, about = f"{name}, epoch {int(saved['epoch'])} of {epochs}", f"enters at block {enters}; {saved['about']}"
    return Page(key, title, rows, about, f"{ATTENTION}, mean over heads")


def write_film(args):
    """One PDF, and a GIF for each token, of all epochs with maps; one colour scale for all pages of a token.

    May take minutes: call it where no other process waits.
    """
    folder = Path(args.output_dir) / FOLDER
    files = _epochs(folder) if args.viz_every and utils.is_main() else []
    if not files:
        return
    with np.load(files[0]) as saved:
        keys = _tokens(saved)
    in_gif = {round(i) for i in np.linspace(0, len(files) - 1, min(FRAMES, len(files)))}

    def pages(key):
        for file in files:
            with np.load(file) as saved:
                yield _page(saved, key, args.epochs)

    def figures():
        from PIL import Image

        for key in keys:
            vmax, frames = max(page.top() for page in pages(key)), []
            for i, page in enumerate(pages(key)):
                figure = draw_page(page, vmax=vmax, scope="all epochs")
                yield figure
                if i in in_gif:
                    frames.append(Image.fromarray(_pixels(figure)).quantize(dither=Image.Dither.NONE))
            _write_gif(folder / f"attention_{key}.gif", frames)

    write_pdf(figures(), folder / "attention.pdf")
    gifs = ", ".join(f"attention_{key}.gif" for key in keys)
    utils.say(f"wrote {folder / 'attention.pdf'} and {gifs}: {len(files)} epochs")


def _pixels(figure) -> np.ndarray:
    """(h, w, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _write_gif(file, frames):
    options = dict(save_all=True, append_images=frames[1:], loop=0)
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    utils.write_atomically(file, lambda out: frames[0].save(out, format="GIF", duration=durations, **options))
