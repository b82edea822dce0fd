"""Whether the tensors of an adapter have a place in the model that it is loaded into."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from .expert_modules import follows_interface


_PREFIX = "base_model.model."
WRAPPERS = re.compile(r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")


def check_match(model: nn.Module, adapter_name: str, names: Collection[str], *, all_of_them: bool = True) -> None:
    """
    Raise a `ValueError` where an adapter with tensors of these `names` does not fit: where one is missing or one too
    many, or only where none has a place. PEFT warns of what is missing, passes over the rest, and leaves the adapter
    as it was drawn.
    """
    # A tied head has a name of its own in a file.
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    known = {WRAPPERS.sub("", name) for name, _ in named}
    if not any(name.startswith(_PREFIX) for name in known):  # transformers puts adapters into the model itself
        names = {name.removeprefix(_PREFIX) for name in names}
    needed = {name for name in known if ".lora_" in name and f".{adapter_name}." in name}
    missing, unused = sorted(needed - {*names}), sorted({*names} - known)
    found = len(names) - len(unused)
    if not (missing or unused) or (found and not all_of_them):
        return
    faults = [
        f"{len(some)} of {total} tensors {what}, such as `{some[0]}`"
        for some, total, what in (
            (missing, len(needed), "that it needs are not in the file"),
            (unused, len(names), "in the file have no place in it"),
        )
        if some
    ]
    advice = "" if found else "; `export_adapter` and `import_adapter` convert one between a mixture and its export"
    raise ValueError(
        f"The adapter does not fit `{type(model).__name__}`, {found} of {len(names)} adapted tensors found: "
        f"{'; '.join(faults)}. Load it into the model that it was trained for{advice}."
    )


def check_any_match(model: nn.Module, adapter_name: str, names: Collection[str]) -> None:
    """[`check_match`] for adapters that others load into a mixture: at least one tensor has a place."""
    if any(follows_interface(module) for module in model.modules()):
        check_match(model, adapter_name, names, all_of_them=False)


def check_loaded(model: nn.Module, adapter_name: str, report: Any) -> None:
    """The same for what transformers has loaded, with its own report."""
    adapted = {name for name, _ in model.named_parameters() if f".{adapter_name}." in name}
    check_any_match(model, adapter_name, adapted - {*report.missing_keys} | {*report.unexpected_keys})
