# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`yan-hf generate --show-experts`: a text's drafts, step by step, with a colour for each expert."""

import os
import sys
from itertools import groupby
from typing import Any


# Of 256 terminal colours, far apart; further experts use them again.
_COLOURS = (39, 208, 76, 199, 226, 141, 51, 160, 250, 94)


def expert_lines(row: dict[str, Any], coloured: bool) -> list[str]:
    """
    The source of a row of `generate_texts` and, for every solver step, its draft.

    Args:
        row: With `steps`, for each solver step pairs of a token's text and its expert.
        coloured: Whether experts are colours; otherwise a number stands before each run of one expert's tokens.
    """
    lines = [row["source"]]
    for number, tokens in enumerate(row["steps"], start=1):
        parts = []
        for expert, run in groupby(tokens, key=lambda token: token[1]):
            text = "".join(piece for piece, _ in run)
            colour = _COLOURS[expert % len(_COLOURS)]
            parts.append(f"\x1b[38;5;{colour}m{text}\x1b[0m" if coloured else f"[{expert}]{text}")
        lines.append(f"  step {number}: {''.join(parts)}")
    return lines


def is_coloured() -> bool:
    """Whether standard output shows colours; `NO_COLOR` and `FORCE_COLOR` decide where they are set."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()
