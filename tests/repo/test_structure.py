"""The shape of the code: which room may import which. Imports are read from the source, nothing is executed.

    commands -> library -> api -> client -> contract
    cluster -> api
    commands -> tools -> engine -> native -> model -> checkpoint -> contract
    observability, settings, grammar, chat_template -> tokenizer_files -> tokenizer_classes, contract

Knows the rooms and the few named exceptions below; knows nothing about what the modules do. Every rule is also run on
a synthetic tree that breaks it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_LEAVES = ("chat_template", "grammar", "observability", "settings", "tokenizer_classes", "tokenizer_files")
# What each room, a folder or a module of the package, may import besides itself and the package's version.
ROOMS: dict[str, tuple[str, ...]] = {
    "contract": (),
    "terminal": (),
    "usage": ("contract",),
    **dict.fromkeys(_LEAVES, ("contract",)),
    "chat_template": ("contract", "tokenizer_files"),
    "grammar": ("contract", "tokenizer_files"),
    "tokenizer_classes": (),
    "tokenizer_files": ("contract", "tokenizer_classes"),
    "checkpoint": ("contract", "chat_template", "tokenizer_files"),
    "model": ("contract", "checkpoint"),
    "native": ("contract", "checkpoint", "model"),
    "engine": ("contract", "grammar", "checkpoint", "model", "native"),
    "tools": ("contract", "checkpoint", "model", "engine"),
    "client": ("contract",),
    "api": ("contract", *_LEAVES, "client"),
    "library": ("contract", *_LEAVES, "client", "api"),
    "commands": (
        *("contract", *_LEAVES, "terminal", "checkpoint", "model"),
        *("tools", "client", "api", "library", "cluster", "cli"),
    ),
    "cluster": ("contract", *_LEAVES, "api", "commands"),
    "cli": ("contract", "settings", "usage"),
    "__main__": ("cli",),
}
# Rooms that run where those packages are not installed, or must stay light.
WEB_FREE = ("service.contract", "service.checkpoint", "service.model", "service.native", "service.engine")
WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings"}
TORCH_FREE = tuple(
    f"service.{room}" for room in ("contract", "client", "api", "library", "cluster", "terminal", *_LEAVES)
)
SCHEDULING = tuple(f"service.engine.{name}" for name in ("scheduler", "sequence", "block_manager", "block_keys"))
TORCH = {"torch", "accelerate", "peft", "safetensors.torch", "transformers.AutoTokenizer", "transformers.AutoConfig"}
# What the GPU benchmarks and tests start from: the machines they run on have not even the message formats installed.
BARE = ("service.engine.loader",)
MESSAGES = {"msgspec", "orjson", "llguidance"}
PEFT_TOOL = "service.tools.peft_model"

# Modules that may import a first-party module inside a function, and why.
DEFERRED = {"service": "XLora is public here, and `import service` costs nothing"}
# Modules that may touch the environment, and why.
ENVIRONMENT = {
    "service.cli": "torch takes from nowhere else how its threads wait, which some commands load themselves",
    "service.engine.worker": "the same of the engine's process",
    "service.settings": "the only reader of the environment",
    "service.engine.tensor_parallel.group": "gloo takes its network interface, transformers its GPU, from nowhere else",
}


@dataclass(frozen=True)
class Import:
    """One imported name, as far as it is a module."""

    source: str
    target: str
    line: int
    deferred: bool  # inside a function
    typing: bool  # under `if TYPE_CHECKING:`, never executed


class Tree:
    """The modules of one package and what they import."""

    def __init__(self, root: Path) -> None:
        self.sources = {_module_name(root, path): path for path in sorted((root / "service").rglob("*.py"))}
        self.trees = {name: ast.parse(path.read_text("utf-8"), path.name) for name, path in self.sources.items()}
        self.imports = [found for name in self.trees for found in self._imports(name)]

    def _imports(self, name: str) -> Iterator[Import]:
        pending: deque[tuple[ast.AST, bool, bool]] = deque([(self.trees[name], False, False)])
        while pending:
            node, deferred, typing = pending.popleft()
            if isinstance(node, ast.Import | ast.ImportFrom):
                for target in self._targets(name, node):
                    yield Import(name, target, node.lineno, deferred, typing)
            deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            skipped = set(map(id, node.body)) if guarded and isinstance(node, ast.If) else set()
            pending.extend((child, deferred, typing or id(child) in skipped) for child in ast.iter_child_nodes(node))

    def _targets(self, name: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            return
        base = node.module or ""
        if node.level:
            package = name if self.sources[name].name == "__init__.py" else name.rpartition(".")[0]
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, base]).rstrip(".")
        for alias in node.names:
            full = f"{base}.{alias.name}"
            yield full if full in self.sources or full in TORCH else base

    def reached(self, start: str) -> dict[str, list[str]]:
        """What importing `start` executes, each with the chain that leads there; a module's packages come too."""
        edges: dict[str, list[str]] = {}
        for found in self.imports:
            if not found.typing and not found.deferred:
                edges.setdefault(found.source, []).append(found.target)
        chains, pending = {start: [start]}, deque([start])
        while pending:
            name = pending.popleft()
            parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
            for target in [*edges.get(name, []), *parents]:
                if target not in chains:
                    chains[target] = [*chains[name], target]
                    pending.append(target)
        return chains


def _module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    """The room of a first-party module; "" is the bare package, which has the version."""
    return module.partition(".")[2].partition(".")[0]


def _within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def _first_party(tree: Tree) -> Iterator[Import]:
    return (found for found in tree.imports if found.target.split(".")[0] == "service")


def direction(tree: Tree) -> list[str]:
    """Imports of a room that one may not import, and modules outside all rooms."""
    rooms = {_room(name) for name in tree.sources} - {""}
    problems = [f"{room} is no room" for room in rooms - ROOMS.keys()]
    for found in _first_party(tree):
        source, target = _room(found.source), _room(found.target)
        if source and target not in ("", source, *ROOMS.get(source, ())):
            problems.append(f"{found.source}:{found.line} imports {found.target}")
    return problems


def _reaching(tree: Tree, starts: tuple[str, ...], forbidden: set[str]) -> list[str]:
    problems = []
    for name in filter(lambda name: _within(name, starts), tree.sources):
        chains = tree.reached(name)
        hits = [target for target in chains if _within(target, tuple(forbidden))]
        problems += [" -> ".join(chains[hit]) for hit in hits[:1]]
    return problems


def web(tree: Tree) -> list[str]:
    """Chains from the engine side to fastapi or pydantic: it also runs where those are not installed."""
    return _reaching(tree, WEB_FREE, WEB)


def bare(tree: Tree) -> list[str]:
    """Chains from the engine without its process to the packages that only crossing to it needs."""
    return _reaching(tree, BARE, MESSAGES)


def torch(tree: Tree) -> list[str]:
    """Chains from the API side or the scheduling code to torch: the API process stays light."""
    return _reaching(tree, TORCH_FREE + SCHEDULING, TORCH)


def ray(tree: Tree) -> list[str]:
    """Imports of ray outside service.cluster."""
    return [
        f"{found.source}:{found.line} imports {found.target}"
        for found in tree.imports
        if found.target.split(".")[0] == "ray" and not _within(found.source, ("service.cluster",))
    ]


def peft(tree: Tree) -> list[str]:
    """Imports of PEFT outside the tool that builds its model: nothing that serves loads it."""
    return [
        f"{found.source}:{found.line} imports {found.target}"
        for found in tree.imports
        if found.target.split(".")[0] == "peft" and found.source != PEFT_TOOL
    ]


def native(tree: Tree) -> list[str]:
    """Imports of the CPU accelerator outside the loader, which hands its steps to others."""
    return [
        f"{found.source}:{found.line} imports {found.target}"
        for found in _first_party(tree)
        if _within(found.target, ("service.native",))
        and not _within(found.source, ("service.native", "service.engine.loader"))
    ]


def deferred(tree: Tree) -> list[str]:
    """First-party imports inside functions, which hide cycles."""
    return [
        f"{found.source}:{found.line} imports {found.target} inside a function"
        for found in _first_party(tree)
        if found.deferred and found.source not in DEFERRED
    ]


def environment(tree: Tree) -> list[str]:
    """Uses of the environment outside settings."""
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    problems = []
    for module, source in tree.trees.items():
        for node in ast.walk(source):
            attribute = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os" and node.attr in names
            imported = isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}
            if (attribute or imported) and module not in ENVIRONMENT:
                problems.append(f"{module}:{getattr(node, 'lineno', 0)} touches the environment")
    return problems


RULES = (direction, web, bare, torch, ray, peft, native, deferred, environment)


@pytest.fixture(scope="module")
def service() -> Tree:
    return Tree(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_service_keeps(rule, service):
    assert rule(service) == []


def test_rules_match(service):
    """A room, a module or an exception that is named above and gone would leave a rule without anything to judge."""
    modules = set(service.sources)
    assert {_room(name) for name in modules} - {""} == set(ROOMS)
    for name in (*WEB_FREE, *TORCH_FREE, *SCHEDULING, *BARE, *ENVIRONMENT, PEFT_TOOL):
        assert name in modules, name
    assert set(DEFERRED) <= {found.source for found in _first_party(service) if found.deferred}


TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
CLEAN = {
    "__init__.py": '__version__ = "1"\n',
    "contract/__init__.py": "",
    "contract/errors.py": "",
    "observability/__init__.py": "",
    "observability/metrics.py": "from service import __version__\nfrom service.contract.errors import E\n",
    "settings.py": "import os\nimport pydantic\nfrom service.contract.errors import E\nos.environ\n",
    "cli.py": "from service.settings import S\n",
    "commands/__init__.py": "",
    "commands/serve.py": "from service.api import app\n",
    "api/__init__.py": "",
    "api/app.py": "import fastapi\nfrom service.client.engine_client import C\nfrom service.contract import errors\n",
    "client/__init__.py": "",
    "client/engine_client.py": TYPING + "import torch\n",
    "engine/__init__.py": "",
    "engine/loader.py": "import service.native\n",
    "engine/scheduler.py": "",
    "engine/engine.py": "from service.model.gate import G\nfrom .scheduler import S\n",
    "native/__init__.py": "from service.model.gate import G\n",
    "model/__init__.py": "",
    "model/gate.py": "import torch\nimport service.checkpoint\n",
    "checkpoint/__init__.py": "from safetensors.torch import load_file\n",
}
VIOLATIONS = {
    "up": (direction, "model/gate.py", "from service.engine.engine import E"),
    "up, relative": (direction, "checkpoint/__init__.py", "from ..model import gate"),
    "up, from the package": (direction, "engine/engine.py", "from service import api"),
    "up, typing only": (direction, "model/gate.py", TYPING + "import service.cli"),
    "api to engine": (direction, "api/app.py", "import service.engine.scheduler"),
    "api to commands": (direction, "api/app.py", "import service.commands.serve"),
    "api to library": (direction, "api/app.py", "import service.library.model"),
    "leaf to leaf": (direction, "observability/metrics.py", "from service.settings import S"),
    "contract to leaf": (direction, "contract/errors.py", "import service.observability.metrics"),
    "no room": (direction, "utils.py", ""),
    "web": (web, "engine/engine.py", "from fastapi import FastAPI"),
    "web through settings": (web, "model/gate.py", "from service.settings import S"),
    "messages": (bare, "engine/loader.py", "import msgspec"),
    "torch": (torch, "api/app.py", "import torch.nn"),
    "torch by safetensors": (torch, "client/engine_client.py", "from safetensors import torch"),
    "torch by AutoTokenizer": (torch, "api/app.py", "from transformers import AutoTokenizer"),
    "torch in scheduling": (torch, "engine/scheduler.py", "import torch"),
    "torch through a chain": (torch, "api/app.py", "from service.engine.engine import E"),
    "torch through a package": (torch, "engine/__init__.py", "from service.engine.engine import E"),
    "torch on try": (torch, "api/app.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
    "ray": (ray, "cli.py", "from ray import serve"),
    "peft": (peft, "checkpoint/__init__.py", "def f():\n    from peft.tuners import lora"),
    "native": (native, "engine/engine.py", "from service.native import build"),
    "deferred": (deferred, "cli.py", "def f():\n    from service.engine import engine"),
    "deferred in a method": (
        deferred,
        "api/app.py",
        "class A:\n    async def f(self):\n        import service.contract",
    ),
    "os.environ": (environment, "api/app.py", "import os\nos.environ['A']"),
    "os.getenv": (environment, "engine/engine.py", "import os\ndef f():\n    return os.getenv('A')"),
    "from os": (environment, "model/gate.py", "from os import environ as e"),
}


def _synthetic(root: Path, files: dict[str, str]) -> Tree:
    for name, text in files.items():
        path = root / "service" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return Tree(root)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_a_clean_tree(rule, tmp_path):
    assert rule(_synthetic(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(("rule", "path", "line"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_rule_finds(rule, path, line, tmp_path):
    """Negative control: one line that breaks the rule is found; without it nothing is (the test above)."""
    assert rule(_synthetic(tmp_path, CLEAN | {path: CLEAN.get(path, "") + line + "\n"})) != []


def test_api_process_runs_without_torch():
    """The source rule cannot see what third-party packages load; the interpreter can."""
    program = (
        "import sys, service.api.app, service.commands.serve; print({'torch', 'peft'} & set(sys.modules) or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "light\n"), done.stderr
