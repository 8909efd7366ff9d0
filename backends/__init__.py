"""Backends: one folder for each kind of hardware, and `native` and `triton` for what they share."""
