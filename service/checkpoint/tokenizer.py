"""What the base's folder has for text: the tokenizer and the chat template. Read here as serving reads them.

Knows the files and what opens them. Encodes and renders nothing.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from service.chat_template import CONFIG_FILE, TEMPLATE_FILE, ChatTemplate
from service.checkpoint.defects import Defects, naming
from service.checkpoint.weights.files import BundleRoot

FAST_TOKENIZER = "save the base with a fast tokenizer: AutoTokenizer(...).save_pretrained"


def check_tokenizer(root: BundleRoot, folder: Path, defects: Defects) -> None:
    """Reports a tokenizer.json or a chat template that serving could not open."""
    with defects.guard():
        path = root.file(folder / "tokenizer.json", FAST_TOKENIZER)
        root.json(path)
        with naming(path, "no tokenizer", FAST_TOKENIZER):
            Tokenizer.from_file(str(path))
    with defects.guard():
        _check_chat_template(root, folder)


def _check_chat_template(root: BundleRoot, folder: Path) -> None:
    config_path, template_path = folder / CONFIG_FILE, folder / TEMPLATE_FILE
    config = root.json(config_path) if config_path.exists() else {}
    text = root.text(template_path) if template_path.exists() else None
    with naming(config_path if text is None else template_path, "no chat template"):
        ChatTemplate.of(config, text)
