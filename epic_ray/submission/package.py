"""What travels to the cluster with a job: our code, the job scripts and the run file, a few hundred KiB in all."""

import importlib.machinery
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import epic_ray
from epic_ray.config import RunConfig, dump_config
from epic_ray.errors import ConfigError

MOST_BYTES = 1024**2
RUN_FILE = "run.yaml"
_SUFFIXES = (".py", ".md", ".typed", ".html", ".css", ".js", ".j2")


@contextmanager
def job_folder(config: RunConfig | None, in_image: bool, architecture: str | None = None) -> Iterator[Path]:
    """A temporary folder with all that a job needs: the `working_dir` of its runtime environment.

    architecture: of a run whose settings are not at hand. in_image: the cluster's machines have epic-ray installed, and
    only the run file and a factory's code travel. Raises ConfigError where it would be larger than a MiB.
    """
    with tempfile.TemporaryDirectory(prefix="epic-ray-job-") as name:
        folder = Path(name)
        if not in_image:
            package = Path(epic_ray.__file__).parent
            _copy(package, folder / "epic_ray")
            _copy(job_scripts(), folder / "jobs")
        if config:
            (folder / RUN_FILE).write_text(dump_config(config), encoding="utf-8")
            architecture = config.model.architecture if config.model.source == "factory" else None
        if architecture and ":" in architecture:
            _copy_factory(architecture, folder)
        size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size_bytes > MOST_BYTES:
            raise ConfigError(
                f"model.architecture: with the code of {architecture} the upload "
                f"would take {size_bytes} bytes, more than {MOST_BYTES}; install that code on the cluster's machines"
            )
        yield folder


def job_scripts() -> Path:
    """The folder of the job scripts: the repository's, or the one that an installed wheel carries."""
    package = Path(epic_ray.__file__).parent
    inside = package / "_jobs"
    return inside if inside.is_dir() else package.parent / "jobs"


def script(job: str, in_image: bool) -> str:
    """The shell words that start a job script."""
    return f"python -m epic_ray._jobs.{job}" if in_image else f"python jobs/{job}.py"


def _copy(source: Path, target: Path) -> None:
    for file in sorted(source.rglob("*")):
        parts = file.relative_to(source).parts
        if file.is_file() and file.suffix in _SUFFIXES and "__pycache__" not in parts and "_jobs" not in parts:
            (target / Path(*parts)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / Path(*parts))


def _copy_factory(architecture: str, folder: Path) -> None:
    """The module of a factory that lies where the command was started, as `load` finds it there; what is installed is
    expected on the cluster's machines as well."""
    top = architecture.partition(":")[0].split(".")[0]
    own = (Path.cwd(), *(Path(place) for place in sys.path if place and "site-packages" not in place))
    found = importlib.machinery.PathFinder.find_spec(top, [str(place) for place in own])
    if top == "epic_ray" or found is None or found.origin is None or not found.origin.endswith(".py"):
        return
    origin = Path(found.origin)
    if "site-packages" in origin.parts or Path(sys.base_prefix) in origin.parents:
        return
    if origin.name == "__init__.py":
        _copy(origin.parent, folder / top)
    else:
        shutil.copyfile(origin, folder / origin.name)
