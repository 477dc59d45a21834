"""Friedel halves in two stores read as they would be joined in memory."""

from __future__ import annotations

from dataclasses import replace

import gemmi
import numpy as np
import pytest

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.errors import UserError
from braggflux.merge.io.observations import UnmergedData, combine_friedel, make_unmerged
from braggflux.merge.io.reindexing import reindex
from braggflux.merge.io.stores.friedel_store import FriedelStore
from braggflux.merge.io.stores.reindexed_store import reindex_store
from braggflux.merge.io.stores.unmerged_store import UnmergedStore, write_unmerged_store

CELL, GROUP = gemmi.UnitCell(40, 40, 60, 90, 90, 120), gemmi.SpaceGroup("P 63")


def half(sign, name, *, with_batch=True, images=range(1, 30), seed=0) -> UnmergedData:
    """Observations of one mate on some images; those of centric reflections are in both."""
    asu = ReciprocalAsu(CELL, GROUP, 5.0, True)
    rng = np.random.default_rng(2 * seed + sign + 1)
    rows = np.flatnonzero((asu.friedel_sign == sign) | asu.is_centric)
    batch = np.repeat(list(images), rng.integers(5, 30, len(images)))
    row, n = rng.choice(rows, len(batch)), len(batch)
    metadata = {"X": rng.random(n).astype(np.float32), f"only {name}": np.zeros(n)}
    return make_unmerged(
        source=name,
        miller_index=asu.miller_index[row],
        intensity=rng.normal(10, 5, n).astype(np.float32),
        sigma=rng.uniform(1, 2, n).astype(np.float32),
        image_label=batch,
        metadata=metadata | ({"BATCH": batch} if with_batch else {}),
        wavelength=np.full(n, 1.0),
        cell=CELL,
        space_group=GROUP,
        name=name,
        has_lp_applied=True,
    )


def stored(folder, data, *more):
    path = folder / f"{data.name}.h5"
    write_unmerged_store(path, [data, *more])
    return UnmergedStore(path)


def assert_same(a: UnmergedData, b: UnmergedData):
    for name in ("miller_index", "intensity", "sigma", "image", "wavelength"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.metadata.keys() == b.metadata.keys()
    for name, column in a.metadata.items():
        np.testing.assert_array_equal(column, b.metadata[name], err_msg=name)
    assert (a.name, a.has_lp_applied, a.cell) == (b.name, b.has_lp_applied, b.cell)


@pytest.mark.parametrize("as_mates", [False, True])
@pytest.mark.parametrize("with_batch", [True, False])
def test_joined_as_in_memory(tmp_path, with_batch, as_mates):
    """Some images are in one half only."""
    plus = half(1, "h_plus", with_batch=with_batch, images=[*range(2, 20), 25, 31])
    minus = half(-1, "h_minus", with_batch=with_batch, images=[1, *range(5, 31)])
    if as_mates:
        minus = replace(minus, miller_index=-minus.miller_index)
    whole = combine_friedel(plus, minus)
    with FriedelStore(stored(tmp_path, plus), stored(tmp_path, minus)) as store:
        assert (len(store), store.n_images, store.name) == (len(whole), whole.n_images, "h")
        np.testing.assert_array_equal(store.image_starts, whole.image_starts)
        assert set(store.metadata_names) == set(whole.metadata)
        assert_same(store.read(), whole)
        seen = []
        for first, block in store.blocks(7):
            inside = (whole.image >= first) & (whole.image < first + 7)
            wanted = whole.select(inside)
            assert_same(block, replace(wanted, image=wanted.image - first))
            seen.append(len(block))
        assert sum(seen) == len(whole)
        for rows in (slice(0, len(whole)), slice(37, 38), slice(101, 333), slice(5, 5)):
            for name in ("miller_index", "intensity", "metadata/X"):
                column = getattr(whole, name, whole.metadata["X"])
                np.testing.assert_array_equal(store.column(name, rows), column[rows])


def test_reindexed_before_it_is_joined(tmp_path):
    plus, minus = half(1, "h_plus"), half(-1, "h_minus")
    whole = combine_friedel(plus, reindex(minus, "k,h,-l"))
    turned = reindex_store(stored(tmp_path, minus), "k,h,-l")
    with FriedelStore(stored(tmp_path, plus), turned) as store:
        assert_same(store.read(), whole)
        rows = slice(10, 400)
        np.testing.assert_array_equal(store.column("miller_index", rows), whole.miller_index[rows])


def test_what_cannot_be_joined_is_said(tmp_path):
    plus, minus = half(1, "h_plus"), half(-1, "h_minus")
    late, early = (half(1, "late", images=images, seed=3) for images in ([8, 9], [3, 4]))
    with stored(tmp_path, plus) as a, stored(tmp_path, minus) as b:
        with stored(tmp_path, late, replace(early, metadata=rename(early, late))) as c:
            with pytest.raises(UserError, match="not in the order of their BATCH"):
                FriedelStore(c, b)
        with stored(tmp_path, replace(combine_friedel(plus, minus), name="both")) as c:
            with pytest.raises(UserError, match=r"both holds .* of its Friedel mate"):
                FriedelStore(a, c)
        other = replace(minus, cell=gemmi.UnitCell(44, 44, 60, 90, 90, 120), name="other")
        with stored(tmp_path, other) as c, pytest.raises(UserError, match="cells of"):
            FriedelStore(a, c)


def rename(data, like):
    """Metadata of ``data`` under the names of another dataset's."""
    return dict(zip(like.metadata, data.metadata.values(), strict=True))
