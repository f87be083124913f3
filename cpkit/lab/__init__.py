"""What a notebook works with: `connect()`, the Lab, and what its methods return."""

from cpkit.lab.lab import Lab, connect

__all__ = ["Lab", "connect"]
