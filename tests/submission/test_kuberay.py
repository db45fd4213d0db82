"""A job as a RayJob: what is rendered, what is refused, and what kubectl is given."""

import os
import re
import stat
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from epic_ray.errors import ClusterError, ConfigError
from epic_ray.submission.kuberay import apply, dump, job_name, pack_run_file, render_job, unpack_run_file
from epic_ray.submission.target import resolve_target

CLUSTERS = Path(__file__).resolve().parents[2] / "cluster"
ENTRYPOINT = "python -m epic_ray._jobs.train -"


def target(name: str, **changes):
    from dataclasses import replace

    return replace(resolve_target(str(CLUSTERS / name), None, {"RAY_CLUSTER_TOKEN": "sesame"}), **changes)


def render(of, name="birds-resnet50-epic", runtime_env=None, **keywords):
    return render_job(of, name, ENTRYPOINT, runtime_env or {"env_vars": {"A": "1"}}, {"run": "birds"}, **keywords)


def test_a_job_manifest_is_kept_but_for_what_the_run_says():
    of = target("kuberay-job.yaml")
    job = render(of)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["metadata"]["name"] == "birds-resnet50-epic"
    assert job["spec"]["entrypoint"] == ENTRYPOINT
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"env_vars": {"A": "1"}}
    assert job["spec"]["metadata"] == {"run": "birds"}
    filled = {"entrypoint", "runtimeEnvYAML", "metadata"}
    theirs = {key: value for key, value in of.document["spec"].items() if key not in filled}
    assert {key: value for key, value in job["spec"].items() if key not in filled} == theirs
    assert {"backoffLimit", "shutdownAfterJobFinishes", "rayClusterSpec"} <= set(theirs)


def test_rendering_leaves_the_manifest_as_it_was():
    of = target("kuberay-job.yaml")
    before = dump(of.document)
    job = render(of)
    job["spec"]["rayClusterSpec"]["headGroupSpec"].clear()
    assert dump(of.document) == before


def test_a_cluster_that_runs_is_named_and_a_new_one_is_spelt_out():
    of = target("kuberay-cluster.yaml")
    job = render(of)
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": "epic-ray"}
    assert "rayClusterSpec" not in job["spec"]
    new = render(of, new_cluster=True)
    assert new["spec"]["rayClusterSpec"] == of.document["spec"]
    assert new["spec"]["shutdownAfterJobFinishes"] is True
    assert "clusterSelector" not in new["spec"]


def test_a_job_goes_where_its_manifest_lies_and_without_our_annotations():
    of = target("kuberay-cluster.yaml")
    of.document["metadata"] |= {"namespace": "vision", "labels": {"kueue.x-k8s.io/queue-name": "q"}}
    of.document["metadata"]["annotations"]["team"] = "birds"
    metadata = render(of)["metadata"]
    assert metadata["namespace"] == "vision"
    assert metadata["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    assert metadata["annotations"] == {"team": "birds"}


def test_what_is_printed_reads_back_to_the_same_job():
    job = render(target("kuberay-job.yaml"))
    assert yaml.safe_load(dump(job)) == job


@pytest.mark.parametrize(
    "place",
    [".", "/home/me/code", "code.zip", "http://a/code.zip", "gcs://_ray_pkg_1.zip", "https://a/code", "s3://b/code/"],
)
@pytest.mark.parametrize("key", ["working_dir", "py_modules"])
def test_code_on_this_machine_cannot_come_along(place, key):
    runtime_env = {key: place if key == "working_dir" else [place]}
    with pytest.raises(ConfigError) as caught:
        render(target("kuberay-job.yaml"), runtime_env=runtime_env)
    for part in ("uploads nothing", place, "cluster/Dockerfile", "kuberay-job.yaml"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "place", ["https://a/code.zip", "s3://b/code.zip", "gs://b/epic_ray.whl", "file:///opt/code.zip"]
)
def test_code_at_an_address_comes_along(place):
    job = render(target("kuberay-job.yaml", in_image=False), runtime_env={"working_dir": place})
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["working_dir"] == place


def test_code_that_is_nowhere_is_refused():
    with pytest.raises(ConfigError, match="nothing says where its code is") as caught:
        render(target("kuberay-job.yaml", in_image=False))
    assert 'epic-ray/in-image: "true"' in str(caught.value)


def test_a_job_that_waits_for_a_person_is_refused():
    of = target("kuberay-job.yaml")
    of.document["spec"]["submissionMode"] = "InteractiveMode"
    with pytest.raises(ConfigError, match="use K8sJobMode or HTTPMode"):
        render(of)


@given(st.text(min_size=1, max_size=120))
def test_every_name_becomes_one_that_kubernetes_takes(name):
    made = job_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", made), made
    assert len(made) <= 47
    assert job_name(made) == made


@pytest.mark.parametrize("name", ["a" * 47, "a" * 48, "A" * 47, "9" * 60, "photos-" * 14, "a-" * 23 + "."])
def test_a_long_name_is_cut_to_what_kuberay_takes(name):
    made = job_name(name)
    assert len(made) <= 47
    assert (made == name) == (name == "a" * 47)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", made)


@given(st.lists(st.text("aAbB-_.1", min_size=1, max_size=60), min_size=2, max_size=2, unique=True))
def test_two_runs_do_not_share_a_name(names):
    assert job_name(names[0]) != job_name(names[1])


@given(st.text())
def test_a_run_file_travels_whole_and_safe_from_shells(text):
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        return
    packed = pack_run_file(text)
    assert unpack_run_file(packed) == text
    assert re.fullmatch(r"[A-Za-z0-9+/=]*", packed)


def test_a_run_file_that_is_too_long_is_told():
    assert unpack_run_file(pack_run_file("x" * 48 * 1024))
    with pytest.raises(ConfigError, match=r"has 50 KiB, and 48 KiB travel with a RayJob; put long lists"):
        pack_run_file("x" * 50 * 1024)


@pytest.mark.parametrize("value", ["name: x", "%%%", "/w=="])
def test_a_value_that_is_no_run_file_is_told(value):
    with pytest.raises(ConfigError, match="EPIC_RAY_RUN_FILE: holds no run file"):
        unpack_run_file(value)


# kubectl


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """Puts a kubectl on PATH that keeps what it was given, and says and ends with what it is told to."""

    def install(says="", status=0):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        script = folder / "kubectl"
        script.write_text(
            f"#!{sys.executable}\nimport sys\n"
            f"open({str(tmp_path / 'arguments')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
            f"open({str(tmp_path / 'given')!r}, 'w').write(sys.stdin.read())\n"
            f"sys.stderr.write({says!r})\nsys.exit({status})\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(folder) + os.pathsep + os.environ["PATH"])
        return tmp_path

    return install


def test_kubectl_is_given_the_job(kubectl):
    folder = kubectl()
    job = render(target("kuberay-job.yaml"))
    apply(job)
    assert (folder / "arguments").read_text() == "apply -f -"
    assert yaml.safe_load((folder / "given").read_text()) == job


def test_what_kubectl_says_is_passed_on(kubectl):
    kubectl("warning: x\nerror: You must be logged in to the server\n", 1)
    with pytest.raises(ClusterError, match="RayJob birds-resnet50-epic: kubectl did not take it: error: You must be"):
        apply(render(target("kuberay-job.yaml")))


def test_a_cluster_without_kuberay_is_told(kubectl):
    kubectl('error: no matches for kind "RayJob" in version "ray.io/v1"\nensure CRDs are installed first\n', 1)
    with pytest.raises(ClusterError, match="is the KubeRay operator installed"):
        apply(render(target("kuberay-job.yaml")))


def test_without_kubectl_the_job_can_be_printed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"not on PATH.*--dry-run.*kubectl apply -f -"):
        apply(render(target("kuberay-job.yaml")))
