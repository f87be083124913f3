"""What a notebook shows: figures drawn from real arrays, and a live panel.

Knows the layout and the control client; never `torch.distributed`. Where to look:

    pictures      figures (all), style; bars, charts, grids, maps, mistakes, roofs, timelines
    live panels   explorer with controls and panel; stepper, pool_live; live and latest under them
    questions     lessons/ (one a notebook), lesson, prediction, verdict; guard, ledger, rows
    experiments   programs, schedules (simulated ranks), throwaway (real ones), requests (a pool)
    records       recordings, published, report, tiers
    opening them  workspace (the copies that `make lab` opens)
    making them   source, build, run, rehearse, show, glossary, picture (the README's)
"""
