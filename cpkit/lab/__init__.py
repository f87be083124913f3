"""What a notebook works with: `connect()` and the `Lab`. Results are in `cpkit.control.results`."""

from cpkit.lab.lab import Lab, connect

__all__ = ["Lab", "connect"]
