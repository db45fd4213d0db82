"""Forwards of one core by the number of images in a batch: which `resources.batch_size` a CPU likes.

    python benchmarks/batch_sizes.py [NETWORK ...] [--repeats 5]

Networks are torchvision's, with random weights, on 224 x 224 pixels as the pass sends them (uint8, normalised on the
way). All sizes are run in turn, and each figure is the median of the repeats; the ratio is over batches of 64.
"""

import argparse
import statistics
import time

import bench
import torch

from epic_ray.method.backbones import load_classifier
from epic_ray.method.classifier import SplitClassifier

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "convnext_tiny")
SIZES = (4, 8, 16, 32, 64)
COMPARED = SIZES[-1]


def main() -> None:
    """Prints a row for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(bench.heading() + "\n")
    rows = []
    for name in arguments.networks:
        settings = {"resize": 256, "crop": 224}
        classifier = load_classifier(
            name, source="torchvision", weights="random", class_count=10, preprocessing=settings
        ).to(torch.device("cpu"))
        rates = {size: [] for size in SIZES}
        for _ in range(arguments.repeats):
            for size in SIZES:
                rates[size].append(rate(classifier, size))
        ratios = [best / other for best, other in zip(rates[16], rates[COMPARED], strict=True)]
        row = {"network": name} | {f"{size} a batch": f"{statistics.median(rates[size]):.1f}" for size in SIZES}
        rows.append(row | {"16 over 64": f"{statistics.median(ratios):.2f}", "runs": arguments.repeats})
    print("Images a second of one core.\n")
    print(bench.table(rows))


def rate(classifier: SplitClassifier, size: int) -> float:
    """Images a second, over as many batches as hold 64 images."""
    images = torch.randint(256, (size, *classifier.preprocessing.crop, 3), dtype=torch.uint8)
    with torch.inference_mode():
        classifier(classifier.normalise(images))
        start = time.perf_counter()
        for _ in range(COMPARED // size):
            classifier(classifier.normalise(images))
        return COMPARED / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
