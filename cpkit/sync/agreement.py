"""Agreement: all ranks continue with a collective, or all of them raise.

A rank that raised on its own would leave its peers waiting in the collective. So the checks before
a collective run in a `with` block, and the end of the block is an exchange:

    with group.agreement() as call:      rank 0   checks pass  ──┐              ┌─▶ ValueError
        check_rows(x)                    rank 1   ValueError   ──┼── exchange ──┼─▶ ValueError
        call.must_match(signature)       rank 2   checks pass  ──┘              └─▶ ValueError

The block holds local checks only. Each rank sends one small record: a flag, a fingerprint of the
call, and the state of its pool. If a flag is set or fingerprints differ, a second exchange carries
the texts that explain it, so no rank has to keep the texts of earlier agreements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import blake2b
from types import TracebackType
from typing import Self

import msgspec

from cpkit.os_errors import describe, lacks_descriptors
from cpkit.packing import describe_types
from cpkit.sync.barrier import MAX_MESSAGE_BYTES
from cpkit.sync.free_memory import explain_refusal

_PASSED, _FAILED = b"\x00", b"\x01"
_DIGEST_BYTES = 16
_HEAD_BYTES = 1 + _DIGEST_BYTES
_TEXT_BYTES = MAX_MESSAGE_BYTES // 2 - 512  # two long texts, two short ones and lengths must fit
Exchange = Callable[[bytes], list[bytes]]


class Signature:
    """One property of a call that must be equal on all ranks, as text.

    `advice` replaces the general explanation when this property differs. A signature can be reused:
    its digest is computed once.
    """

    def __init__(self, text: str, advice: str = "") -> None:
        self.text, self.advice = text, advice

    @cached_property
    def digest(self) -> bytes:
        """Digest of the text, to compare it between ranks and between processes."""
        return blake2b(self.text.encode(), digest_size=_DIGEST_BYTES).digest()

    @cached_property
    def passed(self) -> bytes:
        """What a rank sends when its checks have passed and this signature is the only one."""
        return _PASSED + self.digest


class Agreement:
    """The checks before one collective call; see the module's docstring.

    At the end of the block every rank raises ValueError when any rank raised in it or signatures
    differ; a rank whose own exception is not a ValueError raises that one, unless the limit of open
    files caused it. `failure` is an exception that occurred before the block.

    The result of `record` and then `state` are sent too; `record` is called at the end, because an
    allocation in the block may change what it returns. Once all ranks have agreed, `states` holds
    what each rank sent, and `on_agreed` is called with it.
    """

    def __init__(
        self,
        exchange: Exchange,
        record: Callable[[], bytes] = bytes,
        on_agreed: Callable[[list[bytes]], object] | None = None,
        failure: Exception | None = None,
    ) -> None:
        self._exchange, self._record = exchange, record
        self._on_agreed, self._failure = on_agreed, failure
        self._signatures: list[Signature] = []
        self._fingerprint = bytes(_DIGEST_BYTES)  # of all signatures
        self.state = b""
        self.states: list[bytes] = []

    def must_match(self, signature: Signature) -> None:
        """Add a property that must be equal on all ranks."""
        digest = signature.digest
        if self._signatures:
            both = self._fingerprint + digest
            digest = blake2b(both, digest_size=_DIGEST_BYTES).digest()
        self._signatures.append(signature)
        self._fingerprint = digest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # an interrupt ends this rank's call now; the peers time out
        error = self._failure or error
        head = _FAILED + bytes(_DIGEST_BYTES) if error else _PASSED + self._fingerprint
        mine = head + self._record() + self.state
        self.settle(mine, self._exchange(mine), error)

    def settle(self, mine: bytes, answers: list[bytes], error: Exception | None = None) -> None:
        """Continue or raise, after the exchange of what the ranks sent."""
        head = mine[:_HEAD_BYTES]
        all_equal = answers.count(mine) == len(answers)  # as usual; then no head needs a look
        is_same = all_equal or all(answer[:_HEAD_BYTES] == head for answer in answers)
        if error is not None or not is_same:
            self._raise_explained(error)
            if self._failure:
                raise self._failure
            return
        states = [mine[_HEAD_BYTES:]] * len(answers)
        self.states = states if all_equal else [answer[_HEAD_BYTES:] for answer in answers]
        if self._on_agreed:
            self._on_agreed(self.states)

    def _raise_explained(self, error: Exception | None) -> None:
        """Exchange the texts; raise ValueError unless this rank's own exception propagates."""
        mine = _Explanation()
        if error is not None:
            mine.problem = _cut(describe_error(error))
        else:
            mine.signatures = [(_cut(each.text), each.advice) for each in self._signatures]
        answers = self._exchange(msgspec.msgpack.encode(mine))
        explanations = [msgspec.msgpack.decode(answer, type=_Explanation) for answer in answers]
        if error is None or isinstance(error, ValueError) or lacks_descriptors(error):
            raise ValueError(_explain(explanations)) from error


class _Explanation(msgspec.Struct):
    """Why one rank cannot continue, or the (text, advice) of each of its signatures."""

    problem: str = ""
    signatures: list[tuple[str, str]] = msgspec.field(default_factory=list)


def _explain(explanations: Sequence[_Explanation]) -> str:
    """Return the problems of all ranks; without any, how their calls differ."""
    problems = _by_rank([each.problem for each in explanations])
    if problems:
        return problems
    for signatures in zip(*(each.signatures for each in explanations), strict=False):
        advice: str = signatures[0][1]
        if advice and len({text for text, _ in signatures}) > 1:
            return advice
    calls = [", ".join(text for text, _ in each.signatures) for each in explanations]
    listed = _by_rank(calls)
    return f"the ranks call different collectives. {listed}. All ranks must pass equal arguments."


def describe_error(error: Exception) -> str:
    """Return an error for the message of another rank, with the limit that it met, if any."""
    text = describe(error)
    if isinstance(error, ValueError | TimeoutError) or lacks_descriptors(error):
        return text
    refusal = explain_refusal(error)
    return f"{type(error).__name__}: {text}" + (f" ({refusal})" if refusal else "")


def _by_rank(texts: list[str]) -> str:
    """List each text once, with the ranks that sent it; skip empty texts."""
    ranks_of: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        if text:
            ranks_of.setdefault(text, []).append(str(rank))
    if len(ranks_of) == 1 and len(*ranks_of.values()) == len(texts):
        return next(iter(ranks_of))
    return "; ".join(f"rank(s) {', '.join(ranks)}: {text}" for text, ranks in ranks_of.items())


def _cut(text: str) -> str:
    """Shorten a text to what one exchange can carry; a digest keeps different texts different."""
    data = text.encode()
    if len(data) <= _TEXT_BYTES:
        return text
    digest = blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()
    return f"{data[: _TEXT_BYTES - 48].decode(errors='ignore')} … ({digest})"


describe_types(_Explanation)
