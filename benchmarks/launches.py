"""What a decoding step asks a GPU besides the decoder: launches, copies, waits, on a fake device that counts them.

    python -m benchmarks.launches

No GPU is needed and no time is measured: counts are the same everywhere. A line is the step with fewest launches among
those that only decode: gate rows that nobody asked for are read every so often, which costs some 20 launches more.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from service.contract.checks import checked_request
from service.model.attention import paged
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_cuda_device import Counts
from tests.support.fake_cuda_engine import KINDS, FakeCudaEngines, Kind, attention
from tests.support.tiny import Tiny

_KINDS = ("greedy", "sampled", "filtered", "penalties", "logit bias", "grammar", "logprobs", "steered",
          "mean scalings", "full scalings", "scalings log", "everything")  # fmt: skip
_PROMPT, _TOKENS, _PREFILL = 5, 5, 2


def of_rows(kind: Kind, rows: int) -> Kind:
    """The kind with short prompts, so many requests, and seats for all of them."""
    assert kind.sampling is not None
    options = {**kind.options, "max_num_seqs": rows, "max_num_batched_tokens": 4096, "speculative_tokens": 0}
    sampling = replace(kind.sampling, max_tokens=_TOKENS, prompt_logprobs=None)
    return replace(kind, sampling=sampling, prompt=_PROMPT, copies=rows, options=options, blocks=rows * 20 + 100)


def decoding_step(engines: FakeCudaEngines, cuda: FakeCuda, kind: Kind) -> Counts:
    """The counts of one step: from the host's point of view, from one call of Engine.step to the next."""
    engine = engines.build(kind, cuda_graphs=False)
    engine.runner.step = engines.decoder(engine.runner.step)
    for request in kind.requests():
        engine.add(checked_request(request, engine.info))
    steps: list[Counts] = []
    while engine.has_work():
        with cuda.counted() as counts:
            output = engine.step()
        assert not [one.error for one in output.outputs if one.error], output.outputs
        steps.append(counts)
    return min(steps[_PREFILL:-1], key=lambda one: one.launches.total())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 128], help="requests that decode together")
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=_KINDS)
    args = parser.parse_args()
    cuda = FakeCuda()
    with tempfile.TemporaryDirectory() as folder:
        xlora = {"xlora_depth": 2, "layerwise_scalings": True}
        engines = FakeCudaEngines(Tiny(Path(folder) / "tiny", xlora=xlora, strength=0.3, draft_head=8), cuda)
        print("| requests | " + " | ".join(f"launches, copies in, copies out, waits at {n}" for n in args.rows) + " |")
        print("|---" * (len(args.rows) + 1) + "|")
        with cuda:
            engines.move()
            with attention(paged.sdpa):
                for name in args.kinds:
                    found = [decoding_step(engines, cuda, of_rows(KINDS[name], rows)) for rows in args.rows]
                    cells = [
                        f"{c.launches.total()}, {c.copies_in.total()}, {c.copies_out.total()}, {c.waits.total()}"
                        for c in found
                    ]
                    print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
