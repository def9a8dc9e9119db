"""The documentation names files, tests and settings that exist."""

import re

import pytest

from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_test_that_the_pitfalls_page_names_exists():
    cited = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/pitfalls.md").read_text())
    assert len(cited) > 100
    for file, name in cited:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_file_that_is_named_exists(page):
    for file in re.findall(r"tests/[\w/]+\.py", page.read_text()):
        assert (ROOT / file).is_file(), file


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 12_000
