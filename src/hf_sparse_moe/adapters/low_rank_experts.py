"""
Experts with low-rank adapters beside their frozen weights: `y = W_e x + s B_e (A_e x)`, expert after expert.

T tokens, K experts a token, E experts, H hidden, I intermediate, R rows of one expert, r rank, N adapted experts. No
update of W is ever built and W gets no gradient. Between forward and backward stay, of each (token, expert) pair, the
projection before its activation and `A_e x`; the rest is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import _grouped_linear


@dataclass(frozen=True)
class LowRank:
    """
    One adapter of one projection.

    Args:
        a (`torch.Tensor` of shape `(N, r, in)`): A of each adapted expert.
        b (`torch.Tensor` of shape `(N, r, out)`): B of each, transposed; `out` covers `columns` only.
        scale (`float`): s.
        experts (`tuple[int, ...]`): The N adapted experts.
        columns (`slice`): Which outputs of the projection it reaches.
        dropout (`float`): Of the adapter's input, 0 outside training.
        tokens (`torch.BoolTensor` of shape `(T, 1)`, *optional*): The tokens that it serves; all by default.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    experts: tuple[int, ...]
    columns: slice
    dropout: float = 0.0
    tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class FrozenExperts:
    """What the computation takes from an experts module in the interface of transformers' experts backends."""

    module: nn.Module
    up_name: str

    @property
    def num_experts(self) -> int:
        return self.module.num_experts

    def weight(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """`(in, out)`"""
        weight = getattr(self.module, name)[expert].to(dtype)
        return weight if self.module.is_transposed else weight.t()

    def bias(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor | None:
        """`(out,)`"""
        return getattr(self.module, f"{name}_bias")[expert].to(dtype) if self.module.has_bias else None

    def activate(self, projected: torch.Tensor) -> torch.Tensor:
        """`(R, I)` from what the up projection gives."""
        return self.module._apply_gate(projected) if self.module.has_gate else self.module.act_fn(projected)

    @property
    def drops(self) -> bool:
        """Whether two activations of the same input differ."""
        return self.module.training and any(isinstance(part, nn.Dropout) and part.p > 0 for part in self.module.modules())


def low_rank_experts(
    experts: FrozenExperts,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: list[LowRank],
    down: list[LowRank],
) -> torch.Tensor:
    """
    Args:
        experts (`FrozenExperts`): The experts.
        hidden_states (`torch.Tensor` of shape `(T, H)`): The tokens.
        top_k_index (`torch.LongTensor` of shape `(T, K)`): The experts of each token; an index of E or more is skipped.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Their weights.
        up, down (`list[LowRank]`): The adapters of each projection, added up.

    Returns:
        `torch.Tensor` of shape `(T, H)`, in the dtype of `hidden_states`. Under autocast experts and adapters compute
        in its dtype, otherwise in that of the weights.
    """
    device = hidden_states.device.type
    dtype = experts.module.down_proj.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    loops = device == "cpu" and not torch.compiler.is_compiling() and not experts.module.has_post_expert_norm
    with torch.autocast(device, enabled=False):
        if not loops:
            return _grouped(experts, hidden_states, top_k_index, top_k_weights, up, down, dtype)
        factors = [tensor for adapter in (*up, *down) for tensor in (adapter.a, adapter.b)]
        call = _Call(experts, top_k_index, up, down, dtype)
        return _LowRankExperts.apply(call, hidden_states, top_k_weights, *factors)


class _Call:
    """The parts of one call that no gradient flows to."""

    def __init__(self, experts, top_k_index: torch.Tensor, up: list[LowRank], down: list[LowRank], dtype: torch.dtype):
        self.experts = experts
        self.up_name, self.down_name = experts.up_name, "down_proj"
        self.up, self.down = up, down
        self.dtype, self.sum_dtype = dtype, torch.promote_types(dtype, torch.float32)
        self.top_k = top_k_index.shape[1]
        index, self.order = top_k_index.flatten().sort(stable=True)
        bounds = torch.searchsorted(index, torch.arange(experts.num_experts + 1, device=index.device)).tolist()
        self.segments = [(e, bounds[e], bounds[e + 1]) for e in range(experts.num_experts) if bounds[e] < bounds[e + 1]]
        self.slots = {id(adapter): {e: n for n, e in enumerate(adapter.experts)} for adapter in (*up, *down)}
        drops = any(adapter.dropout for adapter in (*up, *down))
        self.seed = int(torch.randint(2**62, ()).item()) if drops else 0

    def rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Each expert that was hit, and its rows: places in the flattened `(T, K)`."""
        for expert, start, end in self.segments:
            yield expert, self.order[start:end]

    def padded(self, rows: torch.Tensor, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """`source[index]` in the dtype of the call, with zero rows up to a size that comes again."""
        size = _bucket(len(rows)) if self.dtype.itemsize == 2 else len(rows)
        gathered = source.new_empty(size, source.shape[1])
        torch.index_select(source, 0, index, out=gathered[: len(rows)])
        gathered[len(rows) :] = 0
        return gathered.to(self.dtype)

    def keep(self, adapter: LowRank, number: int, expert: int, inputs: torch.Tensor) -> torch.Tensor | None:
        """The scaled dropout mask of one adapter and expert: drawn anew, the same, in the backward."""
        if not adapter.dropout:
            return None
        generator = torch.Generator().manual_seed((self.seed + number * self.experts.num_experts + expert) % 2**63)
        keep = torch.empty_like(inputs).bernoulli_(1 - adapter.dropout, generator=generator)
        return keep.div_(1 - adapter.dropout)


def _bucket(rows: int) -> int:
    """
    The next of eight sizes an octave.

    oneDNN compiles a product anew for every row count that it has not seen, some 20 times the product's own time for
    a thin one, and routing gives other counts at every step.
    """
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


class _LowRankExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, hidden_states, top_k_weights, *factors):
        weights = top_k_weights.flatten()
        output = hidden_states.new_zeros(hidden_states.shape, dtype=call.sum_dtype)
        keeps_graph = call.experts.drops
        saved: list[torch.Tensor] = []
        ctx.activated = []
        for expert, rows in call.rows():
            token = rows // call.top_k
            inputs = call.padded(rows, hidden_states, token)
            projected, thin_up = _project(call, call.up_name, call.up, 0, expert, inputs, token)
            if keeps_graph:
                with torch.enable_grad():
                    projected.requires_grad_()
                    activated = call.experts.activate(projected)
                ctx.activated.append(activated)
                activated = activated.detach()
            else:
                activated = call.experts.activate(projected)
            weight = call.padded(rows, weights[:, None], rows)
            result, thin_down = _project(
                call, call.down_name, call.down, len(call.up), expert, activated * weight, token, weight
            )
            output.index_add_(0, token, result[: len(rows)].to(call.sum_dtype))
            saved += (projected, *thin_up, *thin_down)
        ctx.call = call
        ctx.save_for_backward(hidden_states, top_k_weights, *factors, *saved)
        return output.to(hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        call: _Call = ctx.call
        adapters = (*call.up, *call.down)
        hidden_states, top_k_weights, *rest = ctx.saved_tensors
        saved = iter(rest[2 * len(adapters) :])
        weights = top_k_weights.flatten()
        wants_hidden, wants_weights = ctx.needs_input_grad[1:3]
        grad_hidden = hidden_states.new_zeros(hidden_states.shape, dtype=call.sum_dtype) if wants_hidden else None
        grad_weights = torch.zeros_like(weights) if wants_weights else None
        grads = [_FactorGrads(adapter) for adapter in adapters]
        for place, (expert, rows) in enumerate(call.rows()):
            token = rows // call.top_k
            inputs, grad = call.padded(rows, hidden_states, token), call.padded(rows, grad_output, token)
            weight = call.padded(rows, weights[:, None], rows)
            projected = next(saved)
            thin_up = [next(saved) for adapter in call.up if expert in call.slots[id(adapter)]]
            thin_down = [next(saved) for adapter in call.down if expert in call.slots[id(adapter)]]
            with torch.enable_grad():
                if ctx.activated:
                    activated = ctx.activated[place]
                else:
                    projected = projected.detach().requires_grad_()
                    activated = call.experts.activate(projected)
            grad_scaled = _project_backward(
                call, call.down_name, call.down, len(call.up), expert, activated.detach() * weight, token, grad,
                thin_down, grads, True,
            )  # fmt: skip
            if wants_weights:
                grad_weight = (grad_scaled * activated.detach()).sum(-1)
                if (bias := call.experts.bias(call.down_name, expert, call.dtype)) is not None:
                    grad_weight += grad @ bias
                grad_weights[rows] = grad_weight[: len(rows)].to(weights.dtype)
            (grad_projected,) = torch.autograd.grad(activated, projected, grad_scaled.mul_(weight))
            grad_inputs = _project_backward(
                call, call.up_name, call.up, 0, expert, inputs, token, grad_projected, thin_up, grads, wants_hidden
            )
            if wants_hidden:
                grad_hidden.index_add_(0, token, grad_inputs[: len(rows)].to(call.sum_dtype))
        if wants_hidden:
            grad_hidden = grad_hidden.to(hidden_states.dtype)
        if wants_weights:
            grad_weights = grad_weights.view_as(top_k_weights)
        factor_grads = [tensor for grad in grads for tensor in grad.finished()]
        return None, grad_hidden, grad_weights, *factor_grads


def _project(
    call: _Call,
    name: str,
    adapters: list[LowRank],
    first: int,
    expert: int,
    inputs: torch.Tensor,
    token: torch.Tensor,
    bias_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`(R, out)` of one projection, and `s A x` of each adapter `(R, r)`."""
    output = inputs @ call.experts.weight(name, expert, call.dtype)
    if (bias := call.experts.bias(name, expert, call.dtype)) is not None:
        output += bias if bias_weight is None else bias * bias_weight
    thins = []
    for number, adapter in enumerate(adapters, first):
        slot = call.slots[id(adapter)].get(expert)
        if slot is None:
            continue
        keep = call.keep(adapter, number, expert, inputs)
        thin = (inputs if keep is None else inputs * keep) @ adapter.a[slot].to(call.dtype).t()
        thin *= adapter.scale
        if adapter.tokens is not None:
            thin[: len(token)] *= adapter.tokens[token]
        output[:, adapter.columns].addmm_(thin, adapter.b[slot].to(call.dtype))
        thins.append(thin)
    return output, thins


def _project_backward(
    call: _Call,
    name: str,
    adapters: list[LowRank],
    first: int,
    expert: int,
    inputs: torch.Tensor,
    token: torch.Tensor,
    grad: torch.Tensor,
    thins: list[torch.Tensor],
    grads: list[_FactorGrads],
    wants_inputs: bool,
) -> Any:
    """The gradient of `inputs`, or None where it is not wanted; those of the factors go into `grads`."""
    grad_inputs = grad @ call.experts.weight(name, expert, call.dtype).t() if wants_inputs else None
    remaining = iter(thins)
    for number, adapter in enumerate(adapters, first):
        slot = call.slots[id(adapter)].get(expert)
        if slot is None:
            continue
        columns = grad[:, adapter.columns]
        grad_thin = columns @ adapter.b[slot].to(call.dtype).t()
        grad_thin *= adapter.scale
        if adapter.tokens is not None:
            grad_thin[: len(token)] *= adapter.tokens[token]
        keep = call.keep(adapter, number, expert, inputs)
        grads[number].add(slot, grad_thin.t() @ (inputs if keep is None else inputs * keep), next(remaining).t() @ columns)
        if wants_inputs and keep is None:
            grad_inputs.addmm_(grad_thin, adapter.a[slot].to(call.dtype))
        elif wants_inputs:
            grad_inputs.addcmul_(grad_thin @ adapter.a[slot].to(call.dtype), keep)
    return grad_inputs


class _FactorGrads:
    """The gradients of one adapter's factors; zero for the experts that no token reached."""

    def __init__(self, adapter: LowRank):
        self.a, self.b = torch.empty_like(adapter.a), torch.empty_like(adapter.b)
        self.missing = set(range(len(adapter.experts)))

    def add(self, slot: int, grad_a: torch.Tensor, grad_b: torch.Tensor) -> None:
        self.a[slot], self.b[slot] = grad_a, grad_b
        self.missing.discard(slot)

    def finished(self) -> tuple[torch.Tensor, torch.Tensor]:
        for slot in self.missing:
            self.a[slot], self.b[slot] = 0, 0
        return self.a, self.b


def _grouped(experts, hidden_states, top_k_index, top_k_weights, up, down, dtype) -> torch.Tensor:
    """The same by grouped products over all experts, for accelerators and `torch.compile`: no loop, no wait."""
    num_experts, top_k = experts.num_experts, top_k_index.shape[1]
    index, order = top_k_index.flatten().sort(stable=True)
    token = order // top_k
    ends = torch.searchsorted(index, torch.arange(1, num_experts + 1, device=index.device)).int()
    real = (index < num_experts)[:, None]
    index = index.clamp(max=num_experts - 1)

    def project(name: str, adapters: list[LowRank], inputs: torch.Tensor) -> torch.Tensor:
        module = experts.module
        bias = getattr(module, f"{name}_bias")[index].to(dtype) if module.has_bias else None
        weight = getattr(module, name).to(dtype)
        output = _grouped_linear(inputs, weight, ends, bias=bias, is_transposed=module.is_transposed)
        for adapter in adapters:
            a, b = _all_experts(adapter, num_experts, dtype)
            dropped = nn.functional.dropout(inputs, adapter.dropout) if adapter.dropout else inputs
            thin = _grouped_linear(dropped, a, ends) * adapter.scale
            if adapter.tokens is not None:
                thin = thin * adapter.tokens[token]
            update = _grouped_linear(thin, b, ends, is_transposed=True)
            if adapter.columns == slice(None):
                output = output + update
            else:
                output = output.clone()
                output[:, adapter.columns] += update
        return torch.where(real, output, 0)

    inputs = torch.where(real, hidden_states[token].to(dtype), 0)
    result = project("down_proj", down, experts.activate(project(experts.up_name, up, inputs)))
    if experts.module.has_post_expert_norm:
        result = experts.module.post_expert_norm(result)
    weighted = result * torch.where(real, top_k_weights.flatten()[order, None], 0)
    output = hidden_states.new_zeros(hidden_states.shape, dtype=torch.promote_types(weighted.dtype, torch.float32))
    return output.index_add(0, token, weighted.to(output.dtype)).to(hidden_states.dtype)


def _all_experts(adapter: LowRank, num_experts: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with zeros for the experts without adapter, and a rank of whole 16 bytes, as grouped products ask."""
    rank, multiple = adapter.a.shape[1], 16 // dtype.itemsize
    factors = []
    for factor in (adapter.a.to(dtype), adapter.b.to(dtype)):
        factor = nn.functional.pad(factor, (0, 0, 0, -rank % multiple))
        if len(adapter.experts) < num_experts:
            place = torch.tensor(adapter.experts, device=factor.device)
            factor = factor.new_zeros(num_experts, *factor.shape[1:]).index_copy(0, place, factor)
        factors.append(factor)
    return factors[0], factors[1]
