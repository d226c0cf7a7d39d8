"""Weights of others give the logits of others."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.gpt import GPT
from models.pretrained import load_gpt2, load_nanogpt

TOKENS = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(0))


def gpt2(**changed: Any) -> nn.Module:
    """A small GPT-2 of transformers, whose biases and norms are not at their start."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 4}
    peer = GPT2LMHeadModel(GPT2Config(**sizes | changed)).eval()
    for parameter in peer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return peer


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"n_inner": 64},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"layer_norm_epsilon": 0.1},
        {"tie_word_embeddings": False},
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ],
    ids=str,
)
def test_gpt2_logits(changed) -> None:
    peer = gpt2(**changed)
    model = load_gpt2(peer.state_dict(), peer.config)
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), peer(TOKENS).logits, atol=1e-4, rtol=0)
        losses = model(TOKENS[:, :-1], TOKENS[:, 1:])
        torch.testing.assert_close(losses.mean(), peer(TOKENS, labels=TOKENS).loss, atol=1e-4, rtol=0)


def test_gpt2_without_its_head_and_with_old_mask_buffers() -> None:
    peer = gpt2()
    weights = peer.transformer.state_dict() | {"h.0.attn.bias": torch.ones(1, 1, 20, 20)}
    weights["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    with torch.no_grad():
        torch.testing.assert_close(load_gpt2(weights, peer.config)(TOKENS), peer(TOKENS).logits, atol=1e-4, rtol=0)


def test_loaded_weights_are_copies() -> None:
    peer = gpt2()
    model = load_gpt2(peer.state_dict(), peer.config)
    with torch.no_grad():
        before = model(TOKENS)
        peer.transformer.wte.weight.zero_()
        assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation_function": "relu"}, "^activation_function must be one of gelu, gelu_new, .* got 'relu'"),
        ({"n_inner": 65}, "^n_inner must be a multiple of n_embd = 32, got 65"),
        ({"scale_attn_weights": False}, "^scale_attn_weights must be true"),
        ({"scale_attn_by_inverse_layer_idx": True}, "^scale_attn_by_inverse_layer_idx must be false"),
        ({"add_cross_attention": True}, "^add_cross_attention must be false"),
        ({"attn_pdrop": 0.3}, r"^embd_pdrop, attn_pdrop and resid_pdrop must be equal, got \[0.1, 0.3\]"),
    ],
)
def test_a_gpt2_we_cannot_represent_is_refused(changed, message) -> None:
    from transformers import GPT2Config

    with pytest.raises(ValueError, match=message):
        load_gpt2({}, GPT2Config(n_embd=32, n_head=4, **changed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer.h.1.ln_2.bias"), r"missing are \['h.1.ln_2.bias'\], unknown are \[\]"),
        (lambda w: w.update({"transformer.h.2.ln_2.bias": torch.zeros(32)}), r"unknown are \['h.2.ln_2.bias'\]"),
        (
            lambda w: w.update({"transformer.wpe.weight": torch.zeros(19, 32)}),
            r"^wpe.weight must have shape \(20, 32\) by the config, got \(19, 32\)",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(61, 32)}),
            "^lm_head.weight differs from wte.weight, yet the config ties them",
        ),
    ],
    ids=["missing", "unknown", "shape", "head"],
)
def test_weights_that_do_not_fit_are_refused(change, message) -> None:
    peer = gpt2()
    weights = dict(peer.state_dict())
    change(weights)
    with pytest.raises(ValueError, match=message):
        load_gpt2(weights, peer.config)


class NanoGPT(nn.Module):
    """nanoGPT's module tree and arithmetic."""

    def __init__(self, n_layer: int, n_head: int, n_embd: int, block_size: int, bias: bool, vocab_size: int) -> None:
        super().__init__()
        self.heads = n_head

        def block() -> nn.ModuleDict:
            attention = {
                "c_attn": nn.Linear(n_embd, 3 * n_embd, bias=bias),
                "c_proj": nn.Linear(n_embd, n_embd, bias=bias),
            }
            mlp = {
                "c_fc": nn.Linear(n_embd, 4 * n_embd, bias=bias),
                "c_proj": nn.Linear(4 * n_embd, n_embd, bias=bias),
            }
            norms = {"ln_1": nn.LayerNorm(n_embd, bias=bias), "ln_2": nn.LayerNorm(n_embd, bias=bias)}
            return nn.ModuleDict(norms | {"attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)})

        embeddings = {"wte": nn.Embedding(vocab_size, n_embd), "wpe": nn.Embedding(block_size, n_embd)}
        layers = {"h": nn.ModuleList(block() for _ in range(n_layer)), "ln_f": nn.LayerNorm(n_embd, bias=bias)}
        self.transformer = nn.ModuleDict(embeddings | layers)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))

    def forward(self, tokens: Tensor) -> Tensor:
        batch, sequence = tokens.shape
        x = self.transformer.wte(tokens) + self.transformer.wpe(torch.arange(sequence))
        for block in self.transformer.h:
            q, k, v = (
                part.view(batch, sequence, self.heads, -1).transpose(1, 2)
                for part in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2)
            )
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attn.c_proj(attended.transpose(1, 2).reshape(x.shape))
            x = x + block.mlp.c_proj(functional.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(self.transformer.ln_f(x))


def nanogpt_checkpoint(prefix: str = "", bias: bool = False) -> tuple[NanoGPT, dict[str, Any]]:
    torch.manual_seed(0)
    arguments = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 20, "bias": bias, "vocab_size": 61}
    peer = NanoGPT(**arguments)
    weights = {prefix + name: tensor for name, tensor in peer.state_dict().items()}
    return peer, {"model": weights, "model_args": arguments | {"dropout": 0.2}, "iter_num": 7, "config": {}}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_logits(prefix, bias, tmp_path) -> None:
    peer, checkpoint = nanogpt_checkpoint(prefix, bias)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    model = load_nanogpt(torch.load(tmp_path / "ckpt.pt", weights_only=True))
    assert not model.training
    assert model.config.dropout == 0.2
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), peer(TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model_args"), r"^checkpoint must hold 'model_args', .* it holds \['config', 'iter_num'"),
        (lambda c: c["model_args"].update(n_experts=8), r"^model_args must be nanoGPT's: unknown are \['n_experts'\]"),
        (lambda c: c["model_args"].pop("bias"), r"missing are \['bias'\]"),
        (lambda c: c["model_args"].update(bias=True), r"missing are \['ln_f.bias', 'h.0.ln_1.bias'"),
        (lambda c: c["model_args"].update(block_size=8), r"^wpe.weight must have shape \(8, 32\)"),
    ],
    ids=["no arguments", "unknown argument", "missing argument", "bias", "context"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, message) -> None:
    _, checkpoint = nanogpt_checkpoint()
    change(checkpoint)
    with pytest.raises(ValueError, match=message):
        load_nanogpt(checkpoint)


def test_a_loaded_model_can_be_trained_on() -> None:
    peer = gpt2()
    model: GPT = load_gpt2(peer.state_dict(), peer.config).train()
    model(TOKENS, TOKENS).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
