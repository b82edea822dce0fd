"""
Do dense models that were fine-tuned on different domains make a better model together, as the experts of one mixture?

A small dense decoder is fine-tuned on three domains at once (the base), then on each of them alone (the branches).
The branches become the experts of one mixture, whose routers start at random or from the hidden states of each
domain's own text. The control, D, is the base trained further on all that the branches saw together, then as long as
the mixture. Writes the held-out loss by domain of every model, and how far routing and domain agree, for each seed
(the order of the text, and the routers), to `benchmarks/results/branches.json`; a seed that is there is not run again.

    python benchmarks/branches.py --model PATH_OR_ID --data FOLDER --seeds 0 1 2
    python benchmarks/write_results.py

`--model` is a dense decoder with a tokenizer, `--data` a folder of `.jsonl` or `.txt` files, one domain a file, with
`train` and `valid` in their paths. Without them: the stories260k checkpoint and the domains where they lie beside the
checkout.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, logging

from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoePreTrainedModel, upcycle
from hf_sparse_moe.quickstart.corpus import load_corpus
from hf_sparse_moe.quickstart.examples import Example, interleave, make_examples
from hf_sparse_moe.quickstart.training import held_out_losses, train
from hf_sparse_moe.routing import routing_statistics
from hf_sparse_moe.upcycling.branches import make_trunk
from measuring import RESULTS, device_name


DATA = Path(os.environ.get("SPARSE_MOE_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
CONSOLE = Console(stderr=True)  # progress; the table goes to stdout


def fine_tuned(
    model: PreTrainedModel, examples: list[Example], name: str, args: argparse.Namespace, folder: Path
) -> PreTrainedModel:
    """A trained copy."""
    model = copy.deepcopy(model)
    train(
        model, examples, batch_size=args.batch_size, learning_rate=args.learning_rate, seed=0, name=name,
        folder=folder, console=CONSOLE,
    )  # fmt: skip
    return model


def compare(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Of each model its held-out loss by domain and, of a mixture, the mutual information of expert and domain."""
    torch.manual_seed(seed)
    corpus, tokenizer = load_corpus(args.data), AutoTokenizer.from_pretrained(args.model)

    def examples_of(texts: dict[str, list[str]], limit: int) -> dict[str, list[Example]]:
        return {
            domain: make_examples(texts[domain], tokenizer, SparseMoeDecoderConfig, args.length, limit)
            for domain in args.domains
        }

    train_set, held_out = examples_of(corpus.train, 4000), examples_of(corpus.held_out, 64)

    def drawn(domains: dict[str, list[Example]], steps: int, stage: int) -> list[Example]:
        return interleave(domains, steps * args.batch_size, seed=10 * seed + stage)

    start = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    base = fine_tuned(start, drawn(train_set, args.base_steps, 0), "base", args, folder)
    branches, together = [], []
    for domain in args.domains:
        alone = drawn({domain: train_set[domain]}, args.branch_steps, 1)
        branches.append(fine_tuned(base, alone, domain, args, folder))
        together += alone
    random.Random(seed).shuffle(together)
    dense = fine_tuned(base, together, "D", args, folder)
    prompts = [[torch.stack([each["input_ids"] for each in train_set[domain][:16]])] for domain in args.domains]
    of_branches = {"method": "branches", "sources": branches, "seed": seed}
    starts = {
        "D": dense,
        "average": make_trunk(branches, None, "average"),
        "mixture, random routers": upcycle(**of_branches, num_experts_per_tok=2),
        "mixture, routers from prompts": upcycle(**of_branches, prompts=prompts, num_experts_per_tok=2),
        "mixture, routers from prompts, granularity 2": upcycle(
            **of_branches, prompts=prompts, num_experts_per_tok=4, granularity=2
        ),
    }
    mixed = drawn(train_set, args.mixture_steps, 2)
    models = {"base": base} | dict(zip((f"branch {domain}" for domain in args.domains), branches, strict=True))
    for name, model in starts.items():
        models[name] = model
        models[f"{name}, {args.mixture_steps} steps more"] = fine_tuned(model, mixed, name, args, folder)
    found = {}
    for name, model in models.items():
        losses = held_out_losses(model, held_out, batch_size=args.batch_size, folder=folder)
        found[name] = {"loss": losses, "mutual_information": agreement(model, held_out)}
        print(f"seed {seed}, {name}: " + ", ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DATA / "stories260k" / "hf"))
    parser.add_argument("--data", default=str(DATA / "domains"))
    parser.add_argument("--domains", nargs="+", default=["law", "python_code", "zh_poetry"])
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--branch-steps", type=int, default=200)
    parser.add_argument("--mixture-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "branches.json")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    setting = {name: value for name, value in vars(args).items() if name not in ("seeds", "output")}
    setting |= {"model": Path(args.model).parent.name, "data": Path(args.data).name}
    written = json.loads(args.output.read_text()) if args.output.is_file() else {"setting": setting, "seeds": {}}
    if written["setting"] != setting:
        parser.error(f"{args.output} was made with other settings. Choose another --output.")
    for seed in args.seeds:
        if str(seed) not in written["seeds"]:
            with tempfile.TemporaryDirectory() as folder:
                written["seeds"][str(seed)] = compare(args, seed, Path(folder))
            written["machine"] = device_name("cpu")
            written["versions"] = {name: version(name) for name in ("torch", "transformers")}
            args.output.write_text(json.dumps(written, indent=1) + "\n")


def agreement(model: PreTrainedModel, held_out: dict[str, list[Example]]) -> float | None:
    """Normalised mutual information of expert and domain, mean over the sparse layers; nothing for a dense model."""
    if not isinstance(model, SparseMoePreTrainedModel):
        return None
    batches = [{"input_ids": torch.stack([example["input_ids"] for example in held_out[name]])} for name in held_out]
    groups = [name for name in held_out for _ in held_out[name]]
    layers = routing_statistics(model, batches, groups=groups).layers
    return sum(layer.mutual_information for layer in layers) / len(layers)


if __name__ == "__main__":
    main()
