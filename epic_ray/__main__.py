"""`python -m epic_ray` is `epic-ray`."""

from epic_ray.cli import main

main()
