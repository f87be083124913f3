"""What a notebook shows: figures of real arrays and times, and live panels.

Reads the layout and the control client; never imports `torch.distributed`.

    figures        grids (arrays), charts (times), style (colours and words), show (display)
    live panels    explorer (with controls and panel), stepper, pool_live
    their parts    live (thread and frame), plot (with plot.js), cells (a cell that runs again)
    notebooks      workspace (the copies that `make lab` opens)
"""
