"""Documents packed one after another into a sequence."""

import torch
from torch import Tensor


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position of the document that each position belongs to.

    document_ids: (B, S) integers; a document is a run of equal ids. Returns two (B, S) int32 tensors, neither of which
    ever decreases along the sequence.
    """
    batch, sequence = document_ids.shape
    positions = torch.arange(sequence, device=document_ids.device).expand(batch, -1)
    border = document_ids[:, 1:] != document_ids[:, :-1]
    edge = border.new_ones(batch, 1)
    starts = torch.where(torch.cat([edge, border], 1), positions, 0).cummax(1).values
    ends = torch.where(torch.cat([border, edge], 1), positions, sequence).flip(1).cummin(1).values.flip(1)
    return starts.to(torch.int32), ends.to(torch.int32)
