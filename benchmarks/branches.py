"""
Do dense models that were fine-tuned on different domains make a better model together, as the experts of one mixture?

A small dense decoder is fine-tuned on three domains at once (the base), then on each of them alone (the branches).
The branches become the experts of one mixture, whose routers start at random or from the hidden states of each
domain's own text. The control, D, is the base trained further on all that the branches saw together, then as long as
the mixture. Prints the held-out loss by domain of every model, and how far routing and domain agree, and writes them
to `benchmarks/results/branches.json`.

    python benchmarks/branches.py --model PATH_OR_ID --data FOLDER

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
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, logging

from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoePreTrainedModel, upcycle
from hf_sparse_moe.quickstart.corpus import load_corpus
from hf_sparse_moe.quickstart.examples import Example, interleave, make_examples
from hf_sparse_moe.quickstart.training import held_out_losses, train
from hf_sparse_moe.routing import routing_statistics
from hf_sparse_moe.upcycling.branches import make_trunk


DATA = Path(os.environ.get("SPARSE_MOE_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
RESULTS = Path(__file__).parent / "results" / "branches.json"
CONSOLE = Console(stderr=True)  # progress; the table goes to stdout


def fine_tuned(model: PreTrainedModel, examples: list[Example], name: str, args, folder: Path) -> PreTrainedModel:
    """A trained copy."""
    model = copy.deepcopy(model)
    train(
        model, examples, batch_size=args.batch_size, learning_rate=args.learning_rate, seed=0, name=name,
        folder=folder, console=CONSOLE,
    )  # fmt: skip
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DATA / "stories260k" / "hf"))
    parser.add_argument("--data", default=str(DATA / "domains"))
    parser.add_argument("--domains", nargs="+", default=["law", "python_code", "zh_poetry"])
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--branch-steps", type=int, default=200)
    parser.add_argument("--mixture-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)

    corpus = load_corpus(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def examples_of(texts: dict[str, list[str]], limit: int) -> dict[str, list[Example]]:
        return {
            domain: make_examples(texts[domain], tokenizer, SparseMoeDecoderConfig, args.length, limit)
            for domain in args.domains
        }

    train_set, held_out = examples_of(corpus.train, 4000), examples_of(corpus.held_out, 64)
    steps = args.batch_size

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        base = fine_tuned(start, interleave(train_set, args.base_steps * steps, seed=0), "base", args, folder)
        branches, together = [], []
        for domain in args.domains:
            alone = interleave({domain: train_set[domain]}, args.branch_steps * steps, seed=1)
            branches.append(fine_tuned(base, alone, domain, args, folder))
            together += alone
        random.Random(1).shuffle(together)
        dense = fine_tuned(base, together, "D", args, folder)
        prompts = [[torch.stack([e["input_ids"] for e in train_set[domain][:16]])] for domain in args.domains]
        with_prompts, at_random = (
            upcycle(method="branches", sources=branches, prompts=given, num_experts_per_tok=2)
            for given in (prompts, None)
        )
        fine = upcycle(method="branches", sources=branches, prompts=prompts, num_experts_per_tok=4, granularity=2)
        mixed = interleave(train_set, args.mixture_steps * steps, seed=2)
        models = {"base": base}
        models |= {f"branch {domain}": branch for domain, branch in zip(args.domains, branches, strict=True)}
        models |= {"D, on the tokens of all branches": dense}
        models |= {"average of the branches": make_trunk(branches, None, "average")}
        models |= {"mixture, random routers": at_random, "mixture, routers from prompts": with_prompts}
        models |= {
            f"D, {args.mixture_steps} steps more": fine_tuned(dense, mixed, "D", args, folder),
            f"average, {args.mixture_steps} steps more": fine_tuned(
                models["average of the branches"], mixed, "average", args, folder
            ),
            f"mixture (random), {args.mixture_steps} steps more": fine_tuned(
                at_random, mixed, "mixture", args, folder
            ),
            f"mixture (prompts), {args.mixture_steps} steps more": fine_tuned(
                with_prompts, mixed, "mixture", args, folder
            ),
            f"mixture (prompts, granularity 2), {args.mixture_steps} steps more": fine_tuned(
                fine, mixed, "mixture", args, folder
            ),
        }
        results = {"arguments": vars(args) | {"model": Path(args.model).parent.name, "data": Path(args.data).name}}
        results |= {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__, "models": {}}
        print(f"\n| held-out loss, nats per token | {' | '.join(args.domains)} | mean | routing and domain, NMI |")
        print("| --- |" + " ---: |" * (len(args.domains) + 2))
        for label, model in models.items():
            losses = held_out_losses(model, held_out, batch_size=args.batch_size, folder=folder)
            numbers = [losses[domain] for domain in args.domains]
            row = [f"{number:.3f}" for number in (*numbers, sum(numbers) / len(numbers))]
            shared = agreement(model, held_out)
            print(f"| {label} | {' | '.join(row)} | {'' if shared is None else f'{shared:.3f}'} |", flush=True)
            results["models"][label] = {"loss": losses, "mutual_information": shared}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


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
