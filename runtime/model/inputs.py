"""The input stage: what a request may bring, and how a picture becomes the model's input.

`admit` sorts a request's input into one of three kinds and copies it, so that a camera may reuse its buffer at once:

- `encoded`: JPEG or PNG files, as they are. Layer 0, `decode`, makes the image of them.
- `image`: uint8 pixels, (N, height, width, 3). Layer 1, `normalise`, makes the model's input of them.
- `tensor`: the model's input itself.

The result is bit-equal to torchvision's own transforms: resize of the shorter side and centre crop by PIL, then scaling
and normalisation in float32. As there, EXIF rotation is not applied, and transparency is dropped, not composited: apply
`PIL.ImageOps.exif_transpose` or `Image.alpha_composite` first and pass the picture. Differs: grey PNGs of 16 bits are
scaled to 8; torchvision's `convert("RGB")` clips them, which leaves them nearly white.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image

from runtime.errors import InputError
from runtime.model.encoded import BROKEN, MAX_PIXELS, open_image, read_file
from runtime.model.samples import sample_file
from runtime.types import GraphSpec, Preprocessing, ValueSpec

IMAGE_VALUE = "input.image"
"""Name of the value between decode and normalise."""

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
INTERPOLATIONS = tuple(_FILTERS)
"""What `Preprocessing.interpolation` may be."""


@dataclass(frozen=True, slots=True, eq=False)
class Admitted:
    """A request's input as values of the graph."""

    kind: str  # encoded, image, tensor
    values: Mapping[str, torch.Tensor]
    nbytes: int


def encoded_value(index: int) -> str:
    """Name of the value that holds the encoded image of one item of the batch."""
    return f"input.encoded.{index}"


def find_input(graph: GraphSpec) -> ValueSpec:
    """The value that is the model's own input."""
    return next(value for value in graph.values if value.producer == graph.num_stage_layers - 1)


def sample_inputs(graph: GraphSpec, example: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make values that every layer can be run on: sample files where there is an input stage, else the example."""
    if graph.preprocessing is None:
        return {find_input(graph).name: example}
    return {encoded_value(i): _bytes_tensor(sample_file(seed=i)) for i in range(graph.batch_size)}


def admit(graph: GraphSpec, x: Any) -> Admitted:
    """Check a request's input and sort it into its kind.

    Args:
        graph: the model's graph.
        x: path or bytes of a JPEG or PNG, PIL image, uint8 array (height, width, 3) or (N, height, width, 3), or the
            model's input as tensor or array; a list of N of the first three for batches. Files and PIL images are
            resized and cropped; so are arrays, unless they have the model's size already.

    Raises:
        InputError: saying what was expected, what came and what to do.
    """
    if isinstance(x, (torch.Tensor, np.ndarray)):
        tensor = _to_tensor(x)
        if _is_model_input(graph, tensor):
            return _admitted("tensor", {find_input(graph).name: tensor})
        items: list[Any] = list(tensor) if tensor.dim() == 4 else [tensor]
    else:
        items = list(x) if isinstance(x, (list, tuple)) else [x]
    picture = _check_batch(graph, x, items)
    if all(isinstance(item, (str, PathLike, bytes, bytearray, memoryview)) for item in items):
        files = [read_file(item) for item in items]
        return _admitted("encoded", {encoded_value(i): _bytes_tensor(file) for i, file in enumerate(files)})
    pixels = torch.stack([_fit(picture, item) for item in items])
    return _admitted("image", {IMAGE_VALUE: pixels})


def run_input_stage(graph: GraphSpec, admitted: Admitted) -> torch.Tensor:
    """Run the layers before the model's own: the model's input, on the CPU.

    Raises:
        InputError: when an encoded image is broken.
    """
    if admitted.kind == "tensor":
        return admitted.values[find_input(graph).name]
    assert graph.preprocessing is not None, "only a model with preprocessing admits images"
    if admitted.kind == "image":
        return normalise(graph.preprocessing, admitted.values[IMAGE_VALUE])
    return normalise(graph.preprocessing, decode(graph.preprocessing, *admitted.values.values()))


def _admitted(kind: str, values: dict[str, torch.Tensor]) -> Admitted:
    return Admitted(kind, values, sum(value.nbytes for value in values.values()))


def _to_tensor(x: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Copy a tensor or array into contiguous memory: plans give the bits of the model on a contiguous input."""
    if isinstance(x, torch.Tensor):
        return x.detach().clone(memory_format=torch.contiguous_format)
    try:
        return torch.from_numpy(np.array(x, copy=True, order="C"))
    except TypeError as error:
        raise InputError(
            f"expected an array of numbers, got dtype {x.dtype}; convert it to float32 or uint8"
        ) from error


def _is_model_input(graph: GraphSpec, tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is the model's input; false: it may be a picture.

    Raises:
        InputError: when it is neither.
    """
    spec = find_input(graph).tensor
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) == spec.shape and dtype == spec.dtype:
        return True
    if graph.preprocessing is not None and tensor.dtype == torch.uint8:
        return False
    pictures = " or uint8 pixels (N, height, width, 3)" if graph.preprocessing is not None else ""
    raise InputError(
        f"expected a {spec.dtype} tensor of shape {spec.shape}{pictures}, got {dtype} of shape {tuple(tensor.shape)}; "
        "convert it, or load the model with another batch size"
    )


def _check_batch(graph: GraphSpec, x: Any, items: Sequence[Any]) -> Preprocessing:
    spec = find_input(graph).tensor
    if graph.preprocessing is None:
        raise InputError(
            f"expected a {spec.dtype} tensor of shape {spec.shape}, got {type(x).__name__}; this model has no image "
            "preprocessing: let its factory return (module, example, Preprocessing) to give it one"
        )
    if len(items) != graph.batch_size:
        raise InputError(
            f"expected {graph.batch_size} image(s), the batch size of the model, got {len(items)}; "
            "pass that many in a list, or load the model with another batch size"
        )
    return graph.preprocessing


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


# --- pixels -----------------------------------------------------------------------------------------------------------


def _fit(picture: Preprocessing, item: Any) -> torch.Tensor:
    """Make one item of an image batch the model's size."""
    if isinstance(item, Image.Image):
        return _resize_and_crop(picture, item)
    if isinstance(item, np.ndarray):
        item = _to_tensor(item)
    if isinstance(item, torch.Tensor) and item.dtype == torch.uint8 and item.dim() == 3 and item.shape[2] == 3:
        if item.shape[:2] == (picture.height, picture.width):
            return item.cpu()
        return _resize_and_crop(picture, Image.fromarray(item.cpu().numpy()))
    got = f"{item.dtype} of shape {tuple(item.shape)}" if isinstance(item, torch.Tensor) else type(item).__name__
    raise InputError(
        f"expected a JPEG or PNG (path or bytes), a PIL image or uint8 pixels (height, width, 3), got {got}; "
        "a list must hold files only or pictures only"
    )


def _resize_and_crop(picture: Preprocessing, image: Image.Image) -> torch.Tensor:
    """Resize the shorter side, then crop the centre; black where the crop is larger."""
    image = _to_rgb(image)
    width, height = image.size
    short, long = sorted((width, height))
    if short == 0:
        raise InputError(f"expected an image, got an empty one of {width} x {height} pixels; check where it comes from")
    other = int(picture.resize * long / short)
    if other * picture.resize > MAX_PIXELS:
        raise InputError(f"expected an image, got a line of {width} x {height} pixels; crop it first")
    size = (picture.resize, other) if width <= height else (other, picture.resize)
    if size != image.size:
        image = image.resize(size, _FILTERS[picture.interpolation])
    return _crop_centre(np.asarray(image), picture.height, picture.width)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Make 8-bit RGB of any mode whose range is known."""
    is_grey16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if not is_grey16 and image.mode in ("I", "F"):
        raise InputError(
            f"expected a picture of 8 or 16 bits, got a PIL image of mode {image.mode}, whose range is not known; scale "
            "it to uint8 first"
        )
    try:
        if is_grey16:
            grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # 65535 becomes 255, the rest is rounded
            image = Image.fromarray(grey.astype(np.uint8))
        return image.convert("RGB")
    except BROKEN as error:
        raise InputError(f"cannot decode the image: {error}; it is broken or cut short") from error


def _crop_centre(pixels: np.ndarray, height: int, width: int) -> torch.Tensor:
    rows, cols = max(height - pixels.shape[0], 0), max(width - pixels.shape[1], 0)
    if rows or cols:  # torchvision puts the odd pixel of padding at the bottom and the right
        pixels = np.pad(pixels, ((rows // 2, rows - rows // 2), (cols // 2, cols - cols // 2), (0, 0)))
    top = round((pixels.shape[0] - height) / 2.0)
    left = round((pixels.shape[1] - width) / 2.0)
    return torch.from_numpy(pixels[top : top + height, left : left + width].copy())


# --- layers 0 and 1 ---------------------------------------------------------------------------------------------------


def decode(picture: Preprocessing, *encoded: torch.Tensor) -> torch.Tensor:
    """Decode, resize and crop one encoded image per item of the batch.

    Args:
        picture: the model's preprocessing.
        encoded: file contents, 1-D uint8.

    Returns:
        Pixels, shape (N, height, width, 3), uint8, on the CPU.

    Raises:
        InputError: when one is no image, broken or larger than the cap.
    """
    images = []
    for index, file in enumerate(encoded):
        with open_image(file.cpu().numpy().tobytes(), f"item {index} of the batch") as image:
            images.append(_resize_and_crop(picture, image))
    return torch.stack(images)


def normalise(picture: Preprocessing, pixels: torch.Tensor, *, device: torch.device | None = None) -> torch.Tensor:
    """Scale and normalise pixels.

    Args:
        picture: the model's preprocessing.
        pixels: shape (N, height, width, 3), uint8.
        device: where to; None keeps the device of `pixels`.

    Returns:
        The model's input, shape (N, 3, height, width), float32.
    """
    pixels = pixels.to(device)
    mean = torch.tensor(picture.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(picture.std, device=pixels.device).view(3, 1, 1)
    return (pixels.permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255).sub_(mean).div_(std)
