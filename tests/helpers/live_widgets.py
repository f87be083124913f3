"""A notebook with one cell per live widget, and the load beside which it must work."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.helpers.notebook_page import RECORD
from tools.source import Cell

LIVE_CELLS = [
    Cell(
        "setup",
        "code",
        f"""{RECORD}
import threading
import cpkit, ipywidgets
from cpkit.notebook import intervals
from cpkit.notebook.explorer import Explorer
from cpkit_lessons.pool_live import PoolLive
from cpkit_lessons.stepper import Stepper
intervals.BLOCK_S = 0.1  # so that B / A takes less than twice 8 s
lab = globals().get("lab") or cpkit.connect(launch=False)
idle_s = globals().get("idle_s", 120)""",
    ),
    Cell(
        "stepper",
        "code",
        """stepper = Stepper(lab, [13, 9], cp_size=4)
record(stepper, "stepper")
stepper""",
    ),
    Cell(
        "pool",
        "code",
        """pool = PoolLive(lab, [2, 4, 8, 24], 2, arena_mb=16)
record(pool, "pool")
pool""",
    ),
    Cell(
        "panel",
        "code",
        """panel = Explorer(
    lab, [256, 64], cp_size=2, algorithms=["direct", "plan"], idle_after_s=idle_s, interval_s=0.25
)
record(panel, "panel")
panel.start()""",
    ),
    Cell("second-view", "code", "panel"),
    Cell(
        "count",
        "code",
        """print("threads", sorted(t.name for t in threading.enumerate() if "cpkit" in t.name))
print("widgets", len(ipywidgets.widgets.widget._instances))""",
    ),
    Cell("scratch", "code", ""),
    Cell("mortal", "code", ""),
]
WIDGETS = ("stepper", "pool", "panel")
# A panel with workers of its own, which a test stops and kills.
MORTAL = """import os
os.environ["CPKIT_DEADLINE_S"] = "2"
mortal = Explorer(cpkit.connect("mortal", nproc=2), [64])
record(mortal, "mortal")
mortal.start()"""


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run busy loops, each in a session of its own: the scheduler groups those of one session."""
    # Each loop checks its owner's pid, because an owner that is killed does not clean up.
    loop = ["sh", "-c", f"while kill -0 {os.getpid()}; do :; done 2>/dev/null"]
    loops = [subprocess.Popen(loop, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in loops:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
