"""What the CPU backends (avx2, avx512, amx) share: calls into the extension, packing, costs.

Not a backend itself: it has no `BACKEND`.
"""
