"""Whole engine steps on a CUDA device that computes nothing: no mix of devices, one wait a step, few launches.

Every kind of request runs to its end. Nothing is computed, so whether the numbers are right is asked elsewhere; here a
tensor of the host among those of the device, a hidden wait, a read of a copy that is still under way are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from service.model.attention import paged
from service.model.batch import Batch
from service.model.kv_cache import KVCache
from service.model.steps.step import ForwardOutput
from service.model.transfer import HostCopies
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_cuda_device import CUDA, Counts, DeviceFault
from tests.support.fake_cuda_engine import KINDS, FakeCudaEngines, Plant, attention
from tests.support.tiny import Tiny

# Most launches of a step besides the decoder: what was counted, and three more. Kinds not named: _LAUNCHES.
_LAUNCHES = 28
LAUNCHES = {
    "sampled": 53, "n = 4": 53, "filtered": 75, "penalties": 37, "logit bias": 31, "min tokens": 33, "grammar": 37,
    "drafts ahead": 43, "drawn ahead": 68, "sampled ahead": 74,
    "logprobs": 34, "prompt logprobs": 34, "scaling pass alone": 47, "abort": 48, "everything": 104,
}  # fmt: skip
# Most copies to the device and back: what was counted.
_COPIES_IN, COPIES_IN = 3, {"everything": 6, "drawn ahead": 6, "sampled ahead": 7}
_COPIES_OUT = 4
COPIES_OUT = {"logprobs": 7, "prompt logprobs": 7, "score": 6, "scaling pass alone": 6, "everything": 13}
_LATE_READS = 1
_CAPTURED = 9  # most launches of the decoder in a step that is replayed
SAMPLED = ("everything", "drafts", "sampled ahead", "abort", "scaling pass alone")  # those of the short run
SAMPLED_CAPTURES = ("everything",)
SHORT = replace(KINDS["greedy"], prompt=5, sampling=replace(KINDS["greedy"].sampling, max_tokens=3))


@pytest.fixture(scope="module")
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture(scope="module")
def engines(cuda: FakeCuda, tmp_path_factory: pytest.TempPathFactory) -> FakeCudaEngines:
    """Of a bundle with all there is: experts of different ranks, a deep classifier, a draft head and a draft layer."""
    path = tmp_path_factory.mktemp("tiny") / "mixed"
    xlora = {"xlora_depth": 2, "layerwise_scalings": True}
    made = FakeCudaEngines(Tiny(path, xlora=xlora, strength=0.3, draft_head=8, draft_depth=4), cuda)
    with cuda:
        made.move()
    return made


@pytest.fixture
def on_device(cuda: FakeCuda) -> Iterator[None]:
    with cuda, attention(paged.sdpa):
        yield


def check(name: str, steps: list[Counts]) -> None:
    """Fails where a step waits more than once, or launches or copies more than its kind may. The host may wait once
    more behind the last step: there is nothing to launch then.
    """
    for step in steps:
        assert step.waits.total() <= (1 if step is not steps[-1] else 2), step.waits
        assert step.late_reads.total() <= _LATE_READS, step.late_reads
        assert step.launches.total() <= LAUNCHES.get(name, _LAUNCHES), step.launches
        assert step.copies_in.total() <= COPIES_IN.get(name, _COPIES_IN), step.copies_in
        assert step.copies_out.total() <= COPIES_OUT.get(name, _COPIES_OUT), step.copies_out


def chosen(sampled: Iterable[str]) -> list[Any]:
    """Every kind; those that are not among `sampled` are of the long run."""
    return [name if name in sampled else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]


@pytest.mark.parametrize("name", chosen(SAMPLED))
@pytest.mark.usefixtures("on_device")
def test_steps(engines: FakeCudaEngines, name: str) -> None:
    check(name, engines.steps(KINDS[name]))


@pytest.mark.parametrize("name", chosen(SAMPLED_CAPTURES))
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
    return [logits + 1 for _ in range(40)]


PLANTS: list[Plant] = [
    host_tensor, item, branch, synchronous_copy, pageable_copy, index_from_a_list, read_too_early, launch_per_row
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
@pytest.mark.usefixtures("on_device")
def test_finds(engines: FakeCudaEngines, plant: Plant) -> None:
    """A defect in every step."""
    with pytest.raises((AssertionError, FakeTensorDeviceMismatchError)):
        check("greedy", engines.steps(SHORT, plant=plant))


@pytest.mark.usefixtures("on_device")
def test_finds_nothing(engines: FakeCudaEngines) -> None:
    """What is planted above is all that is wrong there."""
    check("greedy", engines.steps(SHORT))


@pytest.mark.usefixtures("on_device")
def test_finds_a_wait_in_a_captured_step(engines: FakeCudaEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engines.model.forward

    def waiting(batch: Batch, kv_cache: KVCache) -> ForwardOutput:
        output = forward(batch, kv_cache)
        item(output.logits)
        return output

    monkeypatch.setattr(engines.model, "forward", waiting)
    with pytest.raises(DeviceFault, match="while a graph is captured"):
        engines.build(SHORT, cuda_graphs=True)


@pytest.mark.usefixtures("on_device")
def test_tells_late_reads_from_waits(cuda: FakeCuda) -> None:
    """Copies queued before the last forward keep no device idle; those behind it do."""
    copies = [HostCopies(CUDA), HostCopies(CUDA)]
    with cuda.counted() as counts:
        for each in copies:
            with cuda.decoder():
                logits = torch.empty(2, 3, device="cuda") + 1
            each.of(logits)
            each.close()
        copies[0].wait()
        assert (counts.late_reads.total(), counts.waits.total()) == (1, 0)
        copies[1].wait()
    assert (counts.late_reads.total(), counts.waits.total()) == (1, 1)


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
