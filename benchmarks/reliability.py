"""`python -m benchmarks.reliability`: write docs/reliability.md from the recorded runs.

Of each kind the newest run, and of the injected faults all runs, which have different seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.launch import RESULTS, ROOT
from cpkit.processes import run_command

PAGE = ROOT / "docs" / "reliability.md"
FRAME = """\
# Reliability: what was injected, and what was left over

Written by `python -m benchmarks.reliability` from the records in `benchmarks/results`.

## Faults

{chaos}
## Load

{load}
## Soak

{soak}
## Messages

{messages}
## Gathers

{fuzz}"""
CHAOS = """\
In {runs} runs with different seeds, {survived} of {injected} faults were survived, and {left}
processes, sockets or segments were left over. After each fault, the error named its cause, and
the next `cpkit.connect()` gathered right rows. The slowest error came after {slowest_error_s:g} s,
with a deadline of {deadline_s:g} s.

| fault | injected | slowest error, s |
|---|---|---|
{rows}

0 s: the fault has no error, or one that is not timed.
{failures}
{source}
"""
LOAD = """\
{clients} clients sent mixed requests for {minutes:g} minutes: {answered} were answered,
{n_refused} were refused with a reason (most were invalid on purpose), and {failed} failed. The
slowest client received {fewest_of_a_client} answers, the fastest one {most_of_a_client}. {growth}

| request | answered | p50, ms | p99, ms | slowest, ms |
|---|---|---|---|---|
{rows}

The clients share the {cores} cores of the machine with the ranks. The results of a `burst`, several
requests at once, must arrive in their order.

{source}
"""
SOAK = """\
{clients} clients sent such requests for {minutes:g} minutes, with pauses, and reconnected after
every 40 requests: {answered} were answered, {n_refused} were refused with a reason, and {failed}
failed. A status took {status_p50_ms:.0f} ms (p50) and {status_p99_ms:.0f} ms (p99). {growth}

{source}
"""
GROWTH = """\
After the first minute the {ranks} ranks had {first[memory_mb]:g} MB of resident memory,
{first[descriptors]} descriptors and {first[threads]} threads; at the end {last[memory_mb]:g} MB
({growth[memory_mb]:+.1%}), {last[descriptors]} and {last[threads]}."""
MESSAGES = """\
{decoder[decoded]} random, nested, oversized and damaged messages were decoded: each was a request,
or was rejected with an explanation, the slowest within {decoder[slowest_ms]:g} ms. {workers[sent]}
more were sent to two workers, which answered a status request after every 500 of them within
{workers[slowest_answer_ms]:g} ms, and grew by {workers[memory_growth_mb]:g} MB. {failed} messages
had another effect.

{source}
"""
FUZZ = """\
{gathers} gathers of random batches in {cases} cases were compared bit by bit with a definition, and
{failed} cases failed. {refused_calls} calls with bad arguments were refused on every rank.

{source}
"""
SOURCE = "`{command}`, {date}, commit {commit:.8}, torch {torch}, {cores} cores: [{name}]({link})."


def newest(kind: str) -> dict[str, Any]:
    """Return the newest record of a kind, such as "chaos", with its environment and its source."""
    return read(max(RESULTS.glob(f"*-{kind}.json")))


def read(file: Path) -> dict[str, Any]:
    """Return a record, with its environment and its source."""
    run = json.loads(file.read_text())
    where = run.pop("environment")
    link = f"../benchmarks/results/{file.name}"
    return where | run | {"source": SOURCE.format(name=file.name, link=link, **where)}


def faults_of_all_runs() -> dict[str, Any]:
    """Return the sums of all records of chaos, and the slowest error of each kind of fault."""
    runs = [read(file) for file in sorted(RESULTS.glob("*-chaos-*.json"))]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for kind, fault in run["by_kind"].items():
            kinds.setdefault(kind, []).append(fault)
    return {
        "runs": len(runs),
        "deadline_s": runs[-1]["deadline_s"],
        "source": "\n".join(f"- {run['source']}" for run in runs),
        "slowest_error_s": max(run["slowest_error_s"] for run in runs),
        **{name: sum(run[name] for run in runs) for name in ("injected", "survived")},
        "failures": [failure for run in runs for failure in run["failures"]],
        "left_over": [what for run in runs for what in run["left_over"]],
        "by_kind": {
            kind: {
                "injected": sum(fault["injected"] for fault in found),
                "slowest_error_s": max(fault["slowest_error_s"] for fault in found),
            }
            for kind, found in sorted(kinds.items())
        },
    }


def page() -> str:
    """Return the content of the page."""
    chaos, load, fuzz = faults_of_all_runs(), newest("load"), newest("fuzz")
    faults = "\n".join(
        f"| {kind.replace('_', ' ')} | {fault['injected']} | {fault['slowest_error_s']:g} |"
        for kind, fault in chaos["by_kind"].items()
    )
    failures = "".join(
        f"\n- fault {failure['number']}, {failure['fault'].replace('_', ' ')}: {failure['problem']}"
        for failure in chaos.pop("failures")
    )
    soak, messages = newest("soak"), newest("messages")
    return FRAME.format(
        chaos=CHAOS.format(rows=faults, failures=failures, left=len(chaos["left_over"]), **chaos),
        load=LOAD.format(rows=requests(load), **counts(load)),
        soak=SOAK.format(
            status_p50_ms=1e3 * soak["seconds"]["status"]["p50"],
            status_p99_ms=1e3 * soak["seconds"]["status"]["p99"],
            **counts(soak),
        ),
        messages=MESSAGES.format(
            failed=len(messages["decoder"]["failures"] + messages["workers"]["failures"]),
            **messages,
        ),
        fuzz=FUZZ.format(failed=len({each["seed"] for each in fuzz["failures"]}), **fuzz),
    )


def requests(load: dict[str, Any]) -> str:
    """Return a row per kind of request."""
    return "\n".join(
        f"| {kind} | {each['count']} | "
        + " | ".join(f"{1e3 * each[figure]:.0f}" for figure in ("p50", "p99", "max"))
        + " |"
        for kind, each in load["seconds"].items()
    )


def counts(load: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a record of the load command, as its paragraph uses them."""
    first, *_, last = load["by_minute"]
    return load | {
        "failed": len(load["problems"]),
        "n_refused": sum(load["refused"].values()),
        "growth": GROWTH.format(first=first, last=last, **load),
    }


def main(path: Path = PAGE) -> int:
    """Write the page."""
    path.write_text(page())
    return 0


if __name__ == "__main__":
    run_command(main)
