"""The pages of the project: whole, and pointing at what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path for folder in (".", "docs", "benchmarks", "cluster", "epic_ray") for path in (ROOT / folder).glob("*.md")
)
OPEN_ENDS = re.compile(r"^(<{7}|={7}|>{7})( |$)|\b(TODO|FIXME|TBD)\b|\b[A-Z0-9_]+_(FIT|HELD)\b|FIGURES", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_holds_no_marks_of_a_merge_and_nothing_left_to_fill_in(page):
    found = [match.group() for match in OPEN_ENDS.finditer(page.read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_of_a_page_lead_to_files_that_are_there(page):
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []
