"""Numeric precision of training, the same for policies and reward models."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tppo.config import Precision


def autocast(precision: Precision, device_type: str = "cpu") -> AbstractContextManager[Any]:
    """bf16 matrix products over float32 weights, or plain float32."""
    return torch.autocast(device_type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def generation_dtype(precision: Precision) -> torch.dtype:
    """Of the weights that only sample: no optimiser step needs their last digits."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
