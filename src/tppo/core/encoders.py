"""Encoders of texts, the judge's and those of reward models: whether what was loaded is one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tppo.core.common import UserError
from tppo.core.models import check_vocabulary


@torch.inference_mode()
def check_encoder(model: Any, tokenizer: Any, missing: Iterable[str], name: str) -> None:
    """Refuse an encoder that would answer with random or no numbers; one forward of a word shows it.

    Args:
        missing: names of the weights that its files did not have (`output_loading_info`); nobody reads a pooler's.
        name: of the encoder, for the message.

    Raises:
        UserError: weights are missing or not finite, or the tokenizer has more tokens than the model.
    """
    if lacking := sorted(key for key in missing if "pooler" not in key):
        raise UserError(
            f"{name} lacks weights of an encoder ({len(lacking)}, first: {lacking[0]}), which would be random: save it "
            "there by the class that it was trained as"
        )
    check_vocabulary(model, tokenizer, f"the tokenizer of {name}")
    ids = torch.tensor([tokenizer("a")["input_ids"]], device=model.device)
    try:
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    except MemoryError:
        raise
    except Exception as error:  # whatever a family's forward raises
        raise UserError(f"{name} does not work as an encoder ({error}): take another") from None
    if not all(bool(values.isfinite().all()) for values in (hidden, *model.parameters())):
        raise UserError(f"{name} has weights or outputs that are no numbers (NaN or infinite): save it anew there")
