"""From an architecture's name and its weights to a `SplitClassifier`: the only place that knows timm and torchvision.

A name that both libraries know is timm's, unless a local weights file fits torchvision's form of it alone.
"""

import difflib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epic_ray.errors import InputError
from epic_ray.method.checkpoints import StateDict, fit_weights, read_weights
from epic_ray.method.classifier import SplitClassifier, split_classifier
from epic_ray.method.preprocessing import Preprocessing

SOURCES = ("auto", "timm", "torchvision", "factory")


def load_classifier(
    architecture: str,
    *,
    source: str = "auto",
    weights: str | Path = "pretrained",
    class_count: int | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> SplitClassifier:
    """The classifier of this name with these weights, split and proved (see `split_classifier`).

    `source`: "timm", "torchvision", "auto" (timm, then torchvision; see the module's head), or "factory", where
    `architecture` is the dotted path of a function that returns a model ("package.module:function").
    `weights`: "pretrained" (the library's own; a factory's model as it comes), "random" (from `seed`), or a file.
    `class_count`: classes of the head, where not the library's default. `class_names`: in the head's order.
    `preprocessing`: {resize, crop, interpolation, mean, std, resize_mode} in place of the library's own; must be
    given for a factory. `arguments` go to the model's constructor.

    Raises InputError for an unknown name, weights that cannot be had or do not fit, and a model without a split.
    """
    if source not in SOURCES:
        raise InputError(f"model source {source!r} is none of {', '.join(SOURCES)}")
    names = _candidates(architecture, source)
    options = dict(arguments or {})
    if str(weights) in ("pretrained", "random"):
        backbone = _build(names[0], architecture, class_count, options, seed, pretrained=str(weights) == "pretrained")
        told = {"pretrained": "its own pretrained weights", "random": f"random weights of seed {seed}"}[str(weights)]
    else:
        path = Path(weights).expanduser()
        backbone = _build_from_file(names, architecture, class_count, options, seed, read_weights(path))
        told = str(path)
    prepared = _merge_preprocessing(backbone.preprocessing, preprocessing, architecture)
    split = split_classifier(backbone.model, prepared, tolerance=tolerance)
    if class_count is not None and split.class_count != class_count:
        raise InputError(f"{architecture} gives {split.class_count} classes, not the {class_count} of class_count")
    split.class_names = _class_names(class_names, backbone, split.class_count)
    split.origin = f"{backbone.source} {architecture}, {told}"
    return split


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """The WordNet ids of the 1,000 ImageNet classes, in the order of the usual head."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def wnid_names() -> dict[str, str]:
    """Short English names of the ImageNet classes by WordNet id; two classes may share one (crane)."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return {wnid: info.label_name_to_description(wnid).split(",")[0] for wnid in imagenet_wnids()}


def known_architectures() -> dict[str, list[str]]:
    """Names that each library can build, by source."""
    import timm
    from torchvision import models

    return {"timm": timm.list_models(), "torchvision": models.list_models(module=models)}


# ---------------------------------------------------------------- building


@dataclass(frozen=True)
class _Backbone:
    model: nn.Module
    source: str
    preprocessing: Preprocessing | None
    imagenet_names: tuple[str, ...] | None
    """Names of the library's default head."""


def _candidates(architecture: str, source: str) -> list[str]:
    """The sources that can build this name, best first."""
    if source == "factory":
        return ["factory"]
    import timm
    from torchvision import models

    known = {
        "timm": timm.is_model(architecture),
        "torchvision": architecture in models.list_models(module=models),
    }
    names = [name for name, has in known.items() if has and source in ("auto", name)]
    if names:
        return names
    where = "timm and torchvision" if source == "auto" else source
    listed = {f"{name} ({lib})": name for lib, all_ in known_architectures().items() for name in all_}
    near = difflib.get_close_matches(architecture, listed.values(), n=6, cutoff=0.5)
    close = [label for label, name in listed.items() if name in near]
    hint = f"; near it: {', '.join(close)}" if close else ""
    dotted = "; a function of your own needs source 'factory'" if ":" in architecture or "." in architecture else ""
    raise InputError(f"{where} know no architecture {architecture!r}{hint}{dotted}")


def _build(
    source: str, architecture: str, class_count: int | None, arguments: dict[str, Any], seed: int, *, pretrained: bool
) -> _Backbone:
    builders: dict[str, Callable[[str, int | None, dict[str, Any], bool], _Backbone]] = {
        "timm": _build_timm,
        "torchvision": _build_torchvision,
        "factory": _build_factory,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return builders[source](architecture, class_count, arguments, pretrained)
        except InputError:
            raise
        except TypeError as error:
            raise InputError(f"{source} {architecture} does not take these arguments {arguments}: {error}") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            if not pretrained or source == "factory":
                raise InputError(f"{source} could not build {architecture} with {arguments}: {reason}") from error
            raise InputError(
                f"the pretrained weights of {source} {architecture} could not be fetched ({reason}); where there is "
                "no network, set model.weights to a local .safetensors or .pth file, or to 'random'"
            ) from error


def _build_from_file(
    sources: list[str],
    architecture: str,
    class_count: int | None,
    arguments: dict[str, Any],
    seed: int,
    state: StateDict,
) -> _Backbone:
    """The first source whose model takes the whole state dict, and nothing but it."""
    misfits = []
    for source in sources:
        backbone = _build(source, architecture, class_count, arguments, seed, pretrained=False)
        misfit = fit_weights(backbone.model, state)
        if misfit is None:
            return backbone
        misfits.append(f"{source} {architecture}: {misfit}")
    raise InputError(f"the weights file does not fit {' -- nor '.join(misfits)}")


def _build_timm(architecture: str, class_count: int | None, arguments: dict[str, Any], pretrained: bool) -> _Backbone:
    import timm
    from timm.data import resolve_model_data_config

    own = timm.models.get_pretrained_cfg(architecture, allow_unregistered=True)
    own_count = own.num_classes if own is not None else None
    _require_trained_head(architecture, class_count, own_count, pretrained)
    heads: dict[str, Any] = {} if class_count is None else {"num_classes": class_count}
    model = timm.create_model(architecture, pretrained=pretrained, **heads, **arguments)
    size = {"img_size": arguments["img_size"]} if isinstance(arguments.get("img_size"), int) else {}
    config = resolve_model_data_config(model, args=size)
    names = tuple(wnid_names()[wnid] for wnid in imagenet_wnids()) if own_count in (None, 1000) else None
    return _Backbone(model, "timm", _timm_preprocessing(config), names)


def _timm_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    channels, *crop = config["input_size"]
    if channels != 3:
        raise InputError(f"the model takes {channels} channels; only RGB images are read")
    height, width = (math.floor(side / config["crop_pct"]) for side in crop)
    mode = {"squash": "squash", "border": "contain"}.get(config["crop_mode"], "cover")
    if mode == "cover" and height == width:
        mode = "short"
    return Preprocessing(
        resize=height if mode == "short" else (height, width),
        crop=(crop[0], crop[1]),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize_mode=mode,
    )


def _build_torchvision(
    architecture: str, class_count: int | None, arguments: dict[str, Any], pretrained: bool
) -> _Backbone:
    from torchvision import models

    own = models.get_model_weights(architecture).DEFAULT
    names = tuple(own.meta["categories"])
    _require_trained_head(architecture, class_count, len(names), pretrained)
    heads: dict[str, Any] = {} if class_count is None else {"num_classes": class_count}
    model = models.get_model(architecture, weights=own if pretrained else None, **heads, **arguments)
    transform = own.transforms()
    crop = transform.crop_size
    preprocessing = Preprocessing(
        resize=transform.resize_size[0],
        crop=(crop[0], crop[-1]),
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )
    return _Backbone(model, "torchvision", preprocessing, names)


def _build_factory(
    architecture: str, class_count: int | None, arguments: dict[str, Any], pretrained: bool
) -> _Backbone:
    module_name, _, name = architecture.replace(":", ".").rpartition(".")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"no function {architecture!r} ({error}); a factory is named 'package.module:function' and must be "
            "importable where the run is made"
        ) from error
    model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise InputError(f"{architecture} returned a {type(model).__name__}, not a torch.nn.Module")
    return _Backbone(model, "factory", None, None)


def _require_trained_head(architecture: str, asked: int | None, own: int | None, pretrained: bool) -> None:
    if pretrained and asked is not None and own is not None and asked != own:
        raise InputError(
            f"the pretrained {architecture} has a head of {own} classes; class_count={asked} would leave it untrained: "
            "give a weights file that has such a head"
        )


def _class_names(given: Sequence[str] | None, backbone: _Backbone, class_count: int) -> tuple[str, ...] | None:
    if given is not None:
        if len(given) != class_count:
            raise InputError(f"{len(given)} class names for a head of {class_count} classes; give one each")
        return tuple(given)
    names = backbone.imagenet_names
    return names if names is not None and len(names) == class_count else None


def _merge_preprocessing(
    own: Preprocessing | None, given: Mapping[str, Any] | None, architecture: str
) -> Preprocessing:
    """The library's preprocessing with the given settings on top."""
    known = [field.name for field in fields(Preprocessing)]
    unknown = sorted(set(given or {}) - set(known))
    if unknown:
        raise InputError(f"model.preprocessing has no {', '.join(unknown)}; it has {', '.join(known)}")
    changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in (given or {}).items()}
    if isinstance(changes.get("crop"), int):
        changes["crop"] = (changes["crop"], changes["crop"])
    if own is None and not {"crop", "mean", "std"} <= set(changes):
        raise InputError(
            f"{architecture} comes from a factory, so its preprocessing is not known: give model.preprocessing with "
            "crop, mean and std (and resize, interpolation)"
        )
    try:
        if own is None:
            merged = Preprocessing(**{"resize": None} | changes)
        else:
            # a new resize brings the mode that goes with its form, unless one is given
            merged = replace(own, **({"resize_mode": ""} if "resize" in changes else {}) | changes)
    except (TypeError, ValueError) as error:
        raise InputError(f"model.preprocessing: {error}") from error
    if merged.resize_mode == "short" and isinstance(merged.resize, int) and merged.resize < max(merged.crop):
        raise InputError(
            f"model.preprocessing: resize {merged.resize} is below the crop {merged.crop}, so that every image would "
            "get a black border; set both"
        )
    return merged
