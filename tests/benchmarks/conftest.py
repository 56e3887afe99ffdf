"""Benchmarks run torch."""

from tests.torch_fixtures import one_thread, seeded  # noqa: F401  # fixtures
