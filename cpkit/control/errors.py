"""What can go wrong between a client and the workers. The kinds differ in what to do next."""

from __future__ import annotations


class ControlError(RuntimeError):
    """Base of all errors of the control socket except `BadRequest`."""


class Unreadable(ControlError):
    """A file is not what this version of cpkit writes."""


class NoWorkers(ControlError):
    """No workers run under this name: start them."""


class OtherWorkers(ControlError):
    """Workers of this name run, but not as asked: use them as they are, or choose another name."""


class WorkersDied(ControlError):
    """A worker process ended; the message has rank, exit code and last log lines. Connect again.

    `rank` and `exit_code` are None where nobody could tell; a negative exit code is a signal.
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
    """The workers are well and serve others first; `ahead` requests. Wait, or cancel the others."""

    def __init__(self, message: str, *, ahead: int) -> None:
        super().__init__(message)
        self.ahead = ahead


class NoAnswer(ControlError):
    """Nobody answered before the deadline, or the other side refused to talk."""


class Cancelled(ControlError):
    """The request was cancelled before it had a result."""


class RequestFailed(ControlError):
    """The workers tried and failed; they are ready for the next request."""


class BadRequest(ValueError):
    """The request makes no sense to the workers; the message says what would. They are unharmed."""
