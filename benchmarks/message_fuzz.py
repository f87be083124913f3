"""`python -m benchmarks.message_fuzz`: damaged messages for the decoder, and for real workers.

    python -m benchmarks.message_fuzz --record     # writes benchmarks/results/DATE-messages.json
    python -m benchmarks.message_fuzz --seed 7     # other messages

Messages are random bytes, deeply nested, claim to be longer than they are, or are real requests
with bytes changed, removed, repeated or exchanged with those of others. The decoder must return a
request, or an error that is explained in a bounded text. The workers must answer a question after
each group of messages, and gather right rows at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import psutil
import zmq

import cpkit
from benchmarks.launch import RESULTS, say
from cpkit.control.errors import explain_decode_error
from cpkit.control.messages import (
    Cancel,
    Clock,
    Envelope,
    Explain,
    Gather,
    Measure,
    Pool,
    Put,
    Reply,
    Request,
    Status,
    StatusResult,
    Sweep,
    Trace,
    Workload,
    decode,
    encode,
)
from cpkit.control.runtime_dir import Connection
from cpkit.processes import run_command

COMMAND = "python -m benchmarks.message_fuzz"
GROUP = 500  # messages of one connection
LONGEST_TEXT = 600  # of an explanation
ANSWER_S, IDLE_S = 10.0, 60.0
SMALL = Workload(2, (16, 9), heads=1, head_dim=16)
BODIES = (  # all but Shutdown, which the workers would obey
    Status(),
    Cancel("another"),
    Gather(SMALL),
    Measure((SMALL,), samples=1),
    Sweep((SMALL, SMALL), iterations=1),
    Clock(SMALL, ("direct", "barrier"), iterations=1),
    Trace(SMALL),
    Pool(2),
    Explain(SMALL),
    Put(2, rounds=1),
)


def real(rng: random.Random) -> bytes:
    """Return a valid request."""
    return encode(Request(f"{rng.getrandbits(64):x}", 30.0, rng.choice(BODIES)))


def noise(rng: random.Random) -> bytes:
    """Return random bytes."""
    return rng.randbytes(rng.choice((0, 1, 2, 8, 64, 1024)))


def nested(rng: random.Random) -> bytes:
    """Return an envelope with arrays or maps inside each other."""
    inner = rng.choice((b"\x91", b"\x81\xa1a", b"\x81")) * rng.choice((10, 1000, 20_000))
    return b"\x83\xa2id\xa1a\xa7version\x05\xa4body" + inner


def oversized(rng: random.Random) -> bytes:
    """Return a request whose last part claims to be far longer than it is."""
    claims = (b"\xdb\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff")
    whole = real(rng)
    return whole[: rng.randrange(len(whole))] + rng.choice(claims) + rng.randbytes(4)


def changed(rng: random.Random) -> bytes:
    """Return a real request with a few bytes changed, removed, repeated or from another one."""
    data = bytearray(real(rng))
    for _ in range(rng.randrange(1, 5)):
        at, length = rng.randrange(len(data)), rng.randrange(1, 9)
        other = real(rng)
        start = rng.randrange(len(other))
        data[at : at + rng.choice((0, length))] = rng.choice(
            (rng.randbytes(1), b"", data[at : at + length], other[start : start + length])
        )
        if not data:
            break
    return bytes(data)


# Most messages are nearly right, because these reach the furthest.
KINDS: dict[Callable[[random.Random], bytes], int] = {
    changed: 80,
    noise: 10,
    oversized: 8,
    nested: 2,
}


def messages(rng: random.Random, count: int) -> list[tuple[str, bytes]]:
    """Return damaged messages, with the name of their kind."""
    kinds = rng.choices([*KINDS], [*KINDS.values()], k=count)
    return [(kind.__name__, kind(rng)) for kind in kinds]


def problem_of(data: bytes) -> str | None:
    """Return None if the decoder returns a request, its explanation if not. Raises what is odd."""
    try:
        decode(data, Envelope)
        request = decode(data, Request)
    except msgspec.DecodeError as error:
        return explain_decode_error(error)
    assert decode(encode(request), Request) == request
    return None


def decode_all(rng: random.Random, count: int) -> dict[str, Any]:
    """Decode damaged messages, and return what became of them."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    slowest_s = 0.0
    while (done := outcomes.total()) < count:
        for kind, data in messages(rng, min(10_000, count - done)):
            start_s = time.perf_counter()
            try:
                problem = problem_of(data)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a fault
                failures.append(f"{kind} {data[:80].hex()}: {type(error).__name__}: {error!s:.200}")
                problem = ""
            slowest_s = max(slowest_s, time.perf_counter() - start_s)
            if problem is not None and len(problem) > LONGEST_TEXT:
                failures.append(f"{kind} {data[:80].hex()}: the text has {len(problem)} characters")
            outcomes["a request" if problem is None else kind] += 1
    return {
        "decoded": outcomes.total(),
        "outcomes": dict(outcomes.most_common()),
        "slowest_ms": round(1e3 * slowest_s, 2),
        "failures": failures[:20],
    }


def connect_raw(connection: Connection) -> zmq.Socket[bytes]:
    """Return a socket with the right keys that can send anything."""
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.routing_id = uuid.uuid4().bytes[:12].replace(b"\0", b"x") + b"fuzz"
    dealer.curve_serverkey = connection.server_public_key.encode()
    dealer.curve_publickey = connection.client_public_key.encode()
    dealer.curve_secretkey = connection.client_secret_key.encode()
    dealer.linger = 0
    dealer.connect(connection.endpoint)
    return dealer


def wait_for_status(dealer: zmq.Socket[bytes], replies: Counter[str]) -> float:
    """Ask for the status; return how long the answer took. Counts the other replies."""
    fence, start_s = uuid.uuid4().hex, time.monotonic()
    dealer.send(encode(Request(fence, 30.0, Status())))
    while (left_s := start_s + ANSWER_S - time.monotonic()) > 0:
        if dealer.poll(int(1e3 * left_s)):
            reply = decode(dealer.recv(), Reply)
            if reply.id == fence and isinstance(reply.body, StatusResult):
                return time.monotonic() - start_s
            replies[type(reply.body).__name__] += 1
    raise TimeoutError(f"no answer to a status request within {ANSWER_S:g} s")


def send_all(rng: random.Random, count: int) -> dict[str, Any]:
    """Send damaged messages to real workers, and return what they did."""
    name = f"fuzz-{uuid.uuid4().hex[:8]}"
    replies: Counter[str] = Counter()
    failures: list[str] = []
    sent, slowest_s = 0, 0.0
    with cpkit.connect(name, nproc=2) as lab:
        pids = [worker.pid for worker in lab.status().workers]
        rank_0, before = psutil.Process(pids[0]), 0
        while sent < count and not failures:
            if sent >= count // 10:  # the first tenth warms up
                before = before or rank_0.memory_info().rss
            dealer = connect_raw(lab._client.connection)
            try:
                for _, data in messages(rng, min(GROUP, count - sent)):
                    dealer.send(data)
                    sent += 1
                slowest_s = max(slowest_s, wait_for_status(dealer, replies))
            except Exception as error:  # noqa: BLE001
                failures.append(f"after {sent} messages: {type(error).__name__}: {error!s:.300}")
            dealer.close()
        try:
            end_s = time.monotonic() + IDLE_S
            while lab.status().state != "idle" and time.monotonic() < end_s:
                time.sleep(0.1)
            if not lab.gather([9, 12], 2, heads=1, head_dim=8).verified:
                failures.append("a row is wrong")
            if [worker.pid for worker in lab.status().workers] != pids:
                failures.append("a worker was replaced")
            grown = rank_0.memory_info().rss - before
        except Exception as error:  # noqa: BLE001
            failures.append(f"at the end: {type(error).__name__}: {error!s:.300}")
            grown = 0
        lab.stop()
    return {
        "sent": sent,
        "replies": dict(replies.most_common()),
        "slowest_answer_ms": round(1e3 * slowest_s, 1),
        "memory_growth_mb": round(grown / 1e6, 1),
        "failures": failures,
    }


def main() -> int:
    """Run the command, and return its exit code: 1 if a message had an odd effect."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Damaged messages.")
    parser.add_argument("--decode", type=int, default=1_000_000, help="how many (default: 10^6)")
    parser.add_argument("--send", type=int, default=100_000, help="how many (default: 10^5)")
    parser.add_argument("--seed", type=int, default=1, help="of the messages (default: 1)")
    parser.add_argument("--record", action="store_true", help=f"write a file into {RESULTS}")
    options = parser.parse_args()
    from benchmarks.machine import environment  # imports torch

    where = environment(
        f"{COMMAND} --decode {options.decode} --send {options.send} --seed {options.seed}"
    )
    rng = random.Random(options.seed)
    say(f"decoding {options.decode} messages ...")
    done = {"decoder": decode_all(rng, options.decode)}
    say(f"sending {options.send} messages to two workers ...")
    done["workers"] = send_all(rng, options.send)
    say(json.dumps(done, indent=1))
    if options.record:
        file = RESULTS / f"{where['date']}-messages.json"
        file.write_text(json.dumps({"environment": where, **done}, indent=1) + "\n")
    return 1 if done["decoder"]["failures"] or done["workers"]["failures"] else 0


if __name__ == "__main__":
    run_command(main)
