"""`cluster up` and `cluster down`: the cluster of a launcher file."""

from typing import Annotated, Any

import typer

from epic_ray.cli.app import cluster, guarded

File = Annotated[str, typer.Argument(metavar="FILE", help="A launcher file of Ray: cluster_name and provider.")]


@cluster.command("up", epilog="epic-ray cluster up aws.yaml  ·  epic-ray cluster up cluster/gcp.yaml")
@guarded
def up(file: File) -> None:
    """Start the cluster, or bring it up to date without a restart."""
    from epic_ray.submission import launcher

    target = _launcher(file)
    launcher.up(target)
    print(f"{target.name}: up; epic-ray submit train --cluster {file}")


@cluster.command("down", epilog="epic-ray cluster down aws.yaml  ·  epic-ray cluster down cluster/gcp.yaml")
@guarded
def down(file: File) -> None:
    """End every machine of the cluster; what lies on their own disks is lost."""
    from epic_ray.submission import launcher

    target = _launcher(file)
    launcher.down(target)
    print(f"{target.name}: down")


def _launcher(file: str) -> Any:
    from epic_ray.submission.launcher import demand_launcher
    from epic_ray.submission.target import resolve_target

    target = resolve_target(file, None)
    demand_launcher(target)
    return target
