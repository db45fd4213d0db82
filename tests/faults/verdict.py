"""What must hold after a fault: the tables of an undisturbed run, and nothing lost, doubled or left over."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import COUNTS, UNITS, Disturbed, Outcome, disturbed, write_images
from networks import forget_points
from pyarrow import fs
from safetensors.torch import load

from epic_ray.run_dir import BASIS, RunDir


@dataclass(frozen=True)
class Result:
    """What a run has left: its tables by their files, and the bytes of U."""

    tables: dict[str, pa.Table]
    basis: bytes

    @classmethod
    def of(cls, run_dir: RunDir) -> "Result":
        files = [file for file in run_dir.list("tables") if not file.startswith("tables/selection/")]
        assert all(file.endswith(".parquet") for file in files)
        tables = {}
        for file in files:
            with run_dir.filesystem.open_input_file(run_dir.path(file)) as stream:
                tables[file] = pq.read_table(stream).replace_schema_metadata(None)
        return cls(tables, load(run_dir.read_bytes(BASIS))["U"].numpy().tobytes())


def differing(found: Result, expected: Result, without: tuple[str, ...] = ()) -> list[str]:
    """The tables that are not equal to the last bit, and `U`; columns `without` are left out."""
    names = sorted(found.tables.keys() ^ expected.tables.keys())
    for name in found.tables.keys() & expected.tables.keys():
        one, other = [_plain(table, without) for table in (found.tables[name], expected.tables[name])]
        if not one.equals(other):
            names.append(name)
    return names + (["U"] if found.basis != expected.basis else [])


def _plain(table: pa.Table, without: tuple[str, ...]) -> pa.Table:
    return table.drop_columns([name for name in without if name in table.column_names])


def assert_as_undisturbed(run: Disturbed, undisturbed: Result, without: tuple[str, ...] = ()) -> None:
    """Nothing lost, doubled, torn, left over or different."""
    found = Result.of(run.run_dir)
    for split, per_class in COUNTS.items():
        listed = found.tables[f"tables/manifest/{split}.parquet"]["image_id"].to_pylist()
        assert len(listed) == len(set(listed)) == 3 * per_class
        for table in ("images", "features"):
            parts = [
                part["image_id"] for name, part in found.tables.items() if name.startswith(f"tables/{table}/{split}/")
            ]
            ids = [value for part in parts for value in part.to_pylist()]
            assert sorted(ids) == sorted(listed), f"{table} of {split}"
    assert differing(found, undisturbed, without) == []
    assert left_over(run.run_dir) == []
    assert run.record()["units"]["all"] == UNITS


def left_over(run_dir: RunDir) -> list[str]:
    """Files that a finished run should not have: temporary ones, attempts, claims."""
    everything = [file.path for file in _everything(run_dir)]
    return [path for path in everything if re.search(r"\.tmp-|/attempts/|/locks/.|\.ray-train", path)]


def _everything(run_dir: RunDir) -> list[Any]:
    infos = run_dir.filesystem.get_file_info(fs.FileSelector(run_dir.path("").rstrip("/"), recursive=True))
    return [info for info in infos if info.type == fs.FileType.File]


# --- the table of all faults


_TABLE = pytest.StashKey["FaultTable"]()


class FaultTable:
    """What each fault cost: a row a fault, as Markdown, where a file is asked for."""

    HEAD = "| fault | where | exit codes, start by start | units redone | tables and U equal | seconds |"

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        if self._path:
            self._path.write_text(f"{self.HEAD}\n|{'---|' * self.HEAD.count(' | ')}---|\n", encoding="utf-8")

    def judge(self, fault: str, where: str, run: Disturbed, undisturbed: Result, without: tuple[str, ...] = ()) -> None:
        """Adds the row of a run that has come to its end, and fails where it did not come to the right one."""
        codes = ", ".join(str(128 - code if code < 0 else code) for code in run.exit_codes)
        equal = "no" if differing(Result.of(run.run_dir), undisturbed, without) else "yes"
        row = f"| {fault} | {where} | {codes} | {run.redone()} | {equal} | {time.monotonic() - run.begun:.0f} |"
        print(row)
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(row + "\n")
        assert_as_undisturbed(run, undisturbed, without)


# --- fixtures: import them where they are used


@pytest.fixture(scope="session")
def fault_table(request: pytest.FixtureRequest) -> FaultTable:
    """One of the whole session: a fixture that two modules import is made for each of them."""
    stash = request.config.stash
    if _TABLE not in stash:
        stash[_TABLE] = FaultTable(request.config.getoption("--fault-table"))
    return stash[_TABLE]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write_images(tmp_path_factory.mktemp("images"))
    forget_points()


@pytest.fixture(scope="session")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Result:
    return result_of(images, tmp_path_factory.mktemp("undisturbed"))


def result_of(images: Path, folder: Path, **sections: Any) -> Result:
    """What an undisturbed run leaves."""
    run = Disturbed(images, folder, **sections)
    assert run.start_here() == Outcome(0, "")
    assert run.redone() == 0
    result = Result.of(run.run_dir)
    assert_as_undisturbed(run, result)
    return result


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Iterator[Disturbed]:
    with disturbed(images, tmp_path) as run:
        yield run
