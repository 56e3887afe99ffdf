"""Logprobs of tokens: computed on the device when a step is launched, read when its results are written."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.output import TokenOutput
from service.model.transfer import HostCopies


class Logprobs:
    """Natural logarithms of the unprocessed distribution: of one token per row, and of the row's best tokens."""

    def __init__(self, logits: Tensor, tokens: Tensor, alternatives: Sequence[int], copies: HostCopies) -> None:
        """logits [n, V], tokens int64 [n] on the same device, and the number of best tokens of each row. The results
        are copied with `copies`.
        """
        self._alternatives = alternatives
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.topk(max(alternatives), dim=-1)
        own = logprobs.gather(-1, tokens[:, None])[:, 0]
        self._columns = [copies.of(column) for column in (tokens, own, best.indices, best.values)]

    def read(self) -> list[TokenOutput]:
        """One output per row, once the copies have arrived."""
        tokens, own, best_ids, best_values = (column.tolist() for column in self._columns)
        best = zip(best_ids, best_values, self._alternatives, strict=True)
        tops = [list(zip(ids[:count], values[:count], strict=True)) for ids, values, count in best]
        return [TokenOutput(*one) for one in zip(tokens, own, tops, strict=True)]
