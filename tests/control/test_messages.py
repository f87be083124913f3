"""Messages: decoding inverts encoding, and all other data is rejected with what is allowed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpkit.control import messages
from cpkit.control.errors import explain_decode_error
from cpkit.control.messages import (
    Cancel,
    Done,
    Envelope,
    Gather,
    Measure,
    Reply,
    Request,
    Sample,
    Status,
    Sweep,
    Workload,
    decode,
    encode,
)
from cpkit.layout import STRATEGIES
from cpkit.timing import CALL_TIME

WORKLOAD = Workload(cp_size=4, lengths=(4097, 812))
BAD_WORKLOAD = {"cp_size": 2, "lengths": [8], "strategy": "magic"}
GOOD = {"id": "a", "deadline_s": 1.0, "version": 1, "body": {"op": "status"}}


def pack(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


@given(st.binary(max_size=200))
def test_random_bytes_are_rejected_or_are_a_message(data: bytes) -> None:
    for kind in (Request, Reply, Envelope):
        with contextlib.suppress(msgspec.DecodeError):
            assert isinstance(decode(data, kind), kind)


@given(st.data())
def test_a_damaged_request_is_rejected_or_is_a_request(data: st.DataObject) -> None:
    whole = bytearray(encode(Request("id", 1.0, Measure((WORKLOAD,), samples=3))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        request = decode(bytes(whole), Request)
    except (msgspec.DecodeError, ValueError):
        return
    assert isinstance(request.body, msgspec.Struct)


bodies = st.one_of(
    st.builds(Status),
    st.builds(Cancel, target=st.text(max_size=20)),
    st.builds(
        Gather,
        workload=st.builds(
            Workload,
            cp_size=st.integers(-5, 64),
            lengths=st.lists(st.integers(-3, 1 << 40)).map(tuple),
            strategy=st.sampled_from(["zigzag", "interleave", "contiguous"]),
            dtype=st.text(max_size=12),
        ),
        round=st.integers(0, 1000),
        show=st.booleans(),
    ),
)


@given(bodies)
def test_requests_are_decoded_as_they_were_encoded(body: messages.Body) -> None:
    request = Request("0" * 32, 30.0, body)
    assert decode(encode(request), Request) == request


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"surprise": 1}, "surprise"),
        ({"body": {"op": "exec"}}, "exec"),
        ({"body": {"op": "status", "code": "import os"}}, "code"),
        ({"body": {}}, "op"),
        ({"id": 7}, "$.id"),
        ({"deadline_s": "soon"}, "$.deadline_s"),
        ({"body": {"op": "cancel"}}, "target"),
        ({"body": {"op": "gather", "workload": BAD_WORKLOAD}}, "$.body.workload.strategy"),
    ],
)
def test_an_unknown_or_invalid_field_is_rejected_by_name(
    change: dict[str, object], place: str
) -> None:
    assert decode(pack(GOOD), Request).body == Status()
    with pytest.raises(msgspec.ValidationError) as caught:
        decode(pack({**GOOD, **change}), Request)
    assert place in str(caught.value)


def test_id_and_version_of_another_protocol_version_are_readable() -> None:
    theirs = {"id": "a", "version": 9, "body": {"op": "teleport"}, "new": True}
    assert decode(pack(theirs), Envelope) == Envelope("a", 9)


FIRST_DECODE_IN_THREADS = """
import sys, threading
from cpkit.control.messages import Done, Reply, Request, Status, decode, encode

sys.setswitchinterval(1e-6)
for message in (Reply("a", Done()), Request("a", 1.0, Status())):
    data, together = encode(message), threading.Barrier(8)

    def decode_first():
        together.wait()
        assert decode(data, type(message)) == message

    threads = [threading.Thread(target=decode_first) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_threads_may_decode_the_first_message_of_a_type_together() -> None:
    """msgspec 0.22 usually ends the process when it describes a type in several threads at once."""
    command = [sys.executable, "-c", FIRST_DECODE_IN_THREADS]
    assert [subprocess.run(command, check=False).returncode for _ in range(4)] == [0] * 4


def test_messages_have_a_size_limit() -> None:
    most = messages.MAX_REQUEST_BYTES
    with pytest.raises(ValueError, match=f"at most {most} fit: pass fewer workloads"):
        encode(Request("a", 1.0, Cancel("x" * most)))
    with pytest.raises(ValueError, match=f"at most {messages.MAX_MESSAGE_BYTES} fit"):
        encode(Reply("a", Done("x" * messages.MAX_MESSAGE_BYTES)))
    largest = Sweep((Workload(4, (1 << 20,) * 8, dtype="float8_e4m3fn"),) * 1024)
    assert len(encode(Request("a", 1.0, largest))) < most / 4
    with pytest.raises(msgspec.DecodeError, match="at most"):
        decode(bytes(messages.MAX_MESSAGE_BYTES + 1), Request)


def test_bandwidths_follow_nccl_tests_definitions() -> None:
    sample = Sample(
        workload=WORKLOAD,
        sequence=0,
        iterations=5,
        clock=CALL_TIME,
        per_rank_us=(900.0, 1000.0, 950.0, 800.0),
        per_rank_min_us=(1.0,) * 4,
        per_rank_p95_us=(1.0,) * 4,
        per_rank_call_us=(1000.0,) * 4,
        stage_us={},
        path="symmetric",
        path_reason="",
    )
    assert sample.time_us == 1000.0
    algbw_gbps = WORKLOAD.total_bytes / 1e6  # in one millisecond
    assert sample.algbw_gbps == pytest.approx(algbw_gbps)
    assert sample.busbw_gbps == pytest.approx(algbw_gbps * 3 / 4)
    assert repr(sample) == (
        "direct, cp_size 4, 20107264 bytes: call time 1000 µs, p95 1 µs, algbw 20.11 GB/s, "
        "busbw 15.08 GB/s, path symmetric"
    )
    assert sample._repr_html_().count("<tr>") == 4, "one row per rank"


def test_bytes_of_a_workload() -> None:
    assert WORKLOAD.total_bytes == (4097 + 812) * 8 * 128 * 2 * 2
    with pytest.raises(ValueError, match="float31"):
        _ = msgspec.structs.replace(WORKLOAD, dtype="float31").row_bytes


def explanation(body: dict[str, Any]) -> str:
    with pytest.raises(msgspec.ValidationError) as error:
        decode(pack({**GOOD, "body": body}), Request)
    return explain_decode_error(error.value)


def workload(**fields: Any) -> dict[str, Any]:
    return {"cp_size": 2, "lengths": [8], **fields}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"op": "gather", "workload": workload(algorithm=5)},
            "algorithm is int; it must be text",
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


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(" - at `$" * 20_000 + "a" * 100_000, id="like the end of a message"),
        pytest.param("Expected `int`, got `" * 20_000, id="like the start of a message"),
        pytest.param(".calls[" * 50_000, id="like a path"),
    ],
)
def test_foreign_text_is_cut_in_linear_time(text: str) -> None:
    """While the workers explain an error, all other requests wait."""
    bodies = [
        {"op": "pool", "cp_size": 2, "action": text},
        {"op": "gather", "workload": workload(strategy=text)},
        {"op": "gather", "workload": workload(**{text: 1})},
        {"op": "status", text: 1},
        {"op": text},
    ]
    start_s = time.monotonic()
    assert max(len(explanation(body)) for body in bodies) < 600
    assert time.monotonic() - start_s < 2
    with pytest.raises(ValueError, match="dtype is") as error:
        _ = msgspec.structs.replace(WORKLOAD, dtype=text).row_bytes
    assert len(str(error.value)) < 600
