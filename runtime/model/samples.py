"""Made-up pictures with the statistics that matter here: smooth areas, edges, texture. The same bytes everywhere."""

import io

import numpy as np
from PIL import Image

_OCTAVES = ((4, 0.5), (16, 0.3), (64, 0.2))
"""Cells per side and weight of each layer of noise: photographs hold most of their power in low frequencies."""

_ENCODED_SIZE = (640, 480)
"""Width and height of a sample file: the smallest common camera."""


def sample_images(count: int, height: int, width: int, seed: int) -> np.ndarray:
    """Make pictures, shape (count, height, width, 3), uint8.

    Resizing by PIL and rounding to integers keep them equal on every machine and thread count.
    """
    return np.stack([_sample_image(height, width, np.random.default_rng((seed, item))) for item in range(count)])


def _sample_image(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    total = np.zeros((height, width, 3), dtype=np.float64)
    for cells, weight in _OCTAVES:
        noise = random.integers(0, 256, size=(cells, cells, 3), dtype=np.uint8)
        total += weight * np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(4):  # rectangles: edges, and areas of one colour
        top, left = int(random.integers(0, height)), int(random.integers(0, width))
        rows, cols = int(random.integers(1, height // 2 + 2)), int(random.integers(1, width // 2 + 2))
        total[top : top + rows, left : left + cols] = random.integers(0, 256, size=3)
    # Dim, bright, flat and harsh ones, and a colour cast: pictures of one set differ in this most.
    total = random.uniform(0.4, 1.6) * (total - 128) + random.uniform(50, 200) + random.uniform(-30, 30, size=3)
    return np.clip(np.rint(total), 0, 255).astype(np.uint8)


def sample_file(seed: int, quality: int = 90) -> bytes:
    """Make a JPEG file like a camera's."""
    width, height = _ENCODED_SIZE
    file = io.BytesIO()
    Image.fromarray(sample_images(1, height, width, seed)[0]).save(file, "JPEG", quality=quality)
    return file.getvalue()
