"""XLoraModel: a Hugging Face decoder with adapted modules, plus the gate and the classifier.

One forward runs any mixture of scaling rows and real rows of any requests:

    scaling rows   gate = dummy row          -> last hidden state -> classifier -> scalings, stored for their real rows
    real rows      gate = stored scalings    -> logits

Knows rows and slots, and neither requests nor scheduling; the KV cache is an argument.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from service.checkpoint import Checkpoint
from service.model import gate_rows
from service.model.adapted import AdaptedModule
from service.model.attention.paged import backend_for
from service.model.batch import Batch, DraftStart
from service.model.classifier import Classifier
from service.model.draft_head import DraftHead
from service.model.draft_layer import Choose, DraftChain, draft_tokens
from service.model.experts import stack_experts
from service.model.gate import Gate
from service.model.kv_cache import KVCache, KVLayout
from service.model.loading.family import kv_shape
from service.model.loading.parallel import Shards
from service.model.steps.step import ForwardOutput
from service.model.targets import resolve_sites


class HiddenStateTap(nn.Module):
    """Wraps the causal LM's decoder, to keep the last hidden state before the head, and to run the head alone."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.last_hidden_state: Tensor | None = None  # [1, T, H], after the final norm

    def forward(
        self,
        *args: Any,
        batch: Batch | None = None,
        draft_head: DraftHead | None = None,
        given: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The decoder's output, with scaling rows corrected by the draft head, if there is one. With `given`, a hidden
        state [1, T, H], the decoder does not run, and the head gets that state.
        """
        if given is not None:
            return _Given(last_hidden_state=given)
        outputs = self.decoder(*args, batch=batch, **kwargs)
        self.last_hidden_state = outputs.last_hidden_state
        if draft_head is not None and batch is not None:
            outputs.last_hidden_state = draft_head(outputs.last_hidden_state, batch.is_scaling)
        return outputs


class _Given(BaseModelOutputWithPast):
    """A decoder output with a hidden state only; fields of single families read as None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class XLoraModel:
    """A base model, its experts and its gate on one device. `sites` are in the order of the classifier's rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        causal_lm: PreTrainedModel,
        *,
        device: torch.device,
        dtype: torch.dtype,
        shards: Shards | None = None,
        bfloat16_candidates: Collection[str] = (),
    ) -> None:
        """`bfloat16_candidates`: linears whose experts are stored in bfloat16 under float32 where that is lossless."""
        self.device, self.dtype = device, dtype
        self.config: PretrainedConfig = causal_lm.config
        self.xlora_config = checkpoint.xlora
        self.expert_names = [expert.name for expert in checkpoint.experts]
        shards = Shards(causal_lm) if shards is None else shards
        self.sites = resolve_sites(checkpoint, shards.skeleton)
        experts, sites = len(self.expert_names), len(self.sites)
        self.classifier = Classifier(checkpoint.classifier, checkpoint.xlora, experts, sites, device)
        self.draft_head: DraftHead | None = None
        if checkpoint.draft_head is not None:
            self.draft_head = DraftHead(checkpoint.draft_head, device=device, dtype=dtype)
        self.draft_chain: DraftChain | None = None
        if checkpoint.draft_layer is not None and shards.skeleton is causal_lm:  # a divided model has none
            self.draft_chain = DraftChain.of(checkpoint.draft_layer, causal_lm, device=device, dtype=dtype)
        self.gate = self._adapt(checkpoint, causal_lm, shards, bfloat16_candidates)
        self._kv_split = shards.kv_split
        dummy_row = self.classifier.dummy_row()
        self.dummy_row = dummy_row.to(device)
        self.scaling_pass_has_experts = bool(dummy_row.any())
        prefix = causal_lm.base_model_prefix
        self._tap = HiddenStateTap(getattr(causal_lm, prefix))
        setattr(causal_lm, prefix, self._tap)
        self.causal_lm = causal_lm

    def _adapt(
        self, checkpoint: Checkpoint, causal_lm: PreTrainedModel, shards: Shards, bfloat16_candidates: Collection[str]
    ) -> Gate:
        """Replaces every site's module by an AdaptedModule. Returns the gate that they all read."""
        parts = [shards.part(site) for site in self.sites]
        stacks = [
            part.of(
                stack_experts(
                    checkpoint.experts, site, self.dtype, self.device, try_bfloat16=site in bfloat16_candidates
                )
            )
            for site, part in zip(self.sites, parts, strict=True)
        ]
        gate = Gate(
            [stack.ranks for stack in stacks],
            layerwise=checkpoint.xlora.layerwise_scalings,
            dtype=self.dtype,
            device=self.device,
        )
        gate.global_scaling_weight = checkpoint.xlora.global_scaling_weight
        head = causal_lm.get_output_embeddings()  # type: ignore[no-untyped-call]
        for number, (site, part, stack) in enumerate(zip(self.sites, parts, stacks, strict=True)):
            base, is_head = causal_lm.get_submodule(part.path), causal_lm.get_submodule(site) is head
            causal_lm.set_submodule(part.path, AdaptedModule(base, stack, gate, number, is_head=is_head))
        return gate

    def kv_layout(self, block_size: int) -> KVLayout:
        """The shape of one KV block of this model."""
        config = self.config.get_text_config()
        kv_heads, head_dim = kv_shape(config)
        return KVLayout(
            layers=config.num_hidden_layers,
            kv_heads=kv_heads // self._kv_split,
            head_dim=head_dim,
            block_size=block_size,
            gate_sites=self.classifier.stored_sites,
            experts=len(self.expert_names),
            dtype=self.dtype,
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """Step.forward in torch's operators."""
        gate_rows.write_given(batch, kv_cache.gate_rows)
        first_row = self.first_gated_row(batch)
        self.gate.set(gate_rows.read(batch, kv_cache.gate_rows, first_row), first_row)
        logits, hidden = self.run_decoder(batch, kv_cache)
        gate_logits, scalings = gate_rows.write_scalings(self.classifier, hidden, batch, kv_cache.gate_rows)
        return ForwardOutput(logits, gate_logits, scalings, hidden)

    @torch.inference_mode()
    def draft(self, start: DraftStart, choose: Choose, kv_cache: KVCache) -> Tensor:
        """Step.draft in torch's operators; the experts are off."""
        chain, group = self.draft_chain, start.group
        assert chain is not None, "a model without a draft layer was asked for its drafts"
        self.gate.clear()
        last, positions = len(kv_cache.keys) - 1, group.positions[:, 0]

        def attend(query: Tensor) -> Tensor:
            scaling = query.shape[2] ** -0.5
            return backend_for(query, kv_cache)(query, group, last, kv_cache, scaling, None, None)

        def next_state(state: Tensor, tokens: Tensor, depth: int) -> Tensor:
            found: Tensor = chain.layer(state, chain.embedded(tokens), depth, chain.rotation(positions + depth), attend)
            return found

        return draft_tokens(start, choose, next_state, self._head)

    def _head(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] -> logits [n, V] of the family's own head."""
        logits: Tensor = self.causal_lm(
            input_ids=torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device),
            use_cache=False,
            given=hidden[None],
        ).logits
        return logits[0]

    def first_gated_row(self, batch: Batch) -> int:
        """The first row that experts act on: the first real row, unless they act in the scaling pass as well."""
        return 0 if self.scaling_pass_has_experts or batch.scaling_rows_are_gated else batch.num_scaling_rows

    @property
    def decoder(self) -> nn.Module:
        """The causal LM without its head."""
        return self._tap.decoder

    def run_decoder(self, batch: Batch, kv_cache: KVCache) -> tuple[Tensor, Tensor]:
        """Runs the decoder under the current gate: logits [L, V] of the logit rows, last hidden state [T, H]."""
        self.gate.logit_rows = batch.logit_rows
        logits = self.causal_lm(
            input_ids=batch.input_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.logit_rows,
            batch=batch,
            kv_cache=kv_cache,
            draft_head=self.draft_head,
        ).logits[0]
        assert self._tap.last_hidden_state is not None
        hidden = self._tap.last_hidden_state[0]
        self._tap.last_hidden_state = None
        return logits, hidden
