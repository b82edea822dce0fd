"""
Metrics as `evaluate` modules, one a file, that need no network.

`evaluate.load("accuracy")` downloads a script; these are loaded by path. scikit-learn, SciPy, seqeval, sacrebleu and
rouge_score do the work.
"""

from pathlib import Path

import evaluate


METRICS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def load_metric(name: str) -> evaluate.Metric:
    """
    A metric of this folder.

    Args:
        name (`str`): One of `METRICS`.

    Raises:
        ValueError: an unknown name.

    Example:
        ```python
        load_metric("classification").compute(predictions=[0, 1], references=[0, 1])  # accuracy, f1
        ```
    """
    if name not in METRICS:
        raise ValueError(f"`name={name!r}` is not allowed: it must be one of {METRICS}.")
    # In memory: the processes of a distributed run would else share one file of results.
    return evaluate.load(str(Path(__file__).with_name(f"{name}.py")), keep_in_memory=True)


__all__ = ["METRICS", "load_metric"]
