"""Modules imported beside other work are there at its end, and one that cannot be imported is left to its user."""

import gc
import sys
import threading
from contextlib import suppress
from importlib import import_module

import pytest

from nightshift.imports import imported_meanwhile, imported_to_stay


def test_what_is_imported_beside_other_work_is_there_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    try:
        with imported_meanwhile("there_is_no_such_module", "colorsys"):
            pass
        assert "colorsys" in sys.modules
        assert gc.isenabled()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_beside_other_work_nothing_is_done_if_all_is_imported_already() -> None:
    with imported_meanwhile("colorsys"):
        pass
    gc.unfreeze()
    with imported_meanwhile("colorsys"):
        assert gc.isenabled()
        assert not any(thread.name == "imports" for thread in threading.enumerate())
    assert not gc.get_freeze_count()


def test_garbage_is_collected_again_after_the_imports_whatever_they_end_with() -> None:
    try:
        with suppress(ImportError), imported_to_stay():
            assert not gc.isenabled()
            import_module("there_is_no_such_module")
        assert gc.isenabled()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
