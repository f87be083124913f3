"""A message with an unknown word in it is refused with the words that are known."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cpkit.algorithms import ALGORITHMS
from cpkit.control.complaints import in_words, unknown_options
from cpkit.control.messages import Request, Workload
from cpkit.layout import STRATEGIES


def complaint(body: dict[str, Any]) -> str:
    data = msgspec.msgpack.encode({"id": "a", "deadline_s": 1.0, "body": body})
    with pytest.raises(msgspec.ValidationError, match=r".") as error:
        msgspec.msgpack.decode(data, type=Request)
    return in_words(error.value)


def workload(**fields: Any) -> dict[str, Any]:
    return {"cp_size": 2, "lengths": [8], **fields}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"op": "gather", "workload": workload(algorithm="fast")},
            f"algorithm is 'fast'; it must be one of {', '.join(ALGORITHMS)}",
        ),
        (
            {"op": "sweep", "workloads": [workload(strategy="zag")]},
            f"strategy is 'zag'; it must be one of {', '.join(STRATEGIES)}",
        ),
        ({"op": "gather", "workload": workload(speed=9)}, "a workload has cp_size, lengths, st"),
        ({"op": "sweep", "workloads": [workload(speed=9)]}, "there is no 'speed'; a workload has"),
        ({"op": "pool", "cp_size": 2, "action": "burn"}, "action is 'burn'; it must be one of st"),
        ({"op": "status", "verbose": True}, "unknown field `verbose`"),
        ({"op": "gather", "workload": workload(heads="8")}, "Expected `int`, got `str`"),
    ],
)
def test_complaints(body: dict[str, Any], words: str) -> None:
    assert words in complaint(body)


def test_options_of_a_workload_are_named() -> None:
    with pytest.raises(msgspec.ValidationError, match=r".") as error:
        msgspec.convert(workload(head=8), Workload)
    assert unknown_options(error.value).startswith("there is no option 'head'; use cp_size, leng")
