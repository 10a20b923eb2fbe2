"""How the dynamics are compiled, and where the machine code is kept.

With `NUMBA_DISABLE_JIT=1` everything stays Python, to step through it.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def constants(count: int) -> tuple[int, ...]:
    """Make numbers from 0 on that compiled functions are called with.

    Not plain integers: for each value of those numba compiles the function that takes it once more.
    """
    return tuple(cast(int, np.int64(number)) for number in range(count))


(ZERO,) = constants(1)


_INNER: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True}
"""Never called from Python, so numba need not make them callable; its types do not know that option."""


def compiled(function: Function) -> Function:
    """Compile a function that other compiled ones call, at the first call."""
    return cast(Function, numba.njit(function, **_INNER))


def entry(function: Function) -> Function:
    """Compile a function that is called from Python, and keep the machine code on disk for the next process."""
    settings: Any = numba.config
    before = settings.CACHE_DIR
    settings.CACHE_DIR = before or _FOLDER
    try:
        return cast(Function, numba.njit(function, cache=True, error_model="numpy"))
    finally:
        settings.CACHE_DIR = before


def _cache_folder() -> str:
    """Folder of the machine code, by content of the sources: numba itself notices changes in one file only."""
    here = Path(__file__).parent
    planning = here.parent.parent / "runtime" / "planning"
    sources = [*sorted(here.glob("*.py")), here.parent / "traces.py", planning / "estimators.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(base / "offcut" / f"kernel-{digest}")


_FOLDER = _cache_folder()
