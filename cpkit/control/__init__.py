"""The control socket: how a notebook talks to the ranks without joining their process group."""
