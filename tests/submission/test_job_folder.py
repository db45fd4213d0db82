"""What travels with a job: enough to run it, nothing of this machine's, and little."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import small_settings

from epic_ray.config import load_config, portable
from epic_ray.errors import ConfigError
from epic_ray.submission.package import MOST_BYTES, RUN_FILE, job_folder, script


@pytest.fixture
def config(tmp_path):
    return portable(small_settings(tmp_path / "images", tmp_path / "runs"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_upload_is_well_under_a_mebibyte_and_holds_no_leftovers(config):
    with job_folder(config, in_image=False) as folder:
        files = contents(folder)
    assert sum(map(len, files.values())) < MOST_BYTES
    assert {"epic_ray/__init__.py", "epic_ray/submission/jobs.py", "jobs/train.py", "jobs/explain.py"} <= set(files)
    assert not [name for name in files if "__pycache__" in name or name.endswith(".pyc")]
    assert not folder.exists()


def test_the_same_run_gives_the_same_bytes_so_that_a_second_submission_uploads_nothing(config):
    with job_folder(config, in_image=False) as first, job_folder(config, in_image=False) as second:
        assert contents(first) == contents(second)


def test_the_run_file_is_read_back_as_the_settings_it_came_from(config):
    with job_folder(config, in_image=True) as folder:
        assert load_config(folder / RUN_FILE) == config
        assert [name for name in contents(folder) if not name.endswith(".yaml")] == []


def test_class_names_in_a_file_travel_as_a_list(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n", encoding="utf-8")
    config = small_settings(tmp_path / "images", tmp_path / "runs", model={"classes": str(names)})
    assert portable(config).model.classes == ["ant", "bee", "cat"]


def test_a_factory_that_lies_where_the_command_was_started_comes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_networks.py").write_text("def net(): ...\n", encoding="utf-8")
    config = small_settings(tmp_path / "images", tmp_path, model={"architecture": "my_networks:net"})
    with job_folder(portable(config), in_image=False) as folder:
        assert (folder / "my_networks.py").read_text(encoding="utf-8") == "def net(): ...\n"


def test_a_factory_with_too_much_beside_it_is_refused_with_its_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_bytes(b"#" * (MOST_BYTES + 1))
    config = small_settings(tmp_path / "images", tmp_path, model={"architecture": "my_package:net"})
    with pytest.raises(ConfigError, match=r"my_package:net the upload would take \d+ bytes"), job_folder(config, False):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("job", ["train", "explain", "archive"])
def test_the_scripts_start_from_the_folder_alone(config, job):
    with job_folder(config, in_image=False) as folder:
        command = script(job, in_image=False).split()
        done = subprocess.run(
            [sys.executable, *command[1:]], cwd=folder, env={"PATH": "", "PYTHONPATH": str(folder)},
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"ConfigError: usage: python jobs/{job}.py RUN")
