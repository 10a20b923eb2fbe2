import math
import struct
import subprocess
import sys
import threading
import warnings

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import blosc

from runtime.errors import ConfigError, ProtocolError
from runtime.wire.codec import AutoCodec, CodecRates, choose_codec, decode, dim_order, encode, measure_rates
from runtime.wire.events import Limits
from runtime.wire.messages import TensorHeader

LIMITS = Limits()
DTYPES = [
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
]
SHAPES = st.lists(st.integers(0, 7), max_size=5).map(tuple)


def fill(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern the dtype has, NaNs with their payload included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    nbytes = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("codec", ["raw", "lossless"])
@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000), data=st.data())
def test_every_dense_tensor_comes_back_with_its_bits_and_strides(codec, shape, dtype, seed, data):
    order = data.draw(st.permutations(range(len(shape))))
    tensor = fill(shape, dtype, seed).permute(order)
    header, frame = encode("x", tensor, codec)
    back = decode(header, bytearray(frame), LIMITS)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert back.stride() == tensor.stride()
    assert bits(back) == bits(tensor)
    assert header.codec in {"raw", codec}
    assert header.frame_bytes == len(frame)


@pytest.mark.parametrize("codec", ["raw", "lossless"])
@pytest.mark.parametrize(
    ("tensor", "stride"),
    [
        (torch.arange(24.0).view(2, 3, 4)[:, ::2], (8, 4, 1)),
        (torch.arange(24.0).view(2, 3, 4)[:, :, 1:3], (6, 2, 1)),
        (torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)[1:3], (1, 6, 2)),
        (torch.arange(3.0).expand(4, 3), (1, 4)),
        (torch.arange(48.0).view(2, 2, 3, 4).to(memory_format=torch.channels_last)[:, :1], (12, 1, 4, 1)),
    ],
)
def test_a_tensor_with_gaps_becomes_dense_and_keeps_the_order_of_its_dimensions(codec, tensor, stride):
    header, frame = encode("x", tensor, codec)
    back = decode(header, bytearray(frame), LIMITS)
    assert torch.equal(back, tensor)
    assert back.stride() == stride


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 1, 4, 5), (1, 1, 4, 5), (2, 3, 1, 1), (1, 64, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_even_the_strides_of_dimensions_of_size_one_come_back(shape, memory_format):
    tensor = torch.empty(shape, memory_format=memory_format).fill_(1.0)
    header, frame = encode("x", tensor, "raw")
    assert decode(header, bytearray(frame), LIMITS).stride() == tensor.stride()


def test_raw_neither_copies_on_the_way_out_nor_on_the_way_in():
    tensor = torch.zeros(2, 3)
    header, frame = encode("x", tensor, "raw")
    tensor[0, 0] = 7.0
    assert struct.unpack_from("f", frame)[0] == 7.0
    received = bytearray(frame)
    back = decode(header, received, LIMITS)
    received[:4] = struct.pack("f", 9.0)
    assert back[0, 0] == 9.0


def test_a_raw_frame_keeps_the_memory_it_shows_alive():
    _, frame = encode("x", torch.full((100_000,), 3.0), "raw")
    torch.zeros(100_000)  # would take the memory over if it were free
    assert set(memoryview(frame).cast("f")[::1000]) == {3.0}


def test_a_read_only_frame_is_copied_without_a_warning():
    header, frame = encode("x", torch.arange(4), "raw")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = decode(header, bytes(frame), LIMITS)
    back += 1


def test_a_frame_that_starts_at_an_odd_address_is_read():
    tensor = torch.arange(10.0)
    header, frame = encode("x", tensor, "raw")
    memory = bytearray(1) + bytearray(frame)
    assert torch.equal(decode(header, memoryview(memory)[1:], LIMITS), tensor)


def test_lossless_shrinks_a_feature_map_and_leaves_noise_raw():
    features = torch.randn(1, 64, 28, 28, generator=torch.Generator().manual_seed(0)).relu()
    header, _ = encode("x", features, "lossless")
    assert header.codec == "lossless"
    assert features.nbytes / header.frame_bytes > 1.5
    noise = fill((4096,), torch.uint8, 1)
    assert encode("x", noise, "lossless")[0].codec == "raw"


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e4), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_int8_is_off_by_half_a_step_at_most(seed, scale, dtype):
    tensor = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale
    header, frame = encode("x", tensor, "int8")
    back = decode(header, bytearray(frame), LIMITS)
    assert header.codec == "int8"
    assert header.frame_bytes == tensor.numel()
    assert back.dtype == dtype
    assert (back - tensor).abs().max() <= header.scale * 0.501


@given(seed=st.integers(0, 1000), scale=st.floats(1e-2, 1e3))
def test_fp16_is_off_by_its_precision_at_most(seed, scale):
    tensor = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * scale
    header, frame = encode("x", tensor, "fp16")
    back = decode(header, bytearray(frame), LIMITS)
    assert header.frame_bytes == 2 * tensor.numel()
    assert ((back - tensor).abs() <= tensor.abs() / 1024 + 1e-6).all()


def test_fp16_clamps_what_it_cannot_hold():
    header, frame = encode("x", torch.tensor([1e6, -1e6, float("nan")]), "fp16")
    back = decode(header, bytearray(frame), LIMITS)
    assert back[:2].tolist() == [65504.0, -65504.0]
    assert back[2].isnan()


@pytest.mark.parametrize("codec", ["fp16", "int8"])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(100),
        torch.ones(100, dtype=torch.bool),
        torch.empty(0),
        torch.tensor([1.0, float("inf")] * 100, dtype=torch.float16),
        torch.arange(100).to(torch.uint8),
    ],
)
def test_a_tensor_that_a_lossy_codec_does_not_suit_keeps_every_bit(codec, tensor):
    header, frame = encode("x", tensor, codec)
    back = decode(header, bytearray(frame), LIMITS)
    assert bits(back) == bits(tensor) or header.codec == codec == "fp16"
    assert back.dtype == tensor.dtype


def test_a_constant_tensor_survives_int8():
    header, frame = encode("x", torch.full((5,), -2.5), "int8")
    assert decode(header, bytearray(frame), LIMITS).tolist() == [-2.5] * 5


def test_gradients_and_lazy_views_are_no_hindrance():
    complex_view = torch.randn(4, dtype=torch.complex64).conj()
    header, frame = encode("x", complex_view, "raw")
    assert torch.equal(decode(header, bytearray(frame), LIMITS), complex_view)
    encode("x", torch.ones(3, requires_grad=True), "raw")


def test_what_the_wire_has_no_name_for_is_refused_by_name():
    with pytest.raises(ProtocolError, match=r"expected a strided tensor .* got 'x' of .*sparse"):
        encode("x", torch.eye(3).to_sparse(), "raw")
    with pytest.raises(ConfigError, match="expected a codec among"):
        encode("x", torch.eye(3), "zip")


# --- what a malicious or broken peer might send ---------------------------------------------------------------------

GOOD = TensorHeader("x", (4, 8), "float32", (0, 1), "raw", 128)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dtype": "object"}, "a dtype known here"),
        ({"dtype": "Tensor"}, "a dtype known here"),
        ({"codec": "pickle"}, "a codec among"),
        ({"shape": (4, -8)}, "sizes of 0 or more"),
        ({"shape": (1,) * 17, "dim_order": tuple(range(17))}, "at most 16 dimensions"),
        ({"shape": (2**40, 2**40)}, "at most 268435456 bytes"),
        ({"shape": (0, 2**62)}, "at most 268435456 bytes"),
        ({"shape": (4, 9)}, "144 bytes for shape"),
        ({"dim_order": (0,)}, "an order of 2 dimensions"),
        ({"dim_order": (0, 0)}, "an order of 2 dimensions"),
        ({"dim_order": (0, 2)}, "an order of 2 dimensions"),
        ({"dim_order": (-1, 0)}, "an order of 2 dimensions"),
        ({"frame_bytes": 64}, "a frame of 64 bytes, as announced"),
        ({"codec": "int8"}, "32 bytes for shape"),
        ({"codec": "fp16"}, "64 bytes for shape"),
        ({"codec": "fp16", "dtype": "int64"}, "a floating dtype"),
        ({"codec": "int8", "shape": (16, 8), "scale": float("nan")}, "a finite scale"),
        ({"codec": "int8", "shape": (16, 8), "zero": float("inf")}, "a finite scale"),
        ({"codec": "lossless"}, "a frame that unpacks to 128 bytes"),
    ],
)
def test_a_false_header_is_refused_by_name(change, expected):
    header = msgspec.structs.replace(GOOD, **change)
    with pytest.raises(ProtocolError, match=expected):
        decode(header, bytearray(128), LIMITS)


def test_a_cap_is_checked_before_memory_is_taken():
    header = TensorHeader("x", (2**20,), "float32", (0,), "lossless", 32)
    bomb = bytearray(32)
    with pytest.raises(ProtocolError, match="at most 1000 bytes"):
        decode(header, bomb, Limits(message_bytes=1000))


def test_a_frame_that_unpacks_to_more_than_its_shape_is_refused():
    bomb = blosc.compress(bytes(2**24), b"zstd", 1, blosc.SHUFFLE, 0, 4)
    header = TensorHeader("x", (256,), "float32", (0,), "lossless", len(bomb))
    with pytest.raises(ProtocolError, match="a frame that unpacks to 1024 bytes, got one that claims 16777216"):
        decode(header, bomb, LIMITS)


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 40, -1])
def test_a_packed_frame_that_was_cut_is_refused(cut):
    header, frame = encode("x", torch.zeros(4096), "lossless")
    short = bytearray(frame)[:cut]
    with pytest.raises(ProtocolError):
        decode(msgspec.structs.replace(header, frame_bytes=len(short)), short, LIMITS)


def test_another_compressor_inside_the_frame_is_refused():
    packed = blosc.compress(bytes(4096), b"lz4", 1, blosc.SHUFFLE, 0, 4)
    header = TensorHeader("x", (1024,), "float32", (0,), "lossless", len(packed))
    with pytest.raises(ProtocolError, match="expected zstd inside the frame"):
        decode(header, packed, LIMITS)


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_a_bool_that_is_neither_true_nor_false_is_refused(codec):
    memory = torch.full((4096,), 2, dtype=torch.uint8)
    header, frame = encode("x", memory, codec)
    with pytest.raises(ProtocolError, match="bytes 0 and 1"):
        decode(msgspec.structs.replace(header, dtype="bool"), bytearray(frame), LIMITS)


MUTATE = """
import random, sys, torch
from runtime.errors import ProtocolError
from runtime.wire.codec import decode, encode
from runtime.wire.events import Limits
chance = random.Random(int(sys.argv[1]))
tensor = torch.randn(1, 16, 28, 28, generator=torch.Generator().manual_seed(0)).relu()
header, good = encode("x", tensor, "lossless")
refused = 0
for _ in range(int(sys.argv[2])):
    frame = bytearray(good)
    start = 16 if chance.random() < 0.7 else 0  # behind the header blosc's own fields decide where it reads
    span = 64 if chance.random() < 0.5 else len(frame) - start
    for _ in range(chance.randint(1, 8)):
        frame[start + chance.randrange(span)] = chance.randrange(256)
    try:
        decode(header, frame, Limits())
    except ProtocolError:
        refused += 1
print(refused)
"""


def test_a_thousand_and_a_half_of_spoilt_frames_neither_crash_nor_raise_anything_else():
    found = subprocess.run(
        [sys.executable, "-c", MUTATE, "7", "1500"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 100


# --- codec auto -----------------------------------------------------------------------------------------------------

RATES = CodecRates(encode_bytes_per_s=200e6, decode_bytes_per_s=800e6)


def test_a_slow_link_gets_the_packed_tensor_and_a_fast_one_the_raw():
    assert choose_codec(400_000, 2.0, 10e6, RATES) == "lossless"
    assert choose_codec(400_000, 2.0, 10e9, RATES) == "raw"


@pytest.mark.parametrize(
    ("ratio", "bandwidth_bps"), [(2.0, math.nan), (math.nan, 1e6), (0.0, 1e6), (2.0, 0.0), (1.0, 1e6)]
)
def test_without_a_reason_to_pack_the_tensor_goes_raw(ratio, bandwidth_bps):
    assert choose_codec(400_000, ratio, bandwidth_bps, RATES) == "raw"


@given(ratio=st.floats(1.01, 10), bandwidth_bps=st.floats(1e5, 1e11), nbytes=st.integers(1, 10**8))
def test_the_codec_that_predicts_the_earlier_arrival_is_picked(ratio, bandwidth_bps, nbytes):
    raw_s = nbytes * 8 / bandwidth_bps
    packed_s = nbytes / 200e6 + nbytes / 800e6 + nbytes / ratio * 8 / bandwidth_bps
    if not math.isclose(raw_s, packed_s, rel_tol=1e-9):
        assert (choose_codec(nbytes, ratio, bandwidth_bps, RATES) == "lossless") == (packed_s < raw_s)


def test_auto_learns_the_ratio_of_each_value_and_forgets_slowly():
    auto = AutoCodec(RATES)
    features = torch.randn(1, 64, 28, 28, generator=torch.Generator().manual_seed(0)).relu()
    assert math.isnan(auto.ratio("features"))
    header, _ = auto.encode("features", features, "auto", 1e6)
    assert header.codec == "lossless"
    true_ratio = features.nbytes / header.frame_bytes
    assert auto.ratio("features") == pytest.approx(true_ratio, rel=0.15)
    for _ in range(20):
        auto.encode("features", torch.zeros_like(features), "auto", 1e6)
    assert auto.ratio("features") > 20


def test_auto_goes_raw_for_noise_and_without_a_bandwidth():
    auto = AutoCodec(RATES)
    noise = fill((100_000,), torch.uint8, 3)
    assert auto.encode("noise", noise, "auto", 1e6)[0].codec == "raw"
    assert auto.encode("zeros", torch.zeros(100_000), "auto", math.nan)[0].codec == "raw"


def test_auto_looks_again_at_a_value_it_sends_raw():
    auto = AutoCodec(RATES)
    noise = fill((100_000,), torch.uint8, 3)
    zeros = torch.zeros(100_000, dtype=torch.uint8)
    assert auto.encode("x", noise, "auto", 1e7)[0].codec == "raw"
    codecs = [auto.encode("x", zeros, "auto", 1e7)[0].codec for _ in range(40)]
    assert codecs[0] == "raw"
    assert codecs[-1] == "lossless"


def test_auto_leaves_other_codecs_alone_and_refuses_unknown_ones():
    auto = AutoCodec(RATES)
    assert auto.encode("x", torch.rand(1000), "int8", 1e6)[0].codec == "int8"
    assert auto.encode("x", torch.empty(0), "auto", 1e6)[0].codec == "raw"
    with pytest.raises(ConfigError, match="expected a codec among"):
        auto.encode("x", torch.rand(10), "zip", 1e6)


def test_this_machines_rates_are_measured_once():
    rates = measure_rates()
    assert rates.encode_bytes_per_s > 1e6
    assert rates.decode_bytes_per_s > 1e6
    assert measure_rates() is rates


def test_threads_encode_and_decode_at_the_same_time():
    tensors = [torch.randn(64, 1000, generator=torch.Generator().manual_seed(i)).relu() for i in range(4)]
    wrong = []

    def work(tensor: torch.Tensor) -> None:
        for _ in range(20):
            header, frame = encode("x", tensor, "lossless")
            if not torch.equal(decode(header, bytearray(frame), LIMITS), tensor):
                wrong.append(header)

    threads = [threading.Thread(target=work, args=(tensor,)) for tensor in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_order_of_dimensions_is_from_outermost_to_innermost():
    assert dim_order(torch.empty(2, 3, 4)) == (0, 1, 2)
    assert dim_order(torch.empty(2, 3, 4).permute(2, 0, 1)) == (1, 2, 0)
    assert dim_order(torch.empty(2, 3, 4, 5, memory_format=torch.channels_last)) == (0, 2, 3, 1)
    assert dim_order(torch.empty(())) == ()


def test_pieces_of_a_value_share_what_is_remembered_of_it() -> None:
    auto, ramp = AutoCodec(CodecRates(1e9, 1e9)), torch.arange(4096, dtype=torch.float32)
    auto.encode("v[0:1,0:64]", ramp, "lossless", 1e6)
    assert auto.ratio("v") > 1.0
    assert auto.encode("v[7:8,0:64]", ramp, "auto", 1e6)[0].codec == "lossless"
    assert math.isnan(auto.ratio("v[7:8,0:64]"))
