"""The demo: dense -> mixture -> train beside its dense twin -> compare -> look inside -> adapt -> share -> reload."""

from __future__ import annotations

import itertools
import json
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from huggingface_hub import HfApi
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_sparse_moe.checkpoints.companions import copy_companions
from hf_sparse_moe.checkpoints.folder import check_target, new_folder
from hf_sparse_moe.checkpoints.loading import load_dense
from hf_sparse_moe.checkpoints.source import find_source
from hf_sparse_moe.hub import doctor, push, render_model_card
from hf_sparse_moe.hub.checkpoint import save_routing_statistics
from hf_sparse_moe.insight import expert_load_table, explain_routing, plot_expert_load
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeDecoderConfig
from hf_sparse_moe.models.size import count_parameters
from hf_sparse_moe.quickstart.corpus import Corpus, load_corpus
from hf_sparse_moe.quickstart.examples import Example, interleave, load_tokenizer, make_examples
from hf_sparse_moe.quickstart.small_dense_model import new_dense_model, train_tokenizer
from hf_sparse_moe.quickstart.training import held_out_losses, train
from hf_sparse_moe.routing.statistics import RoutingStatistics
from hf_sparse_moe.upcycling import upcycle


CHAPTERS = 8
HELD_OUT_BLOCKS = 64  # a domain
PIECES, PIECE_CHARACTERS = 16, 400  # of a domain, that the routing page reads
DENSE_LEARNING_RATE = 3e-3  # for a model that starts from random weights


@dataclass(frozen=True)
class QuickstartOptions:
    """What [`run_quickstart`] does; `hf-sparse-moe quickstart --help` explains each."""

    model: str | None = None
    data: str | None = None
    output: str | None = None
    push_to: str | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    dense_steps: int = 300
    steps: int = 160
    adapter_steps: int = 40
    batch_size: int = 16
    sequence_length: int = 128
    learning_rate: float = 1e-3
    seed: int = 0


def run_quickstart(options: QuickstartOptions, console: Console | None = None) -> Path:
    """
    Run the demo and leave `mixture/`, `adapter/`, `experts.png`, `routing.html`, `report.json` (and `dense/`, where it
    trained one) in a new folder, which appears once all of it is there.

    Args:
        options ([`QuickstartOptions`]): What to run on.
        console (`rich.console.Console`, *optional*): Where to print.

    Returns:
        `Path`: the folder.

    Raises:
        ImportError: an extra is missing.
        ValueError: a model or data that it cannot work on.
        OSError: the output folder is taken, or its disk full.
    """
    for module, extra in (("accelerate", "train"), ("peft", "peft"), ("matplotlib", "report")):
        if find_spec(module) is None:
            raise ImportError(f"The quickstart needs {module}: pip install 'hf-sparse-moe[{extra}]'.")
    if options.push_to is not None:
        HfApi().whoami()  # a missing token is better reported now than in five minutes
    target = check_target(options.output or _free_name())
    started = perf_counter()
    with TemporaryDirectory() as scratch:
        story = _Story(options, console or Console(), Path(scratch))
        with new_folder(target) as folder:
            evaluation = story.make(folder, options.push_to or str(target / "mixture"))
    story.share(target, evaluation)
    story.say(f"Done in {perf_counter() - started:.0f} s. Which expert does what: open {target / 'routing.html'}")
    return target


def _free_name() -> str:
    names = (f"quickstart-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain(["quickstart"], names) if not Path(name).exists())


class _Story:
    """The chapters in their order, each of which prints what it did."""

    def __init__(self, options: QuickstartOptions, console: Console, scratch: Path):
        self.options, self.console, self.chapters = options, console, itertools.count(1)
        sizes: dict[str, Any] = {"batch_size": options.batch_size, "folder": scratch}
        self.fit = partial(train, seed=options.seed, console=console, **sizes)
        self.measure = partial(held_out_losses, **sizes)

    def title(self, text: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{next(self.chapters)}/{CHAPTERS} {text}", align="left", style="dim")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def make(self, folder: Path, name: str) -> dict[str, float]:
        """Make the mixture, which will have the `name`, and all else that is in the folder; returns its losses."""
        options = self.options
        start = options.model or folder / "dense"
        if options.model is not None:
            find_source(start)  # fails before the text is prepared
        corpus = load_corpus(options.data, options.seed)
        self.title("Prepare text and a dense model")
        if options.model is None:
            self.train_dense_model(corpus, folder / "dense")
        source = find_source(start)
        dense, tokenizer = load_dense(source, dtype=torch.float32), load_tokenizer(source.folder)
        mixture = self.upcycle(start, dense)

        self.title("Train the mixture and its dense twin on the same tokens")
        family, lesson = type(mixture.config), options.steps * options.batch_size
        count = max(lesson, options.adapter_steps * options.batch_size)
        examples = self.examples(corpus.train, tokenizer, family, count)
        held_out = self.examples(corpus.held_out, tokenizer, family, HELD_OUT_BLOCKS)
        losses = {"before": self.measure(dense, held_out)}
        seconds = self.train_both(dense, mixture, interleave(examples, lesson, options.seed + 1))
        self.title("Compare them on held-out text")
        losses |= {"dense twin": self.measure(dense, held_out), "mixture": self.measure(mixture, held_out)}
        self.console.print(_loss_table(losses))

        evaluation = {f"held-out loss, {domain}": loss for domain, loss in losses["mixture"].items()}
        statistics = self.look_inside(mixture, tokenizer, corpus, folder)
        self.save(mixture, source.folder, folder / "mixture", statistics, evaluation)
        domain = max(losses["mixture"], key=lambda name: losses["mixture"][name])
        adapted = self.train_adapter(mixture, name, {domain: examples[domain]})
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
        losses["adapter"] = self.measure(adapted, held_out)
        self.say(
            f"{adapted.get_nb_trainable_parameters()[0]:,} parameters trained on `{domain}`, where the mixture was "
            f"weakest: held-out loss {losses['mixture'][domain]:.3f} -> {losses['adapter'][domain]:.3f}."
        )
        report = {
            "options": asdict(options),
            "held_out_loss": losses,
            "training_seconds": seconds,
            "training_tokens": lesson * options.sequence_length,
            "adapter_domain": domain,
            "routing": statistics.to_dict(),
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return evaluation

    def train_dense_model(self, corpus: Corpus, folder: Path) -> None:
        tokenizer = train_tokenizer(text for texts in corpus.train.values() for text in texts)
        dense = new_dense_model(tokenizer, self.options.seed)
        self.say(f"Domains: {', '.join(corpus.domains)}. A Qwen3 of {dense.num_parameters():,} parameters is trained.")
        count = self.options.dense_steps * self.options.batch_size
        examples = self.examples(corpus.train, tokenizer, SparseMoeDecoderConfig, count)
        lesson = interleave(examples, count, self.options.seed)
        self.fit(dense, lesson, learning_rate=DENSE_LEARNING_RATE, name="dense model")
        dense.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def upcycle(self, start: str | Path, dense: PreTrainedModel) -> Any:
        self.title("Upcycle")
        sizes = (self.options.num_experts, self.options.num_experts_per_tok)
        mixture = upcycle(start, *sizes, seed=self.options.seed, dtype=torch.float32)
        equality = mixture.receipt["equality"]
        self.say(
            f"{type(dense).__name__} with {dense.num_parameters():,} parameters -> {type(mixture).__name__} with "
            f"{count_parameters(mixture):,}, {count_parameters(mixture, only_active=True):,} of them active per "
            f"token.\nReceipt: on {equality['probe_tokens']} tokens the outputs differ from the dense ones by at most "
            f"{equality['max_abs_difference']:.1e} (outputs reach {equality['max_abs_output']:.1f})."
        )
        return mixture

    def train_both(self, dense: PreTrainedModel, mixture: PreTrainedModel, lesson: list[Example]) -> dict[str, float]:
        """The seconds of each."""
        seconds = {
            name: self.fit(model, lesson, learning_rate=self.options.learning_rate, name=name)
            for name, model in (("dense twin", dense), ("mixture", mixture))
        }
        tokens, slower = len(lesson) * self.options.sequence_length, seconds["mixture"] / seconds["dense twin"]
        self.say(f"{tokens:,} tokens each. The mixture computes more for each, and took {slower:.1f} times as long.")
        return seconds

    def look_inside(
        self, mixture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, folder: Path
    ) -> RoutingStatistics:
        self.title("See which expert served which domain")
        pieces = [(piece, domain) for domain in corpus.domains for piece in _pieces(corpus.held_out[domain])]
        texts, domains = map(list, zip(*pieces, strict=True))
        sizes: Any = {"max_length": self.options.sequence_length, "batch_size": self.options.batch_size}
        explained = explain_routing(mixture, tokenizer, texts, domains, **sizes)
        statistics = explained.statistics
        for layer in (statistics.layers[0], statistics.layers[-1]):
            self.console.print(expert_load_table(layer))
        plot_expert_load(statistics, folder / "experts.png", "Which expert served which domain")
        explained.to_html(folder / "routing.html")
        return statistics

    def save(
        self,
        mixture: PreTrainedModel,
        source: Path,
        folder: Path,
        statistics: RoutingStatistics,
        evaluation: dict[str, float],
    ) -> None:
        mixture.save_pretrained(folder)
        copy_companions(source, folder)
        save_routing_statistics(statistics, folder)
        card = render_model_card(folder, self.options.push_to or "your-name/quickstart", evaluation=evaluation)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def train_adapter(self, mixture: PreTrainedModel, name: str, examples: dict[str, list[Example]]) -> Any:
        from peft import get_peft_model

        from hf_sparse_moe.adapters import expert_lora_config

        self.title("Train an expert-LoRA adapter for one domain")
        options = self.options
        lesson = interleave(examples, options.adapter_steps * options.batch_size, options.seed + 2)
        set_seed(options.seed)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT 0.21 still asks for it
        adapted: Any = get_peft_model(mixture, expert_lora_config(mixture, r=8, lora_alpha=16))
        adapted.peft_config["default"].base_model_name_or_path = name
        self.fit(adapted, lesson, learning_rate=2 * options.learning_rate, name="adapter")
        return adapted

    def examples(self, texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, family: Any, limit: int):
        length = self.options.sequence_length
        return {domain: make_examples(texts[domain], tokenizer, family, length, limit) for domain in texts}

    def share(self, target: Path, evaluation: dict[str, float]) -> None:
        self.title("Share")
        mixture = str(target / "mixture")
        if self.options.push_to is not None:
            published = push(mixture, self.options.push_to, evaluation=evaluation, with_report=target / "routing.html")
            mixture = self.options.push_to
            self.say(f"Published at {published.commit.commit_url}")
        others = "adapter/, experts.png, routing.html, report.json"
        self.say(f"On disk: {target} (mixture/ with card, code and receipt, {others})")
        self.title("Load mixture and adapter, and check them")
        for name, report in (("mixture", doctor(mixture)), ("adapter", doctor(target / "adapter", base=mixture))):
            verdicts = Counter(finding.verdict for finding in report.findings)
            self.say(f"{name}: {', '.join(f'{count} checks {verdict}' for verdict, count in verdicts.items())}")


def _pieces(documents: list[str]) -> list[str]:
    """The beginnings of documents, then what follows them, until there are enough."""
    longest = max(map(len, documents))
    starts = range(0, longest, PIECE_CHARACTERS)
    pieces = [text[start : start + PIECE_CHARACTERS] for start in starts for text in documents if start < len(text)]
    return pieces[:PIECES]


def _loss_table(losses: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Held-out loss, nats per token (lower is better)", title_justify="left")
    for name in ("domain", "dense, before", "dense twin", "mixture", "mixture - twin"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for domain, sparse in losses["mixture"].items():
        before, twin = losses["before"][domain], losses["dense twin"][domain]
        difference = f"[{'green' if sparse < twin else 'red'}]{sparse - twin:+.3f}[/]"
        table.add_row(escape(domain), f"{before:.3f}", f"{twin:.3f}", f"{sparse:.3f}", difference)
    return table
