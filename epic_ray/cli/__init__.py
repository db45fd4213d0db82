"""The command line: `epic-ray`."""

from epic_ray.cli.app import main

__all__ = ["main"]
