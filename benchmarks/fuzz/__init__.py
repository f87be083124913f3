"""Random gathers in real processes, compared with a definition of their own."""
