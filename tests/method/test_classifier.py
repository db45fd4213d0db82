"""The split of any classifier into feature map and affine head, and the refusal of those that have none."""

import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from epic_ray.errors import InputError
from epic_ray.method.classifier import SplitClassifier, split_classifier
from epic_ray.method.preprocessing import Preprocessing

torch.set_num_threads(1)  # tiny models: threads only get in one another's way

PREPROCESSING = Preprocessing(None, (32, 48))


def _images(count: int = 3, dtype: torch.dtype = torch.float32, seed: int = 7) -> torch.Tensor:
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Net(nn.Module):
    """A strided convolution to a 4 x 6 map of 8 channels, and whatever `tail` makes of it."""

    def __init__(self, tail, **layers):
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8), nn.Tanh())
        self.fc = nn.Linear(8, 5)
        for name, layer in layers.items():
            setattr(self, name, copy.deepcopy(layer))
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.RMSNorm):
                if module.weight is not None:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                if getattr(module, "bias", None) is not None:
                    nn.init.normal_(module.bias)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        self.tail = tail

    def forward(self, x):
        return self.tail(self, self.stem(x))


def _tokens(x):
    return x.flatten(2).transpose(1, 2)


def _nhwc(x):
    return x.permute(0, 2, 3, 1)


def _relu_in_place_before(net, x):
    functional.relu(x, inplace=True)
    return net.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def _map_spoilt_in_place_after(net, x):
    logits = net.fc(x.mean((2, 3)))
    x.zero_()
    return logits


def _pooled_changed_in_place(net, x):
    pooled = x.mean((2, 3))
    pooled.mul_(2).add_(1)
    return net.fc(pooled)


SPLITTABLE = {
    "module": (lambda n, x: n.fc(n.pool(x).flatten(1)), {"pool": nn.AdaptiveAvgPool2d(1)}, "NCHW"),
    "function": (lambda n, x: n.fc(functional.adaptive_avg_pool2d(x, (1, 1)).flatten(1)), {}, "NCHW"),
    "mean": (lambda n, x: n.fc(x.mean([2, 3])), {}, "NCHW"),
    "mean, negative": (lambda n, x: n.fc(torch.mean(x, dim=(-1, -2))), {}, "NCHW"),
    "mean, axis": (lambda n, x: n.fc(x.mean(axis=(2, 3))), {}, "NCHW"),
    "mean twice": (lambda n, x: n.fc(x.mean(3).mean(2)), {}, "NCHW"),
    "mean twice, kept": (lambda n, x: n.fc(x.mean(2, True).mean(3, True).flatten(1)), {}, "NCHW"),
    "window": (lambda n, x: n.fc(functional.avg_pool2d(x, x.shape[2:]).flatten(1)), {}, "NCHW"),
    "NHWC": (lambda n, x: n.fc(_nhwc(x).mean((1, 2))), {}, "NHWC"),
    "tokens": (lambda n, x: n.fc(_tokens(x).mean(1)), {}, "tokens"),
    "tokens, class token left out": (
        lambda n, x: n.fc(torch.cat([x.amax((2, 3))[:, None], _tokens(x)], 1)[:, 1:].mean(dim=1)),
        {},
        "tokens",
    ),
    "channel tokens": (lambda n, x: n.fc(x.flatten(2).mean(-1)), {}, "channel tokens"),
    "channel tokens, module": (
        lambda n, x: n.fc(n.pool(x.flatten(2)).flatten(1)),
        {"pool": nn.AdaptiveAvgPool1d(1)},
        "channel tokens",
    ),
    "1x1 convolution": (
        lambda n, x: n.conv(x.mean((2, 3), keepdim=True)).flatten(1),
        {"conv": nn.Conv2d(8, 5, 1)},
        "NCHW",
    ),
    "dropout": (lambda n, x: n.fc(n.drop(x.mean((2, 3)))), {"drop": nn.Dropout(0.5)}, "NCHW"),
    "layer norm": (lambda n, x: n.fc(n.norm(x.mean((2, 3)))), {"norm": nn.LayerNorm(8, eps=0.1)}, "NCHW"),
    "layer norm, plain": (
        lambda n, x: n.fc(n.norm(x.mean((2, 3)))),
        {"norm": nn.LayerNorm(8, elementwise_affine=False)},
        "NCHW",
    ),
    "group norm": (lambda n, x: n.fc(n.norm(x.mean((2, 3)))), {"norm": nn.GroupNorm(2, 8)}, "NCHW"),
    "rms norm, NHWC": (lambda n, x: n.fc(n.norm(_nhwc(x).mean((1, 2)))), {"norm": nn.RMSNorm(8)}, "NHWC"),
    "layer norm, tokens": (lambda n, x: n.fc(n.norm(_tokens(x).mean(1))), {"norm": nn.LayerNorm(8)}, "tokens"),
    "norm before": (
        lambda n, x: n.fc(n.norm(_nhwc(x)).mean((1, 2))),
        {"norm": nn.LayerNorm(8)},
        "NHWC",
    ),
    "batch norm": (lambda n, x: n.fc(n.norm(x.mean((2, 3)))), {"norm": nn.BatchNorm1d(8)}, "NCHW"),
    "two heads averaged": (
        lambda n, x: (lambda v: (n.fc(v) + n.other(v)) / 2)(x.mean((2, 3))),
        {"other": nn.Linear(8, 5)},
        "NCHW",
    ),
    "no bias": (lambda n, x: n.plain(x.mean((2, 3))), {"plain": nn.Linear(8, 5, bias=False)}, "NCHW"),
    "temperature": (lambda n, x: n.fc(x.mean((2, 3))) / 0.07, {}, "NCHW"),
    "in place before": (_relu_in_place_before, {}, "NCHW"),
    "in place after": (_map_spoilt_in_place_after, {}, "NCHW"),
    "in place between": (_pooled_changed_in_place, {}, "NCHW"),
}


@pytest.mark.parametrize("case", SPLITTABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_logits_are_the_head_of_the_mean_of_the_map(case, dtype):
    tail, layers, layout = SPLITTABLE[case]
    model = Net(tail, **layers).eval().to(dtype)
    own = model(_images(dtype=dtype)).detach()
    split = split_classifier(model, PREPROCESSING)
    maps, logits = split(_images(dtype=dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert (split.split.layout, split.grid, tuple(maps.shape)) == (layout, (4, 6), (3, 8, 4, 6))
    assert (split.channel_count, split.class_count, split.weight.dtype) == (8, 5, dtype)
    assert split.split.largest_difference <= tolerance
    torch.testing.assert_close(logits, own, rtol=tolerance, atol=tolerance)
    rebuilt = maps.mean((2, 3)) @ split.weight.T + split.bias
    torch.testing.assert_close(rebuilt, own, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ["mean", "NHWC", "tokens", "channel tokens", "mean twice", "window", "norm before"])
def test_each_cell_of_the_map_is_the_models_own_cell(case):
    tail, layers, _ = SPLITTABLE[case]
    model = Net(tail, **layers)
    expected = model.eval().stem(_images()).detach()
    if case == "norm before":
        expected = model.norm(_nhwc(expected)).permute(0, 3, 1, 2)
    torch.testing.assert_close(split_classifier(model, PREPROCESSING)(_images())[0], expected)


class Noisy(nn.Module):
    def forward(self, x):
        return functional.dropout(x, 0.3, training=True)


class BatchStatistics(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)) / (x.std(0) + 1e-5) if len(x) > 1 else x


class SelfPooling(nn.Module):
    """Attention pooling: a weighted mean over cells."""

    def forward(self, x):
        tokens = _tokens(x)
        return (tokens.softmax(1) * tokens).sum(1)


def _scores(n, x):
    return n.scores(x).mean((2, 3))


REFUSED = {
    "MLP": (lambda n, x: n.fc(n.hidden(x.mean((2, 3))).tanh()), {"hidden": nn.Linear(8, 8)}, "not affine .hidden, fc"),
    "ReLU between": (lambda n, x: n.fc(x.mean((2, 3)).relu()), {}, "not affine"),
    "ReLU6 after a shift": (lambda n, x: n.fc(functional.hardtanh(x.mean((2, 3)), -20, 20)), {}, "not affine"),
    "norm, then MLP": (
        lambda n, x: n.fc(n.hidden(n.norm(x.mean((2, 3)))).relu()),
        {"hidden": nn.Linear(8, 8), "norm": nn.LayerNorm(8)},
        "not affine",
    ),
    "softmax after": (lambda n, x: n.fc(x.mean((2, 3))).softmax(1), {}, "not affine"),
    "tiny MLP": (lambda n, x: 1e-6 * n.fc(x.mean((2, 3)).relu()), {}, "not affine"),
    "max pooling": (lambda n, x: n.fc(x.amax((2, 3))), {}, "no average pooling"),
    "mean and max": (lambda n, x: n.fc(x.mean((2, 3)) + x.amax((2, 3))), {}, "alone"),
    "class token": (lambda n, x: n.fc(_tokens(x)[:, 0]), {}, "no average pooling"),
    "gated, then class token": (lambda n, x: n.fc((x * x.mean((2, 3), True))[:, :, 0, 0]), {}, "alone"),
    "tiny bypass": (lambda n, x: 1e-6 * n.fc(x.mean((2, 3)) + 0.1 * x[:, :, 0, 0]), {}, "alone"),
    "attention pooling": (lambda n, x: n.fc(n.pool(x)), {"pool": SelfPooling()}, "no average pooling"),
    "scores as map": (_scores, {"scores": nn.Conv2d(8, 5, 1)}, "already holds the class scores"),
    "flattened map": (lambda n, x: n.wide(x.flatten(1)), {"wide": nn.Linear(192, 5)}, "no average pooling"),
    "pooled to 2 x 2": (
        lambda n, x: n.wide(functional.adaptive_avg_pool2d(x, 2).flatten(1)),
        {"wide": nn.Linear(32, 5)},
        "no average pooling",
    ),
    "window short of the map": (lambda n, x: n.fc(functional.avg_pool2d(x, 4).flatten(1)), {}, "no average pooling"),
    "one cell": (lambda n, x: n.fc(functional.adaptive_max_pool2d(x, 1).mean((2, 3))), {}, "single cell"),
    "class token in the mean": (
        lambda n, x: n.fc(torch.cat([x.amax((2, 3))[:, None], _tokens(x)], 1).mean(1)),
        {},
        "25 tokens .* form no grid",
    ),
    "noise": (lambda n, x: n.fc(n.noise(x.mean((2, 3)))), {"noise": Noisy()}, "not deterministic"),
    "batch statistics": (
        lambda n, x: n.fc(n.norm(x.mean((2, 3)))),
        {"norm": BatchStatistics()},
        "with the images beside it",
    ),
    "head of zeros": (lambda n, x: n.fc(x.mean((2, 3))) * 0, {}, "same logits whatever the image"),
    "nan": (lambda n, x: n.fc(x.mean((2, 3))) / 0, {}, "not all finite"),
    "a map": (lambda n, x: x, {}, "no table of logits"),
    "a tuple": (lambda n, x: (x, x), {}, "no table of logits .* tuple"),
    "other size": (lambda n, x: n.wide(x.flatten(1)), {"wide": nn.Linear(7, 5)}, r"fails on images of 32 x 48"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_without_such_a_head_is_refused_with_the_reason(case):
    tail, layers, reason = REFUSED[case]
    with pytest.raises(InputError, match=reason):
        split_classifier(Net(tail, **layers), PREPROCESSING)


def test_a_refusal_names_the_largest_difference():
    tail, layers, _ = REFUSED["MLP"]
    with pytest.raises(InputError, match=r"largest difference \d"):
        split_classifier(Net(tail, **layers), PREPROCESSING)


def _plain_split(**options) -> SplitClassifier:
    return split_classifier(Net(SPLITTABLE["layer norm"][0], norm=nn.LayerNorm(8)), PREPROCESSING, **options)


def test_the_report_says_where_the_model_was_split():
    split = _plain_split().split
    assert (split.layout, split.head) == ("NCHW", "fc")
    assert split.pooling == "mean in the model itself"
    assert split.folded == "layer_norm in norm"
    assert 0 <= split.largest_difference < 1e-5


def test_the_split_leaves_no_trace_in_the_model():
    model = Net(SPLITTABLE["layer norm"][0], norm=nn.LayerNorm(8)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    split = split_classifier(model, PREPROCESSING)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not split.train().training
    assert not model.training


def test_calls_in_inference_mode_and_in_threads_agree_with_a_plain_call():
    model = Net(SPLITTABLE["layer norm"][0], norm=nn.LayerNorm(8))
    with torch.inference_mode():
        split = split_classifier(model, PREPROCESSING)
    batches = [_images(2, seed=seed) for seed in range(8)]
    expected = [split(batch) for batch in batches]
    with torch.inference_mode():
        for batch, (maps, logits) in zip(batches, expected, strict=True):
            again = split(batch)
            assert torch.equal(again[0], maps)
            assert torch.equal(again[1], logits)
    found: dict[int, tuple] = {}

    def work(k: int) -> None:
        found[k] = split(batches[k])

    threads = [threading.Thread(target=partial(work, k)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k][0], expected[k][0]) for k in range(8))


def test_images_of_another_size_are_not_taken():
    with pytest.raises(ValueError, match="not \\(32, 48\\)"):
        _plain_split()(torch.zeros(1, 3, 48, 32))


def test_class_names_must_be_as_many_as_the_classes():
    assert _plain_split(class_names=tuple("abcde")).class_names == tuple("abcde")
    with pytest.raises(InputError, match="2 class names for a head of 5"):
        _plain_split(class_names=("a", "b"))


def test_normalised_images_equal_torchvisions():
    from torchvision.transforms import functional as reference

    preprocessing = Preprocessing(None, (32, 48), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    split = split_classifier(Net(SPLITTABLE["mean"][0]), preprocessing)
    images = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    expected = [
        reference.normalize(reference.to_tensor(i.numpy()), preprocessing.mean, preprocessing.std) for i in images
    ]
    assert torch.equal(split.normalise(images), torch.stack(expected))
    assert split.double().normalise(images).dtype == torch.float64


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_gives_float32_results_near_those_of_full_precision(precision):
    split = split_classifier(Net(lambda net, x: net.fc(x.mean((2, 3)))), PREPROCESSING)
    full = split(_images())
    split.precision = precision
    for half, exact in zip(split(_images()), full, strict=True):
        assert half.dtype == torch.float32
        difference = float((half - exact).abs().max())
        assert 0 < difference < 0.05, "it was another arithmetic, and its rounding alone"


def test_a_cpu_computes_tf32_in_float32_and_an_unknown_precision_is_refused():
    split = split_classifier(Net(lambda net, x: net.fc(x.mean((2, 3)))), PREPROCESSING)
    full = split(_images())
    split.precision = "tf32"
    assert all(torch.equal(one, other) for one, other in zip(split(_images()), full, strict=True))
    split.precision = "float8"
    with pytest.raises(ValueError, match="float8"):
        split(_images())
