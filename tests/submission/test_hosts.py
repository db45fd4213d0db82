"""A cluster of three hosts and a laptop, each in a network namespace of its own: nothing is reached by loopback."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import small_settings
from heads import Head, client_environment, command, ray_environment
from test_cluster import alone, basis, tables

from epic_ray.config import dump_config

__all__ = ["alone"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]
HOSTS = ("laptop", "head", "one", "two")


class Network:
    """Hosts behind one switch, by name; `inside` gives the words that run a command on one."""

    def __init__(self) -> None:
        self._prefix = f"er{os.getpid()}"
        self._spaces = ("switch", *HOSTS)

    def make(self) -> None:
        for name in self._spaces:
            _ip("netns", "add", self._space(name))
            _ip("-n", self._space(name), "link", "set", "lo", "up")
        switch = self._space("switch")
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for name in HOSTS:
            port = ("peer", "name", name, "netns", switch)
            _ip("link", "add", "eth0", "netns", self._space(name), "type", "veth", *port)
            _ip("-n", switch, "link", "set", name, "master", "br0", "up")
            _ip("-n", self._space(name), "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", self._space(name), "link", "set", "eth0", "up")

    def end(self) -> None:
        for name in self._spaces:
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True)

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    @staticmethod
    def address(name: str) -> str:
        return f"10.77.0.{1 + HOSTS.index(name)}"

    def inside(self, name: str, hidden: Path | None = None) -> list[str]:
        """`hidden`: a folder that this host does not see."""
        words = ["ip", "netns", "exec", self._space(name)]
        if hidden:
            words += ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none "{hidden}" && exec "$@"', "sh"]
        return words


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    made = Network()
    try:
        made.make()
    except (OSError, subprocess.CalledProcessError) as error:
        made.end()
        pytest.skip(f"needs the right to make network namespaces ({getattr(error, 'stderr', error)})")
    yield made
    made.end()


@contextmanager
def cluster_of(network: Network, hidden: Path | None = None) -> Iterator[Head]:
    """A head that only drives and two hosts that work; from the second, `hidden` is not seen."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        head = Head(Path(folder), 6379, 8265, ray_environment())
        own = f"--node-ip-address={network.address('head')}"
        try:
            head.run(
                "--head", own, "--port=6379", "--num-cpus=0", "--num-gpus=0", "--dashboard-port=8265",
                f"--dashboard-host={network.address('head')}", prefix=network.inside("head"),
            )  # fmt: skip
            _await_nodes(network, 1)
            for number, name in enumerate(("one", "two"), start=2):
                words = (f"--address={network.address('head')}:6379", f"--node-ip-address={network.address(name)}")
                prefix = network.inside(name, hidden if name == "two" else None)
                head.run(*words, "--num-cpus=2", "--num-gpus=0", prefix=prefix)
                _await_nodes(network, number)
            yield head
        finally:
            head.kill()


def _await_nodes(network: Network, count: int) -> None:
    deadline = time.monotonic() + 90
    url = f"http://{network.address('head')}:8265/nodes?view=summary"
    while True:
        done = on(network, "laptop", ["curl", "-s", "-m", "5", url])
        nodes = json.loads(done.stdout)["data"]["summary"] if done.stdout.startswith("{") else []
        if sum(node["raylet"].get("state") == "ALIVE" for node in nodes) == count:
            return
        assert time.monotonic() < deadline, f"{count} hosts have not joined: {done.stdout[-500:]}"
        time.sleep(0.5)


def on(network: Network, host: str, words: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*network.inside(host), *words], cwd=cwd, env=client_environment(), capture_output=True, text=True, timeout=240
    )


def test_a_laptop_submits_to_hosts_across_a_network_and_collects_what_one_machine_would_have_made(
    network, patches, tmp_path, alone
):
    (tmp_path / "run.yaml").write_text(dump_config(small_settings(patches, tmp_path / "runs", name="photos")))
    (tmp_path / "cluster.yaml").write_text(f"address: http://{network.address('head')}:8265\n")

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        done = on(network, "laptop", command(*words, "--cluster", "cluster.yaml"), tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    with cluster_of(network):
        call("submit", "train", "--no-wait")
        assert json.loads(call("status", "--json").stdout)["run"] == "photos"
        call("logs", "-f")
        call("submit", "explain", "--split", "val")
        call("collect", "photos", "copy", "--through-job")
    assert tables(tmp_path / "copy") == tables(alone)
    assert basis(tmp_path / "copy") == basis(alone)


def test_a_host_that_does_not_see_the_images_is_named_before_anything_is_read(network, patches, tmp_path):
    (tmp_path / "run.yaml").write_text(dump_config(small_settings(patches, tmp_path / "runs", name="photos")))
    with cluster_of(network, hidden=patches.parent):
        url = f"http://{network.address('head')}:8265"
        done = on(network, "laptop", command("submit", "train", "--address", url), tmp_path)
    assert done.returncode == 4, done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("ClusterError: "))
    assert error.startswith(
        f"ClusterError: data.root: {patches}: not seen by the machine {network.address('two')} of the"
    )
    assert not list((tmp_path / "runs").rglob("unit-*.parquet"))
