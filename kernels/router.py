"""Which experts a token goes to, and how experts are kept equally busy: plain PyTorch, differentiable where it can be.

A mixture of experts is `route`, then `sort_by_expert`, whose `order` and `offsets` serve `grouped_gemm`:

    weights, experts = route(logits, k)
    order, offsets = sort_by_expert(experts, count)
    y = grouped_gemm(x[order // k], weight, offsets)
    out = (y[inverse_order(order)].view(tokens, k, -1) * weights[..., None]).sum(1)
"""

import torch
from torch import Tensor

ACTIVATIONS = {"softmax": lambda logits: torch.softmax(logits, -1), "sigmoid": torch.sigmoid}


def route(logits: Tensor, k: int, *, activation: str = "softmax", bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k experts with the highest softmax or sigmoid of their logits.

    Args:
        logits: (tokens, experts).
        k: how many experts a token goes to.
        activation: softmax or sigmoid.
        bias: (experts,), added to choose the experts and not in their weights (Wang et al. 2024, loss-free balancing).

    Returns:
        weights (tokens, k) in float32 or wider, not normalised: DeepSeek-V3 and Mixtral divide them by their sum.
        experts (tokens, k) int64, the highest first.

    Raises:
        ValueError: an argument does not fit.
    """
    if logits.dim() != 2 or not logits.dtype.is_floating_point:
        found = f"{tuple(logits.shape)} {logits.dtype}"
        raise ValueError(f"logits must have the shape (tokens, experts) and a floating dtype, got {found}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k must lie between 1 and the {logits.shape[1]} experts, got {k}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if bias is not None and bias.shape != logits.shape[1:]:
        raise ValueError(f"bias must have the shape ({logits.shape[1]},), got {tuple(bias.shape)}")
    scores = ACTIVATIONS[activation](logits.to(torch.promote_types(logits.dtype, torch.float32)))
    experts = (scores if bias is None else scores + bias).topk(k, -1).indices
    return scores.gather(-1, experts), experts


def balancing_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """experts * sum_e f_e P_e: 1 when all experts are equally busy, higher when they are not.

    f_e is the share of choices that fell on expert e, P_e its mean probability; the gradient goes through P_e alone.

    Args:
        probabilities: (tokens, experts), the softmax of the logits.
        experts: (tokens, k), those chosen.

    Source: Fedus et al. 2021 (Switch Transformer), equations 4 to 6, without the factor alpha.
    """
    count = probabilities.shape[1]
    shares = count_choices(experts, count).to(probabilities.dtype) / experts.numel()
    return count * (shares * probabilities.mean(0)).sum()


def update_bias(bias: Tensor, experts: Tensor, rate: float) -> Tensor:
    """The bias of `route` for the next batch: `rate` higher where an expert was chosen less often than the mean, `rate`
    lower where more often.

    Args:
        bias: (experts,).
        experts: (tokens, k), those chosen in this batch.

    Source: Wang et al. 2024 (loss-free balancing), algorithm 1.
    """
    missing = experts.numel() - bias.shape[0] * count_choices(experts, bias.shape[0])
    return bias.detach() + rate * missing.sign()


def count_choices(experts: Tensor, count: int) -> Tensor:
    """(count,) int64: how often each expert is chosen in `experts`."""
    return (experts.flatten()[:, None] == torch.arange(count, device=experts.device)).sum(0)


def sort_by_expert(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The choices of all tokens sorted by expert, and by token within one.

    Args:
        experts: (tokens, k), each less than `count`.

    Returns:
        order (tokens * k,) int64: the sorted choices, as indices into the flattened `experts`; order // k is the token.
        offsets (count,) int32: where each expert's choices end.
    """
    order = experts.flatten().argsort(stable=True)
    return order, count_choices(experts, count).cumsum(0).to(torch.int32)


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`: where each choice went."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
