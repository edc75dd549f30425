"""How alike two sets of representations of the same images are, whatever their axes: linear CKA.

cka = CKA()
for x, z, y in batches:
    cka.add({"x": x, "z": z}, y)
cka.result()  # {"x": {"cka": 0.9, "debiased": 0.9}, "z": ...}: of each with y
"""

import torch
from torch import Tensor


class CKA:
    """Linear centred kernel alignment of sets of vectors with one of them, from sums over the images.

    ||Y'X||^2 / (||X'X|| ||Y'Y||), Frobenius norms of centred X and Y with a row for each image (Kornblith et al., arXiv
    1905.00414). Unrelated sets do not have 0 but about D / (D + images). "debiased" has: the same with the unbiased
    estimator of HSIC (Song et al. 2012, "Feature selection via dependence maximization"; Nguyen et al., 2010.15327).
    """

    def __init__(self):
        self.count, self.sums = 0, {}

    def add(self, sets: dict[str, Tensor], whole: Tensor):
        """(B, D) each."""
        y = whole.cpu().double()
        sets = {name: x.cpu().double() for name, x in sets.items()} | {None: y}
        for name, x in sets.items():
            for key, other in {(name, None): y, (name, name): x}.items():
                new = _sums(x, other)
                self.sums[key] = [a + b for a, b in zip(self.sums[key], new)] if key in self.sums else new
        self.count += len(y)

    def result(self) -> dict:
        """{name: {"cka", "debiased"}}; None for a set that is the same for all images, "debiased" below 4 images."""
        return {
            name: {word: self._ratio(name, n) for n, word in enumerate(("cka", "debiased"))}
            for name, other in self.sums if name is not None and other is None
        }  # fmt: skip

    def _ratio(self, name, n) -> float | None:
        xy, xx, yy = found = [
            _hsic(self.count, *self.sums[key])[n] for key in ((name, None), (name, name), (None, None))
        ]
        return None if any(each is None for each in found) or min(xx, yy) <= 0 else float(xy / (xx * yy) ** 0.5)


def _sums(x: Tensor, y: Tensor) -> list[Tensor]:
    a, b = x.square().sum(dim=1), y.square().sum(dim=1)
    return [x.T @ y, x.sum(dim=0), y.sum(dim=0), a.sum(), b.sum(), a @ b, b @ x, a @ y]


def _hsic(n, xy, x, y, a, b, ab, bx, ay) -> tuple:
    """(biased, unbiased or None) up to a factor, from `_sums`, without the kernel matrices K = XX', L = YY'."""
    centred = (xy - torch.outer(x, y) / n).norm()
    if centred <= 1e-11 * xy.norm():  # rounding
        return 0.0, 0.0
    if n < 4:
        return centred**2, None
    k, l = x @ x - a, y @ y - b  # sums of K and L without their diagonals  # noqa: E741
    kl = x @ xy @ y - bx @ x - ay @ y + ab  # of their product
    return centred**2, xy.norm() ** 2 - ab + k * l / ((n - 1) * (n - 2)) - 2 * kl / (n - 2)
