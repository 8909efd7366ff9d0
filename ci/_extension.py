"""Put another build of the extension in the place of the installed one, in this process alone."""

from __future__ import annotations

import importlib.util
import sys


def use(path: str) -> None:
    """Have `import ktcore` take the extension at `path`; before anything of ktcore is imported."""
    assert "ktcore" not in sys.modules, "ktcore is imported already"
    spec = importlib.util.spec_from_file_location("ktcore._C", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ktcore._C"] = module
    spec.loader.exec_module(module)
