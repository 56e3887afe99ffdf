"""The CPU accelerator: steps of decoders of Llama's kind in C++. Only the loader names it."""

from service.native.build import build
from service.native.library import build_portable, can_be_had, use_threads
from service.native.storage import expect_bfloat16, names_of_linears

__all__ = ["build", "build_portable", "can_be_had", "expect_bfloat16", "names_of_linears", "use_threads"]
