"""The control socket: how a notebook outside the process group sends requests to its ranks."""
