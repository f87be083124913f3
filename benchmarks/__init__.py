"""Measurements with opponents in the same run; `make bench` runs them all."""
