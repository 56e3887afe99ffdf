"""X-LoRA inference service: a base model, its LoRA experts and the gate that mixes them, behind HTTP."""

__version__ = "0.1.0"
