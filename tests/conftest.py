"""Settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import ktcore
from ktcore.dispatch import registry
from ktcore.testing.cases import Case
from ktcore.testing.selftest import quiet_torch
from ktcore.testing.variants import Variant, all_variants

# Fixtures that last for a whole test are what properties are tried on here.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", max_examples=40, **_COMMON)
settings.register_profile("ci", max_examples=40, derandomize=True, **_COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def _restored():
    """Leave the thread count and the choice of backends as they were."""
    threads = ktcore.get_num_threads()
    yield
    if ktcore.get_num_threads() != threads:
        ktcore.set_num_threads(threads)
    ktcore.use()


@pytest.fixture(scope="session", autouse=True)
def _quiet_torch():
    with quiet_torch():
        yield


# What cannot run here is skipped once, by test_dispatched_to, not in every case.
RUNNABLE = [v for v in all_variants() if v.why_not is None]


@pytest.fixture(scope="module", params=RUNNABLE, ids=lambda v: v.name)
def variant(request: pytest.FixtureRequest) -> Iterator[Variant]:
    """Every backend with each instruction set that can run here; operators go to it."""
    with request.param.forced():
        yield request.param


@pytest.fixture
def check(variant: Variant) -> Callable[[Case, str | None], None]:
    """Run a case in a format on the variant."""

    def run(case: Case, format: str | None) -> None:
        served = {i.op: i.formats for i in registry.implementations(variant.backend)}
        if case.op not in served or (format is not None and format not in served[case.op]):
            pytest.skip(f"{variant.backend} does not implement {case.op} for {format}")
        outcome = case.run(format, variant.backend)
        assert not outcome.problem, outcome.problem

    return run


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
