"""Naming a cluster: every way that works, every file that names none, and what the messages say."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from epic_ray.errors import ConfigError
from epic_ray.submission.target import LOCAL_ADDRESS, has_target, resolve_target

TOKEN = "open-sesame-7f3a"

LAUNCHER = {
    "cluster_name": "birds",
    "provider": {"type": "aws", "region": "us-west-2"},
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 2, "GPU": 0}, "node_config": {}},
        "big": {"resources": {"CPU": 16, "GPU": 4}, "node_config": {}, "max_workers": 2},
        "small": {"resources": {"CPU": 8, "GPU": 0}, "node_config": {}},
    },
}


def pod(**resources):
    return {"spec": {"containers": [{"name": "ray", "image": "i", "resources": {"limits": resources}}]}}


def ray_cluster(**metadata):
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "birds", **metadata},
        "spec": {
            "enableInTreeAutoscaling": True,
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": pod(cpu="2")},
            "workerGroupSpecs": [
                {
                    "groupName": "gpu",
                    "replicas": 1,
                    "minReplicas": 0,
                    "maxReplicas": 3,
                    "numOfHosts": 2,
                    "rayStartParams": {},
                    "template": pod(**{"cpu": "7500m", "nvidia.com/gpu": "2"}),
                }
            ],
        },
    }


def ray_job(**spec):
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "birds-job", "namespace": "vision"},
        "spec": {"entrypoint": "x", "rayClusterSpec": ray_cluster()["spec"], **spec},
    }


@pytest.fixture
def resolve(tmp_path):
    """Writes a cluster file and resolves it."""

    def of(*documents, environ=None, name="cluster.yaml"):
        file = tmp_path / name
        text = documents[0] if isinstance(documents[0], str) else yaml.safe_dump_all(documents, sort_keys=False)
        file.write_text(text, encoding="utf-8")
        return resolve_target(str(file), None, environ or {})

    return of


def refused(cluster, address=None, environ=None) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_target(cluster, address, environ or {})
    return str(caught.value)


# by a word or an address


def test_the_word_local_is_the_ray_of_this_machine():
    target = resolve_target("local", None, {})
    assert (target.kind, target.address, target.headers) == ("local", LOCAL_ADDRESS, {})


@pytest.mark.parametrize("given", ["http://10.0.0.5:8265", "https://ray.example.com/cluster", "http://[::1]:8265/"])
def test_an_address_is_taken_from_either_option(given):
    for target in (resolve_target(given, None, {}), resolve_target(None, given, {})):
        assert (target.kind, target.address) == ("address", given.rstrip("/"))
        assert target.origin == target.address


def test_the_environment_names_a_cluster_where_no_option_does():
    both = {"RAY_API_SERVER_ADDRESS": "http://a:8265", "RAY_ADDRESS": "http://b:8265"}
    assert resolve_target(None, None, both).address == "http://a:8265"
    assert resolve_target(None, None, both).origin == "RAY_API_SERVER_ADDRESS=http://a:8265"
    assert resolve_target(None, None, {"RAY_ADDRESS": "https://b"}).address == "https://b"
    assert resolve_target(None, "http://c:8265", both).address == "http://c:8265"
    assert resolve_target("local", None, both).kind == "local"


@pytest.mark.parametrize(
    "environ", [{}, {"RAY_ADDRESS": "auto"}, {"RAY_ADDRESS": "10.0.0.1:6379"}, {"RAY_ADDRESS": ""}]
)
def test_nothing_named_tells_every_way_to_name_one(environ):
    assert not has_target(None, None, environ)
    said = refused(None, None, environ=environ)
    for way in ("--cluster FILE", "--cluster local", "--address URL", "RAY_API_SERVER_ADDRESS", "RayJob", "cluster/"):
        assert way in said


@pytest.mark.parametrize(
    ("cluster", "address", "environ"),
    [
        ("x.yaml", None, {}),
        (None, "http://a:1", {}),
        (None, None, {"RAY_API_SERVER_ADDRESS": "http://a:1"}),
        (None, None, {"RAY_ADDRESS": "http://a:1"}),
    ],
)
def test_anything_named_counts_as_named(cluster, address, environ):
    assert has_target(cluster, address, environ)


def test_two_options_contradict_one_another():
    said = refused("local", "http://a:8265")
    assert "--cluster local" in said
    assert "--address http://a:8265" in said


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("ray://10.0.0.5:10001", "address of a Ray client"),
        ("10.0.0.5:8265", "did you mean http://10.0.0.5:8265?"),
        ("ftp://10.0.0.5", "expected http://HOST:8265"),
        ("http://", "expected http://HOST:8265"),
        ("http://a:port", "is no address"),
        ("http://a:0", "port 0"),
        ("http://a:8265/?token=x", "base address"),
        ("http://a b:8265", "expected http://HOST:8265"),
        ("local", "did you mean http://local?"),
    ],
)
def test_what_is_no_address_is_refused(given, says):
    assert says in refused(None, given)


def test_an_address_with_a_login_is_refused_and_not_repeated():
    said = refused(None, f"https://me:{TOKEN}@ray.example.com")
    assert "token_env" in said
    assert TOKEN not in said
    assert "https://...@ray.example.com" in said


# address files


def test_an_address_file_sets_what_it_says(resolve, tmp_path):
    (tmp_path / "ca.pem").write_text("certificates")
    target = resolve(
        {
            "address": "https://ray.example.com/",
            "token_env": "CLUSTER_TOKEN",
            "headers": {"X-Team": "birds", "Proxy-Authorization": "Basic ${PROXY}"},
            "verify": "ca.pem",
            "runtime_env": {"env_vars": {"A": "1"}},
            "in_image": True,
        },
        environ={"CLUSTER_TOKEN": TOKEN, "PROXY": "bWU6eA=="},
    )
    assert (target.kind, target.address, target.in_image) == ("address", "https://ray.example.com", True)
    assert target.headers == {
        "X-Team": "birds",
        "Proxy-Authorization": "Basic bWU6eA==",
        "Authorization": f"Bearer {TOKEN}",
    }
    assert target.verify == str(tmp_path / "ca.pem")
    assert target.runtime_env == {"env_vars": {"A": "1"}}
    assert target.path == tmp_path / "cluster.yaml"


def test_an_address_alone_has_plain_defaults(resolve):
    target = resolve({"address": "http://a:8265"})
    assert (target.headers, target.verify, target.runtime_env, target.in_image) == ({}, True, {}, False)
    assert target.limits is None


def test_a_token_is_in_no_text_of_a_target(resolve):
    target = resolve(
        {"address": "http://a:8265", "token_env": "T", "runtime_env": {"env_vars": {"KEY": TOKEN}}},
        environ={"T": TOKEN},
    )
    assert TOKEN in str(target.headers)
    assert TOKEN not in repr(target) + str(target)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"token_env": "CLUSTER_TOKEN"}, "variable CLUSTER_TOKEN is not set"),
        ({"headers": {"X-Key": "${MISSING}"}}, "variable MISSING is not set"),
        ({"token_env": f"{TOKEN}!"}, "expected the name of an environment variable"),
        ({"token": TOKEN}, "secrets do not belong in files"),
        ({"auth_token": TOKEN}, "token_env: RAY_CLUSTER_TOKEN"),
        ({"password": TOKEN}, "secrets do not belong in files"),
        ({"headers": {"authorization": f"Bearer {TOKEN}"}}, "secrets do not belong in files"),
        ({"headers": {"Cookie": TOKEN}}, "secrets do not belong in files"),
        ({"headers": [TOKEN]}, "headers: expected a mapping of names to text, not a list"),
        ({"headers": {"X-Count": 3}}, "headers.X-Count: expected text, not a number"),
        ({"tokenenv": "A"}, "unknown key `tokenenv`; did you mean `token_env`?"),
        ({"runtime-env": {}}, "did you mean `runtime_env`?"),
        ({"zebra": 1}, "known here: address, token_env, headers, verify, runtime_env, in_image"),
        ({"tunnel": True}, "unknown key `tunnel`"),
        ({"verify": "nowhere.pem"}, "is no file"),
        ({"verify": 3}, "verify: expected true, false or a file"),
        ({"runtime_env": "pip"}, "runtime_env: expected a mapping"),
        ({"in_image": "yes"}, "in_image: expected true or false, not text"),
        ({"address": 8265}, "address: expected an address such as http://HOST:8265, not a number"),
        ({"address": "10.0.0.5:8265"}, "did you mean http://10.0.0.5:8265?"),
    ],
)
def test_a_wrong_key_of_an_address_file_is_told(resolve, more, says):
    with pytest.raises(ConfigError) as caught:
        resolve({"address": "http://a:8265", **more})
    assert says in str(caught.value)
    assert "cluster.yaml" in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_token_in_two_places_is_a_contradiction(resolve):
    with pytest.raises(ConfigError, match=r"both token_env and headers\.Authorization"):
        resolve(
            {"address": "http://a:1", "token_env": "T", "headers": {"Authorization": "Basic ${T}"}},
            environ={"T": TOKEN},
        )


def test_a_token_with_a_line_break_is_refused_without_showing_it(resolve):
    with pytest.raises(ConfigError, match="fits no header") as caught:
        resolve({"address": "http://a:1", "token_env": "T"}, environ={"T": f"{TOKEN}\nX: y"})
    assert TOKEN not in str(caught.value)


# launcher files


def test_a_launcher_file_gives_its_options_and_limits(resolve):
    own = {"token_env": "T", "dashboard_port": 8270, "tunnel": False, "in_image": True, "runtime_env": {"pip": ["x"]}}
    target = resolve({**LAUNCHER, "metadata": {"epic_ray": own, "of_others": 1}}, environ={"T": TOKEN})
    assert (target.kind, target.address, target.name) == ("launcher", None, "birds")
    assert (target.dashboard_port, target.tunnel, target.in_image) == (8270, False, True)
    assert target.headers == {"Authorization": f"Bearer {TOKEN}"}
    assert target.document["provider"]["type"] == "aws"
    # the head, two big machines, and of the three in all one small one; GPUs by the big ones alone
    assert target.limits == {"CPU": 2 + 2 * 16 + 8, "GPU": 8}


def test_what_a_launcher_leaves_to_detection_is_not_guessed(resolve):
    types = LAUNCHER["available_node_types"]
    found = {**types, "small": {"resources": {"CPU": 8}, "node_config": {}}}
    assert resolve({**LAUNCHER, "available_node_types": found}).limits == {"CPU": 42}
    none_of_it = {**types, "small": {"resources": {}, "node_config": {}}}
    assert resolve({**LAUNCHER, "available_node_types": none_of_it}).limits is None
    never_brought = {**types, "small": {"resources": {}, "node_config": {}, "max_workers": 0}}
    assert resolve({**LAUNCHER, "available_node_types": never_brought}).limits == {"CPU": 34, "GPU": 8}
    no_global = {key: value for key, value in LAUNCHER.items() if key != "max_workers"}
    assert resolve(no_global).limits == {"CPU": 34, "GPU": 8}  # Ray's own default is two workers
    on_premises = {"cluster_name": "a", "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}}
    assert resolve(on_premises).limits is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"max_worker": 3}, "unknown key max_worker; did you mean `max_workers`?"),
        ({"max_workers": "three"}, "max_workers: expected integer, not str"),
        ({"max_workers": -1}, "max_workers: against Ray's rule minimum"),
        ({"provider": {"region": "x"}}, "provider: 'type' is a required property"),
        ({"head_node_type": "hed"}, "head_node_type: expected one of available_node_types: head, big, small"),
        ({"metadata": {"epic_ray": {"adress": "http://a:1"}}}, "metadata.epic_ray: unknown key `adress`; did you mean"),
        ({"metadata": {"epic_ray": {"token": TOKEN}}}, "secrets do not belong in files"),
        ({"metadata": {"epic_ray": [1]}}, "metadata.epic_ray: expected a mapping"),
        ({"metadata": {"epic_ray": {"dashboard_port": 0}}}, "dashboard_port: expected a port"),
        ({"metadata": {"epic_ray": {"tunnel": "no"}}}, "tunnel: expected true or false"),
    ],
)
def test_a_wrong_launcher_file_is_told(resolve, more, says):
    with pytest.raises(ConfigError) as caught:
        resolve({**LAUNCHER, **more})
    assert says in str(caught.value)


def test_a_launcher_schema_finding_shows_no_value(resolve):
    with pytest.raises(ConfigError) as caught:
        resolve({**LAUNCHER, "auth": {"ssh_user": [TOKEN]}, "upscaling_speed": TOKEN})
    assert "2 wrong setting(s) for `ray up`" in str(caught.value)
    assert TOKEN not in str(caught.value)


# KubeRay


def test_a_ray_cluster_is_reached_at_its_head_service(resolve):
    target = resolve(ray_cluster(namespace="vision"))
    assert (target.kind, target.name, target.namespace) == ("raycluster", "birds", "vision")
    assert target.address == "http://birds-head-svc.vision.svc.cluster.local:8265"
    assert (target.in_image, target.limits) == (False, {"CPU": 3 * 2 * 8, "GPU": 3 * 2 * 2})


def test_a_head_service_with_a_name_of_its_own_is_used(resolve):
    document = ray_cluster()
    document["spec"]["headGroupSpec"]["headService"] = {"metadata": {"name": "door"}}
    assert resolve(document).address == "http://door.default.svc.cluster.local:8265"


def test_annotations_say_what_an_address_file_says(resolve):
    notes = {
        "epic-ray/address": "https://ray.example.com",
        "epic-ray/token-env": "T",
        "epic-ray/verify": "false",
        "epic-ray/in-image": "true",
        "epic-ray/runtime-env": "{env_vars: {A: '1'}}",
        "team": "birds",
    }
    target = resolve(ray_cluster(annotations=notes), environ={"T": TOKEN})
    assert (target.address, target.verify, target.in_image) == ("https://ray.example.com", False, True)
    assert target.headers == {"Authorization": f"Bearer {TOKEN}"}
    assert target.runtime_env == {"env_vars": {"A": "1"}}


def test_a_ray_job_has_no_address_and_its_code_in_the_image(resolve):
    target = resolve(ray_job(runtimeEnvYAML="env_vars: {A: '1'}\n"))
    assert (target.kind, target.address, target.in_image, target.namespace) == ("rayjob", None, True, "vision")
    assert target.runtime_env == {"env_vars": {"A": "1"}}
    assert target.limits == {"CPU": 48, "GPU": 12}


def test_a_ray_job_on_a_cluster_that_runs_has_no_limits(resolve):
    job = ray_job(clusterSelector={"ray.io/cluster": "birds"})
    del job["spec"]["rayClusterSpec"]
    assert resolve(job).limits is None


def test_the_ray_document_is_found_among_others(resolve):
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}}
    target = resolve(account, ray_cluster(), {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "b"}})
    assert target.document["kind"] == "RayCluster"


def test_limits_without_an_autoscaler_are_what_is_asked_for(resolve):
    document = ray_cluster()
    document["spec"]["enableInTreeAutoscaling"] = False
    assert resolve(document).limits == {"CPU": 16, "GPU": 4}


def test_an_unbounded_group_has_no_limit_of_what_it_holds(resolve):
    document = ray_cluster()
    (group,) = document["spec"]["workerGroupSpecs"]
    del group["maxReplicas"]
    group["template"] = pod(cpu="8")
    assert resolve(document).limits == {"GPU": 0}


def broken(document, *path, **values):
    node = document
    for step in path:
        node = node[step]
    for key, value in values.items():
        node[key] = value
    return document


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({**ray_cluster(), "apiVersion": "ray.io/v1alpha1"}, "expected apiVersion: ray.io/v1"),
        ({**ray_cluster(), "kind": "RayService"}, "a RayService serves requests and runs no jobs"),
        ({**ray_cluster(), "kind": "RayCronJob"}, "expected kind RayCluster or RayJob"),
        ({**ray_cluster(), "spec": None}, "the RayCluster has no spec"),
        (ray_cluster(name="Birds_1"), "is no name of a RayCluster; expected at most 53"),
        (ray_cluster(name="b" * 54), "expected at most 53"),
        (ray_cluster(name=None), "metadata.name: None is no name"),
        (broken(ray_job(), "metadata", name="b" * 48), "expected at most 47"),
        (ray_job(rayClusterSpec=None), "the RayJob names no cluster"),
        (ray_job(runtimeEnvYAML="[1]"), "runtimeEnvYAML: expected the text of a YAML mapping"),
        (broken(ray_cluster(), "spec", headGroupSpec=None), "spec.headGroupSpec: missing"),
        (broken(ray_cluster(), "spec", workerGroupSpecs="gpu"), "workerGroupSpecs: expected a list of worker groups"),
        (broken(ray_cluster(), "spec", "workerGroupSpecs", 0, maxReplicas="4"), "maxReplicas: expected a whole number"),
        (broken(ray_cluster(), "spec", "headGroupSpec", template={}), "expected template.spec.containers"),
        (ray_cluster(annotations={"epic-ray/in-image": True}), "Kubernetes takes text alone; quote the value"),
        (ray_cluster(annotations={"epic-ray/token": TOKEN}), "secrets do not belong in files"),
        (ray_cluster(annotations={"epic-ray/adress": "http://a"}), "did you mean `address`?"),
        (ray_cluster(annotations={"epic-ray/verify": "[1"}), "the value is no YAML"),
    ],
)
def test_a_wrong_manifest_is_told(resolve, document, says):
    with pytest.raises(ConfigError) as caught:
        resolve(document)
    assert says in str(caught.value)
    assert "cluster.yaml" in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_two_ray_documents_in_a_file_are_one_too_many(resolve):
    with pytest.raises(ConfigError, match=r"holds 2 Ray documents \(RayCluster, RayJob\)"):
        resolve(ray_cluster(), ray_job())


# files that name no cluster

EXAMPLE = ("  address: http://127.0.0.1:8265", "  token_env: ", "  in_image: ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "is empty"),
        ("# nothing yet\n", "is empty"),
        ("- a\n- b\n", "is a list"),
        ("http://a:8265\n", "is a single value"),
        ("a: 1\n---\nb: 2\n", "a file of 2 YAML documents, none of them Ray's"),
        ("name: x\nentrypoint: y\nimage_uri: z\n", "an Anyscale job"),
        ("compute_config: x\nentrypoint: y\n", "an Anyscale job"),
        ("model: {architecture: resnet50}\ndata: {root: x}\n", "a run file"),
        ("services: {ray: {image: x}}\n", "a compose file"),
        ("apiVersion: apps/v1\nkind: Deployment\n", "a Kubernetes Deployment (apps/v1)"),
        ("resources: {accelerators: A100}\nrun: python x.py\n", "a SkyPilot task"),
        ("cluster_name: x\nmax_workers: 3\n", "a file of `ray up` without `provider`"),
        ("provider: {type: aws}\n", "a file of `ray up` without `cluster_name`"),
        ("adress: http://a:8265\n", "without `address`, with `adress` instead"),
        ("token_env: X\nverify: true\n", "an address file without `address`"),
        ("zebra: 1\nyak: 2\n", "a mapping of yak, zebra"),
    ],
)
def test_a_file_that_names_no_cluster_is_told_with_an_example(resolve, text, found):
    with pytest.raises(ConfigError) as caught:
        resolve(text)
    said = str(caught.value)
    assert found in said
    assert "expected an address file" in said
    assert all(line in said for line in EXAMPLE)


def test_the_example_in_the_message_is_itself_an_address_file(resolve):
    said = refused(str(Path(__file__).parent))
    example = "\n".join(line[2:] for line in said.splitlines() if line.startswith("  "))
    assert resolve(example, environ={"RAY_CLUSTER_TOKEN": "x"}).address == "http://127.0.0.1:8265"


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"\xff\xfe\x00binary", "is no text"), (b"a: [1\nb: 2\n", "is no YAML"), (b"a: b: c\n", "in line 1")],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path, content, says):
    (tmp_path / "cluster.yaml").write_bytes(content)
    assert says in refused(str(tmp_path / "cluster.yaml"))


def test_a_file_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refused("nowhere.yaml")
    assert "for an address write http://10.0.0.5:8265" in refused("10.0.0.5:8265")
    assert "did you mean `local`?" in refused("locl")
    assert "is a folder" in refused(".")


def test_naming_a_cluster_imports_neither_ray_nor_torch(tmp_path):
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(LAUNCHER))
    script = (
        "import sys; from epic_ray.submission.target import resolve_target; "
        f"resolve_target({str(tmp_path / 'cluster.yaml')!r}, None, {{}}); "
        "print(sorted({'ray', 'torch', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
