"""Importing what is heavy: without searching it for garbage, and while something else is waited for."""

import atexit
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module


@contextmanager
def imported_to_stay() -> Iterator[None]:
    """Within the block is imported what stays to the end: Python need not search it for cycles, now or later.

    For torch and Prefect that takes 0.5 s of 5 s, and 0.2 s each time afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def imported_meanwhile(*modules: str) -> Iterator[None]:
    """Import these modules, in this order, in a thread beside the block. At its end they are there, to stay.

    One that cannot be imported is left to whoever needs it. The block must not import anything that imports them too:
    of two threads that wait for each other's imports, one is given a module that is not finished.
    """
    missing = [module for module in modules if module not in sys.modules]
    if not missing:
        yield
        return

    def run() -> None:
        gc.collect()  # what is garbage now would stay too
        atexit.register(gc.unfreeze)  # at the very end, triton takes what is still there for leaked, and tells of it
        with imported_to_stay():
            for module in missing:
                with suppress(ImportError):
                    import_module(module)

    thread = threading.Thread(target=run, name="imports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
