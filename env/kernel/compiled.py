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


_ALL: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
"""Nothing allocates, so no references are counted: that takes two atomic operations per array in every call."""

_INNER = _ALL | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Never called from Python or C, so numba need not make them callable; its types do not know these options."""


def compiled(function: Function) -> Function:
    """Compile a function that other compiled ones call, at the first call."""
    return cast(Function, numba.njit(function, **_INNER))


@compiled
def wide(number: int) -> int:
    """Widen a number that is kept in few bytes: for each width numba compiles what takes it once more."""
    return int(np.int64(number))


def entry(function: Function) -> Function:
    """Compile a function that is called from Python, and keep the machine code on disk for the next process."""
    settings: Any = numba.config
    before = settings.CACHE_LOCATOR_CLASSES
    settings.CACHE_LOCATOR_CLASSES = before or f"{__name__}.{ByContent.__name__},UserWideCacheLocator"
    try:
        return cast(Function, numba.njit(function, cache=True, **_ALL))
    finally:
        settings.CACHE_LOCATOR_CLASSES = before


class ByContent:
    """Tells numba where to keep machine code: in a folder that is named by the content of all sources.

    Its own ways take the path of one file: each checkout would compile anew, and changes elsewhere go unnoticed.
    """

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> "ByContent | None":
        """Choose the folder; none where it cannot be made."""
        del function, file
        try:
            Path(_FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        return cls()

    def ensure_cache_path(self) -> None:
        """Nothing more to do."""

    def get_cache_path(self) -> str:
        """Folder of the files."""
        return _FOLDER

    def get_source_stamp(self) -> str:
        """Tell of which sources they are."""
        return _FOLDER

    def get_disambiguator(self) -> str:
        """One function of a name is all there is."""
        return "0"


def _cache_folder() -> str:
    """Folder of the machine code, by content of the sources."""
    here = Path(__file__).parent
    planning = here.parent.parent / "runtime" / "planning"
    names = ("arrays.py", "candidates.py", "cost.py", "estimators.py", "features.py")  # their constants are compiled in
    sources = [
        *sorted(here.glob("*.py")),
        here.parent / "traces.py",
        here.parent / "world.py",
        *(planning / name for name in names),
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(base / "offcut" / f"kernel-{digest}")


_FOLDER = _cache_folder()
