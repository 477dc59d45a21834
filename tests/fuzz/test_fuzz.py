"""A few damaged files of each format on every run, and every one that was a fault once.

``make fuzz`` reads as many as one likes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine import BAD, Outcome, run_cases, run_edits
from readers import Reader, readers

REGRESSIONS = Path(__file__).with_name("regressions")
#: What the slowest readers can do in the time of a test.
N_CASES = {
    **{"shoeboxes": 60, "shoeboxes-run": 12, "checkpoint": 30, "unmerged": 50},
    **{"nxmx-blosc": 100, "nxmx-tiles": 100},
}


@pytest.fixture(params=readers(), ids=lambda reader: reader.name)
def reader(request) -> Reader:
    return request.param


def faults(outcomes: list[Outcome]) -> list[str]:
    return [f"{o.fault} {json.dumps(o.edits)[:300]}" for o in outcomes if o.kind in BAD]


@pytest.mark.slow
def test_damaged_files_are_read_or_refused(reader):
    outcomes = list(run_cases(reader, range(N_CASES.get(reader.name, 200))))
    assert not faults(outcomes)
    kinds = {outcome.kind for outcome in outcomes}
    assert kinds == {"read", "refused"}, "damage that is always or never noticed tests nothing"


@pytest.mark.slow
def test_what_was_a_fault_is_none(reader):
    path = REGRESSIONS / f"{reader.name}.jsonl"
    if not path.is_file():
        pytest.skip("no fault is known")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert not faults(list(run_edits(reader, [case["edits"] for case in cases])))


@pytest.mark.slow
def test_valid_files_are_possible(reader):
    """The value checks pass what the seeds hold, so that they find damage alone."""
    (outcome,) = run_edits(reader, [[]])
    assert outcome.kind == "read", outcome
