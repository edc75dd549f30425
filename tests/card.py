"""A GPU that computes on the CPU: its tensors have values, and refuse what a GPU refuses. Forward passes only."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
MAY_MIX = ("_to_copy", "copy_", "index", "index_put_", "_index_put_impl_")  # these take tensors of the CPU, too
NOT_DETERMINISTIC = ("kthvalue", "median", "histc", "put_")  # torch refuses them on CUDA with --deterministic


class OnCard(torch.Tensor):
    """Says that it is on the card; `value` is what it has."""

    @staticmethod
    def __new__(cls, value):
        form = dict(strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype, device=CUDA)
        new = torch.Tensor._make_wrapper_subclass(cls, value.shape, **form)
        new.value = value
        return new

    def tolist(self):
        return self.value.tolist()

    def numpy(self):
        raise TypeError("a tensor on a GPU is no array")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("tensors of the card are used outside of it")


class Card(TorchDispatchMode):
    """Within it tensors on `CUDA` are `OnCard`.

    Args:
        refused: names of operations that raise on it.
        doubles: False: like MPS, it has no float64.
    """

    def __init__(self, refused=(), doubles=True):
        super().__init__()
        self.refused, self.doubles = refused, doubles

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, OnCard)]
        others = [x for x in tensors if not isinstance(x, OnCard) and x.ndim]
        wanted, result_is_there = kwargs.get("device"), bool(there)
        if wanted is not None:
            result_is_there, kwargs["device"] = torch.device(wanted).type == "cuda", torch.device("cpu")
        elif name == "copy_":
            result_is_there = isinstance(args[0], OnCard)
        if there and others and name not in MAY_MIX:
            raise RuntimeError(f"{function}: tensors on the GPU and on the CPU")
        if there and name in self.refused:
            raise RuntimeError(f"{function} is refused on this GPU")
        mine = {id(x.value): x for x in there}  # operations in place return what they were given
        args, kwargs = tree_map(lambda x: x.value if isinstance(x, OnCard) else x, (args, kwargs))

        def placed(x):
            if not isinstance(x, torch.Tensor) or not result_is_there:
                return x
            if x.dtype == torch.float64 and not self.doubles:
                raise TypeError("this GPU has no float64")
            return mine[id(x)] if id(x) in mine else OnCard(x)

        return tree_map(placed, function(*args, **kwargs))


@contextmanager
def card(monkeypatch, model=None, **kwargs):
    """`Card(**kwargs)`, with `model` on it."""
    torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with Card(**kwargs):
        for module in () if model is None else model.modules():  # .to() keeps the class of a parameter
            for name, value in module._parameters.items():
                module._parameters[name] = value if value is None else torch.nn.Parameter(OnCard(value.detach()), False)
            module._buffers.update({name: OnCard(value) for name, value in module._buffers.items()})
        yield
