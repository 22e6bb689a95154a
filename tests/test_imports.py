"""Modules imported beside other work are there at its end, and one that cannot be imported is left to its user."""

import gc
import sys
from contextlib import suppress
from importlib import import_module

import pytest

from nightshift.imports import imported_meanwhile, imported_to_stay


def test_what_is_imported_beside_other_work_is_there_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with imported_meanwhile("there_is_no_such_module", "colorsys"):
        pass
    assert "colorsys" in sys.modules


def test_garbage_is_collected_again_after_the_imports_whatever_they_end_with() -> None:
    try:
        with suppress(ImportError), imported_to_stay():
            assert not gc.isenabled()
            import_module("there_is_no_such_module")
        assert gc.isenabled()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
