"""Print the pip option that adds the index of torch's CPU builds, where that index is needed.

    python -m tools.cpu_index constraints/cpu.txt

On Linux, PyPI has only CUDA builds of torch, which take several GB. Nothing is printed if the torch
of the constraints is installed, or if pip finds its CPU build where it is configured to look. If
neither is so, the index is asked once, and is used if it answers in time. Needs only the standard
library, because it runs before anything is installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

INDEX = "https://download.pytorch.org/whl/cpu"
_LIMIT_S = 4


def main(arguments: list[str] | None = None) -> int:
    """Print the option, or on stderr why PyPI's build is installed; return the exit code."""
    (constraints,) = sys.argv[1:] if arguments is None else arguments
    torch = pinned_torch(Path(constraints))
    if not sys.platform.startswith("linux") or is_installed(torch) or is_offered(torch):
        return 0
    if is_offered(torch, "--index-url", INDEX):
        print(f"--extra-index-url={INDEX}")
    else:
        print(
            f"{INDEX} does not answer, or has no torch {torch} for Python "
            f"{sys.version_info.major}.{sys.version_info.minor}: pip installs another build, and "
            f"those of PyPI take several GB.",
            file=sys.stderr,
        )
    return 0


def pinned_torch(constraints: Path) -> str:
    """Return the version of torch in a constraints file. Raises ValueError if it has none."""
    found = re.search(r"^torch==([\w.]+)", constraints.read_text(), re.MULTILINE)
    if not found:
        raise ValueError(f"{constraints} has no line torch==VERSION")
    return found[1]


def is_installed(torch: str) -> bool:
    """Return True if this version of torch is installed, in any build."""
    try:
        return metadata.version("torch").partition("+")[0] == torch
    except metadata.PackageNotFoundError:
        return False


def is_offered(torch: str, *options: str) -> bool:
    """Return True if pip finds the CPU build of this version of torch, without a retry."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", *options]
    try:
        done = subprocess.run(
            [*command, "--retries", "0", "--timeout", str(_LIMIT_S)],
            capture_output=True,
            check=False,
            text=True,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return False
    return f"{torch}+cpu" in re.split(r"[\s,()]+", done.stdout)


if __name__ == "__main__":
    raise SystemExit(main())
