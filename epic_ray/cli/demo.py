"""`demo`: the whole story on bundled data, offline."""

import time
from pathlib import Path
from typing import Annotated

import typer

from epic_ray.cli.app import Quiet, app, guarded


@app.command(epilog="epic-ray demo  ·  epic-ray demo --out my-demo")
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the digits, the network and the run.")] = Path("runs/demo"),
    quiet: Quiet = False,
) -> None:
    """Train a small network on handwritten digits, fit EPIC to it, and draw explanations: offline, on two cores."""
    from epic_ray import pipeline
    from epic_ray.cli.train import summary
    from epic_ray.config import build_config
    from epic_ray.demo import DIGIT_PREPROCESSING, train_digit_net, write_digits
    from epic_ray.logs import make_reporter
    from epic_ray.report.explained import draw_split
    from epic_ray.run_dir import RunDir

    start, reporter = time.monotonic(), make_reporter(quiet)
    images, weights = out / "digits", out / "digit_net.safetensors"
    count = write_digits(images)
    reporter.say(f"1/4  {count} real handwritten digits (scikit-learn's) lie in {images}/<split>/<digit>")
    reporter.say("2/4  a small convolutional network learns them: the pretrained classifier of this story")
    with reporter.stage("training", None, "epochs") as meter:
        accuracy = train_digit_net(images, weights, on_epoch=lambda *facts: meter.advance(1, f"loss {facts[2]:.3f}"))
    reporter.say(f"     {accuracy:.1%} of the held-out digits are right; weights in {weights}")
    reporter.say("3/4  EPIC reads the digits once and fits U; the network's answers stay what they are")
    settings = {
        "name": "epic",
        "model": {
            "architecture": "epic_ray.demo:digit_net",
            "source": "factory",
            "weights": str(weights),
            "classes": [str(digit) for digit in range(10)],
            "preprocessing": DIGIT_PREPROCESSING,
        },
        "data": {"root": str(images)},
        "features": {"unit_size": 256},
        "output": {"root": str(out)},
    }
    record = pipeline.train(build_config(settings, "demo"), reporter)
    reporter.say("4/4  every held-out digit is explained by its strongest channels; twenty are drawn")
    run, _ = pipeline.open_finished(RunDir(f"{out}/epic"), reporter)
    result = pipeline.explain(run, record, "val")
    with pipeline.finished(run, record):
        files = draw_split(run, "val", 20, 5, reporter)
    print(summary(record, f"{out}/epic"))
    print(
        f"\n{result.images} digits explained, {len(files)} drawn; the whole demo took {time.monotonic() - start:.0f} s."
    )
    print("Open one of the pictures, for example:")
    for file in files[:3]:
        print(f"  {run.run_dir.show(file)}")
