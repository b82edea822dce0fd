"""The story: dense -> mixture -> train beside its dense twin -> compare -> look inside -> adapt -> share -> reload."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from hf_sparse_moe.checkpoints.config import read_config
from hf_sparse_moe.checkpoints.families import sparse_config_class
from hf_sparse_moe.checkpoints.files import copy_companions
from hf_sparse_moe.checkpoints.folder import check_target, new_folder
from hf_sparse_moe.checkpoints.source import Source, find_source, load_dense
from hf_sparse_moe.hub import push, render_model_card
from hf_sparse_moe.insight import expert_load_table, plot_expert_load
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_parameters
from hf_sparse_moe.quickstart.corpus import Corpus, load_corpus
from hf_sparse_moe.quickstart.examples import Example, interleave, make_examples
from hf_sparse_moe.quickstart.small_dense_model import new_dense_model, train_tokenizer
from hf_sparse_moe.quickstart.training import held_out_losses, train
from hf_sparse_moe.routing import RoutingStatistics, routing_statistics
from hf_sparse_moe.upcycling import upcycle


CHAPTERS = 8
HELD_OUT_BLOCKS = 64  # a domain
PROMPT_CHARACTERS = 160
DENSE_LEARNING_RATE = 3e-3  # for a model that has learnt nothing yet


@dataclass(frozen=True)
class QuickstartOptions:
    """
    What [`run_quickstart`] does.

    Args:
        model (`str`, *optional*): Folder or Hub id of a dense checkpoint with a language-model head and a tokenizer.
            Without one, a small Qwen3 is trained first.
        data (`str`, *optional*): Folder or Hub data set, see `load_corpus`. Without one, text of this Python
            installation.
        output (`str`, *optional*): The folder to make. Defaults to `quickstart`, `quickstart-2`, ...
        push_to (`str`, *optional*): `"user/name"` on the Hub that `HF_ENDPOINT` names; without it nothing is sent.
        num_experts (`int`, defaults to 8): Routed experts of a layer.
        num_experts_per_tok (`int`, defaults to 2): Experts that serve one token.
        dense_steps (`int`, defaults to 300): Training steps of the small dense model.
        steps (`int`, defaults to 160): Training steps of the mixture, and of its dense twin.
        adapter_steps (`int`, defaults to 40): Training steps of the adapter.
        batch_size (`int`, defaults to 16): Sequences of a step.
        sequence_length (`int`, defaults to 128): Tokens of a sequence.
        learning_rate (`float`, defaults to 1e-3): Of mixture and twin; the adapter's is twice that.
        seed (`int`, defaults to 0): Of everything that is drawn at random.
    """

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


class Story:
    """Prints numbered chapters and keeps the time."""

    def __init__(self, console: Console):
        self.console = console
        self.chapter_number = 0
        self.started = perf_counter()

    @contextmanager
    def chapter(self, title: str):
        self.chapter_number += 1
        self.console.rule(f"[bold]{self.chapter_number}/{CHAPTERS} {escape(title)}", align="left", style="dim")
        started = perf_counter()
        yield
        self.console.print(f"[dim]{perf_counter() - started:.0f} s[/]\n")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)


def run_quickstart(options: QuickstartOptions, console: Console | None = None) -> Path:
    """
    Run the whole story and leave `mixture/`, `adapter/`, `experts.png`, `report.json` (and `dense/`, where it trained
    one) in a new folder, which appears once all of it is there.

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
        from huggingface_hub import HfApi

        HfApi().whoami()  # a missing token is better heard of now than in five minutes
    if options.model is not None:
        find_source(options.model)
    target = check_target(options.output or _free_name())
    story = Story(console or Console())
    with new_folder(target) as folder, tempfile.TemporaryDirectory() as scratch:
        mixture, tokenizer, evaluation, prompt = _make(options, story, folder, Path(scratch), target)
    with story.chapter("Share it"):
        model_name, adapter_name = str(target / "mixture"), str(target / "adapter")
        if options.push_to is not None:
            model_name = options.push_to
            commit = push(mixture, model_name, tokenizer=tokenizer, evaluation=evaluation).commit
            story.say(f"Published at {commit.commit_url}")
        story.say(f"On disk: {target} (mixture/ with card, code and receipt, adapter/, experts.png, report.json)")
    with story.chapter("Reload it in a new process, and write on"):
        _reload(story, model_name, adapter_name, prompt)
    story.say(f"Done in {perf_counter() - story.started:.0f} s. Look at {target / 'experts.png'}")
    return target


def _make(
    options: QuickstartOptions, story: Story, folder: Path, scratch: Path, target: Path
) -> tuple[SparseMoePreTrainedModel, PreTrainedTokenizerBase, dict[str, float], str]:
    """Everything until the mixture, the adapter and the picture are in `folder`."""
    training: dict[str, Any] = {
        "batch_size": options.batch_size,
        "seed": options.seed,
        "folder": scratch,
        "console": story.console,
    }
    with story.chapter("Text, and a dense model"):
        corpus = load_corpus(options.data, options.seed)
        source, tokenizer, examples = _dense_start(options, story, corpus, folder, training)
        held_out = _examples(corpus.held_out, source, tokenizer, options, HELD_OUT_BLOCKS)
        lesson = interleave(examples, options.steps * options.batch_size, options.seed + 1)
        _describe(story, corpus, examples, held_out)

    with story.chapter("Upcycle"):
        dense = load_dense(source, dtype=torch.float32)
        mixture = upcycle(
            options.model or str(source.folder),
            options.num_experts,
            options.num_experts_per_tok,
            seed=options.seed,
            dtype=torch.float32,
        )
        _describe_receipt(story, dense, mixture)

    def measure(model: PreTrainedModel) -> dict[str, float]:
        return held_out_losses(model, held_out, batch_size=options.batch_size, folder=scratch)

    with story.chapter("Train the mixture and its dense twin on the same tokens"):
        before = measure(dense)
        seconds = {}
        for name, model in (("dense twin", dense), ("mixture", mixture)):
            seconds[name] = train(model, lesson, learning_rate=options.learning_rate, name=name, **training)
        # One expert for all is the dense model but for a router of one row.
        config: Any = mixture.config
        single = type(config).from_dense(dense.config, num_experts=1, num_experts_per_tok=1)
        story.say(
            f"{len(lesson) * options.sequence_length:,} tokens each. The mixture computes "
            f"{config.flops_per_token() / single.flops_per_token():.2f} times the FLOPs a token and took "
            f"{seconds['mixture'] / seconds['dense twin']:.1f} times as long."
        )

    with story.chapter("Compare on held-out text"):
        losses = {"before": before, "dense twin": measure(dense), "mixture": measure(mixture)}
        _compare(story, losses)

    with story.chapter("Which expert served which domain"):
        statistics = _look_inside(mixture, held_out, options.batch_size)
        for layer in (statistics.layers[0], statistics.layers[-1]):
            story.console.print(expert_load_table(layer))
        plot_expert_load(statistics, folder / "experts.png", "Which expert served which domain")

    evaluation = {f"held-out loss, {domain}": loss for domain, loss in losses["mixture"].items()}
    _save(mixture, tokenizer, source, folder / "mixture", options, evaluation)

    with story.chapter("An expert-LoRA adapter for one domain"):
        domain = max(losses["mixture"], key=lambda name: losses["mixture"][name])
        pool = interleave({domain: examples[domain]}, options.adapter_steps * options.batch_size, options.seed + 2)
        adapted = _adapt(mixture, folder, target, options, pool, training)
        losses["adapter"] = measure(adapted)
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        story.say(
            f"{trained:,} parameters trained on `{domain}`, where the mixture was weakest: held-out loss "
            f"{losses['mixture'][domain]:.3f} -> {losses['adapter'][domain]:.3f}."
        )

    report = {
        "options": asdict(options),
        "held_out_loss": losses,
        "training_seconds": seconds,
        "training_tokens": len(lesson) * options.sequence_length,
        "adapter_domain": domain,
        "routing": statistics.to_dict(),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return mixture, tokenizer, evaluation, _prompt(corpus.held_out[domain][0])


def _dense_start(
    options: QuickstartOptions, story: Story, corpus: Corpus, folder: Path, training: dict[str, Any]
) -> tuple[Source, PreTrainedTokenizerBase, dict[str, list[Example]]]:
    """The dense checkpoint, its tokenizer and the training examples; trains one where none is given."""
    blocks = max(options.steps, options.adapter_steps) * options.batch_size
    if options.model is not None:
        source = find_source(options.model)
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
        return source, tokenizer, _examples(corpus.train, source, tokenizer, options, blocks)
    tokenizer = train_tokenizer(text for texts in corpus.train.values() for text in texts)
    dense = new_dense_model(tokenizer, options.seed)
    blocks = max(blocks, options.dense_steps * options.batch_size)
    dense.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    source = find_source(str(folder / "dense"))
    examples = _examples(corpus.train, source, tokenizer, options, blocks)
    first_lesson = interleave(examples, options.dense_steps * options.batch_size, options.seed)
    story.say(f"A Qwen3 of {dense.num_parameters():,} parameters learns from nothing.")
    train(dense, first_lesson, learning_rate=DENSE_LEARNING_RATE, name="dense model", **training)
    dense.save_pretrained(source.folder)
    return source, tokenizer, examples


def _examples(
    texts: dict[str, list[str]],
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    options: QuickstartOptions,
    limit: int,
) -> dict[str, list[Example]]:
    config = read_config(source)
    family = sparse_config_class(config, (config.architectures or [None])[0])
    return {
        domain: make_examples(documents, tokenizer, family, options.sequence_length, limit)
        for domain, documents in texts.items()
    }


def _adapt(
    mixture, folder: Path, target: Path, options: QuickstartOptions, pool: list[Example], training: dict[str, Any]
):
    from peft import get_peft_model

    from hf_sparse_moe.adapters import expert_lora_config

    set_seed(options.seed)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT 0.21 still asks for it
    fresh = type(mixture).from_pretrained(folder / "mixture").to(mixture.device)
    adapted = get_peft_model(fresh, expert_lora_config(fresh, r=8, lora_alpha=16))
    adapted.peft_config["default"].base_model_name_or_path = options.push_to or str(target / "mixture")
    train(adapted, pool, learning_rate=2 * options.learning_rate, name="adapter", **training)
    return adapted


def _save(
    mixture: SparseMoePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    folder: Path,
    options: QuickstartOptions,
    evaluation: dict[str, float],
) -> None:
    mixture.save_pretrained(folder)
    copy_companions(source.folder, folder)
    card = render_model_card(mixture, options.push_to or "your-name/quickstart", evaluation=evaluation)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _look_inside(
    mixture: SparseMoePreTrainedModel, held_out: dict[str, list[Example]], batch_size: int
) -> RoutingStatistics:
    sequences: Any = [example for examples in held_out.values() for example in examples]
    groups = [domain for domain, examples in held_out.items() for _ in examples]
    return routing_statistics(mixture, DataLoader(sequences, batch_size, collate_fn=default_data_collator), groups)


def _describe(
    story: Story, corpus: Corpus, examples: dict[str, list[Example]], held_out: dict[str, list[Example]]
) -> None:
    table = Table("domain", "documents", "sequences", "held-out documents", "held-out sequences", box=None)
    for domain in corpus.domains:
        columns = (corpus.train, examples, corpus.held_out, held_out)
        table.add_row(escape(domain), *(f"{len(column[domain]):,}" for column in columns))
    story.console.print(table)


def _describe_receipt(story: Story, dense: PreTrainedModel, mixture: SparseMoePreTrainedModel) -> None:
    receipt: Any = mixture.receipt
    equality = receipt["equality"]
    story.say(
        f"{type(dense).__name__} with {dense.num_parameters():,} parameters -> {type(mixture).__name__} with "
        f"{count_parameters(mixture):,}, {count_parameters(mixture, only_active=True):,} of them active for a token.\n"
        f"Receipt: on {equality['probe_tokens']} probe tokens no output differs from the dense one by more than "
        f"{equality['max_abs_difference']:.1e} (outputs reach {equality['max_abs_output']:.1f})."
    )


def _compare(story: Story, losses: dict[str, dict[str, float]]) -> None:
    table = Table(title="Held-out loss, nats a token (lower is better)", title_justify="left")
    table.add_column("domain")
    for name in ("dense, before", "dense twin", "mixture", "mixture - twin"):
        table.add_column(name, justify="right")
    domains = list(losses["mixture"])
    differences = []
    for domain in domains:
        before, twin, sparse = (losses[name][domain] for name in ("before", "dense twin", "mixture"))
        differences.append(sparse - twin)
        colour = "green" if sparse < twin else "red"
        row = (f"{before:.3f}", f"{twin:.3f}", f"{sparse:.3f}", f"[{colour}]{sparse - twin:+.3f}[/]")
        table.add_row(escape(domain), *row)
    story.console.print(table)
    better = sum(difference < 0 for difference in differences)
    mean = sum(differences) / len(differences)
    story.say(
        f"After the same tokens the mixture is ahead in {better} of {len(domains)} domains, by {-mean:+.3f} nats a "
        "token on average."
    )


def _reload(story: Story, model_name: str, adapter_name: str, prompt: str) -> None:
    command = [sys.executable, "-m", "hf_sparse_moe.quickstart.reload", model_name, adapter_name, "--prompt", prompt]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    written = json.loads(finished.stdout.splitlines()[-1])
    story.say(f"{written['class']} from {escape(model_name)}\n[bold]prompt[/] {escape(prompt)}")
    for name in ("mixture", "adapted"):
        story.say(f"[bold]{name}[/] {escape(written[name])}")


def _prompt(document: str) -> str:
    text = document[:PROMPT_CHARACTERS]
    return text[: text.rfind(" ")] if " " in text else text


def _free_name() -> str:
    number, name = 1, "quickstart"
    while Path(name).exists():
        number += 1
        name = f"quickstart-{number}"
    return name
