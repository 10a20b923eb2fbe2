"""Random numbers for compiled draws: xoshiro256++ (Blackman and Vigna 2021) and what is made of it.

A stream is four words; those of many streams are mixed, as SplitMix64 does (Steele et al. 2014), from four that numpy's
SeedSequence hashes from a seed (`env.draw`).
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from env.kernel.compiled import compiled, entry

Stream = Any
"""Four words of uint64, not all 0; every draw changes them."""

_WORD = np.uint64
_ROTATE, _BACK, _SHIFT = _WORD(23), _WORD(41), _WORD(17)
_ROTATE_LAST, _BACK_LAST = _WORD(45), _WORD(19)
_FRACTION, _SIGN, _LAYER = _WORD(11), _WORD(8), _WORD(255)
_ONE = _WORD(1)
_STEP = 2.0**-53
_GOLDEN, _MIX, _MIX_AGAIN = _WORD(0x9E3779B97F4A7C15), _WORD(0xBF58476D1CE4E5B9), _WORD(0x94D049BB133111EB)
_FIRST, _SECOND, _LAST = _WORD(30), _WORD(27), _WORD(31)

_LAYERS = 256
_TAIL = 3.6541528853610088
"""Where the lowest of 256 layers of equal area ends (Marsaglia and Tsang 2000, table of constants)."""


def _layers() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Right ends of the layers under exp(-x^2 / 2), from the lowest up, and their heights; the first is the tail's box."""
    area = _TAIL * math.exp(-0.5 * _TAIL**2) + math.sqrt(0.5 * math.pi) * math.erfc(_TAIL / math.sqrt(2.0))
    ends = [area / math.exp(-0.5 * _TAIL**2), _TAIL]
    for _ in range(2, _LAYERS):
        ends.append(math.sqrt(-2.0 * math.log(area / ends[-1] + math.exp(-0.5 * ends[-1] ** 2))))
    x = np.array([*ends, 0.0])
    return x, np.exp(-0.5 * x**2)


_END, _HEIGHT = _layers()


@entry
def seed_streams(words: Stream, streams: Any) -> None:
    """Make streams of four words, shape (streams, 4)."""
    offset = _GOLDEN
    for number in range(len(streams)):
        for at in range(4):
            word = words[at] + offset
            word = (word ^ (word >> _FIRST)) * _MIX
            word = (word ^ (word >> _SECOND)) * _MIX_AGAIN
            streams[number, at] = word ^ (word >> _LAST)
        offset += _GOLDEN


@compiled
def next_word(stream: Stream) -> Any:
    """Draw 64 bits."""
    a, b, c, d = stream[0], stream[1], stream[2], stream[3]
    total = a + d
    out = ((total << _ROTATE) | (total >> _BACK)) + a
    shifted = b << _SHIFT
    c ^= a
    d ^= b
    stream[1] = b ^ c
    stream[0] = a ^ d
    stream[2] = c ^ shifted
    stream[3] = (d << _ROTATE_LAST) | (d >> _BACK_LAST)
    return out


@compiled
def uniform(stream: Stream) -> float:
    """Draw evenly from [0, 1)."""
    return float(np.float64(next_word(stream) >> _FRACTION) * _STEP)


@compiled
def between(stream: Stream, bounds: Any) -> float:
    """Draw evenly between two numbers."""
    return float(bounds[0] + uniform(stream) * (bounds[1] - bounds[0]))


@compiled
def log_between(stream: Stream, bounds: Any) -> float:
    """Draw evenly in the logarithm."""
    return float(bounds[0] * math.exp(uniform(stream) * math.log(bounds[1] / bounds[0])))


@compiled
def below(stream: Stream, count: int) -> int:
    """Draw one of the numbers from 0 on."""
    return int(uniform(stream) * count)


@compiled
def exponential(stream: Stream) -> float:
    """Draw from the exponential distribution of mean 1."""
    return -math.log(1.0 - uniform(stream))


@compiled
def normal(stream: Stream) -> float:
    """Draw from the standard normal distribution (Marsaglia and Tsang 2000)."""
    word = next_word(stream)
    layer = int(np.int64(word & _LAYER))
    x = np.float64(word >> _FRACTION) * _STEP * _END[layer]
    sign = 1.0 - 2.0 * np.float64((word >> _SIGN) & _ONE)  # a branch would be guessed wrong every other time
    if x < _END[layer + 1]:
        return float(sign * x)
    return float(sign * _beside(stream, layer, x))


@compiled
def _beside(stream: Stream, layer: int, x: float) -> float:
    """Go on with a draw that fell beside the part of its layer that lies under the curve whole: one in a hundred."""
    while True:
        if layer == 0:
            return _tail(stream)
        height = _HEIGHT[layer] + uniform(stream) * (_HEIGHT[layer + 1] - _HEIGHT[layer])
        if height < math.exp(-0.5 * x * x):
            return float(x)
        word = next_word(stream)
        layer = int(np.int64(word & _LAYER))
        x = np.float64(word >> _FRACTION) * _STEP * _END[layer]
        if x < _END[layer + 1]:
            return float(x)


@compiled
def _tail(stream: Stream) -> float:
    """Draw from what lies beyond the lowest layer."""
    while True:
        x = exponential(stream) / _TAIL
        if 2.0 * exponential(stream) > x * x:
            return float(_TAIL + x)
