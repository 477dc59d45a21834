"""Unique reflections of several datasets in one table, each row with its parent.

A row's amplitude is expected to be like that of its parent: the same reflection of the parent
dataset (light and dark), or the Bijvoet mate F(+) of an F(-). A reflection whose parent is outside
the parent's resolution limit, or absent there, has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError


class UniqueRows:
    """Rows of all datasets' asymmetric units, one after the other.

    Parameters
    ----------
    asus : sequence of ReciprocalAsu
        One per dataset.
    parents : sequence of int or None
        Dataset that each dataset's amplitudes resemble.
    couple_mates : bool
        F(-) has F(+) as its parent where its dataset has none.

    Attributes
    ----------
    first : ndarray, (n_datasets + 1,)
        First row of each dataset.
    d, epsilon, is_centric, dataset, parent : ndarray, (R,)
        ``parent`` is a row or -1.
    depth : ndarray, (R,)
        Steps to the row without parent.
    group : ndarray, (R,)
        Number of the tree that the row belongs to, 0 .. n_groups - 1.
    joined : ndarray, (R,)
        Row of F(+) for F(-), the row itself otherwise.
    """

    def __init__(
        self,
        asus: Sequence[ReciprocalAsu],
        parents: Sequence[int | None] | None = None,
        couple_mates: bool = False,
    ) -> None:
        self.asus = tuple(asus)
        parents = check_parents(parents or [None] * len(asus), len(asus))
        self.first = np.concatenate([[0], np.cumsum([len(asu) for asu in asus])])
        self.d = np.concatenate([asu.d for asu in asus])
        self.epsilon = np.concatenate([asu.epsilon for asu in asus])
        self.is_centric = np.concatenate([asu.is_centric for asu in asus])
        self.dataset = np.repeat(np.arange(len(asus)), np.diff(self.first))
        self.parent = np.full(len(self), -1)
        self.joined = np.arange(len(self))
        for k, asu in enumerate(asus):
            rows = slice(self.first[k], self.first[k + 1])
            is_minus = asu.friedel_sign < 0
            self.joined[rows][is_minus] = asu.friedel_mate[is_minus] + self.first[k]
            above = parents[k]
            if above is not None:
                found = asus[above].refl_id(asu.miller_index)
                self.parent[rows] = np.where(found >= 0, found + self.first[above], -1)
            elif couple_mates:
                self.parent[rows] = np.where(is_minus, asu.friedel_mate + self.first[k], -1)
        self.depth, root = self._climb()
        self.group = np.unique(root, return_inverse=True)[1]
        self.n_groups = int(self.group.max()) + 1

    def __len__(self) -> int:
        """Count the rows, R."""
        return int(self.first[-1])

    def _climb(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        depth, root = np.zeros(len(self), dtype=np.int64), np.arange(len(self))
        for _ in range(len(self.asus) + 1):
            above = self.parent[root]
            depth += above >= 0
            root = np.where(above >= 0, above, root)
        return depth, root

    def shells(self, n_shells: int) -> NDArray[np.int64]:
        """Resolution shell of each row, equally many rows each, 0 at low resolution, (R,)."""
        order = np.argsort(np.argsort(-self.d, kind="stable"), kind="stable")
        return order * n_shells // len(order)

    @property
    def ties_datasets(self) -> bool:
        """Whether some row has its parent in another dataset."""
        child = np.flatnonzero(self.parent >= 0)
        return bool((self.dataset[self.parent[child]] != self.dataset[child]).any())

    def rows(self, dataset: int) -> slice:
        """Rows of one dataset."""
        return slice(self.first[dataset], self.first[dataset + 1])


def parse_parents(text: str | None) -> tuple[int | None, ...] | None:
    """Read ``none,0``.

    Raises
    ------
    UserError
    """
    if text is None:
        return None
    parents: list[int | None] = []
    for word in text.split(","):
        if word.strip().lower() == "none":
            parents.append(None)
        elif word.strip().isdigit():
            parents.append(int(word))
        else:
            raise UserError(
                f"--parents {text}: {word!r} is neither none nor the number of a dataset, "
                "counted from 0; give one of each, e.g. none,0"
            )
    return tuple(parents)


def check_parents(parents: Sequence[int | None], n_datasets: int) -> list[int | None]:
    """Refuse parents that do not exist or lead back to their child.

    Raises
    ------
    UserError
    """
    given = ",".join("none" if p is None else str(p) for p in parents)
    if len(parents) != n_datasets:
        raise UserError(
            f"--parents names {len(parents)} parents ({given}) for {n_datasets} datasets; "
            "give one of each dataset, none or its number from 0, e.g. none,0"
        )
    for child, parent in enumerate(parents):
        if parent is not None and not 0 <= parent < n_datasets:
            raise UserError(
                f"--parents {given}: dataset {parent} does not exist; "
                f"allowed are none and 0 to {n_datasets - 1}"
            )
        seen: set[int] = set()
        step: int | None = child
        while step is not None:
            if step in seen:
                raise UserError(
                    f"--parents {given}: dataset {child} is its own parent or ancestor; "
                    "let the parents form a tree, e.g. none,0"
                )
            seen.add(step)
            step = parents[step]
    return list(parents)
