"""The folder cluster/: every file in it is one that Ray, Kubernetes and epic-ray take as it stands.

What is Ray's in a KubeRay manifest is checked against the fields of KubeRay's published types, written out below for
what the files use and no more; what is Kubernetes' against Kubernetes' own schemas.
"""

import re
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

import epic_ray
from epic_ray.submission.kuberay import render_job
from epic_ray.submission.target import resolve_target

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
YAML_FILES = sorted(file.relative_to(CLUSTER).as_posix() for file in CLUSTER.rglob("*.y*ml"))
KINDS = {
    "address.yaml": "address",
    "aws.yaml": "launcher",
    "gcp.yaml": "launcher",
    "kuberay-cluster.yaml": "raycluster",
    "kuberay-job.yaml": "rayjob",
}
LAUNCHERS = [file for file, kind in KINDS.items() if kind == "launcher"]
MANIFESTS = [file for file, kind in KINDS.items() if kind.startswith("ray")]
KUBERNETES = "1.30"

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
POD = {"type": "object", "required": ["spec"]}  # Kubernetes' own schema judges it


def mapping(required: list[str], **properties) -> dict:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


HEAD = mapping(
    ["template"],
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    headService={"type": "object"},
    enableIngress={"type": "boolean"},
    rayStartParams=TEXTS,
    resources=TEXTS,
    labels=TEXTS,
    template=POD,
)
GROUP = mapping(
    ["groupName", "maxReplicas", "minReplicas", "template"],
    groupName={"type": "string"},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    suspend={"type": "boolean"},
    scaleStrategy={"type": "object"},
    rayStartParams=TEXTS,
    resources=TEXTS,
    labels=TEXTS,
    template=POD,
)
CLUSTER_SPEC = mapping(
    ["headGroupSpec"],
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=mapping(
        [],
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
        resources={"type": "object"},
    ),
    authOptions=mapping(["mode"], mode={"enum": ["disabled", "token"]}),
    gcsFaultToleranceOptions={"type": "object"},
    headServiceAnnotations=TEXTS,
    suspend={"type": "boolean"},
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": GROUP},
)
JOB_SPEC = mapping(
    [],
    entrypoint={"type": "string"},
    runtimeEnvYAML={"type": "string"},
    metadata=TEXTS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
    clusterSelector=TEXTS,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    suspend={"type": "boolean"},
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources={"type": "string"},
    submitterPodTemplate=POD,
    submitterConfig=mapping([], backoffLimit=COUNT),
    rayClusterSpec=CLUSTER_SPEC,
)
METADATA = mapping(["name"], name={"type": "string"}, namespace={"type": "string"}, labels=TEXTS, annotations=TEXTS)


def schema(kind: str) -> dict:
    spec = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC}[kind]
    return mapping(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


def read(file: str) -> dict:
    return yaml.safe_load((CLUSTER / file).read_text(encoding="utf-8"))


def resolved(file: str):
    return resolve_target(str(CLUSTER / file), None, {"RAY_CLUSTER_TOKEN": "sesame"})


def pod_templates(document: dict) -> list[dict]:
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def check_manifest(document: dict) -> None:
    jsonschema.validate(document, schema(document["kind"]))
    for template in pod_templates(document):
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)


def pinned(package: str) -> str:
    (version,) = re.findall(rf"(?m)^{package}==(.+)$", (ROOT / "constraints.txt").read_text())
    return version


def test_every_yaml_file_is_one_that_is_judged_here():
    assert set(YAML_FILES) == set(KINDS)


def test_every_file_is_told_of_in_the_readme():
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8")
    files = [file.name for file in CLUSTER.iterdir() if file.is_file() and file.name != "README.md"]
    assert len(files) >= 7
    assert [file for file in files if f"`{file}`" not in readme] == []


@pytest.mark.parametrize("file", KINDS)
def test_every_file_names_a_cluster(file):
    target = resolved(file)
    assert target.kind == KINDS[file]
    assert target.origin.endswith(file)


@pytest.mark.parametrize("file", [file for file in KINDS if file != "address.yaml"])
def test_the_autoscaler_may_bring_gpus_and_the_head_has_none(file):
    target = resolved(file)
    assert target.limits == {"CPU": 32, "GPU": 4}
    assert target.in_image


@pytest.mark.parametrize("file", LAUNCHERS)
def test_ray_up_takes_the_launcher_files(file):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(file))
    validate_config(config)
    head = config["available_node_types"][config["head_node_type"]]
    assert (head["max_workers"], head["resources"]) == (0, {"CPU": 0, "GPU": 0})
    worker = config["available_node_types"]["gpu"]
    assert worker["min_workers"] == 0 < worker["max_workers"]
    # ours, not Ray's defaults, which install another Ray
    assert config["setup_commands"] == read(file)["setup_commands"]


def test_ray_up_would_refuse_a_wrong_one():
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config({**read("aws.yaml"), "max_worker": 3}))


@pytest.mark.parametrize("file", LAUNCHERS)
def test_workers_are_spot_machines_and_the_head_is_not(file):
    types = read(file)["available_node_types"]
    assert "spot" in str(types["gpu"]["node_config"]).lower()
    assert "spot" not in str(types["head"]["node_config"]).lower()


@pytest.mark.parametrize("file", LAUNCHERS)
def test_a_launcher_opens_no_dashboard_to_others(file):
    document = read(file)
    assert "--dashboard-host=127.0.0.1" in " ".join(document["head_start_ray_commands"])
    assert "security_group" not in document["provider"]


@pytest.mark.parametrize("file", LAUNCHERS)
def test_a_launcher_installs_this_release_on_the_ray_that_was_tested(file):
    document = read(file)
    assert document["docker"]["image"].startswith(f"rayproject/ray:{pinned('ray')}-py311")
    assert f"epic-ray=={epic_ray.__version__}" in " ".join(document["setup_commands"])


@pytest.mark.parametrize("file", MANIFESTS)
def test_kubernetes_takes_the_manifests(file):
    check_manifest(read(file))


@pytest.mark.parametrize("file", MANIFESTS)
@pytest.mark.parametrize("new_cluster", [False, True])
def test_kubernetes_takes_the_jobs_made_from_them(file, new_cluster):
    job = render_job(
        resolved(file), "A_run", "python x.py", {"env_vars": {"A": "1"}}, {"a": "b"}, new_cluster=new_cluster
    )
    jsonschema.validate(job, schema("RayJob"))
    if "rayClusterSpec" in job["spec"]:
        check_manifest(job)


def test_the_checks_of_manifests_can_fail():
    def worker(document):
        return document["spec"]["workerGroupSpecs"][0]

    def container(document):
        return worker(document)["template"]["spec"]["containers"][0]

    faults = [
        lambda document: document["spec"].update(headGroup={}),
        lambda document: worker(document).update(maxReplicas="4"),
        lambda document: worker(document)["rayStartParams"].update({"num-gpus": 1}),
        lambda document: document["metadata"]["annotations"].update({"epic-ray/in-image": True}),
        lambda document: container(document).update(imagePullPolice="Always"),
        lambda document: container(document).pop("name"),
        lambda document: worker(document)["template"]["spec"].update(tolerations={}),
    ]
    for fault in faults:
        document = read("kuberay-cluster.yaml")
        check_manifest(document)
        fault(document)
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check_manifest(document)


@pytest.mark.parametrize("file", MANIFESTS)
def test_a_manifest_runs_no_root_asks_for_a_token_and_opens_no_door(file):
    document = read(file)
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["rayVersion"] == pinned("ray")
    for template in pod_templates(document):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = template["spec"]["containers"]
        assert container["image"].endswith(f"/epic-ray:{epic_ray.__version__}")


def test_the_two_manifests_describe_the_same_cluster():
    assert read("kuberay-job.yaml")["spec"]["rayClusterSpec"] == read("kuberay-cluster.yaml")["spec"]


def test_no_file_holds_a_secret_or_an_account_number():
    for file in CLUSTER.rglob("*"):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            assert re.findall(r"AKIA\w{12,}|\b\d{12}\b|-----BEGIN|arn:aws", text) == [], file


# the image


def instructions() -> list[list[str]]:
    text = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text(encoding="utf-8"))
    return [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def test_all_that_the_image_copies_is_there():
    copied = [line[1:] for line in instructions() if line[0] == "COPY"]
    sources = [word for line in copied for word in line[:-1] if not word.startswith("--")]
    assert {"constraints.txt", "epic_ray", "jobs", "pyproject.toml"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_image_has_the_ray_and_the_versions_that_were_tested():
    (base,) = [line[1] for line in instructions() if line[0] == "ARG"]
    assert base == f"RAY_IMAGE=rayproject/ray:{pinned('ray')}-py311-gpu"
    run = " ".join(word for line in instructions() if line[0] == "RUN" for word in line)
    assert "--constraint constraints.txt" in run


def test_the_image_is_not_run_by_root():
    users = [line[1] for line in instructions() if line[0] == "USER"]
    assert users
    assert int(users[-1]) > 0


# the script


def bash(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *arguments], capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin", **environ}
    )


@pytest.fixture
def local(tmp_path):
    """local.sh with a `ray` that starts no Ray: it listens where a head would, and waits to be ended."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ray").write_text(
        "#!/usr/bin/env bash\n"
        f'printf "%s\\n" "$*" >> {tmp_path}/calls\n'
        "ports=$(grep -oE -- '--(port|dashboard-port)=[0-9]+' <<< \"$*\" | cut -d= -f2)\n"
        "sleep 300 & keep=$!\n"
        "echo 'Ray runtime started.'\n"
        "trap 'kill $keep; exit 0' TERM\n"
        f'for port in $ports; do "{sys.executable}" -m http.server "$port" --bind 127.0.0.1 & done\n'
        "wait $keep\n"
    )
    (tools / "ray").chmod(0o755)

    def run(*arguments, **environ):
        folder = str(tmp_path / "cluster")
        path = f"{tools}:/usr/bin:/bin"
        return bash(str(CLUSTER / "local.sh"), *arguments, PATH=path, CLUSTER_FOLDER=folder, **environ)

    yield run
    run("stop")


def free_ports() -> dict[str, str]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return {"GCS_PORT": str(one.getsockname()[1]), "DASHBOARD_PORT": str(other.getsockname()[1])}


@pytest.mark.parametrize("file", sorted(CLUSTER.glob("*.sh")), ids=lambda file: file.name)
def test_scripts_are_sound_to_bash(file):
    done = bash("-n", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    text = file.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert "\t" not in text
    assert "ray stop" not in text  # it ends every Ray of the machine


@pytest.mark.slow
def test_the_local_cluster_starts_a_head_and_workers_and_ends_them_alone(local, tmp_path):
    ports = free_ports()
    bystander = subprocess.Popen(["sleep", "300"])
    try:
        done = local("start", "3", **ports)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"http://127.0.0.1:{ports['DASHBOARD_PORT']}\n"
        running = local("status")
        assert (running.returncode, running.stdout.count("runs")) == (0, 4), running.stdout
        head, *workers = (tmp_path / "calls").read_text().splitlines()
        assert "--head" in head
        assert "--num-cpus=0" in head
        assert "--dashboard-host=127.0.0.1" in head
        assert all(f"--address=127.0.0.1:{ports['GCS_PORT']}" in worker for worker in workers)
        assert "stop it first" in local("start", **ports).stderr
        pids = [file.read_text().split()[0] for file in (tmp_path / "cluster").glob("*.pid")]
        assert local("stop").returncode == 0
        states = subprocess.run(["ps", "-o", "stat=", "-s", ",".join(pids)], capture_output=True, text=True).stdout
        assert [state for state in states.split() if not state.startswith("Z")] == []
        assert bystander.poll() is None
        assert local("status").stdout == "nothing was started\n"
    finally:
        bystander.kill()
        bystander.wait()


def test_a_process_id_that_is_another_process_by_now_is_left_alone(local, tmp_path):
    bystander = subprocess.Popen(["sleep", "300"])
    try:
        (tmp_path / "cluster").mkdir()
        (tmp_path / "cluster" / "head.pid").write_text(f"{bystander.pid}\n1\n")
        assert "head ended" in local("status").stdout
        assert local("stop").returncode == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((), "usage"), (("begin",), "usage"), (("start", "many"), "WORKERS: expected a whole number")],
)
def test_the_local_cluster_tells_how_it_is_used(local, arguments, says):
    done = local(*arguments)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_port_that_is_taken_is_told(local):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = local("start", **{**free_ports(), "DASHBOARD_PORT": port})
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stderr
