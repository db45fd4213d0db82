"""Reading images by their rows: what is wrong with one is its own fault, what is wrong with a store is not."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import (  # noqa: F401
    Gate,
    Store,
    as_nobody,
    gated_s3,
    listing,
    only_train,
    s3,
    some_pictures,
    write_form,
    write_tar,
)

from epic_ray import storage
from epic_ray.errors import InputError
from epic_ray.stages.reading import ImageReader, UnreadableError


def rows(*places: tuple) -> pa.Table:
    """Rows of (uri, byte_offset, row, size_bytes)."""
    columns = zip(*places, strict=True)
    types = {"uri": pa.string(), "byte_offset": pa.int64(), "row": pa.int64(), "size_bytes": pa.int64()}
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)], list(types))


def told(found: Iterator[bytes | OSError]) -> list[bytes | str]:
    """Bytes, and the reasons for those that are not there."""
    answers: list[bytes | str] = []
    for data in found:
        assert isinstance(data, bytes | UnreadableError)
        answers.append(data if isinstance(data, bytes) else str(data))
    return answers


def parquet(path: Path, images: list, row_group_size: int = 4, **options) -> str:
    pq.write_table(pa.table({"image": images}), path, row_group_size=row_group_size, **options)
    return str(path)


# --- on a disk


def test_a_file_that_cannot_be_read_is_told_and_the_next_one_is_read(tmp_path):
    (tmp_path / "good.png").write_bytes(b"good")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    expected = {
        "absent.png": "there is no such file",
        "good.png/x.png": "there is no such file",
        "folder.png": "is a folder",
        "loop.png": "is a link that leads nowhere",
        "pipe.png": "is no regular file",
        "nul\0.png": "embedded null byte",
        "n" * 300: "its name is too long",
        "good.png": b"good",
    }
    table = rows(*((f"{tmp_path}/{name}", None, None, None) for name in expected))
    assert told(ImageReader().read_many(table)) == list(expected.values())
    for name, reason in expected.items():
        if isinstance(reason, str):
            with pytest.raises(UnreadableError, match=f"^{reason}$"):
                ImageReader().read(f"{tmp_path}/{name}")


def test_a_file_without_the_right_to_it_is_told(as_nobody):  # noqa: F811
    (as_nobody / "x.png").write_bytes(b"x")
    (as_nobody / "x.png").chmod(0)
    with pytest.raises(UnreadableError, match=r"^no right to read it$"):
        ImageReader().read(f"{as_nobody}/x.png")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file whose disk fails: /proc/self/mem")
def test_a_failing_disk_is_asked_three_times_within_a_second():
    start = time.monotonic()
    with pytest.raises(UnreadableError, match=r"^Input/output error$"):
        ImageReader().read("/proc/self/mem")
    assert 0.7 < time.monotonic() - start < 3


def test_a_tar_file_that_ends_early_is_told(tmp_path):
    for number in (0, 1):
        write_tar(tmp_path / f"train-{number}.tar", [(f"{key}.jpg", bytes([number]) * 600) for key in "ab"])
    _, table = listing(only_train(tmp_path))
    os.truncate(tmp_path / "train-0.tar", 2100)
    whole = [bytes([1]) * 600] * 2
    assert told(ImageReader().read_many(table)) == [bytes(600), "file ends early, after 2100 bytes", *whole]
    (tmp_path / "train-0.tar").unlink()
    assert told(ImageReader().read_many(table)) == ["there is no such file"] * 2 + whole
    order = [3, 0, 2, 1]
    answers = told(ImageReader().read_many(table.take(order)))
    assert answers == [whole[0], "there is no such file", whole[0], "there is no such file"]


def test_rows_that_a_parquet_file_does_not_have_are_told(tmp_path):
    uri = parquet(tmp_path / "x.parquet", [b"0", None, b"2", b"3", b"4"])
    expected = {4: b"4", 5: "the file has no row 5, but 5 rows", -1: "the file has no row -1, but 5 rows"}
    expected |= {1: "its bytes are null in the Parquet file", 0: b"0", 2: b"2"}
    table = rows(*((uri, None, row, None) for row in expected))
    assert told(ImageReader("image").read_many(table)) == list(expected.values())
    for column in ("photo", "image.bytes", None):
        with pytest.raises(UnreadableError, match="the file has no column"):
            ImageReader(column).read(uri, row=0)
    with pytest.raises(UnreadableError, match="there is no such file"):
        ImageReader("image").read(f"{tmp_path}/absent.parquet", row=0)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UnreadableError, match="Parquet"):
        ImageReader("image").read(f"{tmp_path}/torn.parquet", row=0)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_damaged_row_group_costs_its_own_rows(tmp_path, compression):
    images = [os.urandom(1000) for _ in range(12)]
    uri = parquet(tmp_path / "x.parquet", images, compression=compression, use_dictionary=False)
    chunk = pq.ParquetFile(uri).metadata.row_group(1).column(0)
    with open(uri, "r+b") as file:
        file.seek(chunk.data_page_offset)
        file.write(b"\xff" * 60)
    answers = told(ImageReader("image").read_many(rows(*((uri, None, row, None) for row in range(12)))))
    assert answers[:4] + answers[8:] == images[:4] + images[8:]
    assert all(isinstance(reason, str) and "\n" not in reason and reason for reason in answers[4:8])


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="counts what is read by /proc/self/io")
def test_rows_in_order_read_each_row_group_once_and_of_it_one_column(tmp_path):
    images, others = [os.urandom(50_000) for _ in range(40)], [os.urandom(200_000) for _ in range(40)]
    table = pa.table({"mask": others, "image": [{"path": "x", "bytes": image} for image in images]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=10)
    _, table = listing(only_train(tmp_path, "x.parquet"))
    before = bytes_read()
    assert list(ImageReader("image.bytes").read_many(table)) == images
    assert bytes_read() - before < 1.1 * 40 * 50_000
    reader, before = ImageReader("image.bytes"), bytes_read()
    for chosen in (table.slice(0, 7), table.slice(7, 20), table.slice(27)):
        list(reader.read_many(chosen))
    assert bytes_read() - before < 1.1 * 40 * 50_000


@pytest.mark.parametrize("piece_bytes", [1, 2500, 1 << 20])
def test_rows_come_in_any_order(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr("epic_ray.stages.reading._PIECE_BYTES", piece_bytes)
    images = [os.urandom(1000) for _ in range(40)]
    uri = parquet(tmp_path / "x.parquet", images, row_group_size=10)
    shuffled = np.random.default_rng(1).permutation(40)
    table = rows(*((uri, None, row, None) for row in shuffled))
    assert list(ImageReader("image").read_many(table)) == [images[row] for row in shuffled]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "limit_mb"),
    [({"row_group_size": 50}, 50 * 2.7), ({"row_group_size": 200, "use_dictionary": False, "write_batch_size": 8}, 60)],
)
def test_memory_does_not_follow_the_size_of_files_and_row_groups(tmp_path, options, limit_mb):
    """200 MB of images: in row groups of one page each, as pyarrow writes them, and in one row group of many pages."""
    image = os.urandom(1_000_000)
    images = pa.array([image[number:] + image[:number] for number in range(200)])
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet", **options)
    script = f"""
import pyarrow as pa
from epic_ray.stages.reading import ImageReader
table = pa.table({{"uri": [{str(tmp_path / "x.parquet")!r}] * 200, "byte_offset": pa.nulls(200, pa.int64()),
    "row": range(200), "size_bytes": pa.nulls(200, pa.int64())}})
assert sum(len(data) for data in ImageReader("image").read_many(table)) == 200_000_000
print(pa.default_memory_pool().max_memory())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1e6 < limit_mb


# --- on a store


def slow_store(gated_s3: tuple[Store, Gate], tmp_path: Path, form: str) -> tuple[pa.Table, str | None, list[bytes]]:  # noqa: F811
    store, _ = gated_s3
    pictures = some_pictures()
    write_form(tmp_path, form, pictures)
    root = store.new_bucket()
    store.upload(tmp_path, root)
    source, table = listing(only_train(root))
    return table, source.image_column, [picture.data for picture in pictures]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["imagefolder", "webdataset"])
def test_several_reads_of_a_slow_store_are_under_way_and_come_in_order(gated_s3, tmp_path, form):  # noqa: F811
    table, _, expected = slow_store(gated_s3, tmp_path, form)
    table, expected = pa.concat_tables([table] * 2), expected * 2
    gated_s3[1].delay_seconds = 0.1
    start = time.monotonic()
    assert list(ImageReader().read_many(table)) == expected
    assert time.monotonic() - start < 60 * 0.2 / 2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["imagefolder", "webdataset", "parquet"])
def test_a_store_that_is_away_for_two_seconds_is_waited_for(gated_s3, tmp_path, form):  # noqa: F811
    table, column, expected = slow_store(gated_s3, tmp_path, form)
    gate, found, answers = gated_s3[1], ImageReader(column).read_many(table), []
    answers.append(next(found))
    gate.shut()
    threading.Timer(2, gate.open).start()
    answers += found
    assert answers == expected


@pytest.mark.slow
@pytest.mark.parametrize("form", ["imagefolder", "parquet"])
def test_patience_goes_on_where_that_of_the_client_ends(gated_s3, tmp_path, form):  # noqa: F811
    table, column, expected = slow_store(gated_s3, tmp_path, form)
    gate = gated_s3[1]
    gate.shut()
    threading.Timer(9, gate.open).start()
    assert list(ImageReader(column).read_many(table)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("form", ["imagefolder", "webdataset", "parquet"])
def test_a_store_that_stays_away_says_nothing_about_an_image(gated_s3, tmp_path, form, monkeypatch):  # noqa: F811
    table, column, expected = slow_store(gated_s3, tmp_path, form)
    table, expected = pa.concat_tables([table.slice(0, 15)] * 3), expected[:15] * 3  # of one tar file, open by then
    monkeypatch.setenv(storage.PATIENCE_VARIABLE, "1")
    reader = ImageReader(column)
    found = reader.read_many(table)
    assert next(found) == expected[0]
    gated_s3[1].shut()
    with pytest.raises(storage.StorageAway, match=r"^s3://.*: the store did not answer for 1 s .*start again when it"):
        list(found)
    gated_s3[1].open()
    assert list(reader.read_many(table)) == expected


@pytest.mark.slow
def test_an_interrupted_read_ends_its_threads_though_the_store_is_away(gated_s3, tmp_path, monkeypatch):  # noqa: F811
    table, _, _ = slow_store(gated_s3, tmp_path, "imagefolder")
    monkeypatch.setenv(storage.PATIENCE_VARIABLE, "300")
    gated_s3[1].shut()
    threads = threading.active_count()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(1)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(ImageReader().read_many(table))
    assert time.monotonic() - start < 60
    assert threading.active_count() <= threads


def test_a_closed_iterator_leaves_no_thread(s3, tmp_path):  # noqa: F811
    write_form(tmp_path, "imagefolder", some_pictures())
    root = s3.new_bucket()
    s3.upload(tmp_path, root)
    _, table = listing(only_train(root))
    threads = threading.active_count()
    found = ImageReader().read_many(table)
    next(found)
    assert threading.active_count() > threads
    found.close()
    assert threading.active_count() == threads


def test_what_is_not_on_a_store_is_told(s3, tmp_path):  # noqa: F811
    root = s3.new_bucket()
    bucket = root.removeprefix("s3://")
    s3.put(f"{bucket}/a.tar", b"0123456789")
    s3.put(f"{bucket}/torn.parquet", b"PAR1 and no more")
    table = rows(
        (f"{root}/absent.png", None, None, None),
        (f"{root}/a.tar", 8, None, 2),
        (f"{root}/a.tar", 8, None, 3),
        (f"{root}/a.tar", 80, None, 1),
        (f"{root}/a.tar", None, None, None),
    )
    early = "file ends early, after 10 bytes"
    assert told(ImageReader().read_many(table)) == ["there is no such file", b"89", early, early, b"0123456789"]
    for name, reason in (("torn", "Parquet"), ("absent", "^there is no such file$")):
        with pytest.raises(UnreadableError, match=reason):
            ImageReader("image").read(f"{root}/{name}.parquet", row=0)


def test_a_damaged_parquet_file_on_a_store_is_not_waited_for(s3, tmp_path):  # noqa: F811
    images = [os.urandom(1000) for _ in range(8)]
    path = parquet(tmp_path / "x.parquet", images, use_dictionary=False)
    data = bytearray(Path(path).read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[offset : offset + 60] = b"\xff" * 60
    root = s3.new_bucket()
    s3.put(f"{root.removeprefix('s3://')}/x.parquet", bytes(data))
    start = time.monotonic()
    answers = told(ImageReader("image").read_many(rows(*((f"{root}/x.parquet", None, row, None) for row in range(8)))))
    assert answers[:4] == images[:4]
    assert all(isinstance(reason, str) for reason in answers[4:])
    assert time.monotonic() - start < 20


class Refusing(http.server.BaseHTTPRequestHandler):
    """A store that answers every request with the same refusal."""

    refusal = (403, "AccessDenied")

    def do_HEAD(self) -> None:
        self._refuse(b"")

    def do_GET(self) -> None:
        self._refuse(f"<Error><Code>{self.refusal[1]}</Code><Message>no</Message></Error>".encode())

    def _refuse(self, body: bytes) -> None:
        self.send_response(self.refusal[0])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_an_image_without_the_right_to_it_on_a_store_is_told(s3):  # noqa: F811
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"s3://bucket?endpoint_override=http://127.0.0.1:{server.server_port}&region=us-east-1"
        with pytest.raises(UnreadableError, match=r"^no right to read it$"):
            ImageReader().read(storage.join(root, "x.png"))
        with pytest.raises(InputError, match=r"/train: cannot be looked at .*ACCESS_DENIED.*check the address"):
            listing(only_train(root))
        server.shutdown()
