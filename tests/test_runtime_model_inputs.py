"""runtime.model.inputs: what a request may bring, and that it becomes what torchvision and timm make of it."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import InputError
from runtime.model import encoded
from runtime.model.encoded import MAX_PIXELS
from runtime.model.graph import LayerGraph, trace
from runtime.model.inputs import (
    IMAGE_VALUE,
    admit,
    decode,
    find_input,
    normalise,
    run_input_stage,
    sample_inputs,
)
from runtime.model.samples import sample_file, sample_images
from runtime.model.zoo import load_model
from runtime.types import GraphSpec, Preprocessing


@pytest.fixture(scope="module")
def spec() -> GraphSpec:
    return trace(load_model("tests.models:chain_image")).spec


@pytest.fixture(scope="module")
def pair_spec() -> GraphSpec:
    return trace(load_model("tests.models:chain_image", batch_size=2)).spec


@pytest.fixture(scope="module")
def tensor_spec() -> GraphSpec:
    return trace(load_model("tests.models:chain")).spec


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(sample_images(1, height, width, seed)[0])


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_a_path_and_its_bytes_are_one_encoded_image(spec: GraphSpec, tmp_path: Path) -> None:
    data = sample_file(seed=1)
    path = tmp_path / "frame.jpg"
    path.write_bytes(data)
    for x in (path, str(path), data, bytearray(data), memoryview(data), [path]):
        admitted = admit(spec, x)
        assert admitted.kind == "encoded"
        assert list(admitted.values) == ["input.encoded.0"]
        assert admitted.values["input.encoded.0"].numpy().tobytes() == data
        assert admitted.nbytes == len(data)


def test_pixels_of_the_models_size_are_taken_as_they_are(spec: GraphSpec) -> None:
    pixels = sample_images(1, 32, 32, seed=2)
    for x in (pixels, pixels[0], torch.from_numpy(pixels), torch.from_numpy(pixels)[0], [pixels[0]]):
        admitted = admit(spec, x)
        assert admitted.kind == "image"
        assert np.array_equal(admitted.values[IMAGE_VALUE].numpy(), pixels)
        assert admitted.nbytes == 32 * 32 * 3


def test_pictures_of_another_size_become_what_decoding_their_file_gives(spec: GraphSpec) -> None:
    image = picture(50, 41)
    expected = run_input_stage(spec, admit(spec, encode(image)))
    for x in (image, np.asarray(image), torch.from_numpy(np.array(image)), [image]):
        assert torch.equal(run_input_stage(spec, admit(spec, x)), expected)


def test_the_models_input_is_a_tensor_of_its_shape(spec: GraphSpec, tensor_spec: GraphSpec) -> None:
    x = torch.randn(1, 3, 32, 32)
    for graph in (spec, tensor_spec):
        for given_x in (x, x.numpy(), x.clone().requires_grad_()):
            admitted = admit(graph, given_x)
            assert admitted.kind == "tensor"
            assert torch.equal(admitted.values[find_input(graph).name], x)
            assert admitted.nbytes == 4 * 3 * 32 * 32


def test_a_batch_is_a_list_of_files_or_pictures_or_one_array(pair_spec: GraphSpec) -> None:
    files = [encode(picture(40, 40, seed)) for seed in (1, 2)]
    encoded = admit(pair_spec, files)
    assert list(encoded.values) == ["input.encoded.0", "input.encoded.1"]
    assert encoded.nbytes == sum(map(len, files))
    images = admit(pair_spec, [picture(40, 40, seed) for seed in (1, 2)])
    assert torch.equal(run_input_stage(pair_spec, encoded), run_input_stage(pair_spec, images))
    assert admit(pair_spec, sample_images(2, 32, 32, 0)).values[IMAGE_VALUE].shape == (2, 32, 32, 3)


@pytest.mark.parametrize("make", [lambda: np.zeros((32, 32, 3), np.uint8), lambda: torch.zeros(1, 3, 32, 32)])
def test_a_camera_may_reuse_its_buffer_at_once(spec: GraphSpec, make: object) -> None:
    x = make()  # type: ignore[operator]
    admitted = admit(spec, x)
    x[:] = 7
    assert all(int(value.max()) == 0 for value in admitted.values.values())


def test_read_only_and_reversed_arrays_are_copied(spec: GraphSpec) -> None:
    pixels = sample_images(1, 32, 32, seed=2)[0]
    pixels.setflags(write=False)
    assert admit(spec, pixels).kind == "image"
    assert np.array_equal(admit(spec, pixels[:, ::-1]).values[IMAGE_VALUE][0].numpy(), pixels[:, ::-1])


def test_a_channels_last_tensor_gives_the_bits_of_a_contiguous_one(spec: GraphSpec) -> None:
    x = torch.randn(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert admit(spec, x).values[find_input(spec).name].is_contiguous()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_images_of_any_mode_become_rgb(spec: GraphSpec, mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = picture(40, 40).convert(mode)
    data = encode(image, kind)
    with Image.open(io.BytesIO(data)) as file:
        expected = np.asarray(file.convert("RGB"))
    whole = decode(Preprocessing(40, 40, 40, "bilinear", (0.0,) * 3, (1.0,) * 3), _bytes(data))
    assert np.array_equal(whole[0].numpy(), expected)
    assert admit(spec, data).kind == "encoded"


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def test_sample_inputs_run_the_whole_graph(spec: GraphSpec, pair_spec: GraphSpec, tensor_spec: GraphSpec) -> None:
    x = torch.ones(1, 3, 32, 32)
    assert sample_inputs(tensor_spec, x) == {"x": x}
    for graph in (spec, pair_spec):
        values = sample_inputs(graph, x)
        assert len(values) == graph.batch_size
        assert set(values) == set(graph.layers[0].inputs)


# --- bit-equal to the libraries ---------------------------------------------------------------------------------------

SIZES = [(640, 480), (480, 640), (224, 224), (256, 256), (301, 299), (1000, 230), (37, 500), (100, 90), (225, 257)]


@pytest.mark.parametrize(
    "name", ["resnet50", "squeezenet1_1", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16"]
)
def test_preprocessing_is_bit_equal_to_torchvisions_own(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    from runtime.model.zoo import _torchvision_preprocessing

    transforms = models.get_model_weights(name).DEFAULT.transforms()
    prepared = _torchvision_preprocessing(models, name)
    for seed, size in enumerate(SIZES):
        image = picture(*size, seed=seed)
        ours = normalise(prepared, decode(prepared, _bytes(encode(image))))
        assert torch.equal(ours[0], transforms(image)), size


@settings(max_examples=60)
@given(width=st.integers(1, 90), height=st.integers(1, 90), crop=st.integers(1, 60), resize=st.integers(1, 60))
def test_any_size_and_crop_is_bit_equal_to_torchvisions_own(width: int, height: int, crop: int, resize: int) -> None:
    presets = pytest.importorskip("torchvision.transforms._presets")
    transforms = presets.ImageClassification(crop_size=crop, resize_size=resize)
    prepared = Preprocessing(crop, crop, resize, "bilinear", tuple(transforms.mean), tuple(transforms.std))
    image = picture(width, height)
    assert torch.equal(normalise(prepared, decode(prepared, _bytes(encode(image))))[0], transforms(image))


@pytest.mark.parametrize("name", ["legacy_xception", "inception_v4", "darknet53", "mixer_s16_224"])
def test_preprocessing_is_bit_equal_to_timms_own(name: str) -> None:
    timm = pytest.importorskip("timm")
    from runtime.model.zoo import _timm_preprocessing

    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transforms = timm.data.create_transform(**config)
    prepared = _timm_preprocessing(name, config)
    for seed, size in enumerate(SIZES):
        image = picture(*size, seed=seed)
        ours = normalise(prepared, decode(prepared, _bytes(encode(image))))
        assert torch.equal(ours[0], transforms(image)), size


def grey16(values: np.ndarray) -> bytes:
    return encode(Image.fromarray(values.astype(np.uint16)))


def test_grey_of_16_bits_is_scaled_not_clipped(spec: GraphSpec) -> None:
    assert spec.preprocessing is not None
    fine = np.linspace(0, 65535, 36 * 36).reshape(36, 36).astype(np.uint16)
    coarse = np.rint(fine / 257).astype(np.uint8)
    expected = decode(spec.preprocessing, _bytes(encode(Image.fromarray(coarse))))
    assert torch.equal(decode(spec.preprocessing, _bytes(grey16(fine))), expected)
    assert torch.equal(admit(spec, Image.fromarray(fine)).values[IMAGE_VALUE], expected)
    assert 100 < expected.float().mean() < 155


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped_as_torchvision_drops_it(spec: GraphSpec, mode: str) -> None:
    assert spec.preprocessing is not None
    image = picture(40, 40).convert(mode)
    image.putalpha(Image.effect_noise((40, 40), 90.0))
    plain = encode(image.convert("RGB"))
    assert torch.equal(decode(spec.preprocessing, _bytes(encode(image))), decode(spec.preprocessing, _bytes(plain)))


# --- what is refused --------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG header that claims a size, and nothing behind it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, end)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ("no/such/file.jpg", "cannot read the image no/such/file.jpg: No such file"),
        (b"plain text", "expected a JPEG or PNG image, the bytes given is none"),
        (b"", "expected a JPEG or PNG"),
        (sample_file(seed=0)[:10], "expected a JPEG or PNG"),
        (encode(picture(9, 9), "BMP"), "expected a JPEG or PNG"),
        (bomb(9000, 9000), f"at most {MAX_PIXELS} pixels, the bytes given has 9000 x 9000"),
        (bomb(20000, 20000), "expected a JPEG or PNG|at most"),
        (np.zeros((1, 3, 32, 32)), r"expected a float32 tensor of shape \(1, 3, 32, 32\).*got float64"),
        (np.zeros((1, 3, 32, 31), np.float32), r"got float32 of shape \(1, 3, 32, 31\)"),
        (torch.zeros(2, 3, 32, 32), "load the model with another batch size"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"uint8 pixels \(height, width, 3\), got torch.uint8"),
        (torch.zeros(32, 32, dtype=torch.uint8), "uint8 pixels"),
        (np.zeros((2, 32, 32, 3), np.uint8), r"expected 1 image\(s\), the batch size of the model, got 2"),
        ([], r"expected 1 image\(s\).*got 0"),
        (np.array(["a"]), "expected an array of numbers"),
        (np.zeros((0, 0, 3), np.uint8), "an empty one of 0 x 0 pixels"),
        (np.zeros((0, 5, 3), np.uint8), "an empty one of 5 x 0 pixels"),
        (Image.new("RGB", (0, 4)), "an empty one of 0 x 4 pixels"),
        (Image.new("F", (40, 40)), "mode F, whose range is not known"),
        (Image.new("I", (40, 40)), "mode I, whose range is not known"),
        (7, "expected a JPEG or PNG .* got int"),
        (None, "got NoneType"),
        (Image.fromarray(np.zeros((1, 60000, 3), np.uint8)), "a line of 60000 x 1 pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_input_that_the_model_cannot_take_is_named(spec: GraphSpec, x: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        admit(spec, x)


def test_a_list_of_files_and_pictures_is_refused(pair_spec: GraphSpec) -> None:
    with pytest.raises(InputError, match="files only or pictures only"):
        admit(pair_spec, [sample_file(seed=0), np.zeros((32, 32, 3), np.uint8)])


def test_a_model_without_preprocessing_takes_no_pictures(tensor_spec: GraphSpec) -> None:
    for x in (sample_file(seed=0), picture(32, 32)):
        with pytest.raises(InputError, match="no image preprocessing"):
            admit(tensor_spec, x)
    with pytest.raises(InputError, match="got uint8"):
        admit(tensor_spec, np.zeros((32, 32, 3), np.uint8))


def test_a_file_above_the_cap_is_refused_before_it_is_read_whole(
    spec: GraphSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "MAX_ENCODED_BYTES", 1000)
    path = tmp_path / "large.jpg"
    path.write_bytes(sample_file(seed=0))
    with pytest.raises(InputError, match="at most 1000 bytes"):
        admit(spec, path)


@pytest.mark.parametrize("keep", [0.3, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_broken_image_is_an_input_error_when_it_is_decoded(spec: GraphSpec, kind: str, keep: float) -> None:
    data = encode(picture(200, 200), kind)
    admitted = admit(spec, data[: int(len(data) * keep)])
    with pytest.raises(InputError, match="broken or cut short"):
        run_input_stage(spec, admitted)


def test_models_of_integer_input_take_integers() -> None:
    import tests.models

    graph: LayerGraph = trace(load_model("tests.models:tokens"))
    assert tests.models.tokens()[1].dtype == torch.int64
    assert admit(graph.spec, np.zeros((1, 6), np.int64)).kind == "tensor"
