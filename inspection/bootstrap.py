"""What was measured on images: gathered from batches, and with its intervals."""

from collections import defaultdict

import numpy as np
from tqdm import tqdm


def gather(batches, title, of_batch) -> dict:
    """{key: (n, ...) array with a row for each image}, from `of_batch(images, labels)`: {key: (B, ...) tensor}.

    The keys are the same in all batches. `title`: of the progress bar.
    """
    rows = defaultdict(list)
    for images, labels in tqdm(batches(), title, leave=False, disable=None):
        for key, values in of_batch(images, labels).items():
            rows[key].append(values.cpu().numpy())
    return {key: np.concatenate(parts) for key, parts in rows.items()}


def mean(values: np.ndarray) -> np.ndarray:
    """Over the images, the first axis."""
    return values.mean(axis=0)


def bootstrap(values, statistic=mean, level=0.95, resamples=1000, seed=0) -> np.ndarray:
    """(2, ...): the lower and the upper end of the percentile interval of a statistic over images.

    Efron (1979), "Bootstrap methods: another look at the jackknife": images are drawn again with replacement. What was
    measured on one image stays together, so the interval of a difference is a paired one.

    Args:
        values: (n, ...), a row for each image.
        statistic: takes such an array of n images, returns a number or an array.
    """
    values, chance = np.asarray(values), np.random.default_rng(seed)
    found = [statistic(values[chance.integers(len(values), size=len(values))]) for _ in range(resamples)]
    return np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)


def with_interval(values, statistic=mean) -> dict:
    """{"value", "interval": [lower, upper]} of a statistic that is a number; see `bootstrap`."""
    values = np.asarray(values)
    return {"value": float(statistic(values)), "interval": bootstrap(values, statistic).tolist()}
