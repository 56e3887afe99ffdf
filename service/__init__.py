"""X-LoRA inference service: a base model, its LoRA experts and the gate that mixes them, behind HTTP or in process.

from service import XLora
"""

from __future__ import annotations

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """XLora, imported when it is asked for: whoever wants the engine or a command alone does not wait for it."""
    if name == "XLora":
        from service.library.model import XLora

        return XLora
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
