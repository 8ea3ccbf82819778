"""Imports that take less time."""

import gc
import importlib
from types import ModuleType


def import_quickly(name: str) -> ModuleType:
    """Import a module, and what it imports, with the garbage collector off.

    An import makes millions of objects that stay; searching them for garbage over and over takes a fifth of its time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if was_enabled:
            gc.enable()
