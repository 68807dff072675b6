"""What an encoder is made of, in the forms that devices like.

``Linear`` and ``Attention`` are plain operators, which every compiler takes. Where torch itself computes, the engine
puts a faster form of the same in their place: ``OneDnnLinear``, ``Int8Linear``, ``FusedAttention``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
# the same for oneDNN: its operation and that operation's algorithm
_ONEDNN = {
    "": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
Kind = TypeVar("Kind", bound=nn.Module)

TOKEN_RANGE = 127
SMALLEST = 1e-10  # absolute maximum of a token that is all zeros


class Linear(nn.Module):
    """``activation(x @ weight + bias)``; the weight is (inputs, outputs), and so it reaches a graph by its name."""

    def __init__(self, inputs: int, outputs: int, activation: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return activate(x @ self.weight + self.bias, self.activation)


class OneDnnLinear(nn.Module):
    """``Linear`` in float32 on a CPU, its weight in the order in which oneDNN reads it, its activation fused.

    The two operators are those that torch's own compiler emits for frozen weights; they are not public. In torch 2.13
    on an AMD EPYC a product of 1,024 tokens takes a fifth to a quarter less time than ``x @ weight + bias``.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().t().contiguous())
        self.bias = linear.bias.detach()
        self.operation, self.algorithm = _ONEDNN[linear.activation]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.operation, [], self.algorithm)
        return y


class Int8Linear(nn.Module):
    """``Linear`` with int8 weights, one scale a column, and activations quantized with one scale a token."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor, activation: str = "") -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        step = rows.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / TOKEN_RANGE
        product = torch._int_mm((rows / step).round().to(torch.int8), self.weight)
        return activate((product * step * self.scale + self.bias).unflatten(0, x.shape[:-1]), self.activation)


class Attention(nn.Module):
    """Scaled dot-product attention of several heads; ``scale`` is one over the root of a head's width."""

    def __init__(self, heads: int, scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale

    def forward(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """What each token sees, (rows, length, hidden).

        Args:
            qkv: Query, key and value side by side, (rows, length, 3 × hidden).
            bias: Added to every score, (rows, 1, length or 1, length); None where every token sees its whole row.
        """
        query, key, value = self.split(qkv)
        scores = (query * self.scale) @ key.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)

    def split(self, qkv: Tensor) -> list[Tensor]:
        """Query, key and value, (rows, heads, length, hidden ÷ heads) each."""
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)]


class FusedAttention(Attention):
    """``Attention`` in torch's own kernel, which does not hold the scores of all heads.

    BERT-large on a CPU in rows of 512 takes a third less time with it, in rows of 64 the same.
    """

    def forward(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """As ``Attention.forward``."""
        query, key, value = self.split(qkv)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
        return seen.transpose(1, 2).flatten(-2)


def activate(x: Tensor, activation: str) -> Tensor:
    """``x`` through one of ``ACTIVATIONS``; as it is where the name is empty."""
    return ACTIVATIONS[activation](x) if activation else x


def replace(model: nn.Module, kind: type[Kind], form: Callable[[Kind], nn.Module]) -> None:
    """Puts ``form(layer)`` in the place of every layer of a kind, one by one: no two copies of all weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, form(child))


def empty_int8(linear: Linear) -> Int8Linear:
    """The int8 form of a layer on torch's meta device, to load weights into."""
    inputs, outputs = linear.weight.shape
    return Int8Linear(
        torch.empty(inputs, outputs, dtype=torch.int8, device="meta"),
        torch.empty(1, outputs, device="meta"),
        torch.empty(outputs, device="meta"),
        linear.activation,
    )


def fuse(model: nn.Module, device: torch.device) -> None:
    """Replaces an encoder's layers by faster forms that torch has for a CPU or a CUDA device.

    The fused kernel sums a token's attention in an order that depends on where its window lies in the row. That is
    rounding, unless int8 makes a step of it: there attention stays as it is.
    """
    is_int8 = any(isinstance(layer, Int8Linear) for layer in model.modules())
    if device.type in ("cpu", "cuda") and not is_int8:
        replace(model, Attention, lambda plain: FusedAttention(plain.heads, plain.scale))
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        replace(model, Linear, lambda plain: OneDnnLinear(plain) if plain.weight.dtype == torch.float32 else plain)
