"""Go through a notebook as a whole class would: `python -m tools.rehearse [01 02 03]`.

One kernel runs the notebook with the answer key. At each exercise it tries the starter, every
mutant and the solution, each followed by the check:

    starter    ✗   and says so politely: no exception
    mutants    ✗   every one, or the check is too weak
    solution   ✓   it stays, so that the rest of the notebook is run with everything solved
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpkit_lessons.lesson import KEY_VARIABLE
from tools import run
from tools.build import NOTEBOOKS, named
from tools.source import Cell, Exercise, Source, read

WANTED = {"starter": "✗", "mutant": "✗", "solution": "✓"}


@dataclass(frozen=True)
class StepResult:
    """What one cell of the rehearsal said. `variant`: starter, mutant-NAME, solution, or ""."""

    cell: str
    variant: str
    text: str
    error: str
    took_s: float

    @property
    def fault(self) -> str:
        """What is wrong with it, in words; empty when it is as it should be."""
        place = f"{self.cell} {self.variant}".strip()
        if self.error:
            return f"{place} raised {self.error}"
        wanted = WANTED.get(self.variant.split("-")[0])
        if wanted and not self.text.startswith(wanted):
            return f"{place}: the check must say {wanted}, and said: {self.text or 'nothing'}"
        if not wanted and self.text.startswith(("✗", "≠", "○")):
            return f"{place}: with the answer key, {self.text}"
        return ""


def rehearse(path: Path) -> tuple[list[StepResult], list[str]]:
    """Run a source in all its variants; what each code cell said, and cells over their budget."""
    notebook = run.notebook_of(list(_cells(read(path))))
    run.execute(notebook, NOTEBOOKS, {KEY_VARIABLE: "1"}, allow_errors=True)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [_outcome(cell) for cell in code], run.over_budget(notebook)


def _cells(source: Source) -> Iterator[Cell]:
    for cell in source.rendered():
        exercise, role, _ = cell.part
        if role == "check":
            yield from _tries(source.exercises[exercise], cell)
        elif cell.kind == "code":
            yield cell


def _tries(exercise: Exercise, check: Cell) -> Iterator[Cell]:
    """Each variant as a pair of cells: the code, and the check with the variant in its id."""
    mutants = {f"mutant-{name}": text for name, text in exercise.mutants.items()}
    tries = {"starter": exercise.starter} | mutants | {"solution": exercise.solution}
    for variant, text in tries.items():
        yield Cell(f"{exercise.name}-code-{variant}", "code", text)
        yield Cell(f"{check.id}_{variant}", "code", check.text, check.tags, check.budget_s)


def _outcome(cell: Any) -> StepResult:
    name, _, variant = cell.id.partition("_")
    errors = [f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"]
    errors += [f"stderr: {o.text}" for o in cell.outputs if o.get("name") == "stderr"]
    shown = [o.data.get("text/plain", "") for o in cell.outputs if "data" in o]
    return StepResult(name, variant, "\n".join(shown), "; ".join(errors), run.seconds(cell))


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse the named notebooks and print every try; 1 when something is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tools.rehearse", description=__doc__)
    parser.add_argument("notebooks", nargs="*", help="how their names begin; default: all")
    parser.add_argument("-q", "--quiet", action="store_true", help="print faults only")
    options = parser.parse_args(arguments)
    failed = False
    for path in named(options.notebooks):
        outcomes, late = rehearse(path)
        faults = [outcome.fault for outcome in outcomes if outcome.fault] + late
        tries = [] if options.quiet else [o for o in outcomes if o.variant]
        lines = [f"{o.cell} {o.variant} ({o.took_s:.1f} s)\n    {o.text}" for o in tries]
        lines += [f"FAULT {fault}" for fault in faults]
        total_s = sum(outcome.took_s for outcome in outcomes)
        lines.append(f"{path.stem}: {len(tries)} tries, {len(faults)} faults, {total_s:.0f} s")
        sys.stdout.writelines(f"{line}\n" for line in lines)
        failed = failed or bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
