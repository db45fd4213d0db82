"""What the tests share: one Ray a session, a small real data set, a small classifier, and the optional shared data."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epic_ray.config import RunConfig, build_config
from epic_ray.demo import DIGIT_PREPROCESSING

# for the tests' own store: Ray's processes have the environment that Ray was started with
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
pytest.register_assert_rewrite("harness", "stores", "verdict")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # threads that wait for one another on a busy machine turn milliseconds into seconds

CLASSES = ("blue", "green", "red")
COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="also the tests marked `faults`, the better part of an hour")
    parser.addoption("--fault-table", metavar="FILE", help="write what each fault cost as a Markdown table")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--faults"):
        left_out = [item for item in items if item.get_closest_marker("faults")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos and weights beside the repository, where there is one."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data" / "README.md").exists():
        pytest.skip("needs the shared photos and weights, which are not part of the project")
    return folder


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray with four logical CPUs and two GPUs that exist by name only."""
    import ray

    from epic_ray.logs import quiet_ray

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    quiet_ray()
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        object_store_memory=512 * 1024**2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def draw_patch(colour: tuple[int, int, int], seed: int) -> Image.Image:
    """A noisy grey picture of odd size with one coloured square somewhere."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(34, 60, 2)
    pixels = rng.integers(90, 150, (height, width, 3)).astype(np.uint8)
    row, col = rng.integers(0, height - 12), rng.integers(0, width - 12)
    pixels[row : row + 12, col : col + 12] = colour
    return Image.fromarray(pixels)


def write_patches(root: Path, per_class: dict[str, int]) -> Path:
    """An ImageFolder of coloured patches; every tenth image repeats the one before it, byte for byte."""
    for number, (split, count) in enumerate(per_class.items()):
        for place, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                same_as = index - 1 if index % 10 == 9 else index
                seed = 100_000 * number + 10_000 * place + same_as
                draw_patch(COLOURS[name], seed).save(folder / f"{name}-{index:04d}.png")
    return root


@pytest.fixture(scope="session")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 images to fit on and 45 held out, in three classes."""
    return write_patches(tmp_path_factory.mktemp("patches"), {"train": 30, "val": 15})


def small_settings(images: Path, output: Path, **sections: Any) -> RunConfig:
    """The settings of a run that takes seconds; sections are merged over these."""
    values: dict[str, Any] = {
        "name": "small",
        "model": {
            "architecture": "epic_ray.demo:digit_net",
            "source": "factory",
            "weights": "random",
            "arguments": {"class_count": 3},
            "preprocessing": DIGIT_PREPROCESSING,
        },
        "data": {"root": str(images)},
        "features": {"unit_size": 32},
        "fit": {"prototypes_per_channel": {"start": 12, "end": 5, "rounds": 3}},
        "resources": {
            "batch_size": 16,
            "device": "cpu",
            "gpus_per_actor": 0,
            "threads_per_actor": 1,
            "feature_actors": 1,
        },
        "output": {"root": str(output)},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return build_config(values, "test")


@pytest.fixture
def settings(patches: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes the settings of a small run over the patches: see `small_settings`."""
    return lambda **sections: small_settings(patches, tmp_path / "runs", **sections)
