"""The training job: what Ray starts on a cluster, and what to read to see what a run does.

python jobs/train.py RUN.yaml [a.b=value ...]
"""

import sys
from pathlib import Path

from epic_ray import pipeline
from epic_ray.config import load_config
from epic_ray.errors import INTERRUPTED_EXIT_CODE, ConfigError, EpicError
from epic_ray.logs import LineReporter


def main(arguments: list[str]) -> int:
    """Runs the stages of a run file; gives the exit code."""
    try:
        if not arguments or arguments[0].startswith("-"):
            raise ConfigError("usage: python jobs/train.py RUN.yaml [a.b=value ...]")
        config = load_config(Path(arguments[0]), arguments[1:])
        record = pipeline.train(config, LineReporter(), local=False)
    except EpicError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    print(f"{record['name']}: finished {record['finished_at']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
