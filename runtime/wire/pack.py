"""A set of named tensors as headers and frames, and back."""

import time
from collections.abc import Mapping, Sequence

import msgspec
import torch

from runtime.errors import ProtocolError
from runtime.types import result_codec as result_codec  # packing and its caller name it together
from runtime.wire.codec import AutoCodec, decode
from runtime.wire.events import Buffer, Limits
from runtime.wire.messages import TensorHeader


class Packed(msgspec.Struct, frozen=True):
    """Headers and frames of one tensor set, in one order, and the seconds that coding took."""

    headers: tuple[TensorHeader, ...] = ()
    frames: tuple[Buffer, ...] = ()
    codec_s: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes that the frames put on the wire."""
        return sum(header.frame_bytes for header in self.headers)

    def pick(self, names: Sequence[str]) -> "Packed":
        """The named tensors that are here, as they came: no decoding, no copy."""
        wanted = set(names)
        pairs = [(h, f) for h, f in zip(self.headers, self.frames, strict=True) if h.name in wanted]
        return Packed(tuple(h for h, _ in pairs), tuple(f for _, f in pairs))

    def __add__(self, other: "Packed") -> "Packed":
        """Both sets as one."""
        return Packed(self.headers + other.headers, self.frames + other.frames, self.codec_s + other.codec_s)


def pack(
    values: Mapping[str, torch.Tensor], names: Sequence[str], codec: str, auto: AutoCodec, bandwidth_bps: float
) -> Packed:
    """Code the named values for one link.

    Args:
        values: tensors at hand.
        names: which of them to code.
        codec: what the plan asks for; `auto` picks raw or lossless per tensor.
        auto: remembers ratios and this machine's coding speed.
        bandwidth_bps: last reading of the link, NaN when there is none.
    """
    start_s = time.perf_counter()
    headers: list[TensorHeader] = []
    frames: list[Buffer] = []
    for name in names:
        header, frame = auto.encode(name, values[name], codec, bandwidth_bps)
        headers.append(header)
        frames.append(frame)
    return Packed(tuple(headers), tuple(frames), time.perf_counter() - start_s)


def unpack(packed: Packed, expected: Sequence[str], limits: Limits) -> dict[str, torch.Tensor]:
    """Rebuild exactly the expected tensors.

    Raises:
        ProtocolError: when the set is not the expected one, or a tensor breaks a cap.
    """
    got = [header.name for header in packed.headers]
    if got != expected and sorted(got) != sorted(expected):
        raise ProtocolError(f"expected the tensors {sorted(expected)}, got {sorted(got)}")
    tensors: dict[str, torch.Tensor] = {}
    for header, frame in zip(packed.headers, packed.frames, strict=True):
        tensors[header.name] = decode(header, frame, limits)
    return tensors
