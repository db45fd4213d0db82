"""The Typer application: its commands, and what a fault becomes for a person and for a script.

Commands import torch and ray inside, so that help answers at once.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import epic_ray
from epic_ray.errors import EpicError

app = typer.Typer(
    name="epic-ray",
    help="Explain any pretrained image classifier by prototypes, at ImageNet scale.",
    epilog="epic-ray demo  ·  epic-ray train run.yaml && epic-ray explain --split val",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
submit = typer.Typer(
    help="Submit a job to a Ray cluster.",
    epilog="epic-ray submit train --cluster cluster.yaml  ·  epic-ray submit explain --split val --cluster local",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(submit, name="submit")
cluster = typer.Typer(
    help="Start and end the cluster of a launcher file.",
    epilog="epic-ray cluster up aws.yaml  ·  epic-ray cluster down aws.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cluster, name="cluster")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="FILE",
        help="A launcher file of Ray, a KubeRay manifest, an address file, an address, or `local`.",
    ),
]
Address = Annotated[str | None, typer.Option("--address", metavar="URL", help="Ray's dashboard, http://HOST:8265.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Ends a command with the exit code of its fault and one clear message on stderr."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        from epic_ray.interrupts import catch_signals, check, ending

        try:
            with catch_signals():
                try:
                    return command(*arguments, **options)
                except EpicError as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr)
                    check()  # what fails after an interrupt that was lost on its way, fails of it
                    raise typer.Exit(error.exit_code) from None
                except typer.Exit:
                    raise
                except Exception:
                    check()
                    raise
        except KeyboardInterrupt as interrupt:
            message, exit_code = ending(interrupt)
            print(message, file=sys.stderr)
            raise typer.Exit(exit_code) from None

    return run


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _version(asked: bool) -> None:
    if asked:
        print(f"epic-ray {epic_ray.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script."""
    from epic_ray.cli import clusters, demo, explain, jobs, submit, train

    del clusters, demo, explain, jobs, submit, train  # imported for the commands they add
    app()
