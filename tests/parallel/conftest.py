from collections.abc import Iterator

import pytest

from tests.forked import ranks_are_forked


@pytest.fixture(scope="module", autouse=True)
def forked_ranks() -> Iterator[None]:
    """Only the ranks of commands are started as a user's are."""
    with ranks_are_forked():
        yield
