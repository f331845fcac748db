"""LoRA (arXiv 2106.09685): small trained matrices beside frozen ones of the language model, through the peft library.

A layer W becomes W + alpha / rank * B A, with B = 0 at the start. `plain_name` and `merge` take the adapters of a
checkpoint back into W.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fovlm.errors import UserError, did_you_mean, needs

BASE, A, B = ".base_layer.", ".lora_A.default.", ".lora_B.default."  # in names of weights


def add_adapters(llm: PreTrainedModel, rank: int, alpha: float, targets: list[str]) -> None:
    """Freeze a language model and add adapters to its linear layers called `targets`. Raises UserError."""
    with needs("model.lora", "peft>=0.17"):
        from peft import LoraConfig, inject_adapter_in_model
    layers = llm.base_model.layers
    linears = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if target not in linears:
            raise UserError(f"model.lora.targets: no linear layer '{target}'{did_you_mean(target, linears)}")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), llm)


def plain_name(name: str) -> str:
    """The name of a weight without adapters."""
    return name.replace(BASE, ".")


def is_adapter(name: str) -> bool:
    """Whether a weight is one of an adapter."""
    return A in name or B in name


def merge(weight: Tensor, a: Tensor, b: Tensor, lora: dict[str, Any]) -> Tensor:
    """The weight f32 [out, in] with its adapter, from A [rank, in] and B [out, rank]."""
    return weight.float() + lora["alpha"] / lora["rank"] * (b.float() @ a.float())
