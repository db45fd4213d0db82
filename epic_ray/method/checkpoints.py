"""Weights files: read without running what they may carry, and put into a model wholly or not at all."""

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epic_ray.errors import InputError

StateDict = dict[str, Tensor]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Where a training checkpoint keeps the weights; averaged ones first, as they are what such checkpoints are kept for.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.", "_orig_mod.")


def read_weights(path: Path) -> StateDict:
    """The tensors of a checkpoint by name, floats as float32; runs no code that the file may carry.

    Raises InputError for a file that is missing, unreadable, not a table of tensors, or in need of running code.
    """
    if not path.is_file():
        raise InputError(
            f"no weights file {path}; model.weights is 'pretrained', 'random', or a file ({', '.join(SUFFIXES)})"
        )
    if path.suffix not in SUFFIXES:
        raise InputError(f"weights file {path} is none of {', '.join(SUFFIXES)}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = _unwrap(content)
    if not state:
        found = f"keys {_first(content)}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise InputError(f"{path} holds no table of tensors (a state dict) but {found}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def fit_weights(model: nn.Module, state: StateDict) -> str | None:
    """Loads the whole state dict, and nothing but it; or leaves the model alone and says what does not fit.

    Prefixes that wrappers add to all names are taken off where that makes it fit.
    """
    spellings = _spellings(state)
    fitting = next((s for s in spellings if not _misfits(s, model)), None)
    if fitting is None:
        return _explain(min(spellings, key=lambda s: len(_misfits(s, model))), model)
    model.load_state_dict(fitting, strict=False)
    return None


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is no readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        # training scripts keep their settings beside the weights; a Namespace runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as error:
        found = re.search(r"Unsupported (?:global|class)[^\n]*|TorchScript archives", str(error))
        if found is None:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{path} is no readable checkpoint: {reason[:200]}") from error
        raise InputError(
            f"{path} is refused, and nothing of it was run: it is no plain table of tensors, reading it could run code "
            f"({found.group(0)[:200]}); save its state dict alone, best as .safetensors"
        ) from error


def _unwrap(content: Any) -> StateDict:
    """The state dict in a checkpoint, or an empty one."""
    if not isinstance(content, Mapping):
        return {}
    if all(isinstance(value, Tensor) for value in content.values()):
        return dict(content)
    inner = (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping))
    return next((state for state in map(_unwrap, inner) if state), {})


def _spellings(state: StateDict) -> list[StateDict]:
    """The state dict under its own names, without prefixes, and under torchvision's present names."""
    spellings = [state]
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in spellings[-1])), ""):
        spellings.append({name.removeprefix(prefix): tensor for name, tensor in spellings[-1].items()})
    # torchvision's published DenseNet files are older than its module names
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)\.")
    return [*spellings, {old.sub(r"\1\2.", name): tensor for name, tensor in spellings[-1].items()}]


def _misfits(state: StateDict, model: nn.Module) -> list[str]:
    """Names that are missing, unexpected or of another shape. Counts of batches seen may be absent."""
    own = model.state_dict()
    names = {n for n in own.keys() ^ state.keys() if not (n in own and n.endswith("num_batches_tracked"))}
    return sorted(names | {n for n in own.keys() & state.keys() if own[n].shape != state[n].shape})


def _explain(state: StateDict, model: nn.Module) -> str:
    own, names = model.state_dict(), _misfits(state, model)
    missing = [name for name in names if name not in state]
    unexpected = [name for name in names if name not in own]
    reshaped = [name for name in names if name in own and name in state]
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys missing ({_first(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_first(unexpected)})")
    if reshaped:
        shapes = (f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}" for name in reshaped)
        parts.append(f"{len(reshaped)} of another shape ({_first(shapes)})")
    # where only the number of rows of some layers is off, these layers are the head
    heads = {len(state[name]) for name in reshaped if state[name].shape[1:] == own[name].shape[1:]}
    if len(heads) == 1 and len(reshaped) == len(names):
        count = heads.pop()
        parts.append(f"the file has a head of {count} classes; pass model.class_count={count}")
    return "; ".join(parts)


def _first(names: Iterable[Any], count: int = 4) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")
