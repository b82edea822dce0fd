"""
The gradients of one step with the CPU backends, in one process or as a rank of several: DDP and FSDP2, each process
with its part of the batch.
"""

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tiny_models import tiny_inputs, tiny_sparse


BACKENDS = ("sparse_moe", "sparse_moe_recompute")
WRAPPERS = (DistributedDataParallel, FSDPModule)
SEQUENCES = 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_sparse("decoder").eval()  # without the balance loss, which is not the same on parts of a batch


def batch(model: nn.Module) -> dict[str, torch.Tensor]:
    return tiny_inputs(model, batch=SEQUENCES, labels=False)


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the parameter's name, whole."""
    model(**inputs).logits.square().mean().backward()
    grads = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def shard(model: nn.Module) -> nn.Module:
    for block in model.sparse_blocks:
        fully_shard(block.experts)
    return fully_shard(model)


def gradients_of_a_rank(out: Path) -> None:
    """The first rank writes to `out` the gradients by wrapper and backend, and the world size."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = make_model()
    part = {name: tensor.chunk(world_size)[rank] for name, tensor in batch(model).items()}
    found: dict = {"world_size": world_size}
    for backend in BACKENDS:
        model.set_experts_implementation(backend)
        for wrap in (DistributedDataParallel, shard):
            wrapped = wrap(copy.deepcopy(model))
            (name,) = (base.__name__ for base in WRAPPERS if isinstance(wrapped, base))
            found[name, backend] = gradients(wrapped, part)
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()
