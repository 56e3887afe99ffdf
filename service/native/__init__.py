"""The CPU accelerator: a Step in C++ for decoders with Llama's architecture. Only the loader imports it."""

from service.native.build import build
from service.native.library import build_portable, is_available, use_threads
from service.native.storage import bfloat16_candidates, bfloat16_tensors

__all__ = ["bfloat16_candidates", "bfloat16_tensors", "build", "build_portable", "is_available", "use_threads"]
