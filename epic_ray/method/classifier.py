"""A frozen classifier split at its last average pooling: image -> feature map Z, with logits = A·mean(Z) + b.

Letters: B images, D channels, gh x gw cells of the grid, K classes; Z feature map, v pooled features, A and b the
head's weight and bias. EPIC, arXiv 2505.12897, sec. 3; methods.md, chapter 1.

The split goes by what the network does, not by its names. A probe run records every call that averages a map over
all its cells. The last of them is then made to return random vectors in place of the pooled features: where the
logits answer to these by an affine map, and to nothing else, that map is the head. It is read off by
differentiation, so whatever lies between pooling and logits may take part (linear layers, 1x1 convolutions, batch
norms, averaged heads), as long as it is affine together. A norm with per-image statistics right after the pooling
is folded into the map. All of it is then checked against the model's own logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from epic_ray.errors import InputError
from epic_ray.method.preprocessing import Preprocessing
from epic_ray.method.taps import PoolCall, Tap, record_poolings

# Standard deviations of the noise in the probe images, in units of the normalised input.
_PROBE_SCALES = (0.3, 1.0, 2.5)
# Standard deviations of the vectors that stand in for pooled features: wide enough to find a clipping activation.
_VECTOR_SCALES = (0.3, 3.0, 30.0)
_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = ("float32", "tf32", *_HALVES)
# Rows of the head read off at once: bounds the memory of heads with very many classes.
_JACOBIAN_ROWS = 1024


@dataclass(frozen=True)
class Split:
    """Where and how a classifier was split; for reports."""

    layout: str
    """How the model lays out its last map: "NCHW", "NHWC", "tokens" (B, N, D) or "channel tokens" (B, D, N)."""
    pooling: str
    """The pooling call and the module it was made in."""
    head: str
    """The modules with parameters between pooling and logits, folded into one affine map."""
    folded: str
    """The norm whose per-image statistics are applied to the map, or ""."""
    largest_difference: float
    """Largest |A·mean(Z) + b − logits| on the probe images, over 1 + |logit|."""


class SplitClassifier(nn.Module):
    """A frozen classifier that gives its last feature map along with its logits; built by `split_classifier`.

    For every image, logits = weight · mean over cells of the map + bias, within the tolerance it was proved for.
    """

    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]
    mean: Float[Tensor, "3"]
    std: Float[Tensor, "3"]

    def __init__(
        self,
        model: nn.Module,
        head: "_Head",
        grid: tuple[int, int],
        preprocessing: Preprocessing,
        class_names: tuple[str, ...] | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.grid = grid
        self.class_count, self.channel_count = head.weight.shape
        self.class_names = class_names
        self.preprocessing = preprocessing
        pool, norm = head.tap.pool, head.tap.norm
        self.split = Split(pool.layout, pool.name, ", ".join(head.layers), norm.name if norm else "", float("inf"))
        self.origin = ""
        """Where model and weights came from, in words; set by `backbones`."""
        self.precision = "float32"
        """Arithmetic of `forward`: one of `PRECISIONS`. Its results are float32 whatever it is. tf32 allows a GPU to
        round; a CPU, which does not know it, computes in float32."""
        self._tap = head.tap
        self.register_buffer("weight", head.weight)
        self.register_buffer("bias", head.bias)
        self.register_buffer("mean", head.weight.new_tensor(preprocessing.mean))
        self.register_buffer("std", head.weight.new_tensor(preprocessing.std))
        self.eval()

    def train(self, mode: bool = True) -> "SplitClassifier":
        """Stays in evaluation mode, whatever is asked: the classifier is frozen."""
        return super().train(False)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b d gh gw"], Float[Tensor, "b k"]]:
        """Feature maps Z and the model's own logits, in one run of the model, of normalised images.

        Images must have the size of `preprocessing.crop`. Raises ValueError otherwise, and for an unknown precision.
        """
        if tuple(images.shape[2:]) != self.preprocessing.crop:
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels, not {self.preprocessing.crop}")
        with _arithmetic(self.precision, images.device.type):
            maps, logits = self._tap.run(self.model, images)
        maps, logits = maps.to(images.dtype), logits.to(images.dtype)
        return maps.reshape(*maps.shape[:2], *self.grid), logits

    def normalise(self, images_u8: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
        """The model's input of 8-bit RGB pixels: scaled to 0..1, less the mean, over the std.

        The channels stay last in memory, as they come: convolutions are faster so (a third on a CPU).
        """
        scaled = images_u8.permute(0, 3, 1, 2).to(self.mean.dtype).div_(255)
        return scaled.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])


@contextmanager
def _arithmetic(precision: str, device: str) -> Iterator[None]:
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}; one of {', '.join(PRECISIONS)}")
    if precision in _HALVES:
        with torch.autocast(device, _HALVES[precision]):
            yield
        return
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was


def split_classifier(
    model: nn.Module,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] | None = None,
    tolerance: float = 1e-4,
) -> SplitClassifier:
    """The classifier split into feature map and affine head, proved on probe images.

    Freezes `model` and sets it to evaluation mode. The proof: |A·mean(Z) + b − logits| ≤ tolerance·(1 + |logit|) on
    noise images of several scales, at the preprocessing's size.

    Raises InputError, with the reason and the largest difference, for a model that has no such split.
    """
    model.eval().requires_grad_(False)
    with torch.inference_mode(False), torch.no_grad():
        probe = _probe_images(model, preprocessing.crop)
        logits = _own_logits(model, probe, tolerance)
        if class_names is not None and len(class_names) != logits.shape[1]:
            raise InputError(f"{len(class_names)} class names for a head of {logits.shape[1]} classes; give one each")
        pool = _last_pooling(model, probe)
        if torch.equal(logits, logits[:1].expand_as(logits)):
            raise InputError("the model gives the same logits whatever the image; has its head been trained?")
        head = _find_head(model, probe, pool, tolerance)
        grid = _grid_of(pool, preprocessing.crop)
        classifier = SplitClassifier(model, head, grid, preprocessing, class_names)
        classifier.split = replace(classifier.split, largest_difference=_prove(classifier, probe, tolerance))
    return classifier


def _probe_images(model: nn.Module, crop: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
    """One image a scale: coarse blobs under fine noise, so that cells and images differ. Seeded."""
    parameter = next(model.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(20250512)
    count = len(_PROBE_SCALES)
    blobs = torch.randn(count, 3, 4, 4, generator=generator)
    images = torch.randn(count, 3, *crop, generator=generator)
    images += nn.functional.interpolate(blobs, size=crop, mode="bilinear")
    images *= torch.tensor(_PROBE_SCALES)[:, None, None, None]
    return images.to(parameter.device, parameter.dtype)


def _own_logits(model: nn.Module, probe: Float[Tensor, "b 3 h w"], tolerance: float) -> Float[Tensor, "b k"]:
    """The model's logits, refused unless they are a finite table, each row of it its image's own."""
    try:
        logits, alone = model(probe), model(probe[:1])
    except Exception as error:
        size = f"{probe.shape[2]} x {probe.shape[3]}"
        reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        raise InputError(f"the model fails on images of {size} pixels (is that its input size?): {reason}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(probe):
        form = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model's output is no table of logits (images, classes) but {form}; wrap it")
    if not logits.isfinite().all():
        raise InputError("the model's logits are not all finite on probe images; are its weights whole?")
    # Rounding alone may move a logit by more than its own size, where large terms cancel in it.
    largest = max(1.0, float(logits.abs().max()))
    change = _difference(model(probe), logits, largest)
    if change > tolerance:
        raise InputError(
            f"the model's logits differ by {change:.2g} between two runs on the same images: "
            "it is not deterministic (dropout or other noise that stays on in evaluation mode)"
        )
    change = _difference(alone, logits[:1], largest)
    if change > tolerance:
        raise InputError(
            f"the model's logits of an image change by {change:.2g} with the images beside it: "
            "batch statistics stay on in evaluation mode"
        )
    return logits


def _last_pooling(model: nn.Module, probe: Float[Tensor, "b 3 h w"]) -> PoolCall:
    calls = record_poolings(model, probe[:1])
    if not calls:
        raise InputError(
            "the model cannot be split: no average pooling over the whole map was seen (a class-token head, max or "
            "attention pooling, a flattened map such as VGG's, or a scripted model)"
        )
    pool = calls[-1]
    if pool.cell_count == 1:
        raise InputError(
            f"the model cannot be split: its last map has a single cell at this input size ({pool.name}); "
            "a larger crop may give it several"
        )
    return pool


def _find_head(model: nn.Module, probe: Float[Tensor, "b 3 h w"], pool: PoolCall, tolerance: float) -> "_Head":
    """The affine map from the tapped call's result to the logits.

    Tried at the pooling, then at a norm that is given the pooled features as they are.
    """
    generator = torch.Generator().manual_seed(20250513)
    vectors = torch.randn(len(probe), pool.channel_count, generator=generator)
    vectors = (vectors * torch.tensor(_VECTOR_SCALES)[:, None]).to(probe)
    answer = Tap(pool).substitute(model, probe, vectors)
    swapped = Tap(pool).substitute(model, probe.flip(0), vectors)
    bypass = _difference(swapped.logits, answer.logits, _spread(answer.logits))
    if bypass > tolerance:
        raise InputError(
            f"the model cannot be split: its logits do not hang on its last average pooling alone ({pool.name}); "
            f"largest difference {bypass:.2g} (a class token, max or attention pooling, or a path beside the pooling)"
        )
    head = _read_head(Tap(pool), model, probe)
    difference = head.difference(vectors, answer.logits)
    if difference > tolerance and answer.norm is not None:
        tap = Tap(pool, answer.norm)
        head = _read_head(tap, model, probe)
        difference = head.difference(vectors, tap.substitute(model, probe, vectors).logits)
    if difference > tolerance:
        raise InputError(
            f"the model cannot be split: what follows its last average pooling ({pool.name}) is not affine "
            f"({', '.join(head.layers) or 'no layer with parameters'}); largest difference {difference:.2g} "
            "(an MLP head, or an activation between pooling and classifier)"
        )
    if not head.layers and head.weight.shape[0] == head.weight.shape[1]:
        raise InputError(
            f"the model cannot be split: its last map already holds the class scores ({pool.name}); "
            "no linear layer follows"
        )
    return head


def _read_head(tap: Tap, model: nn.Module, probe: Float[Tensor, "b 3 h w"]) -> "_Head":
    """A and b, from value and derivative of the answer to the zero vector."""
    with torch.enable_grad():
        zero = probe.new_zeros(1, tap.pool.channel_count, requires_grad=True)
        answer = tap.substitute(model, probe[:1], zero)
        logits = answer.logits[0]
        if not logits.requires_grad:
            raise InputError(f"the model cannot be split: it cuts the gradient after its pooling ({tap.pool.name})")
        rows = [
            torch.autograd.grad(logits, zero, chunk, retain_graph=True, is_grads_batched=True)[0][:, 0]
            for chunk in torch.eye(len(logits), dtype=logits.dtype, device=logits.device).split(_JACOBIAN_ROWS)
        ]
    return _Head(tap, torch.cat(rows).detach().contiguous(), logits.detach().clone(), answer.layers)


@dataclass(frozen=True)
class _Head:
    tap: Tap
    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]
    layers: tuple[str, ...]

    def difference(self, vectors: Float[Tensor, "b d"], answers: Float[Tensor, "b k"]) -> float:
        return _difference(vectors @ self.weight.T + self.bias, answers, _spread(answers))


def _grid_of(pool: PoolCall, crop: tuple[int, int]) -> tuple[int, int]:
    if pool.grid is not None:
        return pool.grid
    rows = round((pool.cell_count * crop[0] / crop[1]) ** 0.5)
    columns = pool.cell_count // max(rows, 1)
    if rows * columns != pool.cell_count or abs(columns * crop[0] - rows * crop[1]) > max(crop):
        raise InputError(
            f"the model cannot be split: the {pool.cell_count} tokens that it averages ({pool.name}) form no grid "
            f"over {crop[0]} x {crop[1]} pixels (are class or register tokens among them?)"
        )
    return rows, columns


def _prove(classifier: SplitClassifier, probe: Float[Tensor, "b 3 h w"], tolerance: float) -> float:
    maps, logits = classifier(probe)
    difference = _difference(maps.mean(dim=(2, 3)) @ classifier.weight.T + classifier.bias, logits)
    if difference > tolerance:
        raise InputError(
            f"the model cannot be split: A·mean(Z) + b misses its logits by {difference:.2g} "
            f"(allowed {tolerance:.2g}, relative to 1 + |logit|; pooling {classifier.split.pooling})"
        )
    return difference


def _difference(ours: Tensor, theirs: Tensor, unit: float = 1.0) -> float:
    """Largest |ours − theirs| / (unit + |theirs|); infinite where either is not finite."""
    gap = ((ours - theirs).abs() / (unit + theirs.abs())).max()
    return float(gap) if gap.isfinite() else float("inf")


def _spread(logits: Float[Tensor, "b k"]) -> float:
    """The unit for differences where logits are tiny, so that a badly scaled head hides nothing; at most 1."""
    return min(1.0, max(float((logits - logits.mean(dim=0)).abs().max()), torch.finfo(logits.dtype).tiny))
