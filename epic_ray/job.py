"""What the scripts under `jobs/` have in common: their arguments, their faults and their exit codes."""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import epic_ray
from epic_ray.config import RunConfig, load_config
from epic_ray.errors import ConfigError, EpicError
from epic_ray.interrupts import catch_signals, check, ending
from epic_ray.submission.kuberay import RUN_FILE_VARIABLE, unpack_run_file

FROM_ENVIRONMENT = "-"

# set by `epic-ray submit`: the version that sent the job
EXPECTED_VERSION = "EPIC_RAY_EXPECTED_VERSION"


@dataclass
class Arguments:
    """The words after a script's name: one place, settings `a.b=value`, and options `--name` or `--name value`."""

    place: str
    settings: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, words: list[str], usage: str, flags: tuple[str, ...] = (), valued: tuple[str, ...] = ()) -> "Arguments":
        """Raises ConfigError, with the usage, for words that the script does not know."""
        found, rest = cls(""), list(words)
        places: list[str] = []
        while rest:
            word = rest.pop(0)
            name = word.removeprefix("--")
            if word.startswith("--") and name in flags:
                found.options[name] = "true"
            elif word.startswith("--") and name in valued and rest:
                found.options[name] = rest.pop(0)
            elif "=" in word and not word.startswith("-") and places:
                found.settings.append(word)
            elif not word.startswith("-"):
                places.append(word)
            else:
                raise ConfigError(f"{word}: unknown, or without its value; usage: {usage}")
        if len(places) != 1:
            raise ConfigError(f"usage: {usage}")
        found.place = places[0]
        return found


def run_file_settings(arguments: Arguments) -> RunConfig:
    """The settings of the run file that was given, or, for `-`, of the one in the environment. Raises ConfigError."""
    if arguments.place != FROM_ENVIRONMENT:
        return load_config(Path(arguments.place), arguments.settings)
    text = os.environ.get(RUN_FILE_VARIABLE)
    if text is None:
        raise ConfigError(f"{FROM_ENVIRONMENT}: no {RUN_FILE_VARIABLE} in the environment; give a run file")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(unpack_run_file(text), encoding="utf-8")
        return load_config(file, arguments.settings)


def run_job(work: Callable[[list[str]], None], words: list[str]) -> int:
    """Does a job's work; gives the exit code, after one clear line on stderr where it failed."""
    try:
        with catch_signals():
            return _guarded(work, words)
    except KeyboardInterrupt as interrupt:
        message, exit_code = ending(interrupt)
        print(message, file=sys.stderr)
        return exit_code


def _guarded(work: Callable[[list[str]], None], words: list[str]) -> int:
    try:
        _demand_version()
        work(words)
    except EpicError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        check()  # what fails after an interrupt that was lost on its way, fails of it
        return error.exit_code
    return 0


def _demand_version() -> None:
    expected = os.environ.get(EXPECTED_VERSION, epic_ray.__version__)
    if expected != epic_ray.__version__:
        raise ConfigError(
            f"the job was sent by epic-ray {expected}, but the cluster's machines have {epic_ray.__version__}; install "
            "the same there, or leave out --in-image, so that the code travels with the job"
        )
