"""A thread that always works on the newest wish: what keeps live controls from blocking the kernel.

control changed ──▶ ask(wish)  returns at once
                        │  an unfinished older wish is given up, one that nobody began is dropped
                        ▼
                    work(wish, is_newest)   in one thread, one wish at a time
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Wish = TypeVar("Wish")


class LatestWins(Generic[Wish]):
    """Calls `work(wish, is_newest)` for the newest wish; `failed(problem)` when that raises.

    Long work looks at `is_newest()` from time to time, and returns when it is false.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Wish, Callable[[], bool]], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._work, self._failed = work, failed
        self._changed = threading.Condition()
        self._wish: Wish | None = None
        self._number = 0
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def ask(self, wish: Wish) -> None:
        """Leave a wish. Never waits."""
        with self._changed:
            self._wish = wish
            self._number += 1
            self._changed.notify_all()

    def close(self, timeout_s: float = 2.0) -> bool:
        """Give up the work and end the thread; whether it ended in time."""
        with self._changed:
            self._closed = True
            self._number += 1
            self._changed.notify_all()
        atexit.unregister(self.close)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        seen = 0
        while True:
            with self._changed:
                while self._number == seen:
                    self._changed.wait()
                seen, wish = self._number, self._wish
            if self._closed:
                return
            assert wish is not None
            try:
                self._work(wish, self._newest(seen))
            except Exception as problem:  # noqa: BLE001  the caller shows it; the thread goes on
                if self._newest(seen)():
                    self._failed(problem)

    def _newest(self, number: int) -> Callable[[], bool]:
        return lambda: self._number == number
