"""2,000 files, 40 of them broken in 10 ways: rows with reasons, 1,960 of features, and nothing done twice."""

import io
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from conftest import CLASSES, COLOURS, draw_patch, small_settings
from harness import LINUX, start_here
from PIL import Image

from epic_ray.config import dump_config
from epic_ray.run_dir import RUN, RunDir

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session"), LINUX]

FILES = {"train": 1500, "val": 500}
EACH = {"train": 3, "val": 1}  # broken files of each kind


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_with(place: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A PNG, the body of one of its chunks changed, its checksum right."""
    data = encoded(draw_patch(COLOURS["red"], 1), "PNG")
    start = data.index(place)
    length = int.from_bytes(data[start - 4 : start], "big")
    body = change(data[start + 4 : start + 4 + length])
    chunk = len(body).to_bytes(4, "big") + place + body + zlib.crc32(place + body).to_bytes(4, "big")
    return data[: start - 4] + chunk + data[start + 8 + length :]


PICTURE = draw_patch(COLOURS["green"], 7)
JPEG, PNG, WEBP = (encoded(PICTURE, form) for form in ("JPEG", "PNG", "WEBP"))
BROKEN: dict[str, tuple[bytes | str, str]] = {
    "empty.jpg": (b"", "empty file"),
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated JPEG: "),
    "text.jpg": (b"<html>404 not found</html>", "not an image: 26 bytes that begin with "),
    "truncated.png": (PNG[: len(PNG) // 2], "truncated PNG: "),
    "bomb.png": (png_with(b"IHDR", lambda body: b"\0\0\xea\x60" * 2 + body[8:]), "decompression bomb: "),
    "nowhere.jpg": ("link to nothing", "there is no such file"),
    "loop.jpg": ("link to itself", "is a link that leads nowhere"),
    "corrupt.png": (png_with(b"IDAT", lambda body: body[:40] + b"\xff" * 40 + body[80:]), "damaged PNG: "),
    "damaged.webp": (WEBP[: len(WEBP) // 2], "damaged header: "),
    "white.png": (encoded(Image.new("RGB", (40, 40), "white"), "PNG"), "the classifier's features or logits are not "),
}


def put(folder: Path, name: str, content: bytes | str) -> None:
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        (folder / name).symlink_to(folder / (name if content == "link to itself" else "nothing"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("broken")
    for split, count in FILES.items():
        folders = [root / split / name for name in CLASSES]
        for folder in folders:
            folder.mkdir(parents=True)
        for number in range(count - 10 * EACH[split]):
            place = number % 3
            patch = draw_patch(COLOURS[CLASSES[place]], number)
            patch.save(folders[place] / f"{number:04d}.jpg", quality=90)
        for number in range(EACH[split]):
            for name, (content, _) in BROKEN.items():
                put(folders[number], f"{97 * number:04d}-{name}", content)
    assert sum(not file.is_dir() for file in root.rglob("*")) == 2000
    return root


def rows(run_dir: RunDir, table: str) -> list[dict]:
    return ds.dataset(run_dir.path(f"tables/{table}")).to_table(columns=COLUMNS[table]).to_pylist()


COLUMNS = {"images": ["split", "image_id", "status", "reason"], "features": ["image_id"]}


def test_forty_broken_files_of_two_thousand_cost_forty_rows(images, tmp_path):
    def start(limit: float) -> tuple[int, str]:
        config = small_settings(
            images,
            tmp_path,
            model={"architecture": "tests.stages.networks:odd_net"},
            data={"max_failed_fraction": limit},
            features={"unit_size": 256},
            fit={"prototypes_per_channel": {"start": 20, "end": 20, "rounds": 1}},
            resources={"batch_size": 64},
        )
        run_file = tmp_path / "run.yaml"
        run_file.write_text(dump_config(config), encoding="utf-8")
        return start_here(run_file)

    run_dir = RunDir(f"{tmp_path}/small")
    exit_code, said = start(0.01)
    assert exit_code == 3
    assert said.startswith("InputError: train: 30 of 1500 images failed (2.0%, data.max_failed_fraction is 1.0%): ")
    assert not run_dir.exists(RUN)
    assert start(0.02) == (0, "")
    counts = run_dir.read_json(RUN)["counts"]
    assert (counts["images"], counts["failed"]) == (2000, 40)
    assert counts["decoded"] == counts["forwarded"] == 0, "the first start had done it"

    status = rows(run_dir, "images")
    failed = [row for row in status if row["status"] == "failed"]
    assert len(status) == len({row["image_id"] for row in status}) == 2000
    assert len(failed) == 40
    features = [row["image_id"] for row in rows(run_dir, "features")]
    assert len(features) == len(set(features)) == 1960
    assert set(features) == {row["image_id"] for row in status if row["status"] == "ok"}
    for name, (_, reason) in BROKEN.items():
        found = [row for row in failed if row["image_id"].endswith(f"-{name}")]
        assert len(found) == 4, name
        assert all(row["reason"] and row["reason"].startswith(reason) for row in found), found
    assert sum(run_dir.read_json(RUN)["failures"].values()) == 40
