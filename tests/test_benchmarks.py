"""The benchmarks can be called, and the baseline of `end_to_end` does the work that it stands for."""

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import published
from epic_ray.demo import DIGIT_PREPROCESSING, DigitNet
from epic_ray.method.basis import orthogonality_error
from epic_ray.method.classifier import SplitClassifier, split_classifier
from epic_ray.method.preprocessing import Preprocessing
from epic_ray.method.solvers import FitState, SingleProcess, fit_adam
from epic_ray.method.topk import search
from epic_ray.run_dir import RunDir
from epic_ray.tables import read_tables, to_numpy
from tests.method.sources import ArraySource

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8"))


# --- the scripts


def test_there_are_scripts():
    assert {"driver_memory.py", "end_to_end.py"} <= {script.name for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_answers_help_and_names_its_command(script):
    asked = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("usage:")
    docstring = script.read_text(encoding="utf-8").split('"""')[1]
    assert f"python benchmarks/{script.name}" in docstring


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_readme_tells_of_a_script(script):
    assert f"python benchmarks/{script.name}" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_heading_needs_no_git(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    bench = importlib.import_module("bench")
    monkeypatch.setenv("PATH", "")
    assert ", no commit; Python" in bench.heading()
    assert ", load " in bench.heading()


@pytest.mark.slow
def test_gpu_runs_to_its_end_where_there_is_no_ray(tmp_path):
    for name in ("ray", "pydantic"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('none', name='{name}')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    titles = [line for line in done.stdout.splitlines() if line[:1].isupper()]
    assert titles == ["Forwards", "Pass over JPEGs", "Search", "Solver", "Polar factor"]
    assert "| pass through Ray | float32 | 200 |  | not measured, no ray here |" in done.stdout
    assert done.stdout.count("| decode + forward + write, the pass's parts without Ray |") == 3


def test_the_parts_without_ray_write_the_features_of_every_image(classifier, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    rayless, made = importlib.import_module("rayless_pass"), importlib.import_module("made_images")
    files = rayless.make_jpegs(tmp_path, 600, 7, partial(made.synthetic_jpeg, size=(40, 40)), 1)
    with rayless.DecodePool(classifier.preprocessing, 1) as pool:
        rayless.run_pass(pool, files, classifier, 128, tmp_path / "run")
    run_dir = RunDir(str(tmp_path / "run"))
    table = read_tables(run_dir, run_dir.list("tables/features/train"), ["position", "pooled"])
    position, pooled = (torch.tensor(to_numpy(table[name])) for name in ("position", "pooled"))
    decoded = [classifier.preprocessing.load(Path(file).read_bytes())[0] for file in files[:7]]
    maps, _ = classifier(classifier.normalise(torch.from_numpy(np.stack(decoded))))
    assert sorted(position.tolist()) == list(range(600))
    assert torch.allclose(pooled, maps.mean(dim=(2, 3))[position % 7], atol=1e-5)


# --- the published schedule


@pytest.fixture(scope="module")
def classifier() -> SplitClassifier:
    """A network of 4 channels with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DigitNet(class_count=3, channels=4)
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in DIGIT_PREPROCESSING.items()}
    settings["crop"] = (settings["crop"], settings["crop"]) if isinstance(settings["crop"], int) else settings["crop"]
    return split_classifier(net, Preprocessing(**settings))


@pytest.fixture(scope="module")
def images(patches: Path, classifier: SplitClassifier) -> published.Images:
    """90 pictures, of which the last batch of a pass has fewer than the prototypes of a channel."""
    places = [(str(path), 0, -1) for path in sorted(patches.glob("train/*/*.png"))]
    return published.Images(places, classifier.preprocessing)


@pytest.fixture(scope="module")
def maps(images: published.Images, classifier: SplitClassifier) -> Tensor:
    return torch.cat(list(published.Forwarding(images, classifier, 16, 0).maps(torch.arange(len(images)), 16)))


def test_the_published_counts_are_12_passes_and_1720_prototypes_a_channel():
    rounds = published.schedule()
    assert rounds == (100, 90, 81, 71, 62, 52, 43, 33, 24, 14)
    counts = published.forwards(1000, 1, rounds)
    assert sum(count for part, count in counts.items() if part.endswith("passes")) == 12_000
    assert sum(count for part, count in counts.items() if part.endswith("prototypes")) == 1720
    assert counts[published.TRAINING] == 1140


def test_the_published_fit_forwards_and_decodes_what_its_formula_says(images, classifier):
    rounds = (12, 5)
    source = published.Forwarding(images, classifier, 16, 0)
    fit = published.PublishedFit(source, len(images), 4)
    basis = fit.run(rounds)
    assert {part: cost.forwarded for part, cost in fit.costs.items()} == published.forwards(len(images), 4, rounds)
    assert source.decoded == source.forwarded == 4 * 90 + (2 * 17 + 17 + 10) * 4
    assert orthogonality_error(basis) < 1e-5


@pytest.mark.parametrize("n", [5, 40, 200])
def test_the_baselines_prototypes_are_the_exact_top_n(n, maps, monkeypatch):
    monkeypatch.setattr(published, "IMAGES_PER_BOOKKEEPING", 25)  # 90 images: the last batch has 15
    fit = published.PublishedFit(published.Kept(maps), len(maps), 4)
    with torch.no_grad():
        fit._skew += torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    pooled = maps.mean(dim=1)
    expected = search([(torch.arange(len(maps)), pooled)], fit.basis().detach(), min(n, len(maps))).values
    scores = pooled @ fit.basis().detach().T
    assert torch.allclose(scores.T.gather(1, fit.select(n)), expected, atol=1e-5)


def test_the_baseline_fits_the_same_basis_as_epic_rays_own_adam():
    """Two codes of one procedure."""
    maps = random_maps()
    rounds = (60, 40, 20)
    own = fit_adam(ArraySource(maps), FitState.begin(torch.eye(6)), rounds, SingleProcess(), lambda *_: None, seed=42)
    fit = published.PublishedFit(published.Kept(maps), len(maps), 6)
    basis = fit.run(rounds)
    assert (basis - torch.eye(6)).abs().max() > 0.005
    assert torch.allclose(basis, own.basis, atol=1e-5)


def test_an_epoch_of_the_baseline_raises_the_purity_of_its_prototypes():
    maps = random_maps()[:, :1]  # of one cell, so that no peak moves to a cell of less purity
    fit = published.PublishedFit(published.Kept(maps), 150, 6)
    chosen = fit.select(60)
    before = fit.measure(chosen)
    for epoch in range(5):
        fit.train(chosen, 0, epoch)
    assert fit.measure(chosen) > before + 3e-4


def random_maps() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(150, 9, 6, generator=generator).relu() + 0.1 * torch.rand(150, 9, 6, generator=generator)


def test_maps_of_the_baseline_come_in_the_order_asked_for(images, classifier, maps):
    positions = torch.tensor([70, 3, 3, 89, 0])
    found = torch.cat(list(published.Forwarding(images, classifier, 2, 0).maps(positions, 4)))
    assert torch.allclose(found, maps[positions], atol=1e-5)


def test_an_image_is_read_at_its_place_in_a_larger_file(patches, classifier, tmp_path):
    path = sorted(patches.glob("train/*/*.png"))[0]
    data = path.read_bytes()
    (tmp_path / "many.tar").write_bytes(b"x" * 700 + data + b"y" * 300)
    alone, within = (
        published.Images([place], classifier.preprocessing)[0]
        for place in ((str(path), 0, -1), (str(tmp_path / "many.tar"), 700, len(data)))
    )
    assert torch.equal(alone, within)
    assert Image.open(path).size[0] > 32


# --- end to end


@pytest.fixture
def end_to_end(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which finds its neighbours as it does when it is called."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("end_to_end")


def test_a_sample_of_the_baseline_is_multiplied_by_the_counts_of_the_whole(end_to_end, maps, monkeypatch):
    class Slow(published.Kept):
        """A source by whose clock each image takes a second."""

        def maps(self, positions: Tensor, batch_size: int):
            for batch in super().maps(positions, batch_size):
                self.forwarded += len(batch)
                yield batch

    source = Slow(maps)
    monkeypatch.setattr(end_to_end.published.time, "perf_counter", lambda: source.forwarded)
    baseline = end_to_end.Baseline.__new__(end_to_end.Baseline)
    baseline.images, baseline.channels, baseline.rounds = len(maps), 4, (12, 5)
    baseline.by_formula, baseline._source = published.forwards(len(maps), 4, (12, 5)), source
    counted, seconds = baseline.sample(steps=1, measured=5)
    assert counted == {
        published.SELECTING: 90,
        published.TRAINING: 48,
        published.MEASURING_PASSES: 0,
        published.MEASURING: 20,
    }
    assert seconds == pytest.approx(baseline.by_formula)


@pytest.mark.ray
@pytest.mark.slow
def test_end_to_end_compares_a_whole_fit_with_epic_ray_train(end_to_end, patches, tmp_path, capsys):
    model = {
        "architecture": "epic_ray.demo:digit_net",
        "source": "factory",
        "weights": "random",
        "arguments": {"class_count": 3},
        "preprocessing": DIGIT_PREPROCESSING,
    }
    case = end_to_end.Case("patches", {"model": model, "data": {"root": str(patches)}}, 6, 10, patches, 16)
    end_to_end.compare_whole(case, tmp_path, repeats=1)
    told = capsys.readouterr().out
    rounds = published.schedule(6)
    assert "patches (D = 40), 135 images" in told
    assert f"| 1,080 | 12 | {(3 * sum(rounds) + 10) * 40:,} |" in told
    assert "| 135 | 1 | 0 |" in told
    assert "| pass forwards an image | 1 | 1 | yes |" in told
    counted = [
        line.split("|")[2:4] for line in told.splitlines() if line.startswith(tuple(f"| {p}" for p in published.PARTS))
    ]
    assert len(counted) == 4
    assert all(ours.strip() == formula.strip() for ours, formula in counted)
