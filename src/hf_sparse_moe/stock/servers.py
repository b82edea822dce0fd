"""Which inference servers compute what a mixture computes, from which export, and what stands in the way of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_sparse_moe.checkpoints.families import AUTO_CLASSES
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .fit import ExportExplanation, TargetReport, check_fit, config_of, explanation
from .targets import EXPORT_TARGETS, ExportTarget


# The architectures that a server has code of its own for, among those of `EXPORT_TARGETS`.
_WIDELY_READ = {"mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe", "ernie4_5_moe", "glm4_moe"}
_DEEPSEEK = {"deepseek_v3", "deepseek_v2"}
SERVERS = {
    "vllm": _WIDELY_READ | _DEEPSEEK | {"flex_olmo", "granitemoeshared", "dots1"},
    "sglang": _WIDELY_READ | _DEEPSEEK,
    "llama.cpp": {"mixtral", "qwen3_moe"},  # those whose GGUF `export` writes
    "tgi": {"mixtral"} | _DEEPSEEK,
}
# Where the size of a head is not read from the config.
_HEADS_FILL_HIDDEN_SIZE = {("vllm", "qwen2_moe"), ("sglang", "qwen2_moe"), ("tgi", "mixtral")}
# What each reads of `rope_type`, where that is less than transformers knows.
_ROTARY = {
    ("llama.cpp", "mixtral"): ("default", "linear", "yarn", "llama3"),
    ("llama.cpp", "qwen3_moe"): ("default", "linear", "yarn"),
}
_AS_REMOTE_CODE = "with `--trust-remote-code` its fused experts would compute SiLU without biases, whatever ours are"
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "truncate": True}
# The values that one scale is shared by, in each row of a matrix.
_GGUF_BLOCKS = {"Q8_0 and Q4_0": 32, "K-quants": 256}


def explain_serving(
    source: SparseMoePreTrainedModel | SparseMoeConfig | str | Path,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
) -> ExportExplanation:
    """
    For each inference server, whether it computes what a mixture computes, from which export, or what stands in the
    way: another activation than SiLU, which their fused experts compute whatever the config says, biases, a router.

    Args:
        source (`SparseMoePreTrainedModel`, `SparseMoeConfig`, `str` or `Path`): A mixture, its config, or the folder
            or Hub id of one.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.

    Returns:
        [`ExportExplanation`] with the servers as targets: `report["vllm"].config.model_type` is what `export` would
        write for it. Reads no weights, and starts no server.

    Example:
        ```python
        print(explain_serving("qwen3-8x"))
        ```
    """
    config, saved_as = config_of(source, revision, token)
    return explanation(config, [choose_for_server(server, config, saved_as)[1] for server in SERVERS])


def add_classes_to_transformers() -> None:
    """Put the families' classes where `transformers serve` looks for the class that a config names."""
    from transformers.cli.serving import model_manager  # not before a server is wanted

    for config_class, classes in AUTO_CLASSES.items():
        for each in (config_class, *classes.values()):
            setattr(model_manager.transformers, each.__name__, each)


def choose_for_server(
    server: str, config: SparseMoeConfig, saved_as: str | None, architecture: str = "auto"
) -> tuple[ExportTarget | None, TargetReport]:
    """The first row that fits the mixture, and that `server` computes as it does; None where there is none."""
    dense = config.dense_config.model_type
    rows = [row for row in EXPORT_TARGETS if dense in row.dense and architecture in ("auto", row.model_type)]
    obstacles = []
    for row in rows:
        if row.model_type in SERVERS[server]:
            report = check_fit(row, config, saved_as)
            found = list(report.obstacles) or _limits(server, report.config)
            if not found:
                return row, TargetReport(server, (), report.config, tuple(_notes(server, report.config)))
            obstacles.append(f"{row.model_type}: {', '.join(found)}")
    if not rows:
        obstacles.append(f"transformers has no sparse sibling of {dense}")
    elif not obstacles:
        obstacles.append(f"it reads no {' or '.join(row.model_type for row in rows)}")
    obstacles += [_AS_REMOTE_CODE] if server in ("vllm", "sglang") else []
    return None, TargetReport(server, tuple(obstacles))


def _limits(server: str, config: Any) -> list[str]:
    """What a server makes of a config that transformers reads otherwise."""
    name, rope_type = config.model_type, (config.rope_parameters or {}).get("rope_type", "default")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    conditions = [
        (
            config.hidden_act not in ("silu", "swish"),
            f"`hidden_act={config.hidden_act!r}`: {server}'s experts compute SiLU",
        ),
        (
            (server, name) in _HEADS_FILL_HIDDEN_SIZE and head_dim * heads != config.hidden_size,
            f"`head_dim={head_dim}`: {server} takes `hidden_size / num_attention_heads`",
        ),
        (
            rope_type not in _ROTARY.get((server, name), (rope_type,)),
            f"`rope_type={rope_type!r}`: the GGUF of this architecture holds no such rotary embedding",
        ),
    ]
    if server == "llama.cpp":
        rope = config.rope_parameters or {}
        usual = all(rope.get(name, value) == value for name, value in _YARN_DEFAULTS.items())
        conditions += [
            (
                rope_type == "yarn" and not usual,
                f"`rope_parameters={rope}`: model.gguf holds YaRN with {_YARN_DEFAULTS} alone",
            ),
            (
                not getattr(config, "norm_topk_prob", True),
                "`norm_topk_prob=False`: llama.cpp always divides the weights of the chosen experts by their sum",
            ),
            (
                name == "mixtral" and window is not None and window < config.max_position_embeddings,
                f"`sliding_window={window}`: llama.cpp attends to everything",
            ),
            (bool(getattr(config, "mlp_only_layers", None)), "dense layers: llama.cpp takes experts in every layer"),
            (bool(getattr(config, "attention_bias", False)), "`attention_bias=True`: llama.cpp has no such biases"),
        ]
    return [limit for stands, limit in conditions if stands]


def _notes(server: str, config: Any) -> list[str]:
    """What GGUF's quantised formats leave as it is."""
    sizes = ("hidden_size", "intermediate_size", "moe_intermediate_size")
    rows = {name: getattr(config, name) for name in sizes if hasattr(config, name)}
    rows.pop("intermediate_size" if "moe_intermediate_size" in rows else "", None)  # that of dense layers
    return [
        f"`{name}={size}` is not a multiple of {block}, as {kinds} need it"
        for kinds, block in _GGUF_BLOCKS.items()
        for name, size in rows.items()
        if server == "llama.cpp" and size % block
    ]
