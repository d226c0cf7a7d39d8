"""Causal attention by us and by our peers, all as functions of q (B, H, S, D), k and v (B, H_kv, S, D)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import kernels
from bench.speed.contest import NotHere

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Make = Callable[[int, torch.device], Attention]


@dataclass(frozen=True)
class Contestant:
    """`make` prepares the function for a sequence length and a device, and raises where it cannot."""

    name: str
    title: str  # of a table's column
    make: Make
    device: str | None = None  # the only type of device it is measured on
    backward_only: bool = False  # its forward pass is that of another contestant


def ours(sequence: int, device: torch.device) -> Attention:
    return lambda q, k, v: kernels.flash_attention(q, k, v)


def ours_any_order(sequence: int, device: torch.device) -> Attention:
    """Ours where sums may change their order from run to run, as they may in the peers' backward passes."""
    if kernels.backend.choose("flash_attention", device) != "triton":
        raise NotHere("only our Triton kernels sum in any order")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with kernels.backend.use("auto", deterministic=False):
            return kernels.flash_attention(q, k, v)

    return attention


def sdpa(backend: SDPBackend) -> Make:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return lambda sequence, device: attention


def flex_attention(sequence: int, device: torch.device) -> Attention:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # one function may be compiled eight times only
    torch._functorch.config.donated_buffer = False  # refuses to run a backward pass twice after one forward pass
    mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, sequence, sequence, device=device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def flash_attention_4(sequence: int, device: torch.device) -> Attention:
    try:
        from flash_attn.cute import flash_attn_func
    except ModuleNotFoundError as error:
        raise NotHere(f"{error.name} is not installed; it comes with the package flash-attn-4") from None

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = flash_attn_func(*(tensor.transpose(1, 2) for tensor in (q, k, v)), causal=True)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return attention


CONTESTANTS = (
    Contestant("ours", "ours", ours),
    Contestant("ours_any_order", "any order", ours_any_order, backward_only=True),
    Contestant("cudnn", "cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION), device="cuda"),
    Contestant("flash_attention_2", "FA2", sdpa(SDPBackend.FLASH_ATTENTION), device="cuda"),
    Contestant("flash_attention_4", "FA4", flash_attention_4, device="cuda"),
    Contestant("flex_attention", "Flex", flex_attention, device="cuda"),
    Contestant("sdpa_flash", "SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION), device="cpu"),
    Contestant("sdpa_math", "SDPA math", sdpa(SDPBackend.MATH), device="cpu"),
)
