"""Training of a bundle's draft head and draft layer, on what X-LoRA itself writes (flow.py)."""

from service.tools.distill.flow import Distilled, distill
from service.tools.distill.plan import Plan
from service.tools.distill.worth import forwards_per_token

__all__ = ["Distilled", "Plan", "distill", "forwards_per_token"]
