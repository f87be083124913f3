"""Resolve all dependencies, and write requirements.lock and constraints/.

    python -m tools.lock

Run it with `make lock`, in an environment without packages. Nothing is installed: pip reports what
it would install. The lock has what is the same for every torch, and requirements.hashes has the
hashes of its files on PyPI. Each file of constraints/ names a version of torch, and gets the
versions of setuptools, triton and NCCL that its CUDA build requires.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from tempfile import NamedTemporaryFile

from tools.cpu_index import pinned_torch

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HASHES = ROOT / "requirements.hashes"
INDEX = "https://pypi.org/simple"
HEADER = """\
# The exact versions that were tested together, except torch and what follows it: see constraints/.
# Written by `make lock`.
"""
HASHES_HEADER = """\
# The hashes of the files of requirements.lock on PyPI that run on Linux. Written by `make lock`.
"""
FOLLOWS_TORCH = re.compile(r"(torch|triton|nvidia-.+|cuda-.+)==")
_WRITTEN = re.compile(r"(setuptools|triton|nvidia-nccl-.+)==")
_LEFT_OUT = re.compile(r"(cpkit|pip|setuptools)==")


def main() -> int:
    """Write the files if every torch can be resolved; return the exit code."""
    files = sorted((ROOT / "constraints").glob("*.txt"))
    shared = [
        line
        for line in resolve(pinned_torch(ROOT / "constraints" / "cpu.txt"))
        if not FOLLOWS_TORCH.match(line) and not _LEFT_OUT.match(line)
    ]
    with NamedTemporaryFile("w", suffix=".txt") as new:
        new.writelines(shared)
        new.flush()
        found = {file: resolve(pinned_torch(file), new.name) for file in files}
    theirs = {line for lines in found.values() for line in lines if line.startswith("setuptools==")}
    hashes = "".join(with_hashes(line.strip()) for line in (*shared, *sorted(theirs)))
    LOCK.write_text(HEADER + "".join(shared))
    HASHES.write_text(HASHES_HEADER + hashes)
    for file, lines in found.items():
        file.write_text(with_versions(file, lines))
    return 0


def resolve(torch: str, constraints: str = "") -> list[str]:
    """Return the sorted lines NAME==VERSION that pip selects with the CUDA build of this torch."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
    command += ["--report=-", *(["-c", constraints] if constraints else [])]
    command += [f"torch=={torch},!={torch}+cpu", f"{ROOT}[dev,bench]", *_build_requirements()]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    packages = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    lines = [f"{package['name']}=={package['version']}\n" for package in packages]
    return sorted(lines, key=lambda line: line.partition("==")[0].lower())


def with_versions(file: Path, resolved: list[str]) -> str:
    """Return the text of a constraints file, with the versions that follow its torch replaced."""
    kept = [line for line in file.read_text().splitlines(True) if not _WRITTEN.match(line)]
    return "".join(kept + sorted(filter(_WRITTEN.match, resolved), reverse=True))


def with_hashes(requirement: str) -> str:
    """Return NAME==VERSION with the hashes of its files, as pip's --require-hashes wants it."""
    name, _, version = requirement.partition("==")
    page = urllib.request.Request(  # noqa: S310 - https
        f"{INDEX}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(page) as answer:  # noqa: S310
        files = json.load(answer)["files"]
    found = sorted({f["hashes"]["sha256"] for f in files if is_ours(f["filename"], version)})
    if not found:
        raise ValueError(f"{INDEX} has no file of {requirement}")
    return " \\\n    ".join([requirement, *(f"--hash=sha256:{digest}" for digest in found)]) + "\n"


def is_ours(filename: str, version: str) -> bool:
    """Return True for the source and the wheels of this version for CPython on Linux."""
    if filename.endswith(".tar.gz"):
        return filename.removesuffix(".tar.gz").endswith(f"-{version}")
    if not filename.endswith(".whl"):
        return False
    _, found, *_, python, abi, platform = filename.removesuffix(".whl").split("-")
    return (
        found == version
        and (platform == "any" or re.search(r"linux.*(x86_64|aarch64)$", platform) is not None)
        and (python.startswith("py") or abi == "abi3" or re.match(r"cp31[1-9]$", abi) is not None)
    )


def _build_requirements() -> list[str]:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return list(content["build-system"]["requires"])


if __name__ == "__main__":
    raise SystemExit(main())
