"""EPIC on real photos with real weights, against torchvision's own loop; needs the shared data."""

from pathlib import Path

import pyarrow.dataset as ds
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import models
from torchvision.transforms import v2

from epic_ray import pipeline
from epic_ray.config import build_config
from epic_ray.logs import Reporter
from epic_ray.run_dir import RunDir

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
PER_CLASS = {"train": 30, "val": 10}


@pytest.fixture(scope="module")
def few_photos(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to the first photos of each class."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in PER_CLASS.items():
        for folder in sorted((shared / "data/photos" / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for photo in sorted(folder.iterdir())[:count]:
                (root / split / folder.name / photo.name).symlink_to(photo)
    return root


@pytest.mark.parametrize("architecture", ["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.faults)])
def test_predictions_equal_a_plain_torchvision_loop_image_by_image(architecture, shared, few_photos, tmp_path):
    if architecture == "resnet18":
        weights, classes, resize = shared / "weights/resnet18_imagenette10.safetensors", 10, 224
    else:
        weights, classes, resize = shared / "weights/mobilenet_v2.safetensors", 1000, 256
    config = build_config(
        {
            "name": architecture,
            "model": {
                "architecture": architecture,
                "source": "torchvision",
                "weights": str(weights),
                "class_count": classes,
                "preprocessing": {"resize": resize, "crop": 224, "interpolation": "bilinear"},
            },
            "data": {"root": str(few_photos)},
            "features": {"unit_size": 64},
            "fit": {"prototypes_per_channel": {"start": 30, "end": 10, "rounds": 3}},
            "resources": {"device": "cpu", "gpus_per_actor": 0},
            "output": {"root": str(tmp_path)},
        },
        "test",
    )
    record = pipeline.train(config, Reporter())
    model = models.get_model(architecture, num_classes=classes)
    model.load_state_dict({name: value.float() for name, value in load_file(weights).items()}, strict=False)
    model.eval()
    transform = v2.Compose(
        [
            v2.Resize(resize),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    run_dir = RunDir(f"{tmp_path}/{architecture}")
    rows = ds.dataset(run_dir.path("tables/images/val")).to_table().to_pylist()
    assert len(rows) == 10 * PER_CLASS["val"]
    for row in rows:
        with torch.inference_mode():
            own = model(transform(Image.open(few_photos / row["image_id"]).convert("RGB"))[None])[0]
        assert row["predicted"] == int(own.argmax())
        assert row["logit"] == pytest.approx(float(own.max()), abs=1e-3)
    right = [row["predicted"] == row["label"] for row in rows]
    assert record["top1"]["val"] == record["backbone_top1"]["val"] == pytest.approx(sum(right) / len(right))
    assert record["top1"]["val"] > (0.85 if classes == 10 else 0.55)
    assert record["logits"]["max_abs_difference"] <= 1e-4
    assert record["logits"]["top1_agreement"] == 1.0
    assert record["basis"]["orthogonality_error"] <= 1e-5
    assert record["counts"]["decoded"] == record["counts"]["forwarded"] == record["counts"]["images"] == 400
    # held out, 300 photos are too few for 1,280 channels: docs/epic.md has the figures of the whole set
    assert record["purity"]["after"]["train"]["at_5"] > 1.1 * record["purity"]["before"]["train"]["at_5"]
