"""Helper modules that stand beside the tests that use them, in folders that are no packages."""

from __future__ import annotations

import importlib.util
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

_number = count()


def load_module(path: Path) -> ModuleType:
    """The module in a file, executed anew for each caller."""
    name = f"{path.stem}_{next(_number)}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
