"""Creates the NativeStep of a model: at once if the library has been built, else after compiling it.

Until then, and where there is none, the model's own step in torch's operators runs; only speed differs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from service.model.dtypes import upcast_to_float32
from service.model.steps.step import Step
from service.model.xlora_model import XLoraModel
from service.native import library
from service.native.decoder import Decoder
from service.native.step import NativeStep

logger = logging.getLogger(__name__)


def build(
    model: XLoraModel,
    on_ready: Callable[[Step], None],
    on_progress: Callable[[str], None] = lambda _: None,
    *,
    cache: Path,
    wait: bool = False,
) -> None:
    """Calls `on_ready` with a native step of `model`, and `on_progress` with the outcome. `cache` is the folder for
    compiled libraries.

    If the library must be compiled, another thread does it and calls later, unless `wait`. A model with weights in
    bfloat16 always waits, because torch's operators cannot compute with them meanwhile. Where no native step is
    possible, such weights are upcast in place.
    """
    decoder = Decoder.of(model)
    if decoder is None:
        upcast_to_float32(model.causal_lm)
        on_progress("no native kernels, torch computes this decoder: they know those of Llama's kind")
        return
    if not library.is_available(cache):
        upcast_to_float32(model.causal_lm)
        on_progress("no native kernels, steps are slower: g++ was not found (install g++)")
        return
    tensors = (*model.causal_lm.parameters(), *model.causal_lm.buffers())
    has_bfloat16 = any(tensor.dtype == torch.bfloat16 for tensor in tensors)

    def provide() -> None:
        try:
            found = library.provide(cache)
        except (OSError, RuntimeError) as error:
            upcast_to_float32(model.causal_lm)
            logger.warning("no native kernels, steps are slower: %s", error)
            return
        on_ready(NativeStep(model, decoder))
        on_progress(f"native kernels are in use: {found}")

    if library.find_library(cache) is not None:
        provide()
    elif wait or has_bfloat16:
        on_progress("compiling native kernels: half a minute, once per machine")
        provide()
    else:
        threading.Thread(target=provide, name="native kernels", daemon=True).start()
