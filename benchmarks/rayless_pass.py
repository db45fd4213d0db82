"""The pass's parts without Ray: processes that decode into shared memory, forwards, Parquet written by a thread."""

import multiprocessing
import queue
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epic_ray.method.classifier import SplitClassifier
from epic_ray.method.preprocessing import Preprocessing
from epic_ray.method.staging import Staging
from epic_ray.run_dir import RunDir, unit_file
from epic_ray.tables import build_table, write_table

CHUNK = 64  # images of one decode task
CHUNKS_A_PROCESS = 2  # the one at work and the next
HELD = 4  # chunks that a batch may be gathered from
UNIT = 1024  # images of one Parquet file


def make_jpegs(folder: Path, count: int, distinct: int, make: Callable[[int], bytes], processes: int) -> list[str]:
    """`count` files under folder/images/train, of which `distinct` differ: the others are further names of those."""
    files = [folder / f"images/train/class{number % 10}/{number:06d}.jpg" for number in range(count)]
    for file in files[:10]:
        file.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for file, data in zip(files, pool.map(make, range(min(count, distinct)), chunksize=16), strict=False):
            file.write_bytes(data)
    for number, file in enumerate(files[distinct:], distinct):
        file.hardlink_to(files[number % distinct])
    return [str(file) for file in files]


class DecodePool:
    """Processes that decode files into an array which they share with this one: (places, h, w, 3), uint8."""

    def __init__(self, preprocessing: Preprocessing, processes: int) -> None:
        self._shape = ((processes * CHUNKS_A_PROCESS + HELD) * CHUNK, *preprocessing.crop, 3)
        size_bytes = int(np.prod(self._shape))
        with suppress(FileNotFoundError):  # not a Linux
            if size_bytes > shutil.disk_usage("/dev/shm").free:
                sys.exit(f"/dev/shm has no room for the {size_bytes:,} bytes that the decode processes share")
        self._memory = SharedMemory(create=True, size=size_bytes)
        self.pixels: np.ndarray = np.ndarray(self._shape, np.uint8, self._memory.buf)
        self._executor = ProcessPoolExecutor(
            processes,
            multiprocessing.get_context("spawn"),
            _open_memory,
            (self._memory.name, self._shape, preprocessing),
        )

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(cancel_futures=True)
        del self.pixels
        self._memory.close()
        self._memory.unlink()

    def decode(self, files: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers of the files, their places in `pixels`) of chunks as they get done; the last HELD stay untouched."""
        chunks = iter([range(start, min(start + CHUNK, len(files))) for start in range(0, len(files), CHUNK)])
        done: queue.Queue[Future[tuple[range, int]]] = queue.Queue()
        held: deque[int] = deque()
        left = -(-len(files) // CHUNK)

        def begin(start: int) -> None:
            numbers = next(chunks, None)
            if numbers is not None:
                task = self._executor.submit(_decode, numbers, [files[number] for number in numbers], start)
                task.add_done_callback(done.put)

        for start in range(0, len(self.pixels), CHUNK):
            begin(start)
        for _ in range(left):
            numbers, start = done.get().result()
            held.append(start)
            if len(held) > HELD:
                begin(held.popleft())
            yield np.array(numbers), np.arange(start, start + len(numbers))


_SHARED: dict[str, Any] = {}  # of a decode process


def _open_memory(name: str, shape: tuple[int, ...], preprocessing: Preprocessing) -> None:
    memory = SharedMemory(name)
    _SHARED.update(memory=memory, pixels=np.ndarray(shape, np.uint8, memory.buf), preprocessing=preprocessing)


def _decode(numbers: range, files: list[str], start: int) -> tuple[range, int]:
    for place, file in enumerate(files, start):
        _SHARED["pixels"][place] = _SHARED["preprocessing"].load(Path(file).read_bytes())[0]
    return numbers, start


def decode_only(pool: DecodePool, files: list[str]) -> None:
    """All files, into memory and no further."""
    for _ in pool.decode(files):
        pass


def run_pass(pool: DecodePool, files: list[str], classifier: SplitClassifier, batch: int, folder: Path) -> None:
    """All files: decoded, forwarded in batches of 64, 128 or 256, their pooled features written."""
    run_dir, device = RunDir(str(folder)), classifier.weight.device
    staging = Staging(batch, pool.pixels.shape[1:], device)
    unit: list[tuple[np.ndarray, torch.Tensor, torch.Tensor]] = []
    units = 0
    with ThreadPoolExecutor(1) as writer:
        writes = []
        for numbers, pixels in _batches(pool, files, batch, staging):
            with torch.inference_mode():
                maps, logits = classifier(classifier.normalise(pixels))
                unit.append((numbers, maps.mean(dim=(2, 3))[: len(numbers)], logits[: len(numbers)].argmax(dim=1)))
            if sum(len(part[0]) for part in unit) >= UNIT:
                writes.append(writer.submit(_write, run_dir, units, unit))
                unit, units = [], units + 1
        if unit:
            writes.append(writer.submit(_write, run_dir, units, unit))
        for write in writes:
            write.result()


def _batches(
    pool: DecodePool, files: list[str], batch: int, staging: Staging
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Numbers of files, and their pixels on the device; the last batch is padded."""
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for chunk in pool.decode(files):
        waiting.append(chunk)
        if len(waiting) == batch // CHUNK:
            yield _send(pool, waiting, staging)
            waiting = []
    if waiting:
        yield _send(pool, waiting, staging)


def _send(
    pool: DecodePool, chunks: list[tuple[np.ndarray, np.ndarray]], staging: Staging
) -> tuple[np.ndarray, torch.Tensor]:
    numbers, places = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return numbers, staging.send(pool.pixels, places)


def _write(run_dir: RunDir, number: int, unit: list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]) -> None:
    positions = np.concatenate([numbers for numbers, _, _ in unit])
    pooled = torch.cat([part for _, part, _ in unit]).cpu().numpy()
    ids = [f"train/{position:06d}.jpg" for position in positions]
    columns = {"split": ["train"] * len(ids), "position": positions, "image_id": ids, "pooled": pooled}
    write_table(run_dir, unit_file("features", "train", number), build_table("features", columns))
