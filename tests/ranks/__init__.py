"""Code that the multi-process tests run inside each rank."""
