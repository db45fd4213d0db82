"""What `pip install` gives: the wheel is built from this tree and used from a folder of its own."""

import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import epic_ray

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by the project's own build back end, without a network."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; it comes with the extra `dev`")
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    pytest.importorskip("pip", reason="pip unpacks the wheel")
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    python("-m", "pip", "install", *options, "--target", str(folder), str(wheel), cwd=folder)
    return folder


def test_the_wheel_holds_every_file_of_the_package_and_the_jobs(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    package = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "epic_ray").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    jobs = {
        f"epic_ray/_jobs/{file.relative_to(ROOT / 'jobs').as_posix()}"
        for file in (ROOT / "jobs").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {"epic_ray/py.typed", "epic_ray/method/notation.md"} <= package
    assert "epic_ray/_jobs/train.py" in jobs
    # beside them, nothing but the wheel's own record
    assert {name for name in held if ".dist-info/" not in name} == package | jobs


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    about = message_from_string(archive.read(metadata).decode())
    assert (about["Name"], about["Version"]) == ("epic-ray", epic_ray.__version__)
    assert about["License-Expression"] == "Apache-2.0"
    needed = {requirement.split(">")[0].split("[")[0] for requirement in about.get_all("Requires-Dist")}
    assert {"torch", "ray", "pyarrow", "pydantic", "timm", "typer"} <= needed
    assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())


def test_the_installed_package_is_imported_from_where_it_lies_and_has_its_command(installed):
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import epic_ray, epic_ray.config\n"
        "from importlib.metadata import distribution\n"
        "(command,) = (e for e in distribution('epic-ray').entry_points if e.group == 'console_scripts')\n"
        "print(epic_ray.__file__, epic_ray.__version__, command.name, command.load().__module__, sep='\\n')"
    )
    # -P and -s: neither the working tree nor the user's packages
    lines = python("-P", "-s", "-c", code, cwd=installed).splitlines()
    assert Path(lines[0]).resolve() == (installed / "epic_ray" / "__init__.py").resolve()
    assert lines[1:] == [epic_ray.__version__, "epic-ray", "epic_ray.cli.app"]
    (script,) = (installed / "bin").iterdir()
    assert script.name == "epic-ray"
