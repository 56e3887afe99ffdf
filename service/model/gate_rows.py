"""Writes and reads stored gate rows, for all implementations of Step.

    given rows         ->  gate_rows    before any row runs (fixed gates, an operator's dummy rows)
    gate_rows          ->  scalings of the rows that run, times each row's weight factor
    hidden, classifier ->  gate_rows    with each scaling row's gate parameters

Every Step calls these inside its forward, on every rank, eager or captured. NativeStep has a twin in C++ for batches
whose rows all have the checkpoint's gate. The checkpoint's global weight is applied later (Gate.set).
"""

from __future__ import annotations

from torch import Tensor

from service.model.batch import Batch
from service.model.classifier import Classifier


def write_given(batch: Batch, gate_rows: Tensor) -> None:
    """Stores the batch's given gate rows in gate_rows [slots, S, E]."""
    if batch.given is not None:
        gate_rows.index_copy_(0, batch.given.slots, batch.given.rows)


def read(batch: Batch, gate_rows: Tensor, first_row: int) -> Tensor:
    """The scalings [T - first_row, S, E] of the batch's rows from `first_row` on."""
    stored = gate_rows.index_select(0, batch.gate_slots[first_row:])
    if batch.parameters is not None:
        stored *= batch.parameters.weight[first_row:, None, None]
    return stored


def write_scalings(classifier: Classifier, hidden: Tensor, batch: Batch, gate_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Computes and stores the scalings of the scaling rows of hidden [T, H]. Returns the classifier's logits, which
    steering does not change, and the scalings, both [scaling rows, S, E].
    """
    rows = batch.num_scaling_rows
    gate_logits = classifier.logits(hidden[:rows])
    scalings = classifier.scalings(gate_logits, batch.parameters)
    if rows:
        gate_rows.index_copy_(0, batch.new_gate_slots[:rows], scalings)
    return gate_logits, scalings
