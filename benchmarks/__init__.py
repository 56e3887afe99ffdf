"""Measurements of the service; each module is a command."""

import service  # noqa: F401  # before torch: it says how torch's threads wait
