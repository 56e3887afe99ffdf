"""Benchmarks run torch."""

from tests.support.torch_fixtures import native_kernels, one_thread, seeded  # noqa: F401  # fixtures
