"""Dense quality: what the patches of the last block say of places, which is what registers are to change.

Hit ratio: share of images whose patch most like CLS (cosine, after the last norm) has its centre in an annotated box.
CorLoc: share of images in which LOST (arXiv 2109.14279) on the keys of the last block finds one. Segmentation of
patches against masks: see `segmentation`; outlier patches against normal ones: see `outliers`. Tokens are those that
the last block gives, after the last norm.
"""

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou
from tqdm import tqdm

from inspection import outliers, segmentation
from inspection.attention import watch_calls
from inspection.bootstrap import with_interval
from inspection.foreign import own_model
from inspection.lens import Readout
from inspection.objects import SAME, lost
from inspection.pages import headed_figure
from utils import BadInput, say

IMAGES = 2000  # whose patches are kept, at most
NOTHING = "no boxes and no masks"
GIVE = "give --boxes or --masks, or a model of DIGITS_SCENES"


@torch.no_grad()
def measure(model, batches, truth=None, patches=32, seed=0) -> dict:
    """What cannot be judged is None: without boxes, masks, CLS or outliers. Shares are in per cent.

    Args:
        batches: takes `truth` and gives (images, labels or None), and with `truth` a `Truth` of each image.
        patches: of an image that are kept, at most, drawn with `seed`.

    Raises BadInput if there is nothing to judge by: neither annotations nor outliers.
    """
    found = outliers.find_threshold(model, batches)
    if truth is None:
        if not found["share"]:
            raise BadInput(f"dense has nothing to judge by: {NOTHING}, and no outlier patches; {GIVE}")
        say(f"note: dense: {NOTHING}, so only the outlier patches are judged; {GIVE}")
    kept, count, chance = defaultdict(list), 0, torch.Generator().manual_seed(seed)
    for images, labels, *truths in tqdm(batches(truth), "dense", leave=False, disable=None):
        seen = _outputs(model, images)
        for n, annotated in enumerate(*truths):
            if annotated.boxes is not None:
                kept["boxes"].append(judge_boxes(model, annotated.boxes, {name: x[n] for name, x in seen.items()}))
            if annotated.mask is not None and len(kept["masks"]) < IMAGES:
                drawn = segmentation.draw(seen["tokens"][n], annotated.mask, model.grid_size, patches, chance)
                kept["masks"].append(drawn)
        for n, norms in enumerate(seen.pop("norms")):
            if len(kept["outliers"]) == IMAGES:
                break
            values = {name: seen[name][n] for name in ("tokens", "pixels", "cosine")}
            if drawn := outliers.draw(norms, found["threshold"], values, patches, chance):
                kept["outliers"].append(drawn)
                kept["labels"] += [] if labels is None else [int(labels[n])]
        count += len(images)
    compared = outliers.compare(kept["outliers"], kept["labels"] or None, model.grid_size)
    return {
        "images": count, "with_boxes": len(kept["boxes"]), "with_masks": len(kept["masks"]),
        **_of_boxes(kept["boxes"]), "segmentation": segmentation.segment(kept["masks"]),
        "outliers": {**found, "images": len(kept["outliers"]), "probes": compared},
    }  # fmt: skip


def _outputs(model, images) -> dict[str, Tensor]:
    """Of the patches: "keys" of the last block, (B, P, H * d); "norms" of its output, (B, P); that output as "tokens"
    after the last norm, (B, P, D); "pixels" and, after the patch embedding, "cosine" with the neighbours. And "cls"
    (B, D), if it is there."""
    last, layout, found = model.depth - 1, model.token_layout(model.depth - 1), {}

    def see(i, call):
        if i == last:
            found["keys"] = call.key[:, :, layout.patches].transpose(1, 2).flatten(2)

    def output(i, x):
        if i == last:
            normalised = Readout(model).normalised(x)
            found["norms"], found["tokens"] = x[:, layout.patches].norm(dim=-1), normalised[:, layout.patches]
            found["cls"] = None if layout.cls is None else normalised[:, layout.cls.start]

    def embedded(_, args, x):
        x = x.flatten(1, 2) if x.ndim == 4 else x  # some of timm's keep the grid
        found["cosine"] = outliers.neighbour_cosine(x, model.grid_size)

    with own_model(model).patch_embed.register_forward_hook(embedded):
        watch_calls(model, images, see, output=output, needs=[last])
    found["pixels"] = outliers.pixels_of(images, model.grid_size)
    return {name: x for name, x in found.items() if x is not None}


def judge_boxes(model, boxes: Tensor, seen) -> tuple[float, ...]:
    """Of an image: whether the patch most like CLS is in a box (NaN without CLS), the share of patches that are, and
    whether the box that LOST finds, and the whole image, are one of its boxes."""
    (gh, gw), (ph, pw) = model.grid_size, model.model_args["patch_size"]
    scale = torch.tensor([pw, ph] * 2).float()
    centres = torch.cartesian_prod(torch.arange(gh) + 0.5, torch.arange(gw) + 0.5).flip(1)[:, None] * scale[:2]  # x, y
    inside = ((centres >= boxes[:, :2]) & (centres < boxes[:, 2:])).all(dim=-1).any(dim=-1)
    hit = float("nan")
    if "cls" in seen:
        hit = float(inside[int(F.cosine_similarity(seen["cls"][None], seen["tokens"], dim=-1).argmax())])
    object_box = torch.tensor(lost(seen["keys"], model.grid_size).box) * scale
    ious = box_iou(torch.stack([object_box, torch.tensor([0.0, 0, gw * pw, gh * ph])]), boxes).amax(dim=1)
    return hit, float(inside.float().mean()), *(ious >= SAME).float().tolist()


def _of_boxes(rows) -> dict:
    if not rows:
        return {"hit_ratio": None, "corloc": None}
    hit, inside, same, whole = 100 * np.array(rows).T
    hits = with_interval(hit) | {"plain": float(inside.mean())}
    found = with_interval(same) | {"plain": float(whole.mean())}
    return {"hit_ratio": None if np.isnan(hit).any() else hits, "corloc": found}


def lines(result) -> list[str]:
    """What was judged, with intervals."""
    texts, hits, objects = [], result["hit_ratio"], result["corloc"]

    def words(value, interval):
        return f"{value:.1f}% ({interval[0]:.1f} to {interval[1]:.1f})"

    if hits:
        share = words(hits["value"], hits["interval"])
        texts.append(f"The patch most like CLS is in a box: {share}; by chance {hits['plain']:.1f}%")
    if objects:
        share = f"{words(objects['value'], objects['interval'])} of {result['with_boxes']} images"
        texts.append(f"LOST's CorLoc: {share}; the whole image as the box: {objects['plain']:.1f}%")
    for name, probe in (result["segmentation"] or {"probes": {}})["probes"].items():
        iou = words(probe["iou"], probe["iou_interval"])
        texts.append(f"Segmentation, {name}: mean IoU {iou}, accuracy {probe['accuracy']:.1f}%")
    outlying = result["outliers"]
    if outlying["probes"] is None:
        few = f"{100 * outlying['share']:.2f}% of the patches, in {outlying['images']} images: too few to judge"
        return [*texts, f"Outlier patches: {few if outlying['share'] else 'none'}"]
    pairs = {name: [found["value"] for found in kinds.values()] for name, kinds in outlying["probes"].items() if kinds}
    words = ", ".join(f"{name} {outlier:.3g} / {normal:.3g}" for name, (outlier, normal) in pairs.items())
    return [*texts, f"Outlier / normal patches ({100 * outlying['share']:.2f}%): {words}"]


def page(result, about):
    """Boxes, segmentation, and outliers against normal patches; `about`: the line below the title."""
    figure = headed_figure(
        (11, 7), "Dense quality", about,
        "Left: the patch most like CLS lies in an annotated box; LOST's box overlaps one by at least half. Middle: the "
        "class under a patch, read from its token by probes taught on other images; background counts as a class. "
        "Right: what probes read from outlier patches and from normal ones of the same images; patches that are used "
        "as registers know the image's class, and neither their place nor their pixels. Lines: 95% bootstrap intervals "
        "over images. Dashes: a patch at random, the whole image as the box, the most frequent class.",
        (0.01, 0.14, 0.98, 0.75),
    )  # fmt: skip
    boxes, masks, outlying = figure.subplots(1, 3)
    found = {"patch most\nlike CLS": result["hit_ratio"], "LOST": result["corloc"]}
    _bars(boxes, {"": found}, {name: bar["plain"] for name, bar in found.items() if bar})
    segmented = result["segmentation"] or {"images": 0, "probes": {}}
    probes = segmented["probes"]
    scores = {
        probe: {word: {"value": each[key], "interval": each[f"{key}_interval"]} for key, word in MEASURES.items()}
        for probe, each in probes.items()
    }
    _bars(masks, scores, {word: bar["value"] for word, bar in scores.pop("most frequent class", {}).items()})
    probes = result["outliers"]["probes"] or {}
    read = {name: (probes.get(key) or {}) for key, name in READ.items()}
    _bars(outlying, {kind: {name: bars.get(kind) for name, bars in read.items()} for kind in outliers.KINDS}, {})
    boxes.set_title(f"boxes, {result['with_boxes']} images")
    masks.set_title(f"segmentation of patches, {segmented['images']} images")
    outlying.set_title(f"outliers: {100 * result['outliers']['share']:.2f}% of the patches")
    return figure


MEASURES = {"iou": "mean IoU", "accuracy": "accuracy"}
READ = {"position": "place", "class": "class", "pixels": "variance\nof pixels"}


def _bars(axes, groups, plain):
    """{series: {name: value with interval, or None}}, and {name: what takes no probe, or None}; in per cent."""
    names = list(dict.fromkeys(name for bars in groups.values() for name, bar in bars.items() if bar))
    axes.set(ylabel="%", ylim=(0, 100), xticks=range(len(names)), xticklabels=names)
    if not names:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing to judge by", ha="center", transform=axes.transAxes)
        return
    width = 0.8 / len(groups)
    for n, (series, bars) in enumerate(groups.items()):
        bars = {names.index(name) + (n + 0.5) * width - 0.4: bar for name, bar in bars.items() if bar}
        values = [bar["value"] for bar in bars.values()]
        errors = np.abs(np.array([bar["interval"] for bar in bars.values()]).T - values)
        axes.bar(list(bars), values, 0.9 * width, yerr=errors, color=f"C{n}", label=series, capsize=3)
    for name, value in plain.items():
        if name in names and value is not None:
            axes.hlines(value, names.index(name) - 0.4, names.index(name) + 0.4, color="0.2", linestyle="--")
    axes.set_ylim(min(0, axes.dataLim.y0), 100)
    if len(groups) > 1:
        axes.legend(frameon=False)
