"""A run on a real cluster, from another process's point of view: submitted, followed, stopped, resumed, collected."""

import itertools
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import small_settings
from heads import Head, client_environment, command, epic_ray, free_port, start_head
from safetensors.torch import load_file

from epic_ray import pipeline
from epic_ray.config import dump_config
from epic_ray.logs import Reporter
from epic_ray.run_dir import RunDir

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

SECRET = "0123456789abcdef-secret-of-these-tests"
SLOW_NET = """
import os, time
from epic_ray.demo import DigitNet

class SlowNet(DigitNet):
    def forward(self, images):
        if len(images) == 16 and os.path.exists(self.gate + ".slow"):
            time.sleep(3)
        while len(images) == 16 and os.path.exists(self.gate):
            time.sleep(0.05)
        return super().forward(images)

def net(gate, class_count=3):
    made = SlowNet(class_count)
    made.gate = gate
    return made
"""


class Laptop:
    """A folder with a run file and the code of its network; nothing of it lies on the cluster's machines."""

    def __init__(self, folder: Path, images: Path, name: str, **sections: object) -> None:
        self.folder, self.name, self.gate = folder, name, folder / "gate"
        folder.mkdir(parents=True, exist_ok=True)
        model = {"architecture": "slow_net:net", "arguments": {"gate": str(self.gate), "class_count": 3}}
        self.config = small_settings(images, folder / "runs", name=name, **{"model": model, **sections})
        (folder / "run.yaml").write_text(dump_config(self.config), encoding="utf-8")
        (folder / "slow_net.py").write_text(SLOW_NET, encoding="utf-8")

    @property
    def run_dir(self) -> RunDir:
        return RunDir(f"{self.folder}/runs/{self.name}")

    def call(self, head: Head, *words: str) -> subprocess.CompletedProcess[str]:
        environment = client_environment(head.token)
        return epic_ray(*words, "--address", head.address, folder=self.folder, environment=environment)

    def start(self, head: Head, *words: str, address: str = "") -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(*words, "--address", address or head.address), cwd=self.folder, text=True,
            env=client_environment(head.token), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait(self, head: Head, until) -> dict:
        """The status of the run as soon as `until` holds of it."""
        deadline = time.monotonic() + 120
        while True:
            done = self.call(head, "status", self.name, "--json")
            facts = json.loads(done.stdout) if done.returncode == 0 else {}
            if facts and until(facts):
                return facts
            assert time.monotonic() < deadline, (done.stderr, facts)
            time.sleep(0.5)


def tables(folder: Path) -> dict[str, object]:
    """What a folder's tables hold, by their files."""
    files = sorted((folder / "tables").rglob("*.parquet"))
    names = {file: file.relative_to(folder).as_posix() for file in files}
    return {
        names[file]: pq.read_table(file).replace_schema_metadata(None)
        for file in files
        if not names[file].startswith(("tables/selection", "tables/features"))
    }


def basis(folder: Path) -> bytes:
    return load_file(folder / "basis" / "basis.safetensors")["U"].numpy().tobytes()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head that only drives and asks for a token, and two raylets that work."""
    with start_head(workers=2, cpus=2, head_cpus=0, token=SECRET) as head:
        yield head


_numbers = itertools.count(1)


@pytest.fixture
def laptop(patches: Path, tmp_path: Path) -> Laptop:
    """Of each test its own, with a run of its own name: the head is shared."""
    return Laptop(tmp_path / "laptop", patches, f"photos{next(_numbers)}")


@pytest.fixture(scope="module")
def alone(patches: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """The folder of the same run on one machine, trained and explained."""
    folder = tmp_path_factory.mktemp("alone")
    config = small_settings(patches, folder / "runs", name="photos")
    pipeline.train(config, Reporter())
    run, record = pipeline.open_finished(RunDir(f"{folder}/runs/photos"), Reporter())
    pipeline.explain(run, record, "val")
    return folder / "runs" / "photos"


def test_a_run_is_submitted_followed_collected_explained_and_collected_again(head, laptop, alone):
    sent = laptop.call(head, "submit", "train", "--no-wait", "--json")
    assert sent.returncode == 0, sent.stderr
    assert json.loads(sent.stdout)["id"] == f"{laptop.name}-1"
    assert sent.stderr.splitlines()[0] == f"{laptop.name}: submitting to {head.address}"

    followed = laptop.call(head, "logs", "-f", laptop.name)
    assert followed.returncode == 0, followed.stderr
    assert "features: 135 images in" in followed.stderr
    assert followed.stderr.splitlines()[-1].startswith(f"{laptop.name}-1: finished in ")
    assert "@epic-ray" not in followed.stderr
    facts = laptop.wait(head, lambda facts: facts["status"] == "SUCCEEDED")
    assert (facts["exit_code"], facts["stages"]["features"], facts["failed"]) == (0, 135, 0)

    collected = epic_ray("collect", str(laptop.run_dir), "copy", "--json", folder=laptop.folder)  # it is seen from here
    assert collected.returncode == 0, collected.stderr
    copy = laptop.folder / "copy"
    wanted = {name: table for name, table in tables(alone).items() if "explanations" not in name}
    assert tables(copy) == wanted
    assert basis(copy) == basis(alone)

    explained = laptop.call(head, "submit", "explain", "--split", "val")
    assert explained.returncode == 0, explained.stderr
    assert "45 images of val explained" in explained.stderr
    drawn = epic_ray("explain", "--split", "val", "--json", folder=laptop.folder)  # of the newest run, from here
    assert drawn.returncode == 0, drawn.stderr
    assert (json.loads(drawn.stdout)["images"], json.loads(drawn.stdout)["forwarded"]) == (45, 45)
    assert json.loads(drawn.stdout)["pictures"]
    again = laptop.call(head, "collect", laptop.name, "copy", "--json")
    assert again.returncode == 0, again.stderr
    assert tables(copy) == tables(alone)
    listed = json.loads(laptop.call(head, "list", "--json").stdout)
    own = [job for job in listed if job["root"] == str(laptop.run_dir) and job["what"] != "archive"]
    assert [(job["what"], job["status"]) for job in own] == [("train", "SUCCEEDED"), ("explain", "SUCCEEDED")]
    files = [file for file in laptop.folder.rglob("*") if file.is_file()]
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == [], "a token is written nowhere"


def test_the_first_line_of_a_submit_takes_less_than_two_seconds_of_work(head, laptop):
    sending = laptop.start(head, "submit", "train", "--no-wait")
    line = sending.stderr.readline()
    used = cpu_seconds(sending.pid)
    assert line.startswith(f"{laptop.name}: submitting to "), line + sending.stderr.read()
    assert used < 2, "its imports counted"
    sending.communicate()
    assert laptop.call(head, "stop", laptop.name).returncode == 0


def cpu_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_failing_job_ends_the_command_with_its_own_code_and_words(head, laptop, tmp_path):
    done = laptop.call(head, "submit", "train", "--set", f"data.root={tmp_path / 'nowhere'}", "--set", "name=failing")
    assert done.returncode == 3, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("InputError: ")]
    assert done.stderr.splitlines()[-1] == "failing-1: failed with exit code 3"


def test_too_few_resources_are_told_before_the_job_waits_for_them(head, laptop):
    arguments = ("--set", "resources.gpus_per_actor=1", "--set", "name=greedy", "--quiet")
    done = laptop.call(head, "submit", "train", *arguments)
    assert done.returncode == 4, done.stderr
    first, last = done.stderr.splitlines()
    assert first.startswith("ClusterError: resources: ")
    assert "1 GPU(s) asked, but Ray has 0" in first
    assert last == "greedy-1: failed with exit code 4"


@pytest.mark.faults
def test_a_running_run_keeps_its_name_can_be_left_and_stopped_and_its_half_is_not_collected(head, laptop):
    laptop.gate.touch()
    following = laptop.start(head, "submit", "train")
    facts = laptop.wait(head, lambda facts: facts["stage"] == "features" and facts["actors_alive"])
    assert (facts["done"], facts["total"], facts["status"]) == (0, 135, "RUNNING")

    taken = laptop.call(head, "submit", "train")
    assert taken.returncode == 2
    first = taken.stderr.splitlines()[0]
    assert first.startswith(
        f"ConfigError: {laptop.name}: {laptop.name}-1 (train) is running on {head.address}; follow it by"
    )

    left = laptop.start(head, "logs", "-f", laptop.name)
    time.sleep(4)
    left.send_signal(signal.SIGINT)
    _, said = left.communicate(timeout=30)
    assert left.returncode == 130, said
    assert (
        f"{laptop.name}-1: no longer followed, and goes on; follow: epic-ray logs -f {laptop.name}"
        in said.splitlines()[-1]
    )

    stopped = laptop.call(head, "stop", laptop.name)
    assert (stopped.returncode, stopped.stdout) == (0, f"{laptop.name}-1: stopped\n"), stopped.stderr
    _, said = following.communicate(timeout=60)
    assert following.returncode == 143, said
    assert said.splitlines()[-1].startswith(f"{laptop.name}-1: was stopped; what is finished is kept")
    laptop.gate.unlink()

    half = laptop.call(head, "collect", laptop.name, "copy")
    assert half.returncode == 6, half.stderr
    assert half.stderr.startswith("ResultError: ")
    assert not (laptop.folder / "copy").exists()
    partial = epic_ray("collect", str(laptop.run_dir), "copy", "--partial", folder=laptop.folder)
    assert partial.returncode == 0, partial.stderr
    assert not (laptop.folder / "copy" / "run.json").exists()

    other = laptop.call(head, "submit", "train", "--set", "fit.seed=7")
    assert other.returncode == 2, other.stderr
    assert "holds a run with other settings" in other.stderr
    again = laptop.call(head, "submit", "train", "--set", "resources.feature_actors=1")  # which may change
    assert again.returncode == 0, again.stderr


class Proxy:
    """A TCP proxy whose connections a test may cut."""

    def __init__(self, port: int) -> None:
        self._behind, self._open = port, []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._behind))
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> int:
        count = 0
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                count += 1
        self._open.clear()
        return count

    def close(self) -> None:
        self._server.close()
        self.cut()


@pytest.mark.faults
def test_a_log_stream_that_drops_is_taken_up_again_without_loss_or_repetition(head, laptop):
    laptop.gate.touch()
    proxy = Proxy(head.dashboard_port)
    try:
        following = laptop.start(head, "submit", "train", address=proxy.address)
        laptop.wait(head, lambda facts: facts["stage"] == "features" and facts["actors_alive"])
        assert proxy.cut() > 0
        laptop.gate.unlink()
        time.sleep(3)
        proxy.cut()
        _, said = following.communicate(timeout=120)
    finally:
        proxy.close()
    assert following.returncode == 0, said
    lines = said.splitlines()
    assert len([line for line in lines if line.startswith(f"{laptop.name}: slow_net:net")]) == 1
    assert len([line for line in lines if line.startswith("features: 135 images in")]) == 1


@pytest.mark.faults
def test_a_head_that_was_lost_and_started_again_resumes_the_run(patches, tmp_path):
    laptop = Laptop(tmp_path / "laptop", patches, "photos", features={"unit_size": 16})
    slow = laptop.gate.with_name("gate.slow")
    slow.touch()
    with start_head(head_cpus=4) as head:
        following = laptop.start(head, "submit", "train")
        laptop.wait(head, lambda facts: facts["stage"] == "features" and facts["done"])
        laptop.gate.touch()
        head.kill()
        units = laptop.run_dir.list("tables/images")
        before = sum(pq.read_metadata(laptop.run_dir.path(unit)).num_rows for unit in units)
        assert 0 < before < 135
        laptop.gate.unlink()
        slow.unlink()
        head.port, head.dashboard_port = free_port(), free_port()
        head.start(workers=0, cpus=0, head_cpus=4)
        done = laptop.call(head, "submit", "train")
        assert done.returncode == 0, done.stderr
        following.kill()
        following.communicate()
    record = laptop.run_dir.read_json("run.json")
    assert f"features: {len(units)} of {record['units']['all']} units are there already" in done.stderr
    counts = record["counts"]
    assert (counts["decoded"], counts["total"]["images"]) == (135 - before, 135)


def test_a_cluster_with_a_token_takes_the_right_one_alone(head, laptop):
    (laptop.folder / "cluster.yaml").write_text(yaml.safe_dump({"address": head.address, "token_env": "MY_TOKEN"}))

    def submit(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
        return epic_ray("submit", "train", *words, folder=laptop.folder, environment=environment)

    missing = submit(client_environment(), "--address", head.address)
    assert missing.returncode == 4
    told = f"ClusterError: {head.address}: the cluster asks for a token and none was sent"
    assert missing.stderr.startswith(told)
    wrong = submit(client_environment() | {"MY_TOKEN": "another-token"}, "--cluster", "cluster.yaml")
    assert wrong.returncode == 4
    assert wrong.stderr.startswith("ClusterError: cluster.yaml: the cluster refuses the token that was sent")
    assert len(wrong.stderr.splitlines()) == 1
    right = submit(client_environment() | {"MY_TOKEN": SECRET}, "--cluster", "cluster.yaml", "--no-wait")
    assert right.returncode == 0, right.stderr
    assert SECRET not in right.stderr + right.stdout
    assert laptop.call(head, "stop", laptop.name).returncode == 0
