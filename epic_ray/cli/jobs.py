"""`list`, `status`, `logs`, `stop` and `collect`: submitted jobs and what they leave."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from epic_ray.cli.app import Address, Cluster, Json, Quiet, app, guarded, print_json
from epic_ray.cli.submit import hints

Run = Annotated[
    str | None, typer.Argument(help="A submitted run's name or a job's id; default: the newest on the cluster.")
]


@app.command("list", epilog="epic-ray list --cluster cluster.yaml  ·  epic-ray list --address http://HOST:8265 --json")
@guarded
def list_jobs(cluster: Cluster = None, address: Address = None, as_json: Json = False) -> None:
    """Show the jobs of epic-ray that a cluster knows, the oldest first."""
    from epic_ray.submission.jobs import all_jobs

    with _reached(cluster, address) as (connection, _):
        jobs = all_jobs(connection)
    if as_json:
        print_json([vars(job) for job in jobs])
        return
    rows = [
        (job.id, job.what, job.status.lower(), _when(job.started_at), _duration(job.seconds), job.model) for job in jobs
    ]
    _print_table(("id", "job", "status", "started", "ran", "model"), rows)


@app.command(epilog="epic-ray status --cluster cluster.yaml  ·  epic-ray status photos --cluster local --json")
@guarded
def status(run: Run = None, cluster: Cluster = None, address: Address = None, as_json: Json = False) -> None:
    """Show how a job stands: its stage, images done of all, rate, time left, failures, actors."""
    from epic_ray.submission.follow import standing
    from epic_ray.submission.jobs import newest_job

    with _reached(cluster, address) as (connection, _):
        stand = standing(connection, newest_job(connection, run))
    if as_json:
        print_json(stand.facts())
        return
    job = stand.job
    ended = "" if job.exit_code is None else f", exit code {job.exit_code}"
    print(f"{job.id}  {job.what}  {job.status.lower()}{ended}  {_duration(job.seconds)}")
    for stage in stand.stages:
        of = f" of {stage.total:,}" if stage.total else ""
        left = f", about {_duration(stage.seconds_left)} left" if stage.seconds_left and job.is_running else ""
        note = f" ({stage.note})" if stage.note else ""
        print(f"  {stage.stage:<14} {stage.done:,}{of} {stage.unit}, {stage.rate:.1f}/s{left}{note}")
    if stand.actors_alive is not None and job.is_running:
        print(f"  {'actors':<14} {stand.actors_alive} alive")
    print(f"  {'run':<14} {job.root}")


@app.command(epilog="epic-ray logs -f --cluster cluster.yaml  ·  epic-ray logs photos-2 --cluster local")
@guarded
def logs(
    run: Run = None,
    cluster: Cluster = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
) -> None:
    """Print a job's log; with -f follow it to the job's end, with its exit code."""
    from epic_ray.logs import LineReporter, make_reporter
    from epic_ray.submission.follow import Replay, ending_of, exit_code_of, log_of, settled
    from epic_ray.submission.follow import follow as follow_job
    from epic_ray.submission.jobs import newest_job

    with _reached(cluster, address) as (connection, target):
        job = newest_job(connection, run)
        if not follow:
            replay = Replay(LineReporter(sys.stdout))
            replay.feed(log_of(connection, job))
            replay.close()
            return
        reporter = make_reporter()
        try:
            job = settled(connection, follow_job(connection, job, reporter))
        except KeyboardInterrupt:
            reporter.say(f"{job.id}: no longer followed, and goes on; {hints(job.run, target)}")
            raise typer.Exit(130) from None
    reporter.say(ending_of(job))
    if code := exit_code_of(job):
        raise typer.Exit(code)


@app.command(epilog="epic-ray stop photos --cluster cluster.yaml  ·  epic-ray stop photos-2 --cluster local")
@guarded
def stop(run: Run = None, cluster: Cluster = None, address: Address = None, as_json: Json = False) -> None:
    """Stop a running job; what is finished is kept, and submitting it again goes on from there."""
    from epic_ray.errors import ConfigError
    from epic_ray.submission import jobs

    with _reached(cluster, address) as (connection, _):
        job = jobs.newest_job(connection, run)
        if not job.is_running:
            raise ConfigError(f"{job}: is not running ({job.status.lower()})")
        job = jobs.stop(connection, job)
    print_json(vars(job)) if as_json else print(f"{job.id}: {job.status.lower()}")


@app.command(
    epilog="epic-ray collect photos --cluster cluster.yaml  ·  epic-ray collect s3://bucket/runs/photos photos"
)
@guarded
def collect(
    run: Annotated[
        str | None, typer.Argument(help="A submitted run's name, or a run's folder or address; default: the newest.")
    ] = None,
    destination: Annotated[Path | None, typer.Argument(metavar="[DEST]", help="Default: collected/<run>.")] = None,
    cluster: Cluster = None,
    address: Address = None,
    partial: Annotated[bool, typer.Option("--partial", help="Take what is whole of a half-done run.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Features, maps and rounds too.")] = False,
    through_job: Annotated[
        bool, typer.Option("--through-job", help="Fetch it through a job, even where its folder is seen from here.")
    ] = False,
    root: Annotated[str, typer.Option(help="Folder or address of the runs, where no cluster is named.")] = "runs",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy a run's outputs here, checked, whole or not at all."""
    from epic_ray.logs import make_reporter
    from epic_ray.run_dir import find_run
    from epic_ray.storage import is_uri
    from epic_ray.submission.gather import gather, gather_remote
    from epic_ray.submission.target import has_target

    reporter = make_reporter(quiet)
    options = {"partial": partial, "everything": everything}
    is_place = run is not None and (is_uri(run) or "/" in run)
    if not (cluster or address) and (is_place or not has_target(cluster, address)):
        result = gather(find_run(run, root), destination, reporter, **options)
    else:
        with _reached(cluster, address) as (connection, target):
            result = gather_remote(connection, target, run, destination, reporter, **options, through_job=through_job)
    if as_json:
        print_json(result)
        return
    print(f"{result['run']}: {result['files']} files, {result['size_bytes'] / 1e6:.1f} MB in {result['folder']}")
    for finding in result["findings"]:
        print(f"  half done  {finding}")


def _reached(cluster: str | None, address: str | None) -> Any:
    """A connection to the cluster that was named, and its target."""
    from contextlib import contextmanager

    from epic_ray.logs import quiet_ray
    from epic_ray.submission.connection import reach
    from epic_ray.submission.target import resolve_target

    @contextmanager
    def both() -> Any:
        target = resolve_target(cluster, address)
        quiet_ray()
        with reach(target) as connection:
            yield connection, target

    return both()


def _when(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "-"


def _duration(seconds: float | None) -> str:
    """Seconds as a person reads them."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _print_table(names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[place]) for row in (names, *rows)) for place in range(len(names))]
    for row in (names, *rows):
        print("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())
