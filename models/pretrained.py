"""Weights that others trained, in our GPT: Hugging Face's GPT-2 and nanoGPT's checkpoints.

Both keep GPT-2's names (wte, wpe, h.N.attn.c_attn, ...). Whatever a ModelConfig cannot represent is refused.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.config import ModelConfig
from models.gpt import GPT

GELU_NAMES = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""The MLP part for each of Hugging Face's activation names that we have."""

LAYER_NAMES = {
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.projection",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
"""Our name for each layer of one of GPT-2's blocks."""

MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")
"""Causal masks that older checkpoints saved beside the weights."""

NANOGPT_ARGUMENTS = {
    "n_layer": "layers",
    "n_head": "heads",
    "n_embd": "width",
    "block_size": "context",
    "bias": "bias",
    "vocab_size": "vocabulary_size",
    "dropout": "dropout",
}
"""Our field for each of nanoGPT's `model_args`."""


def load_gpt2(state_dict: Mapping[str, Tensor], config: Any) -> GPT:
    """Our GPT with the weights and the logits (to 1e-4 in float32) of a Hugging Face GPT-2, in evaluation mode.

    state_dict: that of GPT2LMHeadModel or GPT2Model. config: its GPT2Config, or any object with the same attributes.
    Raises ValueError for a config we cannot represent (naming its field) and for weights that do not fit it.
    """
    model = GPT(_gpt2_config(config))
    weights = _strip_prefix(state_dict, "transformer.")
    # Hugging Face's Conv1D keeps its matrices as (inputs, outputs).
    weights = {
        name: tensor.t() if ".c_" in name and name.endswith(".weight") else tensor for name, tensor in weights.items()
    }
    return _load(model, weights)


def load_nanogpt(checkpoint: Mapping[str, Any]) -> GPT:
    """Our GPT with the weights and logits of a nanoGPT checkpoint, in evaluation mode.

    checkpoint: the dict of nanoGPT's ckpt.pt with "model" and "model_args" (`torch.load(path, weights_only=True)`);
    weights of a compiled model ("_orig_mod.") are understood. Raises ValueError for what does not fit.
    """
    for key in ("model", "model_args"):
        if key not in checkpoint:
            raise ValueError(f"checkpoint must hold {key!r}, as nanoGPT's ckpt.pt does; it holds {sorted(checkpoint)}")
    arguments = checkpoint["model_args"]
    unknown, missing = sorted(arguments.keys() - NANOGPT_ARGUMENTS), sorted(NANOGPT_ARGUMENTS.keys() - arguments)
    if unknown or missing:
        raise ValueError(f"model_args must be nanoGPT's: unknown are {unknown}, missing are {missing}")
    fields = {ours: arguments[theirs] for theirs, ours in NANOGPT_ARGUMENTS.items()}
    model = GPT(ModelConfig(**fields, norm="layer_norm", mlp="gelu"))
    return _load(model, _strip_prefix(_strip_prefix(checkpoint["model"], "_orig_mod."), "transformer."))


def _gpt2_config(config: Any) -> ModelConfig:
    if config.activation_function not in GELU_NAMES:
        raise ValueError(
            f"activation_function must be one of {', '.join(GELU_NAMES)}, got {config.activation_function!r}"
        )
    if not config.scale_attn_weights:
        raise ValueError("scale_attn_weights must be true: attention without 1 / sqrt(head size) is not supported")
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(config, name):
            raise ValueError(f"{name} must be false: it is not supported")
    hidden = config.n_inner or 4 * config.n_embd
    if hidden % config.n_embd:
        raise ValueError(f"n_inner must be a multiple of n_embd = {config.n_embd}, got {config.n_inner}")
    dropouts = {config.embd_pdrop, config.attn_pdrop, config.resid_pdrop}
    if len(dropouts) > 1:
        raise ValueError(f"embd_pdrop, attn_pdrop and resid_pdrop must be equal, got {sorted(dropouts)}")
    return ModelConfig(
        vocabulary_size=config.vocab_size,
        context=config.n_positions,
        layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        mlp_ratio=hidden // config.n_embd,
        norm="layer_norm",
        mlp=GELU_NAMES[config.activation_function],
        dropout=config.resid_pdrop,
        bias=True,
        tied_head=config.tie_word_embeddings,
        norm_epsilon=config.layer_norm_epsilon,
        initial_std=config.initializer_range,
    )


def _strip_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def _load(model: GPT, theirs: Mapping[str, Tensor]) -> GPT:
    """Copy weights in GPT-2's names and our orientation into a model, every one exactly once."""
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith(MASK_BUFFERS)}
    if model.config.tied_head:
        head = theirs.pop("lm_head.weight", None)
        if head is not None and not head.equal(theirs.get("wte.weight", head)):
            raise ValueError("lm_head.weight differs from wte.weight, yet the config ties them")
    names = _our_names(model.config.layers)
    ours = {names.get(name, name): tensor for name, tensor in theirs.items()}
    expected = model.state_dict()
    missing = [name for name, our_name in names.items() if our_name in expected and our_name not in ours]
    unknown = sorted(ours.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"the weights do not fit the config: missing are {missing}, unknown are {unknown}")
    for name, our_name in names.items():
        if our_name in expected and ours[our_name].shape != expected[our_name].shape:
            shapes = tuple(expected[our_name].shape), tuple(ours[our_name].shape)
            raise ValueError(f"{name} must have shape {shapes[0]} by the config, got {shapes[1]}")
    model.load_state_dict(ours)
    return model.eval()


def _our_names(layers: int) -> dict[str, str]:
    """Our parameter name for each of GPT-2's, with or without biases, with or without a tied head."""
    modules = {"ln_f": "final_norm"}
    for layer in range(layers):
        modules |= {f"h.{layer}.{theirs}": f"blocks.{layer}.{ours}" for theirs, ours in LAYER_NAMES.items()}
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in modules.items() for kind in ("weight", "bias")}
    return names | {
        "wte.weight": "token_embedding.weight",
        "wpe.weight": "position.embedding.weight",
        "lm_head.weight": "head.weight",
    }
