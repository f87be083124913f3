"""Figures of real arrays and times, and live panels, for notebooks.

These modules use the layout and the control client, and never import `torch.distributed`.

    figures        grids (arrays), style (colours and text), show (display)
    the explorer   controls, panel (figure), views, probes (what one view needs),
                   intervals (statistics), tables, badges, banner,
                   presence (idle and hidden pages), takeaway (code, CSV, JSON)
    their parts    live (thread and widgets), plot (with plot.js), cells (a cell that runs again)
    notebooks      workspace (the copies that `make lab` opens)
"""
