"""The training job: what Ray starts on a cluster, and what to read to see what a run does.

python jobs/train.py RUN.yaml [--force] [--retry-failed] [a.b=value ...]

RUN.yaml may be `-`: the run file is then in EPIC_RAY_RUN_FILE, base64 (a RayJob takes no files along).
"""

import sys

from epic_ray import pipeline
from epic_ray.cli.train import summary
from epic_ray.job import Arguments, run_file_settings, run_job
from epic_ray.logs import make_reporter
from epic_ray.storage import join

USAGE = "python jobs/train.py RUN.yaml [--force] [--retry-failed] [a.b=value ...]"


def train(words: list[str]) -> None:
    """Runs the stages of a run file."""
    arguments = Arguments.of(words, USAGE, flags=("force", "retry-failed"))
    config = run_file_settings(arguments)
    force, retry_failed = "force" in arguments.options, "retry-failed" in arguments.options
    record = pipeline.train(config, make_reporter(), force, local=False, retry_failed=retry_failed)
    print(summary(record, join(config.output.root, config.name)))


if __name__ == "__main__":
    sys.exit(run_job(train, sys.argv[1:]))
