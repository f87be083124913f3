"""The program of each torchrun rank: the scheduler and its operations."""
