"""Every implementation held against float64 arithmetic, over one list of cases.

The test-suite and `ktcore-probe --selftest` run the same: `oracle` says what is right, `cases` what
is tried, `variants` on which backends and instruction sets, `selftest` does it all in one call.
"""
