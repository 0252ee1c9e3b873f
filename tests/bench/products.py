"""Matrix products of other libraries in fp32, on a CPU that is slow at half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvedit.model import upcast

_MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, all products of two matrices are ``upcast.product``s."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if func in _MATRIX_PRODUCTS else None
        if first is None or first.device.type != "cpu" or not upcast.is_slow(first.dtype):
            return func(*args, **kwargs)
        return func(*(operand.float() for operand in args), **kwargs).to(first.dtype)
