"""Switches adapters and gradient checkpointing for one forward, then back.

PEFT and TRL switch them by a loop over all modules, which also sets `requires_grad` of
every adapter weight. For a model of 8B parameters the loop takes tens of milliseconds
on the CPU, in every micro-batch. A forward depends on only a few attributes of modules.
So this file runs the loop once per model, records the attributes that it changed, and
later sets only these.

TRL's function to enable checkpointing again has side effects: it adds another hook to
the embedding, and it checkpoints every layer, even if only some were before.
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
    """An attribute of a module, and the value to set."""

    module: weakref.ref
    name: str
    value: Any


class _Switch(NamedTuple):
    """The attributes that PEFT sets to use an adapter.

    Attributes:
        adapters: Names of the model's adapters when the attributes were recorded.
        attributes: The attributes that PEFT changed, with their new values.
    """

    adapters: tuple[str, ...]
    attributes: list[_Attribute]


_switches: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_checkpointed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextmanager
def adapter_in_use(model: PeftModel, name: str | None) -> Iterator[None]:
    """Within it, a PEFT model uses another adapter, or none.

    Use it without gradient only: `requires_grad` of the adapters is not switched.

    Args:
        model: A PEFT model.
        name: Name of the adapter; None: all adapters off.
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
    """Sets attributes of modules, and restores the values before at the end."""
    before = []
    for reference, name, value in attributes:
        module: Any = reference()
        before.append((vars(module), name, getattr(module, name)))
        vars(module)[name] = value
    try:
        yield
    finally:
        for values, name, value in before:
            values[name] = value


def _attributes_of(model: PeftModel, name: str | None) -> list[_Attribute]:
    """The attributes that PEFT sets to use an adapter.

    They are recorded again if the model's adapters changed or if a module is gone.
    """
    adapters, by_name = tuple(model.peft_config), _switches.setdefault(model, {})
    switch = by_name.get(name)
    if (
        switch is None
        or switch.adapters != adapters
        or any(attribute.module() is None for attribute in switch.attributes)
    ):
        switch = by_name[name] = _Switch(adapters, _record(model, name))
    return switch.attributes


def _record(model: PeftModel, name: str | None) -> list[_Attribute]:
    """Lets PEFT switch to an adapter, records what changed, and undoes it."""
    gradients = [(weight, weight.requires_grad) for weight in model.parameters()]
    before = [(module, dict(vars(module))) for module in model.modules()]
    with use_adapter(model, adapter_name=name):
        attributes = [
            _Attribute(weakref.ref(module), key, value)
            for module, values in before
            for key, value in vars(module).items()
            if key not in values or values[key] is not value
        ]
    for module, values in before:
        vars(module).update(values)
    for weight, requires_grad in gradients:
        weight.requires_grad_(requires_grad)
    return attributes


def _is_merged(model: PeftModel, name: str | None) -> bool:
    """Whether an adapter is merged into the weights, which only PEFT can undo."""
    switch = _switches.get(model, {}).get(name)
    modules = (
        model.modules()
        if switch is None
        else (attribute.module() for attribute in switch.attributes)
    )
    return any(isinstance(m, BaseTunerLayer) and m.merged for m in modules)
