"""
Run a recipe on the workers of a Ray cluster, one process each:

    python training/launch/ray_train.py --num_workers 8 --use_gpu training/run_clm.py --train_file ... --output_dir ...

Ray sets up the process group, and the recipe runs as it is. `--output_dir` must be a folder that all nodes see.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def run_recipe(config: dict) -> None:
    """What each worker does."""
    script = config["script"]
    sys.path.insert(0, str(Path(script).parent))  # the recipes import `recipe` from beside themselves
    sys.argv = [script, *config["arguments"]]
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_workers", type=int, default=2, help="processes")
    parser.add_argument("--use_gpu", action="store_true", help="a GPU for each")
    parser.add_argument("--storage_path", help="where Ray keeps its own records; ~/ray_results if not given")
    parser.add_argument("--max_failures", type=int, default=0, help="how often the run is started again")
    parser.add_argument("script", type=Path, help="the recipe, such as training/run_clm.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of the recipe")
    args = parser.parse_args()
    trainer = TorchTrainer(
        run_recipe,
        train_loop_config={"script": str(args.script.resolve()), "arguments": args.arguments},
        scaling_config=ScalingConfig(num_workers=args.num_workers, use_gpu=args.use_gpu),
        run_config=RunConfig(
            storage_path=args.storage_path, failure_config=FailureConfig(max_failures=args.max_failures)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
