"""What the package says of itself: one version, all files in the sdist, targets of make that are there."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import yaml

import tnbackprop as tn

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert tn.__version__ == PROJECT["version"] == citation["version"]
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert not released or released[0] == tn.__version__


def test_the_types_are_there_for_others() -> None:
    assert (ROOT / "tnbackprop" / "py.typed").read_text() == ""
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_the_sdist_has_every_file() -> None:
    """All that is tracked without a dot in front; setuptools itself takes the package and its project file."""
    listed = re.findall(r"^(?:include|graft) (.*)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    taken = {*" ".join(listed).split(), "tnbackprop", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    assert not [name for name in taken if not (ROOT / name).exists()]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    top = {name.split("/")[0] for name in tracked.stdout.splitlines()}  # none in an unpacked sdist
    assert {name for name in top - taken if not name.startswith(".")} == set()


def test_workflow_calls_make() -> None:
    """Nothing is done there that a person could not do here."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands and all(command.split()[0] == "make" for command in commands)
    assert {command.split()[1] for command in commands} <= targets
    versions = {row["torch"] for row in jobs["test"]["strategy"]["matrix"]["include"]}
    oldest = next(d for d in PROJECT["dependencies"] if d.startswith("torch")).removeprefix("torch>=")
    assert versions == {f"=={oldest}.*", "pinned", ""}
