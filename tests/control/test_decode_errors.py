"""A message with an invalid value or field is rejected with what is allowed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cpkit.algorithms import ALGORITHMS
from cpkit.control.errors import explain_decode_error
from cpkit.control.messages import Request
from cpkit.layout import STRATEGIES


def explanation(body: dict[str, Any]) -> str:
    data = msgspec.msgpack.encode({"id": "a", "deadline_s": 1.0, "body": body})
    with pytest.raises(msgspec.ValidationError, match=r".") as error:
        msgspec.msgpack.decode(data, type=Request)
    return explain_decode_error(error.value)


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
        ({"op": "gather", "workload": workload(heads="8")}, "heads is str; it must be a whole n"),
    ],
)
def test_decode_errors_say_what_is_allowed(body: dict[str, Any], words: str) -> None:
    assert words in explanation(body)
