"""Measuring operators: backends, formats and token counts against the machine's own limits.

`presets` holds the shapes of published models, `plan` decides how much is put in memory,
`workload` makes weights and calls, `measure` runs them in interleaved rounds, `report` and `plot`
show what came out. `ktcore bench` is the command.
"""
