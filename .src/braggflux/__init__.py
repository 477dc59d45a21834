"""From detector photon counts to merged structure-factor amplitudes in one differentiable model.

Examples
--------
Amplitudes of a rotation experiment, and of unmerged reflections::

    import braggflux

    braggflux.run(braggflux.RunConfig(expt="refined.expt", refl="refined.refl", out="run"))
    inputs = braggflux.MergeInputs(paths=(Path("unmerged.mtz"),), out=Path("merged"))
    braggflux.merge(inputs, braggflux.MergeConfig())

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
    from braggflux.pipelines.config.run import RunConfig
    from braggflux.pipelines.inputs.inputs import MergeInputs
    from braggflux.pipelines.integration.run import run
    from braggflux.pipelines.merging.merge import merge

__all__ = [
    "MergeConfig",
    "MergeInputs",
    "RunConfig",
    "merge",
    "open_store",
    "read_table",
    "run",
]
#: Public name -> module and name there; imported at the first use, for torch takes seconds.
_WHERE = {
    "MergeConfig": ("merge.config", "MergeConfig"),
    "MergeInputs": ("pipelines.inputs.inputs", "MergeInputs"),
    "RunConfig": ("pipelines.config.run", "RunConfig"),
    "merge": ("pipelines.merging.merge", "merge"),
    "open_store": ("merge.io.stores.opening", "open_store"),
    "read_table": ("merge.io.read", "read_table"),
    "run": ("pipelines.integration.run", "run"),
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
        """Merge as :func:`braggflux.pipelines.merging.merge.merge`."""
        return _public("merge")(*args, **kwargs)


importlib.import_module(f"{__name__}.merge")
sys.modules[f"{__name__}.merge"].__class__ = _MergePackage
