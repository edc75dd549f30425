"""Statistics of the tokens of a model, collected batch by batch: memory does not grow with the number of images.

    statistics = TokenStatistics(model)
    for images, labels in batches:
        logits = statistics.add(images, labels)
    results = statistics.result()  # plain lists and numbers, one entry per block

Block i is measured by its own attention and at its output, in the layout `token_layout(i)`; a token that is absent
there has None.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from inspection.attention import trace
from models_dynamic import DynamicViT, TokenLayout

# Norms are counted in bins of equal width in their logarithm, each 2.3 % wide.
PER_DECADE, LOWEST, DECADES = 100, -4, 9
BINS = PER_DECADE * DECADES
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
DEVIATIONS, TIMES = 5, 2  # of the threshold for artefacts, see `artefact_bin`
BEGIN = 0.001  # share of artefact patches from which a block counts as having them
RULE = (
    f"a patch is an artefact if the logarithm of its norm is more than {DEVIATIONS} robust standard deviations (1.4826 "
    f"times the median absolute deviation) above the block's median, and its norm at least {TIMES} times the median"
)
FOLDS, NEIGHBOURS = 5, 5


class TokenStatistics:
    """See the module. `probe_images`: the tokens of at most so many images are kept for `probe_accuracies`.

    `attention`: False leaves it out, for norms and artefacts alone.
    """

    def __init__(self, model: DynamicViT, probe_images=1000, attention=True):
        self.model, self.probe_images = model, probe_images
        self.see = self._add_attention if attention else None
        self.layouts = [model.token_layout(i) for i in range(model.depth)]
        self.images = 0
        self.norms, self.moments = {}, defaultdict(Moments)
        self.features, self.labels = defaultdict(list), []
        self.distances = _patch_distances(model)

    def add(self, images: Tensor, labels=None) -> Tensor:
        """Add (B, 3, h, w) normalised images, and labels (B,) for `probe_accuracies`; returns their logits (B, K)."""
        self.keep = 0 if labels is None else max(0, self.probe_images - self.images)
        self.labels += [] if labels is None else labels[: self.keep].tolist()
        logits = trace(self.model, images, attention=self.see, output=self._add_output)
        self.images += len(images)
        return logits

    def _add_attention(self, i, attn):
        if i == self.model.depth:  # attention pooling
            return
        layout = self.layouts[i]
        entropy = torch.special.entr(attn).sum(dim=-1)  # (B, H, N)
        for kind, part in parts_of(layout).items():
            if layout.queries is None or part.stop <= layout.queries:
                self.moments["entropy", kind, i].add(entropy[..., part].mean(dim=-1))
            if layout.cls is not None:
                self.moments["cls_share", kind, i].add(attn[:, :, layout.cls, part].sum(dim=(2, 3)))
        if layout.queries is not None:  # patches do not attend
            return
        inner = attn[..., layout.patches, layout.patches]  # (B, H, P, P)
        mean = (inner * self.distances).sum(dim=-1) / inner.sum(dim=-1).clamp_min(1e-12)
        self.moments["distance", i].add(mean.mean(dim=-1))

    def _add_output(self, i, x):
        if i == self.model.depth:
            return
        for kind, part in parts_of(self.layouts[i]).items():
            tokens = x[:, part]
            if (kind, i) not in self.norms:
                self.norms[kind, i] = Norms(part.stop - part.start)
            self.norms[kind, i].add(tokens.norm(dim=-1))
            if kind == "registers":
                unit = torch.nn.functional.normalize(tokens, dim=-1)
                self.moments["similarity", i].add(unit @ unit.transpose(1, 2))
            if self.keep:
                tokens = tokens.mean(dim=1, keepdim=True) if kind == "patches" else tokens
                names = [f"register {n}" for n in self.layouts[i].numbers] if kind == "registers" else [NAMES[kind]]
                for name, values in zip(names, tokens[: self.keep].cpu().unbind(dim=1)):
                    self.features[name, i].append(values)

    def result(self) -> dict:
        """Plain values; lists have an entry per block. Distances are in pixels of the input, entropies in nats."""
        blocks = range(self.model.depth)
        kinds = [kind for kind in NAMES if any((kind, i) in self.norms for i in blocks)]
        artefacts = [self._artefacts(i) for i in blocks]
        begins = next((i for i, found in enumerate(artefacts) if found["share"] >= BEGIN), None)

        def of_blocks(moment, *key):
            found = [self.moments.get((*key, i)) for i in blocks]
            return [each and getattr(each, moment)().tolist() for each in found]

        def of_kinds(moment, name):
            return {kind: of_blocks(moment, name, kind) for kind in kinds}

        return {
            "images": self.images,
            "tokens": [layout.length for layout in self.layouts],
            "norms": {
                kind: [self.norms[kind, i].describe() if (kind, i) in self.norms else None for i in blocks]
                for kind in kinds
            },
            "artefacts": {"rule": RULE, "begins_at_block": begins, "blocks": artefacts},
            "entropy": of_kinds("mean", "entropy"), "entropy_deviation": of_kinds("deviation", "entropy"),
            "distance": of_blocks("mean", "distance"), "distance_deviation": of_blocks("deviation", "distance"),
            "cls_attention": of_kinds("mean", "cls_share"),
            "cls_attention_deviation": of_kinds("deviation", "cls_share"),
            "register_similarity": of_blocks("mean", "similarity"),
            "register_numbers": [list(layout.numbers) for layout in self.layouts],
        }  # fmt: skip

    def _artefacts(self, i) -> dict:
        counts = self.norms["patches", i].counts  # (P, BINS)
        first, median = artefact_bin(counts.sum(dim=0))
        above = counts[:, first:].sum(dim=1)
        return {
            "threshold": bin_edge(first), "median": median, "share": int(above.sum()) / int(counts.sum()),
            "where": (above / self.images).unflatten(0, self.model.grid_size).tolist(),
        }  # fmt: skip


NAMES = {"cls": "class token", "dist": "distillation token", "registers": "registers", "patches": "mean patch"}


def parts_of(layout: TokenLayout) -> dict[str, slice]:
    """The kinds of tokens that the layout has, in the order of `NAMES`."""
    return {kind: getattr(layout, kind) for kind in NAMES if getattr(layout, kind) is not None}


def _patch_distances(model) -> Tensor:
    """(P, P): pixels between the centres of patches."""
    (gh, gw), (ph, pw) = model.grid_size, model.model_args["patch_size"]
    places = torch.cartesian_prod(torch.arange(gh) * ph, torch.arange(gw) * pw).float()  # y, x
    places = places.to(next(model.parameters()).device)
    return torch.cdist(places, places)


class Moments:
    """Mean and standard deviation over images, from two sums in double precision."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor):  # (B, ...)
        values = values.cpu().double()
        self.count += len(values)
        self.sum, self.squares = self.sum + values.sum(dim=0), self.squares + values.square().sum(dim=0)

    def mean(self) -> Tensor:
        return self.sum / self.count

    def deviation(self) -> Tensor:
        return (self.squares / self.count - self.mean().square()).clamp_min(0).sqrt()


class Norms:
    """The distribution of norms at each of n positions in the sequence, as a histogram."""

    def __init__(self, positions):
        self.counts = torch.zeros(positions, BINS, dtype=torch.int32)
        self.moments, self.smallest, self.largest = Moments(), math.inf, 0.0

    def add(self, norms: Tensor):  # (B, positions)
        norms = norms.cpu()
        bins = ((norms.double().log10() - LOWEST) * PER_DECADE).clamp(0, BINS - 1).long()  # -inf becomes 0
        self.counts.scatter_add_(1, bins.T, torch.ones((), dtype=torch.int32).expand(bins.T.shape))
        self.moments.add(norms)
        self.smallest = min(self.smallest, float(norms.min()))
        self.largest = max(self.largest, float(norms.max()))

    def describe(self) -> dict:
        counts, mean = self.counts.sum(dim=0), self.moments.mean().tolist()
        filled = counts.nonzero()  # those between the first and the last bin are kept
        first, last = int(filled[0]), int(filled[-1])
        return {
            "mean": float(torch.tensor(mean).mean()), "smallest": self.smallest, "largest": self.largest,
            "quantiles": {str(q): quantile(counts, q) for q in QUANTILES},
            "histogram": {
                "first_edge": bin_edge(first), "bins_per_decade": PER_DECADE,
                "counts": counts[first : last + 1].tolist(),
            },
            "mean_of_each": mean,
        }  # fmt: skip


def bin_edge(k) -> float:
    """The lower edge of bin k, a norm."""
    return 10 ** (LOWEST + k / PER_DECADE)


def quantile(counts: Tensor, q) -> float:
    """Quantile q of a histogram (BINS,) of norms; exact to the width of a bin."""
    total = counts.cumsum(dim=0).double()
    wanted = q * float(total[-1])
    k = int((total < wanted).sum())
    before = float(total[k - 1]) if k else 0.0
    return bin_edge(k + (wanted - before) / max(float(counts[k]), 1))


def artefact_bin(counts: Tensor) -> tuple[int, float]:
    """(first bin of artefacts, median norm) from the histogram (BINS,) of the norms of a block's patches; see `RULE`.

    A fixed threshold (150 in "Vision Transformers Need Registers", arXiv 2309.16588) holds for one model only. Median
    and median absolute deviation are robust as long as few patches are artefacts; without the factor, blocks whose
    patches hardly differ would have artefacts.
    """
    median = quantile(counts, 0.5)
    centres = (torch.arange(BINS) + 0.5) / PER_DECADE + LOWEST
    away = (centres - math.log10(median)).abs()
    order = away.argsort()
    cumulated = counts[order].cumsum(dim=0)
    deviation = 1.4826 * float(away[order][int((cumulated < cumulated[-1] / 2).sum())])
    threshold = math.log10(median) + max(DEVIATIONS * deviation, math.log10(TIMES))
    return min(BINS - 1, math.ceil((threshold - LOWEST) * PER_DECADE)), median


def probe_accuracies(features: dict, labels: list[int], depth) -> dict | None:
    """Accuracy of a linear probe and of a kNN probe on each token at each block, cross-validated over the images.

    The linear probe is linear discriminant analysis with Ledoit-Wolf shrinkage, which has no hyperparameters; kNN takes
    5 neighbours by cosine. Tokens are standardised (scikit-learn); the same 5 stratified folds for all; classes with
    fewer than 5 images are left out.

    Args:
        features: {(token, block): list of (n, D)}.

    Returns:
        Accuracies in per cent, an entry per block (None: absent token); None if fewer than two classes remain.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from tqdm import tqdm

    labels = torch.tensor(labels, dtype=torch.long)
    counts = labels.bincount()
    kept = counts[labels] >= FOLDS
    classes = int((counts >= FOLDS).sum())
    if classes < 2:
        return None
    target = labels[kept].numpy()
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    kinds = {
        "linear": LinearDiscriminantAnalysis("lsqr", shrinkage="auto"),
        "neighbours": KNeighborsClassifier(NEIGHBOURS, metric="cosine"),
    }
    result = {
        "images": len(target), "classes": classes, "folds": FOLDS,
        "chance": 100 * float(counts.max()) / len(target), "linear": {}, "neighbours": {}, "deviation_over_folds": {},
    }  # fmt: skip
    for (token, block), parts in tqdm(features.items(), "probes", leave=False, disable=None):
        values = torch.cat(parts)[kept].numpy()
        for kind, classifier in kinds.items():
            scores = 100 * cross_val_score(make_pipeline(StandardScaler(), classifier), values, target, cv=folds)
            result[kind].setdefault(token, [None] * depth)[block] = float(scores.mean())
            spread = result["deviation_over_folds"].setdefault(f"{kind}, {token}", [None] * depth)
            spread[block] = float(scores.std())
    return result
