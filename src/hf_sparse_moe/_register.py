"""
Registers the package with transformers and PEFT, without importing either.

Each step runs right after the module that it needs was imported, or at once if it was imported before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


def _register_configs() -> None:
    from transformers import AutoConfig

    from .models import configuration_sparse_moe as ours

    for config_class in (ours.SparseMoeEncoderConfig, ours.SparseMoeDecoderConfig, ours.SparseMoeEncoderDecoderConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_models() -> None:
    from .models.modeling_sparse_moe import AUTO_CLASSES
    from .models.pretrained_model import SparseMoePreTrainedModel

    auto_class: Any
    for config_class, classes in AUTO_CLASSES.items():
        for auto_class, model_class in classes.items():
            auto_class.register(config_class, model_class, exist_ok=True)
    SparseMoePreTrainedModel.publisher = staticmethod(_publish)


def _publish(model: Any, repo_id: str, **kwargs):
    # The models import nothing of the package, since they travel without it; so the package hands them this.
    return import_module(".hub", __package__).push(model, repo_id, **kwargs).commit


def _register_experts() -> None:
    from . import experts  # noqa: F401
    from .models import quantization  # noqa: F401


def _hook_into_peft() -> None:
    tuners: Any = sys.modules["peft.tuners.tuners_utils"]
    include = tuners._maybe_include_all_linear_layers
    rename = tuners.BaseTuner._remap_adapter_state_dict_for_load.__func__

    def include_and_tell(peft_config: Any, model: Any) -> Any:
        if str(getattr(peft_config, "target_modules", "")).lower() == "all-linear":
            import_module(".adapters.expert_modules", __package__).tell_of_experts_left_out(peft_config, model)
        return include(peft_config, model)

    inject = tuners.BaseTuner.inject_adapter

    @wraps(inject)
    def serve_and_inject(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        import_module(".adapters.expert_lora", __package__).serve_plain_config(self.peft_config[adapter_name])
        return inject(self, model, adapter_name, *args, **kwargs)

    def rename_and_check(cls: type, model: Any, config: Any, adapter_name: str, state_dict: Any) -> Any:
        tensors = rename(cls, model, config, adapter_name, state_dict)
        import_module(".adapters.adapter_match", __package__).check_any_match(model, adapter_name, tensors)
        return tensors

    tuners._maybe_include_all_linear_layers = include_and_tell
    tuners.BaseTuner.inject_adapter = serve_and_inject
    tuners.BaseTuner._remap_adapter_state_dict_for_load = classmethod(rename_and_check)


def _hook_into_transformers_adapters() -> None:
    mixin: Any = sys.modules["transformers.integrations.peft"].PeftAdapterMixin
    load = mixin.load_adapter

    @wraps(load)
    def load_and_check(
        self: Any, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        report = load(self, peft_model_id, adapter_name, *args, **kwargs)
        match = import_module(".adapters.adapter_match", __package__)
        match.check_loaded(self, adapter_name or "default", report)
        return report

    mixin.load_adapter = load_and_check


def _hook_into_quantizers() -> None:
    base: Any = sys.modules["transformers.quantizers.base"].HfQuantizer
    postprocess = base.postprocess_model

    def postprocess_and_tell(self: Any, model: Any, **kwargs) -> Any:
        result = postprocess(self, model, **kwargs)
        import_module(".models.quantization", __package__).tell_of_float_experts(model, self.quantization_config)
        return result

    base.postprocess_model = postprocess_and_tell


_STEPS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.modeling_utils": _register_experts,
    "transformers.integrations.peft": _hook_into_transformers_adapters,
    "transformers.quantizers.base": _hook_into_quantizers,
    "peft.tuners.tuners_utils": _hook_into_peft,
}
# What the steps import. They import transformers themselves, so a step waits while one of them is half-way.
_OURS = (f"{__package__}.models.", f"{__package__}.experts")


class _Finder(MetaPathFinder):
    """Finds a module as Python does, and has the steps that became due run after it."""

    def __init__(self) -> None:
        self.due = [step for name, step in _STEPS.items() if name in sys.modules]
        self.half_way = 0

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        ours = fullname.startswith(_OURS)
        if not ours and fullname not in _STEPS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                self.half_way += ours
                try:
                    run(module)
                finally:
                    self.half_way -= ours
                if not ours:
                    self.due.append(_STEPS[fullname])
                self.run_steps()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def run_steps(self) -> None:
        while self.due and not self.half_way:
            self.due.pop(0)()


def register() -> None:
    """Arrange for everything; called once, when the package is imported."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    finder.run_steps()
