"""Finds a model's parts by the names a config gives them.

The part called NAME of kind KIND is the one module class that models/KIND/NAME.py defines. Its constructor takes the
ModelConfig, then the part's options as keyword-only arguments with defaults. So a new part is a new file, and no list.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.config import ModelConfig, PartSpec


def build_part(kind: str, config: ModelConfig) -> nn.Module:
    """A new part of the kind (`position`, `norm`, `mlp`, `attention`) that the config names."""
    name, options = _read_spec(kind, getattr(config, kind))
    return find_part(kind, name)(config, **options)


def check_part(kind: str, spec: PartSpec) -> None:
    """Raise ValueError when a spec is malformed, names a part or option that is not there, or has a wrong type."""
    name, options = _read_spec(kind, spec)
    known = part_options(kind, name)
    for option, value in options.items():
        if option not in known:
            listed = f"its options are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{kind}: {name!r} has no option {option!r}; {listed}")
        check_type(f"{kind}: {option}", value, type(known[option]))


def check_type(name: str, value: Any, expected: type) -> None:
    """Raise ValueError unless the value has the type. An int is a fine float; a bool is no int."""
    accepted = (int, float) if expected is float else expected
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{name} must be of type {expected.__name__}, got {value!r}")


def part_names(kind: str) -> list[str]:
    """The names that a kind of part can have: the files of its folder."""
    package = importlib.import_module(f"models.{kind}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def part_options(kind: str, name: str) -> dict[str, Any]:
    """A part's options and their defaults."""
    parameters = inspect.signature(find_part(kind, name)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def find_part(kind: str, name: str) -> type[nn.Module]:
    """The class of a part. Raises ValueError for an unknown name."""
    from torch import nn

    if name not in part_names(kind):
        raise ValueError(f"{kind} must be one of {', '.join(part_names(kind))}, got {name!r}")
    module = importlib.import_module(f"models.{kind}.{name}")
    defined = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    ]
    if len(defined) != 1:
        raise TypeError(f"models/{kind}/{name}.py must define one torch module, it defines {len(defined)}")
    return defined[0]


def find_attention_kernel(name: str) -> Callable[..., Tensor]:
    """kernels.NAME_attention. Raises ValueError for an unknown name."""
    import kernels

    names = sorted(public.removesuffix("_attention") for public in kernels.__all__ if public.endswith("_attention"))
    if name not in names:
        raise ValueError(f"attention_kernel must be one of {', '.join(names)}, got {name!r}")
    return getattr(kernels, f"{name}_attention")


def _read_spec(kind: str, spec: PartSpec) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        return spec["name"], {option: value for option, value in spec.items() if option != "name"}
    raise ValueError(f"{kind} must be a name or a mapping with a 'name', got {spec!r}")
