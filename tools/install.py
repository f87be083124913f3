"""Install cpkit with an extra, and check the hash of every file except those of torch.

    python -m tools.install test -c constraints/cpu.txt [options of pip]

pip first resolves without installing anything. Then it installs what is in requirements.hashes
with `--require-hashes`, then torch and what follows it, whose builds come from several indexes, and
at last the checkout without its dependencies. Needs only the standard library and pip.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

from tools.lock import FOLLOWS_TORCH, HASHES, ROOT

PIP = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check")


def main(arguments: Sequence[str] | None = None, hashes: Path = HASHES) -> int:
    """Install, and return the exit code: that of pip, or 1 for a package without a hash."""
    extra, *options = sys.argv[1:] if arguments is None else arguments
    known = dict(hashed_lines(hashes.read_text()))
    checked, others = [], []
    for requirement in resolved([*requirements(extra)], options):
        if FOLLOWS_TORCH.match(requirement):
            others.append(requirement)
        elif requirement in known:
            checked.append(known[requirement])
        else:
            print(f"{requirement} is not in {hashes.name}: run make lock", file=sys.stderr)
            return 1
    try:
        if checked:
            with NamedTemporaryFile("w", suffix=".txt") as file:
                file.writelines(checked)
                file.flush()
                run("--no-deps", "--require-hashes", "-r", file.name)
        if others:
            run("--no-deps", *(option for option in options if "index" in option), *others)
        run("--no-deps", "--no-build-isolation", "-e", str(ROOT))
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def requirements(extra: str) -> Iterator[str]:
    """Yield the requirements of an extra, of those that it includes, and of the build."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    yield from content["build-system"]["requires"]
    yield from content["project"]["dependencies"]
    extras = content["project"]["optional-dependencies"]
    left = [extra]
    while left:
        for requirement in extras[left.pop()]:
            if requirement.startswith("cpkit["):
                left.append(requirement.removeprefix("cpkit[").rstrip("]"))
            else:
                yield requirement


def resolved(wanted: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return NAME==VERSION of each package that pip would install for these requirements."""
    command = [*PIP, "-qq", "--dry-run", "--report=-", *options, *wanted]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    packages = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return [f"{package['name']}=={package['version']}" for package in packages]


def hashed_lines(text: str) -> Iterator[tuple[str, str]]:
    """Yield NAME==VERSION and its lines, with the hashes, of a requirements file."""
    for block in text.replace("\\\n", "\\").splitlines(keepends=True):
        if not block.startswith("#"):
            yield block.split()[0].rstrip("\\"), block.replace("\\", "\\\n")


def run(*arguments: str) -> None:
    """Run pip install. Raises CalledProcessError when it fails."""
    subprocess.run([*PIP, *arguments], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
