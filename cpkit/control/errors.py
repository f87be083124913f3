"""Errors of the control socket, one class per action of the user, and readable decode errors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec
import zmq

from cpkit.control.requests import Message, Pool, Strategy, Workload
from cpkit.os_errors import describe, lacks_descriptors

M = TypeVar("M", bound=Message)


class ControlError(RuntimeError):
    """Base of all errors of the control socket except `BadRequest`."""


@contextlib.contextmanager
def name_the_limit() -> Iterator[None]:
    """Raise ControlError that names the limit of open files when no descriptor is free."""
    try:
        yield
    except (OSError, RuntimeError, zmq.ZMQError) as error:
        if not lacks_descriptors(error):
            raise
        raise ControlError(describe(error)) from error


class Unreadable(ControlError):
    """A file does not have the format of this version of cpkit."""


class NoWorkers(ControlError):
    """No workers run under this name: start them."""


class OtherWorkers(ControlError):
    """Workers of this name run with other settings: use them, or choose another name."""


class WorkersDied(ControlError):
    """A worker process ended; the message has rank, exit code and last log lines. Connect again.

    `rank` and `exit_code` are None where they are unknown. A negative exit code is a signal.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        exit_code: int | None = None,
        log_lines: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code
        self.log_lines = log_lines


class WorkersBusy(ControlError):
    """The workers are serving other requests, `ahead` of them before this one. Wait or cancel."""

    def __init__(self, message: str, *, ahead: int) -> None:
        super().__init__(message)
        self.ahead = ahead


class NoAnswer(ControlError):
    """A rank hangs, a deadline passed, a key or a reply is invalid, or the client is closed."""


class RankHangs(NoAnswer):
    """A rank is stopped, cannot be reached, or hangs; the message has its rank and process."""


class Cancelled(ControlError):
    """The request was cancelled before it had a result."""


class RequestFailed(ControlError):
    """The workers failed to serve the request; they are ready for the next one."""


class BadRequest(ValueError):
    """The request is invalid; the message lists what is allowed. The workers keep running."""


_ALLOWED = {
    "strategy": get_args(Strategy),
    "action": get_args(get_type_hints(Pool)["action"]),
}
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "True or False",
    "array": "a list",
}
_LONGEST_ECHO = 300  # characters of foreign text in one message


def checked(message: M) -> M:
    """Return a message with plain numbers. Raises BadRequest for a value of the wrong type."""
    try:
        return msgspec.convert(msgspec.to_builtins(message, enc_hook=_plain), type(message))
    except msgspec.ValidationError as error:
        raise BadRequest(explain_decode_error(error, message)) from None


def explain_decode_error(error: msgspec.DecodeError, message: object = None) -> str:
    """Return msgspec's message with the value, if `message` has it, and the allowed values.

    "Invalid enum value 'zag' - at `$.strategy`" becomes "strategy is 'zag'; it must be one of
    zigzag, interleave, contiguous". The value is foreign text of any length, so it
    is split at msgspec's own marks, once each, and cut.
    """
    what, mark, path = str(error).rpartition(" - at `$")  # the last mark is msgspec's
    if not mark:
        what, path = path, ""
    path = path.removesuffix("`")
    field, item, _ = path.replace("[...]", "[]").rpartition(".")[2].partition("[")
    value, allowed = _wrong_value(what, field)
    if allowed:
        got = value if message is None else repr(_value_at(message, path))
        return f"{field} {'has' if item else 'is'} {got:.80}; {allowed}"
    _, is_unknown, name = what.partition("unknown field `")
    if is_unknown and field in ("workload", "workloads"):
        names = ", ".join(Workload.__struct_fields__)
        return f"there is no {name.removesuffix('`')[:80]!r}; a workload has {names}"
    text = str(error) if len(str(error)) <= _LONGEST_ECHO else f"{error!s:.{_LONGEST_ECHO}} …"
    return f"{text}: this version of the protocol has no such field" if is_unknown else text


def _wrong_value(what: str, field: str) -> tuple[str, str]:
    """Return the value of a decode error, and which ones its field accepts; empty if not known."""
    _, is_enum, value = what.partition("Invalid enum value ")
    kind = ""
    if not is_enum:
        kind, _, value = what.removeprefix("Expected `").partition("`, got `")
        value = value.removesuffix("`")
    if field in _ALLOWED and value:
        return value, f"it must be one of {', '.join(_ALLOWED[field])}"
    word = _WORDS.get(kind.partition(" ")[0])
    return value, f"it must be {word}" if word else ""


def _value_at(message: Any, path: str) -> object:
    """Return the value at a path such as `.workload.lengths[0]`."""
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):  # a path of the caller's message
        message = getattr(message, name) if name else message[int(index)]
    return message


def _plain(value: Any) -> object:
    """Convert a number of numpy or torch. Anything else becomes text, which is then refused."""
    try:
        return value.item()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return repr(value)
