"""Fixtures: each kind of tokenizer, and a tiny encoder to train."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.helpers.encoders import make_tiny_encoder
from tests.helpers.tokenizer_kinds import KINDS, get_tokenizer


@pytest.fixture(params=sorted(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return get_tokenizer(request.param)


@pytest.fixture
def tiny_encoder(tmp_path: Path) -> Path:
    """A folder with a random 2-layer BERT and MiniLM's tokenizer."""
    return make_tiny_encoder(tmp_path / "encoder")
