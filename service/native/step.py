"""NativeStep: the Step of a decoder with Llama's architecture in C++, on a CPU.

It computes with the model's own tensors and its gate, so that adapted embeddings, which still run in torch, read the
same scalings. It keeps references to the tensors, so they must not be replaced afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from service.model import gate_rows
from service.model.adapted import AdaptedModule
from service.model.batch import Batch, DraftStart
from service.model.draft_layer import EPS, Choose, PureChoice, draft_tokens
from service.model.dtypes import bfloat16_if_lossless
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput
from service.model.xlora_model import XLoraModel
from service.native import operators
from service.native.decoder import Decoder


class NativeStep:
    """The step of one model."""

    def __init__(self, model: XLoraModel, decoder: Decoder) -> None:
        self._model, self._decoder, self._gate = model, decoder, model.gate
        self._tensors = [tensor for layer in decoder.layers for tensor in layer.tensors()]
        linears = [linear for layer in decoder.layers for linear in layer.linears]
        self._gate_offsets = [
            self._gate.offset(linear.site) if isinstance(linear, AdaptedModule) else 0 for linear in linears
        ]
        self._cos, self._sin = torch.empty(0), torch.empty(0)  # [positions, head_dim], extended when needed
        self._draft_tensors: list[Tensor] = []
        if model.draft_chain is not None:
            own = model.draft_chain.layer
            ones = torch.ones(own.mix.shape[0])
            matrices = [bfloat16_if_lossless(tensor) for tensor in (own.mix, own.query, own.output, own.up, own.down)]
            self._draft_tensors = [matrices[0], ones, *matrices[1:4], own.bias, matrices[4]]

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """Step.forward, with the results of XLoraModel.forward up to rounding."""
        gate, decoder = self._gate, self._decoder
        gate_rows.write_given(batch, kv_cache.gate_rows)
        first_row = self._model.first_gated_row(batch)
        weights = self._open_gate(batch, kv_cache, first_row)
        gate.logit_rows = batch.logit_rows
        cos, sin = self._rotation(batch.positions, max(group.keys for group in batch.groups))
        x = operators.layers(
            decoder.embed(batch.input_ids[None])[0],
            self._tensors,
            weights,
            self._gate_offsets,
            first_row,
            cos,
            sin,
            kv_cache.keys,
            kv_cache.values,
            batch.kv_slots,
            batch.positions,
            tables=[group.block_table for group in batch.groups],
            rows_each=[group.queries for group in batch.groups],
            eps=decoder.layers[0].input_norm.eps,
            scaling=decoder.scaling,
            windows=decoder.windows,
        )
        hidden = operators.norm(x, decoder.norm.weight, decoder.norm.eps)
        return ForwardOutput(self._logits(hidden, batch), *self._write_scalings(hidden, batch, kv_cache), hidden)

    def _open_gate(self, batch: Batch, kv_cache: KVCache, first_row: int) -> Tensor | None:
        """Sets the gate of the rows from `first_row` on. Returns its weights per rank; None without such rows."""
        gate = self._gate
        if first_row == batch.gate_slots.shape[0]:
            gate.clear()
            return None
        if batch.parameters is not None:
            return gate.set(gate_rows.read(batch, kv_cache.gate_rows, first_row), first_row)
        weights = operators.spread(
            kv_cache.gate_rows, batch.gate_slots, gate.rank_index, first_row, gate.global_scaling_weight
        )
        return gate.open(weights, first_row)

    def _logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[L, V] of the batch's logit rows."""
        rows, head, draft_head = batch.logit_rows, self._decoder.head, self._model.draft_head
        if draft_head is None:
            seen = hidden.index_select(0, rows)
        else:
            seen = operators.drafting(hidden, rows, batch.num_scaling_rows, draft_head.tensors)
        if isinstance(head, AdaptedModule) and self._gate.active:
            return operators.linear(seen, head.weight, head.bias, head.lora_a, head.lora_b_t, head.weights_of_rows())
        return operators.linear(seen, head.weight, head.bias)

    def _write_scalings(self, hidden: Tensor, batch: Batch, kv_cache: KVCache) -> tuple[Tensor, Tensor]:
        """gate_rows.write_scalings, in C++ where no row has gate parameters and the checkpoint's gate has no top-k."""
        classifier, rows = self._model.classifier, batch.num_scaling_rows
        if not rows or batch.parameters is not None or not classifier.is_plain:
            return gate_rows.write_scalings(classifier, hidden, batch, kv_cache.gate_rows)
        return operators.scalings(
            *(hidden, classifier.tensors, classifier.config.enable_relu_and_dropout, classifier.softmax_temperature),
            *(kv_cache.gate_rows, batch.new_gate_slots, rows),
        )

    @torch.inference_mode()
    def draft(self, start: DraftStart, choose: Choose, kv_cache: KVCache) -> Tensor:
        """Step.draft, with the results of XLoraModel.draft up to rounding."""
        chain, group, head = self._model.draft_chain, start.group, self._decoder.head
        assert chain is not None, "a model without a draft layer was asked for its drafts"
        self._gate.clear()
        positions = group.positions[:, 0].contiguous()
        keys, values = kv_cache.keys[-1], kv_cache.values[-1]
        if isinstance(choose, PureChoice) and chain.embedding.dtype == torch.float32:
            # One call, where each draft would take half a dozen.
            self._extend_rotations(group.keys + start.depth)
            mix, *others = self._draft_tensors
            temperature, noise_keys = choose.inputs or (None, None)
            return operators.drafts(
                *(start.state, start.tokens, chain.embedding, [mix, mix, *others], chain.layer.depths),
                *(self._cos, self._sin, keys, values, positions, group.block_table, head.weight),
                head_bias=head.bias,
                temperature=temperature,
                noise_keys=None if noise_keys is None else noise_keys.contiguous(),
                eps=EPS,
                depth=start.depth,
            )

        def next_state(state: Tensor, tokens: Tensor, depth: int) -> Tensor:
            mix, *others = self._draft_tensors
            tensors = [mix, chain.layer.depths[depth - 1], *others]
            rotation = self._rotation(positions + depth, group.keys + start.depth)
            return operators.draft_state(
                *(state, chain.embedded(tokens), tensors, rotation),
                *(keys, values, positions, group.block_table),
                eps=EPS,
            )

        def logits(state: Tensor) -> Tensor:
            return operators.linear(state, head.weight, head.bias)

        return draft_tokens(start, choose, next_state, logits)

    def _rotation(self, positions: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """cos and sin [n, head_dim] of positions below `keys`."""
        self._extend_rotations(keys)
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _extend_rotations(self, keys: int) -> None:
        """Computes cos and sin of positions below `keys`, where they are missing."""
        if keys > len(self._cos):
            known = torch.arange(1 << (keys - 1).bit_length())
            cos, sin = self._decoder.rotary(torch.empty(0), known[None])
            self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
