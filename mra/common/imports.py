"""Imports that take less time."""

import gc
import importlib
from types import ModuleType


def import_quickly(name: str) -> ModuleType:
    """Import a module, and what it imports, out of the garbage collector's sight.

    An import makes a million objects that stay. Searching them for garbage takes a fifth of the time of the import, and
    as much again while the command runs and ends, so that they are left out for good.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
