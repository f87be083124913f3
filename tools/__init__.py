"""Tools for the authors of the notebooks. Not part of the wheel."""
