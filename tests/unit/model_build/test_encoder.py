"""The packed forward pass, the names of its weights, and the kinds of its linear layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

import torch

from nermill.model_build.families import translate, untranslate
from nermill.model_build.int8 import quantize, quantize_linear, quantize_module
from nermill.worker.engine.encoder import MASKED, Architecture, Encoder, build
from nermill.worker.engine.layers import ACTIVATIONS, Attention, FusedAttention, Linear, OneDnnLinear, fuse

SIZES = Architecture(50, 40, 2, 16, 16, 2, 4, 32, 5, "gelu", 1e-12)


def random_weights(sizes: Architecture) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = Encoder(sizes)
    weights = {name: torch.randn_like(tensor) * 0.3 for name, tensor in model.state_dict().items()}
    weights["types.weight"] = torch.stack([weights.pop("first_type"), torch.zeros(sizes.embedding)])
    return weights


def test_names_go_to_a_checkpoint_and_back() -> None:
    weights = random_weights(SIZES)
    theirs = untranslate(weights, SIZES.layers)
    assert theirs["bert.encoder.layer.1.attention.self.key.weight"].shape == (16, 16)
    assert theirs["classifier.weight"].shape == (5, 16)
    ours = translate(dict(theirs), "bert", SIZES.layers, "here")
    assert ours.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(ours[name], tensor), name


def test_checkpoints_of_2018_say_gamma_and_beta() -> None:
    weights = random_weights(SIZES)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in untranslate(weights, SIZES.layers).items()
    }
    ours = translate(old, "bert", SIZES.layers, "here")
    assert torch.equal(ours["norm.bias"], weights["norm.bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_windows_of_a_row_do_not_see_each_other(dtype: torch.dtype) -> None:
    model = build(SIZES, random_weights(SIZES)).to(dtype)
    ids = torch.randint(1, 50, (1, 30))
    lengths = (7, 11, 9)
    segments = torch.zeros(1, 30, dtype=torch.int64)
    positions = torch.zeros(1, 30, dtype=torch.int64)
    spans = [(sum(lengths[:n]), sum(lengths[: n + 1])) for n in range(3)]
    for number, (start, end) in enumerate(spans, 1):
        segments[0, start:end] = number
        positions[0, start:end] = torch.arange(end - start)
    packed = model(ids, segments, positions)
    assert packed.dtype == torch.float32
    assert torch.isfinite(packed).all()
    for start, end in spans:
        alone = model(ids[:, start:end], torch.ones(1, end - start, dtype=torch.int64), positions[:, start:end])
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
        torch.testing.assert_close(packed[:, start:end], alone, atol=tolerance, rtol=0)


def test_flops_are_those_of_the_roofline() -> None:
    """facts: 0.604 GFLOP a token in products of BERT-large, and 98 kFLOP times the length in attention."""
    large = Architecture(28_996, 512, 2, 1024, 1024, 24, 16, 4096, 9, "gelu", 1e-12)
    assert large.flops_of_token(0) == pytest.approx(0.604e9, rel=1e-3)
    assert large.flops_of_token(512) - large.flops_of_token(0) == pytest.approx(98e3 * 512, rel=5e-3)
    assert replace(large, layers=12).flops_of_token(64) < large.flops_of_token(64)


def test_quantized_weights_are_within_half_a_step() -> None:
    weight = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    weight[:, 3] = 0
    values, scale = quantize(weight, 0, 64)
    assert np.abs(values).max() == 64
    assert (np.abs(values * scale - weight) <= scale / 2 + 1e-7).all()


def test_one_loud_token_leaves_the_others_as_they_are() -> None:
    linear = Linear(16, 8).requires_grad_(False)
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)
    quantized = quantize_linear(linear)
    x = torch.randn(1, 6, 16)
    loud = x.clone()
    loud[0, 2] *= 1000
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(quantized(x)[0, kept], quantized(loud)[0, kept])
    assert (quantized(x) - linear(x)).abs().max() < 0.15


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
def test_weights_laid_out_for_onednn_answer_the_same(activation: str) -> None:
    torch.manual_seed(4)
    linear = Linear(24, 40, activation).requires_grad_(False)
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)
    laid_out = OneDnnLinear(linear)
    for rows in (1, 7, 300):
        x = torch.randn(2, rows, 24)
        torch.testing.assert_close(laid_out(x), linear(x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_attention_answers_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}[dtype]
    scale = 8**-0.5
    qkv = torch.randn(3, 24, 96, dtype=dtype)
    segments = torch.arange(24)[None] // 7
    packed = (segments[:, None, :, None] - segments[:, None, None, :]).abs().clamp(max=1).to(dtype) * MASKED
    padded = (torch.arange(24) >= 20)[None, None, None].to(dtype) * MASKED
    for bias in (packed, padded):
        torch.testing.assert_close(
            FusedAttention(4, scale)(qkv, bias), Attention(4, scale)(qkv, bias), atol=tolerance, rtol=tolerance
        )


@needs_onednn
def test_a_cpu_computes_in_the_fused_forms() -> None:
    def kinds(dtype: torch.dtype) -> set[type]:
        model = build(SIZES, random_weights(SIZES)).to(dtype)
        fuse(model, torch.device("cpu"))
        return {type(module) for module in model.modules()}

    assert {Linear, Attention}.isdisjoint(kinds(torch.float32))
    assert {Linear, FusedAttention} <= kinds(torch.float16)  # oneDNN has no float16 on most processors


def test_attention_of_an_int8_model_is_not_fused() -> None:
    model = build(SIZES, random_weights(SIZES))
    quantize_module(model)
    fuse(model, torch.device("cpu"))
    assert not any(isinstance(layer, FusedAttention) for layer in model.modules())
