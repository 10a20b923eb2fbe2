"""What a test bed pretends to be: the speed of a node, the shape of a link; presets with the source of their ratio."""

import math
from dataclasses import dataclass
from typing import Literal

from runtime.errors import ConfigError

Mode = Literal["compute", "replay"]


@dataclass(frozen=True, slots=True)
class Preset:
    """One kind of machine: how many times longer than one thread of this machine it takes, and who says so."""

    slow_down: float
    source: str


_REFERENCE_S = 0.12684
"""ResNet-50, float32, batch 1 on one thread of an AMD Threadripper 3970X (Zen 2), in the table that the presets come
from. Guess: one thread of this machine is like that one. Where it is not, give `slow_down` instead of a preset."""

_TABLE = "github.com/Tencent/ncnn, benchmark/README.md, ResNet-50 float32 batch 1, minimum, over one thread of a Zen 2"

PRESETS = {
    "rpi4": Preset(0.48030 / _REFERENCE_S, f"Raspberry Pi 4B, four Cortex-A72 at 1.5 GHz, 480.30 ms; {_TABLE}"),
    "desktop": Preset(
        0.24,
        "i7-8700 class, six threads. Guess: six threads of the reference at 0.7 each, which is what four threads of a "
        f"Ryzen V1605B reach (198.27 ms to 69.23 ms); {_TABLE}",
    ),
    "jetson": Preset(0.01303 / _REFERENCE_S, f"Jetson AGX Xavier, its GPU through Vulkan, 13.03 ms; {_TABLE}"),
    "gpu": Preset(0.00421 / _REFERENCE_S, f"RTX 2080 through Vulkan, 4.21 ms; {_TABLE}"),
}
"""Machines of the papers: LoADPart and D3 have a Raspberry Pi 4B as device; D3 has desktops as edge nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEmulation:
    """How fast a node pretends to be. Give `preset` or `slow_down`; `mode` follows from them when left out."""

    preset: str | None = None
    """One of `PRESETS`."""
    slow_down: float | None = None
    """Service time over that of one idle thread of this machine."""
    mode: Mode | None = None
    """`compute`: every request is really computed, then waited for. `replay`: the true activations of a fixed sample
    come after the service time, whatever was sent; the only way for machines faster than this one, and their default.
    """

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the field.
        """
        if (self.preset is None) == (self.slow_down is None):
            raise ConfigError(f"expected preset or slow_down, one of them, got {self.preset!r} and {self.slow_down!r}")
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(f"expected preset to be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.slow_down is not None and not (_is_number(self.slow_down) and 0.0 < self.slow_down < math.inf):
            raise ConfigError(f"expected slow_down to be a number above 0, got {self.slow_down!r}")
        if self.mode not in (None, "compute", "replay"):
            raise ConfigError(f"expected mode to be compute or replay, got {self.mode!r}")
        if self.mode == "compute" and self.factor < 1.0:
            raise ConfigError(
                f"expected mode to be replay where slow_down is {self.factor:.3g}, got 'compute': this machine cannot "
                "compute faster than it does; replay, or take a slow_down of at least 1"
            )

    @property
    def factor(self) -> float:
        """Service time over that of one idle thread of this machine."""
        if self.slow_down is not None:
            return self.slow_down
        assert self.preset is not None
        return PRESETS[self.preset].slow_down

    @property
    def is_replay(self) -> bool:
        """Whether answers are those to a fixed sample."""
        return self.mode == "replay" or (self.mode is None and self.factor < 1.0)

    @property
    def label(self) -> str:
        """Word for tables: `emulated`, or `replayed`."""
        return "replayed" if self.is_replay else "emulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkEmulation:
    """How one direction of a link pretends to be: a constant rate or a recorded one, and a delay."""

    rate_bps: float | None = None
    """Constant rate; None: as fast as the machine, unless there is a trace."""
    trace: str | None = None
    """Path of a recorded bandwidth (CSV, Mahimahi, Sabre), repeated for ever."""
    scale: float = 1.0
    """Factor on the trace's bandwidth; uplinks are commonly 0.1 to 0.5 of the downlinks that were recorded."""
    delay_s: float | None = None
    """One way; None: half the trace's round trip, where it has one, else none."""
    jitter_s: float = 0.0
    """Added to the delay, drawn evenly from [0, jitter_s]."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the field.
        """
        if self.rate_bps is not None and self.trace is not None:
            raise ConfigError(f"expected rate_bps or trace, not both, got {self.rate_bps!r} and {self.trace!r}")
        if self.trace is not None and (not isinstance(self.trace, str) or not self.trace):
            raise ConfigError(f"expected trace to be the path of a file, got {self.trace!r}")
        for name, low_is_fine in (("rate_bps", False), ("scale", False), ("delay_s", True), ("jitter_s", True)):
            value = getattr(self, name)
            if value is None and name in ("rate_bps", "delay_s"):
                continue
            if not _is_number(value) or not 0.0 <= value < math.inf or (value == 0.0 and not low_is_fine):
                least = "of at least" if low_is_fine else "above"
                raise ConfigError(f"expected {name} to be a number {least} 0, got {value!r}")
        if self.scale != 1.0 and self.trace is None:
            raise ConfigError(f"expected scale only beside a trace, got {self.scale!r}; put it into rate_bps")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    """One link, as a test bed emulates it; real machines are connected by what there is."""

    between: tuple[str, str]
    """Its two ends, the one nearer to the device first; two edge nodes in any order."""
    emulate: LinkEmulation
    """Both directions, or the one from the first end to the second when `back` is given."""
    back: LinkEmulation | None = None
    """The direction from the second end to the first; None: like `emulate`."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
