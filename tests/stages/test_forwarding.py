"""The actor with the classifier, called as Ray calls it, without Ray."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import small_settings

from epic_ray.config import RunConfig
from epic_ray.logs import Reporter
from epic_ray.method.classifier import SplitClassifier
from epic_ray.method.staging import Staging
from epic_ray.run_dir import RunDir
from epic_ray.stages.attempts import Attempts
from epic_ray.stages.classes import ClassNames
from epic_ray.stages.decode_unit import DecodeUnit
from epic_ray.stages.features import FeatureActor
from epic_ray.stages.images import Listing, UnitRange, cut_units
from epic_ray.stages.loading import load
from epic_ray.stages.resources import Resources
from epic_ray.stages.unit_actor import UnitActor
from epic_ray.tables import read_table

RESOURCES = Resources(1, 1, 0.0, "cpu", 1, 16, "float32", 2, 0)


def units_of(config: RunConfig, run_dir: RunDir, classifier: SplitClassifier) -> list[UnitRange]:
    listing = Listing(config.data, ["train"], Reporter(), run_dir)
    classes = ClassNames.of(classifier, listing.class_names)
    images = listing.label(classes, config.features.unit_size)["train"]
    listing.publish(classes)
    return cut_units(images, "test")


def decoded(config: RunConfig, run_dir: RunDir) -> list:
    """The decoded units of the training split, as they reach an actor."""
    classifier = load(config.model)
    decode = DecodeUnit("features", run_dir, Attempts(run_dir, "features"), classifier.preprocessing)
    return [decode(pa.Table.from_pylist([asdict(unit)])) for unit in units_of(config, run_dir, classifier)]


def actor_of(config: RunConfig, run_dir: RunDir, keep_maps: bool) -> FeatureActor:
    return FeatureActor(run_dir, config.model, RESOURCES, Attempts(run_dir, "features"), keep_maps, "float32")


def files_of(run_dir: RunDir) -> dict:
    return {file: read_table(run_dir, file) for file in run_dir.list("tables") if "manifest" not in file}


@pytest.mark.parametrize("keep_maps", [False, True])
def test_an_actor_that_is_called_from_several_threads_publishes_what_one_thread_would(patches, tmp_path, keep_maps):
    """On a GPU one thread computes while others unpack and publish: none may see another's unit."""
    config = small_settings(patches, tmp_path, features={"unit_size": 10})
    one, several = (RunDir(str(tmp_path / name)) for name in ("one", "several"))
    in_turn = [actor_of(config, one, keep_maps)(row) for row in decoded(config, one)]
    actor, rows = actor_of(config, several, keep_maps), decoded(config, several)
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(actor, rows))
    assert len(rows) == 9
    assert files_of(one) == files_of(several)
    assert [row["forwarded"] for row in in_turn] == [row["forwarded"] for row in at_once]
    if keep_maps:
        assert all(one.read_bytes(file) == several.read_bytes(file) for file in one.list("maps"))
        assert one.list("maps") == several.list("maps") != []


class Overlapping(UnitActor):
    """Notes which units are computed and which are published at the same time."""

    def __init__(self, run_dir: RunDir) -> None:
        super().__init__(run_dir, Attempts(run_dir, "features"))
        self.computing, self.publishing = 0, threading.Event()
        self.met: set[str] = set()

    def compute(self, unit, readable):
        self.computing += 1
        if self.computing > 1:
            self.met.add("two computed")
        if self.publishing.wait(0.2):
            self.met.add("one computed while another was published")
        self.computing -= 1

    def publish(self, unit, readable, results):
        self.publishing.set()
        time.sleep(0.1)
        self.publishing.clear()
        return 0


def test_one_unit_is_computed_while_another_is_published_and_never_two_at_once(patches, tmp_path):
    config = small_settings(patches, tmp_path, features={"unit_size": 10})
    run_dir = RunDir(str(tmp_path / "run"))
    rows, actor = decoded(config, run_dir), Overlapping(run_dir)
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(actor, rows))) == 9
    assert actor.met == {"one computed while another was published"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_reach_a_gpu_as_they_are_through_two_buffers():
    pixels = np.random.default_rng(0).integers(0, 255, (90, 64, 64, 3), np.uint8)
    staging = Staging(16, (64, 64, 3), torch.device("cuda"))
    rows = np.arange(90)
    sent = [staging.send(pixels, rows[start : start + 16]) for start in range(0, 90, 16)]
    assert np.array_equal(torch.cat(sent).cpu().numpy()[:90], pixels)


def test_a_decode_task_imports_no_torch():
    """It would take 400 MB and a second from each process that decodes."""
    code = "import sys, epic_ray.stages.decode_unit; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_last_batch_that_is_not_full_holds_no_rest_of_the_one_before(patches, tmp_path):
    config = small_settings(patches, tmp_path, features={"unit_size": 90})
    run_dir = RunDir(str(tmp_path / "run"))
    decoded(config, run_dir)
    actor = actor_of(config, run_dir, False)
    pixels = np.random.default_rng(0).integers(0, 255, (21, 32, 32, 3), np.uint8)
    seen: list[np.ndarray] = []
    forward = actor.classifier.normalise
    actor.classifier.normalise = lambda images: (seen.append(images.numpy().copy()), forward(images))[1]
    chosen = np.arange(1, 21)
    logits = np.concatenate([part.numpy() for _, _, part in actor.forward(pixels, chosen)])
    assert logits.shape == (20, 3)
    assert np.array_equal(np.concatenate(seen)[:20], pixels[1:])
    assert not np.concatenate(seen)[20:].any()
