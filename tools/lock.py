"""Resolve all dependencies, and write requirements.lock and constraints/.

    python -m tools.lock

Run it with `make lock`, in an environment without packages. Nothing is installed: pip reports what
it would install. The lock has what is the same for every torch. Each file of constraints/ names a
version of torch, and gets the versions of triton and NCCL that its CUDA build requires.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

from tools.cpu_index import pinned_torch

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEADER = """\
# The exact versions that were tested together, except torch and what follows it: see constraints/.
# Written by `make lock`.
"""
_FOLLOWS_TORCH = re.compile(r"(torch|triton|nvidia-.+|cuda-.+)==")
_WRITTEN = re.compile(r"(triton|nvidia-nccl-.+)==")
_LEFT_OUT = re.compile(r"(cpkit|pip|setuptools)==")


def main() -> int:
    """Write the files if every torch can be resolved; return the exit code."""
    files = sorted((ROOT / "constraints").glob("*.txt"))
    shared = [
        line
        for line in resolve(pinned_torch(ROOT / "constraints" / "cpu.txt"))
        if not _FOLLOWS_TORCH.match(line) and not _LEFT_OUT.match(line)
    ]
    with NamedTemporaryFile("w", suffix=".txt") as new:
        new.writelines(shared)
        new.flush()
        texts = {file: with_versions(file, resolve(pinned_torch(file), new.name)) for file in files}
    LOCK.write_text(HEADER + "".join(shared))
    for file, text in texts.items():
        file.write_text(text)
    return 0


def resolve(torch: str, constraints: str = "") -> list[str]:
    """Return the sorted lines NAME==VERSION that pip selects with the CUDA build of this torch."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
    command += ["--report=-", *(["-c", constraints] if constraints else [])]
    command += [f"torch=={torch},!={torch}+cpu", f"{ROOT}[dev,bench]"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    packages = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    lines = [f"{package['name']}=={package['version']}\n" for package in packages]
    return sorted(lines, key=lambda line: line.partition("==")[0].lower())


def with_versions(file: Path, resolved: list[str]) -> str:
    """Return the text of a constraints file, with the versions that follow its torch replaced."""
    kept = [line for line in file.read_text().splitlines(True) if not _WRITTEN.match(line)]
    return "".join(kept + sorted(filter(_WRITTEN.match, resolved), reverse=True))


if __name__ == "__main__":
    raise SystemExit(main())
