"""What a notebook shows: figures drawn from real arrays, and a live panel.

Knows the layout and the control client; never `torch.distributed`.
"""
