"""From a model's name to a module that is ready to be traced.

A spec is `torchvision:NAME`, `timm:NAME`, or `package.module:factory`. The two libraries are imported only when a spec
names them.
"""

import difflib
import importlib
import inspect
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.errors import ModelError
from runtime.model.inputs import INTERPOLATIONS, normalise
from runtime.model.samples import sample_images
from runtime.model.weights import condition, load_weights
from runtime.types import Preprocessing

logger = logging.getLogger(__name__)

IMAGENET = Preprocessing(224, 224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What a factory's module takes when the factory returns nothing else."""

LIBRARIES = ("torchvision", "timm")
CONDITIONING_ITEMS = 8
"""Images in the batch that conditions seeded weights: fewer, and other pictures blow up in deep networks."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model in eval mode, and an input for it."""

    spec: str
    module: nn.Module
    example: torch.Tensor  # a batch of the model's input, contiguous, on its device
    preprocessing: Preprocessing | None
    batch_size: int
    weights: str  # pretrained, seeded:SEED, factory, file:NAME


@dataclass(frozen=True, slots=True, eq=False)
class _Built:
    """A module as its library or factory made it."""

    module: nn.Module
    preprocessing: Preprocessing | None
    example: torch.Tensor | None = None


@torch.inference_mode(False)
def load_model(
    spec: str, *, weights: str | None = None, seed: int = 0, batch_size: int = 1, device: str = "cpu"
) -> Model:
    """Build a model.

    Weights are equal in every process with the same spec, seed, torch release and type of machine.

    Args:
        spec: `torchvision:NAME`, `timm:NAME` or `package.module:factory`. A factory returns a module (which then takes
            ImageNet-style images of 224 x 224), or (module, example), or (module, example, Preprocessing).
        weights: `pretrained`; a file; `seeded` (see `weights.condition`); None: seeded for a library's model, left as
            they are for a factory's.
        seed: of seeded weights.
        batch_size: images per request.
        device: as torch names it.

    Raises:
        ModelError: when the model, its library or its weights cannot be found, built or loaded.
    """
    source, name = _split_spec(spec)
    if batch_size < 1:
        raise ModelError(f"expected a batch size of 1 or more, got {batch_size}")
    is_seeded = weights == "seeded" or (weights is None and source in LIBRARIES)
    _make_exact()  # before conditioning, which would else take other kernels in a process's first load than later
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = _build(source, name, is_pretrained=weights == "pretrained")
        module = built.module.eval()
        if is_seeded:
            _condition(spec, module, _make_batch(built, CONDITIONING_ITEMS, seed))
    if weights not in (None, "pretrained", "seeded"):
        load_weights(module, Path(weights))
    target = _find_device(device)
    return Model(
        spec=spec,
        module=module.to(target),
        example=_make_batch(built, batch_size, seed).to(target, memory_format=torch.contiguous_format),
        preprocessing=built.preprocessing,
        batch_size=batch_size,
        weights=_label(weights, is_seeded, seed),
    )


def check_library_name(spec: str) -> None:
    """Check, without building it, that a library has the model of a spec; a factory is not looked for.

    Raises:
        ModelError: when the library is not installed, or has no such model; with the nearest that it has.
    """
    source, name = _split_spec(spec)
    if source == "torchvision":
        _check_name(source, name, _import_library(source).models.list_models())
    elif source == "timm":
        models = _import_library(source).models
        name = models.get_deprecated_models().get(name) or name
        _check_name(source, name.partition(".")[0], models.list_models())


def _condition(spec: str, module: nn.Module, batch: torch.Tensor) -> None:
    try:
        condition(module, batch)
    except Exception as error:
        raise ModelError(
            f"cannot make seeded weights for {spec}: its forward fails on an input of shape {tuple(batch.shape)}: "
            f"{error}; pass a file of weights, or leave a factory's as they are"
        ) from error


def _label(weights: str | None, is_seeded: bool, seed: int) -> str:
    if is_seeded:
        return f"seeded:{seed}"
    if weights is None:
        return "factory"
    return weights if weights == "pretrained" else f"file:{Path(weights).name}"


def _make_exact() -> None:
    """Switch off, for this process, the kernels that give other bits than the traced graph does."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention that torch.export never takes


def _find_device(device: str) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"cannot use device {device!r}: {reason}; use cpu, or cuda where torch sees one") from error
    return target


def _split_spec(spec: str) -> tuple[str, str]:
    source, separator, name = spec.partition(":")
    if not separator or not source or not name:
        raise ModelError(f"expected torchvision:NAME, timm:NAME or package.module:factory, got {spec!r}")
    return source, name


def _make_batch(built: _Built, count: int, seed: int) -> torch.Tensor:
    """Make a seeded batch: pictures through the input stage, or variations of the factory's example."""
    example, picture = built.example, built.preprocessing
    if example is None:
        assert picture is not None, "a built model has an example or preprocessing"
        return normalise(picture, torch.from_numpy(sample_images(count, picture.height, picture.width, seed)))
    if example.dim() == 0 or len(example) >= count:
        return example[:count] if example.dim() else example
    # Items that differ: the example's own, then the same shifted along the last dimension.
    rolled = [example[i % len(example)].roll(i // len(example), dims=-1) for i in range(count)]
    return torch.stack(rolled)


def _build(source: str, name: str, *, is_pretrained: bool) -> _Built:
    if source == "torchvision":
        return _build_torchvision(name, is_pretrained)
    if source == "timm":
        return _build_timm(name, is_pretrained)
    if is_pretrained:
        raise ModelError(f"weights 'pretrained' exist for {' and '.join(LIBRARIES)}, not for {source}:{name}")
    return _call_factory(source, name)


def _import_library(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ModelError(f"{library} is not installed; run: pip install offcut[zoo]") from error


def _check_name(library: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"see {library}'s list of models"
        raise ModelError(f"{library} has no model {name!r}; {hint}")


def _no_pretrained(spec: str, error: Exception) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(
        f"cannot fetch pretrained weights of {spec}: {reason}; use --weights seeded, or --weights FILE with a state dict"
    )


# --- torchvision ------------------------------------------------------------------------------------------------------


def _build_torchvision(name: str, is_pretrained: bool) -> _Built:
    models = _import_library("torchvision").models
    _check_name("torchvision", name, models.list_models())
    accepted = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights": "DEFAULT" if is_pretrained else None}
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):  # heads that only training reads, and minutes of scipy
        options |= {"aux_logits": False, "init_weights": False}
    try:
        module = models.get_model(name, **options)
    except Exception as error:
        if is_pretrained:
            raise _no_pretrained(f"torchvision:{name}", error) from error
        raise ModelError(f"torchvision cannot build {name}: {error}") from error
    return _Built(module, _torchvision_preprocessing(models, name))


def _torchvision_preprocessing(models: Any, name: str) -> Preprocessing:
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    resize = getattr(transforms, "resize_size", None)
    if not resize or not hasattr(transforms, "mean") or not hasattr(transforms, "interpolation"):
        raise ModelError(
            f"torchvision:{name} does not take single images of one size; wrap it in a factory "
            "(package.module:factory) that returns (module, example)"
        )
    crop = getattr(transforms, "crop_size", resize)  # segmentation models: no crop; here the centre square
    return Preprocessing(
        height=crop[0],
        width=crop[-1],
        resize=resize[0],
        interpolation=_interpolation(transforms.interpolation.value),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _interpolation(name: str) -> str:
    return name if name in INTERPOLATIONS else "bilinear"


# --- timm -------------------------------------------------------------------------------------------------------------


def _build_timm(name: str, is_pretrained: bool) -> _Built:
    timm = _import_library("timm")
    name = timm.models.get_deprecated_models().get(name) or name
    architecture = name.partition(".")[0]
    _check_name("timm", architecture, timm.list_models())
    try:
        module = timm.create_model(name, pretrained=is_pretrained)
    except Exception as error:
        if is_pretrained:
            raise _no_pretrained(f"timm:{name}", error) from error
        raise ModelError(f"timm cannot build {name}: {error}") from error
    config = timm.data.resolve_model_data_config(module)
    if config["input_size"][0] != 3:
        raise ModelError(
            f"timm:{name} does not take RGB images; wrap it in a factory (package.module:factory) that returns "
            "(module, example)"
        )
    return _Built(module, _timm_preprocessing(name, config))


def _timm_preprocessing(name: str, config: dict[str, Any]) -> Preprocessing:
    _, height, width = config["input_size"]
    if config["crop_mode"] != "center":
        logger.warning("timm:%s asks for crop mode %s; images are cropped at the centre", name, config["crop_mode"])
    return Preprocessing(
        height=height,
        width=width,
        resize=math.floor(min(height, width) / config["crop_pct"]),
        interpolation=_interpolation(config["interpolation"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


# --- factories --------------------------------------------------------------------------------------------------------


def _call_factory(package: str, name: str) -> _Built:
    factory = _find_factory(package, name)
    try:
        made = factory()
    except Exception as error:
        raise ModelError(f"{package}:{name} raised {type(error).__name__}: {error}") from error
    module, example, picture = made if isinstance(made, tuple) and len(made) == 3 else (*_pair(made), None)
    is_fit = isinstance(module, nn.Module) and isinstance(example, torch.Tensor | None)
    if not is_fit or not isinstance(picture, Preprocessing | None):
        raise ModelError(
            f"expected {package}:{name} to return a module, (module, example) or (module, example, Preprocessing), got "
            f"{type(made).__name__}"
        )
    if example is None:
        return _Built(module, IMAGENET)
    if picture is not None and example.shape[1:] != (3, picture.height, picture.width):
        raise ModelError(
            f"expected an example of shape (N, 3, {picture.height}, {picture.width}), as the Preprocessing says, from "
            f"{package}:{name}, got {tuple(example.shape)}"
        )
    return _Built(module, picture, None if picture is not None else example.detach())


def _pair(made: Any) -> tuple[Any, Any]:
    return made if isinstance(made, tuple) and len(made) == 2 else (made, None)


def _find_factory(package: str, name: str) -> Any:
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ModelError(
            f"cannot import {package}: {error}; start where it can be imported, or set PYTHONPATH"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        near = difflib.get_close_matches(name, [key for key in vars(module) if not key.startswith("_")], n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ModelError(f"{package} has no function {name!r}{hint}")
    return factory
