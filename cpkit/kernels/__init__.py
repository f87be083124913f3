"""Storing rows into the memory of the peers: the Triton kernel, its launch, its tiles."""
