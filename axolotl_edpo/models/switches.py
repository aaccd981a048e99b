"""Adapters and gradient checkpointing, switched for one forward and back.

PEFT and TRL do it by walks over all modules: each costs a model of 8B parameters tens
of milliseconds of the host, per micro-batch, and sets `requires_grad` of every adapter
weight anew. What a forward reads of it are a few attributes of modules. So a walk is
made once per model, and the attributes are set from then on.

A switch that TRL turns leaves more behind: turning checkpointing on again puts another
hook on the embedding, and checkpoints every layer where only some were.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft import LoraModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from trl.trainer.utils import use_adapter

_CHECKPOINTING = "gradient_checkpointing"


class _Attribute(NamedTuple):
    """An attribute of a module, and the value that it takes."""

    module: weakref.ref
    name: str
    value: Any


class _Recorded(NamedTuple):
    """What PEFT sets for an adapter, and the adapters that there were."""

    adapters: tuple[str, ...]
    attributes: list[_Attribute]


_recorded: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_checkpointed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextmanager
def adapter_in_use(model: PeftModel, name: str | None) -> Iterator[None]:
    """Within it, a PEFT model computes with another adapter, or with none.

    No gradient may be asked for within it: `requires_grad` stays as it is.

    Args:
        model: Its modules are found again if its adapters have other names, or if a
            module is gone.
        name: The adapter; None: the model below all adapters.
    """
    if not isinstance(model.base_model, LoraModel) or _is_merged(model, name):
        with use_adapter(model, adapter_name=name):
            yield
        return
    with _set(_attributes_of(model, name)):
        yield


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Within it, no module of a model checkpoints its activations."""
    modules = _checkpointed.get(model)
    if modules is None or any(module() is None for module in modules):
        modules = [
            weakref.ref(module)
            for module in model.modules()
            if _CHECKPOINTING in vars(module) or hasattr(type(module), _CHECKPOINTING)
        ]
        _checkpointed[model] = modules
    with _set([_Attribute(module, _CHECKPOINTING, False) for module in modules]):
        yield


@contextmanager
def _set(attributes: Sequence[_Attribute]) -> Iterator[None]:
    """Within it, modules have these attributes; then those that they had."""
    before = []
    for module, name, value in attributes:
        own: Any = module()
        before.append((vars(own), name, getattr(own, name)))
        vars(own)[name] = value
    try:
        yield
    finally:
        for values, name, value in before:
            values[name] = value


def _attributes_of(model: PeftModel, name: str | None) -> list[_Attribute]:
    """What PEFT sets so that an adapter is in use."""
    adapters, by_name = tuple(model.peft_config), _recorded.setdefault(model, {})
    found = by_name.get(name)
    if (
        found is None
        or found.adapters != adapters
        or any(attribute.module() is None for attribute in found.attributes)
    ):
        found = by_name[name] = _Recorded(adapters, _record(model, name))
    return found.attributes


def _record(model: PeftModel, name: str | None) -> list[_Attribute]:
    """Lets PEFT take an adapter into use once, and notes what that sets."""
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    before = [(module, dict(vars(module))) for module in model.modules()]
    with use_adapter(model, adapter_name=name):
        found = [
            _Attribute(weakref.ref(module), key, value)
            for module, values in before
            for key, value in vars(module).items()
            if key not in values or values[key] is not value
        ]
    for module, values in before:
        vars(module).update(values)
    for weight, requires_grad in trained:
        weight.requires_grad_(requires_grad)
    return found


def _is_merged(model: PeftModel, name: str | None) -> bool:
    """Whether an adapter is in the weights, from which PEFT has to take it."""
    found = _recorded.get(model, {}).get(name)
    modules = model.modules() if found is None else (a.module() for a in found[1])
    return any(isinstance(own, BaseTunerLayer) and own.merged for own in modules)
