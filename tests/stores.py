"""Where tests keep images: in every form of a data set, on a disk and on a real S3-compatible server on loopback.

Import the fixtures where they are used: `from stores import gated_s3, s3  # noqa: F401`. Processes that start while
`s3` is in use (Ray's too, if Ray starts after it) find the server and its credentials in their environment.
"""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from epic_ray.config import DataConfig
from epic_ray.stages.sources import LISTED, Source, find_source

_START_SECONDS = 60
_PIECE_BYTES = 65_536


class Picture(NamedTuple):
    """An image as the tests see it: its name below the split, its class, its bytes (which need be no picture)."""

    name: str
    label: str
    data: bytes


def some_pictures(count: int = 30) -> list[Picture]:
    """Pictures of three classes, sorted by class and name, of 0 to some thousand bytes."""
    classes = ("ant", "bee", "große Katze #1?%20")
    labels = sorted(classes[number % len(classes)] for number in range(count))
    return [
        Picture(f"{label}/{number:03d} & #{number}.png", label, bytes([number]) * (97 * number))
        for number, label in enumerate(labels)
    ]


def write_form(root: Path, form: str, pictures: list[Picture], split: str = "train") -> None:
    """The pictures as a split of a data set of this form, the files of many images in two shards."""
    halves = [pictures[: len(pictures) // 2], pictures[len(pictures) // 2 :]]
    if form in ("imagefolder", "csv"):
        for picture in pictures:
            file = root / (split if form == "imagefolder" else "files") / picture.name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture.data)
    if form == "csv":
        lines = [f'"files/{picture.name}","{picture.label}"' for picture in pictures]
        (root / f"{split}.csv").write_text("\n".join(["path,label", *lines]), encoding="utf-8")
    if form == "parquet":
        names = sorted({picture.label for picture in pictures})
        for number, half in enumerate(halves):
            write_parquet(root / "data" / f"{split}-{number:05d}-of-00002.parquet", half, names)
    if form == "webdataset":
        for number, half in enumerate(halves):
            write_tar(root / f"{split}-{number:06d}.tar", members_of(half))


def members_of(pictures: Iterable[Picture]) -> Iterator[tuple[str, bytes]]:
    """Of each picture a member with its bytes and one with its class."""
    for picture in pictures:
        yield picture.name, picture.data
        yield f"{picture.name.rpartition('.')[0]}.cls", picture.label.encode()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_parquet(path: Path, pictures: list[Picture], names: list[str], row_group_size: int = 4) -> None:
    """As Hugging Face writes it: bytes in a struct, class numbers, and their names beside the schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": picture.data, "path": picture.name} for picture in pictures])
    labels = pa.array([names.index(picture.label) for picture in pictures], pa.int64())
    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({"image": images, "label": labels}).replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder, and a process that has no right to what lies there without one: tests may run as root."""
    with tempfile.TemporaryDirectory() as folder:
        mine = os.geteuid()
        os.chmod(folder, 0o777)
        if mine == 0:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(mine)


def place(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())


def only_train(root: Path | str, where: str = "train", **more) -> DataConfig:
    return DataConfig(root=str(root), splits={"train": where}, **more)


def listing(data: DataConfig, split: str = "train") -> tuple[Source, pa.Table]:
    source = find_source(data, split)
    return source, pa.Table.from_batches(source.batches(), LISTED)


def column(data: DataConfig, name: str) -> list:
    return listing(data)[1][name].to_pylist()


def ids(data: DataConfig) -> list[str]:
    return column(data, "image_id")


class Store:
    """A store at `endpoint`; `behind` is the server itself where `endpoint` is a gate before it."""

    def __init__(self, endpoint: str, behind: str | None = None) -> None:
        self.endpoint = endpoint
        self._query = f"?endpoint_override={endpoint}&region=us-east-1" if behind else ""
        self.filesystem = fs.S3FileSystem(
            endpoint_override=behind or endpoint, region="us-east-1", allow_bucket_creation=True
        )

    def new_bucket(self) -> str:
        """The address of an empty bucket that no other test uses: pyarrow keeps its clients by address."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.filesystem.create_dir(name)
        return f"s3://{name}{self._query}"

    def upload(self, folder: Path, address: str) -> None:
        """Puts the files of a folder, links followed, below an address."""
        place = unquote(address.partition("?")[0].removeprefix("s3://")).rstrip("/")
        with ThreadPoolExecutor(8) as pool:
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            list(pool.map(lambda file: self.put(f"{place}/{file.relative_to(folder)}", file.read_bytes()), files))

    def put(self, path: str, data: bytes) -> None:
        """Writes `bucket/key`."""
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(data)


class Gate:
    """A TCP proxy on loopback before an address `http://host:port`, which can be shut and opened again.

    `delay_seconds` is how long it holds back what it passes on, each way.
    """

    def __init__(self, behind: str) -> None:
        host, _, port = behind.removeprefix("http://").partition(":")
        self._behind = (host, int(port))
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._port = 0
        self.delay_seconds = 0.0
        self.open()
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Listens, at the same port each time."""
        if self._listener:
            return
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        """Refuses connections, and breaks those that there are."""
        if self._listener:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self._listener.close()
            self._listener = None
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(self._behind)
            except OSError:
                return
            with self._lock:
                if self._listener is not listener:
                    near.close()
                    far.close()
                    return
                self._connections |= {near, far}
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE_BYTES):
                time.sleep(self.delay_seconds)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="session")
def s3() -> Iterator[Store]:
    """A store; addresses like `s3://bucket/key` mean it while the session lasts."""
    if not find_spec("moto") or not find_spec("flask"):
        pytest.skip("needs an S3-compatible server: pip install 'moto[server]'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ours = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        _await(server, port)
        yield Store(ours["AWS_ENDPOINT_URL"])
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        server.terminate()
        server.wait()


@pytest.fixture
def gated_s3(s3: Store) -> Iterator[tuple[Store, Gate]]:
    """The store seen through a gate of its own; `upload` and `new_bucket` go past the gate."""
    gate = Gate(s3.endpoint)
    yield Store(gate.endpoint, behind=s3.endpoint), gate
    gate.shut()


def _await(server: subprocess.Popen, port: int) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the S3-compatible server (moto) does not start") from None
            time.sleep(0.05)
