"""The one pass over a weight file: its hash equals hashlib's, and no NaN or Inf gets through."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from service.checkpoint.weights.tensors import BUFFER_BYTES, StoredTensor, read_header, read_tensors, scan
from service.contract.errors import CheckpointError


def scanned(path: Path) -> tuple[str, list[str]]:
    digest, errors = scan(read_header(path))
    return digest, [str(error) for error in errors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("position", [0, BUFFER_BYTES // 4, -1])
@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "Inf")])
def test_one_bad_value_anywhere(tmp_path: Path, dtype: torch.dtype, position: int, value: float, name: str) -> None:
    """Tensors longer than the buffer, of a length that is no multiple of it."""
    bad = torch.zeros(BUFFER_BYTES + 3, dtype=dtype)
    bad[position] = value
    save_file({"bad": bad, "good": torch.full((5,), torch.finfo(dtype).max, dtype=dtype)}, tmp_path / "x.safetensors")
    digest, errors = scanned(tmp_path / "x.safetensors")
    assert errors == [
        f"{tmp_path}/x.safetensors: tensor 'bad': expected finite values, found {name} "
        "(hint: the weights are damaged or training diverged)"
    ]
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    file = read_header(tmp_path / "x.safetensors")
    assert torch.equal(
        StoredTensor(file, file.tensors["good"])[...], torch.full((5,), torch.finfo(dtype).max, dtype=dtype)
    )
    with pytest.raises(CheckpointError, match=f"'bad': expected finite values, found {name}"):
        StoredTensor(file, file.tensors["bad"])[...]


def test_nan_is_named_even_after_inf(tmp_path: Path) -> None:
    save_file({"x": torch.tensor([float("inf"), float("nan")])}, tmp_path / "x.safetensors")
    assert "found NaN" in scanned(tmp_path / "x.safetensors")[1][0]


def test_empty_scalar_and_zero_sized_tensors(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(1.5), "none": torch.ones(0, 3)}, tmp_path / "x.safetensors")
    assert scanned(tmp_path / "x.safetensors")[1] == []
    tensors = read_tensors(read_header(tmp_path / "x.safetensors"))
    assert tensors["scalar"] == 1.5
    assert tensors["none"].shape == (0, 3)


def test_metadata_is_not_a_tensor(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert list(read_header(tmp_path / "x.safetensors").tensors) == ["x"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stored_tensor_is_read_when_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    """As safetensors reads it, of every shape, and into memory of its own."""
    path = tmp_path / "x.safetensors"
    tensors = {"matrix": torch.randn(5, 7).to(dtype), "scalar": torch.tensor(2.5, dtype=dtype)}
    tensors |= {"none": torch.zeros(0, 3, dtype=dtype), "long": torch.randn(9).to(dtype)}
    save_file(tensors, path)
    file = read_header(path)
    stored = {name: StoredTensor(file, info) for name, info in file.tensors.items()}
    for name, expected in tensors.items():
        assert (stored[name].dtype, stored[name].shape) == (dtype, expected.shape)
        assert stored[name].nbytes == expected.nbytes
        assert torch.equal(stored[name][...], expected)
    assert torch.equal(stored["matrix"][1:3], tensors["matrix"][1:3])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        [one[...] for one in stored.values()]
