# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What the documentation needs beyond mkdocs: links to files of the repository, and docstrings in Transformers' style.

A page links to a file outside `docs/` as it stands in the repository (`../benchmarks/results/demo.json`), so that the
link works on a code host; the built site gets a copy of the file. A link to a file that is not there stops the build.
In a page, `::: yan_hf.NAME` stands for an exported name, wherever it is defined.
"""

import ast
import re
from pathlib import Path

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
COPIES = "repository"
# `](../path)` of a page in docs/; pages in folders below it link only inside the documentation.
_OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")


def exports() -> dict[str, str]:
    """Exported name → where it is defined, read from the package's source without importing it."""
    tree = ast.parse((ROOT / "src/yan_hf/__init__.py").read_text(encoding="utf-8"))
    structure = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_IMPORT_STRUCTURE"
    )
    return {name: f"yan_hf.{module}.{name}" for module, names in structure.items() for name in names}


def _site_path(path: str) -> str:
    # Text that a browser shows; and a Markdown file by its own name would be a page.
    return f"{COPIES}/{path}{'.txt' if path.endswith(('.md', '.py')) else ''}"


def on_files(files, config):
    """Adds the files that pages link to outside the documentation."""
    for page in list(files.documentation_pages()):
        for path in set(_OUTSIDE.findall(page.content_string)) if "/" not in page.src_uri else ():
            if not (ROOT / path).is_file():
                raise PluginError(f"{page.src_uri} links to {path}, which is no file of the repository.")
            if files.get_file_from_path(_site_path(path)) is None:
                files.append(File.generated(config, _site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links outside at the copies, and exported names at their modules."""
    if "/" not in page.file.src_uri:
        markdown = _OUTSIDE.sub(lambda link: _site_path(link[1]), markdown)
    paths = exports()
    # What is not exported stays as it is, and mkdocstrings stops at it.
    return re.sub(r"^::: yan_hf\.(\w+)$", lambda name: f"::: {paths.get(name[1], name[1])}", markdown, flags=re.M)


class TransformersDocstrings(griffe.Extension):
    """Makes links of Transformers' references, [`YanModel.forward`], and plain code of those to what has no page."""

    def __init__(self):
        self.paths = exports()

    def _reference(self, match: re.Match) -> str:
        owner, dot, member = match[1].lstrip("~").partition(".")
        if owner == "yan_hf" or owner not in self.paths or match[1].startswith("~"):
            return f"`{match[1].lstrip('~')}`"
        return f"[`{match[1]}`][{self.paths[owner]}{dot}{member}]"

    def on_object(self, *, obj: griffe.Object, **kwargs):
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            text = re.sub(r"\[`([^`\]]+)`\](?!\[|\()", self._reference, obj.docstring.value)
            # "name (`int`, *optional*):" is "name (int, optional):" in Google's style.
            arguments = r"^( +\**\w[\w, ]* )\(([`*].*?)\):"
            obj.docstring.value = re.sub(
                arguments, lambda found: f"{found[1]}({re.sub('[`*]', '', found[2])}):", text, flags=re.MULTILINE
            )
