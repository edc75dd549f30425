"""A GPU for a machine that has none: tensors on it have shapes and a device, and no values."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)


class Waits(RuntimeError):
    """The program would wait for the GPU here."""


class FakeCuda(FakeTensorMode):
    """Within it tensors on `CUDA` are fake and those on the CPU real; forward passes only.

    A CPU tensor among those on the GPU raises torch's `FakeTensorDeviceMismatchError`; reading a value
    `DataDependentOutputException`; a result whose shape depends on values `DynamicOutputShapeException`; a copy between
    the two without `non_blocking=True` raises `Waits`, if it is `strict`.
    """

    def __init__(self, strict=True):
        super().__init__(allow_non_fake_inputs=True)
        self.strict = strict

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        devices = {x.device.type for x in leaves if isinstance(x, torch.Tensor)}
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted).type
        if wanted != "cuda" and not any(isinstance(x, FakeTensor) for x in leaves):
            return function(*args, **kwargs)
        copied = wanted in ("cpu", "cuda") and devices and devices != {wanted}
        blocking = copied and not kwargs.get("non_blocking")
        if function is torch.ops.aten.copy_.default:
            blocking = len(devices) > 1 and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if blocking and self.strict:
            raise Waits(f"{function} between CPU and GPU without non_blocking=True")
        return super().__torch_dispatch__(function, types, args, kwargs)
