"""What authors of the notebooks need: build, rehearse, picture. Not part of the wheel."""
