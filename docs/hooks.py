"""MkDocs calls this: pages and pictures that `generate` makes are added to those that are written."""

from __future__ import annotations

from generate import operations, pictures
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {"operations.md": operations()} | {f"pictures/{name}": svg for name, svg in pictures().items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files
