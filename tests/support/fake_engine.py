"""An engine without a model: the surface of service.engine.engine.Engine, deterministic tokens and gate rows.

Choice i of any request says REPLY from its i-th token on, over and over. The gate row of a position depends on the
position alone, so tests can recompute it with `gate_row`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from service.contract.engine_info import EngineInfo
from service.contract.errors import CheckpointError
from service.contract.options import EngineOptions
from service.contract.output import (
    DraftCounts,
    FinishReason,
    GateRows,
    GateStats,
    LoggedRows,
    SequenceOutput,
    SequenceUsage,
    StepOutput,
    StepStats,
    TokenOutput,
)
from service.contract.request import Request
from service.contract.steering import GateSettings

REPLY = "The answer is 42, naïve 🙂. END of it.\n"
EXPERTS = ["math", "code", "tales"]
SITES = ["layers.0.q_proj", "layers.1.q_proj"]
MAX_MODEL_LEN = 96
CHUNK = 8  # prompt positions per step
POISON = 2  # a prompt with this token id makes step() raise
UNTAKEN = 3  # add() raises for a prompt with this token id
FAULTY = 4  # a request with this token id in its prompt ends with finish_reason "error", alone; its text is "%"
HANGING = 5  # a prompt with this token id makes step() never return
Progress = Callable[[str], None]
CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


def build_tokenizer() -> Tokenizer:
    """Every byte a token, two merges, and <|end|>, which has no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("T", "h")]
    tokens = [*alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def write_bundle(directory: Path) -> Path:
    """What load_engine needs: a tokenizer.json; a chat template; and what makes a folder a checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bundle.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    build_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def gate_row(position: int) -> np.ndarray:
    """[S, E]; every 11th position has an all-zero row."""
    if position % 11 == 10:
        return np.zeros((len(SITES), len(EXPERTS)), np.float32)
    raw = np.array([[1 + (position * (site + 1) + expert) % 5 for expert in range(3)] for site in range(2)], np.float32)
    return raw / raw.sum(axis=1, keepdims=True)


def entropy_of(row: np.ndarray) -> float:
    if not row.any():
        return math.nan
    return float(-(row * np.log(row)).sum(axis=1).mean())


@dataclass
class _Choice:
    request: Request
    index: int
    computed: int = 0
    output: list[int] = field(default_factory=list)
    usage: SequenceUsage = field(default_factory=SequenceUsage)


class FakeEngine:
    """See the module's docstring. `step_seconds` slows it down, so that tests can leave in the middle; a choice gets up
    to `burst` tokens in a step, as it does where drafts come true: of lookahead, while prompt lookup's fail.
    """

    def __init__(self, info: EngineInfo, step_seconds: float = 0.0) -> None:
        self.info = info
        self.step_seconds = step_seconds
        self.aborted: list[tuple[str, int | None]] = []
        self.choices: list[_Choice] = []
        self.steps = 0
        self.burst = 1
        self.requests: list[Request] = []  # every one that was added
        self.gates: list[GateSettings] = []  # every one that was set
        self.logs_scalings = False
        self._reply: list[int] = Tokenizer.from_file(info.tokenizer_path).encode(REPLY).ids

    def add(self, request: Request) -> None:
        if UNTAKEN in request.prompt_token_ids:
            raise KeyError("no place")
        self.requests.append(request)
        n = 1 if request.sampling is None else request.sampling.n
        self.choices += [_Choice(request, index) for index in range(n)]

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append((request_id, index))
        self.choices = [c for c in self.choices if c.request.id != request_id or index not in (None, c.index)]

    def set_gate(self, settings: GateSettings) -> None:
        self.gates.append(settings)

    def log_scalings(self, enabled: bool) -> None:
        self.logs_scalings = enabled

    def has_work(self) -> bool:
        return bool(self.choices)

    def wait(self) -> None:
        """It has no device."""

    def step(self) -> StepOutput:
        self.steps += 1
        time.sleep(self.step_seconds)
        outputs = []
        for choice in list(self.choices):
            if POISON in choice.request.prompt_token_ids:
                raise RuntimeError("poisoned")
            if HANGING in choice.request.prompt_token_ids:
                time.sleep(3600)
            output = self._advance(choice)
            outputs.append(output)
            if output.finish_reason is not None:
                output.usage = choice.usage
                self.choices.remove(choice)
        return StepOutput(outputs, self._stats(outputs))

    def report(self) -> StepOutput:
        return StepOutput(stats=StepStats(requests_running=len(self.choices), kv_blocks_total=4))

    def _advance(self, choice: _Choice) -> SequenceOutput:
        request, prompt = choice.request, len(choice.request.prompt_token_ids)
        first = choice.computed
        choice.computed = min(first + CHUNK, prompt) if first < prompt else first + 1
        choice.usage.forward_passes += 1
        choice.usage.scaling_rows += choice.computed - first
        choice.usage.real_rows += choice.computed - first
        output = SequenceOutput(request.id, choice.index, usage=choice.usage)
        if FAULTY in request.prompt_token_ids:
            output.finish_reason, output.error = "error", "its sampling failed"
            if request.sampling is not None and request.sampling.form is not None:
                output.error_param = "response_format"  # as of a grammar
        elif choice.computed == prompt and (request.sampling is None or request.score_from is not None):
            output.finish_reason = "length"
        elif choice.computed >= prompt:
            self._speak(choice, output)
        output.gate = self._rows(request, first, choice.computed)
        for row in map(gate_row, range(max(first, prompt - 1), choice.computed if request.sampling else 0)):
            if row.any():
                choice.usage.gate_positions += 1
                choice.usage.gate_entropy_sum += entropy_of(row)
                before = choice.usage.gate_share_sum or [0.0] * len(EXPERTS)
                choice.usage.gate_share_sum = (np.array(before) + row.mean(axis=0)).tolist()
        if request.sampling is not None and request.sampling.prompt_logprobs is not None and choice.index == 0:
            read = request.prompt_token_ids[max(first + 1, request.score_from or 0) : choice.computed + 1]
            output.prompt_logprobs = [self._token(token, request.sampling.prompt_logprobs) for token in read]
        return output

    def _speak(self, choice: _Choice, output: SequenceOutput) -> None:
        assert choice.request.sampling is not None
        while len(output.tokens) < self.burst and output.finish_reason is None:
            token = self._reply[(len(choice.output) + choice.index) % len(self._reply)]
            choice.computed += bool(output.tokens)
            choice.output.append(token)
            output.tokens.append(self._token(token, choice.request.sampling.logprobs))
            output.finish_reason = self._finish(choice, token)
        for depth in range(1, len(output.tokens)):
            choice.usage.drafts.count(depth, is_lookup=False, kept=True)
        if self.burst > 1:
            choice.usage.drafts.count(len(output.tokens), is_lookup=True, kept=False)

    def _token(self, token: int, logprobs: int | None) -> TokenOutput:
        if logprobs is None:
            return TokenOutput(token)
        return TokenOutput(token, -0.5, [(token + offset, -0.5 - offset) for offset in range(logprobs)])

    def _finish(self, choice: _Choice, token: int) -> FinishReason | None:
        sampling = choice.request.sampling
        assert sampling is not None
        if token in sampling.stop_token_ids:
            return "stop"
        return "length" if len(choice.output) >= sampling.max_tokens else None

    def _rows(self, request: Request, first: int, end: int) -> GateRows | None:
        start = request.scalings_start
        first = max(first, len(request.prompt_token_ids) - 1 if start is None else start)
        if request.return_scalings == "none" or first >= end:
            return None
        full = np.stack([gate_row(position) for position in range(first, end)])
        entropy = np.array([entropy_of(row) for row in full], np.float32)
        wants_full = request.return_scalings == "full"
        mean = full.mean(axis=1).astype(np.float32)
        return GateRows(first, end - first, mean.tobytes(), entropy.tobytes(), full.tobytes() if wants_full else None)

    def hash_weights(self, on_known: Progress) -> None:
        assert self.info.weights_sha256 is None
        threading.Timer(0.05, on_known, ["2" * 64]).start()

    def _stats(self, outputs: list[SequenceOutput]) -> StepStats:
        entropy = np.array([0.4, math.nan], np.float32).tobytes()
        gate = GateStats(generated_entropy=entropy, weight=[0.5, 0.3, 0.2], top1=[1, 0, 0])
        return StepStats(
            step_seconds=0.001,
            scaling_rows=3,
            real_rows=2,
            drafts=DraftCounts([1]),
            requests_running=len(self.choices),
            kv_blocks_used=len(self.choices),
            kv_blocks_total=4,
            gate=gate,
            logged=self._take_log(),
        )

    def _take_log(self) -> list[LoggedRows]:
        """One row per step of every choice there is."""
        if not self.logs_scalings:
            return []
        return [
            LoggedRows(one.request.id, one.index, one.computed - 1, 1, gate_row(one.computed - 1).tobytes())
            for one in self.choices
        ]


def fake_info(directory: Path) -> EngineInfo:
    path = directory / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{path} is missing", hint="write_bundle() makes it")
    return EngineInfo(
        model="fake",
        architecture="FakeForCausalLM",
        dtype="float32",
        device="cpu",
        experts=[{"name": name, "description": f"{name} expert"} for name in EXPERTS],
        sites=SITES,
        xlora_config={
            "xlora_depth": 1,
            "enable_softmax": True,
            "layerwise_scalings": True,
            "scaling_pass_value": 0.0,
            "top_k_lora": None,
            "global_scaling_weight": 1.0,
        },
        dummy_row=gate_row(0).tolist(),
        vocab_size=259,
        eos_token_ids=[258],
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        block_size=16,
        kv_blocks_total=12,
        kv_bytes=4096,
        weights_sha256="0" * 64,
        fingerprint="1" * 64,
        versions={"service": "test"},
        tokenizer_path=str(path),
    )


def load_engine(options: EngineOptions, on_progress: Progress, on_lost: Progress) -> FakeEngine:
    """The loader that tests name instead of service.engine.loader:load_engine."""
    on_progress("reading the fake bundle")
    return FakeEngine(fake_info(Path(options.model)))


def load_unidentified_engine(options: EngineOptions, on_progress: Progress, on_lost: Progress) -> FakeEngine:
    """The same over files whose hashes nobody has stated."""
    return FakeEngine(replace(fake_info(Path(options.model)), weights_sha256=None))


def load_slow_engine(options: EngineOptions, on_progress: Progress, on_lost: Progress) -> FakeEngine:
    """The same at 5 ms a step, for answers that nobody sees the end of."""
    info = replace(fake_info(Path(options.model)), max_model_len=1 << 20, kv_blocks_total=1 << 17)
    return FakeEngine(info, step_seconds=0.005)


def load_paced_engine(options: EngineOptions, on_progress: Progress, on_lost: Progress) -> FakeEngine:
    """The same at ten tokens a second, for streams of minutes that cost next to nothing."""
    info = replace(fake_info(Path(options.model)), max_model_len=1 << 20, kv_blocks_total=1 << 17)
    return FakeEngine(info, step_seconds=0.1)


def load_killed_engine(options: EngineOptions, on_progress: Progress, on_lost: Progress) -> FakeEngine:
    """A machine that is too small: the kernel ends the process while it loads."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still here")
