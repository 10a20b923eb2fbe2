"""Photographs that come with libraries of the `demo` extra: what there is to send without a camera."""

from importlib import resources
from pathlib import Path

_PHOTOS = {
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
    "skimage.data": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
}


def sample_photos() -> tuple[Path, ...]:
    """Every photograph of scikit-learn and scikit-image: a temple, a flower, a face, a cat, a cup, a workshop, a rocket.

    Raises:
        ModuleNotFoundError: when neither is installed, with what to install.
    """
    found = []
    for package, names in _PHOTOS.items():
        try:
            folder = Path(str(resources.files(package)))
        except ModuleNotFoundError:
            continue
        found += [folder / name for name in names if (folder / name).exists()]
    if not found:
        raise ModuleNotFoundError("the photographs come with scikit-learn and scikit-image: pip install offcut[demo]")
    return tuple(found)


def sample_photo() -> Path:
    """One photograph.

    Raises:
        ModuleNotFoundError: as `sample_photos` does.
    """
    return sample_photos()[0]
