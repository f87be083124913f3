"""The notebook's interface: `connect()` and `Lab`. Results are in `cpkit.control.results`."""

from cpkit.lab.lab import Lab, connect

__all__ = ["Lab", "connect"]
