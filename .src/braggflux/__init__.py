"""From detector photon counts to merged structure-factor amplitudes in one differentiable model.

Examples
--------
From the frames of a rotation experiment, or unmerged reflections, to amplitudes, anomalous peaks
and a figure::

    import braggflux as bf

    run = bf.run("refined.expt", "refined.refl", model="model.pdb", out="run", d_min=2.0)
    run.amplitudes.table()
    run.amplitudes.peaks("model.pdb")
    run.amplitudes.plot_map("model.pdb").savefig("map.png")

    merged = bf.merge("unmerged.mtz", "merged", anomalous=True)
    merged.amplitudes.dataset()

The packages lie in the folders of the same names at the top of the source tree; here they have one
name in common, so that nothing else of this distribution stands in ``site-packages``.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from braggflux.merge.config import MergeConfig
    from braggflux.merge.io.read import read_table
    from braggflux.merge.io.stores.opening import open_store
    from braggflux.pipelines.api.actions import merge, process, run
    from braggflux.pipelines.api.amplitudes import Amplitudes
    from braggflux.pipelines.api.results import Merge, Run
    from braggflux.pipelines.api.simulation import simulate, simulate_stills
    from braggflux.pipelines.config.run import RunConfig
    from braggflux.pipelines.inputs.inputs import MergeInputs

__all__ = [
    "Amplitudes",
    "Merge",
    "MergeConfig",
    "MergeInputs",
    "Run",
    "RunConfig",
    "merge",
    "open_store",
    "process",
    "read_table",
    "run",
    "simulate",
    "simulate_stills",
]
#: Public name -> module and name there; imported at the first use, for torch takes seconds.
_WHERE = {
    "Amplitudes": ("pipelines.api.amplitudes", "Amplitudes"),
    "Merge": ("pipelines.api.results", "Merge"),
    "Run": ("pipelines.api.results", "Run"),
    "process": ("pipelines.api.actions", "process"),
    "simulate": ("pipelines.api.simulation", "simulate"),
    "simulate_stills": ("pipelines.api.simulation", "simulate_stills"),
    "MergeConfig": ("merge.config", "MergeConfig"),
    "MergeInputs": ("pipelines.inputs.inputs", "MergeInputs"),
    "RunConfig": ("pipelines.config.run", "RunConfig"),
    "merge": ("pipelines.api.actions", "merge"),
    "open_store": ("merge.io.stores.opening", "open_store"),
    "read_table": ("merge.io.read", "read_table"),
    "run": ("pipelines.api.actions", "run"),
}


def _public(name: str) -> Any:
    module, original = _WHERE[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), original)


if not TYPE_CHECKING:  # which would then take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = _public(name)
        return value


def __dir__() -> list[str]:
    return list(__all__)


class _MergePackage(ModuleType):
    """The package ``braggflux.merge``, which is also the function of this name.

    An import of any of its modules sets the attribute ``merge`` of ``braggflux`` to the package: a
    function of the same name would be lost, so the package is made callable.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Merge as :func:`braggflux.pipelines.api.actions.merge`."""
        return _public("merge")(*args, **kwargs)


importlib.import_module(f"{__name__}.merge")
sys.modules[f"{__name__}.merge"].__class__ = _MergePackage
