"""The three trainings: base on street text, experts under an oracle gate, classifier through both passes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_builder.documents import NO_DOMAIN, Batch, batches, house_document, street_document
from demo_builder.mixture import XLora
from service.tools.distill.optimizer import Muon

WORKERS = 2
"""Copies of the model that share a step; torch itself should be left one thread."""
QUESTION_WEIGHT = 0.2
"""Weight of the base's loss on questions: random content, little to learn."""
GATE_SUPERVISION = 0.1
"""Weight of -log(site-mean scaling of the right domain) in the gate's loss."""


@dataclass(frozen=True)
class Plan:
    """Length and pace of one training."""

    steps: int
    rows: int
    length: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup: int = 50
    muon: bool = False


Loss = Callable[[Any, Batch, torch.Generator], Tensor]


class Workers:
    """Two copies of a model on one set of weights, each computing half of the batch in its own thread.

    On two cores this beats splitting every small operation over both, and by far when others want the cores too.
    """

    def __init__(self, model: Any, trainable: Callable[[Any], list[Parameter]], loss_of: Loss, seed: int) -> None:
        self.models = [model] + [copy.deepcopy(model) for _ in range(WORKERS - 1)]
        self.parameters = [trainable(m) for m in self.models]
        for other in self.parameters[1:]:
            for ours, theirs in zip(self.parameters[0], other, strict=True):
                theirs.data = ours.data
        self.generators = [torch.Generator().manual_seed(seed + i) for i in range(WORKERS)]
        self.loss_of = loss_of
        self.pool = ThreadPoolExecutor(WORKERS)

    def _work(self, index: int, batch: Batch) -> float:
        loss = self.loss_of(self.models[index], batch, self.generators[index])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def backward(self, data: Iterator[Batch]) -> float:
        """Leaves the mean gradient in the first model's parameters and returns the mean loss."""
        found = list(self.pool.map(self._work, range(WORKERS), [next(data) for _ in range(WORKERS)]))
        for parameters in zip(*self.parameters, strict=True):
            for other in parameters[1:]:
                assert parameters[0].grad is not None
                assert other.grad is not None
                parameters[0].grad += other.grad
                other.grad = None
            assert parameters[0].grad is not None
            parameters[0].grad /= WORKERS
        return sum(found) / WORKERS


def run(name: str, plan: Plan, workers: Workers, data: Iterator[Batch]) -> None:
    """Linear warm-up, cosine decay to 2 %; prints step, loss and time left."""
    optimizers = _optimizers(workers.parameters[0], plan)
    started, recent = time.monotonic(), 0.0
    for step in range(1, plan.steps + 1):
        loss = workers.backward(data)
        torch.nn.utils.clip_grad_norm_(workers.parameters[0], 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * pace(step - 1, plan)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent = loss if step == 1 else 0.95 * recent + 0.05 * loss
        if step % 50 == 0 or step == plan.steps:
            spent = time.monotonic() - started
            left = spent / step * (plan.steps - step)
            print(f"[{name}] step {step}/{plan.steps}  loss {recent:.4f}  {spent:.0f} s, {left:.0f} s left", flush=True)
    workers.pool.shutdown()


def _optimizers(parameters: list[Parameter], plan: Plan) -> list[torch.optim.Optimizer]:
    """The first matrix of a base is its embedding, which wants AdamW."""
    matrices = [p for p in parameters[1:] if p.ndim == 2] if plan.muon else []
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    adam = torch.optim.AdamW(
        rest, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0 if plan.muon else plan.weight_decay
    )
    return [adam, Muon(matrices, plan.learning_rate, weight_decay=plan.weight_decay)] if matrices else [adam]


def pace(step: int, plan: Plan) -> float:
    """The factor on the learning rate at a step."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    progress = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy per position [B, T], 0 where there is no target."""
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="none").view_as(
        batch.targets
    )


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean loss over answer tokens."""
    return (token_losses(logits, batch) * batch.answers).sum() / batch.answers.sum()


def train_base(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, plan: Plan, seed: int) -> None:
    """Language modelling of street documents."""

    def loss_of(model: LlamaForCausalLM, batch: Batch, _: torch.Generator) -> Tensor:
        logits = model(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).logits
        weights = torch.where(batch.answers, 1.0, QUESTION_WEIGHT) * (batch.targets >= 0)
        return (token_losses(logits, batch) * weights).sum() / weights.sum()

    data = batches(street_document, tokenizer, plan.rows // WORKERS, plan.length, seed)
    run("base", plan, Workers(base, lambda m: list(m.parameters()), loss_of, seed), data)


def oracle_rows(batch: Batch, experts: int, generator: torch.Generator) -> Tensor:
    """Gate weights [B, T, E]: one-hot on the domain of the next token, disturbed as a real gate would be.

    Two documents in five lean a little to the other experts everywhere; and on question tokens, where a classifier may
    not yet know the domain, three in ten documents get arbitrary weights.
    """
    shape = batch.ids.shape
    known = batch.domains != NO_DOMAIN
    onehot = F.one_hot(batch.domains.clamp(min=0), experts).float()
    noise = torch.rand(*shape, experts, generator=generator) ** 3
    noise = noise / noise.sum(-1, keepdim=True)
    dice = torch.rand(*shape[:1], 16, 3, generator=generator)  # per row and document
    pick = dice.gather(1, batch.segments.clamp(0, 15)[..., None].expand(-1, -1, 3))
    lean = torch.where(pick[..., 0] < 0.4, 0.3 * pick[..., 1], 0.0)
    lean = torch.where((pick[..., 2] < 0.3) & ~batch.answers, 1.0, lean)
    lean = torch.where(known, lean, 1.0)[..., None]
    return (1 - lean) * onehot + lean * noise


def freeze_base(model: XLora) -> None:
    """Leaves only the classifier (and what is switched on later) trainable."""
    model.base.requires_grad_(False)


def train_experts(model: XLora, tokenizer: PreTrainedTokenizerFast, plan: Plan, seed: int) -> None:
    """All experts in one run; a token's loss reaches the expert of its domain, as in separate runs."""
    freeze_base(model)
    for p in model.expert_parameters():
        p.requires_grad_(True)

    def loss_of(m: XLora, batch: Batch, generator: torch.Generator) -> Tensor:
        rows = m.fixed_rows(oracle_rows(batch, m.shape.experts, generator))
        return answer_loss(m.logits(batch.ids, rows, attention_mask=batch.mask, position_ids=batch.positions), batch)

    data = batches(house_document, tokenizer, plan.rows // WORKERS, plan.length, seed)
    run("experts", plan, Workers(model, XLora.expert_parameters, loss_of, seed), data)


def supervision(scalings: Tensor, batch: Batch) -> Tensor:
    """-log of the site-mean scaling on the right domain; answers count fully, questions a little."""
    mean = scalings.mean(2)  # [B, T, E]
    right = mean.gather(-1, batch.domains.clamp(min=0)[..., None])[..., 0]
    weights = torch.where(batch.answers, 1.0, 0.3) * (batch.domains != NO_DOMAIN)
    return -(right.clamp(min=1e-6).log() * weights).sum() / weights.sum()


def train_gate(model: XLora, tokenizer: PreTrainedTokenizerFast, plan: Plan, seed: int) -> None:
    """Language-model loss through both passes, exactly as served, plus a little supervision on the domain."""
    freeze_base(model)

    def loss_of(m: XLora, batch: Batch, _: torch.Generator) -> Tensor:
        passes = {"attention_mask": batch.mask, "position_ids": batch.positions}
        rows = m.scalings(batch.ids, **passes)
        logits = m.logits(batch.ids, rows, **passes)
        return answer_loss(logits, batch) + GATE_SUPERVISION * supervision(rows, batch)

    data = batches(house_document, tokenizer, plan.rows // WORKERS, plan.length, seed)
    run("gate", plan, Workers(model, lambda m: list(m.classifier.parameters()), loss_of, seed), data)
