# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Imports point one way, and only the named files travel with a checkpoint that is saved with its code."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).resolve().parents[2] / "src" / "yan_hf"
# Each imports what stands above it. Files of one line may import one another, but not in a circle: Python would fail.
TRAVELLING = [
    {"saving"},
    {"configuration_yan"},
    {"layers", "mixers", "selective_scan", "experts", "solver", "losses", "validation", "lengths"},
    {"sampling"},
    {"generation_config_yan", "generation_yan"},
    {"modeling_yan"},
]
ROOMS = [{"inference", "data", "evaluation", "auto"}, {"training", "hub", "serving", "__init__"}, {"cli"}]
RANKS = {name: rank for rank, names in enumerate(TRAVELLING + ROOMS) for name in names}


def wrong_imports(package: Path) -> list[str]:
    """Files without a place in the house, and imports that are not relative, lead out of it or point back."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if (rank := RANKS.get(parts[0])) is None or (len(parts) > 1) != (package / parts[0]).is_dir():
            wrong.append(f"{path.name} has no place")
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
            for name in names:
                room = name.split(".")[0]
                if getattr(node, "level", 0) == 0:
                    is_wrong = room in ("yan_hf", "examples", "modeling_tests", "benchmarks")
                else:  # within a room, or from the root
                    is_wrong = node.level == len(parts) and RANKS.get(room, len(RANKS)) > rank
                    is_wrong |= node.level > len(parts) or not room
                if is_wrong:
                    wrong.append(f"{'/'.join(parts)} imports {name}")
    return wrong


def test_imports_point_one_way_and_no_other_file_travels():
    assert wrong_imports(PACKAGE) == []
    travelling = set().union(*TRAVELLING)
    assert len(travelling) == 14 and {path.stem for path in PACKAGE.glob("*.py")} == {*travelling, "__init__", "auto"}


@pytest.mark.parametrize(
    "file, line, found",
    [
        ("layers.py", "from .sampling import encode", "layers imports sampling"),
        ("modeling_yan.py", "from .inference.offload import ExpertOffload", "modeling_yan imports inference.offload"),
        ("modeling_yan.py", "from . import data", "modeling_yan imports "),
        ("hub/info.py", "def f():\n    from ..cli import main", "hub/info imports cli"),
        ("data/files.py", "from ..training.trainer import YanTrainer", "data/files imports training.trainer"),
        ("training/trainer.py", "import examples.common", "training/trainer imports examples.common"),
        ("cli/main.py", "from yan_hf import YanConfig", "cli/main imports yan_hf"),
        ("beams.py", "", "beams.py has no place"),
        ("tools/beams.py", "", "beams.py has no place"),
    ],
)
def test_a_planted_import_is_found(file, line, found, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    assert wrong_imports(tmp_path) == [found]
