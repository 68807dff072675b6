"""The forward pass: a BERT-family encoder for token classification over packed rows, in plain torch.

One graph whatever version of transformers is installed, one place for the mask constant, one tensor out.
Rows hold many windows one behind another; tokens see those of their own segment alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nermill.worker.contracts.manifest import Layout
from nermill.worker.engine.layers import Attention, Linear, empty_int8, replace

MASKED = -10_000.0  # dominates every score, and float16 holds it: no infinity, no NaN (fp32's minimum has both there)


@dataclass(frozen=True)
class Architecture:
    """Sizes of an encoder.

    Attributes:
        vocabulary, positions, types: Rows of the embedding tables; ``types`` is 0 where there is no such table.
        embedding: Width of the embeddings; projected to ``hidden`` where it differs (ELECTRA).
        hidden, layers, heads, intermediate: Of the encoder.
        labels: Logits of each token.
        activation: Key of ``nermill.worker.engine.layers.ACTIVATIONS``.
        epsilon: Of the layer norms.
        position_offset: Position id of a window's first token.
    """

    vocabulary: int
    positions: int
    types: int
    embedding: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    labels: int
    activation: str
    epsilon: float
    position_offset: int = 0

    def flops_of_token(self, length: int) -> int:
        """Floating-point operations for one token of a row of ``length`` tokens, matrix products alone."""
        dense = 4 * self.hidden**2 + 2 * self.hidden * self.intermediate
        attention = 2 * self.hidden * length
        return 2 * self.layers * (dense + attention) + 2 * self.hidden * self.labels


class Layer(nn.Module):
    """Self-attention within segments, then the feed-forward block; each with its residual and layer norm."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.qkv = Linear(a.hidden, 3 * a.hidden)
        self.attention = Attention(a.heads, (a.hidden // a.heads) ** -0.5)
        self.attended = Linear(a.hidden, a.hidden)
        self.attended_norm = nn.LayerNorm(a.hidden, a.epsilon)
        self.wide = Linear(a.hidden, a.intermediate, a.activation)
        self.narrow = Linear(a.intermediate, a.hidden)
        self.narrow_norm = nn.LayerNorm(a.hidden, a.epsilon)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = self.attended_norm(x + self.attended(self.attention(self.qkv(x), bias)))
        return self.narrow_norm(x + self.narrow(self.wide(x)))


class Encoder(nn.Module):
    """The packed forward: ``(input_ids, segments, position_ids)``, each integer (rows, length), to logits.

    The logits are float32, (rows, length, labels). Every token is of type 0, as in any task on one text.
    """

    inputs: tuple[str, ...] = ("input_ids", "segments", "position_ids")
    masked: float = MASKED

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.position_offset = a.position_offset
        self.words = nn.Embedding(a.vocabulary, a.embedding)
        self.positions = nn.Embedding(a.positions, a.embedding)
        self.first_type = nn.Parameter(torch.empty(a.embedding)) if a.types else None
        self.norm = nn.LayerNorm(a.embedding, a.epsilon)
        self.project = Linear(a.embedding, a.hidden) if a.embedding != a.hidden else None
        self.layers = nn.ModuleList(Layer(a) for _ in range(a.layers))
        self.classifier = Linear(a.hidden, a.labels)

    def forward(self, input_ids: Tensor, segments: Tensor, position_ids: Tensor) -> Tensor:
        """Logits of packed rows."""
        # 0 within a segment, MASKED across: arithmetic alone, which every compiler takes, unlike a comparison
        apart = (segments[:, None, :, None] - segments[:, None, None, :]).abs().clamp(max=1)
        return self.encode(input_ids, self.positions(position_ids), self.first_type, apart)

    def encode(self, input_ids: Tensor, positions: Tensor, types: Tensor | None, apart: Tensor | None) -> Tensor:
        """Logits from ids, embedded positions and types, and 1 where a token must not see another, else 0.

        Without ``apart`` every token sees its whole row.
        """
        x = self.words(input_ids) + positions
        if types is not None:
            x = x + types
        x = self.norm(x)
        if self.project is not None:
            x = self.project(x)
        bias = apart.to(x.dtype) * self.masked if apart is not None else None
        for layer in self.layers:
            x = layer(x, bias)
        return self.classifier(x).float()

    def row_positions(self, input_ids: Tensor) -> Tensor:
        """Embedded positions of rows that hold one window each, (length, embedding)."""
        return self.positions.weight[self.position_offset : self.position_offset + input_ids.shape[1]]


class PlainEncoder(Encoder):
    """The recipe's contract: ``(input_ids, attention_mask, token_type_ids)`` to logits, one window a row."""

    inputs = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, a: Architecture) -> None:
        super().__init__(a)
        self.first_type = None
        self.types = nn.Embedding(a.types, a.embedding) if a.types else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Logits of padded rows; positions count from the row's beginning."""
        types = self.types(token_type_ids) if self.types is not None else None
        return self.encode(input_ids, self.row_positions(input_ids), types, 1 - attention_mask[:, None, None, :])


class EqualEncoder(Encoder):
    """``(input_ids,)`` to logits: each row is one whole window, so nothing is masked."""

    inputs = ("input_ids",)

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        """Logits of rows of equal length; positions count from the row's beginning."""
        return self.encode(input_ids, self.row_positions(input_ids), self.first_type, None)


_ENCODERS: dict[Layout, type[Encoder]] = {"packed": Encoder, "plain": PlainEncoder, "equal": EqualEncoder}


def build(a: Architecture, weights: dict[str, Tensor], *, layout: Layout = "packed", int8: bool = False) -> Encoder:
    """An encoder with its weights, ready to run; the tensors are taken over, not copied.

    Args:
        a: Its sizes.
        weights: By the names of this module's parameters; emptied on the way.
        layout: What its rows are; see ``nermill.worker.contracts.manifest.Manifest``.
        int8: The weights of linear layers are int8, each with its scale.
    """
    with torch.device("meta"):
        model = _ENCODERS[layout](a)
    if int8:
        replace(model, Linear, empty_int8)
    if "types.weight" in weights and layout != "plain":  # a checkpoint's table; these need its first row alone
        weights["first_type"] = weights.pop("types.weight")[0].clone()
    model.load_state_dict(weights, assign=True)
    weights.clear()
    model.eval().requires_grad_(False)
    return model
