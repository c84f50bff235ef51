"""What makes the trainer wait for its device: numbers that it reads there, and copies from one device to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense,  # float(tensor), int(tensor), bool(tensor), tensor.item()
    _aten.equal,
    # Their results are as large as the numbers say.
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.repeat_interleave,
    _aten.bincount,
}
_COPIES = {_aten._to_copy, _aten.copy_, _aten._foreach_copy_, _aten.copy}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index}
_FUNCTIONS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
"""Functions that read numbers of a processor's tensors without an operator."""


class DeviceReads:
    """Context that keeps which operators read numbers of tensors, or copied between devices.

    A copy to a device is kept in `sent`, all the others in `found`: a device takes the former in its order, and the
    trainer waits for the latter.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.sent: list[str] = []
        self._modes = (_Functions(self), _Operators(self))

    def __enter__(self) -> DeviceReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Functions(TorchFunctionMode):
    def __init__(self, reads: DeviceReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _FUNCTIONS:
            self._reads.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, reads: DeviceReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = func.overloadpacket
        if operator in _READS or (operator in _INDEXED and _has_mask(args[1])):
            self._reads.found.append(str(func))
        elif operator in _COPIES and (devices := _copied(operator, args, kwargs)) is not None:
            source, target = devices
            kept = self._reads.sent if source.type == "cpu" else self._reads.found
            kept.append(f"{func} {source.type} -> {target.type}")
        return func(*args, **kwargs)


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)


def _copied(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.device, torch.device] | None:
    """Return from which device to which an operator copies; None if it stays on one."""
    if operator is _aten._to_copy:
        source, target = args[0].device, kwargs.get("device") or args[0].device
    elif operator is _aten._foreach_copy_:
        source, target = args[1][0].device, args[0][0].device
    else:
        source, target = args[1].device, args[0].device
    return None if source == target else (source, torch.device(target))
