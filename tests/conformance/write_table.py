"""Measure every architecture and write docs/architectures.md and .csv: `python tests/conformance/write_table.py`."""

import os
import sys
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from conformance.measuring import PAIRS, measure
from conformance.table import write


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = []
    for model_type, head in PAIRS:
        torch.manual_seed(0)
        results.append(measure(model_type, head))
        print(*vars(results[-1]).values(), flush=True)
    write(results)


if __name__ == "__main__":
    main()
