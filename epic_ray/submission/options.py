"""How a cluster is reached, as its file says: the keys of an address file, and the same ones elsewhere.

A launcher file has them under `metadata.epic_ray`, a KubeRay manifest as annotations `epic-ray/...`.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epic_ray.errors import ConfigError

ADDRESS_KEYS = ("address", "token_env", "headers", "verify", "runtime_env", "in_image")
ALL_KEYS = (*ADDRESS_KEYS, "dashboard_port", "tunnel")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_SECRETS = re.compile(r"(auth_?)?token|password|passwd|secret|api_?key|credentials?|bearer", re.IGNORECASE)
# headers that carry a login: their value must come from the environment
_LOGINS = {"authorization", "proxy-authorization", "x-ray-authorization", "cookie", "x-api-key"}


@dataclass(frozen=True)
class Options:
    """What a file sets; None where it says nothing."""

    address: str | None = None
    headers: dict[str, str] | None = None
    verify: bool | str | None = None
    runtime_env: dict[str, Any] | None = None
    in_image: bool | None = None
    dashboard_port: int | None = None
    tunnel: bool | None = None


def read_options(
    values: Any, where: str, folder: Path, environ: Mapping[str, str], *, address_file: bool = False
) -> Options:
    """The options of a mapping; paths in it are relative to `folder`. Raises ConfigError, naming `where`."""
    known = ADDRESS_KEYS if address_file else ALL_KEYS
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping of {', '.join(known)}, not {_kind(values)}")
    for key in values:
        _check_key(str(key), known, where)
    return Options(
        address=_of_type(values, "address", str, "an address such as http://HOST:8265", where),
        headers=_headers(values, where, environ),
        verify=_verify(values, where, folder),
        runtime_env=_runtime_env(values, where),
        in_image=_of_type(values, "in_image", bool, "true or false", where),
        dashboard_port=_port(values, where),
        tunnel=_of_type(values, "tunnel", bool, "true or false", where),
    )


def _check_key(key: str, known: tuple[str, ...], where: str) -> None:
    if key in known:
        return
    if _SECRETS.fullmatch(key):
        raise ConfigError(
            f"{where}: `{key}` is refused: secrets do not belong in files. Put it into an environment variable and "
            "write that variable's name, for example token_env: RAY_CLUSTER_TOKEN"
        )
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
    raise ConfigError(f"{where}: unknown key `{key}`; {hint}")


def _kind(value: Any) -> str:
    """What a value is, without showing it: it may be a secret."""
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _of_type(values: dict[str, Any], key: str, kind: type, expected: str, where: str) -> Any:
    if key not in values:
        return None
    if not isinstance(values[key], kind):
        raise ConfigError(f"{where}: {key}: expected {expected}, not {_kind(values[key])}")
    return values[key]


def _runtime_env(values: dict[str, Any], where: str) -> dict[str, Any] | None:
    given = _of_type(values, "runtime_env", dict, "a mapping, Ray's runtime environment", where)
    variables = (given or {}).get("env_vars", {})
    if not isinstance(variables, dict):
        raise ConfigError(f"{where}: runtime_env.env_vars: expected a mapping of names to text, not {_kind(variables)}")
    for name, value in variables.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ConfigError(f"{where}: runtime_env.env_vars.{name}: expected text (quote it), not {_kind(value)}")
    return given


def _port(values: dict[str, Any], where: str) -> int | None:
    port = values.get("dashboard_port")
    if "dashboard_port" in values and (not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536):
        raise ConfigError(f"{where}: dashboard_port: expected a port from 1 to 65535, for example 8265, not {port!r}")
    return port


def _verify(values: dict[str, Any], where: str, folder: Path) -> bool | str | None:
    verify = values.get("verify")
    if "verify" not in values or isinstance(verify, bool):
        return verify
    if not isinstance(verify, str):
        raise ConfigError(f"{where}: verify: expected true, false or a file of certificates, not {_kind(verify)}")
    file = folder / Path(verify).expanduser()
    if not file.is_file():
        raise ConfigError(f"{where}: verify: {file} is no file; name the certificates of the authority that signed")
    return str(file.absolute())


def _headers(values: dict[str, Any], where: str, environ: Mapping[str, str]) -> dict[str, str] | None:
    given = _of_type(values, "headers", dict, "a mapping of names to text", where)
    variable = _of_type(values, "token_env", str, "the name of an environment variable", where)
    headers = {}
    for name, value in (given or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ConfigError(f"{where}: headers.{name}: expected text, not {_kind(value)}")
        if name.lower() in _LOGINS and not _REFERENCE.search(value):
            raise ConfigError(
                f"{where}: headers.{name}: a login written out is refused: secrets do not belong in files. Use "
                f"token_env, or name a variable in the value: {name}: Basic ${{MY_LOGIN}}"
            )
        for variable_name in _REFERENCE.findall(value):
            filled = _variable(variable_name, f"headers.{name}", where, environ)
            value = value.replace(f"${{{variable_name}}}", filled)
        headers[name] = value
    if variable is not None:
        if any(name.lower() == "authorization" for name in headers):
            raise ConfigError(f"{where}: both token_env and headers.Authorization are given; leave one of them out")
        headers["Authorization"] = f"Bearer {_variable(variable, 'token_env', where, environ)}"
    return headers if given is not None or variable is not None else None


def _variable(name: str, key: str, where: str, environ: Mapping[str, str]) -> str:
    if not _VARIABLE.fullmatch(name):
        # what stands there may be the token itself, so it is not shown
        raise ConfigError(
            f"{where}: {key}: expected the name of an environment variable (letters, digits, `_`), not its value"
        )
    value = environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"{where}: {key}: the environment variable {name} is not set; export {name}=...")
    if not value.isprintable():
        raise ConfigError(f"{where}: {key}: the value of {name} has line breaks or the like and fits no header")
    return value
