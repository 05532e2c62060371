# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The table of README.md: every skip, failure and override with its reason, compared with what a run reports."""

import operator
import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


KINDS = ("skip", "fails", "override")
_COMPARISONS = {">=": operator.ge, "<": operator.lt}


@dataclass
class Row:
    """
    A line of the table.

    Args:
        kind: Of `KINDS`.
        tests: Pattern of `suite::Class::test`.
        message: Pattern of the skip's or failure's message; `*` for an override.
        optional: Whether it may not occur: it depends on the machine.
        reason: Why.
    """

    kind: str
    tests: str
    message: str
    optional: bool
    reason: str

    def matches(self, name: str, message: str) -> bool:
        return fnmatchcase(name, self.tests) and fnmatchcase(message, self.message)


def numbers(version: str) -> tuple[int, ...]:
    """Of a version, to be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _applies(condition: str, version: str) -> bool:
    sign, _, bound = re.match(r"(>=|<)(\s*)(.+)", condition).groups()
    return _COMPARISONS[sign](numbers(version), numbers(bound))


def read_table(path: Path, transformers_version: str) -> list[Row]:
    """
    The rows of the table that apply to a version of Transformers.

    Raises:
        ValueError: for a row without a known kind, a pattern or a reason.
    """
    rows = []
    # The counts above it are a table too.
    for line in path.read_text().rpartition("<!-- counts:end -->")[2].splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 5 or cells[0] in ("kind", "---"):
            continue
        kind, tests, message, when, reason = cells
        if kind not in KINDS or not tests or not reason:
            raise ValueError(f"A row of the table in {path} lacks its kind, its tests or its reason: {line}")
        conditions = [part.strip() for part in when.split(",") if part.strip()]
        optional = "some machines" in conditions
        if all(_applies(part, transformers_version) for part in conditions if part != "some machines"):
            message = message.strip("`").replace("\\|", "|") or "*"
            rows.append(Row(kind, tests.strip("`"), message.replace("[", "[[]"), optional, reason))
    return rows


def expected_failure(name: str, message: str, rows: list[Row]) -> Row | None:
    """The row that says that a test fails with this message."""
    name = name.replace(".py::", "::")
    return next((row for row in rows if row.kind == "fails" and row.matches(name, message)), None)


def check_counts(counts: dict, recorded: dict) -> list[str]:
    """
    Where a run of the versions that `results.json` has counts of differs from it, as sentences: a pattern of the table
    would also cover a test that has begun to fail, or ceased to.
    """
    problems = []
    for owner, count in counts.items():
        before = recorded.get(owner, count)
        if count["failed"] != before["failed"]:
            problems.append(f"{owner}: {count['failed']} tests fail, but results.json says {before['failed']}")
        if sum(count.values()) < sum(before.values()):
            problems.append(f"{owner}: only {sum(count.values())} tests ran, but {sum(before.values())} before")
    return problems


def check(report: dict, rows: list[Row], whole_suites: list[str]) -> list[str]:
    """
    What a run and the table disagree in, as sentences.

    Args:
        report: The recorder's.
        rows: From [`read_table`].
        whole_suites: Suites that ran in full: their rows must occur.
    """
    problems, used = [], set()
    found = [("override", name, "") for name in report["overrides"]]
    for name, test in report["tests"].items():
        kind = {"skipped": "skip", "failed": "fails"}.get(test["outcome"])
        if kind:
            found.append((kind, name.replace(".py::", "::"), test["message"]))
    for kind, name, message in found:
        matching = [index for index, row in enumerate(rows) if row.kind == kind and row.matches(name, message)]
        used.update(matching)
        if not matching:
            problems.append(f"not in the table: {kind} {name}: {message}")
    for index, row in enumerate(rows):
        if index not in used and not row.optional and row.tests.split("_suite")[0] in whole_suites:
            problems.append(f"in the table, but did not occur: {row.kind} {row.tests}: {row.message}")
    return problems


def counts_table(results: dict) -> str:
    """The counts of all versions, as a table."""
    lines = []
    for name, result in results.items():
        lines += [
            f"Transformers {name}, PEFT {result['versions']['peft']}, torch {result['versions']['torch']}:",
            "",
            "| test class | pass | of these check nothing | skip | fail |",
            "| --- | --- | --- | --- | --- |",
        ]
        for owner, count in result["counts"].items():
            passed = count["passed"] + count["empty"]
            lines.append(f"| `{owner}` | {passed} | {count['empty']} | {count['skipped']} | {count['failed']} |")
        lines.append("")
    return "\n".join(lines)


def summary_table(results: dict) -> str:
    """The counts of all versions by suite: passed, of these without checking anything, skipped, failed."""
    totals: dict[tuple[str, str], Counter] = {}
    for version, result in results.items():
        for owner, count in result["counts"].items():
            names = {"Mamba": "Mamba", "AutoEncoding": "auto-encoder", "PretrainedEncoder": "pretrained encoder"}
            name = next((name for part, name in names.items() if part in owner), "")
            suite = owner.split("_suite")[0]
            key = f"{suite}, {name}" if name else suite
            totals.setdefault((key, version), Counter()).update(count)
    versions = list(results)
    header = [f"Transformers {version}, PEFT {results[version]['versions']['peft']}" for version in versions]
    lines = ["| tests (pass / of these check nothing / skip / fail) | " + " | ".join(header) + " |"]
    lines.append("| --- |" + " --- |" * len(versions))
    for suite in dict.fromkeys(suite for suite, _ in totals):
        cells = []
        for version in versions:
            if (count := totals.get((suite, version))) is None:
                cells.append("not run")
                continue
            passed = count["passed"] + count["empty"]
            cells.append(f"{passed} / {count['empty']} / {count['skipped']} / {count['failed']}")
        lines.append(f"| {suite} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
