"""XLoraModel: the decoder of transformers with its adapted linears swapped, its gate, its classifier, its KV cache.

One forward runs any mixture of scaling rows and real rows of any requests:

    scaling rows   gate = dummy row          -> last hidden state -> classifier -> scalings, stored for their real rows
    real rows      gate = stored scalings    -> logits

It knows rows and slots; which request they belong to, and what comes next, it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from service.checkpoint import Checkpoint
from service.contract.errors import CheckpointError
from service.model.adapted import AdaptedModule
from service.model.attention.paged import ATTENTION
from service.model.batch import Batch
from service.model.classifier import Classifier
from service.model.draft_head import DraftHead
from service.model.experts import stack_experts
from service.model.gate import Gate
from service.model.kv_cache import KVCache, KVLayout
from service.model.loading.family import build_skeleton, checked_skeleton, read_config
from service.model.loading.parallel import Part, Shards, split
from service.model.loading.parallel_plan import Ranks
from service.model.loading.quantised import Quantization, quantise
from service.model.loading.rope import settle_longrope
from service.model.steps.step import ForwardOutput
from service.model.targets import refusal


class _HiddenStateTap(nn.Module):
    """Stands where the causal LM keeps its decoder, and remembers the last hidden state before the head."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.last_hidden_state: Tensor | None = None  # [1, T, H], after the final norm

    def forward(self, *args: Any, batch: Batch, draft_head: DraftHead | None = None, **kwargs: Any) -> Any:
        outputs = self.decoder(*args, batch=batch, **kwargs)
        self.last_hidden_state = outputs.last_hidden_state
        if draft_head is not None:
            outputs.last_hidden_state = draft_head(outputs.last_hidden_state, batch.is_scaling)
        return outputs


class XLoraModel:
    """A base model, its experts and its gate on one device. `sites` is in class order of the classifier's rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        causal_lm: PreTrainedModel,
        *,
        device: torch.device,
        dtype: torch.dtype,
        shards: Shards | None = None,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.config: PretrainedConfig = causal_lm.config
        self.xlora_config = checkpoint.xlora
        self.expert_names = [expert.name for expert in checkpoint.experts]
        self.sites = resolve_sites(checkpoint, causal_lm if shards is None else shards.skeleton)
        experts, sites = len(self.expert_names), len(self.sites)
        self.classifier = Classifier(checkpoint.classifier, checkpoint.xlora, experts, sites, device)
        self.draft_head: DraftHead | None = None
        if checkpoint.draft_head is not None:
            self.draft_head = DraftHead(checkpoint.draft_head, device=device, dtype=dtype)
        self.gate = self._swap_linears(checkpoint, causal_lm, shards)
        self._kv_split = 1 if shards is None else shards.kv_split
        dummy_row = self.classifier.dummy_row()
        self.dummy_row = dummy_row.to(device)
        self.scaling_pass_has_experts = bool(dummy_row.any())
        prefix = causal_lm.base_model_prefix
        self._tap = _HiddenStateTap(getattr(causal_lm, prefix))
        setattr(causal_lm, prefix, self._tap)
        self.causal_lm = causal_lm

    def _swap_linears(self, checkpoint: Checkpoint, causal_lm: PreTrainedModel, shards: Shards | None) -> Gate:
        parts = [Part(site) if shards is None else shards.part(site) for site in self.sites]
        stacks = [
            part.of(stack_experts(checkpoint.experts, site, self.dtype, self.device))
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
        heads = config.num_attention_heads
        return KVLayout(
            layers=config.num_hidden_layers,
            kv_heads=(getattr(config, "num_key_value_heads", None) or heads) // self._kv_split,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            block_size=block_size,
            gate_sites=self.classifier.stored_sites,
            experts=len(self.expert_names),
            dtype=self.dtype,
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        """The step in operators of torch."""
        self.gate.read(kv_cache.gate_rows, batch.gate_slots, self.first_gated_row(batch))
        logits, hidden = self.run_decoder(batch, kv_cache, batch.logit_rows)
        return ForwardOutput(logits, self.store_scalings(hidden, batch, kv_cache))

    def first_gated_row(self, batch: Batch) -> int:
        """The row from which on experts act: the first real row, unless they act in the scaling pass as well."""
        return 0 if self.scaling_pass_has_experts or batch.scaling_rows_are_gated else batch.num_scaling_rows

    def store_scalings(self, hidden: Tensor, batch: Batch, kv_cache: KVCache) -> Tensor:
        """The classifier on the scaling rows of hidden [T, H]: its logits; its scalings go where the batch says."""
        rows = batch.num_scaling_rows
        gate_logits = self.classifier.logits(hidden[:rows])
        if rows:
            kv_cache.gate_rows.index_copy_(0, batch.new_gate_slots[:rows], self.classifier.scalings(gate_logits))
        return gate_logits

    @property
    def decoder(self) -> nn.Module:
        """The causal LM without its head."""
        return self._tap.decoder

    def run_decoder(self, batch: Batch, kv_cache: KVCache, logit_rows: Tensor | int) -> tuple[Tensor, Tensor]:
        """The decoder under the gate as it is set: logits [L, V] of `logit_rows` (0: all), last hidden state [T, H]."""
        rows = batch.rows
        of_head = torch.arange(rows.shape[1], device=rows.device) if isinstance(logit_rows, int) else logit_rows
        self.gate.logit_rows = of_head
        logits = self.causal_lm(
            input_ids=batch.input_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=logit_rows,
            batch=batch,
            kv_cache=kv_cache,
            draft_head=self.draft_head,
        ).logits[0]
        assert self._tap.last_hidden_state is not None
        hidden = self._tap.last_hidden_state[0]
        self._tap.last_hidden_state = None
        return logits, hidden


def resolve_sites(checkpoint: Checkpoint, causal_lm: PreTrainedModel) -> list[str]:
    """The adapted modules in the order of the classifier's rows: as stored, else as PEFT traverses them.

    Raises CheckpointError for a target that experts cannot adapt in this decoder.
    """
    modules = dict(causal_lm.named_modules())
    for expert in checkpoint.experts:
        for site, weights in expert.weights.items():
            if reason := refusal(modules.get(site), weights):
                raise CheckpointError(
                    f"{expert.folder}: the expert {expert.name!r} targets {site}, which is {reason} in the base",
                    hint="supported: Linear, Conv1D and Embedding of the base that the expert was trained on",
                )
    targets = {site for expert in checkpoint.experts for site in expert.weights}
    if checkpoint.sites is not None:
        return list(checkpoint.sites)
    return [name for name in modules if name in targets]


def load_causal_lm(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    max_model_len: int | None = None,
    ranks: Ranks | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> PreTrainedModel:
    """Loads the base through transformers, in eval mode, with its attention routed to ours and its RoPE settled for
    texts of up to `max_model_len` tokens (None: as many as the base takes). With `ranks`, the weights are this rank's
    shards, and every rank must load at the same time.

    Raises CheckpointError where a tensor of the base is missing (transformers would fill it with random numbers), and
    where the family cannot be served exactly (family.py, rope.py).
    """
    resolve_sites(checkpoint, checked_skeleton(checkpoint.base_path))
    causal_lm, loading = _from_pretrained(checkpoint.base_path, dtype, ranks)
    for defect in ("missing_keys", "mismatched_keys"):
        if loading[defect]:
            names = ", ".join(sorted(map(str, loading[defect]))[:3])
            raise CheckpointError(f"{checkpoint.base_path}: {defect.replace('_', ' ')} in the base's weights: {names}")
    causal_lm.set_attn_implementation(ATTENTION)
    settle_longrope(causal_lm, max_model_len, on_progress)
    if quantization is not None:
        quantise(causal_lm, quantization, device)
    return causal_lm.to(device).eval().requires_grad_(False)  # type: ignore[no-any-return]


def outline_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype, quantization: Quantization | None = None
) -> XLoraModel:
    """What load_model would build, on the meta device: every module and its size, and no weight of the base is read.

    Raises CheckpointError as load_model does for what the weights' values do not decide.
    """
    skeleton, meta = checked_skeleton(checkpoint.base_path, dtype), torch.device("meta")
    if quantization is not None:
        quantise(skeleton, quantization, meta)
    return XLoraModel(checkpoint, skeleton, device=meta, dtype=dtype)


def _from_pretrained(base: Path, dtype: torch.dtype, ranks: Ranks | None) -> tuple[Any, dict[str, Any]]:
    """The base as transformers loads it, and its report. Raises CheckpointError where it does not divide it."""
    divided = {} if ranks is None else {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=ranks.size)}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            config=read_config(base),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            generation_config=GenerationConfig(),  # type: ignore[no-untyped-call]  # nothing reads it, nor its file
            output_loading_info=True,
            **divided,
        )
    except ValueError as error:
        if ranks is None:
            raise
        raise CheckpointError(  # older versions want more to be divisible than check_plan does
            f"{base}: transformers {transformers.__version__} does not divide it: {error}",
            hint="use a newer version, or another --tensor-parallel",
        ) from error
    return loaded  # type: ignore[no-any-return]


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    max_model_len: int | None = None,
    ranks: Ranks | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> XLoraModel:
    """Builds the model, or this rank's part of it, on `device`. The checkpoint's expert tensors can be dropped
    afterwards: stacks are copies.
    """
    on_progress(f"loading base model from {checkpoint.base_path}")
    causal_lm = load_causal_lm(
        checkpoint,
        device=device,
        dtype=dtype,
        quantization=quantization,
        max_model_len=max_model_len,
        ranks=ranks,
        on_progress=on_progress,
    )
    shards = None if ranks is None else split(causal_lm, build_skeleton(checkpoint.base_path), ranks)
    on_progress(f"stacking experts: {', '.join(expert.name for expert in checkpoint.experts)}")
    return XLoraModel(checkpoint, causal_lm, device=device, dtype=dtype, shards=shards)
