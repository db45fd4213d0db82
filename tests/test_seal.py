"""Seals of tables: any changed byte is found, any cut too, and what was written before there were seals is read on."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import s3

from epic_ray.errors import ResultError
from epic_ray.run_dir import RunDir, table_file
from epic_ray.seal import is_sealed
from epic_ray.storage import join
from epic_ray.tables import TABLES, build_table, count_rows, read_table, write_table, write_tables

__all__ = ["s3"]

FILE = table_file("purity")
SLOWLY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def purity(rows: int = 40) -> pa.Table:
    columns = {
        "basis": ["before"] * rows,
        "split": ["train"] * rows,
        "channel": np.arange(rows, dtype=np.int32),
        "n": np.full(rows, 5, np.int32),
        "prototype_count": np.full(rows, 5, np.int32),
        "purity": np.random.default_rng(0).uniform(-1, 1, rows).astype(np.float32),
    }
    return build_table("purity", columns)


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    run_dir = RunDir(str(tmp_path / "run"))
    write_table(run_dir, FILE, purity())
    return run_dir


def flip(data: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_every_single_flipped_byte_of_a_table_is_found(run_dir):
    whole = run_dir.read_bytes(FILE)
    assert is_sealed(io.BytesIO(whole)) is True
    assert count_rows(run_dir, FILE) == 40
    for place in range(len(whole)):
        run_dir.publish(FILE, lambda out, at=place: out.write(flip(whole, at, at % 8)) and None, durable=False)
        with pytest.raises(ResultError, match=r"purity\.parquet: is no readable Parquet file"):
            count_rows(run_dir, FILE)


@given(cut=st.integers(0, 10**6), added=st.binary(max_size=60))
@SLOWLY
def test_a_table_that_was_cut_or_went_on_is_found(run_dir, cut, added):
    write_table(run_dir, FILE, purity())
    whole = run_dir.read_bytes(FILE)
    torn = whole[: cut % len(whole)] + added
    run_dir.publish_bytes(FILE, torn)
    with pytest.raises(ResultError, match=r"purity\.parquet: is no readable Parquet file"):
        count_rows(run_dir, FILE)


@pytest.mark.parametrize("where", ["disk", "store"])
def test_a_flipped_byte_in_a_page_is_found_by_whoever_reads_the_page(run_dir, where, request):
    """At once: a damaged file is no store that is away."""
    if where == "store":
        run_dir = RunDir(join(request.getfixturevalue("s3").new_bucket(), "run"))
        write_table(run_dir, FILE, purity())
    whole = run_dir.read_bytes(FILE)
    chunk = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(0).column(5)  # purity: a page without a dictionary
    last = chunk.data_page_offset + chunk.total_compressed_size - 1
    run_dir.publish_bytes(FILE, flip(whole, last, 0))
    for read in (read_table, count_rows):
        with pytest.raises(ResultError, match=r"purity\.parquet: is no readable Parquet file"):
            read(run_dir, FILE)


def test_a_table_from_before_there_were_seals_is_counted_and_its_damage_found(run_dir):
    def publish(data: bytes) -> None:
        run_dir.publish_bytes(FILE, data)

    sink = io.BytesIO()
    pq.write_table(purity(), sink, compression="zstd", write_page_checksum=True)
    assert is_sealed(sink) is None
    publish(sink.getvalue())
    assert count_rows(run_dir, FILE) == 40
    publish(flip(sink.getvalue(), 60, 3))
    with pytest.raises(ResultError, match="is no readable Parquet file"):
        count_rows(run_dir, FILE)


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_a_table_in_pieces_is_sealed_as_one(run_dir, pieces):
    write_tables(run_dir, FILE, TABLES["purity"].schema(), [purity(5) for _ in range(pieces)])
    assert count_rows(run_dir, FILE) == read_table(run_dir, FILE).num_rows == 5 * pieces


def test_equal_tables_are_equal_files(run_dir, tmp_path):
    other = RunDir(str(tmp_path / "other"))
    write_table(other, FILE, purity())
    assert other.read_bytes(FILE) == run_dir.read_bytes(FILE)


def test_long_columns_of_vectors_come_back_through_a_seal(run_dir):
    vectors = np.random.default_rng(0).normal(size=(40_000, 16)).astype(np.float32)
    count = len(vectors)
    columns = {"split": ["train"] * count, "position": np.arange(count), "image_id": [str(n) for n in range(count)]}
    table = build_table("features", columns | {"pooled": vectors})
    write_table(run_dir, table_file("features"), table)
    assert count_rows(run_dir, table_file("features")) == count
    assert read_table(run_dir, table_file("features")).equals(table)
