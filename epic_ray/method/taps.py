"""Listening in on a model as it runs: where it averages a map over all cells, and what goes in and comes out there.

Letters: B images, D channels, N cells, K classes; Z feature map, v pooled features.

Functions of torch are watched from outside (`torch.overrides`), so that it does not matter whether a model pools by
a module or by a function, nor what its modules are called. All state of a run lives in that run. New ways of
pooling are added to `_pooled_map`, new norms between pooling and head to `_Norm`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_MEANS = {torch.mean, Tensor.mean}
_ADAPTIVE_POOLS = {functional.adaptive_avg_pool2d, functional.adaptive_avg_pool1d}
_WINDOW_POOLS = {functional.avg_pool2d, functional.avg_pool1d}
_NORMS = {functional.layer_norm, functional.group_norm, functional.rms_norm}

_MEAN_LAYOUTS = {
    (4, (2, 3)): "NCHW",
    (4, (1, 2)): "NHWC",
    (3, (1,)): "tokens",
    (3, (2,)): "channel tokens",
}


@dataclass(frozen=True)
class PoolCall:
    """A call that averages a map over all its cells; `index` counts such calls within one run of the model."""

    index: int
    layout: str
    """"NCHW", "NHWC", "tokens" (B, N, D) or "channel tokens" (B, D, N)."""
    channel_count: int
    cell_count: int
    grid: tuple[int, int] | None
    """(rows, columns), or None where the map is a list of tokens."""
    name: str
    """The function, and the module that called it."""


@dataclass(frozen=True)
class NormCall:
    """A norm with per-image statistics, given the pooled features; `index` counts norms within one run."""

    index: int
    name: str


@dataclass(frozen=True)
class Answer:
    """What a model said when vectors were put in the place of its pooled features."""

    logits: Float[Tensor, "b k"]
    norm: NormCall | None
    """The first norm that was given these vectors as they are."""
    layers: tuple[str, ...]
    """Modules with parameters that ran after them."""


@dataclass(frozen=True)
class Tap:
    """The place where a model is listened to: a pooling call, and the norm to fold into its map, if any."""

    pool: PoolCall
    norm: NormCall | None = None

    def run(
        self, model: nn.Module, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b d ..."], Float[Tensor, "b k"]]:
        """The map Z, channels first, any norm folded in, and the model's own logits, from one run of the model."""
        with _MapTaker(self) as taker:
            logits = model(images)
        if taker.maps is None:
            raise ValueError(f"the model did not reach its pooling ({self.pool.name}) as it did when it was split")
        return taker.maps, logits

    def substitute(self, model: nn.Module, images: Float[Tensor, "b 3 h w"], vectors: Float[Tensor, "b d"]) -> Answer:
        """The logits when `vectors` stand in for what the tapped call (the norm, if any) gives."""
        with _module_names(model) as names, _Substituter(self, vectors, names) as substituter:
            logits = model(images)
        return Answer(logits, substituter.norm, tuple(names.with_parameters[substituter.layers_before :]))


def record_poolings(model: nn.Module, images: Float[Tensor, "b 3 h w"]) -> list[PoolCall]:
    """Every average over a whole map in one run of the model, in order."""
    with _module_names(model) as names, _Recorder(names) as recorder:
        model(images)
    return recorder.calls


class _Names:
    """The modules that are running, innermost last, and those with parameters of their own that ran."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.with_parameters: list[str] = []

    def label(self, function: Callable[..., Any]) -> str:
        where = self.running[-1] if self.running else ""
        return f"{function.__name__} in {where or 'the model itself'}"


@contextmanager
def _module_names(model: nn.Module) -> Iterator[_Names]:
    names = _Names()

    def enter(name: str, module: nn.Module) -> None:
        names.running.append(name)
        if name and next(module.parameters(recurse=False), None) is not None:
            names.with_parameters.append(name)

    def leave(*_: Any) -> None:
        names.running.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, _args, name=name: enter(name, m)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


class _Listener(TorchFunctionMode):
    """Counts the poolings and norms of one run; `on_pool` and `on_norm` may give another result than theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.pool_count = 0
        self.norm_count = 0
        self._half_mean: tuple[Tensor, Tensor] | None = None

    def on_pool(self, index: int, layout: str, source: Tensor, pooled: Tensor, function: Callable[..., Any]) -> Tensor:
        return pooled

    def on_norm(self, index: int, norm: "_Norm", normed: Tensor, function: Callable[..., Any]) -> Tensor:
        return normed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS:
            norm = _Norm.of_call(func, *args, **kwargs)
            normed = func(*args, **kwargs)
            self.norm_count += 1
            return self.on_norm(self.norm_count - 1, norm, normed, func)
        result = func(*args, **kwargs)
        if func in _MEANS or func in _ADAPTIVE_POOLS or func in _WINDOW_POOLS:
            found = self._pooled_map(func, result, *args, **kwargs)
            if found is not None:
                self.pool_count += 1
                return self.on_pool(self.pool_count - 1, *found, result, func)
        return result

    def _pooled_map(
        self, func: Callable[..., Any], result: Tensor, input: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[str, Tensor] | None:
        """(layout, map) where this call averages a map over all its cells."""
        if func in _MEANS:
            return self._mean_map(result, input, *args, **kwargs)
        spatial = tuple(input.shape[2:])
        if input.ndim != (4 if "2d" in func.__name__ else 3) or result[0, 0].numel() != 1:
            return None
        if func in _WINDOW_POOLS:
            kernel = args[0] if args else kwargs["kernel_size"]
            kernel = tuple(kernel) if isinstance(kernel, tuple | list) else (kernel,) * len(spatial)
            if kernel != spatial:
                return None
        return ("NCHW" if input.ndim == 4 else "channel tokens"), input

    def _mean_map(
        self, result: Tensor, input: Tensor, dim: Any = None, *_: Any, axis: Any = None, **__: Any
    ) -> tuple[str, Tensor] | None:
        dim = axis if dim is None else dim
        if dim is None:
            return None
        dims = tuple(sorted(d % input.ndim for d in (dim if isinstance(dim, tuple | list) else (dim,))))
        if self._half_mean is not None and input is self._half_mean[0] and dims in ((2,), (3,)):
            return "NCHW", self._half_mean[1]
        if input.ndim == 4 and dims in ((2,), (3,)):  # mean(3).mean(2): the map is the input of the first
            self._half_mean = (result, input)
        layout = _MEAN_LAYOUTS.get((input.ndim, dims))
        return None if layout is None else (layout, input)


class _Recorder(_Listener):
    def __init__(self, names: _Names) -> None:
        super().__init__()
        self.calls: list[PoolCall] = []
        self._names = names

    def on_pool(self, index: int, layout: str, source: Tensor, pooled: Tensor, function: Callable[..., Any]) -> Tensor:
        maps = _channels_first(source, layout)
        grid = (maps.shape[2], maps.shape[3]) if maps.ndim == 4 else None
        cell_count = math.prod(maps.shape[2:])
        self.calls.append(PoolCall(index, layout, maps.shape[1], cell_count, grid, self._names.label(function)))
        return pooled


class _MapTaker(_Listener):
    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.maps: Tensor | None = None
        self._tap = tap

    def on_pool(self, index: int, layout: str, source: Tensor, pooled: Tensor, function: Callable[..., Any]) -> Tensor:
        if index == self._tap.pool.index:
            # a copy, for the model may go on to change its map in place
            self.maps = _channels_first(source, layout).clone(memory_format=torch.contiguous_format)
        return pooled

    def on_norm(self, index: int, norm: "_Norm", normed: Tensor, function: Callable[..., Any]) -> Tensor:
        if self._tap.norm is not None and index == self._tap.norm.index and self.maps is not None:
            self.maps = norm.fold(self.maps)
        return normed


class _Substituter(_Listener):
    def __init__(self, tap: Tap, vectors: Tensor, names: _Names) -> None:
        super().__init__()
        self.norm: NormCall | None = None
        self.layers_before = 0
        self._tap = tap
        self._vectors = vectors
        self._names = names

    def on_pool(self, index: int, layout: str, source: Tensor, pooled: Tensor, function: Callable[..., Any]) -> Tensor:
        if self._tap.norm is None and index == self._tap.pool.index:
            return self._replace(pooled)
        return pooled

    def on_norm(self, index: int, norm: "_Norm", normed: Tensor, function: Callable[..., Any]) -> Tensor:
        if self._tap.norm is not None:
            return self._replace(normed) if index == self._tap.norm.index else normed
        if self.norm is None and norm.is_given(self._vectors):
            self.norm = NormCall(index, self._names.label(function))
        return normed

    def _replace(self, result: Tensor) -> Tensor:
        self.layers_before = len(self._names.with_parameters)
        return self._vectors.to(result.dtype).reshape(result.shape).clone()


def _channels_first(source: Tensor, layout: str) -> Tensor:
    if layout == "NHWC":
        return source.permute(0, 3, 1, 2)
    return source.transpose(1, 2) if layout == "tokens" else source


@dataclass(frozen=True)
class _Norm:
    """One call of a layer, group or root-mean-square norm: γ·(v − μ)/σ + β, with μ and σ of each image's groups."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    group_count: int
    centred: bool

    @staticmethod
    def of_call(func: Callable[..., Any], *args: Any, **kwargs: Any) -> "_Norm":
        names = {
            functional.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
            functional.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
            functional.rms_norm: ("input", "normalized_shape", "weight", "eps"),
        }[func]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        rms = func is functional.rms_norm
        eps = given.get("eps", None if rms else 1e-5)
        return _Norm(
            input=given["input"],
            weight=given.get("weight"),
            bias=given.get("bias"),
            eps=torch.finfo(given["input"].dtype).eps if eps is None else eps,
            group_count=given.get("num_groups", 1),
            centred=not rms,
        )

    def is_given(self, vectors: Float[Tensor, "b d"]) -> bool:
        """Whether this norm was given exactly these vectors, and takes its statistics over each of them."""
        if self.input.numel() != vectors.numel() or len(self.input) != len(vectors):
            return False
        same = torch.equal(self.input.reshape(vectors.shape).to(vectors.dtype), vectors)
        return same and (self.weight is None or self.weight.numel() == vectors.shape[1])

    def fold(self, maps: Float[Tensor, "b d ..."]) -> Float[Tensor, "b d ..."]:
        """The map whose mean is this norm's result: the statistics of its input, applied to every cell."""
        groups = self.input.reshape(len(maps), self.group_count, -1)
        mu = groups.mean(dim=2) if self.centred else groups.new_zeros(groups.shape[:2])
        inverse_sigma = ((groups - mu[:, :, None]) ** 2).mean(dim=2).add(self.eps).rsqrt()
        group_size = groups.shape[2]
        shape = (-1, maps.shape[1]) + (1,) * (maps.ndim - 2)
        folded = maps - mu.repeat_interleave(group_size, 1).reshape(shape)
        folded *= inverse_sigma.repeat_interleave(group_size, 1).reshape(shape)
        if self.weight is not None:
            folded *= self.weight.reshape(shape)
        if self.bias is not None:
            folded += self.bias.reshape(shape)
        return folded
