"""The owner of an object that only one thread of a rank may use at a time.

Two threads of a rank that make collective calls at once receive each other's rows when the ranks
interleave the calls differently:

    rank 0   thread 1: gather ┐               thread 2: gather ┐
    rank 1   thread 2: gather ┘ a wrong pair  thread 1: gather ┘ a second wrong pair

So the owner is fixed in advance, by `own()`. A lock held during each call would not help: here no
two calls of one rank overlap.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import NoReturn
from weakref import WeakSet

_FORKED = 0  # no thread has this identity


class OwnerThread:
    """The thread that uses an object called `name`: at first the one that made it.

    Users compare `thread` with `threading.get_ident()`, and call `refuse` if they differ.
    """

    def __init__(self, name: str) -> None:
        self._name, self.thread, self._lock = name, get_ident(), threading.RLock()
        _owners.add(self)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Make this thread the owner until the block ends.

        Raises RuntimeError while another thread is inside such a block, and in a forked child.
        """
        if self.thread == _FORKED or not self._lock.acquire(blocking=False):
            self.refuse()
        previous, self.thread = self.thread, get_ident()
        try:
            yield
        finally:
            self.thread = previous
            self._lock.release()

    def leave_to_parent(self) -> None:
        """Let no thread of a forked child use the object: it belongs to the rank."""
        self.thread = _FORKED

    def refuse(self) -> NoReturn:
        """Raise RuntimeError that names the owner; call this in any other thread. Local.

        It comes before anything is sent, because the peers cannot distinguish threads.
        """
        if self.thread == _FORKED:
            raise RuntimeError(
                f"{self._name} belongs to the rank from which this process was forked, and the "
                f"peers would take its calls for those of the rank. Gather in the rank itself, and "
                f'start other processes with multiprocessing.get_context("spawn")'
            )
        names = [each.name for each in threading.enumerate() if each.ident == self.thread]
        owner = f"thread {names[0]!r}" if names else "a thread that has ended"
        raise RuntimeError(
            f"{self._name} belongs to {owner}, and was used in thread "
            f"{threading.current_thread().name!r}: one thread at a time. Make all groups in one "
            f"thread, one for each thread that gathers, each with another name "
            f'(init_context_parallel(cp_size, name="…")), and gather inside `with use_group(group)`'
        )


_owners: WeakSet[OwnerThread] = WeakSet()


def _leave_all_to_parent() -> None:
    for owner in _owners:
        owner.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)
