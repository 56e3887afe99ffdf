"""A folder -> Manifest, by what lies in it: our bundle, PEFT's save, or the original library's.

Knows which file marks which layout. The rest of the program does not know which one it was.
"""

from __future__ import annotations

from service.checkpoint.defects import Defects, defect
from service.checkpoint.formats import manifest, original_layout, peft_layout
from service.checkpoint.formats.manifest import Manifest
from service.checkpoint.formats.ordering import Ordering
from service.checkpoint.weights import lora
from service.checkpoint.weights.files import BundleRoot


def read_manifest(root: BundleRoot, ordering: Ordering | None, defects: Defects, *, rescue: bool) -> Manifest:
    """Read the folder's own description. `ordering` replaces the order of experts and sites that it has.

    `rescue` lets damage be undone where the files still allow it (PEFT's lost classifier tensors).
    """
    if not root.path.is_dir():
        raise defect(root.path, "expected a bundle folder, found " + ("a file" if root.path.exists() else "nothing"))
    marks = {name: (root.path / name).exists() for name in (manifest.FILE_NAME, original_layout.FILE_NAME)}
    if marks[manifest.FILE_NAME]:
        found = manifest.read_bundle_manifest(root, defects)
        return ordering.apply(found) if ordering else found
    if marks[original_layout.FILE_NAME]:
        return original_layout.read_original_manifest(root, ordering)
    if (root.path / lora.CONFIG_FILE).exists():
        return peft_layout.read_peft_manifest(root, ordering, rescue=rescue)
    hint = "a bundle has bundle.json, a PEFT save adapter_config.json, one of the original library xlora_config.json"
    if (root.path / "config.json").exists():
        raise defect(root.path, "expected an X-LoRA checkpoint, found a plain model", hint)
    raise defect(root.path / manifest.FILE_NAME, "expected a file, found nothing", hint)
