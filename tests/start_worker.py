"""
Imports in fresh processes: each case runs in a fork of this one, which has loaded torch at most, and prints one line.

Run by tests/test_start.py; `python tests/start_worker.py FOLDER`, FOLDER a saved mixture of the decoder family.
"""

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from types import ModuleType


MIXTURE = sys.argv[1]
OPTIONAL = ("accelerate", "bitsandbytes", "datasets", "peft", "evaluate", "matplotlib", "trl", "sklearn")


def heavy_modules() -> list[str]:
    return [name for name in ("torch", "transformers", "numpy", "huggingface_hub") if name in sys.modules]


def help_of_every_command() -> None:
    """`--help`, `--version` and a subcommand's `--help`, and the package itself, load nothing heavy."""
    import hf_sparse_moe

    assert set(hf_sparse_moe.__all__) <= set(dir(hf_sparse_moe))
    assert not heavy_modules(), heavy_modules()

    import typer.main

    from hf_sparse_moe.cli import app

    commands = list(typer.main.get_command(app).commands)
    assert len(commands) > 10
    for arguments in (["--help"], ["--version"], *([name, "--help"] for name in commands)):
        with redirect_stdout(StringIO()) as shown:
            app(args=arguments, standalone_mode=False)
        assert shown.getvalue(), arguments
    assert not heavy_modules(), heavy_modules()


def auto_classes_and_stock_mixtures_work() -> None:
    """What every order of imports has to end with."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MIXTURE)

    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    import hf_sparse_moe

    assert type(config) is hf_sparse_moe.SparseMoeDecoderConfig
    model = AutoModelForCausalLM.from_pretrained(MIXTURE)
    assert type(model) is hf_sparse_moe.SparseMoeDecoderForCausalLM
    assert model.publisher is not None
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    for name in ("sparse_moe", "sparse_moe_recompute"):
        stock = MixtralForCausalLM._from_config(MixtralConfig(**sizes, **heads), experts_implementation=name)
        assert stock(input_ids=stock.dummy_inputs["input_ids"]).logits.isfinite().all()


def ours_first() -> None:
    import hf_sparse_moe  # noqa: F401

    auto_classes_and_stock_mixtures_work()


def transformers_first() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM  # noqa: F401, I001
    import hf_sparse_moe  # noqa: F401

    auto_classes_and_stock_mixtures_work()


def from_the_middle_of_transformers() -> None:
    """A model's file imports `modeling_layers`, which imports the Auto classes before either is whole."""
    import hf_sparse_moe  # noqa: F401, I001
    import transformers.models.olmoe.modeling_olmoe  # noqa: F401

    auto_classes_and_stock_mixtures_work()


def from_the_middle_of_ours_without_extras() -> None:
    """Every public name but those of adapters works where no optional package is installed."""
    for name in OPTIONAL:
        sys.modules[name] = None  # as if it were not installed
    import hf_sparse_moe.models.feed_forward

    for name in hf_sparse_moe.__all__:
        if name != "expert_lora_config":
            assert not isinstance(getattr(hf_sparse_moe, name), ModuleType), name
    auto_classes_and_stock_mixtures_work()


def run(case: Callable[[], None]) -> None:
    process = os.fork()
    if process == 0:
        try:
            case()
        except BaseException:  # noqa: BLE001  it ends the process
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    print(case.__name__, "passed" if status == 0 else "failed", flush=True)


if __name__ == "__main__":
    run(help_of_every_command)
    import torch  # noqa: F401  once, for all that follow

    run(ours_first)
    run(transformers_first)
    run(from_the_middle_of_transformers)
    run(from_the_middle_of_ours_without_extras)
