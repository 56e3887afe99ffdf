"""How far a reader has to go: our own functions that one decode step of one sequence, and one load of the demo, call.

python -m benchmarks.ways
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.common import DEMO, ROOT, emit, make_engine, print_row, prompt_tokens
from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.engine.loader import load_engine

_SERVICE = str(ROOT / "service") + "/"
_RUNNER = ("engine/model_runner", "engine/batch_builder", "engine/gate", "engine/slots", "engine/sampler")


def calls_of(work: Callable[[], Any]) -> list[str]:
    """FILE:FUNCTION of every call of a function of service/, comprehensions apart."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if event == "call" and file.startswith(_SERVICE) and not name.startswith("<"):
            calls.append(f"{file.removeprefix(_SERVICE)}:{name}")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def row_of(what: str, calls: list[str]) -> dict[str, Any]:
    """Calls, different functions, and files."""
    files = {call.partition(":")[0] for call in calls}
    return {"what": what, "calls": len(calls), "functions": len(set(calls)), "files": len(files)}


def main() -> None:
    engine = make_engine(DEMO, max_num_seqs=8)
    engine.add(Request("a", prompt_tokens(DEMO, 40), SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)))
    for _ in range(8):
        engine.step()
    step = calls_of(engine.step)
    loading = calls_of(lambda: load_engine(EngineOptions(str(Path(DEMO)))))
    rows = [
        row_of("decode step", step),
        row_of("of it: runner, builder, gate, sampler", [call for call in step if call.startswith(_RUNNER)]),
        row_of("loading", loading),
        row_of("of it: engine and model", [call for call in loading if call.startswith(("engine/", "model/"))]),
    ]
    for row in rows:
        print_row(row)
    emit({"benchmark": "ways", "rows": rows})


if __name__ == "__main__":
    main()
