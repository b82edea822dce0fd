"""In which dtype the experts compute, whatever the processor."""

import pytest
import torch

from experts.experts_modules import inputs, make
from experts.test_function import Products
from hf_sparse_moe.experts import choice


XEON = "fpu avx2 avx512f avx512bw avx512vl"  # AVX-512 without bf16


@pytest.fixture
def cpu_with(monkeypatch):
    """Pretend that the processor has these flags."""

    def pretend(flags: str) -> None:
        monkeypatch.setattr(choice, "cpu_flags", lambda: frozenset(flags.split()))
        choice.logger.warning_once.cache_clear()

    return pretend


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [(XEON, torch.float32), (f"{XEON} avx512_bf16", torch.bfloat16), (f"{XEON} amx_bf16", torch.bfloat16),
     ("fp asimd bf16", torch.bfloat16), ("fp asimd", torch.float32), ("", torch.bfloat16)],
)  # fmt: skip
def test_autocast_is_heeded_where_the_processor_knows_its_dtype(cpu_with, caplog, flags, dtype):
    """The 1,627 against 441 ms of a Xeon without bf16 instructions. Where no flags are known, autocast is right."""
    cpu_with(flags)
    caplog.set_level("WARNING")
    choice.logger.parent.propagate = True
    experts, tensors = make("mixtral", "sparse_moe"), inputs(40, 2)
    with Products() as products:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                output = experts(*tensors)
            output.sum().backward()
    assert set(products.dtypes) == {dtype}
    assert output.dtype == torch.float32
    lines = [record.message for record in caplog.records if "autocast" in record.message]
    assert len(lines) == (dtype == torch.float32)


def test_weights_in_half_precision_stay_so(cpu_with):
    cpu_with(XEON)
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        make("mixtral", "sparse_moe", torch.bfloat16)(*inputs(40, 2, dtype=torch.bfloat16))
    assert set(products.dtypes) == {torch.bfloat16}
