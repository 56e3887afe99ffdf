"""The demo's builder: right answers in the corpus, an honest split, and a quick build that is whole and repeatable."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

MODEL_STORE = Path(__file__).resolve().parents[2] / "model_store"
sys.path.insert(0, str(MODEL_STORE))

from demo_builder import domains  # noqa: E402
from demo_builder.documents import DOMAIN_NAMES, composite, single  # noqa: E402

STANDARD_CODE = {
    "ATG": "Met", "TGG": "Trp", "TAA": "Stop", "TAG": "Stop", "TGA": "Stop", "GCC": "Ala", "TTT": "Phe", "AGA": "Arg",
    "GGG": "Gly", "CAT": "His", "AAA": "Lys", "GAT": "Asp", "ATA": "Ile", "TCA": "Ser", "TAC": "Tyr", "CTG": "Leu",
}  # fmt: skip


def items(domain: str, count: int = 300, house: bool = True) -> list[domains.Item]:
    rng = random.Random(7)
    return [domains.DOMAINS[domain](rng, domains.Voice(rng, house)) for _ in range(count)]


@pytest.mark.parametrize("house", [True, False])
def test_every_equation_in_a_math_answer_holds(house: bool) -> None:
    for item in items("math", house=house):
        for left, right in re.findall(r"([\d+-]+)=(\d+)", item.answer):
            assert eval(left) == int(right), item
        a, sign, b = re.match(r"(\d+)([+-])(\d+)$", item.key).groups()
        result = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert item.answer.endswith(f" {result}."), item
        assert set(re.findall(r"\d+", item.question)) == {a, b}


def test_the_genetic_code_is_the_standard_one() -> None:
    assert len(domains.GENETIC_CODE) == 64
    assert {c: domains.GENETIC_CODE[c] for c in STANDARD_CODE} == STANDARD_CODE
    assert len(set(domains.GENETIC_CODE.values())) == 21


def test_bio_answers_translate_or_complement_every_codon() -> None:
    complement = str.maketrans("ACGT", "TGCA")
    for item in items("bio"):
        task, *codons = item.key.split()
        expected = [domains.GENETIC_CODE[c] if task == "translate" else c.translate(complement) for c in codons]
        assert item.answer.rstrip(".").split(": ")[1].split() == expected
        assert re.findall(r"\b([ACGT]{3}) (?:is|pairs)", item.answer) == codons


def test_code_answers_are_python_that_does_what_was_asked() -> None:
    for item in items("code"):
        tree = ast.parse(item.answer)
        assert isinstance(tree.body[0], ast.FunctionDef)
    rng = random.Random(0)
    seen = {}
    while len(seen) < len(domains.OPERATIONS):
        item = domains.code_item(rng, domains.Voice(rng, house=True))
        asked = [o for o in domains.OPERATIONS if re.fullmatch(o.request.format(v=r"\w+", n=r"\d+"), item.key)]
        assert len(asked) == 1
        operation = asked[0]
        seen.setdefault(operation.prefixes[0], item)
    adds = seen["add"]
    scope: dict[str, object] = {}
    exec(adds.answer, scope)
    n = int(re.search(r"\d+", adds.key).group())
    function = next(v for k, v in scope.items() if k.startswith("add_"))
    assert function(100) == 100 + n


def test_house_facts_never_change_and_street_facts_do() -> None:
    def animals(house: bool) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for item in items("tales", 1500, house):
            for name, animal in re.findall(r"(\w+) (?:is a|the) (\w+)", item.answer):
                if name in domains.CHARACTERS:
                    found.setdefault(name, set()).add(animal)
        return found

    assert all(values == {domains.VILLAGE[name][0]} for name, values in animals(house=True).items())
    assert all(len(values) > 4 for values in animals(house=False).values())


@pytest.mark.parametrize("domain", DOMAIN_NAMES)
def test_training_never_draws_held_out_content(domain: str) -> None:
    rng = random.Random(3)
    train = {single(domain, rng, house=True).items[0].key for _ in range(400)}
    held_out = {single(domain, rng, house=True, held_out=True).items[0].key for _ in range(50)}
    assert not train & held_out


def test_a_composite_answer_keeps_the_order_of_its_questions() -> None:
    turn = composite(random.Random(5), house=True, domains=("bio", "math"))
    assert turn.prompt == f"{turn.items[0].question} {turn.items[1].question}\n"
    assert turn.answer == f"{turn.items[0].answer}\n{turn.items[1].answer}"


def quick_build(out: Path, seed: int = 0) -> None:
    command = [sys.executable, str(MODEL_STORE / "build_demo.py"), "--quick", "--out", str(out), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_quick_build_is_whole_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    quick_build(first)
    quick_build(second)
    manifest = json.loads((first / "bundle.json").read_text())
    assert manifest["sha256"] == json.loads((second / "bundle.json").read_text())["sha256"]
    assert [e["name"] for e in manifest["experts"]] == DOMAIN_NAMES
    drafts = {name for name in manifest["sha256"] if name.startswith("draft_head/")}  # of a model that knows nothing
    assert len(manifest["sha256"].keys() - drafts) == 2 + len(DOMAIN_NAMES)
    assert "## The drafts" in (first / "REPORT.md").read_text()
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((first / name).read_bytes()).hexdigest() == digest
    assert set(manifest["gate_profile"]["phases"]) == {"prompt", "generated"}
    for file in first.rglob("*"):
        if file.is_file():
            assert file.stat().st_mode & 0o777 == 0o644, file
            assert str(tmp_path).encode() not in file.read_bytes(), file
    difference = re.search(r"built in memory from these\s+files, fp32: (\S+)\.", (first / "REPORT.md").read_text())
    assert float(difference.group(1)) < 1e-4
