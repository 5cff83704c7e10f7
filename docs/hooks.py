"""MkDocs calls this: pages and pictures that `generate` makes are added to those that are written."""

from __future__ import annotations

from pathlib import Path

from gallery import gallery
from generate import operations, pictures
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from reference import reference


def on_files(files: Files, config: MkDocsConfig) -> Files:
    page, drawn = gallery()
    made: dict[str, str | bytes] = {"operations.md": operations(), "api.md": reference(), "gallery.md": page}
    made |= {f"pictures/{name}": picture for name, picture in {**drawn, **pictures()}.items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    results = Path(config.config_file_path).parent / "benchmarks" / "results"
    for file in sorted(results.glob("*.svg")) + sorted(results.glob("*.png")):
        files.append(File.generated(config, f"pictures/{file.name}", abs_src_path=str(file)))
    return files
