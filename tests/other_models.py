"""Ten well-known models of timm and Hugging Face, with random weights: which are cut, and why others are not.

    pip install timm transformers  # into an environment of its own: nothing else here needs them
    python tests/other_models.py  # reports/other_models.csv

The columns are torchvision_models.py's. Hugging Face's models return several things: a module around each returns its
logits.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torchvision_models import COLUMNS, answers

import memdfa_lab as ml

TABLE = Path(__file__).parents[1] / "reports" / "other_models.csv"
TIMM = ["resnet50d", "vit_tiny_patch16_224", "mixer_s32_224", "convnextv2_atto", "mobilenetv4_conv_small"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 10}
HUGGING_FACE: dict[str, Callable[[], nn.Module]] = {
    "ResNetForImageClassification": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=10)),
    "ViTForImageClassification": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=32)),
    "BertForSequenceClassification": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=100)),
    "GPT2LMHeadModel": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100)),
    "LlamaForCausalLM": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, vocab_size=100)),
}


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def rows() -> list[list[object] | None]:
    """Return the lines of the table."""
    found = []
    for name in TIMM:
        size = 224 if name.startswith(("vit", "mixer")) else 64
        model = timm.create_model(name, num_classes=10)
        found.append([f"timm {name}", size, *(answers(model, torch.randn(2, 3, size, size), torch.arange(2)) or [])])
    for name, make in HUGGING_FACE.items():
        images, words = torch.randn(2, 3, 32, 32), torch.randint(100, (2, 8))
        x, y = (images, torch.arange(2)) if "Image" in name else (words, torch.arange(2))
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
        if "LM" in name:
            y, loss = torch.randint(100, (2, 8)), ml.losses.token_cross_entropy
        found.append(
            [f"Hugging Face {name}", "32" if x is images else "8 words", *(answers(Logits(make()), x, y, loss) or [])]
        )
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows()])
