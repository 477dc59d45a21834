"""A device that is not there: its tensors know where they are and refuse those of the CPU.

A :class:`Tagged` tensor says that it lies on :data:`DEVICE` and holds its numbers on the CPU,
where the operators compute. What a GPU would refuse is refused: an operator on tensors of both
devices (numbers without a dimension may come from anywhere), ``numpy()``. What would make the
program wait for a GPU is counted: numbers fetched (``item``, ``float``, ``bool``), results whose
size depends on values (boolean indexing, ``nonzero``, ``unique``), copies back to the CPU.

All of it works within :class:`OnDevice` only.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from traceback import extract_stack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import braggflux.integrator

_setup_privateuseone_for_python_backend("tagged")
DEVICE = torch.device("tagged", 0)
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
#: Operators whose result has a size, or is a number, that the host must wait for.
WAITING = (
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default),
    *(aten._unique2.default, aten.unique_consecutive.default, aten.bincount.default),
    *(aten.equal.default, aten.is_nonzero.default, aten.repeat_interleave.Tensor),
)
ROOT = Path(braggflux.integrator.__file__).parents[1]


class Tagged(Tensor):
    """A tensor of the device; ``inner`` has its values, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tagged:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        """Fetch the values, which waits."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as tensors of a GPU do; with ``force`` fetch the values, which waits."""
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"numpy() of a tensor on {DEVICE}, at {_line_of_ours()}: use cpu() first")

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:
        """Copy numbers to the device."""
        return torch.tensor(data, dtype=dtype or self.dtype).to(DEVICE)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class OnDevice(TorchDispatchMode):
    """Operators by what they are asked to do: where they wait for the device, and their number.

    Attributes
    ----------
    waits : Counter
        By operator and the line of ours that asked for it.
    uploads : Counter
        Copies of tensors to the device, the same way.
    n_operators : int
        On tensors of the device.
    n_bytes : int
        Of the results of operators, those that are views or changed in place left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.n_operators = 0
        self.n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_tagged = any(isinstance(x, Tagged) for x in tree_leaves((args, kwargs)))
        out = _compute(func, args, kwargs)
        is_tagged = is_tagged or any(isinstance(x, Tagged) for x in tree_leaves(out))
        self.n_operators += is_tagged
        if is_tagged and not func.is_view and not func._schema.is_mutable:
            made = [x for x in tree_leaves(out) if isinstance(x, Tagged)]
            self.n_bytes += sum(x.numel() * x.element_size() for x in made)
        if is_tagged and _waits(func, args, kwargs, out):
            self.waits[f"{func} {_line_of_ours()}"] += 1
        elif func is aten._to_copy.default and isinstance(out, Tagged):
            if not isinstance(args[0], Tagged):
                self.uploads[f"{func} {_line_of_ours()}"] += 1
        return out


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU; refuse to mix; tag what belongs to the device."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    tagged = [x for x in tensors if isinstance(x, Tagged)]
    strangers = [x for x in tensors if not isinstance(x, Tagged) and x.dim()]
    if tagged and strangers and func not in COPIES:
        raise AssertionError(f"{func} of tensors on {DEVICE} and on the CPU, at {_line_of_ours()}")
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(
        lambda x: x.inner if isinstance(x, Tagged) else x, (args, kwargs)
    )
    out = func(*plain_args, **plain_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if not tagged if asked is None else torch.device(asked).type != DEVICE.type:
        return out
    known = {id(x.inner): x for x in tagged}  # what an operator changed in place stays itself

    def tag(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Tagged(value)

    return tree_map(tag, out)


def _waits(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> bool:
    if func in WAITING:
        return True
    if func is aten._to_copy.default:
        return isinstance(args[0], Tagged) and not isinstance(out, Tagged)
    if func is aten.copy_.default:
        return isinstance(args[1], Tagged) and not isinstance(args[0], Tagged)
    if func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_"):
        masks = (torch.bool, torch.uint8)
        return any(i is not None and i.dtype in masks for i in args[1])
    return False


def _line_of_ours() -> str:
    for frame in reversed(extract_stack()):
        if frame.filename.startswith(str(ROOT)):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.line}"
    return "a test"
