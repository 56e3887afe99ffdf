"""One stream over HTTP on the demo's held-out questions, to their end: the server, one that drafts a token at a time,
and the base of the same server; with --against, also a server of another checkout.

    python -m benchmarks.http_drafts [--questions 4] [--repeats 3] [--against CHECKOUT]

Every question is put to each side in turn, greedily, and the tokens of all answers are divided by the seconds that
they took. The base is `NAME/base`: a fixed gate of zeros, whose rows visit the experts in vain. vs_base.py has
the plain base.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import DEMO, ROOT, Bar, emit, print_row
from benchmarks.http_client import post, run
from benchmarks.questions import held_out_questions
from tests.support.server_process import Server, server


def ask(running: Server, body: dict[str, Any]) -> tuple[int, float]:
    """Puts a question. Returns the tokens of the answer and the seconds that it took."""
    started = time.perf_counter()
    answer = run(post(running.port, "/generate", json.dumps(body).encode()))
    seconds = time.perf_counter() - started
    assert answer.status == 200, answer.data[:500]
    content = answer.data.partition(b"\r\n\r\n")[2]
    return json.loads(content)["usage"]["completion_tokens"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--questions", type=int, default=4, help="of each domain")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, such as a git worktree of an older commit")
    args = parser.parse_args()
    questions = held_out_questions(args.model, args.questions)
    flags = ["--dtype", "float32", "--no-prefix-cache"]
    with ExitStack() as stack:
        ours = stack.enter_context(server("--model", str(args.model.resolve()), *flags))
        shallow = stack.enter_context(server("--model", str(args.model.resolve()), *flags, "--draft-depth", "1"))
        sides: dict[str, tuple[Server, dict[str, Any]]] = {
            "drafts": (ours, {}), "lookahead": (shallow, {}), "base": (ours, {"experts": {"only": []}}),
        }  # fmt: skip
        if args.against is not None:
            model = args.against.resolve() / "model_store" / "demo"
            theirs = stack.enter_context(server("--model", str(model), *flags, root=args.against.resolve()))
            sides["against"] = (theirs, {})
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.repeats + 1):
            done = dict.fromkeys(sides, (0, 0.0))
            for prompt in questions:
                length = 0
                for name, (running, fields) in sides.items():
                    body = {"prompt": prompt, "max_tokens": 160, "temperature": 0, **fields}
                    if name == "base":  # as long as X-LoRA's answer
                        body |= {"max_tokens": length, "ignore_eos": True}
                    tokens, seconds = ask(running, body)
                    length = length or tokens
                    done[name] = done[name][0] + tokens, done[name][1] + seconds
            if number:  # the first round warms up
                for name, (tokens, seconds) in done.items():
                    rates[name].append(tokens / seconds)
    row = {f"{name}_tokens_per_second": median(found) for name, found in rates.items()}
    for name in sides:
        if name != "drafts":
            ratios = [ours / theirs for ours, theirs in zip(rates["drafts"], rates[name], strict=True)]
            row[f"over_{name}"] = median(ratios)
    print_row(row)
    bars = [Bar("one stream over HTTP, over lookahead alone", ">=", 1.2, row["over_lookahead"])]
    bars.append(Bar("one stream over HTTP, over the base", ">=", 0.9, row["over_base"]))
    if args.against is not None:
        bars.append(Bar("one stream over HTTP, over the other checkout", ">=", 1.2, row["over_against"]))
    emit({"benchmark": "http_drafts", "root": str(ROOT.name), "rows": [row]}, bars)


if __name__ == "__main__":
    main()
