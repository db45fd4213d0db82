"""What a person is told when a cluster cannot be reached: real servers on loopback that are no heads of Ray."""

import json
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from epic_ray.errors import ClusterError
from epic_ray.submission import connection
from epic_ray.submission.connection import connect
from epic_ray.submission.jobs import all_jobs
from epic_ray.submission.target import Target

SECRET = "a-token-that-nobody-may-see"
Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts an HTTP server that answers everything alike, and keeps the headers that it was sent."""
    servers: list[ThreadingHTTPServer] = []
    ended = threading.Event()

    def start(
        status: int, body: str, context: ssl.SSLContext | None = None, seen: list | None = None, jobs: int | None = None
    ) -> str:
        """jobs: the status of the job table; 0: it never answers."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if jobs is not None and self.path.startswith("/api/jobs"):
                    if jobs:
                        self.send_error(jobs)
                    else:
                        ended.wait(30)
                    return
                if seen is not None:
                    seen.append(dict(self.headers))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http{'s' if context else ''}://127.0.0.1:{server.server_port}"

    yield start
    ended.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def target(address: str, **options: object) -> Target:
    return Target("cluster.yaml", "address", address, **options)


def test_a_head_that_is_not_there_is_one_line_with_its_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ClusterError) as fault:
        connect(address, target(address))
    assert str(fault.value).startswith(f"cluster.yaml: no Ray answers at {address} (connection refused); is the head")
    assert "\n" not in str(fault.value)


def test_a_head_that_never_answers_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError, match="no answer in time"):
            connect(address, target(address))


def test_a_missing_token_is_one_clear_line_that_says_where_it_goes(serve):
    address = serve(401, "Unauthorized: Missing authentication token")
    with pytest.raises(ClusterError, match=r"asks for a token and none was sent; set RAY_AUTH_MODE=token and") as fault:
        connect(address, target(address))
    assert "\n" not in str(fault.value)


def test_a_wrong_token_is_one_clear_line_that_does_not_show_it(serve):
    seen: list[dict[str, str]] = []
    address = serve(403, "Forbidden: Invalid authentication token", seen=seen)
    with pytest.raises(ClusterError, match="refuses the token that was sent") as fault:
        connect(address, target(address, headers={"Authorization": f"Bearer {SECRET}"}))
    assert seen[0]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_job_table_that_never_answers_is_given_up_in_time(serve, monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.5)
    address = serve(200, json.dumps({"ray_version": "2.60.0"}), jobs=0)
    with pytest.raises(ClusterError, match="no answer in time"):
        all_jobs(connect(address, target(address)))


def test_a_head_that_has_lost_its_table_of_jobs_is_a_clear_error(serve):
    address = serve(200, json.dumps({"ray_version": "2.60.0"}), jobs=500)
    with pytest.raises(ClusterError, match=r"^cluster.yaml: .*500"):
        all_jobs(connect(address, target(address)))


@pytest.mark.parametrize(("status", "body"), [(200, "<html>a router</html>"), (404, ""), (302, ""), (200, "[]")])
def test_what_is_no_ray_dashboard_is_not_taken_for_one(serve, status, body):
    address = serve(status, body)
    with pytest.raises(ClusterError, match=r"is no Ray dashboard \(status"):
        connect(address, target(address))


def test_a_head_too_old_for_jobs_is_refused(serve):
    address = serve(200, json.dumps({"version": "1", "ray_version": "1.8.0"}))
    with pytest.raises(ClusterError, match=r"1\.8\.0"):
        connect(address, target(address))


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1 that nobody has signed but itself, with its key."""
    file = tmp_path / "own.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", file, "-out", tmp_path / "certificate.pem"]
    subprocess.run(command, check=True, capture_output=True)
    file.write_text(file.read_text() + (tmp_path / "certificate.pem").read_text())
    return file


def test_a_certificate_of_ones_own_needs_its_authority(serve, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    address = serve(200, json.dumps({"ray_version": "2.60.0"}), context)
    with pytest.raises(ClusterError, match=r"certificate of .* is not trusted .*set `verify:`"):
        connect(address, target(address))
    assert connect(address, target(address, verify=str(certificate))).ray_version == "2.60.0"


def test_the_address_asked_for_wins_over_rays_own_variables(serve, monkeypatch):
    address = serve(200, json.dumps({"ray_version": "2.60.0"}))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://192.0.2.1:8265")
    monkeypatch.setenv("RAY_ADDRESS", "http://192.0.2.2:8265")
    assert connect(f"{address}/", target(address)).address == address
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://192.0.2.1:8265"


def test_another_ray_on_the_cluster_is_told(serve):
    address = serve(200, json.dumps({"ray_version": "2.9.1"}))
    note = connection.version_note(connect(address, target(address)))
    assert note is not None
    assert note.startswith("the cluster runs Ray 2.9.1, this machine has")
