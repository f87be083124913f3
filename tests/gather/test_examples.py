"""The scripts in README, docs and examples run under torchrun; the example detects a wrong bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.launch import torchrun

pytestmark = pytest.mark.workers

EXAMPLE = ROOT / "examples" / "gather_check.py"

# Runs the example with a gather that flips one bit on the last rank.
SABOTAGED = """
import runpy, sys
import torch, cpkit.gather
real = cpkit.gather.all_gather_kv
def all_gather_kv(tensors, metadata, group, *, algorithm="direct", stream=None):
    gathered = real(tensors, metadata, group, algorithm=algorithm, stream=stream)
    if group.size > 1 and group.rank == group.size - 1:
        gathered[0] = gathered[0].clone()
        gathered[0].view(torch.uint8).view(-1)[-1] ^= 1
    return gathered
cpkit.gather.all_gather_kv = all_gather_kv
path = sys.argv.pop(1)
sys.argv[0] = path
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("page", "nproc"),
    [
        ("README.md", 2),
        pytest.param("docs/training.md", 3, marks=pytest.mark.slow("the same with 3 ranks")),
    ],
)
def test_the_script_on_a_page_runs(page: str, nproc: int, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (source,) = (block for block in blocks if "init_process_group" in block)
    if page == "README.md":  # docs/library.md continues this script
        body, end = source.split("dist.destroy_process_group()")
        more = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)
        source = "\n".join([body, *more, "dist.destroy_process_group()", end])
    script = tmp_path / "page.py"
    script.write_text(source)
    done = torchrun(str(script), nproc=nproc)
    assert done.returncode == 0, done.stdout
    assert "FutureWarning" not in done.stdout


OTHER_SIZES = pytest.mark.slow("the example with 1 and 4 ranks; test_gather.py has the gathers")


@pytest.mark.parametrize(
    "nproc", [pytest.param(1, marks=OTHER_SIZES), 2, pytest.param(4, marks=OTHER_SIZES)]
)
def test_example_is_bit_exact(nproc: int) -> None:
    done = torchrun(str(EXAMPLE), "--batches=2", nproc=nproc)
    assert done.returncode == 0, done.stdout
    assert f"on each of {nproc} ranks: all bit-exact" in done.stdout


@pytest.mark.slow("one more launch; tests/ranks/mutants.py has more faults")
def test_example_detects_one_flipped_bit(tmp_path: Path) -> None:
    script = tmp_path / "sabotaged.py"
    script.write_text(SABOTAGED)
    done = torchrun(str(script), str(EXAMPLE), "--batches=1", nproc=2)
    assert done.returncode != 0
    assert "rank 1, cp 2: zigzag of" in done.stdout
    assert "all bit-exact" not in done.stdout


def test_paths_are_explained_per_transport() -> None:
    done = torchrun(str(ROOT / "examples" / "why_this_path.py"), nproc=2)
    assert done.returncode == 0, done.stdout
    seed, both, foreign, shifted, gathers = (
        [line.split(maxsplit=2) for line in part.splitlines()[1:] if line.startswith("  ")]
        for part in re.split(r"\n\n", done.stdout[done.stdout.index("The seed as merged") :])
    )

    def paths(lines: list[list[str]]) -> list[str]:
        return [re.search(r"symmetric|staged|fallback", " ".join(line))[0] for line in lines]  # type: ignore[index]

    assert paths(seed) == ["symmetric", "fallback", "fallback", "symmetric", "symmetric"]
    assert "padding copied" in " ".join(seed[0])
    assert "#37337" in " ".join(seed[2])
    assert paths(both) == ["symmetric"] * 5
    assert paths(foreign) == paths(shifted) == ["fallback"] * 5
    assert "#19329" in " ".join(foreign[0])
    assert "pytorch#178138" in " ".join(shifted[0])
    assert paths(gathers) == ["fallback", "symmetric", "symmetric", "symmetric"]
