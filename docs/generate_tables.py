# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Writes the documentation's tables that are made from the code: `python docs/generate_tables.py`.

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.
"""

import sys
from pathlib import Path

from yan_hf.generation_config_yan import OPTIONS


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from report import write_between_markers  # noqa: E402


def generation_options() -> str:
    """The options of `generate`."""
    lines = ["| option | meaning | values | default |", "| --- | --- | --- | --- |"]
    for name, option in OPTIONS.items():
        values = option.check.accepts if option.check else "as in Transformers"
        lines.append(f"| `{name}` | {option.help} | {values} | {option.default_text} |")
    return "\n".join(lines)


if __name__ == "__main__":
    write_between_markers(ROOT / "docs" / "generation.md", "generation-options", generation_options())
