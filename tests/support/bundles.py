"""Tiny random but complete bundles, made on the fly: a real base, real PEFT adapters, a real tokenizer, a random gate.

For every test that needs a model. Weights are scaled so that experts visibly change the logits, the gate differs from
token to token, and near-ties between the two best logits are rare (logits have a standard deviation of about 4).
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from service.checkpoint import DraftHeadWeights, DraftLayerWeights, XLoraConfig, write_bundle

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")
DEFAULT_EXPERTS: Mapping[str, Mapping[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "beta": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "down_proj"], "use_rslora": True},
    "gamma": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["v_proj", "gate_proj"],
        "rank_pattern": {"layers.0.self_attn.v_proj": 5},
        "alpha_pattern": {"gate_proj": 9},
    },
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun",
    "one two three four five six seven eight nine ten eleven twelve",
    "let x be an integer; then x + 1 is larger than x, and 2 * x is even",
    "Grüße aus Köln, naïve café, emoji 😀 and 日本語 text",
)


def make_bundle(
    path: Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    experts: Mapping[str, Mapping[str, Any]] | Sequence[str] = DEFAULT_EXPERTS,
    ranks: Any = None,
    targets: Any = None,
    alphas: Any = None,
    rslora: Any = None,
    rank_pattern: Any = None,
    alpha_pattern: Any = None,
    xlora: Mapping[str, Any] | None = None,
    seed: int = 0,
    vocab: int = 320,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    strength: float = 0.5,
    head: float = 4.0,
    base_config: Mapping[str, Any] | None = None,
    with_sites: bool = True,
    gate_profile: Mapping[str, Any] | None = None,
    draft_head: int | None = None,
    draft_depth: int | None = None,
) -> Path:
    """Write a bundle at `path` and return `path`.

    `experts` maps names to LoraConfig arguments (plus an optional "description"), in class order, or only lists names.
    `ranks, targets, alphas, rslora, rank_pattern, alpha_pattern` override every expert: one value for all, or a dict
    {expert name: value}. `xlora` are XLoraConfig fields. `strength`: size of an expert's update relative to its input.
    `head`: standard deviation of the logits, about.
    `draft_head`: the width of a random one, which drafts something else now and then.
    `draft_depth`: the tokens that a random draft layer drafts in all, at least 2.
    `architecture` is a transformers model_type; `base_config` goes to its config. The vocabulary is at least the
    tokenizer's (all 256 bytes and the special tokens), whatever `vocab` says.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_tokenizer(vocab)
    specs = {name: dict(experts[name]) if isinstance(experts, Mapping) else {} for name in experts}
    overrides = {
        "r": ranks,
        "target_modules": targets,
        "lora_alpha": alphas,
        "use_rslora": rslora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    for key, override in overrides.items():
        for name, value in _per_expert(override, list(specs)).items():
            specs[name][key] = value

    model = make_base(
        architecture, hidden=hidden, layers=layers, vocab=max(vocab, len(tokenizer)), generator=generator, dtype=dtype,
        tokenizer=tokenizer, overrides=base_config or {}, head=head,
    )  # fmt: skip
    model.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    entries = []
    adapted: set[str] = set()
    for name, spec in specs.items():
        description = str(spec.pop("description", f"the {name} expert"))
        adapted |= save_expert(path / "experts" / name, path / "base", spec, generator, strength, dtype)
        entries.append((name, description, f"experts/{name}"))

    sites = [name for name, _ in model.named_modules() if name in adapted]  # module-traversal order
    config = XLoraConfig.from_dict({"hidden_size": hidden, "xlora_size": 24, **(xlora or {})}, path)
    write_bundle(
        path,
        name=path.name,
        experts=entries,
        sites=sites,
        xlora=config,
        classifier=make_classifier(config, sites=len(sites), experts=len(entries), generator=generator),
        gate_profile=gate_profile,
        draft_head=None if draft_head is None else make_draft_head(hidden, draft_head, generator),
        draft_layer=None if draft_depth is None else make_draft_layer(model, draft_depth, generator),
    )
    if not with_sites:
        _drop_sites(path)
    return path


def make_draft_head(hidden: int, size: int, generator: torch.Generator) -> DraftHeadWeights:
    """A random one, whose changes are a third of what it changes in size."""
    up = torch.randn(size, hidden, generator=generator) / math.sqrt(hidden)
    bias = torch.randn(size, generator=generator)
    return DraftHeadWeights(up, bias, torch.randn(hidden, size, generator=generator) / (2 * math.sqrt(size)))


def make_draft_layer(model: Any, depth: int, generator: torch.Generator, *, heads_each: int = 2) -> DraftLayerWeights:
    """A random one for the base `model`, with so many query heads for each KV head, whose states stay of one size."""
    config = model.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    width = heads_each * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    size = hidden // 2

    def matrix(out: int, wide: int, factor: float = 1.0) -> torch.Tensor:
        return torch.randn(out, wide, generator=generator) * factor / math.sqrt(wide)

    return DraftLayerWeights(
        mix=matrix(hidden, 2 * hidden, 1.4),
        depths=matrix(depth - 1, hidden, 2.0),
        query=matrix(width, hidden, 2.0),
        output=matrix(hidden, width, 0.5),
        up=matrix(size, hidden),
        bias=torch.randn(size, generator=generator),
        down=matrix(hidden, size, 0.5),
        agreement=torch.linspace(0.9, 0.6, depth),
    )


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every string can be encoded, some characters span several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


_OWN_KV_HEADS = ("gpt2", "gpt_neox", "gpt_bigcode", "opt", "persimmon", "ctrl")  # say otherwise how many they have


def make_base(
    architecture: str,
    *,
    hidden: int,
    layers: int,
    vocab: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerFast,
    overrides: Mapping[str, Any],
    head: float = 4.0,
) -> Any:
    """A random decoder of any transformers family; 4 heads of hidden/4, 2 KV heads."""
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        **({"num_key_value_heads": 2} if architecture not in _OWN_KV_HEADS else {}),
        "head_dim": hidden // 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(architecture, **{**settings, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                std = {"lm_head.weight": head}.get(name, 1.5) / math.sqrt(parameter.shape[-1])
                std = 1.0 if "embed_tokens" in name else std
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.to(dtype).eval()


def save_expert(
    folder: Path, base: Path, spec: Mapping[str, Any], generator: torch.Generator, strength: float, dtype: torch.dtype
) -> set[str]:
    """Save one random PEFT adapter; returns the modules it adapts."""
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    settings = {**defaults, **{key: value for key, value in spec.items() if value is not None}}
    if isinstance(settings["target_modules"], tuple):
        settings["target_modules"] = list(settings["target_modules"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 uses names that transformers 5.23 deprecates
        peft_model = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)
    adapted = set()
    with torch.no_grad():
        for name, module in peft_model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                adapted.add(name)
                _randomise(module, generator, strength)
    peft_model.save_pretrained(folder)
    return adapted


def make_classifier(
    config: XLoraConfig, *, sites: int, experts: int, generator: torch.Generator
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Random (weight, bias) pairs of the classifier's shape."""
    rows = sites * experts if config.layerwise_scalings else experts
    widths = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), rows]
    pairs: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for width_in, width_out in itertools.pairwise(widths):
        weight = torch.randn(width_out, width_in, generator=generator) * (2.0 / math.sqrt(width_in))
        bias = torch.randn(width_out, generator=generator) * 0.3
        pairs.append((weight, bias if config.use_bias else None))
    return pairs


def _randomise(module: LoraLayer, generator: torch.Generator, strength: float) -> None:
    """Non-zero A and B with |scaling * B A x| about `strength` * |x|."""
    for name, scaling in module.scaling.items():
        if name in module.lora_embedding_A:
            a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]  # [R, vocabulary], [H, R]
        else:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight  # [R, in], [out, R]
        a.copy_(torch.randn(a.shape, generator=generator) / math.sqrt(a.shape[1]))
        b.copy_(torch.randn(b.shape, generator=generator) * (strength / (scaling * math.sqrt(b.shape[1]))))


def _per_expert(override: Any, names: list[str]) -> dict[str, Any]:
    """{expert: value} from one value for all or a dict by expert name."""
    if override is None:
        return {}
    if isinstance(override, Mapping) and override and set(override) <= set(names):
        return dict(override)
    return dict.fromkeys(names, override)


def _drop_sites(path: Path) -> None:
    manifest = json.loads((path / "bundle.json").read_text())
    del manifest["sites"]
    (path / "bundle.json").write_text(json.dumps(manifest, indent=2))
