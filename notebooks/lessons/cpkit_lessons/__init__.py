"""What each notebook asks and checks: one module a notebook."""
