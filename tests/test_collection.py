"""Collecting a run: only a whole one, every byte proved, in place in one step; and through one file, an archive."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import small_settings
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from stores import gated_s3, s3

from epic_ray import pipeline
from epic_ray.collection import check, check_collection, check_run, collect, collect_archive, staging, write_archive
from epic_ray.collection.archive import MANIFEST
from epic_ray.errors import ConfigError, InputError, ResultError, RunFailed
from epic_ray.lock import hold
from epic_ray.logs import Meter, Reporter
from epic_ray.run import TRAIN_STAGES
from epic_ray.run_dir import BASIS, RUN, RunDir, find_run, mark_file
from epic_ray.storage import PATIENCE_VARIABLE, join

__all__ = ["gated_s3", "s3"]
pytestmark = pytest.mark.ray

LEFT_OUT = ("tables/features/", "maps/", "fit/")
NEVER = ("locks/", "attempts/")


def often(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def finished(ray_session, patches, tmp_path_factory) -> Path:
    """A finished run with explanations of its held-out split; nobody writes to it."""
    config = small_settings(patches, tmp_path_factory.mktemp("runs"))
    pipeline.train(config, Reporter())
    run_dir = RunDir(join(config.output.root, config.name))
    run, record = pipeline.open_finished(run_dir, Reporter())
    pipeline.explain(run, record, "val")
    run_dir.publish_bytes("pictures/val/000000-größe.png", b"no picture")
    run_dir.publish_bytes(f"pictures/val/{'long' * 50}.png", b"")
    return Path(run_dir.root)


@pytest.fixture
def source(finished, tmp_path) -> RunDir:
    """A copy of the finished run, to be spoiled."""
    shutil.copytree(finished, tmp_path / "runs" / "small")
    return RunDir(str(tmp_path / "runs" / "small"))


@pytest.fixture
def there(tmp_path) -> Path:
    return tmp_path / "out" / "small"


def tree(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if not name.startswith(NEVER)}


def expected(folder: Path, everything: bool = False) -> dict[str, bytes]:
    """What a collection of the run must hold, beside its list."""
    return {name: data for name, data in tree(folder).items() if everything or not name.startswith(LEFT_OUT)}


def collected(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != check.COLLECTED}


def nothing_at(there: Path) -> bool:
    """Neither the folder nor anything hidden beside it."""
    return not there.exists() and (not there.parent.exists() or not os.listdir(there.parent))


def words(found: list) -> str:
    return "\n".join(map(str, found))


# --- whole runs


@pytest.mark.parametrize("everything", [False, True])
def test_a_collection_holds_the_run_byte_for_byte_and_says_what_it_is(source, there, everything):
    source.publish_bytes("locks/dead.json", b"{}")
    os.utime(source.path("locks/dead.json"), (0, 0))
    source.publish_bytes("attempts/features/train-000000/a", b"")
    result = collect(source, there, everything=everything)
    files = expected(Path(source.root), everything)
    assert collected(there) == files
    assert any(name.startswith(LEFT_OUT) for name in files) == everything
    assert (result.folder, result.whole, result.findings, result.replaced) == (there, True, (), False)
    assert (result.files, result.size_bytes) == (len(files), sum(map(len, files.values())))
    listed = json.loads((there / check.COLLECTED).read_bytes())
    assert (listed["source"], listed["whole"], listed["everything"]) == (source.root, True, everything)
    assert listed["files"].keys() == files.keys()
    assert os.listdir(there.parent) == ["small"]


def test_a_whole_run_and_its_collection_have_nothing_against_them(source, there):
    assert check_run(source) == check_run(source, everything=True) == []
    collect(source, there)
    assert check_run(RunDir(str(there)), everything=True) == check_collection(RunDir(str(there))) == []


def test_the_stages_that_are_checked_are_those_of_a_run():
    assert check.STAGES == TRAIN_STAGES


def test_a_run_in_a_store_is_collected_like_one_on_a_disk(finished, there, s3):
    run_dir = RunDir(join(s3.new_bucket(), "my runs", "Größe 1"))
    s3.upload(finished, run_dir.root)
    assert check_run(run_dir, everything=True) == []
    assert collect(run_dir, there).whole
    assert collected(there) == expected(finished)
    write_archive(run_dir, there.parent / "run.tar")
    collect_archive(there.parent / "run.tar", there)
    assert collected(there) == expected(finished)


@pytest.mark.slow
def test_a_store_that_stays_away_leaves_nothing_of_a_collection(finished, there, gated_s3, monkeypatch):
    monkeypatch.setenv(PATIENCE_VARIABLE, "1")
    store, gate = gated_s3
    run_dir = RunDir(join(store.new_bucket(), "run"))
    store.upload(finished, run_dir.root)
    with pytest.raises(RunFailed, match="did not answer"):
        collect(run_dir, there, reporter=Meddler(gate.shut))
    assert nothing_at(there)


def test_a_collected_run_is_found_and_explains_images_and_splits(finished, source, there, patches):
    from epic_ray.report.explained import Illustrator
    from epic_ray.stages.images import Address

    collect(source, there)
    assert find_run(None, str(there.parent)).root == find_run("small", str(there.parent)).root == str(there)
    run, record = pipeline.open_finished(RunDir(str(there)), Reporter())
    photo = next((patches / "val").rglob("*.png"))
    assert Illustrator(run, 1).explain(Address(str(photo)), 3, "share")[1]
    pipeline.explain(run, record, "train", limit=5)
    assert check_run(RunDir(str(there))) == []
    with pytest.raises(ConfigError, match=r"was worked in since it was collected \(.*train"):
        collect(source, there)


# --- damage at the source


@given(data=st.data())
@often(30)
def test_any_flipped_byte_of_a_table_or_of_u_is_found(finished, tmp_path, data):
    run_dir = copied_once(finished, tmp_path)
    files = [file for file in run_dir.list("tables") if file.endswith(".parquet")] + [BASIS]
    file = data.draw(st.sampled_from(files))
    whole = bytearray(run_dir.read_bytes(file))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with changed(run_dir, file, bytes(whole)):
        assert file in {finding.file for finding in check_run(run_dir, everything=True)}
        with pytest.raises(ResultError, match="half done or damaged"):
            collect(run_dir, tmp_path / "out", everything=True)
    assert nothing_at(tmp_path / "out") or os.listdir(tmp_path) == ["run"]


@given(data=st.data())
@often(30)
def test_any_file_that_is_gone_or_torn_is_found(finished, tmp_path, data):
    run_dir = copied_once(finished, tmp_path)
    spare = ("pictures/", "maps/", "fit/", "attempts/", "basis/README.md", "config.yaml")
    files = [file for file in run_dir.list("") if not file.startswith(spare)]
    file = data.draw(st.sampled_from(files))
    whole = run_dir.read_bytes(file)
    torn = None if data.draw(st.booleans()) else whole[: data.draw(st.integers(0, len(whole) - 3))]
    with changed(run_dir, file, torn):
        assert check_run(run_dir, everything=True)
        with pytest.raises(ResultError, match="half done or damaged"):
            write_archive(run_dir, tmp_path / "out.tar", everything=True)
    assert os.listdir(tmp_path) == ["run"]


def copied_once(finished: Path, folder: Path) -> RunDir:
    if not (folder / "run").exists():
        shutil.copytree(finished, folder / "run")
    return RunDir(str(folder / "run"))


@contextmanager
def changed(run_dir: RunDir, file: str, data: bytes | None) -> Iterator[None]:
    path = Path(run_dir.path(file))
    whole = path.read_bytes()
    path.unlink() if data is None else path.write_bytes(data)
    yield
    path.write_bytes(whole)


def test_a_unit_that_holds_another_units_images_is_found(source):
    folder = Path(source.path("tables/images/train"))
    shutil.copy(folder / "unit-000001.parquet", folder / "unit-000000.parquet")
    assert "tables/images/train: its" in words(check_run(source))
    found = check_run(source, everything=True)
    shutil.copy(folder / "unit-000001.parquet", folder / "unit-000009.parquet")
    assert words(found) != words(check_run(source, everything=True))


def test_marks_of_another_run_are_found(source):
    for stage in TRAIN_STAGES:
        mark = source.read_mark(stage)
        source.publish_json(mark_file(stage), mark | {"fingerprint": "another"})
        assert f"{mark_file(stage)}: is of another run" in words(check_run(source))
        source.publish_json(mark_file(stage), mark)
    assert check_run(source) == []


def test_half_done_explanations_are_found(source, there):
    source.drop_mark("explanations-val")
    with pytest.raises(ResultError, match=r"tables/explanations/val: explanations are half done"):
        collect(source, there)


# --- half-done runs


def test_a_half_done_run_is_refused_with_what_to_do(source, there):
    source.delete([RUN, mark_file("prototypes")])
    with pytest.raises(ResultError, match=r"run\.json: is missing.*\n.*marks/prototypes\.json(.|\n)*--partial"):
        collect(source, there)
    assert nothing_at(there)


def test_a_run_that_is_being_written_is_half_done(source, there):
    with hold(source, "explain"), pytest.raises(ResultError, match=r"locks: `explain` \(process"):
        collect(source, there)
    assert collect(source, there).whole


@pytest.mark.parametrize("through", ["folder", "archive"])
def test_partial_takes_what_is_whole_and_never_looks_finished(source, there, through):
    torn = "tables/images/train/unit-000001.parquet"
    Path(source.path(torn)).write_bytes(b"PAR1")
    if through == "folder":
        result = collect(source, there, partial=True)
    else:
        file = there.parent / "run.tar"
        assert not write_archive(source, file, partial=True).whole
        with pytest.raises(ResultError, match="half done or damaged"):
            collect_archive(file, there)
        assert not there.exists()
        result = collect_archive(file, there, partial=True)
    assert not result.whole
    assert torn in words(result.findings)
    assert collected(there).keys() == expected(Path(source.root)).keys() - {torn, RUN}
    assert "half done when it was collected" in words(check_run(RunDir(str(there))))
    with pytest.raises(ResultError, match="not finished"):
        pipeline.open_finished(RunDir(str(there)), Reporter())
    if through == "folder":
        shutil.rmtree(source.root)
        with pytest.raises(ConfigError, match="no run there"):
            collect(source, there, partial=True)


class Meddler(Reporter):
    """Does something to the run while it is collected: after the first file."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle, self._done = meddle, False

    @contextmanager
    def stage(self, *_, **__) -> Iterator[Meter]:
        yield self

    def advance(self, *_, **__) -> None:
        if not self._done:
            self._done = True
            self._meddle()


@pytest.mark.parametrize("what", ["retrained", "vanished", "added"])
def test_a_run_that_changes_meanwhile_is_not_collected(source, there, what):
    meddle = {
        "retrained": lambda: source.publish_json(RUN, source.read_json(RUN) | {"fingerprints": {}}),
        "vanished": lambda: source.delete(["tables/selection/val.parquet"]),
        "added": lambda: source.publish_bytes("tables/explanations/train/unit-000000.parquet", b""),
    }[what]
    before = tree(Path(source.root))
    with pytest.raises(ResultError, match=r"anew while it was collected .*run the command again"):
        collect(source, there, reporter=Meddler(meddle))
    assert nothing_at(there)
    for name, data in before.items():
        source.publish_bytes(name, data)
    shutil.rmtree(source.path("tables/explanations/train"), ignore_errors=True)
    with pytest.raises(ResultError, match="run the command again"):
        write_archive(source, there, reporter=Meddler(meddle))
    assert nothing_at(there)


# --- the destination


def test_a_destination_that_holds_anything_else_is_refused(source, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_bytes(b"mine")
    (tmp_path / "empty").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(ConfigError, match="name another"):
            collect(source, tmp_path / name)
    for inside in (source.root, f"{source.root}/tables/copy", f"{source.root}/../small"):
        with pytest.raises(ConfigError, match="is the run itself or lies in it"):
            collect(source, inside)
    with pytest.raises(ConfigError, match="local folder"):
        collect(source, "s3://bucket/run")
    with pytest.raises(InputError, match="cannot be written"):
        collect(source, tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="name another file"):
        write_archive(source, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "folder" / "mine").read_bytes() == b"mine"
    assert check_run(source) == []
    assert collect(source, tmp_path / "empty").whole
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "folder", "runs"]


def test_only_one_process_collects_to_a_place(source, there):
    with staging.staged(there), pytest.raises(ConfigError, match="another process is writing it"):
        collect(source, there)
    assert collect(source, there).whole


def test_what_the_collection_of_a_run_was_is_found_when_it_changes(source, there):
    collect(source, there)
    (there / "config.yaml").write_bytes(b"other: settings\n")
    (there / "pictures/val/000000-größe.png").unlink()
    found = words(check_run(RunDir(str(there))))
    assert "config.yaml: was changed since" in found
    assert "größe.png: is missing" in found
    with pytest.raises(ConfigError, match=r"was worked in since it was collected \(config"):
        collect(source, there)


def test_a_collection_that_somebody_works_in_is_not_replaced(source, there):
    collect(source, there)
    with hold(RunDir(str(there)), "explain"), pytest.raises(ConfigError, match=r"`explain` .*is writing to it"):
        collect(source, there)
    (there / check.COLLECTED).write_bytes(b"torn")
    with pytest.raises(ConfigError, match="name another folder"):
        collect(source, there)


@pytest.mark.parametrize("in_one_step", [True, False])
def test_an_earlier_collection_is_replaced_and_a_reader_sees_one_of_them(source, there, in_one_step, monkeypatch):
    """Renaming is slowed down, so that a gap between two renames is seen."""
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *paths: (rename(*paths), time.sleep(0.05)))
    if not in_one_step:
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    collect(source, there)
    absences, ended = [], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            if not (there / RUN).exists():
                absences.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(5):
        source.publish_bytes("basis/README.md", str(number).encode())
        assert collect(source, there).replaced
        assert (there / "basis/README.md").read_bytes() == str(number).encode()
    ended.set()
    watcher.join()
    assert bool(absences) != in_one_step
    assert os.listdir(there.parent) == ["small"]
    assert check_run(RunDir(str(there))) == []


KILLED = """
import json, os, signal, sys
from collections import Counter
from pathlib import Path
from epic_ray.collection import staging
from epic_ray.collection import collect
from epic_ray.run_dir import RunDir

source, out, in_one_step, moments = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "True", json.loads(sys.argv[4])
if not in_one_step:
    staging.exchange = lambda *_: False
for number, (kind, count) in enumerate(moments):
    child = os.fork()
    if not child:
        seen = Counter()
        def hook(event, arguments):
            seen[event] += 1
            if event == kind and seen[event] == count:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        collect(RunDir(source), out / str(number) / "run")
        print(json.dumps(seen), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_killed_collection_leaves_nothing_half_done_and_the_next_one_succeeds(source, tmp_path, earlier, in_one_step):
    """Killed before calls of the system that Python tells of: early, late, and before each rename."""

    def run(moments: list[tuple[str, int]]) -> list[dict[str, int]]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if earlier:
            for number in range(len(moments)):
                collect(source, tmp_path / "out" / str(number) / "run")
        arguments = [source.root, str(tmp_path / "out"), str(in_one_step), json.dumps(moments)]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    [counts] = run([("none", 0)])
    moments = [
        (kind, place)
        for kind, places in {"open": 6, "os.mkdir": 3, "os.rename": 9, "ctypes.dlsym": 9, "os.rmdir": 3}.items()
        for place in range(1, counts.get(kind, 0) + 1, max(1, counts.get(kind, 0) // places))
    ]
    assert len(run(moments)) <= 2  # all others were killed
    seen = set()
    for number in range(len(moments)):
        folder = tmp_path / "out" / str(number) / "run"
        was_there = folder.exists()
        seen.add(was_there)
        if was_there:
            assert check_run(RunDir(str(folder))) == []
            assert collected(folder) == expected(Path(source.root))
        assert was_there or not earlier or not in_one_step
        assert collect(source, folder).replaced == (earlier or was_there)
        assert os.listdir(folder.parent) == ["run"]
    assert seen == ({True} if earlier and in_one_step else {True, False})


# --- archives


@pytest.fixture(scope="module")
def archive(finished, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("archive") / "run.tar"
    facts = write_archive(RunDir(str(finished)), file)
    assert (facts.whole, facts.size_bytes, facts.files) == (True, file.stat().st_size, len(expected(finished)))
    return file


@pytest.mark.parametrize("everything", [False, True])
def test_a_run_comes_through_an_archive_byte_for_byte(source, there, everything):
    file = there.parent / "run.tar"
    write_archive(source, file, everything=everything)
    write_archive(source, file, everything=everything)
    with file.open("rb") as stream:
        assert collect_archive(stream, there).source == source.root
    assert collected(there) == expected(Path(source.root), everything)
    assert collect_archive(file, there).replaced
    assert check_run(RunDir(str(there)), everything=True) == []
    assert sorted(os.listdir(there.parent)) == ["run.tar", "small"]


def test_any_tar_program_reads_an_archive_in_its_fixed_order(archive, finished, tmp_path):
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path], check=True)
    manifest = json.loads((tmp_path / MANIFEST).read_bytes())
    for name, data in expected(finished).items():
        assert (tmp_path / name).read_bytes() == data
    assert list(manifest["files"]) == sorted(expected(finished))
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [MANIFEST, *manifest["files"], "MANIFEST.sha256"]


@given(cut=st.integers(0, 2**40))
@example(cut=-1)
@example(cut=-1024)
@often(50)
def test_a_cut_archive_publishes_nothing(archive, tmp_path, cut):
    data = archive.read_bytes()
    with pytest.raises(ResultError):
        collect_archive(io.BytesIO(data[: cut % len(data)]), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@given(place=st.integers(0, 2**40), bit=st.integers(0, 7))
@often(50)
def test_an_altered_archive_publishes_nothing_else_than_the_run(archive, finished, tmp_path_factory, place, bit):
    """Bytes that no reader looks at (padding) may differ."""
    folder = tmp_path_factory.mktemp("altered")
    data = bytearray(archive.read_bytes())
    data[place % len(data)] ^= 1 << bit
    try:
        collect_archive(io.BytesIO(bytes(data)), folder / "out")
    except ResultError:
        assert os.listdir(folder) == []
    else:
        assert collected(folder / "out") == expected(finished)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "tables//x", "", "collected.json", "link"])
def test_a_member_outside_of_the_run_is_refused(archive, tmp_path, name):
    """Also where the manifest lists it, with its right checksum."""
    info, content = tarfile.TarInfo(name), b"x"
    info.size = 1
    if name == "link":
        info.type, info.linkname, info.size = tarfile.SYMTYPE, "/tmp", 0
    with tarfile.open(archive) as tar:
        manifest = json.load(tar.extractfile(MANIFEST))
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    manifest["files"] = {name: {"size_bytes": 1, "sha256": digest}}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        first = tarfile.TarInfo(MANIFEST)
        text = json.dumps(manifest).encode()
        first.size = len(text)
        tar.addfile(first, io.BytesIO(text))
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ResultError, match=r"holds|plain file|bytes"):
        collect_archive(io.BytesIO(out.getvalue()), tmp_path / "deep" / "out")
    assert os.listdir(tmp_path / "deep") == []
    assert os.listdir(tmp_path) == ["deep"]


def test_what_is_no_archive_is_told(tmp_path, there):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8" * 9000)
    with pytest.raises(ResultError, match="the archive was cut or altered, or is none"):
        collect_archive(tmp_path / "photo.jpg", there)
    with pytest.raises(InputError, match=r"absent\.tar: cannot be read"):
        collect_archive(tmp_path / "absent.tar", there)
    assert nothing_at(there)
