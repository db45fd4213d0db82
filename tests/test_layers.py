"""Imports point inwards only: seen on the syntax trees, so that no module need be imported to be judged."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import epic_ray

PACKAGE = Path(epic_ray.__file__).parent
HEAVY = {"torch", "ray", "timm", "torchvision", "pyarrow", "pydantic"}
FILES = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(nodes: Iterator[ast.AST]) -> set[str]:
    """Full names of what these nodes import: `from a import b` counts as `a` and `a.b`."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: all but the bodies of functions."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(child)


def names_in(file: str, *, only_at_import: bool = False) -> set[str]:
    tree = ast.parse(FILES[file].read_text(encoding="utf-8"))
    return imports(at_import(tree) if only_at_import else ast.walk(tree))


def within(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if any(name == package or name.startswith(f"{package}.") for package in packages)}


def files_of(folder: str) -> list[str]:
    files = [file for file in FILES if file.startswith(f"{folder}/")]
    assert len(files) >= 2, f"{folder}: the folder has moved, and this test with it"
    return files


@pytest.mark.parametrize("file", files_of("method"))
def test_mathematics_knows_no_ray_no_settings_and_no_tables(file):
    names = names_in(file)
    assert within(names, "ray", "pydantic", "pyarrow", "typer", "rich", "yaml") == set()
    # of the package itself: other mathematics, and the errors
    own = within(names, "epic_ray") - within(names, "epic_ray.method", "epic_ray.errors")
    assert own <= {"epic_ray"}


def test_one_file_knows_the_libraries_of_classifiers():
    knowing = {file for file in FILES if within(names_in(file), "timm", "torchvision")}
    assert knowing == {"method/backbones.py"}


@pytest.mark.parametrize("file", files_of("stages"))
def test_stages_know_neither_commands_nor_pages_nor_the_pipeline(file):
    assert within(names_in(file), "epic_ray.cli", "epic_ray.report", "epic_ray.pipeline") == set()


def test_the_pipeline_knows_neither_commands_nor_pages():
    assert within(names_in("pipeline.py"), "epic_ray.cli", "epic_ray.report", "typer", "rich") == set()
    assert within(names_in("pipeline.py"), "epic_ray.stages")


@pytest.mark.parametrize("file", files_of("report"))
def test_pages_know_no_commands(file):
    assert within(names_in(file), "epic_ray.cli", "typer") == set()


@pytest.mark.parametrize("file", ["config.py", "run_dir.py", "tables.py", "errors.py", "logs.py"])
def test_what_all_share_knows_nothing_of_who_uses_it(file):
    names = names_in(file)
    users = [f"epic_ray.{name}" for name in ("cli", "report", "pipeline", "stages", "method", "demo")]
    assert within(names, *users, "ray", "torch") == set()


@pytest.mark.parametrize("file", [*files_of("cli"), "__init__.py", "__main__.py", "errors.py"])
def test_commands_import_what_is_heavy_only_when_they_run(file):
    names = names_in(file, only_at_import=True)
    assert within(names, *HEAVY) == set()
    assert within(names, "epic_ray") <= within(names, "epic_ray.cli", "epic_ray.errors") | {"epic_ray"}


def test_the_walk_sees_an_import_in_a_class_a_branch_and_a_function():
    tree = ast.parse("class A:\n  import ray\nif 1:\n  import torch as t\ndef f():\n  from timm import data\n")
    assert imports(at_import(tree)) == {"ray", "torch"}
    assert imports(ast.walk(tree)) == {"ray", "torch", "timm", "timm.data"}
