"""How many cases there are, and what none of them may do: hang, fill the memory, or write where it should not.

`make test` tries the same fifty of each kind every time, `make soak` thousands of others (FUZZ_CASES).
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

CASES = int(os.environ.get("FUZZ_CASES", "50"))
_MIB = 2**20
_MOST_MIB = 500

FUZZ = settings(
    max_examples=CASES,
    deadline=10_000,  # milliseconds for a case
    derandomize="FUZZ_CASES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The peak of this process' memory grows by less than 500 MB, and its directory stays empty."""
    where = tmp_path / "empty"
    where.mkdir()
    monkeypatch.chdir(where)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert list(where.iterdir()) == []
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / _MIB
    assert grown < _MOST_MIB, f"{grown:.0f} MiB more memory"
