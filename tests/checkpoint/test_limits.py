"""Files that are made to keep a reader busy get their answer in seconds: many tensors, sites, patterns, defects."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.checkpoint import find_problems, load_checkpoint
from service.checkpoint.defects import MAX_DEFECTS, did_you_mean
from service.checkpoint.weights.lora_names import MAX_MATCHES, match_patterns
from service.contract.errors import CheckpointError
from tests.support.agreement import check
from tests.support.damage import poison, set_json

ADAPTER, EXPERT = "experts/alpha/adapter_config.json", "experts/alpha/adapter_model.safetensors"
BASE, GATE, BUNDLE = "base/model.safetensors", "classifier/xlora_classifier.safetensors", "bundle.json"
MANY = 20_000


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """CPU time of this process, for others share the machine."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


def write_tensors(path: Path, names: Iterable[str], shape: tuple[int, int]) -> None:
    """Zeros under these names; save_file would take a minute for so many."""
    size, header, end = 4 * shape[0] * shape[1], {}, 0
    for name in names:
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def adapter_names(count: int) -> Iterator[str]:
    for layer in range(2, count // 2):
        for side in "AB":
            yield f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"


TENSORS: dict[str, tuple[str, Iterable[str], tuple[int, int], str]] = {
    "of no kind": (EXPERT, [f"x{n}" for n in range(MANY)], (1, 1), "unexpected tensor 'x0'"),
    "of modules that are not there": (EXPERT, list(adapter_names(MANY)), (4, 1), "the base has no module"),
    "halves": (EXPERT, list(adapter_names(2 * MANY))[::2], (4, 1), "missing tensor"),
    "of one long list of layers": (GATE, [f"inner.{3 * n}.weight" for n in range(MANY)], (1, 1), "unexpected tensor"),
    "of a base that has no others": (BASE, [f"model.layers.{n}.weight" for n in range(MANY)], (1, 1), "missing tensor"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_many_tensors(bundle: Path, case: str) -> None:
    file, names, shape, expected = TENSORS[case]
    write_tensors(bundle / file, names, shape)
    with within(20):
        lines = check(bundle)
    assert expected in "\n".join(lines)
    assert len(lines) <= MAX_DEFECTS + 1


def test_many_good_tensors(bundle: Path) -> None:
    """Tensors that nothing asks for, as old saves have some, are no defect however many they are."""
    names = {f"extra.{n}.weight" for n in range(MANY)}
    good = json.loads(read_header_text(bundle / BASE))
    content = (bundle / BASE).read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    header = {name: entry for name, entry in good.items() if name != "__metadata__"}
    for number, name in enumerate(sorted(names)):
        start = len(data) + 4 * number
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [start, start + 4]}
    text = json.dumps(header).encode()
    (bundle / BASE).write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(4 * MANY))
    with within(20):
        assert check(bundle) == []


def read_header_text(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def test_a_name_without_end(bundle: Path) -> None:
    write_tensors(bundle / EXPERT, ["x" * 1_000_000], (1, 1))
    with pytest.raises(CheckpointError, match="expected a name of at most 1000 characters, found 1000000") as caught:
        load_checkpoint(bundle)
    assert len(str(caught.value)) < 1000


FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "sites": (BUNDLE, {"sites": [f"model.layers.{n}.q_proj" for n in range(MANY)]}, "sites: no expert targets"),
    "sites twice": (BUNDLE, {"sites": [f"m.{n}" for n in range(MANY)] * 2}, "is listed 2 times"),
    "hashes": (
        BUNDLE,
        {"sha256": {f"x{n}": "0" * 64 for n in range(MANY)}},
        "sha256: expected at most 10,000 files, found 20,000",
    ),
    "experts": (BUNDLE, {"experts": [{"name": f"e{n}", "path": "x"} for n in range(MANY)]}, "at most 1,000 experts"),
    "unknown keys": (ADAPTER, {f"key{n}": 1 for n in range(MANY)}, "unknown config key"),
    "targets": (ADAPTER, {"target_modules": [f"q{n}" for n in range(MANY)] + ["k_proj"]}, "missing tensors for"),
    "one key without end": (ADAPTER, {"x" * 2_000_000: 1}, "unknown config key"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_many_entries(bundle: Path, case: str) -> None:
    file, values, expected = FIELDS[case]
    set_json(file, **values)(bundle)
    with within(20):
        lines = [str(problem) for problem in find_problems(bundle)]
    assert expected in lines[0]
    assert all(len(line) < 10_000 for line in lines)
    assert len(lines) <= MAX_DEFECTS + 1


def test_the_last_line_says_that_there_are_more(bundle: Path) -> None:
    set_json(ADAPTER, **{f"key{n}": 1 for n in range(200)})(bundle)
    lines = [str(problem) for problem in find_problems(bundle)]
    assert len(lines) == MAX_DEFECTS + 1
    assert lines[-1] == f"more than {MAX_DEFECTS - 1} defects: the rest is not looked at"


def test_more_patterns_than_any_adapter_has(bundle: Path) -> None:
    set_json(ADAPTER, rank_pattern={f"q_proj{n}": 4 for n in range(MANY)})(bundle)
    with pytest.raises(CheckpointError, match="rank_pattern: expected at most 10,000 patterns"):
        load_checkpoint(bundle)


def test_more_layers_than_any_model_has(bundle: Path) -> None:
    set_json("base/config.json", num_hidden_layers=2000)(bundle)
    write_tensors(bundle / BASE, [f"model.layers.{n}.mlp.up_proj.weight" for n in range(2000)], (1, 1))
    assert "num_hidden_layers: expected at most 1000" in "\n".join(check(bundle))


CATASTROPHES = [
    "(([a-z_.0-9]+)+)+!",
    "(.*)*(.*)*(.*)*!",
    ".*.*.*.*.*.*.*.*.*.*.*.*!",
    "(?:(?:.{0,99}){0,99}){0,99}!",
]


@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_patterns_that_are_never_matched(bundle: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.checkpoint.weights.lora_names.MAX_SECONDS", 1)
    set_json(ADAPTER, rank_pattern={pattern: 4})(bundle)
    with pytest.raises(CheckpointError, match=r"adapter_config.json: rank_pattern: expected patterns that 4 modules"):
        load_checkpoint(bundle)


SITES = [f"model.layers.{n}.{m}" for n in range(12) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up-proj")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", 12),
        (r"layers.1.self_attn.q_proj", 1),
        (r"layers\.(0|1)\..*q_proj", 2),
        (r".*\.\d+\.self_attn\.[qv]_proj", 24),
        (r"layers\.1\d?\.(self_attn|mlp)\.\w+", 6),
        ("up-proj", 12),
        ("proj", 0),
    ],
)
def test_patterns_that_people_write(pattern: str, expected: int) -> None:
    """As PEFT matches them (get_pattern_key), in this process and in the other."""
    from peft.utils.other import get_pattern_key

    theirs = [site for site in SITES if get_pattern_key([pattern], site) == pattern]
    for sites in (SITES, SITES * (MAX_MATCHES // len(SITES) + 1)):
        found = match_patterns({pattern: 4}, sites, Path("x"), "rank_pattern")
        assert list(found) == theirs
    assert len(theirs) == expected


def test_the_first_pattern_wins_in_either_process() -> None:
    patterns = {"v_proj": 1, ".*_proj": 2, "q_proj": 3}
    found = match_patterns(patterns, SITES, Path("x"), "rank_pattern")
    assert [found.get(site) for site in SITES[:3]] == [2, 1, None]
    names = {"self_attn.v_proj": 1, "v_proj": 2}
    assert set(match_patterns(names, SITES, Path("x"), "rank_pattern").values()) == {1}


def test_a_hint_among_many_names() -> None:
    names = [f"model.layers.{n}.self_attn.{m}_proj" for n in range(200) for m in "qkvo"]
    assert "'model.layers.150.self_attn.q_proj'" in str(did_you_mean("model.layers.150.self_attn.q_prj", names))


def test_damage_is_named_among_neighbours(bundle: Path) -> None:
    """Tensors are looked at in runs; the one that is damaged is named, and no other."""
    poison(BASE, "model.layers.1.mlp.up_proj.weight", float("nan"))(bundle)
    poison(BASE, "model.layers.0.mlp.up_proj.weight", float("inf"))(bundle)
    lines = [str(problem) for problem in find_problems(bundle)]
    assert [line.partition("tensor ")[2] for line in lines] == [
        "'model.layers.0.mlp.up_proj.weight': expected finite values, found Inf "
        "(hint: the weights are damaged or training diverged)",
        "'model.layers.1.mlp.up_proj.weight': expected finite values, found NaN "
        "(hint: the weights are damaged or training diverged)",
    ]
