"""Target modules: the types that experts can adapt (Linear, GPT-2's Conv1D and Embedding), and a checkpoint's sites.

Any other type is refused by name. A subclass with a forward of its own counts as another type, because adapting it like
its parent would be silently wrong.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from service.checkpoint import Checkpoint, LoraWeights
from service.contract.errors import CheckpointError


def resolve_sites(checkpoint: Checkpoint, causal_lm: nn.Module) -> list[str]:
    """The names of the adapted modules in the order of the classifier's rows: as stored, else as PEFT traverses them.

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


def refusal(module: nn.Module | None, weights: LoraWeights) -> str | None:
    """Why `weights` cannot adapt `module`, or None when they can."""
    if module is None:
        return "no module"
    if isinstance(module, nn.Embedding):
        shape = (module.num_embeddings, module.embedding_dim)
    elif isinstance(module, Conv1D):
        shape = (module.nx, module.nf)
    elif is_plain_linear(module) or is_quantised(module):
        shape = (module.in_features, module.out_features)  # type: ignore[assignment]
    else:
        return type(module).__name__
    if weights.embedding != isinstance(module, nn.Embedding):
        return f"{type(module).__name__}, not what the adapter was made for"
    found = (weights.a.shape[1], weights.b.shape[0])
    return (
        None if found == shape else f"{type(module).__name__} of {shape[0]} x {shape[1]}, not {found[0]} x {found[1]}"
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is a Linear with Linear's own forward, or a Conv1D."""
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def is_quantised(module: nn.Module) -> bool:
    """Whether quantised.py has replaced a linear by this module."""
    return hasattr(module, "packed") and hasattr(module, "in_features")


def as_linear(module: nn.Module) -> nn.Linear:
    """`module` itself, or a Linear equal to a Conv1D, whose weight is [in, out]."""
    if isinstance(module, Conv1D):
        linear = nn.Linear(module.nx, module.nf, device="meta")
        linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
        linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
        return linear
    assert isinstance(module, nn.Linear)
    return module
