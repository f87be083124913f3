"""The notebooks' questions, exercise checks and figures: one package per notebook."""
