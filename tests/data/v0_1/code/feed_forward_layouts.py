"""The ways in which dense models name the parts of their feed-forwards. Data: to support a new one, add a row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FeedForwardLayout:
    """
    One way of naming the parts of a feed-forward. Names are attributes of its owner; dots descend.

    A layout is data: to support a new one, add a row to `FEED_FORWARD_LAYOUTS`.

    Args:
        name (`str`): How `list_feed_forward_layouts` calls it.
        up (`tuple[str, ...]`): The first projection; two where gate and up are apart, the gate first.
        down (`str`): The second projection.
        activations (`tuple[str, ...]`):
            Where the activation may be. Where it is a function in the code of the module that holds the first
            projection: that module, `""` for the owner.
        packed (`bool`): Whether one first projection holds gate and up, the gate's rows first.
        inner_dropout (`tuple[str, ...]`): Dropout between activation and `down`: a module, or a probability.
        outer_dropout (`tuple[str, ...]`): Dropout after `down`, inside the owner.
        inline (`bool`):
            Whether the owner is the whole layer. Then the block takes the place of the first projection, and
            activation and `down` become identities, so that the layer's own dropout and residual stay in place.
            Else the owner is nothing but the feed-forward, and the block takes its place.
        forbidden (`tuple[str, ...]`):
            Attributes that, where they are set, make the owner compute more than `down(act(up(x)))`.
        example (`str`): Architectures that use it.
    """

    name: str
    up: tuple[str, ...]
    down: str
    activations: tuple[str, ...]
    packed: bool = False
    inner_dropout: tuple[str, ...] = ()
    outer_dropout: tuple[str, ...] = ()
    inline: bool = False
    forbidden: tuple[str, ...] = ()
    example: str = ""

    @property
    def gated(self) -> bool:
        return self.packed or len(self.up) == 2


FEED_FORWARD_LAYOUTS = (
    FeedForwardLayout(
        "gate_up_down",
        ("gate_proj", "up_proj"),
        "down_proj",
        ("act_fn", "activation_fn", "act"),
        inner_dropout=("dropout",),
        forbidden=("activation_sparsity",),
        example="Llama, Qwen, Mistral, Gemma, OLMo, SmolLM3, EuroBERT, T5Gemma",
    ),
    FeedForwardLayout("w1_w3_w2", ("w1", "w3"), "w2", ("act_fn", "activation_fn", "act", ""), example="LFM2"),
    FeedForwardLayout(
        "w_0_w_1_w_out",
        ("w_in.w_0", "w_in.w_1"),
        "w_out",
        ("w_in.act",),
        inner_dropout=("dropout",),
        example="CPM-Ant",
    ),
    FeedForwardLayout("proj_gate_up_down", ("proj_up_gate", "proj_up"), "proj_down", ("act_fn",), example="xLSTM"),
    FeedForwardLayout("wi_0_wi_1_wo", ("wi_0", "wi_1"), "wo", ("act",), inner_dropout=("dropout",), example="T5 v1.1"),
    FeedForwardLayout(
        "packed_gate_up", ("gate_up_proj",), "down_proj", ("activation_fn", "act_fn"), packed=True, example="Phi-3"
    ),
    FeedForwardLayout(
        "packed_wi_wo", ("Wi",), "Wo", ("act",), packed=True, inner_dropout=("drop",), example="ModernBERT"
    ),
    FeedForwardLayout("packed_fc1_fc2", ("fc1",), "fc2", ("activation_fn",), packed=True, example="Moshi"),
    FeedForwardLayout(
        "packed_input_output",
        ("input_linear",),
        "output_linear",
        ("activation",),
        packed=True,
        example="Granite 4.0 without experts",
    ),
    FeedForwardLayout("wi_wo", ("wi",), "wo", ("act",), inner_dropout=("dropout",), example="T5"),
    FeedForwardLayout(
        "c_fc_c_proj",
        ("c_fc",),
        "c_proj",
        ("act", "act_fn"),
        outer_dropout=("dropout", "residual_dropout"),
        example="GPT-2, StarCoder2",
    ),
    FeedForwardLayout("dense_4h", ("dense_h_to_4h",), "dense_4h_to_h", ("act", "act_fn"), example="GPT-NeoX, Falcon"),
    FeedForwardLayout("up_down", ("up_proj",), "down_proj", ("act_fn", "activation_fn", "act"), example="Nemotron"),
    FeedForwardLayout(
        "fc_in_fc_out", ("fc_in",), "fc_out", ("act",), outer_dropout=("dropout",), example="GPT-J, CodeGen"
    ),
    FeedForwardLayout(
        "lin1_lin2", ("lin1",), "lin2", ("activation", "act"), outer_dropout=("dropout",), example="DistilBERT"
    ),
    FeedForwardLayout("fc1_fc2", ("fc1",), "fc2", ("activation_fn", "act", "act_fn"), example="Phi"),
    FeedForwardLayout(
        "fc1_dropout_fc2", ("fc1",), "fc2", ("act",), inner_dropout=("dropout",), example="SeamlessM4T, dense NLLB-MoE"
    ),
    FeedForwardLayout(
        "intermediate_output",
        ("intermediate",),
        "output",
        ("activation_fn",),
        inner_dropout=("activation_dropout",),
        outer_dropout=("dropout",),
        example="ProphetNet",
    ),
    FeedForwardLayout("dense1_dense2", ("dense1",), "dense2", ("intermediate_act_fn",), example="Perceiver"),
    FeedForwardLayout("sequential", ("0",), "2", ("1",), example="CTRL"),
    FeedForwardLayout(
        "inline_fc1_fc2",
        ("fc1",),
        "fc2",
        ("activation_fn",),
        inner_dropout=("activation_dropout",),
        inline=True,
        example="BART, mBART, Marian, Pegasus, M2M-100, OPT",
    ),
    FeedForwardLayout(
        "split_intermediate_output",
        ("intermediate.dense",),
        "output.dense",
        ("intermediate.intermediate_act_fn",),
        inline=True,
        example="BERT, RoBERTa, XLM-R, ELECTRA, DeBERTa",
    ),
    FeedForwardLayout(
        "split_activation_in_code",
        ("intermediate.dense",),
        "output.dense",
        ("intermediate",),
        inline=True,
        example="ESM",
    ),
    FeedForwardLayout(
        "split_dense_output",
        ("dense.dense",),
        "output.dense",
        ("dense.act_fn",),
        inner_dropout=("dense.dropout",),
        inline=True,
        example="Reformer",
    ),
    FeedForwardLayout(
        "inline_dense_4h", ("dense_h_to_4h",), "dense_4h_to_h", ("gelu_impl",), inline=True, example="Bloom"
    ),
    FeedForwardLayout("inline_up_down", ("up_proj",), "down_proj", ("act",), inline=True, example="MPT"),
    FeedForwardLayout("inline_ffn_output", ("ffn",), "ffn_output", ("activation",), inline=True, example="ALBERT"),
    FeedForwardLayout(
        "inline_linear_1_linear_2",
        ("linear_1",),
        "linear_2",
        ("activation_function",),
        inner_dropout=("activation_dropout",),
        inline=True,
        example="Funnel",
    ),
    # One dropout serves both places: it stays, and acts twice on the output in training.
    FeedForwardLayout(
        "inline_layer_1_layer_2", ("layer_1",), "layer_2", ("activation_function",), inline=True, example="XLNet"
    ),
)


def list_feed_forward_layouts() -> dict[str, str]:
    """The known layouts: name to the architectures that use it."""
    return {layout.name: layout.example for layout in FEED_FORWARD_LAYOUTS}
