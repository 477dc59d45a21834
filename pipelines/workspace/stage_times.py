"""Where the time of a run goes: wall and CPU time of its stages, one row each time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

COLUMNS = ("epoch", "stage", "wall_s", "cpu_s")


@dataclass
class StageTimes:
    """Clock of the stages.

    Parameters
    ----------
    rows : list of dict
        Of what has ended: epoch (None outside of epochs), stage, wall time and CPU time of this
        process with all its threads [s].
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def __call__(self, stage: str, epoch: int | None = None) -> Iterator[None]:
        """Take the time of a block that ends well."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.add(stage, time.perf_counter() - wall, time.process_time() - cpu, epoch)

    def add(self, stage: str, wall_s: float, cpu_s: float, epoch: int | None = None) -> None:
        """Add what was measured elsewhere."""
        row = {"epoch": epoch, "stage": stage}
        self.rows.append(row | {"wall_s": round(wall_s, 3), "cpu_s": round(cpu_s, 3)})

    def summary(self) -> str:
        """CPU time of each stage, all epochs together, in the order of their first ends."""
        total: dict[str, float] = {}
        for row in self.rows:
            total[row["stage"]] = total.get(row["stage"], 0.0) + row["cpu_s"]
        return ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in total.items())
