"""Synchronization of ranks: store exchange, shared memory, barrier, signals, agreement."""
