"""Test the exercises of a notebook and their checks: `python -m tools.rehearse [01 02 03]`.

`--nproc 2` runs it with other workers than the four that a notebook starts.

One kernel runs the notebook with the answer key. At each exercise it runs the starter, every mutant
and the solution, each followed by the check:

    starter    ✗   without an exception
    mutants    ✗   all of them, otherwise the check is too weak
    solution   ✓   runs last, so that the rest of the notebook uses it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpkit.processes import run_command
from cpkit_lessons.lesson import KEY_VARIABLE
from tools import run
from tools.build import NOTEBOOKS, named
from tools.source import Cell, Exercise, Source, read

WANTED = {"starter": "✗", "mutant": "✗", "solution": "✓"}


@dataclass(frozen=True)
class CellResult:
    """The output of one executed cell. `variant`: starter, mutant-NAME, solution, or ""."""

    cell: str
    variant: str
    text: str
    error: str
    took_s: float

    @property
    def fault(self) -> str:
        """A description of the difference from the expected output; empty if there is none."""
        cell = f"{self.cell} {self.variant}".strip()
        if self.error:
            return f"{cell} raised {self.error}"
        wanted = WANTED.get(self.variant.split("-")[0])
        if wanted and not self.text.startswith(wanted):
            return f"{cell}: the check must show {wanted}; it shows {self.text or 'nothing'}"
        if not wanted and self.text.startswith(("✗", "≠", "○")):
            return f"{cell}: with the answer key, {self.text}"
        return ""


def rehearse(path: Path, nproc: int | None = None) -> tuple[list[CellResult], list[str]]:
    """Run a source with all variants; return each code cell's result, and late or silent cells.

    The notebook starts its workers, or finds `nproc` of them.
    """
    notebook = run.notebook_of(list(_cells(read(path))))
    with run.workers(nproc) as environment:
        run.execute(notebook, NOTEBOOKS, {KEY_VARIABLE: "1", **environment}, allow_errors=True)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [_result(cell) for cell in code], run.over_budget(notebook) + run.silent(notebook)


def _cells(source: Source) -> Iterator[Cell]:
    for cell in source.rendered():
        exercise, role, _ = cell.part
        if role == "check":
            yield from _variants(source.exercises[exercise], cell)
        elif cell.kind == "code":
            yield cell


def _variants(exercise: Exercise, check: Cell) -> Iterator[Cell]:
    """Yield each variant as two cells: the code, and the check with the variant in its id."""
    mutants = {f"mutant-{name}": text for name, text in exercise.mutants.items()}
    variants = {"starter": exercise.starter} | mutants | {"solution": exercise.solution}
    for variant, text in variants.items():
        yield Cell(f"{exercise.name}-code-{variant}", "code", text)
        yield Cell(f"{check.id}_{variant}", "code", check.text, check.tags, check.budget_s)


def _result(cell: Any) -> CellResult:
    name, _, variant = cell.id.partition("_")
    errors = [f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"]
    errors += [f"stderr: {o.text}" for o in cell.outputs if o.get("name") == "stderr"]
    shown = [o.data.get("text/plain", "") for o in cell.outputs if "data" in o]
    return CellResult(name, variant, "\n".join(shown), "; ".join(errors), run.seconds(cell))


def main(arguments: Sequence[str] | None = None) -> int:
    """Test the named notebooks and print the result of each variant; return 1 after a fault."""
    parser = argparse.ArgumentParser(prog="python -m tools.rehearse", description=__doc__)
    parser.add_argument("notebooks", nargs="*", help="start of their names; default: all")
    parser.add_argument("-q", "--quiet", action="store_true", help="print faults only")
    parser.add_argument("--nproc", type=int, help="ranks (default: the notebook starts four)")
    options = parser.parse_args(arguments)
    failed = False
    for path in named(options.notebooks):
        results, late = rehearse(path, options.nproc)
        faults = [result.fault for result in results if result.fault] + late
        checks = [r for r in results if r.variant]
        shown = [] if options.quiet else [r for r in results if r.variant or r.cell == "progress"]
        lines = [f"{r.cell} {r.variant} ({r.took_s:.1f} s)\n    {r.text}" for r in shown]
        lines += [f"FAULT {fault}" for fault in faults]
        total_s = sum(result.took_s for result in results)
        lines.append(f"{path.stem}: {len(checks)} checks, {len(faults)} faults, {total_s:.0f} s")
        sys.stdout.writelines(f"{line}\n" for line in lines)
        failed = failed or bool(faults)
    return int(failed)


if __name__ == "__main__":
    run_command(main)
