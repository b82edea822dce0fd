"""
Runs a recipe as its `__main__` and, on the first process, writes how it was run: `launch_probe.py OUT RECIPE ...`.

A launcher that quietly starts one process would pass any comparison of losses.
"""

import json
import runpy
import sys
from importlib import import_module
from pathlib import Path


out, script, *arguments = sys.argv[1:]
sys.path.insert(0, str(Path(script).parent))

recipe = import_module("recipe")


train_and_evaluate = recipe.train_and_evaluate


def probed(trainer, *arguments) -> None:
    train_and_evaluate(trainer, *arguments)
    if trainer.is_world_process_zero():
        facts = {"world_size": trainer.args.world_size, "wrapper": type(trainer.model_wrapped).__name__}
        Path(out).write_text(json.dumps(facts))


recipe.train_and_evaluate = probed
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
