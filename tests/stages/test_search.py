"""Searching feature files: the same to the bit however they are shared out, read or kept; faults in them are told."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import s3

from epic_ray.errors import ResultError
from epic_ray.method.topk import BLOCK_ROWS, Query, TopN, search, search_all
from epic_ray.run_dir import RunDir, unit_file
from epic_ray.stages.features import FeatureFile
from epic_ray.stages.search import PooledBlocks, file_blocks, search_split
from epic_ray.stages.units import FINGERPRINT_KEY
from epic_ray.storage import join
from epic_ray.tables import build_table, write_table

__all__ = ["s3"]

D, N = 24, 15
ROWS = (3000, 3000, 2190, 5, 8192, 1, 4000, 4000, 9000, 700, 7000)  # images of each file
BLOCKS = [3, 1, 1, 3, 1, 2]  # files that together hold at most 8,192 images, but for the one of 9,000


def write_features(run_dir: RunDir, rows: tuple[int, ...], dtype=np.float32, d: int = D) -> list[FeatureFile]:
    rng = np.random.default_rng(3)
    files, start = [], 0
    for unit, count in enumerate(rows):
        pooled = np.maximum(rng.normal(size=(count, d)), 0).astype(np.float32).astype(dtype)
        positions = np.arange(start, start + count)
        columns = {"split": ["train"] * count, "position": positions, "image_id": [f"{n}.png" for n in positions]}
        table = build_table("features", columns | {"pooled": pooled}, {FINGERPRINT_KEY: "made"})
        files.append(FeatureFile(unit_file("features", "train", unit), "made", count))
        write_table(run_dir, files[-1].relative, table)
        start += count
    return files


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    return RunDir(str(tmp_path_factory.mktemp("search") / "run"))


@pytest.fixture(scope="module")
def files(run_dir) -> list[FeatureFile]:
    return write_features(run_dir, ROWS)


@pytest.fixture(scope="module")
def queries() -> list[Query]:
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
    return [Query(basis, N), Query(basis, 3, -1), Query(torch.eye(D), N)]


def joined(blocks) -> tuple[torch.Tensor, torch.Tensor]:
    positions, pooled = zip(*blocks, strict=True)
    return torch.cat(positions), torch.cat(pooled)


def assert_equal(found: list[TopN], expected: list[TopN]) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine.indices, other.indices)
        assert torch.equal(mine.values, other.values)


def test_blocks_hold_every_image_once_and_in_order(run_dir, files):
    blocks = file_blocks(files)
    assert [len(block) for block in blocks] == BLOCKS
    assert [file for block in blocks for file in block] == files
    for block in blocks:
        assert len(block) == 1 or sum(file.rows for file in block) <= BLOCK_ROWS
    positions, pooled = joined(PooledBlocks(run_dir, blocks))
    assert torch.equal(positions, torch.arange(sum(ROWS)))
    assert pooled.shape == (sum(ROWS), D)
    assert file_blocks([]) == []


def test_a_search_of_files_is_a_full_sort_of_their_features(run_dir, files, queries):
    positions, pooled = joined(PooledBlocks(run_dir, file_blocks(files)))
    for query, top in zip(queries, search_all(PooledBlocks(run_dir, file_blocks(files)), queries), strict=True):
        scores = query.sign * pooled.double() @ query.basis.double().T
        values, order = scores.sort(dim=0, descending=True, stable=True)
        assert (top.values - values[: query.n].T).abs().max() < 1e-5
        assert (top.indices == positions[order[: query.n]].T).float().mean() > 0.99  # rounding may swap two


@pytest.mark.parametrize("workers", [2, 3, 7])
@pytest.mark.parametrize("readers", [1, 5])
def test_shares_of_any_number_of_workers_give_the_same_to_the_last_bit(run_dir, files, queries, workers, readers):
    blocks = file_blocks(files)
    whole = search_all(PooledBlocks(run_dir, blocks), queries)
    best = [TopN.empty(D, query.n) for query in queries]
    for rank in range(workers):
        part = search_all(PooledBlocks(run_dir, blocks[rank::workers], readers=readers), queries)
        best = [mine.merge(other) for mine, other in zip(best, part, strict=True)]
    assert_equal(best, whole)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_tasks_that_share_a_split_give_the_same_to_the_last_bit(run_dir, files, queries):
    """With the threads that a task has; more would be other sums."""
    torch.set_num_threads(1)
    assert len(file_blocks(files)) > 4  # more than one task
    assert_equal(search_split(run_dir, files, queries), search_all(PooledBlocks(run_dir, file_blocks(files)), queries))
    assert_equal(
        search_split(run_dir, files[:3], queries), search_all(PooledBlocks(run_dir, file_blocks(files[:3])), queries)
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_file_that_is_missing_is_told_by_the_search_of_a_split(run_dir, files, queries):
    absent = FeatureFile(unit_file("features", "train", 99), "made", 10)
    with pytest.raises(ResultError, match=r"unit-000099\.parquet: missing"):
        search_split(run_dir, [*files, absent], queries)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_fits_the_cache_is_read_once_and_the_rest_each_time(tmp_path, dtype, queries):
    run_dir = RunDir(str(tmp_path / "run"))
    files = write_features(run_dir, (8000, 8000, 8000), dtype)
    block_bytes = 8000 * (8 + D * np.dtype(dtype).itemsize)
    blocks = PooledBlocks(run_dir, file_blocks(files), cache_bytes=2 * block_bytes + 1)
    first = search_all(blocks, queries)
    run_dir.delete([file.relative for file in files[:2]])
    assert_equal(search_all(blocks, queries), first)  # two from memory, one from its file
    run_dir.delete([files[2].relative])
    with pytest.raises(ResultError, match=r"unit-000002\.parquet: missing"):
        search_all(blocks, queries)


def test_a_passage_that_was_broken_off_leaves_a_right_cache(run_dir, files):
    blocks = PooledBlocks(run_dir, file_blocks(files), cache_bytes=10**9)
    next(iter(blocks))
    for _ in zip(range(3), blocks, strict=False):
        pass
    for _ in range(2):
        assert torch.equal(joined(blocks)[0], torch.arange(sum(ROWS)))


def test_without_a_cache_nothing_is_kept(tmp_path):
    run_dir = RunDir(str(tmp_path / "run"))
    files = write_features(run_dir, (50, 60))
    blocks = PooledBlocks(run_dir, file_blocks(files))
    assert len(joined(blocks)[0]) == 110
    run_dir.delete([files[1].relative])
    with pytest.raises(ResultError, match="missing"):
        joined(blocks)


def test_files_of_half_precision_are_searched_as_what_they_hold(tmp_path, queries):
    run_dir = RunDir(str(tmp_path / "run"))
    half = PooledBlocks(run_dir, file_blocks(write_features(run_dir, (500, 400), np.float16)))
    positions, pooled = joined(half)
    assert pooled.dtype == torch.float16
    exact = search([(positions, pooled.float())], queries[0].basis, N)
    assert_equal([search(half, queries[0].basis, N)], [exact])
    single = RunDir(str(tmp_path / "single"))
    _, unrounded = joined(PooledBlocks(single, file_blocks(write_features(single, (500, 400)))))
    assert torch.equal(pooled, unrounded.half())
    assert not torch.equal(pooled.float(), unrounded)


def test_a_file_of_another_start_or_with_other_images_is_refused(tmp_path):
    run_dir = RunDir(str(tmp_path / "run"))
    (file,) = write_features(run_dir, (20,))
    with pytest.raises(ResultError, match="made by a start with other settings"):
        joined(PooledBlocks(run_dir, [(FeatureFile(file.relative, "other", 20),)]))
    with pytest.raises(ResultError, match=r"has 20 images, its unit's statuses tell of 21"):
        joined(PooledBlocks(run_dir, [(FeatureFile(file.relative, "made", 21),)]))


@pytest.mark.ray  # moto's server takes its time
def test_features_on_a_store_are_searched_as_those_on_a_disk(s3, run_dir, files, queries):
    away = RunDir(join(s3.new_bucket(), "run"))
    for file in files[:4]:
        away.publish_bytes(file.relative, run_dir.read_bytes(file.relative))
    blocks = file_blocks(files[:4])
    assert_equal(search_all(PooledBlocks(away, blocks), queries), search_all(PooledBlocks(run_dir, blocks), queries))


SEARCH_ALONE = """
import sys
import torch
from epic_ray.method.topk import search
from epic_ray.run_dir import RunDir
from epic_ray.stages.features import FeatureFile
from epic_ray.stages.search import PooledBlocks, file_blocks

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
root, d, n, *files = sys.argv[1:]
basis = torch.linalg.qr(torch.randn(int(d), int(d)))[0]
blocks = PooledBlocks(RunDir(root), file_blocks([FeatureFile(file, "made", 4096) for file in files]))
before = peak()
search(blocks, basis, int(n))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
def test_the_memory_of_a_search_is_what_the_docstring_says_and_not_that_of_the_features(tmp_path):
    d, n, count = 1100, 100, 50  # blocks that the C library gives back to the system when they are done
    files = write_features(RunDir(str(tmp_path / "run")), (4096,) * count, d=d)
    command = [sys.executable, "-c", SEARCH_ALONE, str(tmp_path / "run"), str(d), str(n)]
    told = subprocess.run([*command, *[file.relative for file in files]], check=True, capture_output=True, text=True)
    stated = 4 * BLOCK_ROWS * d * 9 + 330 * d * n + 150_000_000
    assert int(told.stdout) < stated < 4 * 4096 * d * count / 1.5
