"""GPUs and the links between them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Machine:
    """
    Equal nodes of equal GPUs.

    Args:
        memory (`float`): Bytes of a GPU.
        flops (`float`): Peak of 16-bit matrix products without sparsity, a second.
        intra (`float`): Bytes a second that a GPU sends to GPUs of its own node.
        inter (`float`): Bytes a second that a GPU sends to other nodes.
        gpus_per_node (`int`): GPUs that share `intra`.
        utilisation (`float`): Share of `flops` that the products reach.
        link_utilisation (`float`): Share of `intra` and `inter` that collectives reach.
        latency (`float`): Seconds of one message.
    """

    memory: float
    flops: float
    intra: float
    inter: float
    gpus_per_node: int = 8
    utilisation: float = 0.4
    link_utilisation: float = 0.8
    latency: float = 1e-5


# Bytes a second of one GPU in one direction. NVIDIA states the sum of both directions for NVLink (600 GB/s on A100,
# 900 on H100, 1,800 on B200), and networks are named by bits (HDR 200 Gb/s, NDR 400 Gb/s).
LINKS = {
    "nvlink3": 300e9,
    "nvlink4": 450e9,
    "nvlink5": 900e9,
    "pcie4": 32e9,
    "pcie5": 64e9,
    "hdr": 25e9,
    "ndr": 50e9,
    "ethernet-100g": 12.5e9,
    "ethernet-25g": 3.125e9,
}
# From NVIDIA's data sheets of the GPUs and of the DGX systems built of them; L40S: PCIe and one network card of
# 100 Gb/s for a node of 4.
MACHINES = {
    "a100": Machine(80e9, 312e12, LINKS["nvlink3"], LINKS["hdr"]),
    "h100": Machine(80e9, 989e12, LINKS["nvlink4"], LINKS["ndr"]),
    "h200": Machine(141e9, 989e12, LINKS["nvlink4"], LINKS["ndr"]),
    "b200": Machine(180e9, 2250e12, LINKS["nvlink5"], LINKS["ndr"]),
    "l40s": Machine(48e9, 362e12, LINKS["pcie4"], LINKS["ethernet-25g"], gpus_per_node=4),
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def make_machine(
    gpu: str = "h100",
    gpu_memory: str | float | None = None,
    interconnect: str | None = None,
    gpus_per_node: int | None = None,
) -> Machine:
    """
    A machine of `MACHINES`, with what is given in its place.

    Args:
        gpu (`str`, defaults to `"h100"`): A key of `MACHINES`.
        gpu_memory (`str` or `float`, *optional*): Bytes, or a size such as `"80GB"` or `"40GiB"`.
        interconnect (`str`, *optional*):
            `"INTRA,INTER"`: within a node, and between nodes, each a key of `LINKS` or a number of GB/s that one GPU
            sends, such as `"nvlink4,ndr"` or `"450,50"`.
        gpus_per_node (`int`, *optional*): GPUs of a node.

    Raises:
        ValueError: a name or a size that is none.
    """
    if gpu not in MACHINES:
        raise ValueError(f"`gpu={gpu!r}` is none of {', '.join(MACHINES)}. Take the nearest, and give what differs.")
    machine = MACHINES[gpu]
    if gpu_memory is not None:
        machine = replace(machine, memory=_bytes(gpu_memory))
    if interconnect is not None:
        links = interconnect.split(",")
        if len(links) != 2:
            raise ValueError(
                f"`interconnect={interconnect!r}` must name two links, within a node and between nodes, such as "
                "`nvlink4,ndr` or `450,50` (GB/s)."
            )
        machine = replace(machine, intra=_link(links[0]), inter=_link(links[1]))
    if gpus_per_node is not None:
        if gpus_per_node < 1:
            raise ValueError(f"`gpus_per_node={gpus_per_node}` must be at least 1.")
        machine = replace(machine, gpus_per_node=gpus_per_node)
    return machine


def _bytes(size: str | float) -> float:
    if not isinstance(size, str):
        return float(size)
    found = _SIZE.fullmatch(size.strip())
    if found is None:
        raise ValueError(f"`gpu_memory={size!r}` is no size. Give one such as `80GB` or `40GiB`.")
    number, prefix, binary = found.groups()
    return float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")


def _link(name: str) -> float:
    name = name.strip().lower()
    if name in LINKS:
        return LINKS[name]
    try:
        speed = float(name)
    except ValueError:
        speed = 0.0
    if speed <= 0:
        raise ValueError(
            f"`{name}` is no link. Give GB/s that one GPU sends in one direction, or one of {', '.join(LINKS)}."
        )
    return speed * 1e9
