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
_HALF_MAX = torch.finfo(torch.float16).max
_INT8_STEPS = 255
_MIN_LOSSLESS_BYTES = 128  # blosc stores anything smaller as it is, plus its header

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
    if codec not in _ENCODERS:
        raise ConfigError(f"expected a codec among {tuple(_ENCODERS)}, got {codec!r}; AutoCodec decides for 'auto'")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES or tensor.layout is not torch.strided:
        raise ProtocolError(
            f"expected a strided tensor of one of {', '.join(_DTYPES)}, got {name!r} of {dtype}, {tensor.layout}; "
            "convert it before it is sent"
        )
    host = _to_host(tensor.detach())
    order = dim_order(host)
    coded = _ENCODERS[codec](host.permute(order).contiguous().reshape(-1))
    header = TensorHeader(
        name=name,
        shape=tuple(tensor.shape),
        dtype=dtype,
        dim_order=order,
        codec=coded.codec,
        frame_bytes=memoryview(coded.frame).nbytes,
        scale=coded.scale,
        zero=coded.zero,
    )
    return header, coded.frame


def decode(header: TensorHeader, frame: Buffer, limits: Limits) -> torch.Tensor:
    """Rebuild a tensor from its header and frame.

    A raw frame is not copied: the tensor lives in the frame's memory, unless that is read-only.

    Raises:
        ProtocolError: if a field is out of its range, a cap is broken, or the frame is not what the header says.
    """
    view = memoryview(frame).cast("B")
    dtype = _check_header(header, view, limits)
    size = math.prod(header.shape)
    try:
        flat = _DECODERS[header.codec](header, view, dtype, size)
    except (RuntimeError, ValueError) as error:
        raise _bad(header, f"a frame that {header.codec} can read", str(error)) from error
    in_memory = [header.shape[dim] for dim in header.dim_order]
    inverse = sorted(range(len(in_memory)), key=header.dim_order.__getitem__)
    return flat.view(in_memory).permute(inverse)


def dim_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Give the dimensions from outermost to innermost in memory.

    A dense tensor that is permuted so is contiguous. Of dimensions with equal strides the longer one is outside: then
    even the strides of dimensions of size 1 come back as they were, wherever some order of the dimensions explains them.
    """
    strides, sizes = tensor.stride(), tensor.shape
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], -sizes[dim])))


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.device.type == "cpu":
        return tensor
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)  # pinned: the copy runs at full speed
    return host.copy_(tensor)


# --- one encoder and one decoder per codec --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Coded:
    codec: str  # the one really used
    frame: Buffer
    scale: float = 1.0
    zero: float = 0.0


def _view_bytes(flat: torch.Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _encode_raw(flat: torch.Tensor) -> _Coded:
    return _Coded("raw", _view_bytes(flat))


def _encode_lossless(flat: torch.Tensor) -> _Coded:
    view = _view_bytes(flat)
    if view.nbytes >= _MIN_LOSSLESS_BYTES:
        packed: bytes = blosc.compress(view, b"zstd", 1, blosc.SHUFFLE, 0, flat.element_size())
        if len(packed) < view.nbytes:
            return _Coded("lossless", packed)
    return _Coded("raw", view)


def _encode_fp16(flat: torch.Tensor) -> _Coded:
    if not flat.is_floating_point() or flat.element_size() <= 2:
        return _encode_lossless(flat)
    # Clamped: an activation of 70 000 should lose precision, not become infinite.
    return _Coded("fp16", _view_bytes(flat.clamp(-_HALF_MAX, _HALF_MAX).half()))


def _encode_int8(flat: torch.Tensor) -> _Coded:
    if not flat.is_floating_point() or flat.element_size() < 2 or flat.numel() == 0:
        return _encode_lossless(flat)
    wide = flat.double() if flat.dtype is torch.float64 else flat.float()
    low, high = (float(bound) for bound in torch.aminmax(wide))
    scale = (high - low) / _INT8_STEPS
    if not math.isfinite(scale):  # a NaN, an infinity, or a range wider than a double
        return _encode_lossless(flat)
    if scale == 0.0:
        codes = torch.zeros(flat.shape, dtype=torch.uint8)
    else:
        codes = ((wide - low) / scale).round_().clamp_(0, _INT8_STEPS).to(torch.uint8)
    return _Coded("int8", _view_bytes(codes), scale=scale, zero=low)


def _from_buffer(view: memoryview, dtype: torch.dtype) -> torch.Tensor:
    if view.nbytes == 0:
        return torch.empty(0, dtype=dtype)
    writable = bytearray(view) if view.readonly else view
    return torch.frombuffer(writable, dtype=torch.uint8).view(dtype)


def _decode_raw(header: TensorHeader, view: memoryview, dtype: torch.dtype, size: int) -> torch.Tensor:
    return _check_bool(header, _from_buffer(view, dtype))


def _decode_lossless(header: TensorHeader, view: memoryview, dtype: torch.dtype, size: int) -> torch.Tensor:
    flat = torch.empty(size, dtype=dtype)
    blosc.decompress(view, flat.view(torch.uint8).numpy())
    return _check_bool(header, flat)


def _decode_fp16(header: TensorHeader, view: memoryview, dtype: torch.dtype, size: int) -> torch.Tensor:
    return _from_buffer(view, torch.float16).to(dtype)


def _decode_int8(header: TensorHeader, view: memoryview, dtype: torch.dtype, size: int) -> torch.Tensor:
    codes = _from_buffer(view, torch.uint8)
    wide = codes.to(torch.float64 if dtype is torch.float64 else torch.float32)
    return wide.mul_(header.scale).add_(header.zero).to(dtype)


def _check_bool(header: TensorHeader, flat: torch.Tensor) -> torch.Tensor:
    """Refuse a bool that is neither 0 nor 1: torch counts such a byte once here and twice there, then writes too far."""
    if flat.dtype is torch.bool and flat.numel() and int(flat.view(torch.uint8).max()) > 1:
        raise _bad(header, "bytes 0 and 1 in a bool tensor", "another byte")
    return flat


_ENCODERS: dict[str, Callable[[torch.Tensor], _Coded]] = {
    "raw": _encode_raw,
    "lossless": _encode_lossless,
    "fp16": _encode_fp16,
    "int8": _encode_int8,
}
_DECODERS: dict[str, Callable[[TensorHeader, memoryview, torch.dtype, int], torch.Tensor]] = {
    "raw": _decode_raw,
    "lossless": _decode_lossless,
    "fp16": _decode_fp16,
    "int8": _decode_int8,
}


# --- checks before memory is taken ----------------------------------------------------------------------------------


def _bad(header: TensorHeader, expected: str, got: str) -> ProtocolError:
    return ProtocolError(
        f"tensor {header.name[:80]!r}: expected {expected}, got {got}; the frame was dropped: both ends must run the "
        "same version of offcut"
    )


def _check_header(header: TensorHeader, view: memoryview, limits: Limits) -> torch.dtype:
    dtype = _DTYPES.get(header.dtype)
    if dtype is None:
        raise _bad(header, "a dtype known here", repr(header.dtype[:80]))
    if header.codec not in _DECODERS:
        raise _bad(header, f"a codec among {tuple(_DECODERS)}", repr(header.codec[:80]))
    num_dims = len(header.shape)
    if num_dims > limits.dims:
        raise _bad(header, f"at most {limits.dims} dimensions", str(num_dims))
    if any(size < 0 for size in header.shape):
        raise _bad(header, "sizes of 0 or more", str(header.shape))
    if sorted(header.dim_order) != list(range(num_dims)):
        raise _bad(header, f"an order of {num_dims} dimensions", str(header.dim_order[:32]))
    # A size of 0 counts as 1: torch multiplies strides the same way and must not overflow.
    if math.prod(max(size, 1) for size in header.shape) * dtype.itemsize > limits.message_bytes:
        raise _bad(header, f"at most {limits.message_bytes} bytes", f"shape {header.shape} of {header.dtype}")
    if header.frame_bytes != view.nbytes:
        raise _bad(header, f"a frame of {header.frame_bytes} bytes, as announced", str(view.nbytes))
    _check_frame(header, view, dtype)
    return dtype


def _check_frame(header: TensorHeader, view: memoryview, dtype: torch.dtype) -> None:
    """Check that the frame's length, or blosc's own header, agrees with the shape."""
    size = math.prod(header.shape)
    if header.codec == "lossless":
        _check_blosc(header, view, size * dtype.itemsize)
        return
    if header.codec != "raw" and not dtype.is_floating_point:
        raise _bad(header, f"a floating dtype with codec {header.codec}", header.dtype)
    if not (math.isfinite(header.scale) and math.isfinite(header.zero)):
        raise _bad(header, "a finite scale and zero", f"{header.scale}, {header.zero}")
    itemsize = {"raw": dtype.itemsize, "fp16": 2, "int8": 1}[header.codec]
    if view.nbytes != size * itemsize:
        raise _bad(header, f"{size * itemsize} bytes for shape {header.shape}", str(view.nbytes))


def _check_blosc(header: TensorHeader, view: memoryview, nbytes: int) -> None:
    """Check what blosc is about to believe: it reads as far and writes as much as the frame's own header says."""
    if view.nbytes < _BLOSC_HEADER.size:
        raise _bad(header, f"at least {_BLOSC_HEADER.size} bytes", str(view.nbytes))
    _, _, flags, _, claimed_bytes, _, packed_bytes = _BLOSC_HEADER.unpack_from(view)
    if claimed_bytes != nbytes:
        raise _bad(header, f"a frame that unpacks to {nbytes} bytes", f"one that claims {claimed_bytes}")
    if packed_bytes != view.nbytes:
        raise _bad(header, f"a packed length of {view.nbytes}", str(packed_bytes))
    if flags >> 5 != _BLOSC_ZSTD:
        raise _bad(header, "zstd inside the frame", f"format {flags >> 5}")


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
        if codec not in CODECS:
            raise ConfigError(f"expected a codec among {CODECS}, got {codec!r}")
        chosen = self._choose(name, tensor, bandwidth_bps) if codec == "auto" else codec
        header, frame = encode(name, tensor, chosen)
        if chosen == "lossless" and tensor.nbytes:
            self._remember(name, tensor.nbytes / header.frame_bytes)
        return header, frame

    def _choose(self, name: str, tensor: torch.Tensor, bandwidth_bps: float) -> str:
        if math.isnan(bandwidth_bps) or tensor.nbytes < _MIN_LOSSLESS_BYTES:
            return "raw"
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
