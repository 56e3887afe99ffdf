"""mistral.rs behind a pipe, for vs_mistralrs.py: runs where mistralrs is installed, and imports nothing of ours.

First line in: the model's folders and the mode. Every further line: a prompt and how many tokens; one line comes back.
"""

from __future__ import annotations

import json
import sys
import time

from mistralrs import Architecture, CompletionRequest, ModelDType, Runner, Which


def main() -> None:
    job = json.loads(sys.stdin.readline())
    which = Which.XLora(
        xlora_model_id=job["experts"],
        order=job["ordering"],
        arch=Architecture.Mistral,
        model_id=job["base"],
        dtype=ModelDType.F32,
        tgt_non_granular_index=1 if job["mode"] == "frozen" else None,
    )
    runner = Runner(which=which, token_source="none", prefix_cache_n=0, no_kv_cache=job["mode"] == "recompute")
    for line in sys.stdin:
        asked = json.loads(line)
        request = CompletionRequest(
            model="default", prompt=asked["prompt"], max_tokens=asked["tokens"], temperature=0.0, top_k=1
        )
        started = time.perf_counter()
        answer = runner.send_completion_request(request)
        seconds = time.perf_counter() - started
        result = {
            "seconds": seconds,
            "text": answer.choices[0].text,
            "prompt_tokens": answer.usage.prompt_tokens,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
