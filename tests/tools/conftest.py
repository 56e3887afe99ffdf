"""Tiny engines, and torch as other tests have it."""

from tests.engine.conftest import engines, tiny  # noqa: F401
from tests.support.torch_fixtures import native_kernels, one_thread, seeded  # noqa: F401
