"""The texts to learn from: prompts, and what the engine makes of them, greedily and sampled in turn."""

from __future__ import annotations

from collections.abc import Sequence

from service.checkpoint import Checkpoint
from service.contract.checks import checked_request
from service.contract.errors import InvalidRequestError, StartupError
from service.contract.options import EngineOptions
from service.contract.request import Request, SamplingParams
from service.engine.engine import Engine
from service.engine.loader import build_engine, load_model_of
from service.tools.distill.plan import OnProgress
from service.tools.distill.work_folder import Text, WorkFolder


def write_texts(
    checkpoint: Checkpoint,
    options: EngineOptions,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    work: WorkFolder,
    on_progress: OnProgress,
) -> None:
    """Writes every text that the work folder does not have yet. Raises StartupError where one cannot be written."""
    written = work.texts().keys()
    missing = [number for number in range(len(prompts)) if number not in written]
    if not missing:
        return
    model = load_model_of(checkpoint, options, lambda line: on_progress(line, 0, 0))
    engine = build_engine(model, checkpoint, options, wait_for_native=True)  # in the middle of a text it would vary
    _check_lengths(engine, prompts, max_tokens)
    for number in missing:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=float(number % 2), seed=number)
        try:
            engine.add(checked_request(Request(str(number), list(prompts[number]), sampling), engine.info))
        except InvalidRequestError as error:
            raise StartupError(f"prompt {number + 1}: {error.message}", hint=error.hint) from error
    _run(engine, prompts, missing, work, on_progress)


def _check_lengths(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    longest = engine.info.max_model_len - max_tokens
    if longest < 1:
        raise StartupError(
            f"--max-tokens {max_tokens} leaves no room for a prompt in a context of {engine.info.max_model_len} tokens",
            hint="lower it",
        )
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > longest:
            raise StartupError(
                f"prompt {number} has {len(prompt)} tokens; with {max_tokens} more to be written it may have {longest}",
                hint="shorten it, or lower --max-tokens",
            )


def _run(
    engine: Engine, prompts: Sequence[Sequence[int]], missing: list[int], work: WorkFolder, on_progress: OnProgress
) -> None:
    """Runs the engine until every text is kept."""
    texts = {str(number): list(prompts[number]) for number in missing}
    done = len(prompts) - len(missing)
    on_progress("writing texts", done, len(prompts))
    while engine.has_work():
        for output in engine.step().outputs:
            if output.error is not None:
                raise StartupError(f"prompt {int(output.request_id) + 1}: {output.error}")
            texts[output.request_id] += [token.id for token in output.tokens]
            if output.finish_reason is not None:
                number = int(output.request_id)
                work.add_text(number, Text(texts.pop(output.request_id), len(prompts[number])))
                done += 1
                on_progress("writing texts", done, len(prompts))
