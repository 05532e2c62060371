# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The pages: their tables are the results', their links lead somewhere, and the reference has every exported name."""

import importlib
import inspect
import re
import shutil
import sys
from pathlib import Path

import pytest

import yan_hf


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from write_tables import TABLES, write_between_markers, write_tables  # noqa: E402


PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
EXPORTS = sorted(yan_hf._class_to_module)  # of Transformers' `_LazyModule`: exported name → module


def test_the_tables_are_those_of_the_committed_results(tmp_path):
    for page in TABLES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    write_tables(tmp_path)
    for page in TABLES:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), "run python docs/write_tables.py"


def test_only_what_stands_between_the_marks_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter <!-- b:begin -->\n")
    write_between_markers(page, "a", "new")
    assert page.read_text() == "before\n<!-- a:begin -->\n\nnew\n\n<!-- a:end -->\nafter <!-- b:begin -->\n"
    with pytest.raises(ValueError, match="b:end"):
        write_between_markers(page, "b", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in link or (page.parent / link).exists(), link


@pytest.mark.parametrize("name", EXPORTS)
def test_every_exported_name_is_documented(name):
    """With a docstring of its own, an entry in the reference, and docstrings on its public methods."""
    value = getattr(yan_hf, name)
    assert value.__doc__
    reference = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    assert f"\n::: yan_hf.{name}\n" in reference
    if inspect.isclass(value):
        methods = {name for name in vars(value) if inspect.isfunction(vars(value)[name]) and not name.startswith("_")}
        # What a library calls by its own name may have its docstring there.
        assert not {method for method in methods if not inspect.getdoc(getattr(value, method))}


def test_the_code_that_is_pointed_at_is_there():
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Where to look")[1]
    for name in re.findall(r"`(\w+\.[\w.]+)`", section):
        module, *members = name.split(".")
        value = importlib.import_module(f"yan_hf.{module}")
        for member in members:
            value = getattr(value, member)


def test_the_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
