"""Measurements of the service; each module is a command."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, which reads it: as in the engine's own process
