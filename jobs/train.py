"""The training job: what Ray starts on a cluster, and what to read to see what a run does.

python jobs/train.py RUN.yaml [a.b=value ...]
"""

import sys
from pathlib import Path

from epic_ray import pipeline
from epic_ray.config import load_config
from epic_ray.errors import ConfigError, EpicError
from epic_ray.interrupts import catch_signals, check, ending
from epic_ray.logs import LineReporter


def main(arguments: list[str]) -> int:
    """Runs the stages of a run file; gives the exit code."""
    try:
        with catch_signals():
            return _train(arguments)
    except KeyboardInterrupt as interrupt:
        message, exit_code = ending(interrupt)
        print(message, file=sys.stderr)
        return exit_code


def _train(arguments: list[str]) -> int:
    try:
        if not arguments or arguments[0].startswith("-"):
            raise ConfigError("usage: python jobs/train.py RUN.yaml [a.b=value ...]")
        config = load_config(Path(arguments[0]), arguments[1:])
        record = pipeline.train(config, LineReporter(), local=False)
    except EpicError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        check()  # what fails after an interrupt that was lost on its way, fails of it
        return error.exit_code
    print(f"{record['name']}: finished {record['finished_at']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
