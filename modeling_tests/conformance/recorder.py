# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A pytest plugin that writes down what each test did: its outcome, why it skipped or failed, and whether it checked
anything: an assertion, a run of a YAN model, or ranks that were started.

Failures that stand in README.md's table are reported as expected ones (xfail); they count as failed here. It also
lists which methods and attributes of the libraries' test classes the suites override.
"""

import functools
import inspect
import json
import os
import unittest
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from table import expected_failure, read_table


# The plain `assert`s of these are counted too.
LIBRARIES = ("tests", "peft_tests")
pytest.register_assert_rewrite(*LIBRARIES)

_rows = read_table(Path(__file__).with_name("README.md"), version("transformers"))
_checks = {"count": 0}
_results: dict[str, dict] = {}
_overrides: set[str] = set()


def _counted(function):
    @functools.wraps(function)
    def counted(*args, **kwargs):
        _checks["count"] += 1
        return function(*args, **kwargs)

    return counted


def pytest_configure(config):
    for owner, prefix in ((unittest.TestCase, "assert"), (np.testing, "assert"), (torch.testing, "assert_close")):
        for name in dir(owner):
            if name.startswith(prefix) and inspect.isroutine(getattr(owner, name)):
                setattr(owner, name, _counted(getattr(owner, name)))
    unittest.TestCase.fail = _counted(unittest.TestCase.fail)
    torch.multiprocessing.start_processes = _counted(torch.multiprocessing.start_processes)
    from yan_hf import YanModel

    YanModel.encode = _counted(YanModel.encode)


def pytest_assertion_pass(item, lineno, orig, expl):
    _checks["count"] += 1


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    _checks["count"] = 0
    yield
    item.user_properties.append(("checks", _checks["count"]))


def _message(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.split("\n")[0] if crash else str(report.longrepr)[-300:]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed and (row := expected_failure(report.nodeid, _message(report), _rows)):
        report.outcome, report.wasxfail = "skipped", f"as listed in conformance/README.md: {row.reason}"


def _is_ours(value) -> bool:
    """Whether it is not one of the library's functions, which its mixins copy into every class that inherits them."""
    code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
    return code is None or os.path.dirname(code.co_filename) == os.path.dirname(__file__)


def pytest_collection_modifyitems(items):
    for suite_class in {item.cls for item in items}:
        bases = suite_class.__mro__
        ours = [base for base in bases if base.__module__.endswith("_suite")]
        theirs = [base for base in bases if base.__module__.startswith(tuple(f"{name}." for name in LIBRARIES))]
        for owner in ours:
            for name, value in vars(owner).items():
                if (
                    any(name in vars(base) for base in theirs)
                    and not name.startswith(("__", "_abc"))
                    and _is_ours(value)
                ):
                    _overrides.add(f"{owner.__module__}::{owner.__name__}::{name}")
    # The slow ones first, so that no worker waits for the last of them.
    items.sort(key=lambda item: "training" not in item.nodeid and "vs_" not in item.nodeid)


def pytest_runtest_logreport(report):
    """In the process that writes the report; subtests come one by one, before their test."""
    entry = _results.setdefault(report.nodeid, {"outcome": "passed", "message": "", "checks": 0})
    if report.when == "call":
        entry["checks"] = max(entry["checks"], dict(report.user_properties).get("checks", 0))
    is_subtest = type(report).__name__ == "SubtestReport"
    if report.failed or hasattr(report, "wasxfail"):
        entry["outcome"], entry["message"] = "failed", _message(report)
    elif report.skipped and not is_subtest and entry["outcome"] == "passed":
        entry["outcome"] = "skipped"
        entry["message"] = report.longrepr[2].removeprefix("Skipped: ")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["overrides"] = sorted(_overrides)
        return
    with open(os.environ["YAN_CONFORMANCE_REPORT"], "w") as file:
        json.dump({"tests": _results, "overrides": sorted(_overrides)}, file)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _overrides.update(getattr(node, "workeroutput", {}).get("overrides", ()))
