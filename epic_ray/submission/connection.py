"""A connection to a cluster's job server, by Ray's own SDK; whatever goes wrong with it is one clear ClusterError."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests

from epic_ray.errors import ClusterError, ConfigError
from epic_ray.submission import launcher
from epic_ray.submission.target import Target

Result = TypeVar("Result")

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 60.0
_LINE_END = "\n"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Ray lets these win over the address that it is given
_OVERRIDING_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class Connection:
    """A job server that has answered. `address` is its URL, `origin` what the person named, `option` how."""

    def __init__(self, address: str, target: Target, client: Any, ray_version: str) -> None:
        self.address, self.origin, self.option = address, target.origin, target.option
        self.ray_version = ray_version
        self.client = client

    def call(self, ask: Callable[[Any], Result]) -> Result:
        """What a call of the SDK gives. Raises ClusterError, with the server's words for what it refuses."""
        with _clear_errors(self.address, self.origin):
            return ask(self.client)

    def iterate(self, response: requests.Response, block_bytes: int) -> Iterator[bytes]:
        """The blocks of an answer. Raises ClusterError where it breaks off."""
        with _clear_errors(self.address, self.origin):
            yield from response.iter_content(block_bytes)

    def get(self, path: str, stream: bool = False, **query: Any) -> requests.Response:
        """The answer to a GET. Raises ClusterError for one that cannot be had or is an error."""
        with _clear_errors(self.address, self.origin):
            # the SDK's own request: it carries the token, the headers and the certificates
            response: requests.Response = self.client._do_request("GET", path, params=query, stream=stream)
        if response.status_code != 200:
            text = response.text.strip().splitlines()
            raise ClusterError(f"{self.origin}: {path} answers {response.status_code}: {text[-1] if text else '-'}")
        return response


def connect(address: str, target: Target) -> Connection:
    """Connects to the job server at `address`, which `target` means. Raises ClusterError."""
    address = address.rstrip("/")
    _use_no_proxy(address)
    with _clear_errors(address, target.origin), _not_overridden():
        headers = _headers(target)
        answer = requests.get(
            f"{address}/api/version",
            headers=headers,
            verify=target.verify,
            timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
            allow_redirects=False,
        )
        ray_version = _ray_version(answer, address, target.origin)
        client = _client(address, target)
    return Connection(address, target, client, ray_version)


def version_note(connection: Connection) -> str | None:
    """What to say where the cluster's Ray is another than ours: minor versions of Ray do not mix."""
    ours = version("ray")
    if ours.split(".")[:2] == connection.ray_version.split(".")[:2]:
        return None
    return f"the cluster runs Ray {connection.ray_version}, this machine has {ours}; the job runs with the cluster's"


def _client(address: str, target: Target) -> Any:
    """Ray's own client, which by itself would wait for an answer for ever."""
    from ray.job_submission import JobSubmissionClient

    class PunctualClient(JobSubmissionClient):
        def _do_request(self, *arguments: Any, **options: Any) -> requests.Response:
            return super()._do_request(*arguments, **{"timeout": (CONNECT_SECONDS, ANSWER_SECONDS), **options})

    return PunctualClient(address, headers=dict(target.headers), verify=target.verify)


def _use_no_proxy(address: str) -> None:
    """A proxy of the environment has no business on loopback, where tunnels end."""
    host = urlsplit(address).hostname
    if host in _LOOPBACK:
        for name in ("NO_PROXY", "no_proxy"):
            told = os.environ.get(name, "")
            if host not in told:
                os.environ[name] = f"{told},{host}".lstrip(",")


def _headers(target: Target) -> dict[str, str]:
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    return {**target.headers, **get_auth_headers_if_auth_enabled(target.headers)}


def _ray_version(answer: requests.Response, address: str, origin: str) -> str:
    if answer.status_code in (401, 403):
        raise ClusterError(_refused(answer.status_code, origin))
    try:
        return str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise ClusterError(
            f"{origin}: what answers at {address} is no Ray dashboard (status {answer.status_code}); "
            "give the address of the head's dashboard, by default port 8265"
        ) from None


@contextmanager
def _not_overridden() -> Iterator[None]:
    held = {name: os.environ.pop(name) for name in _OVERRIDING_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


@contextmanager
def _clear_errors(address: str, origin: str) -> Iterator[None]:
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        status = 401 if "required" in str(error) else 403
        raise ClusterError(_refused(status, origin)) from None
    except requests.exceptions.SSLError as error:
        raise ClusterError(
            f"{origin}: the certificate of {address} is not trusted ({_last(error)}); "
            "set `verify:` in the address file to the file of its authority"
        ) from None
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout, ConnectionError) as error:
        raise ClusterError(
            f"{origin}: no Ray answers at {address} ({_reason(error)}); is the head running, and its dashboard port "
            "reachable from here?"
        ) from None
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
        raise ClusterError(f"{origin}: {address} is no address of a dashboard ({error})") from None
    except requests.exceptions.RequestException as error:
        raise ClusterError(f"{origin}: the connection to {address} broke off ({_last(error)}); try again") from None
    except (RuntimeError, TypeError, ValueError) as error:  # what the SDK raises for a refusal, and for what it checks
        raise ClusterError(f"{origin}: {str(error).strip().partition(_LINE_END)[0] or type(error).__name__}") from None


def _refused(status: int, origin: str) -> str:
    """One line for a missing or a wrong token; it never shows one."""
    if status == 401:
        return (
            f"{origin}: the cluster asks for a token and none was sent; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
            "(or RAY_AUTH_TOKEN_PATH), or name a variable that holds it as `token_env:` in the address file"
        )
    return (
        f"{origin}: the cluster refuses the token that was sent; it must be the one the head was started with "
        "(RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or the variable that `token_env:` names)"
    )


def _reason(error: Exception) -> str:
    text = str(error)
    known = {
        "refused": "connection refused",
        "timed out": "no answer in time",
        "Name or service not known": "no such host",
        "Temporary failure in name resolution": "no such host",
        "No route to host": "no route to host",
        "Network is unreachable": "network unreachable",
    }
    return next((words for part, words in known.items() if part in text), _last(error))


def _last(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def parse_json(response: requests.Response) -> Any:
    """The JSON of an answer. Raises ClusterError."""
    try:
        return json.loads(response.content)
    except ValueError as error:
        raise ClusterError(f"{response.url}: the answer is no JSON ({error})") from None


@contextmanager
def reach(target: Target) -> Iterator[Connection]:
    """A connection to the cluster that a target names, through a tunnel where it needs one.

    Raises ClusterError, and ConfigError for a RayJob manifest, which starts a cluster that takes no other jobs.
    """
    if target.kind == "rayjob":
        raise ConfigError(
            f"{target.origin}: a RayJob is started by `submit` and looked after by kubectl: `kubectl get rayjobs`, "
            "`kubectl logs`; to reach its cluster while it runs, forward the port 8265 of its head service and give "
            "--address http://127.0.0.1:8265"
        )
    with launcher.reach(target) as address:
        yield connect(address, target)
