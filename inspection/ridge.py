"""A linear probe on the tokens of each block: how much of the class can be decoded there."""

import numpy as np

from inspection.bootstrap import bootstrap

PER_CLASS = 4  # images of a class, at least
PROBED = {"cls": "class token", "registers": "mean of the registers"}


def probe(features: dict, labels: list[int], depth, seed=0) -> dict | None:
    """Accuracy of a ridge probe on each kind of token at each block.

    Ridge regression (Hoerl & Kennard 1970) on standardised features of one stratified half of the images; its penalty
    is chosen there by leaving out one image (scikit-learn's RidgeClassifierCV). Scored on the other half; halves are
    the same for all tokens and blocks. Images of classes with fewer than `PER_CLASS` are left out.

    Args:
        features: {(kind, block): (n, D)}, in the order of the labels; may be without entries.

    Returns:
        {"accuracy": {kind: [per cent at each block]}, "interval": {kind: [[lower, upper], ...]}, ...}; None where the
        token is absent. None altogether if fewer than two classes remain, so also without labels.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = np.array(labels, int)
    kept = np.bincount(labels)[labels] >= PER_CLASS
    target = labels[kept]
    if len(set(target)) < 2 or not features:
        return None
    train, test = train_test_split(np.arange(len(target)), test_size=0.5, stratify=target, random_state=seed)
    accuracy, interval = ({kind: [None] * depth for kind, _ in features} for _ in range(2))
    for (kind, block), values in features.items():
        values = values[kept]
        ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-1, 4, 6)))
        hits = 100.0 * (ridge.fit(values[train], target[train]).predict(values[test]) == target[test])
        accuracy[kind][block], interval[kind][block] = float(hits.mean()), bootstrap(hits).tolist()
    chance = 100 * float(np.bincount(target[test]).max()) / len(test)
    about = {"trained_on": len(train), "scored_on": len(test), "classes": len(set(target)), "chance": chance}
    return about | {"accuracy": accuracy, "interval": interval}


def lines(result) -> list[str]:
    """A line for each kind of token: the block where it is most decodable, and the last one."""
    if result is None:
        return [f"No probe beside it: it needs two classes with {PER_CLASS} images each"]
    found = []
    for kind in filter(result["accuracy"].get, PROBED):
        values = result["accuracy"][kind]
        blocks = [i for i, value in enumerate(values) if value is not None]
        words = [
            "{:.1f}% ({:.1f}..{:.1f}) at block {}".format(values[i], *result["interval"][kind][i], i)
            for i in dict.fromkeys((max(blocks, key=values.__getitem__), blocks[-1]))
        ]
        judged = f"({result['scored_on']} images; chance {result['chance']:.1f}%)"
        found.append(f"A ridge probe reads the class from the {PROBED[kind]} in {', '.join(words)} {judged}")
    return found
