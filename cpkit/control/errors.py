"""Errors of the control socket, one class per action of the user, and readable decode errors."""

from __future__ import annotations

import re
from typing import get_args, get_type_hints

import msgspec

from cpkit.algorithms import ALGORITHM_CHOICES
from cpkit.control.requests import Pool, Strategy, Workload


class ControlError(RuntimeError):
    """Base of all errors of the control socket except `BadRequest`."""


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


class Cancelled(ControlError):
    """The request was cancelled before it had a result."""


class RequestFailed(ControlError):
    """The workers failed to serve the request; they are ready for the next one."""


class BadRequest(ValueError):
    """The request is invalid; the message lists what is allowed. The workers keep running."""


_ALLOWED = {
    "algorithm": ALGORITHM_CHOICES,
    "strategy": get_args(Strategy),
    "action": get_args(get_type_hints(Pool)["action"]),
}
_VALUE = re.compile(r"Invalid enum value (?P<value>.*) - at `\$.*?(?P<field>\w+)`$")
_FIELD = re.compile(r"unknown field `(?P<field>\w+)`(?: - at `(?P<path>[^`]*)`)?$")


def explain_decode_error(error: msgspec.DecodeError) -> str:
    """Return msgspec's message with the allowed values.

    "Invalid enum value 'fast' - at `$.algorithm`" becomes "algorithm is 'fast'; it must be one of
    padded, padded_symm_recv, padded_symm, direct".
    """
    text = str(error)
    value, field = _VALUE.search(text), _FIELD.search(text)
    if value and value["field"] in _ALLOWED:
        allowed = ", ".join(_ALLOWED[value["field"]])
        return f"{value['field']} is {value['value']}; it must be one of {allowed}"
    if field and re.search(r"workloads?(\[.*\])?$", field["path"] or ""):
        names = ", ".join(Workload.__struct_fields__)
        return f"there is no {field['field']!r}; a workload has {names}"
    if field:
        return f"{text}: this version of the protocol has no such field"
    return text
