"""Weights: read from a file, or made up so that the output of an untrained network depends on its input.

Freshly initialised networks often answer every input alike: residual branches and heads start at zero, activations fade
or grow, and what is left of the input drowns in a constant part. Equality of outputs, sparsity and codec ratios measured
on them prove nothing. `condition` repairs that with one forward pass.
"""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from runtime.errors import ModelError

SMALL_GAIN = 0.2
"""Constant gains below this switch a branch off at the start of training (layer scale 1e-6, zero-initialised norms)."""

_SCALED = frozenset({nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear})
"""Exactly these, no subclasses: those may compute their weight anew at every call."""

_SHOWN_KEYS = 5


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a state dict from a safetensors or torch file, strictly.

    Raises:
        ModelError: when the file cannot be read, or its names or shapes are not the model's.
    """
    state = _read_state(path)
    own = module.state_dict()
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or unknown:
        raise ModelError(
            f"{path.name} does not fit the model: missing {_list_keys(missing)}, unknown {_list_keys(unknown)}; "
            "save model.state_dict() of the same architecture"
        )
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            got = tuple(state[key].shape)
            raise ModelError(f"{path.name}: expected {key} of shape {tuple(tensor.shape)}, got {got}")
    module.load_state_dict(dict(state))


def _list_keys(keys: set[str]) -> str:
    shown = sorted(keys)[:_SHOWN_KEYS]
    more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
    return f"{', '.join(shown)}{more}" if shown else "none"


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError, UnpicklingError, zipfile.BadZipFile) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot read weights from {path}: {reason}; expected a safetensors file, or torch.save of a state dict"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ModelError(f"expected a state dict (name -> tensor) in {path}, got {type(content).__name__}")
    return content


# --- conditioning -----------------------------------------------------------------------------------------------------


def condition(module: nn.Module, batch: torch.Tensor) -> None:
    """Change an untrained model's weights so that its output depends on the input.

    Weights and gains that are zero or switch a branch off become ordinary ones. Then one forward pass over `batch`
    sets batch-norm statistics to this batch's, and scales each convolution and linear layer so that its output has unit
    variance; a layer with a bias is also centred, channel by channel, so that no constant part drowns the input's.

    Deterministic on one type of machine: it runs on one thread, whatever the process uses. Draws from torch's global
    generator, so the caller forks and seeds that.

    Args:
        module: in eval mode, on the CPU.
        batch: image-like input, at least two items, since batch statistics of one value are undefined.

    References:
        T. Salimans, D. P. Kingma (2016), "Weight Normalization", section 3: data-dependent initialisation.
        D. Mishkin, J. Matas (2016), "All you need is a good init": layer-sequential unit variance.
        Differs: one pass for both, no iterations, since nothing is trained afterwards.
    """
    for name, parameter in module.named_parameters():
        _wake(name, parameter.detach())
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_one_thread())
        scaled: set[int] = set()
        for child in module.modules():
            if isinstance(child, _BatchNorm) and child.track_running_stats:
                stack.enter_context(_batch_statistics(child))
            elif type(child) in _SCALED:
                handle = child.register_forward_hook(lambda m, _, out: _scale(m, out, scaled))
                stack.callback(handle.remove)
        module(batch)


def _wake(name: str, parameter: torch.Tensor) -> None:
    """Give a parameter that is zero, or a small constant gain, ordinary values; biases are left alone."""
    if not parameter.is_floating_point() or not parameter.numel() or name.rsplit(".", 1)[-1].endswith("bias"):
        return
    flat = parameter.flatten()
    first = float(flat[0])
    if abs(first) >= SMALL_GAIN or float(flat[-1]) != first or not bool((flat == first).all()):
        return
    is_gain = parameter.dim() <= 1 or (first != 0.0 and max(parameter.shape) == parameter.numel())
    if is_gain:
        parameter.uniform_(0.5, 1.0)
    else:
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)


def _scale(layer: nn.Module, output: torch.Tensor, done: set[int]) -> torch.Tensor | None:
    """Hook: scale a layer's weight, and centre its bias, so that this output would have had unit variance."""
    if id(layer) in done or not output.is_floating_point():
        return None
    done.add(id(layer))
    channel = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
    others = [dim for dim in range(output.dim()) if dim != channel]
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor)
    overall = output.std().clamp(min=1e-12)
    if not isinstance(bias, torch.Tensor) or isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        weight.div_(overall)
        if isinstance(bias, torch.Tensor):
            bias.div_(overall)
        return output / overall
    mean = output.mean(dim=others)
    # A channel that hardly varies over this batch may over others: its gain is bounded by the layer's.
    spread = torch.maximum(output.std(dim=others), 0.1 * overall)
    weight.div_(spread.view(-1, *[1] * (weight.dim() - 1)))
    bias.sub_(mean).div_(spread)
    shape = [-1 if dim == channel else 1 for dim in range(output.dim())]
    return (output - mean.view(shape)) / spread.view(shape)


@contextmanager
def _batch_statistics(norm: _BatchNorm) -> Iterator[None]:
    """Let a batch norm take over the statistics of the next batch."""
    momentum, norm.momentum = norm.momentum, 1.0
    norm.train()
    try:
        yield
    finally:
        norm.eval()
        norm.momentum = momentum


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: more would round sums differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
