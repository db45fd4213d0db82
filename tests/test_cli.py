"""Commands as a shell sees them: help at once, exit code and first line on stderr, data on stdout.

Most run in this process: what a command prints and exits with is decided in `guarded`, and each process of its own
costs seconds of imports. Some are real processes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import small_settings
from PIL import Image
from safetensors.torch import save_file
from typer.main import get_command
from typer.testing import CliRunner

import epic_ray
from epic_ray import pipeline
from epic_ray.cli import clusters, demo, explain, jobs, submit, train
from epic_ray.cli.app import app
from epic_ray.config import dump_config, load_config, portable, resolve_paths
from epic_ray.demo import digit_net
from epic_ray.errors import ConfigError
from epic_ray.logs import Reporter
from epic_ray.run_dir import CONFIG, RUN, RunDir, round_file
from epic_ray.submission.kuberay import RUN_FILE_VARIABLE, unpack_run_file
from epic_ray.submission.send import send_train
from epic_ray.submission.target import Target

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = {
    demo: ["demo"],
    explain: ["explain"],
    train: ["init", "validate", "plan", "train"],
    submit: ["submit"],
    jobs: ["list", "status", "logs", "stop", "collect"],
    clusters: ["cluster"],
}
NO_HEAD = ["--address", "http://127.0.0.1:1"]


def command(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def in_shell(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The same as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "epic_ray", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def fails(code: int, first_line: str, *arguments: str | Path) -> str:
    """Runs a command that must end so; gives its whole stderr."""
    exit_code, stdout, stderr = command(*arguments)
    assert stderr.splitlines()[0].startswith(first_line)
    assert (exit_code, stdout) == (code, "")
    assert "Traceback" not in stderr
    return stderr


@pytest.fixture
def run_file(patches, tmp_path) -> Callable[..., Path]:
    """Writes the run file of a small run over the patches, some sections changed."""

    def write(**sections) -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(dump_config(small_settings(patches, tmp_path / "runs", **sections)), encoding="utf-8")
        return file

    return write


# --- help


def test_help_answers_in_half_a_second_without_torch_or_ray():
    code = (
        "import sys; sys.argv = ['epic-ray', '--help']\n"
        "from epic_ray.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code in (None, 0)\n"
        "heavy = {'torch', 'ray', 'timm', 'torchvision', 'pyarrow', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        seconds.append(time.perf_counter() - start)
        assert done.stdout.splitlines()[-1] == "[]"
    for name in [name for names in COMMANDS.values() for name in names]:
        assert f"\n  {name} " in done.stdout
    assert min(seconds) <= 0.5


def test_python_m_epic_ray_is_the_command(tmp_path):
    done = in_shell("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"epic-ray {epic_ray.__version__}\n", "")


def all_commands() -> dict[str, list[str]]:
    found = {"": []}

    def walk(group, words: list[str]) -> None:
        for name, its in group.commands.items():
            found[" ".join([*words, name])] = [*words, name]
            if hasattr(its, "commands"):
                walk(its, [*words, name])

    walk(get_command(app), [])
    return found


@pytest.mark.parametrize("name", sorted(all_commands()))
def test_every_help_ends_with_two_examples(name):
    exit_code, stdout, stderr = command(*all_commands()[name], "--help")
    assert (exit_code, stderr) == (0, "")
    last = " ".join(stdout.strip().rsplit("\n\n", 1)[-1].split())
    examples = last.split(" · ")
    assert len(examples) == 2
    assert all(example.startswith(f"epic-ray {name}") for example in examples)


def test_a_word_that_is_no_command_or_option_ends_with_2():
    for arguments in (["trian"], ["train", "--sett", "a=b"]):
        exit_code, stdout, stderr = command(*arguments)
        assert (exit_code, stdout) == (2, "")
        assert arguments[-1 if len(arguments) == 1 else 1] in stderr


# --- wrong settings: 2


def test_no_run_file_ends_with_2_before_anything_heavy_is_imported(tmp_path):
    done = in_shell("train", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "ConfigError: no run.yaml here; `epic-ray init` writes one, or name a run file or pass --set settings\n"
    )


@pytest.mark.parametrize("name", ["train", "validate", "plan", "submit train"])
def test_unknown_settings_end_with_2_naming_the_nearest_key(name, run_file):
    where = NO_HEAD if name.startswith("submit") else []
    told = fails(2, "ConfigError: ", *name.split(), run_file(), "--set", "fit.sede=1", "--set", "data.rot=x", *where)
    assert told.splitlines() == [
        f"ConfigError: {run_file()}: 2 wrong setting(s)",
        "  data.rot: unknown setting; did you mean `root`?",
        "  fit.sede: unknown setting; did you mean `seed`?",
    ]


def test_an_absent_run_file_ends_with_2(tmp_path):
    fails(2, f"ConfigError: {tmp_path}/no.yaml: no such run file; ", "train", tmp_path / "no.yaml")


def test_a_run_folder_with_other_settings_ends_with_2_naming_them(run_file, tmp_path):
    config = resolve_paths(load_config(run_file()))
    RunDir(str(tmp_path / "runs" / "small")).publish_bytes(CONFIG, dump_config(config).encode())
    for name in ("train", "plan"):
        told = fails(2, f"ConfigError: {tmp_path}/runs/small: holds", name, run_file(fit={"seed": 7}))
        assert told.splitlines()[1:] == [
            "  fit.seed: 42 -> 7",
            "choose another name (--set name=...), or pass --force to redo here what depends on them",
        ]


def test_explain_without_a_finished_run_ends_with_2_and_with_an_unfinished_one_with_6(tmp_path, run_file):
    runs = tmp_path / "runs"
    fails(2, f"ConfigError: {runs}: holds no finished run; `epic-ray train` makes one", "explain", "--root", runs)
    fails(2, "ConfigError: small: no run there", "explain", "small", "--root", runs)
    RunDir(str(runs / "small")).publish_bytes(CONFIG, run_file().read_bytes())
    fails(2, f"ConfigError: {runs}: holds no finished run", "explain", "--root", runs)
    fails(6, f"ResultError: {runs}/small: the run is not finished (no run.json)", "explain", "small", "--root", runs)


def test_a_torn_record_of_a_run_ends_with_6(tmp_path):
    run_dir = RunDir(str(tmp_path / "small"))
    run_dir.publish_bytes(CONFIG, b"a: [")
    run_dir.publish_bytes(RUN, b'{"name": ')
    fails(6, f"ResultError: {run_dir}/run.json: is no JSON", "explain", "small", "--root", tmp_path)
    run_dir.publish_bytes(RUN, b"{}")
    fails(6, f"ResultError: {run_dir}/config.yaml: is no YAML", "explain", "small", "--root", tmp_path)


# --- wrong input: 3


def test_an_unknown_architecture_ends_with_3(run_file):
    model = {"architecture": "mobilenet_v22", "source": "torchvision", "arguments": {}}
    told = fails(3, "InputError: torchvision know no architecture 'mobilenet_v22'", "train", run_file(model=model))
    assert "; near it: " in told
    assert "mobilenet_v2 (torchvision)" in told


def test_a_missing_data_root_ends_with_3(run_file, tmp_path):
    told = fails(
        3,
        f"InputError: {tmp_path}/gone/train: no such folder",
        "train",
        run_file(),
        "--set",
        f"data.root={tmp_path}/gone",
    )
    assert "set data.root or data.splits" in told


def test_a_split_that_does_not_exist_ends_with_3_naming_those_that_do(run_file, patches):
    splits = "data.splits={train: train, val: validation}"
    told = fails(
        3, f"InputError: {patches}/validation: no such folder (split `val`)", "train", run_file(), "--set", splits
    )
    assert "folders there: train, val;" in told


def test_weights_of_another_head_size_end_with_3_saying_what_to_set(run_file, tmp_path):
    save_file(digit_net(10).state_dict(), tmp_path / "ten.safetensors")
    weights = ["--set", f"model.weights={tmp_path}/ten.safetensors"]
    told = fails(
        3, "InputError: the weights file does not fit factory epic_ray.demo:digit_net: ", "train", run_file(), *weights
    )
    assert "the file has a head of 10 classes; pass model.class_count=10" in told


@pytest.mark.parametrize("content", [b"", b"torn", None])
def test_weights_that_cannot_be_read_end_with_3(run_file, tmp_path, content):
    file = tmp_path / "net.safetensors"
    if content is not None:
        file.write_bytes(content)
    begins = f"InputError: {file} is no readable" if content is not None else f"InputError: no weights file {file}"
    fails(3, begins, "train", run_file(), "--set", f"model.weights={file}")


def test_a_folder_that_matches_no_class_ends_with_3_naming_it(run_file, patches):
    classes = {"classes": ["rot", "green", "blue"]}
    fails(
        3,
        f"InputError: {patches}/train: class `red` matches no class of the head (3 classes, ",
        "train",
        run_file(model=classes),
    )


def test_an_output_that_cannot_be_written_ends_with_3(run_file, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    told = fails(
        3,
        f"InputError: {tmp_path}/file/runs/small/locks/",
        "train",
        run_file(),
        "--set",
        f"output.root={tmp_path}/file/runs",
    )
    assert "check rights and free space" in told


# --- clusters: 4


def test_a_head_that_is_not_there_ends_with_4(run_file):
    told = "ClusterError: http://127.0.0.1:1: no Ray answers at http://127.0.0.1:1 (connection refused)"
    fails(4, told, "submit", "train", run_file(), *NO_HEAD)
    for name in (["list"], ["status"], ["logs", "-f"], ["stop"], ["submit", "explain"], ["collect"]):
        fails(4, told, *name, *NO_HEAD)


def test_a_cluster_that_is_not_named_ends_with_2_and_every_way_to_name_one(run_file, monkeypatch):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name in (["submit", "train", run_file()], ["list"], ["status"], ["stop"], ["submit", "explain"]):
        told = fails(2, "ConfigError: no cluster is named; give one of", *name)
        assert all(way in told for way in ("--cluster FILE", "--cluster local", "--address", "RAY_API_SERVER_ADDRESS"))


def test_a_folder_of_the_jobs_own_is_not_replaced_in_silence(tmp_path):
    told = "cluster.yaml: runtime_env.working_dir: the job's folder is what epic-ray sends"
    target = Target("cluster.yaml", "address", "http://127.0.0.1:1", runtime_env={"working_dir": "s3://bucket/a.zip"})
    with pytest.raises(ConfigError, match=told):
        send_train(None, target, small_settings(tmp_path, tmp_path), [])


def test_only_a_launcher_file_can_be_brought_up(run_file):
    fails(2, "ConfigError: http://127.0.0.1:1: is no launcher file", "submit", "train", run_file(), *NO_HEAD, "--up")


def test_the_settings_and_the_cluster_are_judged_together(run_file):
    arguments = ["submit", "train", run_file(), "--set", "fit.sede=1", "--cluster", "absent.yaml"]
    told = fails(2, "ConfigError: --cluster absent.yaml: no such file", *arguments)
    assert "did you mean `seed`?" in told


@pytest.mark.parametrize("kind", ["launcher", "raycluster", "rayjob", "address"])
def test_the_literal_command_takes_a_cluster_yaml_of_every_kind(kind, tmp_path, monkeypatch):
    """In a folder with what `epic-ray init` writes: each is understood, and the head that is not there is named."""
    files = {"launcher": "aws.yaml", "raycluster": "kuberay-cluster.yaml", "rayjob": "kuberay-job.yaml"}
    monkeypatch.chdir(tmp_path)
    assert command("init")[0] == 0
    text = "address: http://127.0.0.1:1\n"
    if kind in files:
        text = (ROOT / "cluster" / files[kind]).read_text(encoding="utf-8")
    if kind == "launcher":
        text = text.replace("    tunnel: true", "    address: http://127.0.0.1:1\n    tunnel: true")
    if kind == "raycluster":
        text = text.replace("epic-ray/address: http://127.0.0.1:8265", "epic-ray/address: http://127.0.0.1:1")
    Path("cluster.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("RAY_CLUSTER_TOKEN", "a-token")
    if kind != "rayjob":
        fails(4, "ClusterError: cluster.yaml: no Ray answers at http://127.0.0.1:1", "submit", "train", "--cluster",
              "cluster.yaml")  # fmt: skip
        return
    exit_code, stdout, _ = command("submit", "train", "--cluster", "cluster.yaml", "--dry-run")
    manifest = yaml.safe_load(stdout)
    assert (exit_code, manifest["kind"]) == (0, "RayJob")
    assert manifest["metadata"]["name"].startswith("my-run-")
    variables = yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])["env_vars"]
    (tmp_path / "back.yaml").write_text(unpack_run_file(variables[RUN_FILE_VARIABLE]), encoding="utf-8")
    assert load_config(tmp_path / "back.yaml") == portable(load_config(Path("run.yaml")))
    assert manifest["spec"]["entrypoint"] == "python -m epic_ray._jobs.train -"


# --- what works without a run


def test_validate_and_plan_print_json_that_a_script_can_read(run_file, tmp_path):
    exit_code, stdout, _ = command("validate", run_file(), "--json")
    assert exit_code == 0
    assert json.loads(stdout)["images"] == {"train": 90, "val": 45}
    exit_code, stdout, _ = command("plan", run_file(), "--json")
    assert exit_code == 0
    planned = json.loads(stdout)
    assert [stage["stage"] for stage in planned["stages"]] == ["images", "features", "fit", "prototypes"]
    assert not any(stage["reused"] for stage in planned["stages"])
    assert command("plan", run_file())[1].splitlines()[0] == f"{tmp_path}/runs/small"
    assert not (tmp_path / "runs").exists()  # neither writes anything


def test_init_writes_a_run_file_that_validates_once_filled_in(patches, tmp_path):
    file = tmp_path / "new.yaml"
    assert command("init", file) == (0, f"{file}\n", "")
    text = file.read_text(encoding="utf-8")
    filled = text.replace("path/to/images", str(patches)).replace("architecture: resnet50", "architecture: resnet18")
    filled = filled.replace("weights: pretrained", "weights: random").replace("class_count: null", "class_count: 3")
    file.write_text(filled, encoding="utf-8")
    exit_code, stdout, stderr = command("validate", file)
    assert exit_code == 0, stderr
    assert stdout.startswith("my-run: settings, images (90 in train, 45 in val) and classifier are in order\n")
    fails(2, f"ConfigError: {file}: exists already", "init", file)
    assert file.read_text(encoding="utf-8") == filled
    assert command("init", file, "--force")[0] == 0
    assert file.read_text(encoding="utf-8") == text
    fails(2, f"ConfigError: {tmp_path}/absent/run.yaml: cannot be written", "init", tmp_path / "absent" / "run.yaml")


def test_run_yaml_is_what_a_command_means_without_a_name(run_file, monkeypatch):
    monkeypatch.chdir(run_file().parent)
    exit_code, stdout, _ = command("validate", "--json")
    assert exit_code == 0
    assert json.loads(stdout)["name"] == "small"


# --- with a finished run


@pytest.fixture(scope="module")
def finished(patches, tmp_path_factory, ray_session) -> RunDir:
    output = tmp_path_factory.mktemp("finished")
    pipeline.train(small_settings(patches, output), Reporter())
    return RunDir(f"{output}/small")


@pytest.mark.ray
def test_train_prints_a_summary_or_json_and_its_talk_on_stderr(finished, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(finished.read_bytes(CONFIG))
    exit_code, stdout, stderr = command("train", file, "--json")
    assert exit_code == 0
    assert json.loads(stdout) == finished.read_json(RUN)
    assert "prototypes: reused" in stderr.splitlines()
    exit_code, stdout, stderr = command("train", file, "--quiet")
    assert (exit_code, stderr) == (0, "")
    assert stdout.splitlines()[0].startswith("small: done in ")
    assert f"epic-ray explain {finished} --split val" in stdout


@pytest.mark.ray
def test_explain_prints_json_and_draws_as_many_as_asked(finished):
    runs = ["--root", finished.root.rsplit("/", 1)[0]]
    exit_code, stdout, stderr = command("explain", *runs, "--limit", "6", "--pictures", "2", "--json", "--quiet")
    assert (exit_code, stderr) == (0, "")
    facts = json.loads(stdout)
    assert (facts["split"], facts["images"], len(facts["pictures"])) == ("val", 6, 2)
    for picture in facts["pictures"]:
        Image.open(picture).verify()
    exit_code, stdout, _ = command("explain", finished.root, "--split", "train", "--pictures", "0", "--quiet")
    assert exit_code == 0
    assert stdout.startswith("small: 90 images of train explained, 0 failed\n")


@pytest.mark.ray
def test_explain_of_an_unknown_split_ends_with_2(finished):
    begins = "ConfigError: split `test`: the run has train, val; add it to data.splits"
    fails(2, begins, "explain", finished.root, "--split", "test", "--quiet")


@pytest.mark.ray
def test_explain_of_one_image_draws_it(finished, patches, tmp_path):
    image = patches / "val" / "red" / "red-0003.png"
    exit_code, stdout, stderr = command("explain", finished.root, image, "--out", tmp_path / "out", "--json", "--quiet")
    assert (exit_code, stderr) == (0, "")
    (facts,) = json.loads(stdout)
    assert facts["image"] == str(image)
    assert [row["rank"] for row in facts["channels"]] == [1, 2, 3, 4]
    Image.open(facts["picture"]).verify()


@pytest.mark.ray
def test_explain_of_what_is_no_image_ends_with_3(finished, patches, tmp_path):
    text = tmp_path / "letter.png"
    text.write_text("Dear Sir or Madam", encoding="utf-8")
    out = ["--out", tmp_path, "--quiet"]
    fails(3, f"InputError: {text}: not an image: 17 bytes", "explain", finished.root, text, *out)
    text.write_bytes(b"")
    fails(3, f"InputError: {text}: empty file; give a whole image file", "explain", finished.root, text, *out)
    fails(3, f"InputError: {tmp_path}/no.png: no such file", "explain", finished.root, tmp_path / "no.png", *out)
    image = patches / "val" / "red" / "red-0003.png"
    told = fails(3, f"InputError: {text}/", "explain", finished.root, image, "--out", text, "--quiet")
    assert "cannot be written" in told


@pytest.mark.ray
def test_explain_with_arguments_that_contradict_ends_with_2(finished, patches):
    image = patches / "val" / "red" / "red-0003.png"
    fails(2, "ConfigError: --split and --limit go with a run", "explain", finished.root, image, "--split", "val")
    fails(2, f"ConfigError: {finished.root}, other: one run at a time", "explain", finished.root, "other")
    told = fails(2, "ConfigError: ", "explain", finished.root, "--rank-by", "beauty", "--quiet")
    assert "explain.rank_by: input should be 'share' or 'score', not 'beauty'" in told


@pytest.mark.ray
def test_a_torn_basis_ends_with_6(finished):
    whole = finished.read_bytes("basis/basis.safetensors")
    try:
        finished.publish_bytes("basis/basis.safetensors", whole[:50])
        arguments = ["explain", finished.root, "--limit", "3", "--quiet"]
        fails(6, f"ResultError: {finished}/basis/basis.safetensors: cannot be read", *arguments)
    finally:
        finished.publish_bytes("basis/basis.safetensors", whole)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults  # tests/faults has another Ctrl-C in `make test`
def test_an_interrupted_train_ends_with_130_and_says_that_it_goes_on(run_file, tmp_path):
    rounds = {"prototypes_per_channel": {"start": 12, "end": 5, "rounds": 20_000}}
    arguments = [sys.executable, "-m", "epic_ray", "train", str(run_file(fit=rounds))]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    run_dir = RunDir(str(tmp_path / "runs" / "small"))
    try:
        deadline = time.monotonic() + 120
        while not run_dir.exists(round_file(3)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
        stdout, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "interrupted; what is finished is kept, the same command goes on from there"
    assert "Traceback" not in stderr
    assert stdout == ""
    assert run_dir.read_mark("features")
    assert run_dir.read_mark("fit") is None
