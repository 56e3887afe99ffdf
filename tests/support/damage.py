"""Ways to damage a copy of a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], Any]


def edit_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(bundle: Path) -> None:
        data = json.loads((bundle / file).read_text())
        change(data)
        (bundle / file).write_text(json.dumps(data))

    return damage


def set_json(file: str, **values: Any) -> Damage:
    return edit_json(file, lambda data: data.update(values))


def edit_tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(bundle: Path) -> None:
        tensors = load_file(bundle / file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, bundle / file)

    return damage


def set_tensor(file: str, name: str, value: torch.Tensor | None) -> Damage:
    """Replace or add a tensor; None removes it."""
    return edit_tensors(file, lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value}))


def poison(file: str, name: str, value: float) -> Damage:
    """Put one `value` at the end of a tensor."""
    return edit_tensors(file, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))


def write(file: str, content: bytes) -> Damage:
    return lambda bundle: (bundle / file).write_bytes(content)


def cut(file: str, drop_bytes: int) -> Damage:
    return lambda bundle: (bundle / file).write_bytes((bundle / file).read_bytes()[:-drop_bytes])


def remove(file: str) -> Damage:
    return lambda bundle: (bundle / file).unlink()


def rename(file: str, new: str) -> Damage:
    return lambda bundle: (bundle / file).rename(bundle / new)


def link_outside(file: str) -> Damage:
    """Move the file or folder beside the bundle and leave a symlink."""

    def damage(bundle: Path) -> None:
        target = bundle.parent / f"outside-{Path(file).name}"
        (bundle / file).rename(target)
        (bundle / file).symlink_to(target)

    return damage
