"""How ranks meet: store exchange, shared-memory segments, barrier, signals, agreement."""
