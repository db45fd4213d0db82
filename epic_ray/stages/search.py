"""Top-n images of every channel, from the feature files alone: no image is read.

The files of a split are taken in fixed blocks, a matrix product each, cut by the files' rows alone. So the last bits of
a score depend neither on how many workers share the blocks out nor on how many files are read at once.

Memory of a worker, for blocks of B <= 8,192 images, D channels and n images kept: the block at work, the one before it,
the next, which is read meanwhile, as it lies in the files, comes from them and is joined, what the allocators hold back
of earlier ones, and what `search_all` says, in float32 at most

    4 B D (6 + 3) + 330 D n bytes, 0.67 GB for D = 2,048 and n = 100,

whatever the number of images; beside that the cache, and the libraries (0.5 to 0.9 GB, and 0.15 GB once they multiply).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from epic_ray.method.topk import BLOCK_ROWS, Block, Query, TopN, search_all
from epic_ray.run_dir import RunDir
from epic_ray.stages.features import FeatureFile, read_features
from epic_ray.stages.resources import available_cores, first_cause
from epic_ray.tables import to_numpy

FileBlock = tuple[FeatureFile, ...]

_BLOCKS_PER_TASK = 4
# files read at once: on a store enough to hide how late it answers, on a disk no more than there are cores for
_READERS_OF_A_STORE, _READERS_OF_A_DISK = 16, 4


def file_blocks(files: Sequence[FeatureFile]) -> list[FileBlock]:
    """The files in order, as many together as hold at most 8,192 images; a file alone may hold more."""
    blocks: list[list[FeatureFile]] = []
    rows = 0
    for file in files:
        if not blocks or rows + file.rows > BLOCK_ROWS:
            blocks.append([])
            rows = 0
        blocks[-1].append(file)
        rows += file.rows
    return [tuple(block) for block in blocks]


class PooledBlocks:
    """(positions (b,), pooled features (b, D) as they are stored) of blocks of files; may be gone through repeatedly.

    The first blocks stay in memory as far as `cache_bytes` go; the others are read each time, `readers` files at once,
    while the block before is worked on.
    """

    def __init__(
        self, run_dir: RunDir, blocks: Sequence[FileBlock], cache_bytes: int = 0, readers: int | None = None
    ) -> None:
        self._run_dir, self._blocks, self._room_bytes = run_dir, blocks, cache_bytes
        self._readers = readers or _reader_count(run_dir, available_cores())
        self._kept: list[Block] = []

    def __iter__(self) -> Iterator[Block]:
        first = len(self._kept)
        yield from self._kept[:first]
        for number, block in enumerate(self._read(first), first):
            self._keep(number, block)
            yield block

    def _keep(self, number: int, block: Block) -> None:
        size_bytes = sum(part.nbytes for part in block)
        if size_bytes > self._room_bytes:
            self._room_bytes = 0  # the first blocks are kept, and no others
        elif number == len(self._kept):
            self._kept.append(block)
            self._room_bytes -= size_bytes

    def _read(self, first: int) -> Iterator[Block]:
        pool = ThreadPoolExecutor(self._readers, "features")
        try:
            ahead: deque[list[Future[pa.Table]]] = deque()
            for files in self._blocks[first:]:
                ahead.append([pool.submit(_read_file, self._run_dir, file) for file in files])
                if len(ahead) > 1:
                    yield _join(ahead.popleft())
            while ahead:
                yield _join(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _reader_count(run_dir: RunDir, cores: int) -> int:
    return min(_READERS_OF_A_DISK, cores) if run_dir.is_local else _READERS_OF_A_STORE


def _read_file(run_dir: RunDir, file: FeatureFile) -> pa.Table:
    return read_features(run_dir, file, ["position", "pooled"])


def _join(reads: list[Future[pa.Table]]) -> Block:
    tables = [read.result() for read in reads]
    positions = torch.from_numpy(np.concatenate([to_numpy(table["position"]) for table in tables]))
    parts = [chunk.to_numpy_ndarray() for table in tables for chunk in table["pooled"].chunks]
    kind = torch.from_numpy(np.empty(0, parts[0].dtype)).dtype
    pooled = torch.empty((len(positions), parts[0].shape[1]), dtype=kind)  # aligned as matrix products like it
    np.concatenate(parts, out=pooled.numpy())
    return positions, pooled


def search_split(run_dir: RunDir, files: Sequence[FeatureFile], queries: Sequence[Query]) -> list[TopN]:
    """The answers to the queries over feature files, as Ray tasks that read each file once, merged exactly."""
    blocks = file_blocks(files)
    shares = [blocks[start : start + _BLOCKS_PER_TASK] for start in range(0, len(blocks), _BLOCKS_PER_TASK)]
    if len(shares) <= 1:
        return search_all(PooledBlocks(run_dir, blocks), queries)
    task: Any = ray.remote(num_cpus=1)(_search_share)
    shared = ray.put(list(queries))
    pending = [task.remote(run_dir, share, shared) for share in shares]
    best = [TopN.empty(len(query.basis), query.n) for query in queries]
    try:
        for reference in pending:
            best = [mine.merge(other) for mine, other in zip(best, ray.get(reference), strict=True)]
    except ray.exceptions.RayError as error:
        raise first_cause(error, "search") from error
    return best


def _search_share(run_dir: RunDir, blocks: list[FileBlock], queries: list[Query]) -> list[TopN]:
    """On one CPU."""
    return search_all(PooledBlocks(run_dir, blocks, readers=_reader_count(run_dir, 1)), queries)
