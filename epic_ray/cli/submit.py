"""`submit train` and `submit explain`: a job sent to a cluster and followed to its end."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from epic_ray.cli.app import Address, Cluster, Json, Quiet, guarded, print_json, submit
from epic_ray.cli.train import Force, RetryFailed, RunFile, Settings, read_run_file
from epic_ray.errors import ConfigError

NoWait = Annotated[bool, typer.Option("--no-wait", help="Return once the job is sent.")]
Up = Annotated[bool, typer.Option("--up", help="Start the cluster of a launcher file first.")]
InImage = Annotated[bool, typer.Option("--in-image", help="The cluster's machines have epic-ray; send no code.")]


@submit.command(
    "train", epilog="epic-ray submit train --cluster cluster.yaml  ·  epic-ray submit train --cluster local"
)
@guarded
def submit_train(
    run_file: RunFile = None,
    cluster: Cluster = None,
    address: Address = None,
    settings: Settings = None,
    force: Force = False,
    retry_failed: RetryFailed = False,
    no_wait: NoWait = False,
    up: Up = False,
    in_image: InImage = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="RayJob: print the manifest; else show the job.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train on a Ray cluster: send the run, follow its log, end with its exit code."""
    from epic_ray.config import portable
    from epic_ray.logs import make_reporter
    from epic_ray.submission import send
    from epic_ray.submission.jobs import demand_free

    target, config = _both(
        lambda: _target(cluster, address, in_image), lambda: portable(read_run_file(run_file, settings))
    )
    reporter = make_reporter(quiet)
    flags = [name for name, given in (("--force", force), ("--retry-failed", retry_failed)) if given]
    if target.kind == "rayjob":
        _render(target, config, flags, dry_run, as_json)
        return
    send.demand_resources(config, target)
    if dry_run:
        print_json({"run": config.name, "root": send.root_of(config), "cluster": target.origin, "flags": flags})
        return

    def sent(connection: Any) -> Any:
        demand_free(connection, config.name)
        reporter.say(f"{config.name}: submitting to {target.origin}")
        if note := send.sharing_note(config, target):
            reporter.say(f"  {note}")
        return send.send_train(connection, target, config, flags)

    _send_and_follow(target, up, no_wait, as_json, quiet, reporter, sent)


@submit.command(
    "explain",
    epilog="epic-ray submit explain --cluster cluster.yaml  ·  epic-ray submit explain photos --cluster local",
)
@guarded
def submit_explain(
    run: Annotated[str | None, typer.Argument(help="A submitted run's name, or a run's folder or address.")] = None,
    cluster: Cluster = None,
    address: Address = None,
    split: Annotated[str, typer.Option(help="Split to explain.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="So many images, spread evenly over the split.")] = None,
    settings: Settings = None,
    no_wait: NoWait = False,
    in_image: InImage = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Explain a split of a run on the cluster that has it; default: the run trained there last."""
    from epic_ray.logs import make_reporter
    from epic_ray.submission import send
    from epic_ray.submission.jobs import all_jobs, demand_free

    target = _target(cluster, address, in_image)
    reporter = make_reporter(quiet)
    words = ["--split", split, *(["--limit", str(limit)] if limit else []), *(settings or [])]

    def sent(connection: Any) -> Any:
        found = send.find_submitted(connection, run, all_jobs(connection))
        demand_free(connection, found.name)
        reporter.say(f"{found.name}: submitting to {target.origin}")
        return send.send_explain(connection, target, found, words)

    _send_and_follow(target, False, no_wait, as_json, quiet, reporter, sent)


def _both(*ask: Callable[[], Any]) -> list[Any]:
    """What each gives. Raises one ConfigError for the faults of all."""
    found, faults = [], []
    for each in ask:
        try:
            found.append(each())
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return found


def _target(cluster: str | None, address: str | None, in_image: bool) -> Any:
    from dataclasses import replace

    from epic_ray.submission.target import resolve_target

    target = resolve_target(cluster, address)
    return replace(target, in_image=True) if in_image else target


def _render(target: Any, config: Any, flags: list[str], dry_run: bool, as_json: bool) -> None:
    """A RayJob manifest: printed, or given to kubectl."""
    from epic_ray.submission import kuberay, send

    manifest = send.render_train(target, config, flags)
    if dry_run:
        print_json(manifest) if as_json else print(kuberay.dump(manifest), end="")
        return
    kuberay.apply(manifest)
    name, namespace = manifest["metadata"]["name"], manifest["metadata"]["namespace"]
    print(f"rayjob/{name} applied in {namespace}; follow it: kubectl -n {namespace} logs -f -l job-name={name}")


def _send_and_follow(
    target: Any, up: bool, no_wait: bool, as_json: bool, quiet: bool, reporter: Any, sent: Callable[[Any], Any]
) -> None:
    from epic_ray.logs import quiet_ray
    from epic_ray.submission import launcher
    from epic_ray.submission.connection import reach, version_note
    from epic_ray.submission.follow import ending_of, exit_code_of, fault_of, follow, log_of, settled

    quiet_ray()
    if up:
        launcher.demand_launcher(target)
        launcher.up(target)
    with reach(target) as connection:
        if note := version_note(connection):
            reporter.say(f"  {note}")
        job = sent(connection)
        reporter.say(f"{job.id}: sent to {connection.address}; {hints(job.run, target)}")
        if no_wait:
            print_json(_facts(job)) if as_json else print(job.id)
            return
        try:
            job = settled(connection, follow(connection, job, reporter))
        except KeyboardInterrupt:
            with suppress(Exception):
                reporter.say(f"{job.id}: no longer followed, and goes on; {hints(job.run, target)}")
            raise typer.Exit(130) from None
        code = exit_code_of(job)
        if code and quiet:  # no progress, but what went wrong
            print(fault_of(log_of(connection, job)), file=sys.stderr)
    print(ending_of(job), file=sys.stderr) if code else reporter.say(ending_of(job))
    if as_json:
        print_json(_facts(job))
    if code:
        raise typer.Exit(code)


def hints(run: str, target: Any) -> str:
    """How to follow and stop a run on a cluster, as a person would type it."""
    return f"follow: epic-ray logs -f {run}{target.option}, stop: epic-ray stop {run}{target.option}"


def _facts(job: Any) -> dict[str, Any]:
    from epic_ray.submission.follow import exit_code_of

    code = None if job.is_running else exit_code_of(job)
    return {"run": job.run, "id": job.id, "job": job.what, "status": job.status, "exit_code": code, "root": job.root}
