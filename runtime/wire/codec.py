"""Tensors to frames and back.

    raw       the tensor's own memory, nothing copied
    lossless  byte shuffle + zstd: 1.6 - 2x on feature maps after a ReLU
    fp16      half precision; floating tensors wider than two bytes
    int8      256 evenly spaced values between the tensor's smallest and largest; floating tensors

A codec that does not suit a tensor gives way (fp16 of integers goes lossless, lossless that would grow goes raw), and the
header names the one really used. Strides survive: dimensions travel in memory order. `decode` trusts nothing: it checks
every field against the caps and against the frame before it takes memory.
"""

import functools
import math
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numcodecs import blosc

from runtime.errors import ConfigError, ProtocolError
from runtime.types import CODECS
from runtime.wire.events import Buffer, Limits
from runtime.wire.messages import TensorHeader

# Without this blosc runs worker threads and shares their state between callers: one thread per call is safe from any
# thread, and all that a node with one compute thread should take.
blosc.use_threads = False

_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint64,
        torch.uint32,
        torch.uint16,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NUMPY_DTYPES = frozenset(
    (torch.float64, torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
)
"""Those whose memory numpy can show as bytes directly; the others go through a view, which costs more."""
_NUMPY_NAMES: dict[str, str] = {np.dtype(_DTYPE_NAMES[dtype]).char: _DTYPE_NAMES[dtype] for dtype in _NUMPY_DTYPES}

_HALF_MAX = torch.finfo(torch.float16).max
_INT8_STEPS = 255
_MIN_LOSSLESS_BYTES = 128  # blosc stores anything smaller as it is, plus its header

_ANY_LENGTH = -1

_BLOSC_HEADER = struct.Struct("<BBBBIII")  # version, version of zstd, flags, itemsize, nbytes, block size, cbytes
_BLOSC_ZSTD = 4  # value of the three highest bits of flags

SAMPLE_BYTES = 32 * 1024
_SAMPLE_PIECES = 4
_RATIO_WEIGHT = 0.3  # of the newest ratio; guess: follows a change of scene within some ten requests
_RAW_USES_PER_SAMPLE = 16  # a value sent raw is looked at again this often: its content may have changed


def encode(name: str, tensor: torch.Tensor, codec: str) -> tuple[TensorHeader, Buffer]:
    """Turn one tensor into a header and a frame.

    With codec raw the frame is a view of the tensor's memory (and keeps it alive): it must not change until the frame
    has been sent. A tensor that is not dense is made dense first, its dimensions in the same memory order.

    Args:
        name: value name in the graph.
        tensor: the tensor, any shape and strides; CUDA tensors are copied to pinned memory.
        codec: raw, lossless, fp16 or int8; `auto` is `AutoCodec`'s to decide.

    Raises:
        ConfigError: if the codec is unknown.
        ProtocolError: if the wire has no name for the tensor's dtype or layout.
    """
    if codec == "raw" and (plain := _show_plain(name, tensor)) is not None:
        return plain
    encoder = _ENCODERS.get(codec)
    if encoder is None:
        raise ConfigError(f"expected a codec among {tuple(_ENCODERS)}, got {codec!r}; AutoCodec decides for 'auto'")
    dtype = _DTYPE_NAMES.get(tensor.dtype)
    if dtype is None or tensor.layout is not torch.strided:
        raise ProtocolError(
            f"expected a strided tensor of one of {', '.join(_DTYPES)}, got {name!r} of {tensor.dtype}, "
            f"{tensor.layout}; convert it before it is sent"
        )
    host = _to_host(tensor)
    shape = tuple(host.shape)
    order, is_plain = _order(shape, host.stride())
    flat = host.view(-1) if is_plain else host.permute(order).contiguous().view(-1)
    used, frame, scale, zero = encoder(flat)
    return TensorHeader(name, shape, dtype, order, used, len(frame), scale, zero), frame


def decode(header: TensorHeader, frame: Buffer, limits: Limits) -> torch.Tensor:
    """Rebuild a tensor from its header and frame.

    A raw frame is not copied: the tensor lives in the frame's memory, unless that is read-only.

    Raises:
        ProtocolError: if a field is out of its range, a cap is broken, or the frame is not what the header says.
    """
    try:  # the same layouts come with every request: kept when good
        layout = _make_layout(
            header.shape, header.dtype, header.dim_order, header.codec, limits.dims, limits.message_bytes
        )
    except _BadLayout as bad:
        raise _bad(header, *bad.args) from None
    view = memoryview(frame)
    nbytes = len(view)
    if header.frame_bytes != nbytes:
        raise _bad(header, f"a frame of {header.frame_bytes} bytes, as announced", str(nbytes))
    if layout.frame_bytes not in (nbytes, _ANY_LENGTH):
        raise _bad(header, f"{layout.frame_bytes} bytes for shape {header.shape}", str(nbytes))
    return layout.decode(header, view, layout)


def _show_plain(name: str, tensor: torch.Tensor) -> tuple[TensorHeader, Buffer] | None:
    """Give header and memory of a tensor that can go as it lies there; None for one that needs more than that.

    The usual case in the fewest steps: between two messages of some hundred KB nothing of this is left in the processor's
    caches, and then each call into torch costs several microseconds.
    """
    try:
        array = tensor.numpy()
    except (
        RuntimeError,
        TypeError,
    ):  # gradients, a lazy sign or conjugate, another device or layout, torch's own dtypes
        return None
    header = _plain_header(name, array.dtype.char, array.shape, array.strides)
    return None if header is None else (header, array.data.cast("B"))


@functools.lru_cache(maxsize=1024)
def _plain_header(name: str, char: str, shape: tuple[int, ...], byte_strides: tuple[int, ...]) -> TensorHeader | None:
    dtype = _NUMPY_NAMES.get(char)
    if dtype is None or not shape or 0 in shape:
        return None
    itemsize = _DTYPES[dtype].itemsize
    order, is_plain = _order(shape, tuple(stride // itemsize for stride in byte_strides))
    return TensorHeader(name, shape, dtype, order, "raw", math.prod(shape) * itemsize) if is_plain else None


def dim_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Give the dimensions from outermost to innermost in memory.

    A dense tensor that is permuted so is contiguous. Of dimensions with equal strides the longer one is outside: then
    even the strides of dimensions of size 1 come back as they were, wherever some order of the dimensions explains them.
    """
    return _order(tuple(tensor.shape), tensor.stride())[0]


@functools.lru_cache(maxsize=1024)
def _order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """Give the order of the dimensions, and whether the tensor is plain: dense and in their own order."""
    order = tuple(sorted(range(len(shape)), key=lambda dim: (-strides[dim], -shape[dim])))
    return order, strides == _strides(shape, tuple(range(len(shape))))


def _strides(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor with its dimensions in this order; as in torch, a size of 0 counts as 1."""
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_cpu:
        return tensor
    if not tensor.is_cuda:
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)  # pinned: the copy runs at full speed
    return host.copy_(tensor)


# --- one encoder and one decoder per codec --------------------------------------------------------------------------


_Coded: TypeAlias = tuple[str, Buffer, float, float]  # codec really used, frame, scale, zero


def _view_bytes(flat: torch.Tensor) -> memoryview:
    if flat.dtype in _NUMPY_DTYPES:
        return flat.numpy().data.cast("B")
    return flat.view(torch.uint8).numpy().data


def _encode_raw(flat: torch.Tensor) -> _Coded:
    return "raw", _view_bytes(flat), 1.0, 0.0


def _encode_lossless(flat: torch.Tensor) -> _Coded:
    view = _view_bytes(flat)
    if len(view) >= _MIN_LOSSLESS_BYTES:
        packed: bytes = blosc.compress(view, b"zstd", 1, blosc.SHUFFLE, 0, flat.element_size())
        if len(packed) < len(view):
            return "lossless", packed, 1.0, 0.0
    return "raw", view, 1.0, 0.0


def _encode_fp16(flat: torch.Tensor) -> _Coded:
    if not flat.is_floating_point() or flat.element_size() <= 2:
        return _encode_lossless(flat)
    # Clamped: an activation of 70 000 should lose precision, not become infinite.
    return "fp16", _view_bytes(flat.clamp(-_HALF_MAX, _HALF_MAX).half()), 1.0, 0.0


def _encode_int8(flat: torch.Tensor) -> _Coded:
    if not flat.is_floating_point() or flat.element_size() < 2 or flat.numel() == 0:
        return _encode_lossless(flat)
    wide = flat if flat.dtype is torch.float64 else flat.float()
    low, high = (float(bound) for bound in torch.aminmax(wide))
    scale = (high - low) / _INT8_STEPS
    if not math.isfinite(scale):  # a NaN, an infinity, or a range wider than a double
        return _encode_lossless(flat)
    if scale == 0.0:
        codes = torch.zeros(flat.shape, dtype=torch.uint8)
    else:
        codes = ((wide - low) / scale).round_().clamp_(0, _INT8_STEPS).to(torch.uint8)
    return "int8", _view_bytes(codes), scale, low


@dataclass(frozen=True, slots=True)
class _Layout:
    """What follows from the fields of a header that do not change from request to request."""

    decode: "_Decoder"
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int
    frame_bytes: int  # _ANY_LENGTH: of lossless
    strides: tuple[int, ...]
    array_dtype: "np.dtype[Any] | None"  # None: not numpy's, or there are no elements
    byte_strides: tuple[int, ...]

    def arrange(self, flat: torch.Tensor) -> torch.Tensor:
        """Give the elements, in the order of memory, their shape."""
        return flat.as_strided(self.shape, self.strides)


_Decoder: TypeAlias = Callable[[TensorHeader, memoryview, _Layout], torch.Tensor]


def _from_buffer(view: memoryview, dtype: torch.dtype) -> torch.Tensor:
    if not len(view):
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype)


def _decode_raw(header: TensorHeader, view: memoryview, layout: _Layout) -> torch.Tensor:
    if layout.array_dtype is None:
        return layout.arrange(_from_buffer(view, layout.dtype))
    memory = bytearray(view) if view.readonly else view
    if len(layout.shape) == 1 and layout.dtype is not torch.bool:
        return torch.frombuffer(memory, dtype=layout.dtype)
    # Shaped by numpy, not by torch: one call into torch in place of two.
    tensor = torch.from_numpy(np.ndarray(layout.shape, layout.array_dtype, memory, 0, layout.byte_strides))
    return _check_bool(header, tensor) if layout.dtype is torch.bool else tensor


def _decode_lossless(header: TensorHeader, view: memoryview, layout: _Layout) -> torch.Tensor:
    _check_blosc(header, view, layout.size * layout.dtype.itemsize)
    flat = torch.empty(layout.size, dtype=layout.dtype)
    try:
        blosc.decompress(view, flat.view(torch.uint8).numpy())
    except (RuntimeError, ValueError) as error:
        raise _bad(header, "a frame that can be unpacked", str(error)) from error
    return layout.arrange(_check_bool(header, flat) if layout.dtype is torch.bool else flat)


def _decode_fp16(header: TensorHeader, view: memoryview, layout: _Layout) -> torch.Tensor:
    return layout.arrange(_from_buffer(view, torch.float16).to(layout.dtype))


def _decode_int8(header: TensorHeader, view: memoryview, layout: _Layout) -> torch.Tensor:
    if not (math.isfinite(header.scale) and math.isfinite(header.zero)):
        raise _bad(header, "a finite scale and zero", f"{header.scale}, {header.zero}")
    codes = _from_buffer(view, torch.uint8)
    wide = codes.to(torch.float64 if layout.dtype is torch.float64 else torch.float32)
    return layout.arrange(wide.mul_(header.scale).add_(header.zero).to(layout.dtype))


_ENCODERS: dict[str, Callable[[torch.Tensor], _Coded]] = {
    "raw": _encode_raw,
    "lossless": _encode_lossless,
    "fp16": _encode_fp16,
    "int8": _encode_int8,
}
_DECODERS: dict[str, tuple[_Decoder, int]] = {  # and bytes per element, 0: the dtype's own
    "raw": (_decode_raw, 0),
    "lossless": (_decode_lossless, 0),
    "fp16": (_decode_fp16, 2),
    "int8": (_decode_int8, 1),
}


# --- checks before memory is taken ----------------------------------------------------------------------------------


def _bad(header: TensorHeader, expected: str, got: str) -> ProtocolError:
    return ProtocolError(
        f"tensor {header.name[:80]!r}: expected {expected}, got {got}; the frame was dropped: both ends must run the "
        "same version of offcut"
    )


class _BadLayout(Exception):  # noqa: N818 - never leaves this module
    """What was expected, and what came."""


@functools.lru_cache(maxsize=1024)
def _make_layout(
    shape: tuple[int, ...], dtype_name: str, order: tuple[int, ...], codec: str, max_dims: int, max_bytes: int
) -> _Layout:
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise _BadLayout("a dtype known here", repr(dtype_name[:80]))
    if codec not in _DECODERS:
        raise _BadLayout(f"a codec among {tuple(_DECODERS)}", repr(codec[:80]))
    if len(shape) > max_dims:
        raise _BadLayout(f"at most {max_dims} dimensions", str(len(shape)))
    if any(size < 0 for size in shape):
        raise _BadLayout("sizes of 0 or more", str(shape))
    if sorted(order) != list(range(len(shape))):
        raise _BadLayout(f"an order of {len(shape)} dimensions", str(order[:32]))
    # A size of 0 counts as 1: torch multiplies strides the same way and must not overflow.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > max_bytes:
        raise _BadLayout(f"at most {max_bytes} bytes", f"shape {shape} of {dtype_name}")
    decoder, itemsize = _DECODERS[codec]
    if itemsize and not dtype.is_floating_point:
        raise _BadLayout(f"a floating dtype with codec {codec}", dtype_name)
    size = math.prod(shape)
    strides = _strides(shape, order)
    return _Layout(
        decode=decoder,
        dtype=dtype,
        shape=shape,
        size=size,
        frame_bytes=_ANY_LENGTH if codec == "lossless" else size * (itemsize or dtype.itemsize),
        strides=strides,
        array_dtype=np.dtype(dtype_name) if size and dtype in _NUMPY_DTYPES else None,
        byte_strides=tuple(stride * dtype.itemsize for stride in strides),
    )


def _check_blosc(header: TensorHeader, view: memoryview, nbytes: int) -> None:
    """Check what blosc is about to believe: it reads as far and writes as much as the frame's own header says."""
    if len(view) < _BLOSC_HEADER.size:
        raise _bad(header, f"at least {_BLOSC_HEADER.size} bytes", str(len(view)))
    _, _, flags, _, claimed_bytes, _, packed_bytes = _BLOSC_HEADER.unpack_from(view)
    if claimed_bytes != nbytes:
        raise _bad(header, f"a frame that unpacks to {nbytes} bytes", f"one that claims {claimed_bytes}")
    if packed_bytes != len(view):
        raise _bad(header, f"a packed length of {len(view)}", str(packed_bytes))
    if flags >> 5 != _BLOSC_ZSTD:
        raise _bad(header, "zstd inside the frame", f"format {flags >> 5}")


def _check_bool(header: TensorHeader, tensor: torch.Tensor) -> torch.Tensor:
    """Refuse a bool that is neither 0 nor 1: torch counts such a byte once here and twice there, then writes too far."""
    if tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise _bad(header, "bytes 0 and 1 in a bool tensor", "another byte")
    return tensor


# --- codec auto -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CodecRates:
    """How fast the lossless codec is, in raw bytes."""

    encode_bytes_per_s: float
    decode_bytes_per_s: float


@functools.cache
def measure_rates() -> CodecRates:
    """Measure this machine's lossless codec: the best of three rounds on half-zero data; some 15 ms, then cached."""
    noise = torch.randn(64 * 1024, generator=torch.Generator().manual_seed(0))
    flat = noise.relu_()
    nbytes = flat.nbytes
    limits = Limits()
    encode_s = decode_s = math.inf
    for _ in range(3):
        start_s = time.perf_counter()
        header, frame = encode("rates", flat, "lossless")
        encoded_s = time.perf_counter()
        decode(header, frame, limits)
        encode_s = min(encode_s, encoded_s - start_s)
        decode_s = min(decode_s, time.perf_counter() - encoded_s)
    return CodecRates(encode_bytes_per_s=nbytes / encode_s, decode_bytes_per_s=nbytes / decode_s)


def choose_codec(nbytes: int, ratio: float, bandwidth_bps: float, rates: CodecRates) -> str:
    """Pick raw or lossless, whichever should have the tensor there first.

    Args:
        nbytes: bytes of the tensor.
        ratio: expected raw bytes / coded bytes; NaN picks raw.
        bandwidth_bps: bandwidth of the link; NaN picks raw.
        rates: speed of the codec, taken to be the same at the other end.
    """
    codec_s = nbytes / rates.encode_bytes_per_s + nbytes / rates.decode_bytes_per_s
    saved_s = (nbytes - nbytes / ratio) * 8 / bandwidth_bps if ratio > 0 and bandwidth_bps > 0 else math.nan
    return "lossless" if saved_s > codec_s else "raw"


class AutoCodec:
    """Codec `auto`: remembers how well each value packs and picks raw or lossless for every tensor anew."""

    def __init__(self, rates: CodecRates | None = None) -> None:
        """Start with nothing remembered.

        Args:
            rates: speed of the lossless codec; None measures this machine.
        """
        self.rates = measure_rates() if rates is None else rates
        self._ratios: dict[str, float] = {}
        self._raw_uses: dict[str, int] = {}

    def ratio(self, name: str) -> float:
        """Give the remembered raw bytes / coded bytes of a value; NaN when it was never seen."""
        return self._ratios.get(name, math.nan)

    def encode(self, name: str, tensor: torch.Tensor, codec: str, bandwidth_bps: float) -> tuple[TensorHeader, Buffer]:
        """Encode a tensor as `codec` says; `auto` picks by ratio and bandwidth.

        Raises:
            ConfigError: if the codec is unknown.
            ProtocolError: as `encode` does.
        """
        if codec == "raw" and (plain := _show_plain(name, tensor)) is not None:
            return plain
        if codec not in CODECS:
            raise ConfigError(f"expected a codec among {CODECS}, got {codec!r}")
        chosen = self._choose(name, tensor, bandwidth_bps) if codec == "auto" else codec
        header, frame = encode(name, tensor, chosen)
        if chosen == "lossless" and tensor.nbytes:
            self._remember(_memory_of(name), tensor.nbytes / header.frame_bytes)
        return header, frame

    def _choose(self, name: str, tensor: torch.Tensor, bandwidth_bps: float) -> str:
        if math.isnan(bandwidth_bps) or tensor.nbytes < _MIN_LOSSLESS_BYTES:
            return "raw"
        name = _memory_of(name)
        uses = self._raw_uses.get(name, 0)
        if name not in self._ratios or uses >= _RAW_USES_PER_SAMPLE:
            self._remember(name, _sample_ratio(tensor))
            uses = 0
        chosen = choose_codec(tensor.nbytes, self._ratios[name], bandwidth_bps, self.rates)
        self._raw_uses[name] = uses + 1 if chosen == "raw" else 0
        return chosen

    def _remember(self, name: str, ratio: float) -> None:
        old = self._ratios.get(name, ratio)
        self._ratios[name] = old + _RATIO_WEIGHT * (ratio - old)


def _memory_of(name: str) -> str:
    """What a tensor is remembered as: a piece of a value, `conv1[12:13,0:56]`, as the value."""
    return name.partition("[")[0]


def _sample_ratio(tensor: torch.Tensor) -> float:
    """Estimate how well a tensor packs from at most 32 KB of it: four runs, spread evenly."""
    host = tensor.detach()
    flat = host.permute(dim_order(host)).reshape(-1)
    piece = SAMPLE_BYTES // _SAMPLE_PIECES // flat.element_size()
    if flat.numel() > piece * _SAMPLE_PIECES:
        step = (flat.numel() - piece) // (_SAMPLE_PIECES - 1)
        flat = torch.cat([flat[i * step : i * step + piece] for i in range(_SAMPLE_PIECES)])
    header, _ = encode("sample", flat, "lossless")
    return flat.nbytes / header.frame_bytes
