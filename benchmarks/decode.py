"""Decoding JPEGs on one core: rates of several ways, and what each does to the features.

    python benchmarks/decode.py [--images 60] [--repeats 5]

Each way gives the classifier's input (resize 256, crop 224) from the bytes of synthetic JPEGs of 500 x 375 and of
2000 x 1500: as epic-ray does by default (Pillow), with `scaled_decode` (Pillow, reduced in the DCT domain), and with
other decoders followed by the same resize, where they are installed (simplejpeg, torchvision). Milliseconds are CPU
time, median of the repeats. The effect is the largest and the mean difference of the pixels from the default's, and the
mean relative difference of ResNet-18's pooled features (random weights) under them.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import bench
import numpy as np
from made_images import synthetic_jpeg
from PIL import Image

from epic_ray.method.preprocessing import Preprocessing

EXACT = Preprocessing(256, (224, 224))
SCALED = Preprocessing(256, (224, 224), scaled_decode=True)
Way = Callable[[bytes], np.ndarray]


def main() -> None:
    """Prints a row for each way and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(bench.heading() + "\n")
    rows = []
    for size in ((500, 375), (2000, 1500)):
        files = [synthetic_jpeg(number, size) for number in range(arguments.images)]
        features = Features()
        expected = np.stack([EXACT.load(file)[0] for file in files])
        of_expected = features(expected)
        costs = time_in_turn(ways(), files, arguments.repeats)
        for name, way in ways().items():
            found = np.stack([way(file) for file in files])
            difference = np.abs(found.astype(np.int16) - expected)
            moved = np.linalg.norm(features(found) - of_expected, axis=1) / np.linalg.norm(of_expected, axis=1)
            rows.append(
                {
                    "size": f"{size[0]} x {size[1]}",
                    "way": name,
                    "ms": f"{1000 * costs[name]:.2f}",
                    "images/s of a core": f"{1 / costs[name]:.0f}",
                    "pixels, largest": difference.max(),
                    "mean": f"{difference.mean():.3f}",
                    "features, mean relative": f"{moved.mean():.1e}",
                }
            )
    print(bench.table(rows))


def ways() -> dict[str, Way]:
    """The ways that are installed here."""
    found: dict[str, Way] = {
        "Pillow (default)": lambda data: EXACT.load(data)[0],
        "Pillow, scaled_decode": lambda data: SCALED.load(data)[0],
    }
    try:
        import simplejpeg

        found["simplejpeg"] = lambda data: _fitted(
            data, simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)
        )
    except ModuleNotFoundError:
        pass
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    def by_torchvision(data: bytes) -> np.ndarray:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return _fitted(data, decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy())

    found["torchvision"] = by_torchvision
    return found


def _fitted(data: bytes, pixels: np.ndarray) -> np.ndarray:
    Image.open(io.BytesIO(data)).getexif()  # the orientation must be known whoever decodes
    return EXACT.apply(Image.fromarray(pixels))


def time_in_turn(all_ways: dict[str, Way], files: list[bytes], repeats: int) -> dict[str, float]:
    """Median CPU seconds an image of each way, all in turn again and again."""
    costs: dict[str, list[float]] = {name: [] for name in all_ways}
    for _ in range(repeats):
        for name, way in all_ways.items():
            start = time.process_time()
            for file in files:
                way(file)
            costs[name].append((time.process_time() - start) / len(files))
    return {name: statistics.median(found) for name, found in costs.items()}


class Features:
    """Pooled features of ResNet-18."""

    def __init__(self) -> None:
        import torch

        from epic_ray.method.backbones import load_classifier

        torch.set_num_threads(bench.cores())
        self._classifier: Any = load_classifier("resnet18", source="torchvision", weights="random")

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            maps, _ = self._classifier(self._classifier.normalise(torch.from_numpy(pixels)))
        return maps.mean(dim=(2, 3)).numpy()


if __name__ == "__main__":
    main()
