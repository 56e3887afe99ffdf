"""Whole engine steps on a CUDA device that computes nothing: no mix of devices, one wait a step, few launches.

Every kind of request runs to its end. Nothing is computed, so whether the numbers are right is asked elsewhere; here a
tensor of the host among those of the device, a hidden wait, a read of a copy that is still under way are found.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from service.model.attention import paged
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_cuda_device import Counts
from tests.support.fake_cuda_engine import KINDS, FakeCudaEngines, Plant, attention
from tests.support.tiny import Tiny

# Most waits for the device in one step; kinds that are not named: _WAITS.
_WAITS = 2
WAITS = {
    "logprobs": 4, "prompt logprobs": 4, "score": 3, "scalings log": 3, "full scalings": 3, "scaling pass alone": 5,
    "everything": 8,
}  # fmt: skip
# Most launches in one step besides the decoder; kinds that are not named: _LAUNCHES.
_LAUNCHES = 32
LAUNCHES = {
    "sampled": 56, "n = 4": 56, "filtered": 78, "penalties": 40, "logit bias": 34, "min tokens": 36, "grammar": 40,
    "logprobs": 36, "prompt logprobs": 38, "scaling pass alone": 48, "everything": 106,
}  # fmt: skip
# Most copies to the device in one step.
_COPIES_IN = 4
COPIES_IN = {"prompt logprobs": 5, "everything": 8}
_CAPTURED = 14  # most launches of the decoder in a step that is replayed
SAMPLED_CAPTURES = ("greedy", "drafts", "everything")  # those that are captured in the short run


@pytest.fixture(scope="module")
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture(scope="module")
def engines(cuda: FakeCuda, tmp_path_factory: pytest.TempPathFactory) -> FakeCudaEngines:
    """Of a bundle with all there is: experts of different ranks, a deep classifier, a draft head."""
    path = tmp_path_factory.mktemp("tiny") / "mixed"
    xlora = {"xlora_depth": 2, "layerwise_scalings": True}
    made = FakeCudaEngines(Tiny(path, xlora=xlora, strength=0.3, draft_head=8), cuda)
    with cuda:
        made.move()
    return made


@pytest.fixture
def on_device(cuda: FakeCuda) -> Iterator[None]:
    with cuda, attention(paged.sdpa):
        yield


def check(name: str, steps: list[Counts]) -> None:
    """Fails where a step waits or launches more than its kind may."""
    for step in steps:
        assert step.waits.total() <= WAITS.get(name, _WAITS), step.waits
        assert step.launches.total() <= LAUNCHES.get(name, _LAUNCHES), step.launches
        assert step.copies_in.total() <= COPIES_IN.get(name, _COPIES_IN), step.copies_in


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("on_device")
def test_steps(engines: FakeCudaEngines, name: str) -> None:
    check(name, engines.steps(KINDS[name]))


@pytest.mark.parametrize(
    "name", [name if name in SAMPLED_CAPTURES else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
@pytest.mark.usefixtures("on_device")
def test_captured_steps(engines: FakeCudaEngines, name: str) -> None:
    """The same with graphs, which nothing may wait in while they are captured."""
    steps = engines.steps(KINDS[name], cuda_graphs=True)
    check(name, steps)
    if len(steps) > 2:  # the last ones decode
        assert min(step.decoder_launches for step in steps) <= _CAPTURED


# -- the checks themselves -----------------------------------------------------------------------------------------


def host_tensor(logits: Tensor) -> object:
    return logits + torch.zeros(logits.shape[1])


def item(logits: Tensor) -> object:
    return logits.amax().item()


def branch(logits: Tensor) -> object:
    return bool(logits.isnan().any())


def synchronous_copy(logits: Tensor) -> object:
    return logits.to("cpu")


def pageable_copy(logits: Tensor) -> object:
    return torch.zeros(logits.shape[1]).to(logits.device, non_blocking=True)


def index_from_a_list(logits: Tensor) -> object:
    return logits[[0]]


def read_too_early(logits: Tensor) -> object:
    host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
    host.copy_(logits, non_blocking=True)
    return host.tolist()


def launch_per_row(logits: Tensor) -> object:
    return [logits.add_(1) for _ in range(40)]


PLANTS: list[Plant] = [
    host_tensor, item, branch, synchronous_copy, pageable_copy, index_from_a_list, read_too_early, launch_per_row
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
@pytest.mark.usefixtures("on_device")
def test_finds(engines: FakeCudaEngines, plant: Plant) -> None:
    """A defect in every step. Each wait of its own is one more than the step has today."""

    def twice(logits: Tensor) -> None:
        for _ in range(2):
            logits.sum()  # something to wait for
            plant(logits)

    with pytest.raises((AssertionError, FakeTensorDeviceMismatchError)):
        check("greedy", engines.steps(KINDS["greedy"], plant=twice))


@pytest.mark.usefixtures("on_device")
def test_waits_for_an_event(engines: FakeCudaEngines, cuda: FakeCuda) -> None:
    """A copy to pinned memory that is waited for by its event is one wait, and can be read then."""

    def asynchronous(logits: Tensor) -> None:
        host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
        host.copy_(logits, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
        event.synchronize()
        host.tolist()

    with cuda.counted() as counts:
        asynchronous(torch.empty(2, 3, device="cuda"))
    assert counts.waits.total() == 1
    assert counts.copies_out.total() == 1
