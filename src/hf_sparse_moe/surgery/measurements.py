"""What was measured of experts, and its file. T tokens, E experts, H hidden, G groups, S sampled tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from hf_sparse_moe.checkpoints.companions import tokenizer_in
from hf_sparse_moe.checkpoints.config import read_config
from hf_sparse_moe.routing.mixture_layers import MixtureLayer


_KEY = "expert_measurements"


@dataclass(frozen=True)
class LayerMeasurements:
    """
    What was measured of one sparse layer.

    Args:
        name (`str`), num_experts (`int`), top_k (`int`), router_sha256 (`str`): The layer that it was measured on.
        tensors (`dict[str, torch.Tensor]`): Sums over the tokens of each group, `(G, E)`: `"tokens"`, how many an
            expert served, `"weights"` of g_e, `"norms"` of |f_e| and `"weighted_norms"` of g_e |f_e|. On the sampled
            tokens, for all experts: `"mean_outputs"` `(E, H)`, `"similarity"` `(E, E)`, the mean cosine of two
            experts' outputs, `"logits"` `(S, E)` of the router, `"sampled_weights"` `(S, E)`, 0 for experts that were
            not chosen, `"selection_bias"` `(E,)` and, of few experts, `"products"` `(S, E, E)` of their outputs. Where
            experts cannot be called one by one (Switch, JetMoe), there are only `"tokens"` and `"weights"`.
    """

    name: str
    num_experts: int
    top_k: int
    router_sha256: str
    tensors: dict[str, torch.Tensor]

    @property
    def tokens(self) -> torch.Tensor:
        """`(E,)`: the size of X_e."""
        return self.tensors["tokens"].sum(dim=0)

    @property
    def frequency(self) -> torch.Tensor:
        """`(E,)`: the share of all assignments that are the expert's."""
        return self.tokens / self.tokens.sum().clamp(min=1)

    @property
    def soft_frequency(self) -> torch.Tensor:
        """`(E,)`: the sum of g_e."""
        return self.tensors["weights"].sum(dim=0)

    @property
    def ean(self) -> torch.Tensor:
        """`(E,)`: the mean of |f_e| over X_e; 0 where that is empty."""
        return self._mean("norms")

    @property
    def reap(self) -> torch.Tensor:
        """`(E,)`: the mean of g_e |f_e| over X_e (arXiv 2510.13999); 0 where that is empty."""
        return self._mean("weighted_norms")

    def score(self, method: str) -> torch.Tensor:
        """`(E,)`, by the name of a method; raises a `ValueError` where it was not measured."""
        if method == "frequency":
            return self.frequency
        return {"reap": lambda: self.reap, "ean": lambda: self.ean}[method]()

    def found(self, name: str) -> torch.Tensor:
        """One of the tensors; raises a `ValueError` where it was not measured."""
        if name not in self.tensors:
            raise ValueError(
                f"The experts of `{self.name}` cannot be called one by one, so their outputs were not measured. Prune "
                'them by `method="frequency"`.'
            )
        return self.tensors[name]

    def _mean(self, name: str) -> torch.Tensor:
        return self.found(name).sum(dim=0) / self.tokens.clamp(min=1)

    def to_dict(self) -> dict[str, Any]:
        """What a person reads of it, in plain numbers, for JSON."""
        told: dict[str, Any] = {"name": self.name, "num_experts": self.num_experts, "top_k": self.top_k}
        names = ["tokens", "frequency", "soft_frequency", *(["ean", "reap"] if "norms" in self.tensors else [])]
        told |= {name: getattr(self, name).tolist() for name in names}
        if "similarity" in self.tensors:
            told["similarity"] = self.tensors["similarity"].tolist()
        return told


@dataclass(frozen=True)
class ExpertMeasurements:
    """
    What [`measure_experts`] found.

    Args:
        groups (`tuple[str, ...]`): The groups of the text, which are the rows of the layers' sums.
        layers (`list[LayerMeasurements]`): One a sparse layer.
        losses (`dict`, *optional*): By group, and for `"all"`, `{"loss": mean in nats, "labels": how many}` of a
            language model on the text; None where the model has no such head.
        vocabulary_sha256 (`str`, *optional*): Of the tokenizer of the text, where that was given.
    """

    groups: tuple[str, ...]
    layers: list[LayerMeasurements]
    losses: dict[str, dict[str, float]] | None
    vocabulary_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What a person reads of it, in plain numbers, for JSON."""
        return {
            "groups": list(self.groups),
            "losses": self.losses,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, which [`ExpertMeasurements.load`] reads; raises an `OSError` where one is."""
        tensors = {
            f"{place}.{name}": tensor.contiguous()
            for place, layer in enumerate(self.layers)
            for name, tensor in layer.tensors.items()
        }
        fields = ("name", "num_experts", "top_k", "router_sha256")
        layers = [{field: getattr(layer, field) for field in fields} for layer in self.layers]
        told = {"groups": self.groups, "losses": self.losses, "vocabulary_sha256": self.vocabulary_sha256}
        with Path(path).open("xb") as file:
            file.write(save(tensors, metadata={_KEY: json.dumps(told | {"layers": layers})}))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ExpertMeasurements:
        """Read what [`ExpertMeasurements.save`] wrote; raises a `ValueError` for another file."""
        try:
            if Path(path).is_dir():
                raise IsADirectoryError
            with safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            layers = [
                LayerMeasurements(
                    **fields,
                    tensors={
                        name.partition(".")[2]: tensor
                        for name, tensor in tensors.items()
                        if name.partition(".")[0] == str(place)
                    },
                )
                for place, fields in enumerate(told["layers"])
            ]
            return cls(tuple(told["groups"]), layers, told["losses"], told.get("vocabulary_sha256"))
        except (SafetensorError, IsADirectoryError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`{path}` does not hold what `measure_experts` measured ({type(error).__name__}). Measure again: "
                "hf-sparse-moe measure."
            ) from error

    @classmethod
    def of(cls, given: ExpertMeasurements | str | Path) -> ExpertMeasurements:
        """Measurements, or those of a file."""
        return given if isinstance(given, cls) else cls.load(given)  # type: ignore[arg-type]

    def check_text(self, folder: Path | None) -> None:
        """Raise a `ValueError` where the folder of a checkpoint has another tokenizer than the text was of."""
        if folder is None or self.vocabulary_sha256 is None:
            return
        tokenizer = tokenizer_in(folder, read_config(folder))
        if tokenizer is not None and vocabulary_sha256(tokenizer) != self.vocabulary_sha256:
            raise ValueError(
                f"The text of `measured` is of another tokenizer than that of `{folder}`. Measure on text of its own."
            )

    def layer(self, name: str) -> LayerMeasurements:
        """The layer of that name; raises a `ValueError` where none was measured."""
        found = next((layer for layer in self.layers if layer.name == name), None)
        if found is None:
            raise ValueError(
                f"`measured` is of another model: it has no layer `{name}`, only "
                f"{[layer.name for layer in self.layers]}."
            )
        return found

    def check(self, layer: MixtureLayer, router: Mapping[str, torch.Tensor]) -> LayerMeasurements:
        """What was measured of a layer with these tensors in its router; a `ValueError` where it is another one."""
        found = self.layer(layer.name)
        sizes, expected = (found.num_experts, found.top_k), (layer.num_experts, layer.top_k)
        if sizes != expected:
            raise ValueError(
                f"`measured` is of another model: `{layer.name}` had {sizes[0]} experts, {sizes[1]} a token, and has "
                f"{expected[0]}, {expected[1]} a token. Measure again."
            )
        if found.router_sha256 != router_sha256(router):
            raise ValueError(
                f"`measured` is of another model: the router of `{layer.name}` has other weights. Measure again."
            )
        return found


def vocabulary_sha256(tokenizer: Any) -> str:
    """Of a tokenizer's tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def router_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of a router's tensors in bfloat16, in any order: the same in whichever dtype the model was loaded."""
    digests = sorted(
        hashlib.sha256(tensor.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for tensor in tensors.values()
        if tensor.is_floating_point() and tensor.dim() > 1
    )
    return hashlib.sha256("".join(digests).encode()).hexdigest()
