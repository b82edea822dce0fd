"""
The forward pass of [`doctor`] by the code in a checkpoint, as on a machine without this package:
`python -P remote_code_run.py FOLDER PROBE RESULT`. It imports nothing of the package, and makes that impossible.
"""

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any


class WithoutPackage(importlib.abc.MetaPathFinder):
    """Makes the package unimportable in this process."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname.partition(".")[0] == "hf_sparse_moe":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def main() -> None:
    sys.meta_path.insert(0, WithoutPackage())
    import torch
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder, probe, result = sys.argv[1:]
    given = json.loads(Path(probe).read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    reference = next(value for value in config.auto_map.values() if value.endswith(f".{config.architectures[0]}"))
    model_class: Any = get_class_from_dynamic_module(reference, folder)
    model = model_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    inputs = {name: torch.tensor(value) for name, value in given["inputs"].items()}
    with torch.no_grad():
        output = model(**inputs)[0]
    flat, count = output.flatten(), len(given["fingerprint"]["outputs"])
    outputs = flat[torch.linspace(0, len(flat) - 1, count).long()].tolist()
    taken = {"shape": list(output.shape), "outputs": outputs}
    Path(result).write_text(json.dumps(taken), encoding="utf-8")


if __name__ == "__main__":
    main()
