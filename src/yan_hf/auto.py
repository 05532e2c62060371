# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Registers YAN with Transformers' Auto classes and with PEFT, as soon as these are there, and imports neither.

Importing Auto classes, models or PEFT takes seconds. A module that is imported already is served at once; one that
comes later is served when its own code has run.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


# What PEFT's methods adapt where nothing is said: the layers that they adapt in BART, by their names here; beside the
# attention's queries and values also the Mamba mixers' projections. A backbone has the ones or the others.
PEFT_TARGET_MODULES = ["q_proj", "v_proj", "in_proj", "out_proj"]
_BART_LAYERS = {
    "q_proj": ["q_proj"],
    "k_proj": ["k_proj"],
    "v_proj": ["v_proj"],
    "out_proj": ["o_proj"],
    "fc1": ["feed_forward.up_proj"],
    "fc2": ["feed_forward.down_proj"],
    "self_attn_layer_norm": ["self_attn_norm", "mixer_norm"],
    "final_layer_norm": ["feed_forward_norm"],
}


class _Loader(Loader):
    """A module's own loader, and then an action."""

    def __init__(self, loader: Any, action: Callable[[ModuleType], None]):
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType):
        # Whoever asks the module for its source finds the loader that knows it.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action(module)


class _Finder(MetaPathFinder):
    """Finds the modules that are waited for, through the finders behind it."""

    def __init__(self):
        self.actions: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        action = self.actions.pop(fullname, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, action)
        return spec


_AUTO = "transformers.models.auto"
_finder = _Finder()
_registered: set[tuple[str, str]] = set()


def when_imported(name: str, action: Callable[[ModuleType], None]):
    """Calls `action(module)` once: now if the module is there, otherwise after its import."""
    if name in sys.modules:
        action(sys.modules[name])
        return
    _finder.actions[name] = action
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _register_with_auto_classes(_: ModuleType | None = None):
    """Registers what is complete on both sides; called again when one of them has come."""
    _register("configuration_auto", "AutoConfig", "configuration_yan", "YanConfig")
    _register("modeling_auto", "AutoModel", "modeling_yan", "YanModel")
    _register("modeling_auto", "AutoModelForSeq2SeqLM", "modeling_yan", "YanForConditionalGeneration")


def _register(auto_module: str, auto_class: str, module: str, name: str):
    auto = getattr(sys.modules.get(f"{_AUTO}.{auto_module}"), auto_class, None)
    if auto is None or (auto_class, name) in _registered:
        return
    ours = sys.modules.get(f"{__package__}.{module}") or importlib.import_module(f".{module}", __package__)
    # Our module may be what imports the Auto classes right now: it is served when it is complete itself.
    if not hasattr(ours, "__all__"):
        return
    _registered.add((auto_class, name))
    from .configuration_yan import YanConfig

    key = YanConfig.model_type if auto_class == "AutoConfig" else YanConfig
    auto.register(key, getattr(ours, name))


def _register_peft(constants: ModuleType):
    from .configuration_yan import YanConfig

    for name, mapping in vars(constants).items():
        if not (name.endswith("_MODULES_MAPPING") and isinstance(mapping, dict)):
            continue
        layers = mapping.get("bart", ["q_proj", "v_proj"])
        targets = [target for layer in layers for target in _BART_LAYERS.get(layer, ())]
        if set(PEFT_TARGET_MODULES[:2]) <= set(targets):
            targets += PEFT_TARGET_MODULES[2:]
        if targets:
            mapping.setdefault(YanConfig.model_type, targets)


def register():
    """Serves Transformers' Auto classes and PEFT, now or when they come."""
    for name in ("configuration_yan", "modeling_yan"):
        when_imported(f"{__package__}.{name}", _register_with_auto_classes)
    for name in ("configuration_auto", "modeling_auto"):
        when_imported(f"{_AUTO}.{name}", _register_with_auto_classes)
    when_imported("peft.utils.constants", _register_peft)


__all__ = ["PEFT_TARGET_MODULES", "register", "when_imported"]
