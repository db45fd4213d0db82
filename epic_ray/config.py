"""The settings of a run: one frozen tree, checked in three steps with an error of its own each.

*Shape* (types, unknown keys) and *sense* (settings against one another) are checked here, on load, all findings at
once; *world* (paths, models, devices) where the run meets it. Precedence: `--set a.b=value` > file > default.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from itertools import permutations
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from epic_ray.errors import ConfigError
from epic_ray.storage import is_uri, last_name, resolve_root

Auto = Literal["auto"]
Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
FITTING_SPLIT = "train"
# largest |difference| / (1 + |logit|) of logits that the same network gives in another order of operations
PRECISION_TOLERANCES = {"float32": 0.0, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 5e-2}
_OWN_WEIGHTS = ("pretrained", "random")
HELD_OUT_SPLIT = "val"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class PreprocessingConfig(Section):
    """What turns an image into the classifier's input; `auto` is the weights' own."""

    resize: Auto | Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = "auto"
    """Pixels of the short side, or [height, width], before the crop; null: not resized."""
    crop: Auto | Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] = "auto"
    """Pixels of the centre crop's side, or [height, width]: the size the classifier sees."""
    interpolation: Literal["auto", "nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "auto"
    """Pillow's name of the resampling filter."""
    mean: Auto | list[Number] = "auto"
    """Subtracted from each colour channel (red, green, blue) in 0..1."""
    std: Auto | list[Number] = "auto"
    """Divides each colour channel after the mean was subtracted."""
    scaled_decode: Auto | bool = "auto"
    """true: JPEGs at least twice as large as they are resized to are reduced while they are decoded, which is faster
    and gives other pixels than the classifier's own transform (docs/performance.md); auto: false."""

    def overrides(self) -> dict[str, Any]:
        """The keys that replace the weights' own."""
        return {key: value for key, value in self.model_dump().items() if value != "auto"}


class ModelConfig(Section):
    """The pretrained classifier to explain."""

    architecture: str
    """The library's name (`resnet50`), or for `source: factory` a dotted path (`package.module:function`)."""
    source: Literal["auto", "timm", "torchvision", "factory"] = "auto"
    """Where the architecture is looked up; auto: timm, then torchvision."""
    weights: str = "pretrained"
    """`pretrained` (the library's own), `random` (seeded), or a .safetensors, .pth, .pt or .bin file."""
    class_count: Positive | None = None
    """Classes of the head where the weights have another head than the library's default."""
    classes: str | list[str] | None = None
    """The head's class names in order, as a list or a file (one a line, or a JSON list), where the library does not
    know them."""
    preprocessing: Auto | PreprocessingConfig = "auto"
    """auto: the weights' own; or a mapping whose keys replace theirs."""
    arguments: dict[str, Any] = {}
    """Further arguments of the model's constructor."""
    seed: int = 0
    """Seed of random weights."""
    tolerance: Annotated[Number, Field(gt=0)] = 1e-4
    """Largest |difference| / (1 + |logit|) between the classifier's logits and those of its split."""


class DataConfig(Section):
    """The images."""

    root: str
    """Folder of the data set, a path or an address (`s3://`, `gs://`); image ids are relative to it."""
    format: Literal["auto", "imagefolder", "parquet", "webdataset", "csv"] = "auto"
    """How the images lie; auto: told from what lies at the first split's place."""
    splits: dict[str, str] = {FITTING_SPLIT: "train", HELD_OUT_SPLIT: "val"}
    """Place of each split below root: a folder, a CSV or TSV file, or a pattern (`data/train-*.parquet`). `train` is
    fitted on, `val` (if any) is held out."""
    labels: Literal["auto", "none"] = "auto"
    """auto: class folders or the label column, matched to the classes of the head; none: no image has a label."""
    image_column: str = "auto"
    """Column of the images' bytes (Parquet) or addresses (CSV); auto: the customary names."""
    label_column: str = "auto"
    """Column of the labels (Parquet, CSV), or the suffix or JSON key that holds them (WebDataset); auto: the customary
    names."""
    max_failed_fraction: Annotated[Number, Field(ge=0, le=1)] = 0.01
    """Share of a split's images that may be unreadable before the run stops."""

    @field_validator("splits")
    @classmethod
    def _splits_make_sense(cls, splits: dict[str, str]) -> dict[str, str]:
        if FITTING_SPLIT not in splits:
            raise ValueError(f"has no `{FITTING_SPLIT}`, the split that is fitted on; add it")
        for split in splits:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", split):
                raise ValueError(f"`{split}` is no split name; use letters, digits, `.`, `_` and `-`")
            if not splits[split].strip("/"):
                raise ValueError(f"`{split}` has no folder; write `.` for the data set's root itself")
        folders = {split: PurePosixPath(folder.strip("/")) for split, folder in splits.items()}
        for one, other in permutations(splits, 2):
            if folders[one].is_relative_to(folders[other]):
                raise ValueError(f"`{one}` and `{other}` share a folder; held-out figures would mean nothing")
        return splits


class FeaturesConfig(Section):
    """The one pass over the images."""

    map_budget_bytes: Annotated[int, Field(ge=0)] = 8 * 1024**3
    """Feature maps of all images are kept during the pass if they need at most this; else those of chosen images."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored pooled features; float16 takes half the space and changes a few prototypes: features are
    rounded by up to 0.05 %, those below 0.00006 by more. Scores are computed in float32 from either."""
    unit_size: Annotated[int, Field(ge=1, le=8192)] = 512
    """Images of a unit: the unit of work, of commitment and of resumption."""


class PrototypeScheduleConfig(Section):
    """Prototypes per channel that a round fits on, round by round."""

    start: Positive = 100
    """Prototypes per channel of the first round."""
    end: Positive = 100
    """Prototypes per channel that the rounds come down to; `start`, where that alone is given."""
    rounds: Positive = 10
    """Rounds of search and update."""
    decay: Literal["linear", "exponential", "logarithmic"] = "linear"
    """The curve from `start` to `end`."""
    exact_end: bool = True
    """true: the last round uses `end`; false: the published code's numbers, which stop one step before it."""

    @model_validator(mode="before")
    @classmethod
    def _end_as_start(cls, values: Any) -> Any:
        if isinstance(values, dict) and "start" in values and "end" not in values:
            return values | {"end": values["start"]}
        return values

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.end > self.start:
            raise ValueError(
                f"end ({self.end}) is above start ({self.start}): the number of prototypes falls; give both"
            )
        return self


class AdamConfig(Section):
    """The paper's solver; its defaults are the paper's."""

    epochs_per_round: Positive = 2
    """Times that a round goes through its pairs."""
    batch_size: Positive = 512
    """Pairs of (image, channel) a step, over all workers."""
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-3
    """Step size."""
    weight_decay: Annotated[Number, Field(ge=0)] = 1e-5
    """Pull of the solver's parameter towards zero, added to its gradient."""


class FitConfig(Section):
    """How the orthogonal matrix is found."""

    solver: Literal["procrustes", "adam"] = "procrustes"
    """procrustes: closed form, one polar factor a round; adam: the paper's gradient descent."""
    start: Literal["auto", "identity", "varimax", "quartimax"] = "auto"
    """Basis of the first round. identity: the classifier's own channels; varimax, quartimax: rotations under which the
    pooled features are sparse, centred or as they are; auto: identity or varimax, whichever a few rounds of
    `procrustes` on the fitting images make purer (docs/solver.md)."""
    seed: int = 42
    """Seed of everything random in the fit."""
    workers: Auto | Annotated[int, Field(ge=0)] | Annotated[list[Positive], Field(min_length=2, max_length=2)] = "auto"
    """Processes of the fit; 0: in the driver; auto: one a GPU where there are several, else 0; [least, most]: as many
    as there is room for, more or fewer as machines come and go. Another number changes U by rounding alone."""
    prototypes_per_channel: PrototypeScheduleConfig = PrototypeScheduleConfig()
    """How many prototypes each round fits on."""
    weights: Literal["rank", "equal"] = "rank"
    """How much each of a channel's prototypes counts in `procrustes`; rank: 1/sqrt(r) for the r-th strongest."""
    adam: AdamConfig = AdamConfig()
    """Settings of `solver: adam`."""

    @field_validator("workers")
    @classmethod
    def _least_comes_first(cls, workers: Any) -> Any:
        if isinstance(workers, list) and workers[0] > workers[1]:
            raise ValueError(f"[{workers[0]}, {workers[1]}] is the wrong way round; write [least, most]")
        return workers


class PrototypesConfig(Section):
    """The final tables."""

    per_channel: Positive = 5
    """Prototypes kept for each channel and sign."""


class ExplainConfig(Section):
    """Explanations of a split."""

    channels_per_image: Positive = 4
    """Strongest channels stored for each image."""
    prototypes_per_channel: Positive = 5
    """Prototypes drawn beside each channel; at most prototypes.per_channel exist."""
    pictures: Annotated[int, Field(ge=0)] = 20
    """Images drawn, spread evenly over the split."""
    rank_by: Literal["share", "score"] = "share"
    """share: the exact signed share of the logit; score: the paper's, which ignores negative activations."""


class ResourcesConfig(Section):
    """What the run may use."""

    feature_actors: Auto | Positive = "auto"
    """Copies of the classifier; auto: one a GPU, or without GPUs as many as their threads fill the cores."""
    gpus_per_actor: Auto | Annotated[Number, Field(ge=0)] = "auto"
    """GPUs each copy holds; auto: 1 where the cluster has GPUs, else 0."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda for an actor that holds a GPU, else cpu."""
    threads_per_actor: Auto | Positive = "auto"
    """CPU threads of an actor's arithmetic; auto: a quarter of the cores, 1 to 4."""
    batch_size: Auto | Positive = "auto"
    """Images of one forward, to which the last batch of a unit is padded; auto: 64 on a GPU, 16 on a CPU."""
    precision: Literal["float32", "tf32", "float16", "bfloat16"] = "float32"
    """Arithmetic of the forwards: float32; or, where speed is worth logits that are no longer exact, tf32 (of GPUs; a
    CPU computes in float32), float16 and bfloat16 (torch's autocast). The rebuilt logits may then differ by 0.005,
    0.005 and 0.05 of 1 + |logit|, and run.json tells by how much they did."""
    feature_cache_bytes: Annotated[int, Field(ge=0)] = 1024**3
    """Pooled features that each process of the fit keeps in memory; those beyond it are read anew in each round."""


class OutputConfig(Section):
    """Where the run is written."""

    root: str = "runs"
    """Folder that holds the run folders, a path or an address (`s3://`, `gs://`)."""


class RunConfig(Section):
    """Everything that decides what a run does."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = ""
    """The run folder is <output.root>/<name>; default: made from the data, the architecture and the method."""
    method: Literal["epic"] = "epic"
    """The explanation method."""
    model: ModelConfig
    """The classifier to explain."""
    data: DataConfig
    """Its images."""
    features: FeaturesConfig = FeaturesConfig()
    """The one pass over the images."""
    fit: FitConfig = FitConfig()
    """The rounds."""
    prototypes: PrototypesConfig = PrototypesConfig()
    """What is kept of each channel."""
    explain: ExplainConfig = ExplainConfig()
    """What is shown of each image."""
    resources: ResourcesConfig = ResourcesConfig()
    """What the run may use."""
    output: OutputConfig = OutputConfig()
    """Where the run is written."""

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("name"):
            return values
        root, architecture = _dig(values, "data", "root"), _dig(values, "model", "architecture")
        if not (isinstance(root, str) and isinstance(architecture, str)):
            return values  # the missing setting is reported, not the name
        parts = (
            (last_name(root) if is_uri(root) else Path(root).resolve().name) or "images",
            re.split(r"[:.]", architecture)[-1],
            values.get("method", "epic"),
        )
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(map(str, parts))).strip("-._")[:100]
        return {**values, "name": name or "run"}

    @property
    def held_out_split(self) -> str | None:
        return HELD_OUT_SPLIT if HELD_OUT_SPLIT in self.data.splits else None


def _dig(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """The settings of a run file (or none) with `a.b=value` overrides on top. Raises ConfigError."""
    values = _read_yaml(path) if path else {}
    for override in overrides:
        _set(values, override)
    return build_config(values, str(path) if path else "settings")


def build_config(values: Mapping[str, Any], origin: str) -> RunConfig:
    """The settings of a mapping. Raises ConfigError with every finding; `origin` names where they stand."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        findings = _findings(error)
        raise ConfigError(f"{origin}: {len(findings)} wrong setting(s)\n" + "\n".join(findings)) from None


def override_config(config: RunConfig, overrides: Iterable[str], origin: str) -> RunConfig:
    """Settings with `a.b=value` overrides on top. Raises ConfigError."""
    values = config.model_dump(mode="json")
    for override in overrides:
        _set(values, override)
    return build_config(values, origin)


def resolve_paths(config: RunConfig) -> RunConfig:
    """The settings with absolute paths, so that every process of the run means the same files."""
    model = config.model
    changes: dict[str, Any] = {}
    if model.weights not in _OWN_WEIGHTS:
        changes["weights"] = resolve_root(model.weights)
    if isinstance(model.classes, str):
        changes["classes"] = resolve_root(model.classes)
    return config.model_copy(
        update={
            "model": model.model_copy(update=changes),
            "data": config.data.model_copy(update={"root": resolve_root(config.data.root)}),
            "output": config.output.model_copy(update={"root": resolve_root(config.output.root)}),
        }
    )


def read_class_names(classes: str | list[str] | None) -> tuple[str, ...] | None:
    """The names that `model.classes` gives, itself or in a file. Raises ConfigError."""
    if classes is None or isinstance(classes, list):
        return tuple(classes) if classes else None
    try:
        text = Path(classes).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"model.classes: {classes} cannot be read ({error}); give a file with one name a line"
        ) from None
    try:
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.classes: {classes} begins like a JSON list but is none ({error})") from None
    return tuple(str(name).strip() for name in names if str(name).strip())


def portable(config: RunConfig) -> RunConfig:
    """The settings for a job elsewhere: paths absolute, class names written out. Raises ConfigError."""
    config = resolve_paths(config)
    names = read_class_names(config.model.classes)
    model = config.model.model_copy(update={"classes": list(names) if names else None})
    return config.model_copy(update={"model": model})


def dump_config(config: RunConfig) -> str:
    """The settings as YAML that `load_config` reads back to the same settings."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One line a setting that differs: `a.b: old -> new`."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def fingerprint(*parts: Any) -> str:
    """A short stable hash of JSON-able parts: what a stage was made from."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file; `epic-ray init` writes one, or pass --set settings") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a run file is a mapping of settings, not a {type(values).__name__}")
    return values


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {override}: expected a.b=value, for example --set fit.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is no YAML; quote it") from None
    node = values
    for step in path[:-1]:
        child = node.get(step)
        node[step] = dict(child) if isinstance(child, dict) else {}
        node = node[step]
    node[path[-1]] = value


# pydantic names the member of a union it tried; a person wrote only the key
_UNION_MEMBER = re.compile(r"^(literal\[|constrained-|list\[|int$|float$|str$|[A-Z]\w+Config$)")
_FIRST_KEY = {"data": "data.root", "model": "model.architecture"}


def _findings(error: ValidationError) -> list[str]:
    """One line for each wrong setting; of a union's several complaints the one that says most."""
    lines: dict[str, tuple[bool, str]] = {}
    keys = [[str(step) for step in item["loc"] if not _UNION_MEMBER.match(str(step))] for item in error.errors()]
    for item, path in zip(error.errors(), keys, strict=True):
        where = ".".join(path)
        if item["type"] == "literal_error" and any(other[: len(path)] == path and other != path for other in keys):
            continue  # `auto` was not meant: the mapping below has its own finding
        in_union = len(path) < len(item["loc"])
        if where not in lines or (lines[where][0] and not in_union):
            lines[where] = (in_union, _line(item, path))
        elif in_union:
            lines[where] = (
                True,
                f"{lines[where][1].rsplit(', not ', 1)[0]}, or {_line(item, path).split(': ', 1)[1]}",
            )
    return [line for _, line in lines.values()]


def _line(item: Any, path: list[str]) -> str:
    where, message = ".".join(path), item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return f"  {where}: unknown setting; {hint}"
    if item["type"] == "missing":
        where = _FIRST_KEY.get(where, where)
        return f"  {where}: missing; set it in the run file or by --set {where}=..."
    if item["type"] == "model_type":
        return f"  {where or 'run file'}: expected a mapping of settings, not {item['input']!r}"
    if item["type"] == "value_error":
        return f"  {where}: {message}" if path else f"  {message}"
    return f"  {where}: {message[0].lower()}{message[1:]}, not {item['input']!r}"


def _known_keys(path: list[str]) -> list[str]:
    section: Any = RunConfig
    for step in path:
        field = section.model_fields.get(step) if hasattr(section, "model_fields") else None
        if field is None:
            break
        section = next(
            (
                kind
                for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
                if hasattr(kind, "model_fields")
            ),
            section,
        )
    return list(section.model_fields)


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
