"""The lessons with 2, 4 and 8 ranks, with little memory, and after a cell that failed.

test_notebooks.py runs them with 4 ranks, tests/tools/test_rehearsal.py with 2 ranks and little
shared memory. The expected values are computed here token by token, without the formulas of the
questions.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cpkit.layout import prepare_context_parallel_metadata
from cpkit_lessons import padding, performance, rows, symmetric
from cpkit_lessons.lesson import Lesson
from cpkit_lessons.missing_names import sections_of, words
from cpkit_lessons.padding import questions
from cpkit_lessons.world import CP_SIZES, SHARED_BYTES, World, shrink_to, world_of
from tools import run
from tools.build import NOTEBOOKS, SOURCES
from tools.source import read

LESSONS = [padding.LESSON, symmetric.LESSON, performance.LESSON]
WORLDS = [World(cp_size, shrink) for cp_size in CP_SIZES for shrink in (1, 8, 64)]
WORLDS += [World(cp, on_gpu=True, shares_gpu=shared) for cp in CP_SIZES for shared in (True, False)]
FIRST, _, THIRD = sorted(SOURCES.glob("*.py"))
# The second would run its failure lab, which needs no workers, and takes half a minute.
FAILING = [pytest.param(FIRST, marks=pytest.mark.slow("the third shows the same")), THIRD]


# ------------------------------------------------------------------------------- the questions


@pytest.fixture
def follow():
    """Let all lessons follow a world; afterwards, the usual one again."""

    def all_follow(world: World) -> None:
        for lesson in LESSONS:
            lesson.follow(world)

    yield all_follow
    all_follow(World())


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_in_every_world_wrong_answers_are_wrong_and_the_right_one_is_accepted(
    world: World, follow
) -> None:
    follow(world)
    for lesson in LESSONS:
        for key, asked in lesson.predictions.items():
            answer = asked.parse(asked.answer)
            assert asked.is_close(answer, answer)
            assert asked.wrong, key
            assert not [w for w in asked.wrong if asked.is_close(asked.parse(w), answer)], key


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_with_four_ranks_no_wrong_answer_is_dropped(lesson: Lesson) -> None:
    assert lesson.world == World()
    for key, question in lesson.questions.items():
        assert lesson.predictions[key].wrong == question(World()).wrong, key


@pytest.mark.parametrize("cp", CP_SIZES)
def test_the_answers_of_notebook_1_follow_cp(cp: int) -> None:
    world, lengths = World(cp), rows.ragged(cp)
    tokens, asked = 6 * cp, 3 * cp + 5
    blocks = [*range(cp), *reversed(range(cp))]  # the owner of each block
    owners = [owner for owner in blocks for _ in range(3)]
    assert questions.owner(world).answer == owners[asked]
    assert f"{tokens} tokens over {cp} ranks. Which rank owns token {asked}?" in (
        questions.owner(world).question
    )
    keys = [sum(range(6 * rank + 1, 6 * rank + 7)) for rank in range(cp)]
    assert questions.work(world).answer == pytest.approx(keys[-1] / keys[0])
    assert questions.waste(world).answer == pytest.approx(1 - sum(lengths) / slots(lengths, cp))
    assert questions.waste(world).answer > 0.05, "there is padding to see"
    held = max(held_rows([4097] * 16, cp))
    assert questions.cut(world).answer == held - -(-16 * 4097 // cp)
    in_rank_order = prepare_context_parallel_metadata(lengths, cp).rank_order.tolist()
    assert questions.slot(world).answer == in_rank_order.index(lengths[0])
    order = prepare_context_parallel_metadata([tokens], cp).rank_order
    right = [set(order[: t + 1].tolist()) == set(range(t + 1)) for t in range(tokens)]
    assert questions.order(world).answer == sum(right)
    written = slots([32767], cp) / cp + slots([32767], cp) + 2 * 32767
    assert questions.bill(world).answer == pytest.approx(written / 32767, rel=1e-3)


@pytest.mark.parametrize("cp", CP_SIZES)
def test_the_answers_of_notebook_3_follow_cp(cp: int, follow) -> None:
    follow(World(cp))
    asked = performance.LESSON.predictions
    assert asked["busbw"].answer == pytest.approx(8.4e6 * (cp - 1) / 20_000 / 1e3)
    assert asked["late"].answer == pytest.approx(5 * (cp - 1) + 1)
    odd, even = [2 * cp + 1] * 64, [2 * cp] * (64 + 32 // cp)
    assert asked["padding"].answer == pytest.approx(slots(odd, cp) / sum(odd))
    assert sum(odd) == sum(even) == slots(even, cp)
    assert asked["ranking"].question.startswith(f"{cp} ranks gather 16.8 MB")
    shard, whole = held_rows([4 * cp, 2 * cp], cp)[0], 6 * cp
    assert asked["passes"].answer * whole == shard + cp * shard + 2 * whole


def held_rows(lengths: list[int], cp: int) -> list[int]:
    """Return the rows of each rank, counted block by block."""
    held = [0] * cp
    for length in lengths:
        for block, tokens in enumerate(torch.arange(length).tensor_split(2 * cp)):
            held[min(block, 2 * cp - 1 - block)] += len(tokens)
    return held


def slots(lengths: list[int], cp: int) -> int:
    return cp * max(held_rows(lengths, cp))


def test_the_same_world_again_keeps_the_answers() -> None:
    lesson = Lesson("test")

    @lesson.asks
    def ranks(world: World):
        return questions.owner(world)

    lesson.records["ranks"].guess = 2.0
    lesson.follow(World())
    assert lesson.records["ranks"].guess == 2.0
    lesson.follow(World(2))
    assert lesson.records["ranks"].guess is None
    assert "12 tokens over 2 ranks" in lesson.predictions["ranks"].question


# --------------------------------------------------------------------------- ranks and memory


def status(*cp_sizes: int, device: str = "cuda", gpus: int = 1):
    workers = [SimpleNamespace(host="h", device=str(rank % gpus)) for rank in range(max(cp_sizes))]
    return SimpleNamespace(
        name="w", world_size=max(cp_sizes), cp_sizes=cp_sizes, device=device, workers=workers,
        memory_limit_bytes=1 << 40,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cp_sizes", "cp"), [((1, 2), 2), ((1, 2, 4), 4), ((1, 2, 4, 8), 8), ((1, 2, 3, 6), 2),
                         ((1, 2, 4, 8, 16), 8)]
)  # fmt: skip
def test_cp_is_the_largest_of_2_4_and_8_that_the_workers_can_form(cp_sizes, cp: int) -> None:
    assert world_of(status(*cp_sizes)) == World(cp, on_gpu=True, shares_gpu=True)


def test_a_world_says_what_the_ranks_run_on() -> None:
    assert world_of(status(1, 2, gpus=2)) == World(2, on_gpu=True)
    assert world_of(status(1, 2, device="cpu")).on_gpu is False


@pytest.mark.parametrize("cp_sizes", [(1,), (1, 3)])
def test_workers_without_such_groups_are_refused_with_the_commands(cp_sizes) -> None:
    with pytest.raises(ValueError, match=r"2, 4 or 8 ranks.*stop --name w.*--nproc 4"):
        world_of(status(*cp_sizes))


@pytest.mark.parametrize("cp", CP_SIZES)
def test_sizes_shrink_to_the_tighter_of_both_limits(cp: int) -> None:
    plenty, usual = 1 << 40, cp * SHARED_BYTES
    assert shrink_to(cp, usual, plenty) == shrink_to(cp, None, plenty) == 1
    assert shrink_to(cp, usual - 1, plenty) == 2
    assert shrink_to(cp, usual // 8, plenty) == 8
    assert shrink_to(cp, plenty, cp * (60 << 20)) == 8
    assert shrink_to(cp, 1, 1) == 64


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_the_sizes_of_a_sweep_ascend_and_can_be_split(world: World) -> None:
    sizes = world.sizes()
    assert sizes == sorted(set(sizes))
    assert len(sizes) == 5
    assert sizes[0] // 2048 >= 2 * world.cp_size
    assert sizes[-1] == (64 << 20) // world.shrink


def test_a_world_that_shrinks_says_so_in_one_sentence() -> None:
    assert str(World(2)) == "Each gather uses 2 ranks: cp = 2."
    first, sentence = str(World(4, 16)).split("\n")
    assert first == "Each gather uses 4 ranks: cp = 4."
    assert "1/16 of the usual" in sentence
    assert sentence.count(". ") == 0


# -------------------------------------------------------------------------- after a failed cell


def test_each_name_of_a_notebook_belongs_to_a_section() -> None:
    notebook = run.notebook_of(list(read(FIRST).rendered()))
    sections = sections_of(notebook)
    wanted = {"lab": "the first cells", "cp": "the first cells", "layouts": "section 1",
              "gathered": "section 4", "wire": "section 4", "delivered": "section 6",
              "layout": "section 3", "padded_len": "the cell of exercise 3"}  # fmt: skip
    assert {name: sections[name] for name in wanted} == wanted


@pytest.mark.notebook
@pytest.mark.timeout(240)
@pytest.mark.parametrize("path", FAILING, ids=lambda path: path.stem)
def test_one_failed_cell_gives_one_traceback(path: Path) -> None:
    notebook = run.notebook_of(list(read(path).rendered()))
    run.execute(notebook, NOTEBOOKS, {"CPKIT_DEADLINE_S": "never"}, allow_errors=True)
    cells = {
        cell.id: output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "error"
    }
    first = cells.pop("connect")
    assert "CPKIT_DEADLINE_S is 'never'" in first.evalue
    assert cells, "other cells need the lab"
    for cell, error in cells.items():
        assert error.ename == "NameError", cell
        assert "is not defined yet: run " in error.evalue, cell
        assert error.traceback == [f"NameError: {error.evalue}"], cell


def test_the_message_names_the_section() -> None:
    assert words("wire", "section 4") == (
        "'wire' is not defined yet: run section 4 first. If a cell there failed, its message "
        "says why"
    )
