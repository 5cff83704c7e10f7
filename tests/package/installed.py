"""What was built, in an environment that has nothing else: `make dist`.

    python -m tests.package.installed constraints.txt dist/*.whl dist/*.tar.gz

Each file is installed as a user would, `client.py` runs with it and is checked by mypy --strict against its types.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

CLIENT = Path(__file__).with_name("client.py")
IN_SDIST = (
    "tests/cases.py", "docs/index.md", "examples/tour.py", "benchmarks/first_order.py", "CHANGELOG.md", "CITATION.cff",
    "CONTRIBUTING.md", "Makefile", "constraints.txt", "mkdocs.yml", "tnbackprop/py.typed",
)  # fmt: skip


def main(constraints: str, *files: str) -> int:
    """0; raises where one of them is wrong."""
    assert any(file.endswith(".whl") for file in files) and any(file.endswith(".tar.gz") for file in files), files
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        client = shutil.copy(CLIENT, folder)  # beside the checkout mypy would read that
        for file in files:
            if file.endswith(".tar.gz"):
                check_sdist(file)
            call(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", file)
            call(python, "-m", "pip", "install", "--quiet", "-c", constraints, "tnbackprop")
            call(python, client, cwd=folder)
            call(sys.executable, "-m", "mypy", "--strict", "--python-executable", python, client, cwd=folder)
            print(f"{file}: installed, run and checked")
    return 0


def check_sdist(file: str) -> None:
    """It has what a packager builds and tests from."""
    with tarfile.open(file) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert not (missing := set(IN_SDIST) - names), f"{file} lacks {missing}"
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "site/"))]


def call(*command: str, cwd: str | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
