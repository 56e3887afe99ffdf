"""Logprobs of tokens, on their way from the device: made when a step is launched, read when its results are written."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.output import TokenOutput
from service.model.transfer import HostCopy


class Logprobs:
    """Natural logs of the raw distribution: of one token per row, and of the row's best tokens."""

    def __init__(self, logits: Tensor, tokens: Tensor, alternatives: Sequence[int]) -> None:
        """logits [n, V], tokens int64 [n] on the same device, and how many of the best each row wants."""
        self._alternatives = alternatives
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.topk(max(alternatives), dim=-1)
        self._copy = HostCopy(tokens, logprobs.gather(-1, tokens[:, None])[:, 0], best.indices, best.values)

    def read(self) -> list[TokenOutput]:
        """One output per row."""
        tokens, own, best_ids, best_values = (tensor.tolist() for tensor in self._copy.read())
        best = zip(best_ids, best_values, self._alternatives, strict=True)
        tops = [list(zip(ids[:count], values[:count], strict=True)) for ids, values, count in best]
        return [TokenOutput(*one) for one in zip(tokens, own, tops, strict=True)]
