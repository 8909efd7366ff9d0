"""The limits of the container this process runs in (Linux control groups v2 and v1)."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def read(path: Path) -> str | None:
    """The text of a small system file, None if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return None


def folders(controller: str) -> list[Path]:
    """This process's group and its ancestors: v2 for "", else that v1 controller's hierarchy."""
    root = ROOT / controller if controller else ROOT
    own = ""
    for line in (read(OWN) or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if (controller in controllers.split(",")) if controller else controllers == "":
            own = path.lstrip("/")
    folder, out = root / own, []
    while True:
        out.append(folder)
        if folder == root or root not in folder.parents:
            break
        folder = folder.parent
    return out if root in out else [*out, root]


def cpu_quota() -> float | None:
    """The container's limit in CPUs, the smallest of its ancestors', None where there is none."""
    limits = []
    for folder in folders(""):
        quota, _, period = (read(folder / "cpu.max") or "").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            limits.append(int(quota) / int(period))
    for folder in folders("cpu"):
        quota, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
        if quota and period and quota.isdigit() and period.isdigit() and int(period) > 0:
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit() -> int | None:
    """The container's limit in bytes, None where there is none."""
    limits = []
    for folder, name in [(f, "memory.max") for f in folders("")] + [
        (f, "memory.limit_in_bytes") for f in folders("memory")
    ]:
        text = read(folder / name)
        # v1 says "no limit" with a number near 2^63.
        if text and text.isdigit() and 0 < int(text) < 1 << 60:
            limits.append(int(text))
    return min(limits, default=None)
