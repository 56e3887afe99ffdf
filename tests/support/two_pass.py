"""The uncached two-pass computation over PEFT's plain LoRA layers: the oracle for families that PEFT's X-LoRA refuses.

PEFT loads base and adapters; the gate, which its LoRA layers have not, is applied around their own A, B and scaling.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from service.checkpoint import XLoraConfig


class TwoPassOracle:
    """Layerwise scalings with softmax only: what the bundles of tests/model/loading/test_families.py have."""

    def __init__(self, bundle: Path) -> None:
        manifest = json.loads((bundle / "bundle.json").read_text())
        self.config = XLoraConfig.from_dict(json.loads((bundle / "classifier/xlora_config.json").read_text()), bundle)
        assert self.config.layerwise_scalings
        assert self.config.enable_softmax
        base = AutoModelForCausalLM.from_pretrained(bundle / "base", dtype=torch.float32, attn_implementation="eager")
        folders = [bundle / expert["path"] for expert in manifest["experts"]]
        model = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
        for number, folder in enumerate(folders[1:], 1):
            model.load_adapter(folder, adapter_name=str(number))
        self.model = model.eval().get_base_model()
        self.gate: Tensor | None = None  # [T, S, E]
        self.layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        for number, layer in enumerate(self.layers):
            layer.forward = self._gated(layer, number)  # type: ignore[attr-defined]
        self.experts = len(folders)
        self.classifier = self._classifier(load_file(bundle / "classifier/xlora_classifier.safetensors"))

    @torch.inference_mode()
    def forward(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Returns logits [T, V] and scalings [T, S, E]."""
        ids = torch.tensor([tokens])
        self.gate = torch.full((len(tokens), len(self.layers), self.experts), self.config.scaling_pass_value)
        hidden = self.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0]
        logits = self.classifier(hidden).view(len(tokens), len(self.layers), self.experts)
        self.gate = logits.softmax(-1)
        return self.model(input_ids=ids, use_cache=False).logits[0], self.gate

    def _gated(self, layer: Any, number: int) -> Any:
        def forward(x: Tensor) -> Tensor:
            y = layer.base_layer(x)
            for e in range(self.experts):
                weight = self.gate[:, number, e, None] * layer.scaling.get(str(e), 0.0)  # type: ignore[index]
                if str(e) in layer.lora_A:
                    y = y + weight * layer.lora_B[str(e)](layer.lora_A[str(e)](x))
                elif str(e) in layer.lora_embedding_A:
                    narrow, scale = layer._embed(x, layer.lora_embedding_A[str(e)].T), layer._get_embed_scale()
                    y = y + weight * (narrow @ layer.lora_embedding_B[str(e)].T) * (1.0 if scale is None else scale)
            return y

        return forward

    def _classifier(self, tensors: dict[str, Tensor]) -> nn.Module:
        inner = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("inner.")})
        layers: list[nn.Module] = []
        for prefix in [*(f"inner.{number}" for number in inner), "last"]:
            weight = tensors[f"{prefix}.weight"]
            layers += [nn.Linear(weight.shape[1], weight.shape[0]), nn.ReLU()]
            layers[-2].load_state_dict({"weight": weight, "bias": tensors[f"{prefix}.bias"]})
        return nn.Sequential(*layers[:-1])
