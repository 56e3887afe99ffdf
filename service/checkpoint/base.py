"""Reads the base model's folder: config.json, tensor shapes, end-of-text tokens; and opens its tokenizer and chat
template as serving does.

Knows files, shapes and names of fields of any family; what the fields mean together is checked by model/loading/. Knows
neither transformers nor architectures, and loads no weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from service.chat_template import CHAT, TEMPLATE_FILE, ChatTemplate, template_files
from service.checkpoint.defects import Defects, defect, naming, shorten
from service.checkpoint.end_of_text import read_eos_token_ids
from service.checkpoint.weights.files import BundleRoot
from service.checkpoint.weights.tensors import TensorFile, read_header
from service.tokenizer_files import CONFIG_FILE, TOKENIZER_FILE, TokenizerFiles

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The prefix of multimodal models' text modules in transformers, and in the files of Gemma 3 and similar models.
TEXT_MODEL = ("model.language_model.", "language_model.model.")
HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")  # the names in Llama, GPT-2 and GPT-NeoX
HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")
MAX_SHARDS = 10_000
# transformers would load these instead of the files that are checked here.
SUBSTITUTES = ("adapter_config.json", "shard-*-model-*.safetensors")
DTYPES = ("float32", "bfloat16", "float16")
LAYER_COUNTS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
# Numbers of modules, which are built one by one; widths are not among them, and neither are positions.
MODULE_COUNT = re.compile(r"num_\w+|\w+_(layers|experts|heads)|n_(head|\w+_experts)")
MAX_LAYERS = 1000  # building one costs a millisecond or two; the deepest models have 130
MAX_MODULES = 4096  # of one kind, unless the weights have more tensors, or a tensor with a longer side
REFUSED_FIELDS = {
    "quantization_config": "use the model's float32, float16 or bfloat16 weights",
    "transformers_weights": "the weights are model.safetensors, or what its index names",
    "fusion_config": "it changes what the modules compute",
}
LAYER_NUMBER = re.compile(r"(.*?)\.(\d+)\.")
UNUSUAL_TEXT = "a\N{SNOWMAN} \U000f0000"
FAST_TOKENIZER = "save the base with a fast tokenizer: AutoTokenizer(...).save_pretrained"


@dataclass(frozen=True)
class BaseModel:
    """The base's configuration and the headers of its files; `shapes` maps tensor names to shapes."""

    path: Path
    config: dict[str, Any]
    files: tuple[TensorFile, ...]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    complete: bool = True  # False: a shard could not be read, so an unknown module may still exist
    eos_token_ids: tuple[int, ...] = ()

    @property
    def hidden_size(self) -> int | None:
        """The hidden size; None when config.json has it under no known name."""
        return _integer(self.config, HIDDEN_SIZE_KEYS)

    @property
    def architecture(self) -> str:
        """The class that config.json names."""
        names = self.config.get("architectures") or self.config.get("model_type", "unknown")
        return ", ".join(map(str, names)) if isinstance(names, list) else str(names)

    @cached_property
    def modules(self) -> list[str]:
        """Names of the modules with a matrix, which adapters may target, in file order."""
        suffix = ".weight"
        return [name.removesuffix(suffix) for name, s in self.shapes.items() if name.endswith(suffix) and len(s) == 2]

    def weight_name(self, module: str) -> str | None:
        """The tensor that is `module`'s weight, or None. Some saves leave out the first component ("model."); the head
        has one of two names, and none of its own where it is tied to the embedding.
        """
        names = [f"{module}.weight", f"{module.partition('.')[2]}.weight"]
        names.append(f"{module.replace(*TEXT_MODEL, 1)}.weight")
        if module in HEADS:
            names += [f"{head}.weight" for head in HEADS]
            names += [name for name in self.shapes if name.endswith(EMBEDDINGS)]
        return next((name for name in names if name in self.shapes), None)

    def weight_shape(self, module: str) -> tuple[int, ...] | None:
        """Shape of `module`'s weight, or None: [out, in], and [in, out] for Conv1D and Embedding."""
        name = self.weight_name(module)
        return None if name is None else self.shapes[name]

    @property
    def parameters(self) -> int:
        """The number of parameters in all files."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_base(root: BundleRoot, path: Path, defects: Defects, *, eos_from_tokenizer: bool = False) -> BaseModel:
    """Reads the folder's configuration and all safetensors headers, and opens its tokenizer. With `eos_from_tokenizer`,
    the tokenizer's eos token ends texts, too.
    """
    with defects.guard():
        root.require_links_inside(path)
        _refuse_substitutes(path)
    named = check_tokenizer(root, path, defects)
    config = root.json(path / "config.json", "the base must be a Hugging Face model folder")
    if (path / INDEX_FILE).exists() and not (path / SINGLE_FILE).exists():
        files, complete = _read_shards(root, path, defects)
    else:
        files, complete = (read_header(root.weights(path, SINGLE_FILE)),), True
    shapes = {name: info.shape for file in files for name, info in file.tensors.items()}
    if complete:
        check_base_config(config, path / "config.json", shapes, defects)
    ends: tuple[int, ...] = ()
    with defects.guard():
        vocabulary = _integer(config, ("vocab_size",))
        ends = read_eos_token_ids(root, path, config, vocabulary, named, defects, from_tokenizer=eos_from_tokenizer)
    return BaseModel(path, config, files, shapes, complete, ends)


def _refuse_substitutes(path: Path) -> None:
    for pattern in SUBSTITUTES:
        if found := next(path.glob(pattern), None):
            problem = f"expected none beside {SINGLE_FILE}: transformers would load it in its place"
            raise defect(found, problem, "delete it from the base's folder")


def _integer(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first integer under one of `keys`, in config.json itself or in its part on text."""
    text_config = config.get("text_config")
    sections = [config, text_config if isinstance(text_config, dict) else {}]
    values = (section.get(key) for section in sections for key in keys)
    return next((value for value in values if type(value) is int), None)


def _read_shards(root: BundleRoot, path: Path, defects: Defects) -> tuple[tuple[TensorFile, ...], bool]:
    """The shards that the index names, each checked against it, and whether all could be read."""
    index = path / INDEX_FILE
    weight_map = root.json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise defect(index, f"weight_map: expected tensor names and their files, found {weight_map!r:.80}")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    if len(shards) > MAX_SHARDS:
        raise defect(index, f"weight_map: expected at most {MAX_SHARDS:,} files, found {len(shards):,}")
    files = []
    for shard in sorted(shards):
        with defects.guard():
            file = read_header(root.weights(path, shard))
            files.append(file)
            missing = [name for name in shards[shard] if name not in file.tensors]
            if missing:
                raise defect(file.path, f"missing tensor {shorten(missing)}, which {INDEX_FILE} expects here")
    return tuple(files), len(files) == len(shards)


def stored_dtype(base: Path) -> str:
    """The dtype that config.json states for the base's weights, by torch's name."""
    config = json.loads((base / "config.json").read_text())
    own = config.get("text_config")
    sections = [config, own if isinstance(own, dict) else {}]
    stated = (section.get(name) for section in sections for name in ("dtype", "torch_dtype"))
    return next(filter(None, stated), "float32")


def check_base_config(
    config: Mapping[str, Any], source: Path, shapes: Mapping[str, tuple[int, ...]], defects: Defects
) -> None:
    """Reports sizes that weights of these `shapes` cannot fill, before any modules of these sizes are built."""
    layers = min(_max_layers(shapes), MAX_LAYERS)
    longest = max((size for shape in shapes.values() for size in shape), default=0)
    modules = max(len(shapes), longest, MAX_MODULES)
    for name, value in _fields(config):
        field = name.rpartition(".")[2]
        if field in REFUSED_FIELDS and value:
            defects.add(defect(source, f"{name}: expected none, found {value!r:.80}", REFUSED_FIELDS[field]))
        elif field in ("dtype", "torch_dtype") and value not in (None, *DTYPES):
            defects.add(defect(source, f"{name}: expected {', '.join(DTYPES)}, found {value!r:.80}"))
        elif field.endswith(("_eps", "_epsilon")) and isinstance(value, int | float) and value < 0:
            defects.add(defect(source, f"{name}: expected at least 0, found {value!r:.80}"))
        elif isinstance(value, int | float) and MODULE_COUNT.fullmatch(field):
            limit = layers if field in LAYER_COUNTS else modules
            if value > limit:
                problem = f"{name}: expected at most {limit}, which the weights can fill, found {value!r:.40}"
                defects.add(defect(source, problem))


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields at any depth, by their dotted names."""
    pending: list[tuple[str, Any]] = [("", config)]
    while pending:
        prefix, section = pending.pop()
        for key, value in section.items():
            yield prefix + key, value
            if isinstance(value, dict):
                pending.append((f"{prefix}{key}.", value))


def _max_layers(names: Collection[str]) -> int:
    """The length of the longest list of layers: distinct first numbers after the same beginning of a name."""
    numbers: dict[str, set[str]] = {}
    for name in names:
        if match := LAYER_NUMBER.match(name):
            numbers.setdefault(match[1], set()).add(match[2])
    return max(map(len, numbers.values()), default=0)


def check_tokenizer(root: BundleRoot, folder: Path, defects: Defects) -> tuple[str, int] | None:
    """Reports a tokenizer or a chat template that serving could not open; returns the tokenizer's eos token."""
    files, named = None, None
    with defects.guard():
        path = root.file(folder / TOKENIZER_FILE, FAST_TOKENIZER)
        root.json(path)
        with naming(folder / CONFIG_FILE, "no settings of a tokenizer"):
            files = TokenizerFiles.read(folder, root.json)
        with naming(path, "no tokenizer", FAST_TOKENIZER):
            tokenizer = files.open()
            tokenizer.encode(UNUSUAL_TEXT)  # reveals a vocabulary without fallback tokens
        for problem in files.unlike_transformers(tokenizer):
            defects.warn(folder / CONFIG_FILE, problem)
        eos = files.special_tokens.get("eos_token")
        id = None if eos is None else tokenizer.token_to_id(eos)
        named = None if eos is None or id is None else (eos, id)
    with defects.guard():
        if files is not None:
            _check_chat_template(root, files, defects)
    return named


def _check_chat_template(root: BundleRoot, files: TokenizerFiles, defects: Defects) -> None:
    paths = template_files(files.folder)
    if paths and CHAT not in paths:
        other = next(iter(paths.values()))
        expected = f"expected {TEMPLATE_FILE} or {other.parent.name}/{CHAT}.jinja"
        defects.warn(other, f"{expected} beside it, which chats are written with: there is no chat")
    texts = {name: root.text(path) for name, path in paths.items()}
    with naming(paths.get(CHAT, files.folder / CONFIG_FILE), "no chat template"):
        ChatTemplate.of(files, texts)
