"""The precision of matrix products, by the machine: the one place that chooses between bf16 and fp32.

`auto` is bf16 where the device multiplies it faster than fp32, and fp32 elsewhere. Told by what the processor says of
itself, not by timing it: on a busy machine a timing would choose otherwise from one stage to the next. A CPU without
bf16 in hardware emulates it: measured 60 to 100 times slower than fp32 (`bf16_slowdown` measures yours).
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from tppo.core.config import Precision

Products = Literal["bf16", "fp32"]
"""What `auto` is decided to be."""
_PROBE_SIZE = 256
_PROBE_SECONDS = 0.05


@dataclass(frozen=True)
class Numerics:
    """What a stage computes with: its first line on the console, and part of its manifest."""

    device: str
    """A device type of torch: cpu, cuda, mps."""
    precision: Products
    reason: str

    def __str__(self) -> str:
        return f"{self.precision} on {self.device}: {self.reason}"


def choose(precision: Precision, device: str = "cpu") -> Numerics:
    """What a setting means on a device. A setting other than `auto` is kept, whatever the device can do."""
    fast, why = fast_bf16(device)
    if precision == "auto":
        return Numerics(device, "bf16" if fast else "fp32", why)
    return Numerics(device, precision, "as set" if fast or precision == "fp32" else f"as set, although {why}")


def resolved(precision: Precision, device: str = "cpu") -> Products:
    """The precision of `choose`."""
    return choose(precision, device).precision


def trainer_device() -> str:
    """Where the trainers of transformers put a model: the accelerator, if there is one."""
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


def stage_device(stage: str) -> str:
    """Where a stage's matrix products are."""
    return trainer_device() if stage in ("sft", "reward", "rl_dpo") else "cpu"


@cache
def fast_bf16(device: str) -> tuple[bool, str]:
    """Whether a device multiplies bf16 faster than fp32, and the reason to give."""
    if device == "cpu":
        units = _cpu_bf16_units()
        if units:
            return True, f"the CPU has {units}"
        return False, "the CPU has neither AVX512-BF16 nor AMX, so bf16 products are emulated"
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, f"{torch.cuda.get_device_name()} multiplies bf16 in hardware"
        return False, f"{torch.cuda.get_device_name()} has no bf16 products in hardware"
    return False, f"no fast bf16 is known of {device}"


def _cpu_bf16_units() -> str:
    """Name of the CPU's units for bf16 products; empty without any, or when oneDNN may not use them."""
    # False as well when ONEDNN_MAX_CPU_ISA takes the units away; true of any AVX-512, so the flags decide.
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX512-BF16"
    return "" if torch.cpu._is_avx2_supported() else "bf16 instructions"  # not x86: oneDNN asked the processor itself


def bf16_slowdown() -> float:
    """Seconds of a bf16 product over those of the fp32 one on this CPU, by a probe of about 100 ms."""

    def seconds(dtype: torch.dtype) -> float:
        """The fastest of the products: what else runs on the machine only makes one slower."""
        a, b = (torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype) for _ in range(2))
        a @ b  # the first product sets kernels up
        times: list[float] = []
        start = time.perf_counter()
        while not times or time.perf_counter() - start < _PROBE_SECONDS:
            begin = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def warn_of_slow_bf16(numerics: Numerics, setting: str) -> str | None:
    """What to say of bf16 on a CPU that emulates it, with the factor measured there; None when there is no need."""
    if numerics.precision == "fp32" or numerics.device != "cpu" or fast_bf16("cpu")[0]:
        return None
    return (
        f"{setting}=bf16, but {fast_bf16('cpu')[1]}: a product takes {bf16_slowdown():.0f} times as long as in fp32 "
        f"here. --{setting} auto chooses fp32 on this machine"
    )


def autocast(precision: Precision, device: str = "cpu") -> AbstractContextManager[Any]:
    """bf16 matrix products over float32 weights, or plain float32."""
    return torch.autocast(device, dtype=torch.bfloat16) if resolved(precision, device) == "bf16" else nullcontext()


def generation_dtype(precision: Precision) -> torch.dtype:
    """Of the weights that only sample: no optimiser step needs their last digits."""
    return torch.bfloat16 if resolved(precision) == "bf16" else torch.float32
