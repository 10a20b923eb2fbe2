"""Encoded images as files: read and judged by their header, without torch, so that a mistake is told at once."""

import io
import math
from os import PathLike
from pathlib import Path

from PIL import Image

from runtime.errors import InputError

MAX_PIXELS = 64_000_000
"""Cap of an encoded image's size, read from its header before memory is taken: above any camera of a robot."""

MAX_ENCODED_BYTES = 64 * 1024 * 1024
"""Cap of an encoded image's bytes."""

_FORMATS = ("JPEG", "PNG")

BROKEN = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What PIL raises on a file that is no image, or a broken one. `UnidentifiedImageError` is an `OSError`."""


def read_file(item: str | PathLike[str] | bytes | bytearray | memoryview) -> bytes:
    """Read an encoded image, a path or its bytes, and check its header; the pixels are decoded where the plan says.

    Raises:
        InputError: when it cannot be read, is no JPEG or PNG, or above a cap.
    """
    if isinstance(item, (str, PathLike)):
        label = str(item)
        try:
            with Path(item).open("rb") as file:
                data = file.read(MAX_ENCODED_BYTES + 1)
        except OSError as error:
            raise InputError(f"cannot read the image {label}: {error.strerror or error}") from error
    else:
        label, data = "the bytes given", bytes(item)
    if len(data) > MAX_ENCODED_BYTES:
        raise InputError(f"expected an image file of at most {MAX_ENCODED_BYTES} bytes, {label} has more")
    open_image(data, label).close()
    return data


def open_image(data: bytes, label: str) -> Image.Image:
    """Read an image's header and check its size.

    Raises:
        InputError: when it is no JPEG or PNG, or larger than the cap.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except BROKEN as error:
        raise InputError(
            f"expected a JPEG or PNG image, {label} is none ({type(error).__name__}); pass a path or the bytes of one, "
            "or decode it yourself and pass uint8 pixels"
        ) from error
    if math.prod(image.size) > MAX_PIXELS:
        raise InputError(
            f"expected an image of at most {MAX_PIXELS} pixels, {label} has {image.size[0]} x {image.size[1]}; "
            "scale it down first"
        )
    return image
