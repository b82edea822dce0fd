"""
What is wrong with the balance loss of transformers' mixtures, and is it right under `fix_balance`?

Tiny models of random weights, each as it is ("before") and fixed ("after"). One table:
- gradient: norm of the router's gradient under the stock Trainer on 8 equal sequences, as 8 micro-batches of 1 over
  that as 1 of 8. 1 is right. With a coefficient of 1; the task loss is part of it. DeepSeek-V3 has no balance loss in
  transformers; Switch's is asked for in each call, because its forward does not look into the config.
- collapse: the loss of 4 layers of 4 experts of which each sends all tokens to one expert of its own. An even load
  scores 1, so 4 is right.
- pads: by how much the loss moves, relatively, when 8 pads follow each sequence. 0 is right.

    python benchmarks/stock_balance.py
"""

from __future__ import annotations

import contextlib
import tempfile

import torch
import transformers as hf
from transformers.utils import logging

from hf_sparse_moe.routing import find_mixture_layers, fix_balance


LAYERS = 4
_TOKENS = {"vocab_size": 96, "pad_token_id": 0, "router_aux_loss_coef": 1.0, "output_router_logits": True}
_DECODER = _TOKENS | {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "num_hidden_layers": LAYERS,
}  # fmt: skip
_SHARED = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48}
_DEEPSEEK = {
    "moe_intermediate_size": 48, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
_SWITCH = _TOKENS | {
    "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": LAYERS, "num_decoder_layers": LAYERS,
    "num_sparse_encoder_layers": LAYERS // 2, "num_sparse_decoder_layers": LAYERS // 2, "dropout_rate": 0.0,
    "router_jitter_noise": 0.0, "router_z_loss_coef": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
# Config class, what it calls the number of experts, and its other fields. 4 sparse layers each.
MODELS = {
    "Mixtral": (hf.MixtralConfig, "num_local_experts", _DECODER),
    "Qwen2-MoE": (hf.Qwen2MoeConfig, "num_experts", _DECODER | _SHARED),
    "Qwen3-MoE": (hf.Qwen3MoeConfig, "num_experts", _DECODER | _SHARED),
    "OLMoE": (hf.OlmoeConfig, "num_experts", _DECODER),
    "DeepSeek-V3": (hf.DeepseekV3Config, "n_routed_experts", _DECODER | _DEEPSEEK),
    "GPT-OSS": (hf.GptOssConfig, "num_local_experts", _DECODER),
    "GraniteMoE": (hf.GraniteMoeConfig, "num_local_experts", _DECODER),
    "Switch": (hf.SwitchTransformersConfig, "num_experts", _SWITCH),
}
SEQUENCES, LENGTH, PADS = 8, 12, 8


def build(name: str, experts: int, top_k: int) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config_class, experts_field, fields = MODELS[name]
    config = config_class(**fields, **{experts_field: experts}, num_experts_per_tok=top_k)
    auto_class = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    return auto_class.from_config(config)


def fixed(model: hf.PreTrainedModel, fix: bool) -> contextlib.AbstractContextManager:
    return fix_balance(model, router_aux_loss_coef=1.0) if fix else contextlib.nullcontext()


def inputs(model: hf.PreTrainedModel, pads: int = 0) -> dict[str, torch.Tensor]:
    """Sequences, and with `pads` the same ones with that many pads behind each."""
    ids = torch.randint(3, 96, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    tail = torch.zeros(SEQUENCES, pads, dtype=torch.long)
    ids, mask = torch.cat([ids, tail], dim=1), torch.cat([torch.ones_like(ids), tail], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class RouterGradient(hf.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        parameters = [p for layer in find_mixture_layers(model) for p in layer.router.parameters()]
        self.norm = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item()


def router_gradient(name: str, fix: bool, micro_batches: int) -> float:
    """Norm of the gradient of all routers, of one optimizer step on equal sequences."""
    model, callback = build(name, experts=8, top_k=2), RouterGradient()
    example = {key: value[0] for key, value in inputs(model).items()}
    with tempfile.TemporaryDirectory() as folder, fixed(model, fix):
        arguments = hf.TrainingArguments(
            folder, per_device_train_batch_size=SEQUENCES // micro_batches, gradient_accumulation_steps=micro_batches,
            max_steps=1, max_grad_norm=0.0, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = hf.Trainer(model=model, args=arguments, train_dataset=[example] * SEQUENCES, callbacks=[callback])
        trainer.remove_callback(hf.PrinterCallback)
        if not fix and model.config.is_encoder_decoder:
            model.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"output_router_logits": True}), with_kwargs=True
            )
        trainer.train()
    return callback.norm


def aux_loss(model: hf.PreTrainedModel, fix: bool, pads: int = 0) -> float | None:
    """The unscaled balance loss of one forward pass; for a stock encoder-decoder the mean of its two sides."""
    with fixed(model, fix):
        outputs = model(**inputs(model, pads), output_router_logits=True)
    if outputs.get("aux_loss") is not None:
        return outputs.aux_loss.item()
    sides = [outputs.get("encoder_aux_loss"), outputs.get("decoder_aux_loss")]
    return None if sides[0] is None else (sides[0].item() + sides[1].item()) / 2


def collapsed(name: str) -> hf.PreTrainedModel:
    """Layer l sends all tokens to its expert l, almost surely."""
    model = build(name, experts=4, top_k=1)
    for number, layer in enumerate(find_mixture_layers(model)):
        weight = next(p for p in layer.router.parameters() if p.dim() == 2)
        with torch.no_grad():
            weight.fill_(-1.0)[number] = 1.0
        layer.router.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]), *args[1:]))
    return model


def shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("| model | gradient, before | after | collapse, before | after | pads, before | after |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in MODELS:
        cells = []
        for fix in (False, True):
            plain = build(name, experts=8, top_k=2)
            value = aux_loss(plain, fix)
            cells.append(
                [
                    f"{router_gradient(name, fix, 8) / router_gradient(name, fix, 1):.6f}",
                    shown(aux_loss(collapsed(name), fix)),
                    "none" if value is None else f"{abs(aux_loss(plain, fix, PADS) / value - 1):.1e}",
                ]
            )
        print(f"| {name} |", " | ".join(f"{before} | {after}" for before, after in zip(*cells, strict=True)), "|")


if __name__ == "__main__":
    main()
