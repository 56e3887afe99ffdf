"""What `xlora-serve check` says of a bundle, and what becomes of it when it is served: the two must agree."""

from __future__ import annotations

import math
from pathlib import Path

from prometheus_client import CollectorRegistry

from service.api.generation.tokenizer import ModelTokenizer
from service.checkpoint.report import examine
from service.contract import wire
from service.contract.errors import StartupError
from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.engine.loader import load_engine
from service.model.loading.skeleton import inspect_base, traversal_sites
from service.observability.metrics import Metrics


def check(bundle: Path) -> list[str]:
    """The lines that `check` prints, none for a sound bundle. Anything but a CheckpointError is a failure."""
    checkpoint, problems = examine(bundle, inspect_base=inspect_base)
    if checkpoint is None:
        return [str(problem) for problem in problems]
    try:
        traversal_sites(checkpoint)
    except StartupError as error:
        return [str(error)]
    return []


def serve(bundle: Path) -> str | None:
    """Why `serve` would end, None when it serves: the engine loads, the API's side opens its files, a token comes."""
    try:
        engine = load_engine(EngineOptions(str(bundle), native_kernels=False, max_num_seqs=2))
        wire.FrameEncoder().encode(wire.Ready(engine.info))
        Metrics(CollectorRegistry()).describe_engine(engine.info)
        ModelTokenizer(engine.info)
    except StartupError as error:
        return str(error)
    engine.add(Request("warmup", [0], SamplingParams(max_tokens=1, ignore_eos=True, logprobs=0)))
    while engine.has_work():
        for output in engine.step().outputs:
            if output.error:
                return output.error
            if not all(math.isfinite(token.logprob) for token in output.tokens):
                return "logits that are not finite"
    return None
