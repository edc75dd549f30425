"""Intervals of what was measured on images."""

import numpy as np


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
