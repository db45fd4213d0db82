"""`explain`: a split of a finished run, or one new image."""

from pathlib import Path
from typing import Annotated, Any

import typer

from epic_ray.cli.app import Json, Quiet, app, guarded, print_json
from epic_ray.errors import ConfigError, InputError


@app.command(epilog="epic-ray explain --split val  ·  epic-ray explain runs/my-run photo.jpg")
@guarded
def explain(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [IMAGE]...", help="Run folder or name (default: the newest finished), and image files."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to explain; default val.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many images, spread evenly over the split.")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of an image.")] = None,
    prototypes: Annotated[int | None, typer.Option(min=0, help="Prototypes drawn beside a channel.")] = None,
    pictures: Annotated[int | None, typer.Option(min=0, help="Images drawn.")] = None,
    rank_by: Annotated[str | None, typer.Option(help="share (exact) or score (the paper's).")] = None,
    root: Annotated[str, typer.Option(help="Folder or address of the runs.")] = "runs",
    out: Annotated[Path, typer.Option(help="Folder for pictures of single images.")] = Path(),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Explain a split by its channels and prototypes, or single image files."""
    from epic_ray import pipeline
    from epic_ray.logs import make_reporter
    from epic_ray.run_dir import find_run

    run_name, files = _sort(what or [])
    if files and (split or limit):
        raise ConfigError("--split and --limit go with a run, not with image files")
    reporter = make_reporter(quiet)
    run, record = pipeline.open_finished(find_run(run_name, root), reporter)
    run.config = _with_options(run.config, channels, prototypes, pictures, rank_by)
    if files:
        _explain_files(run, files, out, as_json)
        return
    result = pipeline.explain(run, record, split or "val", limit)
    with pipeline.finished(run, record):
        drawn = draw(run, result.split, reporter)
    if as_json:
        print_json(vars(result) | {"table": explained_table(run, result), "pictures": drawn})
    else:
        print(split_summary(run, result, drawn))


def _sort(words: list[str]) -> tuple[str | None, list[Path]]:
    """The run and the image files among the arguments."""
    from epic_ray.stages.sources.base import IMAGE_SUFFIXES

    files = [Path(word) for word in words if word.lower().endswith(IMAGE_SUFFIXES)]
    others = [word for word in words if not word.lower().endswith(IMAGE_SUFFIXES)]
    if len(others) > 1:
        raise ConfigError(f"{', '.join(others)}: one run at a time; image files end in {', '.join(IMAGE_SUFFIXES)}")
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise InputError(f"{', '.join(missing)}: no such file")
    return (others[0] if others else None), files


def _with_options(
    config: Any, channels: int | None, prototypes: int | None, pictures: int | None, rank_by: str | None
) -> Any:
    from epic_ray.config import build_config

    asked = {
        "channels_per_image": channels,
        "prototypes_per_channel": prototypes,
        "pictures": pictures,
        "rank_by": rank_by,
    }
    values = config.model_dump()
    values["explain"] |= {key: value for key, value in asked.items() if value is not None}
    return build_config(values, "explain")


def draw(run: Any, split: str, reporter: Any) -> list[str]:
    """Draws images of an explained split; gives the pictures' addresses."""
    from epic_ray.report.explained import draw_split

    options = run.config.explain
    files = draw_split(run, split, options.pictures, options.prototypes_per_channel, reporter)
    return [run.run_dir.show(file) for file in files]


def explained_table(run: Any, result: Any) -> str:
    return str(run.run_dir.show(f"tables/explanations/{result.split}"))


def split_summary(run: Any, result: Any, pictures: list[str]) -> str:
    """What a person wants to know of an explained split."""
    lines = [
        f"{run.config.name}: {result.images} images of {result.split} explained, {result.failed} failed",
        f"  logits     largest difference {result.max_abs_difference:.1e}, same top-1 {result.top1_agreement:.2%}",
        f"  table      {explained_table(run, result)}",
    ]
    if pictures:
        lines.append(f"  pictures   {len(pictures)} in {pictures[0].rsplit('/', 1)[0]}")
    return "\n".join(lines)


def _explain_files(run: Any, files: list[Path], out: Path, as_json: bool) -> None:
    from epic_ray.report.explained import Illustrator, rows_of, safe_name
    from epic_ray.stages.images import Address

    options = run.config.explain
    illustrator = Illustrator(run, options.prototypes_per_channel)
    results: list[dict[str, Any]] = []
    taken: set[Path] = set()
    for path in files:
        address = Address(str(path.absolute()))
        seen, explained = illustrator.explain(address, options.channels_per_image, options.rank_by)
        rows = rows_of(explained, run, seen.image.size)
        target = _target(out, safe_name(path.name), taken)
        try:
            out.mkdir(parents=True, exist_ok=True)
            illustrator.draw(path.name, address, rows).save(target)
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error}); give --out a writable folder") from None
        results.append({"image": str(path), "picture": str(target), "channels": rows})
    if as_json:
        print_json(results)
        return
    for result in results:
        first = result["channels"][0]
        name = run.classes.names[first["predicted"]]
        print(f"{result['image']}: {name} ({first['probability']:.1%}), logit {first['logit']:.3f}")
        for row in result["channels"]:
            print(
                f"  channel {row['channel']:<5} {row['sign']:<8} share {row['share']:+.3f}  score {row['score']:+.3f}"
                f"  purity {row['purity']:.2f}"
            )
        print(f"  picture {result['picture']}")


def _target(out: Path, name: str, taken: set[Path]) -> Path:
    """The picture's file; images of one name in different folders get a number."""
    candidates = (out / f"{name}{number}-explained.png" for number in ("", *(f"-{n}" for n in range(2, 10_000))))
    target = next(path for path in candidates if path not in taken)
    taken.add(target)
    return target
