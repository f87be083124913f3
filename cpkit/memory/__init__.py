"""Symmetric memory: the pool, its allocator, and one backend per kind of device."""
