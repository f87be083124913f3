"""Read the source of a notebook, `notebooks/src/NAME.py`, with starters, solutions and mutants.

The format is jupytext's percent format, so a source is valid Python. The title of a cell is its id,
which also names its role:

    # %% e2-task [markdown]     Goal, Example, About: what to do
    # %% e2                     the exercise. The solution is live code, `#:` lines are the starter
    def padded_len(lengths):
        # >>> your code
        #: return 0
        return max(lengths)
        # <<<
    # %% e2-mutant-mean         a wrong solution that the check must refuse; never in the notebook
    # %% e2-check               the check, run by the learner
    # %% e2-help [markdown]     three hints, then why and an alternative, separated by `---`
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jupytext

from tools.glossary import expand

BEGIN, END, STARTER = "# >>> your code", "# <<<", "#:"
BUDGET_S = 30.0  # of a cell that sets none
_PART = re.compile(r"(e\d+)(?:-(task|check|help|mutant)(?:-(.+))?)?")
_SUMMARIES = ("Hint 1: where to look", "Hint 2: the idea", "Hint 3: the shape of the code")


@dataclass(frozen=True)
class Cell:
    """One cell of a source. `budget_s`: how long it may run on the slowest supported machine."""

    id: str
    kind: str  # "code" or "markdown"
    text: str
    tags: tuple[str, ...] = ()
    budget_s: float = BUDGET_S

    @property
    def part(self) -> tuple[str, str, str]:
        """(exercise, role, name): ("e2", "mutant", "mean"); ("", "", "") outside exercises."""
        match = _PART.fullmatch(self.id)
        return (match[1], match[2] or "code", match[3] or "") if match else ("", "", "")


@dataclass(frozen=True)
class Exercise:
    """The texts of one exercise. `mutants`: name to source."""

    name: str
    task: str
    starter: str
    solution: str
    check: str
    help: str
    mutants: dict[str, str]


@dataclass(frozen=True)
class Source:
    """The cells of one source file, in order."""

    path: Path
    cells: tuple[Cell, ...]

    def rendered(self, *, solved: bool = False) -> Iterator[Cell]:
        """Yield the notebook's cells, with the starter of each exercise, or with the solution."""
        exercises = self.exercises  # raises if a part is missing
        for cell in self.cells:
            exercise, role, _ = cell.part
            if role == "mutant":
                continue
            text = cell.text
            if role == "code":
                text = region(text, solved=solved)
            elif role == "help":
                text = _help(exercises[exercise])
            elif cell.kind == "markdown":
                text = expand(text)
            yield Cell(cell.id, cell.kind, text, cell.tags, cell.budget_s)

    @cached_property
    def exercises(self) -> dict[str, Exercise]:
        """The exercises by name. Raises ValueError that names a missing part."""
        names = dict.fromkeys(cell.part[0] for cell in self.cells if cell.part[0])
        return {name: self._exercise(name) for name in names}

    def _exercise(self, name: str) -> Exercise:
        mine = [cell for cell in self.cells if cell.part[0] == name]
        parts = {cell.part[1]: cell.text for cell in mine if cell.part[1] != "mutant"}
        mutants = {cell.part[2]: cell.text for cell in mine if cell.part[1] == "mutant"}
        missing = sorted({"task", "code", "check", "help"} - parts.keys())
        if missing or not mutants:
            what = [f"{name}-{part}" if part != "code" else name for part in missing]
            raise ValueError(
                f"{self.path.name}: exercise {name} needs the cells "
                f"{', '.join(what) or f'{name}-mutant-NAME (one or more)'}"
            )
        starter, solution = (region(parts["code"], solved=s) for s in (False, True))
        return Exercise(
            name, parts["task"], starter, solution, parts["check"], parts["help"], mutants
        )


def read(path: Path) -> Source:
    """Read a source file. Raises ValueError for missing, malformed or repeated ids."""
    notebook = jupytext.read(path)
    cells = tuple(
        Cell(
            id=cell.metadata.get("title", ""),
            kind=cell.cell_type,
            text=cell.source.strip("\n"),
            tags=tuple(sorted(cell.metadata.get("tags", []))),
            budget_s=float(cell.metadata.get("budget_s", BUDGET_S)),
        )
        for cell in notebook.cells
    )
    ids = [cell.id for cell in cells]
    wrong = sorted(
        {id_ for id_ in ids if ids.count(id_) > 1 or not re.fullmatch("[a-z0-9-]+", id_)}
    )
    if wrong:
        raise ValueError(
            f"{path.name}: every cell needs its own id of a-z, 0-9 and '-', as in "
            f"'# %% waste-figure'; missing, malformed or repeated: {', '.join(map(repr, wrong))}"
        )
    return Source(path, cells)


def region(text: str, *, solved: bool) -> str:
    """Return a cell with either the starter or the solution between its markers.

    Raises ValueError unless there is exactly one region that holds both.
    """
    before, inside, after = split(text)
    starter = [line for line in inside if line.lstrip().startswith(STARTER)]
    solution = [line for line in inside if not line.lstrip().startswith(STARTER)]
    if not starter or not any(line.strip() for line in solution):
        raise ValueError(f"a region needs a starter ({STARTER} lines) and a solution:\n{text}")
    chosen = (
        solution if solved else [re.sub(rf"{STARTER} ?", "", line, count=1) for line in starter]
    )
    return "\n".join([*before, *chosen, *after])


def split(text: str) -> tuple[list[str], list[str], list[str]]:
    """Return the lines before, inside and after a cell's region; the markers are outside."""
    lines = text.split("\n")
    marks = [i for i, line in enumerate(lines) if line.strip() in (BEGIN, END)]
    if [lines[i].strip() for i in marks] != [BEGIN, END]:
        raise ValueError(f"an exercise needs one region from {BEGIN!r} to {END!r}; got:\n{text}")
    begin, end = marks
    return lines[: begin + 1], lines[begin + 1 : end], lines[end:]


def _help(exercise: Exercise) -> str:
    """Return three hints and the solution, each folded inside the previous one."""
    parts = [part.strip() for part in re.split(r"(?m)^---$", exercise.help)]
    if len(parts) != 4 or not all(parts):
        raise ValueError(
            f"{exercise.name}-help needs three hints and the why of the solution, separated by "
            f"lines '---'; got {len(parts)} parts"
        )
    lines = [x for x in exercise.solution.split("\n") if x.strip() not in (BEGIN, END)]
    solution = "\n".join(["```python", *lines, "```", "", parts[3]])
    return _folded([*zip(_SUMMARIES, parts[:3], strict=True), ("Solution, and why", solution)])


def _folded(steps: Sequence[tuple[str, str]]) -> str:
    summary, text = steps[0]
    inner = f"\n\n{_folded(steps[1:])}" if len(steps) > 1 else ""
    return f"<details><summary>{summary}</summary>\n\n{text}{inner}\n\n</details>"
