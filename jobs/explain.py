"""The job that explains a split of a finished run.

python jobs/explain.py RUN [--split val] [--limit N] [a.b=value ...]
"""

import sys

from epic_ray import pipeline
from epic_ray.cli.explain import draw, split_summary
from epic_ray.errors import ConfigError
from epic_ray.job import Arguments, run_job
from epic_ray.logs import make_reporter
from epic_ray.run import with_free_settings
from epic_ray.run_dir import RunDir

USAGE = "python jobs/explain.py RUN [--split val] [--limit N] [explain.b=value ...]"


def explain(words: list[str]) -> None:
    """Explains a split into the run's tables, and draws some of its images."""
    arguments = Arguments.of(words, USAGE, valued=("split", "limit"))
    split, limit = arguments.options.get("split", "val"), arguments.options.get("limit")
    if limit is not None and not (limit.isdigit() and int(limit)):
        raise ConfigError(f"--limit {limit}: must be a number of images, at least 1")
    reporter = make_reporter()
    run, record = pipeline.open_finished(RunDir(arguments.place), reporter)
    run.config = with_free_settings(run.config, arguments.settings)
    result = pipeline.explain(run, record, split, int(limit) if limit else None, local=False)
    with pipeline.finished(run, record):
        pictures = draw(run, split, reporter)
    print(split_summary(run, result, pictures))


if __name__ == "__main__":
    sys.exit(run_job(explain, sys.argv[1:]))
