"""Records of tensors: selection, copies and columns, through nested records too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from braggflux.integrator.records import TensorRecord


@dataclass(frozen=True)
class Inner(TensorRecord):
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Outer(TensorRecord):
    inner: Inner
    c: Tensor
    n_frames: tuple[int, ...]
    missing: Tensor | None = None


def record() -> Outer:
    values = torch.arange(6.0, requires_grad=True)
    return Outer(Inner(values, values.reshape(6, 1) * 2), torch.arange(6), (7, 8))


def test_rows_are_selected_in_all_records():
    whole = record()
    part = whole[torch.tensor([4, 1])]
    assert (len(whole), len(part)) == (6, 2)
    assert isinstance(part, Outer)
    assert isinstance(part.inner, Inner)
    assert part.inner.a.tolist() == [4.0, 1.0]
    assert part.inner.b.tolist() == [[8.0], [2.0]]
    assert part.c.tolist() == [4, 1]
    assert (part.n_frames, part.missing) == ((7, 8), None), "of the record as a whole"
    assert whole[2:].inner.a.tolist() == [2.0, 3.0, 4.0, 5.0]


def test_the_graph_is_kept_or_cut():
    whole = record()
    assert whole[:2].to("cpu").inner.b.requires_grad
    cut = whole.detach()
    assert not cut.inner.a.requires_grad
    assert not cut.inner.b.requires_grad


def test_columns_go_by_the_names_of_all_fields():
    whole = record()
    assert list(whole.columns()) == ["a", "b", "c"]
    assert whole.columns()["b"] is whole.inner.b
