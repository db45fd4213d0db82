"""The job that packs a run's output for a machine that does not see its folder: `epic-ray collect`.

python jobs/archive.py RUN [--all] [--partial]

The archive lies among the logs of the Ray session, from where the dashboard gives it out, until this job is stopped.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path

from epic_ray.job import Arguments, run_job
from epic_ray.run_dir import RunDir
from epic_ray.stages.resources import start_ray
from epic_ray.submission.gather import announce, session_logs

USAGE = "python jobs/archive.py RUN [--all] [--partial]"
LIFETIME_SECONDS = 3600.0


def archive(words: list[str]) -> None:
    """Packs a run, says where the archive is, and keeps it until it has been fetched."""
    from epic_ray.collection import write_archive

    arguments = Arguments.of(words, USAGE, flags=("all", "partial"))
    start_ray(local=False)
    file = session_logs() / f"epic-ray-archive-{time.time_ns():x}.tar"
    everything, partial = "all" in arguments.options, "partial" in arguments.options
    try:
        facts = write_archive(RunDir(arguments.place), file, everything=everything, partial=partial)
        announce(file, facts.size_bytes)
        time.sleep(LIFETIME_SECONDS)
    finally:
        with suppress(FileNotFoundError):
            Path(file).unlink()


if __name__ == "__main__":
    sys.exit(run_job(archive, sys.argv[1:]))
