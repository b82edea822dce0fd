"""
Writes the files beside it, with version 0.1 of the package; later versions read them (tests/test_version_0_1.py).

To run it again, check out version 0.1 (commit 15e76eb) elsewhere:
`PYTHONPATH=THERE/src python tests/data/v0_1/write.py`. What the test shares with it uses transformers' API alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file


HERE = Path(__file__).parent
MODELS = {
    "encoder": hf.AutoModelForMaskedLM,
    "decoder": hf.AutoModelForCausalLM,
    "encoder_decoder": hf.AutoModelForSeq2SeqLM,
    "streamed": hf.AutoModelForCausalLM,
    "exported": hf.AutoModelForCausalLM,
}
# Trained for a few steps from the files: by the config as it was saved, and with these changes.
TRAININGS = {
    "encoder": ("encoder", {}),
    "encoder, expert choice": (
        "encoder",
        {"router_type": "expert_choice", "scoring_func": "softmax", "router_bias_update_speed": 0.0},
    ),
    "encoder, one loss a sequence": ("encoder", {"balance_scope": "sequence"}),
    "decoder": ("decoder", {}),
    "decoder, capacity": ("decoder", {"capacity_factor": 0.75}),
    "decoder, jitter and dropout": ("decoder", {"router_jitter_noise": 0.1, "expert_dropout": 0.1}),
    "decoder, groups": ("decoder", {"n_group": 2, "topk_group": 1}),
    "decoder, hash": ("decoder", {"router_type": "hash"}),
    "encoder_decoder": ("encoder_decoder", {}),
    "encoder_decoder, global batch": ("encoder_decoder", {"balance_scope": "global_batch"}),
}
STEPS = 5
_IDS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip


def inputs_of(family: str, seed: int) -> dict[str, torch.Tensor]:
    """Token ids, a mask that leaves out the end of the first row, and labels."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, _IDS["vocab_size"], (2, 8), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, -3:] = 0
    input_ids[0, -3:] = 0
    if family == "encoder_decoder":
        labels = torch.randint(5, _IDS["vocab_size"], (2, 6), generator=generator)
        labels[1, -2:] = -100
    else:
        labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@torch.no_grad()
def logits_of(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Of the model in evaluation mode; at pads, where a router may choose freely, 0."""
    inputs = inputs_of(name, seed=0)
    labels = inputs.pop("labels")
    if name == "encoder_decoder":
        return model.eval()(**inputs, decoder_input_ids=labels.clamp(min=0)).logits
    return model.eval()(**inputs).logits * inputs["attention_mask"][..., None]


def train(folder: Path, name: str, changes: dict) -> dict[str, list[float]]:
    """The losses and gradient norms of some steps of SGD in float32 (Adam would enlarge rounding errors)."""
    torch.manual_seed(0)
    model = MODELS[name].from_pretrained(folder, **changes).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    numbers: dict[str, list[float]] = {"loss": [], "aux_loss": [], "gradient_norm": []}
    for step in range(STEPS):
        torch.manual_seed(step)
        output = model(**inputs_of(name, seed=step))
        output.loss.backward()
        numbers["loss"].append(output.loss.item())
        numbers["aux_loss"].append(output.aux_loss.item() if output.get("aux_loss") is not None else 0.0)
        numbers["gradient_norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return numbers


def _enlarge(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights so large that the routing matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise) if parameter.dim() > 1 else parameter.add_(noise)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def write() -> None:
    """Needs version 0.1."""
    import peft

    import hf_sparse_moe as moe
    from hf_sparse_moe.export import export
    from hf_sparse_moe.hub.base_identity import record_base

    if moe.__version__ != "0.1.0" or not hasattr(moe, "stream_upcycle"):
        raise SystemExit(f"This script needs version 0.1.0 of hf_sparse_moe, not {moe.__version__}.")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for old in HERE.iterdir():
        if old.is_dir():
            shutil.rmtree(old)

    dense_llama = hf.LlamaConfig(**_IDS, **_SIZES, num_key_value_heads=1, tie_word_embeddings=True)
    t5 = hf.T5Config(
        vocab_size=48, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_decoder_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    configs = {
        "encoder": moe.SparseMoeEncoderConfig.from_dense(
            hf.BertConfig(**_IDS, **_SIZES), num_experts=4, scoring_func="sigmoid", router_bias_update_speed=1e-3,
            routed_scaling_factor=1.5, mlp_layer_types=["dense", "sparse"],
        ),
        "decoder": moe.SparseMoeDecoderConfig.from_dense(
            dense_llama, num_experts=4, moe_intermediate_size=12, num_shared_experts=1, router_z_loss_coef=1e-2,
        ),
        "encoder_decoder": moe.SparseMoeEncoderDecoderConfig.from_dense(
            t5, num_experts=4, scoring_func="cosine", norm_topk_prob=False, num_experts_per_tok=1,
        ),
    }  # fmt: skip
    for seed, (family, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        _enlarge(MODELS[family].from_config(config), seed).save_pretrained(HERE / family)

    torch.manual_seed(10)
    _enlarge(hf.LlamaForCausalLM(dense_llama), 10).save_pretrained(HERE / "dense")
    moe.stream_upcycle(HERE / "dense", HERE / "streamed", 4, method="split", seed=1)
    export(HERE / "streamed", HERE / "exported")

    base = MODELS["streamed"].from_pretrained(HERE / "streamed")
    adapted = peft.get_peft_model(base, moe.expert_lora_config(base, r=2, lora_alpha=4)).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(HERE / "adapter")
    record_base(adapted, HERE / "adapter")
    (HERE / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's own empty form
    adapter_config = json.loads((HERE / "adapter" / "adapter_config.json").read_text())
    adapter_config["base_model_name_or_path"] = "tester/streamed"  # not a folder of one machine
    (HERE / "adapter" / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n")

    logits = {name: logits_of(auto.from_pretrained(HERE / name), name) for name, auto in MODELS.items()}
    logits["adapter"] = logits_of(adapted, "streamed")
    save_file({key: tensor.contiguous() for key, tensor in logits.items()}, HERE / "logits.safetensors")
    trainings = {title: train(HERE / name, name, changes) for title, (name, changes) in TRAININGS.items()}
    (HERE / "trainings.json").write_text(json.dumps(trainings, indent=1) + "\n")

    # The code that travels with each checkpoint is the same: it is kept once.
    for name in MODELS:
        for path in sorted((HERE / name).glob("*.py")):
            (HERE / "code").mkdir(exist_ok=True)
            path.replace(HERE / "code" / path.name)


if __name__ == "__main__":
    write()
