"""What a run asks of its cluster, against what that has or may grow to: told at once, not waited for."""

import hashlib
import json

import pytest

from epic_ray.config import ResourcesConfig
from epic_ray.errors import ClusterError
from epic_ray.stages import resources
from epic_ray.stages.resources import LIMITS_VARIABLE, _unseen, resolve_resources

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]  # 4 CPUs, 2 GPUs


def may_have(monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
    monkeypatch.setenv(LIMITS_VARIABLE, json.dumps(limits))


def test_gpus_that_the_autoscaler_may_bring_are_counted_and_not_waited_for(monkeypatch):
    now = resolve_resources(ResourcesConfig())
    assert (now.feature_actors, now.actors_at_once) == (2, 2)
    may_have(monkeypatch, CPU=64, GPU=8)
    grown = resolve_resources(ResourcesConfig())
    assert (grown.feature_actors, grown.actors_at_once, grown.device) == (8, 2, "cuda")


def test_more_gpus_than_there_may_be_are_refused_with_both_numbers(monkeypatch):
    may_have(monkeypatch, GPU=8)
    with pytest.raises(ClusterError, match=r"9 actor\(s\) x 1 GPU\(s\) asked, but Ray has 2, and can have 8,"):
        resolve_resources(ResourcesConfig(feature_actors=9))


def test_an_actor_that_fits_no_machine_is_refused(monkeypatch):
    machines = [{"Resources": {"GPU": 1.0}}, {"Resources": {"GPU": 1.0}}]
    monkeypatch.setattr(resources, "alive_nodes", lambda: machines)
    with pytest.raises(ClusterError, match="hold 2 GPUs, but the largest machine has 1"):
        resolve_resources(ResourcesConfig(gpus_per_actor=2))


def test_a_cluster_that_can_run_no_task_is_refused(monkeypatch):
    monkeypatch.setattr(resources.ray, "cluster_resources", lambda: {"GPU": 2.0})
    with pytest.raises(ClusterError, match="no CPU for decoding"):
        resolve_resources(ResourcesConfig())
    may_have(monkeypatch, CPU=8)
    assert resolve_resources(ResourcesConfig()).feature_actors == 2


def test_a_machine_sees_what_it_must(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_bytes(b"name: a\n")
    (tmp_path / "empty").mkdir()
    proof = (str(config), hashlib.sha256(b"name: a\n").hexdigest())
    assert _unseen({"data.root": str(tmp_path)}, proof) is None
    assert _unseen({"data.root": f"{tmp_path}/absent"}, proof) == f"data.root: {tmp_path}/absent"
    assert _unseen({"data.root": f"{tmp_path}/empty"}, proof) == f"data.root: {tmp_path}/empty"  # not mounted
    config.write_bytes(b"name: b\n")  # another disk under the same path
    assert _unseen({}, proof) == f"output.root: {tmp_path}"


@pytest.mark.parametrize(("asked", "given"), [({}, 16), ({"batch_size": 40}, 40)])
def test_a_forward_on_a_cpu_has_few_images_unless_told_otherwise(ray_session, asked, given):
    assert resolve_resources(ResourcesConfig(device="cpu", gpus_per_actor=0, **asked)).batch_size == given
    assert resolve_resources(ResourcesConfig()).batch_size == 64  # the test's Ray has GPUs, by name
