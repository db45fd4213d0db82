"""Names and weights to split classifiers: what loads, what is refused, and how it is told."""

import argparse
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from epic_ray.errors import InputError
from epic_ray.method import backbones
from epic_ray.method.backbones import imagenet_wnids, load_classifier, wnid_names
from epic_ray.method.classifier import split_classifier
from epic_ray.method.preprocessing import Preprocessing, decode_image

torch.set_num_threads(1)  # tiny models: threads only get in one another's way

SMALL = {"resize": 64, "crop": 64}
FACTORY = {"crop": 16, "mean": [0.5] * 3, "std": [0.25] * 3}


class Tiny(nn.Module):
    def __init__(self, width: int = 4, class_count: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, stride=4)
        self.fc = nn.Linear(width, class_count)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def make_tiny(**arguments) -> Tiny:
    return Tiny(**arguments)


def make_nothing() -> str:
    return "no model"


def _tiny(weights="random", **options):
    return load_classifier(f"{__name__}:make_tiny", source="factory", weights=weights, preprocessing=FACTORY, **options)


def _randomise_norms(model: nn.Module) -> nn.Module:
    """Affine parameters and statistics that are not the identity, so that nothing holds by accident."""
    generator = torch.Generator().manual_seed(11)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.is_floating_point():
                    low = 0.7 if name in ("weight", "running_var") else -0.2
                    tensor.data.uniform_(low, low + 0.6, generator=generator)
    return model


def _assert_exact(model: nn.Module, size: int, *, layout: str, folded: str, double: bool = True) -> None:
    split = split_classifier(_randomise_norms(model), Preprocessing(None, (size, size)))
    assert (split.split.layout, split.split.folded.split(" ")[0]) == (layout, folded)
    assert split.split.largest_difference < 1e-4
    if double:
        exact = split_classifier(model.double(), Preprocessing(None, (size, size)))
        maps, logits = exact(torch.randn(2, 3, size, size, dtype=torch.float64))
        rebuilt = maps.mean((2, 3)) @ exact.weight.T + exact.bias
        torch.testing.assert_close(rebuilt, logits, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- the libraries' architectures


def _small(family: str) -> nn.Module:
    """The libraries' own code at a small width, of the families whose members are all large."""
    from timm.models import mlp_mixer, swin_transformer, swin_transformer_v2
    from torchvision.models import convnext, densenet
    from torchvision.models import swin_transformer as swin

    layers = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "num_classes": 10}
    windows = {"patch_size": [4, 4], "window_size": [4, 4]}
    timm_windows = {"img_size": 64, "window_size": 4}
    second = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    blocks = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 1)]
    return {
        "torchvision densenet": lambda: densenet.DenseNet(8, (2, 2), 16, num_classes=10),
        "torchvision convnext": lambda: convnext.ConvNeXt(blocks, layer_scale=1.0, num_classes=10),
        "torchvision swin": lambda: swin.SwinTransformer(**windows, **layers),
        "torchvision swin v2": lambda: swin.SwinTransformer(**windows, **layers, **second),
        "timm swin": lambda: swin_transformer.SwinTransformer(**timm_windows, **layers),
        "timm swin v2": lambda: swin_transformer_v2.SwinTransformerV2(**timm_windows, **layers),
        "timm mixer": lambda: mlp_mixer.MlpMixer(10, img_size=64, embed_dim=16, num_blocks=2),
    }[family]()


QUICK = {
    "torchvision densenet": (64, "NCHW", ""),
    "torchvision convnext": (64, "NCHW", "layer_norm"),
    "torchvision swin": (64, "NCHW", ""),
    "torchvision swin v2": (64, "NCHW", ""),
    "timm swin": (64, "NHWC", ""),
    "timm swin v2": (64, "NHWC", ""),
    "timm mixer": (64, "tokens", ""),
    "resnet18": (64, "NCHW", ""),
    "shufflenet_v2_x0_5": (64, "NCHW", ""),
    "test_resnet": (160, "NCHW", ""),
    "test_efficientnet": (160, "NCHW", ""),
    "test_convnext": (160, "NCHW", "layer_norm"),
    "test_vit2": (160, "tokens", "layer_norm"),
    "test_vit4": (160, "tokens", "rms_norm"),
    "test_coatnet": (160, "NCHW", ""),
}


@pytest.mark.parametrize("name", QUICK)
def test_a_member_of_each_family_is_split_exactly(name):
    import timm
    from torchvision import models

    torch.manual_seed(0)
    if " " in name:
        model = _small(name)
    elif name.startswith("test_"):
        model = timm.create_model(name, num_classes=10)
    else:
        model = models.get_model(name, weights=None, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == 10:
            nn.init.normal_(module.weight)  # some heads start at zero
    size, layout, folded = QUICK[name]
    _assert_exact(model, size, layout=layout, folded=folded)


PAPER = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "densenet121": "densenet121",
    "convnext_tiny": "convnext_tiny",
    "convnext_small": "convnext_small",
    "convnext_base": "convnext_base",
    "convnext_large": "convnext_large",
    "swin_v2_s": "swinv2_small_window8_256",
}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["torchvision", "timm"])
@pytest.mark.parametrize("name", PAPER)
def test_each_backbone_of_the_paper_loads_and_is_split_exactly(name, source):
    known = name if source == "torchvision" else PAPER[name]
    small = {} if known.startswith("swinv2") else SMALL
    split = load_classifier(known, source=source, weights="random", preprocessing=small)
    assert (split.class_count, len(split.class_names or ())) == (1000, 1000)
    layout = "NHWC" if known.startswith("swinv2") else "NCHW"
    folded = "layer_norm" if name.startswith("convnext") else ""
    double = name not in ("convnext_base", "convnext_large")
    _assert_exact(split.model, split.preprocessing.crop[0], layout=split.split.layout, folded=folded, double=double)
    assert split.split.layout in ("NCHW", layout)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test_vit", "no average pooling"),
        ("test_mambaout", "not affine"),
        ("squeezenet1_1", "class scores"),
        ("mobilenet_v3_small", "not affine .classifier.0, classifier.3"),
    ],
)
def test_an_architecture_without_such_a_head_is_refused(name, reason):
    options = {} if name.startswith("test_") else {"preprocessing": SMALL}
    with pytest.raises(InputError, match=reason):
        load_classifier(name, weights="random", **options)


def test_preprocessing_is_the_librarys_own():
    split = load_classifier("resnet18", source="torchvision", weights="random")
    assert split.preprocessing == Preprocessing(256, (224, 224), "bilinear")
    timm = load_classifier("test_vit2", weights="random").preprocessing
    assert (timm.resize, timm.crop, timm.interpolation, timm.mean) == (168, (160, 160), "bicubic", (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", ["resnet50.a1_in1k", "test_resnet", "vit_base_patch16_siglip_gap_224", "fastvit_t8"])
@pytest.mark.parametrize("change", [{}, {"crop_mode": "squash"}, {"crop_mode": "border"}, {"input_size": (3, 96, 128)}])
def test_pixels_equal_those_of_timms_own_transform(name, change):
    import timm
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict()) | change
    transform = create_transform(**config, is_training=False, normalize=False)
    ours = backbones._timm_preprocessing(config)
    for size in [(301, 217), (97, 160), (224, 224)]:
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        np.testing.assert_array_equal(ours.apply(image), transform(image).permute(1, 2, 0).numpy())


def test_given_preprocessing_goes_on_top_of_the_librarys():
    split = load_classifier("resnet18", source="torchvision", weights="random", preprocessing={"crop": [64, 96]})
    assert split.preprocessing == Preprocessing(256, (64, 96), "bilinear")
    assert split.grid == (2, 3)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"cropp": 64}, "has no cropp; it has resize, crop"),
        ({"crop": 288}, "resize 256 is below the crop"),
        ({"interpolation": "cubic"}, "interpolation 'cubic'"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(given, reason):
    with pytest.raises(InputError, match=reason):
        load_classifier("resnet18", source="torchvision", weights="random", preprocessing=given)


def test_random_weights_follow_the_seed_and_leave_the_callers_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (_tiny(seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert first.origin == f"factory {__name__}:make_tiny, random weights of seed 4"


def test_an_unknown_architecture_is_answered_with_near_names_of_both_libraries():
    with pytest.raises(InputError, match=r"know no architecture 'resnet81'; near it: .*resnet18 \(timm\)") as caught:
        load_classifier("resnet81", weights="random")
    assert "resnet18 (torchvision)" in str(caught.value)
    with pytest.raises(InputError, match="timm know no architecture 'mobilenet_v2'"):
        load_classifier("mobilenet_v2", source="timm")
    with pytest.raises(InputError, match="source 'tim' is none of auto, timm"):
        load_classifier("resnet18", source="tim")


def test_arguments_reach_the_constructor_and_wrong_ones_are_told():
    assert _tiny(arguments={"width": 6}).channel_count == 6
    with pytest.raises(InputError, match=r"does not take these arguments .*wdth"):
        _tiny(arguments={"wdth": 6})
    with pytest.raises(InputError, match=r"does not take these arguments .*wdth"):
        load_classifier("resnet18", weights="random", arguments={"wdth": 6})


# ---------------------------------------------------------------- factories


def test_a_factory_needs_preprocessing():
    with pytest.raises(InputError, match="preprocessing is not known: give"):
        load_classifier(f"{__name__}:make_tiny", source="factory")


def test_a_factory_is_found_by_colon_or_dots():
    for name in (f"{__name__}:make_tiny", f"{__name__}.make_tiny"):
        split = load_classifier(name, source="factory", preprocessing=FACTORY)
        assert (split.grid, split.class_count, split.class_names) == ((4, 4), 3, None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere.at:all", "no function 'nowhere.at:all'"),
        (f"{__name__}:make_all", "no function"),
        ("make_tiny", "no function 'make_tiny'"),
        (f"{__name__}:make_nothing", "returned a str, not a torch.nn.Module"),
    ],
)
def test_a_factory_that_makes_no_model_is_refused(name, reason):
    with pytest.raises(InputError, match=reason):
        load_classifier(name, source="factory", preprocessing=FACTORY)


# ---------------------------------------------------------------- weights files


@pytest.fixture
def tiny_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(77)
    return Tiny().state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("half", [False, True])
def test_a_plain_state_dict_loads(tmp_path, tiny_state, suffix, half):
    state = {k: v.half() if half else v for k, v in tiny_state.items()}
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, file)
    split = _tiny(file)
    assert split.weight.dtype == torch.float32
    assert torch.equal(split.weight, state["fc.weight"].float())
    assert str(file) in split.origin


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_a_training_checkpoint_loads(tmp_path, tiny_state, wrapper, prefix):
    inner = {prefix + k: v for k, v in tiny_state.items()}
    content = {wrapper: inner, "epoch": 3, "optimizer": {"lr": 0.1}, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "last.pth")
    assert torch.equal(_tiny(tmp_path / "last.pth").weight, tiny_state["fc.weight"])


def test_averaged_weights_are_preferred(tmp_path, tiny_state):
    averaged = {k: v + 1 for k, v in tiny_state.items()}
    torch.save({"state_dict": tiny_state, "state_dict_ema": averaged}, tmp_path / "last.pth")
    assert torch.equal(_tiny(tmp_path / "last.pth").weight, averaged["fc.weight"])


class Trap:
    """Writes a file when unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, tiny_state, save):
    target = tmp_path / "ran"
    content = {"state_dict": tiny_state, "trap": Trap(target)}
    if save == "torch":
        torch.save(content, tmp_path / "evil.pth")
    else:
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match=r"refused, and nothing of it was run|no readable checkpoint"):
        _tiny(tmp_path / "evil.pth")
    assert not target.exists()
    torch.save(Tiny(), tmp_path / "whole.pth")
    with pytest.raises(InputError, match=r"refused, and nothing of it was run.*Tiny"):
        _tiny(tmp_path / "whole.pth")


@pytest.mark.parametrize("name", ["junk.pth", "junk.safetensors", "empty.pth"])
def test_a_file_that_is_no_checkpoint_is_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"" if "empty" in name else b"not weights at all")
    with pytest.raises(InputError, match="no readable"):
        _tiny(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.pth", None, "no weights file .*missing.pth; model.weights is 'pretrained', 'random'"),
        ("weights.h5", {}, "is none of .safetensors"),
        ("list.pth", [1, 2], "no table of tensors .* a list"),
        ("other.pth", {"epoch": 1, "best": 2}, "no table of tensors .* keys epoch, best"),
    ],
)
def test_a_file_without_weights_is_told(tmp_path, name, content, reason):
    if content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(InputError, match=reason):
        _tiny(tmp_path / name)


def test_weights_that_do_not_fit_are_listed_and_nothing_of_them_is_loaded(tmp_path, tiny_state):
    state = {"stem." + k if k.startswith("conv") else k: v for k, v in tiny_state.items()}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"2 keys missing \(conv.bias, conv.weight\); 2 unexpected \(stem.conv.bias"):
        _tiny(tmp_path / "other.pth")
    model = Tiny()
    before = model.fc.weight.clone()
    assert backbones.fit_weights(model, state)
    assert torch.equal(model.fc.weight, before)


def test_a_head_of_another_size_is_named(tmp_path):
    torch.save(Tiny(class_count=7).state_dict(), tmp_path / "seven.pth")
    with pytest.raises(InputError, match=r"the file has a head of 7 classes; pass model.class_count=7"):
        _tiny(tmp_path / "seven.pth")


def test_the_class_count_and_the_names_are_checked(tmp_path):
    assert _tiny(class_count=3, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")
    with pytest.raises(InputError, match="2 class names for a head of 3"):
        _tiny(class_names=["a", "b"])
    with pytest.raises(InputError, match="gives 3 classes, not the 4"):
        _tiny(class_count=4)


def test_a_local_file_decides_between_the_libraries(tmp_path):
    """Both know densenet121, under other names inside; and resnet18, under the same: then timm."""
    from torchvision import models

    torch.save(models.densenet121(num_classes=4).state_dict(), tmp_path / "dense.pth")
    torch.save(models.mobilenet_v3_small(num_classes=4).state_dict(), tmp_path / "mobile.pth")
    torch.save(models.resnet18(num_classes=4).state_dict(), tmp_path / "res.pth")
    res = load_classifier("resnet18", weights=tmp_path / "res.pth", class_count=4, preprocessing=SMALL)
    assert res.origin.startswith("timm resnet18")
    with pytest.raises(InputError, match=r"does not fit timm resnet18: .* -- nor torchvision resnet18: "):
        load_classifier("resnet18", weights=tmp_path / "dense.pth", class_count=4, preprocessing=SMALL)


def test_a_file_that_fits_torchvision_alone_is_taken_as_torchvisions(tmp_path):
    from torchvision import models

    torch.save(models.convnext_tiny(num_classes=4).state_dict(), tmp_path / "next.pth")
    split = load_classifier("convnext_tiny", weights=tmp_path / "next.pth", class_count=4, preprocessing=SMALL)
    assert split.origin.startswith("torchvision convnext_tiny")
    assert split.class_names is None


def test_torchvisions_old_densenet_names_load(tmp_path):
    from torchvision import models

    torch.manual_seed(0)
    model = models.densenet121(num_classes=4)
    old = {}
    for key, tensor in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):  # older still than these
            parts = key.split(".")
            old[".".join(p[:-1] + "." + p[-1] if p in ("norm1", "norm2", "conv1", "conv2") else p for p in parts)] = (
                tensor
            )
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "old.pth")
    split = load_classifier(
        "densenet121", source="torchvision", weights=tmp_path / "old.pth", class_count=4, preprocessing=SMALL
    )
    assert torch.equal(split.weight, model.classifier.weight)


# ---------------------------------------------------------------- pretrained weights and names


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_without_a_network_the_way_out_is_told(monkeypatch, source):
    def fail(*_args, **_options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("timm.create_model", fail)
    monkeypatch.setattr("torchvision.models.get_model", fail)
    with pytest.raises(InputError, match=r"could not be fetched \(OSError: Name.* set model.weights to a local"):
        load_classifier("resnet18", source=source)


def test_pretrained_weights_do_not_get_an_untrained_head():
    for source in ("timm", "torchvision"):
        with pytest.raises(InputError, match="head of 1000 classes; class_count=7 would leave it untrained"):
            load_classifier("resnet18", source=source, class_count=7)


def test_class_names_come_with_the_default_head():
    assert load_classifier("test_resnet", weights="random").class_names[:2] == ("tench", "goldfish")
    split = load_classifier("resnet18", source="torchvision", weights="random", preprocessing=SMALL)
    assert split.class_names[:2] == ("tench", "goldfish")


def test_imagenet_ids_come_in_head_order():
    wnids, names = imagenet_wnids(), wnid_names()
    assert len(wnids) == len(set(wnids)) == len(names) == 1000
    assert (wnids[0], wnids[999], list(wnids)) == ("n01440764", "n15075141", sorted(wnids))
    assert names["n02102040"] == "English springer"


# ---------------------------------------------------------------- real weights


def _shared(part: str) -> Path:
    path = Path(__file__).resolve().parents[2].parent / "shared" / part
    if not path.exists():
        pytest.skip(f"no shared/{part} beside the repository")
    return path


def _top1(split, images: list[Image.Image], labels: list[int]) -> float:
    batch = torch.from_numpy(np.stack([split.preprocessing.apply(image) for image in images]))
    with torch.inference_mode():
        maps, logits = split(split.normalise(batch))
        rebuilt = maps.mean((2, 3)) @ split.weight.T + split.bias
    torch.testing.assert_close(rebuilt, logits, rtol=1e-4, atol=1e-4)
    return float((logits.argmax(1) == torch.tensor(labels)).float().mean())


def _photos(per_class: int) -> tuple[list[Image.Image], list[str]]:
    files = [f for folder in sorted(_shared("data/photos/val").iterdir()) for f in sorted(folder.iterdir())[:per_class]]
    return [decode_image(f.read_bytes()) for f in files], [f.parent.name for f in files]


def test_mobilenet_v2_classifies_photos():
    images, wnids = _photos(4)
    split = load_classifier(
        "mobilenet_v2", weights=_shared("weights/mobilenet_v2.safetensors"), preprocessing={"resize": 256}
    )
    assert _top1(split, images, [imagenet_wnids().index(w) for w in wnids]) > 0.5


def test_resnet18_of_ten_classes_classifies_photos():
    images, wnids = _photos(4)
    weights = _shared("weights/resnet18_imagenette10.safetensors")
    classes = json.loads(weights.with_suffix(".json").read_text())["classes"]
    options = {"weights": weights, "class_count": 10, "class_names": classes, "preprocessing": {"resize": 224}}
    split = load_classifier("resnet18", source="torchvision", **options)
    assert split.class_names == tuple(classes)
    assert _top1(split, images, [classes.index(w) for w in wnids]) > 0.85


def test_a_factorys_cifar_net_classifies_cifar(monkeypatch):
    weights = _shared("weights/cifar_resnet56.safetensors")
    monkeypatch.syspath_prepend(str(weights.parent))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    split = load_classifier(
        "cifar_resnet:cifar_resnet",
        source="factory",
        arguments={"depth": 56},
        weights=weights,
        preprocessing={"crop": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    )
    assert (split.grid, split.channel_count) == ((8, 8), 64)
    images, labels = [], []
    shard = sorted(_shared("data/cifar10").glob("val-*.tar"))[0]
    with tarfile.open(shard) as tar:
        for member in tar.getmembers()[:200]:
            content = tar.extractfile(member).read()
            if member.name.endswith(".cls"):
                labels.append(int(content))
            else:
                images.append(decode_image(content))
    assert _top1(split, images, labels) > 0.7
