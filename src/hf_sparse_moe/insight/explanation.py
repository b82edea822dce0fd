"""`explain_routing`: any mixture and a few texts become one page, plain numbers and a picture."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from hf_sparse_moe.checkpoints.files import read_json, write_whole
from hf_sparse_moe.routing.mixture_layers import find_mixture_layers
from hf_sparse_moe.routing.statistics import LayerRouting, RoutingStatistics
from hf_sparse_moe.routing.switches import is_hash

from .ablation import measure_ablation
from .definitions import LayerFacts, count_experts, layer_facts, mean_of_known, saturation
from .measurement import Measurement, Moment, measure, measure_moment
from .page import render_page
from .pictures import plot_expert_load
from .texts import Groups, read_texts
from .token_labels import token_labels
from .verdict import Claim, verdict


@dataclass
class RoutingExplanation:
    """
    What [`explain_routing`] found.

    Args:
        measurement (`Measurement`): The choice of every token in every layer, as numpy arrays.
        labels (`dict[int, str]`): How a token id is written.
        about (`dict[str, str]`): Model, data and versions, for the page's footer.
    """

    measurement: Measurement
    labels: dict[int, str]
    about: dict[str, str]

    @cached_property
    def facts(self) -> list[LayerFacts]:
        """Of each layer, what is said of it."""
        return [layer_facts(self.measurement, place) for place in range(len(self.measurement.layers))]

    @property
    def verdict(self) -> list[Claim]:
        """The page's sentences."""
        return verdict(self.measurement, self.facts)

    @property
    def statistics(self) -> RoutingStatistics:
        """What [`routing_statistics`] finds on these texts, for the model card and [`plot_expert_load`]."""
        sides = [fact.layer.side for fact in self.facts]
        layers = [
            LayerRouting(side, sides[:place].count(side), self.measurement.groups, torch.from_numpy(fact.counts))
            for place, (side, fact) in enumerate(zip(sides, self.facts, strict=True))
        ]
        layers_of = self.measurement.layers
        return RoutingStatistics(
            layers, max(layer.num_experts for layer in layers_of), max(layer.top_k for layer in layers_of)
        )

    def to_dict(self) -> dict[str, Any]:
        """All that the page says, in plain numbers; None where there is none."""
        measured = self.measurement
        return {
            "about": self.about,
            "verdict": [f"{claim.head} {claim.text}" for claim in self.verdict],
            "groups": list(measured.groups),
            "tokens": {side: len(tokens.ids) for side, tokens in measured.tokens.items()},
            "layers": [self._layer(fact) for fact in self.facts],
            "history": [self._moment(moment) for moment in measured.history],
            "left_out": measured.left_out,
        }

    def to_html(self, path: str | Path | None = None) -> str:
        """The page, in one file that needs nothing else; also written to `path`, if given."""
        page = render_page(self.measurement, self.facts, self.verdict, self.labels, self.about)
        if path is not None:
            write_whole(Path(path), page)
        return page

    def plot(self, path: str | Path) -> Path:
        """Draw [`plot_expert_load`] to `path`, a `.png`, `.svg` or `.pdf`. Needs matplotlib (extra `report`)."""
        return plot_expert_load(self.statistics, path)

    def _moment(self, moment: Moment) -> dict[str, Any]:
        pairs = list(zip(moment.index, self.measurement.layers, strict=True))
        return {
            "checkpoint": moment.name,
            "saturation": [saturation(index, layer.index) for index, layer in pairs],
            "load": [_plain(_share(index, layer.num_experts)) for index, layer in pairs],
            "entropy": [mean_of_known(entropy) for entropy in moment.entropy],
        }

    def _layer(self, fact: LayerFacts) -> dict[str, Any]:
        layer, groups = fact.layer, self.measurement.groups
        shown = {"share": fact.share, "lift": fact.lift, "low": fact.lift_low, "high": fact.lift_high}
        by_group = {name: {key: _plain(of[g]) for key, of in shown.items()} for g, name in enumerate(groups)}
        found: dict[str, Any] = {
            "label": layer.label,
            "name": layer.name,
            "side": layer.side,
            "num_experts": layer.num_experts,
            "top_k": layer.top_k,
            "load": _plain(fact.load),
            "entropy": _plain(mean_of_known(layer.entropy)),
            "margin": _plain(mean_of_known(layer.margin)),
            "groups": by_group,
            "mutual_information": fact.information,
            "mutual_information_of_shuffled_groups": fact.chance,
            "token_information": fact.token_information,
            "output_similarity": _plain(layer.outputs),
            "weight_similarity": _plain(layer.units),
            "coactivation": _plain(fact.coactivation),
        }
        for kind, tokens in (("input_tokens", fact.input_tokens), ("predicted_tokens", fact.predicted_tokens)):
            found[kind] = [
                [{"token": self.labels[v], "id": v, "lift": value, "count": count} for v, value, count in of_expert]
                for of_expert in tokens
            ]
        if fact.added is not None:
            names = ("added_loss", "added_loss_low", "added_loss_high")
            found |= {
                name: dict(zip([*groups, "all groups"], _plain(array.T), strict=True))
                for name, array in zip(names, fact.added, strict=True)
            }
        return found


def explain_routing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | Sequence[Sequence[str]],
    groups: Groups = None,
    *,
    targets: Sequence[str] | None = None,
    max_length: int = 512,
    batch_size: int = 4,
    ablate: bool = False,
    checkpoints: Iterable[str | Path] = (),
    about: Mapping[str, str] | None = None,
) -> RoutingExplanation:
    """
    Say what each expert of a mixture does on some text: load, groups, tokens, likeness, and what its absence costs.

    Runs the model once over the texts. Definitions follow OLMoE (arXiv 2409.02060, section 5), with intervals by
    resampling texts. Statements hold for these texts, and for these alone.

    Args:
        model (`PreTrainedModel`): A mixture of this package or of transformers: encoder, decoder, encoder-decoder.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer; a fast one knows the characters of each token.
        texts (`list[str]` or `list[list[str]]`): Texts, or texts as words.
        groups (`list[str]` or `list[list[str]]`, *optional*):
            A domain, a language, a label for each text or, for texts as words, for each word (its part of speech).
        targets (`list[str]`, *optional*): What an encoder-decoder's decoder reads. Defaults to the texts.
        max_length (`int`, defaults to 512): Tokens of a text; longer ones are cut, as they are at the model's limit.
        batch_size (`int`, defaults to 4): Texts in a forward pass.
        ablate (`bool`, defaults to `False`):
            Also measure the loss without each expert: one more pass for each, which takes that many times as long.
            For language models.
        checkpoints (`Iterable[str]` or `Iterable[Path]`, *optional*):
            Earlier checkpoints of the model, oldest first. The log of a [`RoutingMonitor`] is read beside the last.
        about (`dict[str, str]`, *optional*): Lines for the footer, such as the data's name.

    Returns:
        [`RoutingExplanation`]: `to_html()` is the page, `to_dict()` its numbers, `plot()` a picture.

    Raises:
        ValueError: no tokenizer, no text, no sparse layer, a router that cannot be observed, or a loss that is asked
            for and cannot be measured.

    Example:
        ```python
        explain_routing(model, tokenizer, texts, groups=domains).to_html("routing.html")
        ```
    """
    layers = find_mixture_layers(model)
    if ablate and any(map(is_hash, layers)):
        raise ValueError("`ablate=True` is not allowed: a hash has no other expert for the tokens of a disabled one.")
    training, paths = model.training, list(checkpoints)
    model.eval()
    try:
        reading = read_texts(model, tokenizer, texts, groups, targets, max_length, batch_size)
        measured = measure(model, reading)
        names = [layer.name for layer in measured.layers]
        for path in tqdm(paths, desc="checkpoints") if paths else ():
            earlier: Any = type(model).from_pretrained(path, dtype=model.dtype)
            earlier = earlier.to(model.device).eval()
            measured.history.append(measure_moment(earlier, reading, Path(path).name, names))
            state = read_json(Path(path) / "trainer_state.json", optional=True)
            measured.log = [line for line in state.get("log_history", []) if "router/entropy" in line]
        if ablate:
            measured.ablation = measure_ablation(model, tokenizer, reading, names)
    finally:
        model.train(training)
    return RoutingExplanation(
        measured, token_labels(tokenizer, measured), {**_about(model, measured), **(about or {})}
    )


def _about(model: PreTrainedModel, measured: Measurement) -> dict[str, str]:
    config, routers = model.config, hashlib.sha256()
    learnt = [parameter for layer in find_mixture_layers(model) for parameter in layer.router.parameters()]
    for parameter in learnt:
        routers.update(parameter.detach().cpu().float().numpy().tobytes())
    counts = {side: len(tokens.ids) for side, tokens in measured.tokens.items()}
    described = ", ".join(f"{count:,} {side} tokens" for side, count in counts.items())
    revision = getattr(config, "_commit_hash", None)
    packages = ("hf-sparse-moe", "transformers", "torch", "numpy")
    return {
        "Model": f"{Path(str(config.name_or_path)).name or 'in memory'} ({type(model).__name__})",
        **({"Revision": str(revision)} if revision else {}),
        **({"Routers, SHA-256": routers.hexdigest()} if learnt else {}),
        "Data": f"{_count(measured.texts, 'text')}, {_count(measured.groups, 'group')}, {described}",
        "Data, SHA-256": hashlib.sha256(json.dumps(measured.texts).encode()).hexdigest(),
        "Versions": ", ".join(
            [f"{name} {version(name)}" for name in packages] + [f"Python {platform.python_version()}"]
        ),
    }


def _count(things: Sequence[str], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _share(index: np.ndarray, experts: int) -> np.ndarray:
    counts = count_experts(index, experts)
    return counts / max(counts.sum(), 1)


def _plain(array: Any) -> Any:
    """Numbers or lists of them; None for NaN."""
    if array is None:
        return None
    values = np.asarray(array, dtype=object)
    values[~np.isfinite(np.asarray(array, dtype=float))] = None
    return values.tolist()
