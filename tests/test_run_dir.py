"""The run folder: files appear whole or not at all, marks say what was made from what, and runs are found."""

import json
import pickle
from pathlib import Path

import pytest

from epic_ray.errors import ConfigError, InputError, ResultError
from epic_ray.run_dir import CONFIG, RUN, RunDir, find_run


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    return RunDir(str(tmp_path / "runs" / "Größe 1"))


def files_below(run_dir: RunDir) -> list[str]:
    return [path.name for path in Path(run_dir.root).rglob("*") if path.is_file()]


def make_run(root: Path, name: str, finished_at: str | None) -> RunDir:
    run_dir = RunDir(str(root / name))
    run_dir.publish_bytes(CONFIG, b"name: x\n")
    if finished_at:
        run_dir.publish_json(RUN, {"finished_at": finished_at})
    return run_dir


def test_a_published_file_is_whole_and_counted(run_dir):
    assert run_dir.publish_bytes("a/b.txt", b"12345") == 5
    assert run_dir.read_bytes("a/b.txt") == b"12345"
    assert run_dir.list("a") == ["a/b.txt"]
    assert files_below(run_dir) == ["b.txt"]
    assert (run_dir.name, run_dir.is_local) == ("Größe 1", True)


@pytest.mark.parametrize("fault", [RuntimeError("bug"), KeyboardInterrupt(), MemoryError()])
def test_a_writer_that_fails_half_way_leaves_nothing(run_dir, fault):
    def write(stream):
        stream.write(b"half")
        raise fault

    with pytest.raises(type(fault)):
        run_dir.publish("a/b.txt", write)
    assert files_below(run_dir) == []
    assert not run_dir.exists("a/b.txt")


def test_a_failed_rewrite_keeps_the_file_that_was_there(run_dir):
    run_dir.publish_bytes("b.txt", b"old")

    def write(stream):
        stream.write(b"newer and longer")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_dir.publish("b.txt", write)
    assert run_dir.read_bytes("b.txt") == b"old"
    assert files_below(run_dir) == ["b.txt"]


def test_what_a_killed_writer_left_is_never_listed(run_dir):
    """Seen from inside the write, and as a leftover."""
    seen = []

    def write(stream):
        stream.write(b"x")
        seen.extend([run_dir.list("a"), files_below(run_dir)])

    run_dir.publish("a/b.txt", write)
    during, on_disk = seen
    assert during == []
    assert len(on_disk) == 1
    Path(run_dir.path("a"), on_disk[0]).write_bytes(b"left by a killed process")
    assert run_dir.list("a") == run_dir.list("") == ["a/b.txt"]


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"config\.yaml: cannot be written .*check rights and free space"):
        RunDir(str(tmp_path / "file" / "run")).publish_bytes(CONFIG, b"x")


def test_a_missing_file_says_what_to_do(run_dir):
    with pytest.raises(ResultError, match=r"run\.json: missing; run the stage that writes it again"):
        run_dir.read_json(RUN)
    assert run_dir.list("tables") == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{"])
def test_torn_json_is_a_result_error(run_dir, content):
    run_dir.publish_bytes(RUN, content)
    with pytest.raises(ResultError, match="is no JSON"):
        run_dir.read_json(RUN)


def test_numbers_that_json_lacks_are_not_published(run_dir):
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_dir.publish_json(RUN, {"top1": float("nan")})
    assert not run_dir.exists(RUN)


def test_an_unknown_address_is_an_input_error():
    with pytest.raises(InputError, match="no filesystem for this address"):
        RunDir("zebra://bucket/run").exists(CONFIG)


def test_a_run_folder_travels_to_other_processes(run_dir):
    run_dir.publish_bytes("a.txt", b"x")  # the filesystem is open now; it does not travel
    other = pickle.loads(pickle.dumps(run_dir))
    assert other.read_bytes("a.txt") == b"x"
    assert str(other) == str(run_dir)


def test_a_relative_root_means_the_same_folder_after_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir("runs/one")
    run_dir.publish_bytes(CONFIG, b"x")
    monkeypatch.chdir("/")
    assert run_dir.exists(CONFIG)
    assert run_dir.show(CONFIG) == str(tmp_path / "runs/one/config.yaml")


def test_a_mark_says_what_a_stage_was_made_from(run_dir):
    assert run_dir.read_mark("features") is None
    run_dir.drop_mark("features")  # nothing to drop is no fault
    mark = run_dir.write_mark("features", "abc", 1.23456, rows=3, failures={"truncated PNG": 1})
    assert run_dir.read_mark("features") == mark
    assert mark["fingerprint"] == "abc"
    assert (mark["stage"], mark["seconds"], mark["rows"]) == ("features", 1.235, 3)
    assert json.loads(Path(run_dir.path("marks/features.json")).read_text(encoding="utf-8")) == mark
    run_dir.drop_mark("features")
    assert run_dir.read_mark("features") is None


def test_folders_are_deleted_whole_and_absent_ones_are_no_fault(run_dir):
    run_dir.publish_bytes("pictures/val/a.png", b"x")
    run_dir.delete_folder("pictures/val")
    run_dir.delete_folder("pictures/val")
    assert run_dir.list("") == []


# --- which run a command means


def test_the_newest_finished_run_is_meant_unless_one_is_named(tmp_path):
    make_run(tmp_path, "old", "2026-01-01T00:00:00Z")
    make_run(tmp_path, "new", "2026-01-02T00:00:00Z")
    make_run(tmp_path, "unfinished", None)
    (tmp_path / "a file").write_bytes(b"")
    assert find_run(None, str(tmp_path)).name == "new"
    assert find_run("old", str(tmp_path)).name == "old"
    assert find_run("unfinished", str(tmp_path)).name == "unfinished"


def test_a_run_is_found_by_its_path(tmp_path, monkeypatch):
    made = make_run(tmp_path / "elsewhere", "mine", None)
    assert find_run(str(tmp_path / "elsewhere" / "mine"), "runs").root == made.root
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_run("mine", "runs").root == made.root
    assert find_run("../elsewhere/mine/", "runs").exists(CONFIG)


@pytest.mark.parametrize("name", ["absent", "below/nothing", "file", "folder"])
def test_a_run_that_is_none_is_a_config_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"")
    Path("folder").mkdir()
    with pytest.raises(ConfigError, match=rf"^{name}: no run there"):
        find_run(name, "runs")


def test_without_a_finished_run_the_command_says_how_to_get_one(tmp_path):
    make_run(tmp_path, "unfinished", None)
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="holds no finished run; `epic-ray train` makes one"):
            find_run(None, str(root))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be searched for runs"):
        find_run(None, str(tmp_path / "file"))


@pytest.mark.parametrize("content", [b"[]", b"{}", b"3"])
def test_a_record_of_something_else_is_named(tmp_path, content):
    make_run(tmp_path, "odd", None).publish_bytes(RUN, content)
    with pytest.raises(ResultError, match=r"odd/run\.json: is no record of a run"):
        find_run(None, str(tmp_path))
