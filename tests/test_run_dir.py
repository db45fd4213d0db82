"""The run folder, on a disk and in a store: files appear whole or not at all, marks say what was made from what, and
runs are found."""

import json
import os
import pickle
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from stores import Gate, gated_s3, s3

from epic_ray.errors import ConfigError, InputError, ResultError, RunFailed
from epic_ray.run_dir import CONFIG, RUN, RunDir, find_run
from epic_ray.storage import PATIENCE_VARIABLE, join

__all__ = ["gated_s3", "s3"]


@pytest.fixture(params=["disk", "store"])
def root(request, tmp_path) -> str:
    """Where runs lie."""
    if request.param == "disk":
        return str(tmp_path / "runs")
    return join(request.getfixturevalue("s3").new_bucket(), "my runs")


@pytest.fixture
def run_dir(root) -> RunDir:
    return RunDir(join(root, "Größe 1"))


@pytest.fixture
def on_disk(tmp_path) -> RunDir:
    return RunDir(str(tmp_path / "runs" / "Größe 1"))


@pytest.fixture
def in_gated_store(gated_s3) -> RunDir:
    return RunDir(join(gated_s3[0].new_bucket(), "runs", "one"))


@pytest.fixture
def gate(gated_s3) -> Gate:
    return gated_s3[1]


def files_below(run_dir: RunDir) -> list[str]:
    """Names of all files, also of those that are not published."""
    selector = fs.FileSelector(run_dir.path(""), recursive=True, allow_not_found=True)
    return [info.base_name for info in run_dir.filesystem.get_file_info(selector) if info.type == fs.FileType.File]


def make_run(root: Path | str, name: str, finished_at: str | None) -> RunDir:
    run_dir = RunDir(join(str(root), name))
    run_dir.publish_bytes(CONFIG, b"name: x\n")
    if finished_at:
        run_dir.publish_json(RUN, {"finished_at": finished_at})
    return run_dir


def test_a_published_file_is_whole_and_counted(run_dir):
    assert run_dir.publish_bytes("a/b.txt", b"12345") == 5
    assert run_dir.read_bytes("a/b.txt") == b"12345"
    assert run_dir.list("a") == ["a/b.txt"]
    assert files_below(run_dir) == ["b.txt"]
    assert run_dir.name == "Größe 1"
    assert run_dir.is_local == run_dir.root.startswith("/")


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


def test_what_a_killed_writer_left_is_never_listed(on_disk):
    """Seen from inside the write, and as a leftover."""
    seen = []

    def write(stream):
        stream.write(b"x")
        seen.extend([on_disk.list("a"), files_below(on_disk)])

    on_disk.publish("a/b.txt", write)
    during, below = seen
    assert during == []
    assert len(below) == 1
    Path(on_disk.path("a"), below[0]).write_bytes(b"left by a killed process")
    assert on_disk.list("a") == on_disk.list("") == ["a/b.txt"]
    Path(on_disk.path(below[0])).write_bytes(b"another")
    assert on_disk.remove_temporaries() == 2
    assert files_below(on_disk) == ["b.txt"]
    assert on_disk.remove_temporaries() == 0


def test_temporaries_of_a_run_that_is_not_there_are_none(run_dir):
    assert run_dir.remove_temporaries() == 0


def test_the_start_of_another_is_not_disturbed(on_disk):
    """It may be writing its claim, while what the dead left is removed."""
    on_disk.publish("locks/a.json", lambda stream: on_disk.remove_temporaries() and None)
    assert on_disk.list("locks") == ["locks/a.json"]
    assert on_disk.list("") == []


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"config\.yaml: cannot be written .*check rights and free space"):
        RunDir(str(tmp_path / "file" / "run")).publish_bytes(CONFIG, b"x")


def test_a_bucket_that_is_not_there_is_an_input_error(s3):
    with pytest.raises(InputError, match=r"config\.yaml: cannot be written .*NO_SUCH_BUCKET"):
        RunDir("s3://no-such-bucket/run").publish_bytes(CONFIG, b"x")


def test_a_folder_is_no_file(run_dir):
    run_dir.publish_bytes("a/b.txt", b"x")
    assert not run_dir.exists("a")
    with pytest.raises((InputError, ResultError), match="/a: "):
        run_dir.read_bytes("a")


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
    assert json.loads(run_dir.read_bytes("marks/features.json").decode()) == mark
    run_dir.drop_mark("features")
    assert run_dir.read_mark("features") is None


def test_folders_are_deleted_whole_and_absent_ones_are_no_fault(run_dir):
    for file in ("pictures/val/a.png", "pictures/val/b/c.png", "pictures/value.png"):
        run_dir.publish_bytes(file, b"x")
    run_dir.delete_folder("pictures/val")
    run_dir.delete_folder("pictures/val")
    assert run_dir.list("") == ["pictures/value.png"]


def test_deleting_what_is_gone_is_no_fault(run_dir):
    for file in ("a/1", "a/2"):
        run_dir.publish_bytes(file, b"x")
    run_dir.delete(["a/0", "a/1", "b/1"])
    assert run_dir.list("") == ["a/2"]


def test_names_with_signs_of_addresses_are_names(root):
    run_dir = RunDir(join(root, "50% of a+b"))
    run_dir.publish_bytes("pictures/c d#e?f%20.png", b"x")
    assert run_dir.list("pictures") == ["pictures/c d#e?f%20.png"]
    assert run_dir.read_bytes("pictures/c d#e?f%20.png") == b"x"


def test_a_published_file_is_copied_to_a_disk(run_dir, tmp_path):
    data = os.urandom(1_000_000)
    run_dir.publish_bytes("maps/a.arrow", data)
    run_dir.fetch("maps/a.arrow", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    with pytest.raises(ResultError, match=r"b\.arrow: missing"):
        run_dir.fetch("maps/b.arrow", tmp_path / "copy")


# --- disks: power cuts, no space


def test_a_file_is_on_the_disk_before_it_has_its_name(on_disk, monkeypatch):
    seen = []

    def fsync(handle: int) -> None:
        seen.append((os.fstat(handle).st_size, on_disk.exists("a.txt")))

    monkeypatch.setattr(os, "fsync", fsync)
    on_disk.publish_bytes("a.txt", b"12345")
    assert seen[0] == (5, False)
    assert len(seen) == 2, "the folder, with the name in it"
    on_disk.publish("b.txt", lambda stream: stream.write(b"x") and None, durable=False)
    assert len(seen) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk ({mounted.stderr.strip()})")
    yield place
    subprocess.run(["umount", place], check=True)


def write_noise(stream: pa.NativeFile) -> None:
    stream.write(os.urandom(3_000_000))


def write_parquet(stream: pa.NativeFile) -> None:
    pq.write_table(pa.table({"noise": [os.urandom(300_000) for _ in range(10)]}), stream)


@pytest.mark.parametrize("write", [write_noise, write_parquet])
def test_a_full_disk_tears_nothing_and_the_run_goes_on_when_there_is_space(small_disk, write):
    run_dir = RunDir(str(small_disk / "run"))
    (small_disk / "filler").write_bytes(bytes(1_000_000))
    run_dir.publish_bytes("b.parquet", b"old")
    for relative in ("b.parquet", "new/c.parquet"):
        with pytest.raises(RunFailed, match=rf"{relative}: no space left .*; free some and start again; what is fin"):
            run_dir.publish(relative, write)
    assert files_below(run_dir) == ["b.parquet"]
    assert run_dir.read_bytes("b.parquet") == b"old"
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert run_dir.publish("b.parquet", write) >= 3_000_000
    assert len(run_dir.read_bytes("b.parquet")) >= 3_000_000


def test_a_disk_without_rights_is_an_input_error(small_disk):
    run_dir = RunDir(str(small_disk / "run"))
    run_dir.publish_bytes("a.txt", b"x")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(InputError, match=r"b\.txt: cannot be written .*check rights"):
        run_dir.publish_bytes("b.txt", b"x")
    with pytest.raises(InputError, match=r"a\.txt: cannot be deleted"):
        run_dir.delete(["a.txt"])
    assert run_dir.read_bytes("a.txt") == b"x"


# --- stores that go away


def all_at_once(run_dir: RunDir) -> list:
    """What each access gives or raises, all of them made at the same time."""
    accesses = [
        lambda: run_dir.publish_bytes("new.txt", b"123"),
        lambda: run_dir.read_bytes("old.txt"),
        lambda: run_dir.read_json("old.json"),
        lambda: run_dir.exists("old.txt"),
        lambda: run_dir.exists("none.txt"),
        lambda: "old.txt" in run_dir.list(""),
        lambda: run_dir.read_mark("fit"),
        lambda: run_dir.drop_mark("fit"),
        lambda: run_dir.delete(["none.txt"]),
        lambda: run_dir.delete_folder("none"),
    ]
    with ThreadPoolExecutor(len(accesses)) as pool:
        futures = [pool.submit(access) for access in accesses]
        return [future.exception() or future.result() for future in futures]


@pytest.mark.slow
def test_a_store_that_is_away_for_a_while_is_waited_for(in_gated_store, gate):
    in_gated_store.publish_bytes("old.txt", b"old")
    in_gated_store.publish_bytes("old.json", b"[]")
    gate.shut()
    threading.Timer(20, gate.open).start()
    assert all_at_once(in_gated_store) == [3, b"old", [], True, False, True, None, None, None, None]
    assert in_gated_store.read_bytes("new.txt") == b"123"


@pytest.mark.slow
def test_a_store_that_stays_away_fails_the_run_and_nothing_counts_as_missing(in_gated_store, gate, monkeypatch):
    monkeypatch.setenv(PATIENCE_VARIABLE, "0.1")
    in_gated_store.publish_bytes("old.txt", b"old")
    gate.shut()
    results = all_at_once(in_gated_store)
    assert [type(result) for result in results] == [RunFailed] * len(results)
    assert all("the store did not answer for" in str(result) for result in results)
    assert in_gated_store.show("new.txt") in str(results[0])
    with pytest.raises(RunFailed, match="did not answer"):
        find_run(None, in_gated_store.root)
    gate.open()
    assert in_gated_store.read_bytes("old.txt") == b"old"


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["over an old one", "anew"])
def test_a_large_put_that_breaks_off_leaves_the_old_object_or_none(in_gated_store, gate, monkeypatch, there):
    monkeypatch.setenv(PATIENCE_VARIABLE, "0.1")
    data = os.urandom(30_000_000)
    if there:
        in_gated_store.publish_bytes("a.bin", b"old")
    broken_off = 0
    before = [b"old"] if there else []
    for seconds in (0.02, 0.1, 0.3):
        timer = threading.Timer(seconds, gate.shut)
        timer.start()
        allowed = [[data]]
        try:
            in_gated_store.publish_bytes("a.bin", data)
        except RunFailed:
            allowed.append(before)  # or all of it has come, and the answer has not
            broken_off += 1
        timer.join()
        gate.open()
        before = [in_gated_store.read_bytes(file) for file in in_gated_store.list("")]
        assert any(before == found for found in allowed), [len(found) for found in before]
    assert broken_off
    assert in_gated_store.publish_bytes("a.bin", data) == len(data)
    assert in_gated_store.read_bytes("a.bin") == data


class InterruptedStore:
    """A filesystem whose stream has just been opened when Ctrl-C comes."""

    def __init__(self, filesystem: fs.FileSystem) -> None:
        self._filesystem = filesystem

    def __getattr__(self, name: str):
        return getattr(self._filesystem, name)

    def open_output_stream(self, path: str) -> pa.NativeFile:
        stream = self._filesystem.open_output_stream(path)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return stream


def test_an_interrupted_put_publishes_no_torn_object(s3):
    run_dir = RunDir(join(s3.new_bucket(), "run"))
    filesystem, place = run_dir._location
    run_dir.__dict__["_location"] = InterruptedStore(filesystem), place
    with pytest.raises(KeyboardInterrupt):
        run_dir.publish_bytes("a.txt", b"whole")
    assert [run_dir.read_bytes(file) for file in run_dir.list("")] in ([], [b"whole"])


def test_an_address_may_name_its_endpoint(s3, monkeypatch):
    root = f"{s3.new_bucket()}/runs?endpoint_override={s3.endpoint}&region=us-east-1"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    made = make_run(root, "one", "2026-01-01T00:00:00Z")
    assert made.name == "one"
    assert made.show(CONFIG) == f"{root.partition('?')[0]}/one/config.yaml?{root.partition('?')[2]}"
    for found in (find_run("one", root), find_run(None, root), find_run(made.root, "elsewhere")):
        assert found.root == made.root
        assert found.list("") == [CONFIG, RUN]
        assert pickle.loads(pickle.dumps(found)).exists(RUN)


# --- which run a command means


def test_the_newest_finished_run_is_meant_unless_one_is_named(root):
    make_run(root, "old", "2026-01-01T00:00:00Z")
    make_run(root, "new", "2026-01-02T00:00:00Z")
    make_run(root, "unfinished", None)
    RunDir(root).publish_bytes("a file", b"")
    assert find_run(None, root).name == "new"
    assert find_run("old", root).name == "old"
    assert find_run("unfinished", root).name == "unfinished"
    assert find_run(join(root, "old"), "elsewhere").name == "old"
    with pytest.raises(ConfigError, match="no run there"):
        find_run("absent", root)


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
