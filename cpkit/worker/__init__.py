"""What each torchrun rank runs: the scheduler and its operations."""
