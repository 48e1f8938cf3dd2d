"""Losses, KL, rewards and gradient norms of a few updates are those that are committed: a change of maths is a diff.

Whoever means to change the numbers writes trajectory.json anew (`python -m tests.rl.make_trajectory`) and says why in
the commit. Deterministic on one machine; between kinds of CPU sums are taken in another order.
"""

import json

import pytest
import torch

from tests.rl import make_trajectory

TOLERANCE = 1e-5
"""Measured at full precision: AVX-512, AVX2 and SSE4.1 kernels (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA) differ by 1e-6
at most, 1 and 2 threads by nothing; rounding to six decimals adds up to 1e-6. Changes of maths that were tried move a
number by more: the probe's DECAY from 0.8 to 0.79 by 1.5e-5, 6 to 5.99 in Eq. 4 by 9e-5, a weight decay of 0.01 by
6e-4, the epsilon of whitening from 1e-8 to 1e-4 by 5e-3."""


@pytest.fixture(autouse=True)
def one_thread():
    """Where the cores are busy, two threads that wait for each other take a minute for what one does in a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", make_trajectory.CASES)
def test_the_numbers_of_training_are_those_committed(name):
    committed = json.loads(make_trajectory.FILE.read_text(encoding="utf-8"))[name]
    found = make_trajectory.trajectory(make_trajectory.CASES[name])
    far = [
        f"update {update}, {column}: {was} -> {row[column]}"
        for update, (row, old) in enumerate(zip(found, committed, strict=True), start=1)
        for column, was in old.items()
        if not abs(row[column] - was) <= TOLERANCE
    ]
    assert not far, (
        f"{name}: {'; '.join(far)}. If the change of numbers is meant: `python -m tests.rl.make_trajectory` writes "
        f"{make_trajectory.FILE.name} anew"
    )
