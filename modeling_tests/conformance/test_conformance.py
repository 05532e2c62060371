# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The conformance run's own rules: nothing unlisted passes, nothing stale stays, no archive is no pass."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

from mutations import MUTATIONS, SOURCE  # noqa: E402
from run import fetch_sources  # noqa: E402
from table import Row, check, check_counts, counts_table, expected_failure, read_table  # noqa: E402


def report(outcome="passed", message="", overrides=()):
    tests = {"model_suite.py::Suite::test_one": {"outcome": outcome, "message": message, "checks": 1}}
    return {"tests": tests, "overrides": list(overrides)}


SKIP = Row("skip", "model_suite::*::test_one", "no [such] thing*".replace("[", "[[]"), False, "because")


def test_what_is_not_in_the_table_is_a_problem():
    assert check(report(), [], ["model"]) == []
    assert "skip" in check(report("skipped", "no GPU"), [], ["model"])[0]
    assert "fails" in check(report("failed", "no"), [SKIP], [])[0]
    assert "override" in check(report(overrides=["model_suite::Suite::test_one"]), [], ["model"])[0]


def test_a_row_covers_its_kind_test_and_message_only():
    assert check(report("skipped", "no [such] thing here"), [SKIP], ["model"]) == []
    assert len(check(report("skipped", "another reason"), [SKIP], ["model"])) == 2
    assert len(check(report("failed", "no [such] thing"), [SKIP], ["model"])) == 2


def test_a_row_that_does_not_occur_is_a_problem_where_its_suite_ran_in_full():
    assert "did not occur" in check(report(), [SKIP], ["model"])[0]
    assert check(report(), [SKIP], ["peft"]) == []
    SKIP_SOMETIMES = Row("skip", SKIP.tests, SKIP.message, True, "because")
    assert check(report(), [SKIP_SOMETIMES], ["model"]) == []


FAILS = Row("fails", "model_suite::*::test_one", "ValueError: no beams*", False, "because")


def test_a_failure_is_expected_by_its_test_and_its_message():
    name = "model_suite.py::Suite::test_one"
    assert expected_failure(name, "ValueError: no beams here", [SKIP, FAILS]) is FAILS
    assert expected_failure(name, "TypeError: no beams", [SKIP, FAILS]) is None
    assert expected_failure(name.replace("one", "two"), "ValueError: no beams here", [FAILS]) is None


def test_more_or_fewer_failures_than_recorded_are_a_problem():
    count = {"passed": 5, "empty": 1, "skipped": 2, "failed": 2}
    assert check_counts({"a": count, "new": count}, {"a": count}) == []
    assert "fail" in check_counts({"a": {**count, "failed": 3, "passed": 4}}, {"a": count})[0]
    assert "fail" in check_counts({"a": {**count, "failed": 1, "passed": 6}}, {"a": count})[0]
    assert "only 9" in check_counts({"a": {**count, "passed": 4}}, {"a": count})[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "body, code, shown",
    [
        ("raise ValueError('no beams here')", 0, "1 xfailed"),
        ("raise TypeError('no beams here')", 1, "1 failed"),
        ("pass", 0, "1 passed"),
    ],
)
def test_pytest_shows_a_failure_of_the_table_as_expected_and_it_is_recorded(body, code, shown, tmp_path):
    """In a copy of the recorder with a table of its own; a test that passes makes `check` miss its row."""
    for name in ("recorder.py", "table.py"):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    (tmp_path / "README.md").write_text("| fails | `model_suite::*` | `ValueError: no beams*` | | because |\n")
    suite = tmp_path / "model_suite.py"
    suite.write_text(f"class TestSuite:\n    def test_one(self):\n        {body}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(FOLDER.parents[1] / "src")])}
    environment["YAN_CONFORMANCE_REPORT"] = str(tmp_path / "report.json")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "recorder", "-c", os.devnull, "--rootdir", str(tmp_path)]
    finished = subprocess.run([*command, str(suite)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == code and shown in finished.stdout, finished.stdout + finished.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    problems = check(found, read_table(tmp_path / "README.md", "5.24.0"), ["model"])
    assert [problem.split(":")[0] for problem in problems] == {
        "1 xfailed": [],
        "1 failed": ["not in the table", "in the table, but did not occur"],
        "1 passed": ["in the table, but did not occur"],
    }[shown]


def test_rows_are_read_for_the_version_and_need_a_reason(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "| skip | `a_suite::*` | `x*` | <5.21 | old |\n| fails | `b_suite::*` | | >=5.21, some machines | new |\n"
    )
    assert [row.tests for row in read_table(path, "5.17.0")] == ["a_suite::*"]
    (row,) = read_table(path, "5.23.0")
    assert row == Row("fails", "b_suite::*", "*", True, "new")
    path.write_text("| skip | `a_suite::*` | `x*` | | |\n")
    with pytest.raises(ValueError, match="reason"):
        read_table(path, "5.23.0")


def test_the_readme_has_the_counts_of_the_last_run():
    results = json.loads((FOLDER / "results.json").read_text())
    assert len(results) >= 2, "the oldest and the newest supported version"
    assert counts_table(results) in (FOLDER / "README.md").read_text()
    for result in results.values():
        for owner in ("model_suite::YanModelTest", "model_suite::YanMambaModelTest"):
            assert result["counts"][owner]["failed"] == 0
    newest, result = next(reversed(results.items()))
    named = [row.tests for row in read_table(FOLDER / "README.md", newest) if row.kind == "fails"]
    for owner, count in result["counts"].items():
        # PEFT's rows are for all of its classes; any other failure is named with its class, and is one test.
        known = [tests for tests in named if tests.startswith(f"{owner}::") and "*" not in tests]
        assert count["failed"] <= len(known) or owner.startswith("peft_suite"), owner


@pytest.mark.slow
def test_without_an_archive_it_fails_and_says_so(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py")]
    offline = {
        "PATH": "/usr/bin:/bin",
        "YAN_HF_CACHE": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": "/dev/null",
    }
    offline["PYTHONPATH"] = str(FOLDER.parents[1] / "src")
    finished = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "transformers" in finished.stderr and "package index" in finished.stderr


def test_an_archive_in_the_cache_is_unpacked_without_pip(tmp_path, monkeypatch):
    import run

    monkeypatch.setattr(run, "CACHE", tmp_path)
    monkeypatch.setattr(run, "version", lambda _: "1.0")
    source = tmp_path / "source" / "thing-1.0" / "tests"
    source.mkdir(parents=True)
    (source / "test_thing.py").write_text("")
    (tmp_path / "downloads").mkdir()
    subprocess.run(
        ["tar", "czf", str(tmp_path / "downloads" / "thing-1.0.tar.gz"), "-C", str(tmp_path / "source"), "thing-1.0"],
        check=True,
    )
    assert (fetch_sources("thing") / "tests" / "test_thing.py").is_file()


def test_every_seeded_bug_still_finds_its_place():
    for mutation in MUTATIONS:
        assert mutation.old in (SOURCE / mutation.file).read_text(), mutation.name
