"""Initial weights keyed by seed and parameter name: what two variants share starts bit-identical."""

from hashlib import blake2b

import torch
from torch import Tensor, nn


def initialise(model: nn.Module, seed: int) -> None:
    """Set every parameter of a model on the CPU. Neither reads nor moves PyTorch's global generator.

    A weight depends on the seed, its own name and its shape, so neither on the order in which modules are built, nor on
    what other modules there are. On the meta device, where tensors have no values, nothing is drawn.
    """
    for path, module in model.named_modules():
        if hasattr(module, "initialise"):

            def draw(tensor: Tensor, name: str, standard_deviation: float, path: str = path) -> None:
                if tensor.is_meta:
                    return
                generator = torch.Generator().manual_seed(_key(f"{seed}/{path}.{name}"))
                # Drawn as unit float32 and then scaled, so that the bits agree for any layout, depth and dtype.
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * standard_deviation)

            module.initialise(draw)
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"{path} ({type(module).__name__}) holds parameters but defines no initialise(draw)")


def _key(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
