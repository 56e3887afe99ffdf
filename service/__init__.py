"""X-LoRA inference service: a base model, its LoRA experts and the gate that mixes them, behind HTTP."""

import os

# torch's threads sleep while they have nothing to do: those of the native kernels want their cores
# (model/kernels/helpers.h). Read when torch is loaded; who has chosen otherwise is left in peace.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
