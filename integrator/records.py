"""Frozen records of tensors: the base of everything that crosses module boundaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorRecord:
    """A frozen record of tensors, and of such records, that share their first axis.

    Fields of other types belong to the record as a whole: they stay as they are.
    """

    def __len__(self) -> int:
        """Length of the first axis."""
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, index: Tensor | slice) -> Self:
        """Select along the first axis."""
        return self._map(lambda t: t[index])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Copy to a device; ``non_blocking`` from pinned memory while the host goes on."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy to memory that a GPU reads by itself."""
        return self._map(lambda t: t.pin_memory())

    def detach(self) -> Self:
        """Cut the graph."""
        return self._map(lambda t: t.detach())

    def columns(self) -> dict[str, Tensor]:
        """All tensors by the names of their fields, those of nested records among them."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, TensorRecord):
                found |= value.columns()
            elif isinstance(value, Tensor):
                found[field.name] = value
        return found

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Tensor | TensorRecord] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, TensorRecord):
                changed[field.name] = value._map(function)
            elif isinstance(value, Tensor):
                changed[field.name] = function(value)
        return replace(self, **changed)
