"""Ray's launcher: found, reached and brought up, by Ray's own code; ssh is a stand-in that forwards on loopback."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError

import pytest
import yaml
from heads import open_directly

from epic_ray.errors import ClusterError
from epic_ray.submission.launcher import down, head_address, reach, tunnel, up
from epic_ray.submission.target import resolve_target

HEAD = {"tags": {"ray-node-type": "head", "ray-node-status": "up-to-date"}, "state": "running"}

# what ssh does with -L PORT:HOST:PORT, and no more; it writes down that it began
SSH = """\
import os, socket, sys, threading
open({log!r}, "a").write(str(os.getpid()) + "\\n")
if {fails!r}:
    sys.exit({fails!r})
local, host, remote = sys.argv[sys.argv.index("-L") + 1].split(":")
def pump(one, other):
    while data := one.recv(65536):
        other.sendall(data)
    other.shutdown(socket.SHUT_WR)
server = socket.create_server(("127.0.0.1", int(local)))
while True:
    near, _ = server.accept()
    try:
        far = socket.create_connection(("127.0.0.1", int(remote)))
    except OSError:
        near.close()
        continue
    for pair in ((near, far), (far, near)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""


class Dashboard(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401)  # as a cluster that asks for a token
        self.end_headers()
        self.wfile.write(b"a dashboard")

    def log_message(self, *_):
        pass


@pytest.fixture
def dashboard():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A launcher file of machines on loopback. Ray keeps their state below RAY_TMPDIR, so nothing else is touched."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()

    def make(*, is_up=True, provider=None, **options):
        document = {
            "cluster_name": "birds",
            # Ray keeps one provider a process for each of these mappings: the folder makes ours another one
            "provider": provider or {"type": "local", "head_ip": "127.0.0.1", "worker_ips": [], "of": str(tmp_path)},
            "auth": {"ssh_user": "nobody"},
            "metadata": {"epic_ray": options},
        }
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(document))
        if is_up:
            (tmp_path / "ray" / "cluster-birds.state").write_text(json.dumps({"127.0.0.1": HEAD}))
        return resolve_target(str(tmp_path / "cluster.yaml"), None, {})

    return make


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Puts the stand-in on PATH; gives what tells the process ids it ran as."""

    def install(fails=0):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "ssh").write_text(f"#!{sys.executable}\n" + SSH.format(log=str(tmp_path / "ssh.log"), fails=fails))
        (folder / "ssh").chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", str(folder) + os.pathsep + os.environ["PATH"])
        return lambda: [int(line) for line in (tmp_path / "ssh.log").read_text().split()]

    return install


def alive(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def test_the_head_of_a_cluster_that_is_up_is_found(cluster):
    assert head_address(cluster()) == "127.0.0.1"


def test_a_cluster_that_is_down_is_told_with_what_to_do(cluster):
    target = cluster(is_up=False)
    with pytest.raises(ClusterError) as caught:
        head_address(target)
    assert "the cluster `birds` is not up" in str(caught.value)
    assert "--up" in str(caught.value)
    assert f"ray up {target.path}" in str(caught.value)


def test_what_ray_prints_goes_to_stderr(cluster, tmp_path, capsys):
    from ray.autoscaler.sdk import configure_logging

    target = cluster()
    failed = {**HEAD, "tags": {**HEAD["tags"], "ray-node-status": "update-failed"}}
    (tmp_path / "ray" / "cluster-birds.state").write_text(json.dumps({"127.0.0.1": failed}))
    configure_logging(log_style="pretty")  # as on a terminal
    try:
        with pytest.raises(ClusterError, match="is not up"):
            head_address(target)
    finally:
        configure_logging(log_style="auto")
    told = capsys.readouterr()
    assert "update-failed" in told.err
    assert told.out == ""


def test_a_provider_that_lacks_its_package_is_told(cluster):
    try:
        import googleapiclient  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("the package is installed here")
    provider = {"type": "gcp", "region": "x", "availability_zone": "x", "project_id": "x"}
    with pytest.raises(ClusterError, match="pip install google-api-python-client"):
        head_address(cluster(provider=provider))


def test_a_provider_that_ray_does_not_know_is_told(cluster):
    with pytest.raises(ClusterError, match="cannot tell the head's address"):
        head_address(cluster(provider={"type": "moon"}))


def test_an_address_in_the_file_needs_no_tunnel(cluster):
    with reach(cluster(is_up=False, address="http://127.0.0.1:9999")) as address:
        assert address == "http://127.0.0.1:9999"


def test_without_a_tunnel_the_head_is_reached_straight(cluster):
    with reach(cluster(tunnel=False, dashboard_port=8270)) as address:
        assert address == "http://127.0.0.1:8270"


def test_a_tunnel_leads_to_the_dashboard_and_ends_with_the_block(cluster, ssh, dashboard, monkeypatch):
    processes = ssh()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # of no concern to a tunnel
    monkeypatch.setenv("no_proxy", "")
    with reach(cluster(dashboard_port=dashboard)) as address:
        port = int(address.rsplit(":", 1)[1])
        assert port != dashboard
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b"401" in connection.recv(1000)
        (pid,) = processes()
        assert alive(pid)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
    with pytest.raises(OSError, match="refused"):
        open_directly(address)


@pytest.mark.slow
def test_a_tunnel_whose_ssh_is_lost_leads_to_the_dashboard_again_at_the_same_address(cluster, ssh, dashboard):
    processes = ssh()
    with reach(cluster(dashboard_port=dashboard)) as address:
        os.kill(processes()[0], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while len(processes()) == 1:
            assert time.monotonic() < deadline, "no ssh was started again"
            time.sleep(0.1)
        deadline = time.monotonic() + 120  # `ray dashboard` takes its time to start on a busy machine
        while True:
            try:
                open_directly(address)
            except HTTPError:
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    assert not alive(processes()[-1])


def test_a_tunnel_that_breaks_off_is_told_with_its_last_words(cluster, ssh):
    ssh(fails=255)
    with pytest.raises(ClusterError, match="the tunnel to the head broke off") as caught, tunnel(cluster()):
        pass
    assert "Failed to forward dashboard" in str(caught.value)


@pytest.mark.slow
def test_a_head_without_a_dashboard_is_told_and_the_tunnel_taken_down(cluster, ssh):
    processes = ssh()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # not listening
        target = cluster(dashboard_port=nobody.getsockname()[1])
        with pytest.raises(ClusterError) as caught, tunnel(target, seconds=10):
            pass
    assert "nothing answered through the tunnel within 10 s" in str(caught.value)
    assert f"port {target.dashboard_port}" in str(caught.value)
    assert not any(alive(pid) for pid in processes())


def test_a_cluster_that_cannot_be_brought_up_or_taken_down_names_the_cause(cluster, capfd):
    target = cluster(provider={"type": "moon"})
    with pytest.raises(
        ClusterError, match=r"the cluster `birds` was not brought up: Unknown provider type moon$"
    ) as caught:
        up(target)
    assert "\n" not in str(caught.value)
    with pytest.raises(ClusterError, match=r"the cluster `birds` was not taken down: .*moon"):
        down(target)
    told = capfd.readouterr()
    assert told.out == ""  # what Ray prints goes to stderr, so that --json stays one document
    assert "moon" in told.err
