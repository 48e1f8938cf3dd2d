"""Precision by the machine: what is chosen, where it is said, and that another machine's choice makes nothing stale."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tppo.core import device
from tppo.core.common import UserError
from tppo.core.config import RL, Recipe
from tppo.core.device import Numerics, choose, warn_of_slow_bf16
from tppo.core.run import RunFolder, run_stage
from tppo.core.stages import STAGES

MACHINES = {  # oneDNN may use bf16, AMX, AVX512-BF16, AVX2
    "avx2 only": ((False, False, False, True), "fp32", "neither AVX512-BF16 nor AMX"),
    "avx512 without bf16": ((True, False, False, True), "fp32", "neither AVX512-BF16 nor AMX"),
    "avx512-bf16": ((True, False, True, True), "bf16", "AVX512-BF16"),
    "amx": ((True, True, True, True), "bf16", "AMX"),
    "units taken away by ONEDNN_MAX_CPU_ISA": ((False, True, True, True), "fp32", "neither"),
    "no x86, with bf16": ((True, False, False, False), "bf16", "bf16 instructions"),
    "no x86, without": ((False, False, False, False), "fp32", "neither"),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A function that makes this machine one of MACHINES."""

    class Mkldnn:
        _is_mkldnn_bf16_supported: Any

    def become(name: str) -> None:
        onednn, amx, avx512_bf16, avx2 = MACHINES[name][0]
        ops = Mkldnn()
        ops._is_mkldnn_bf16_supported = lambda: onednn
        monkeypatch.setattr(torch.ops, "mkldnn", ops)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: avx2)
        device.fast_bf16.cache_clear()

    yield become
    monkeypatch.undo()
    device.fast_bf16.cache_clear()


@pytest.mark.parametrize("name", MACHINES)
def test_auto_is_what_the_cpu_multiplies_faster(machine, name):
    machine(name)
    _, chosen, reason = MACHINES[name]
    assert choose("auto").precision == chosen
    assert reason in choose("auto").reason
    assert choose("auto").device == "cpu"
    # What is set is kept.
    assert [choose(setting).precision for setting in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_a_gpu_is_asked_about_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test T4")
    for supported, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        device.fast_bf16.cache_clear()
        found = choose("auto", "cuda")
        assert (found.precision, "Test T4" in found.reason) == (chosen, True)
    device.fast_bf16.cache_clear()
    assert choose("auto", "mps").precision == "fp32"


def test_bf16_where_it_is_emulated_warns_with_the_measured_factor(machine, monkeypatch):
    machine("avx2 only")
    monkeypatch.setattr(device, "bf16_slowdown", lambda: 66.6)
    warning = warn_of_slow_bf16(choose("bf16"), "rl.precision")
    assert warning is not None
    assert "rl.precision=bf16" in warning
    assert "67 times as long" in warning
    assert "--rl.precision auto" in warning
    assert warn_of_slow_bf16(choose("auto"), "rl.precision") is None
    assert warn_of_slow_bf16(Numerics("cuda", "bf16", "as set"), "rl.precision") is None
    machine("amx")
    assert warn_of_slow_bf16(choose("bf16"), "rl.precision") is None


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's variable names x86 instruction sets"
)
def test_the_emulated_poorest_machine():
    """A real bf16 product under the two variables that make a richer CPU behave like an AVX2-only one."""
    program = (
        "from tppo.core.device import choose, bf16_slowdown, warn_of_slow_bf16\n"
        "print(choose('auto').precision, bf16_slowdown(), warn_of_slow_bf16(choose('bf16'), 'sft.precision'))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    chosen, slowdown, warning = done.stdout.split(maxsplit=2)
    assert chosen == "fp32"
    assert float(slowdown) > 5, "bf16 is emulated there; measured 60 to 100"
    assert "times as long as in fp32" in warning


class TestStages:
    def make(self, folder: Path, setting: str, machine, name: str, fail: bool = False) -> dict[str, Any] | None:
        """Run a made-up `sft` stage on a machine; the precision it was given, or None when it was done already."""
        machine(name)
        recipe = Recipe(run_dir=str(folder), stage_dirs={"prepare": str(folder / "prepare")})
        recipe.sft.precision = setting  # type: ignore[assignment]
        (folder / "prepare").mkdir(parents=True, exist_ok=True)
        (folder / "prepare" / "manifest.json").write_text("{}")
        given = []

        def work(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
            given.append(recipe.sft.precision)
            if fail:
                raise KeyboardInterrupt
            return {}

        with suppress(KeyboardInterrupt):
            run_stage(recipe, "sft", work)
        return given[0] if given else None

    def test_the_choice_is_given_said_and_written(self, tmp_path, machine, capsys):
        assert self.make(tmp_path, "auto", machine, "avx2 only") == "fp32"
        assert "sft: fp32 on cpu: the CPU has neither AVX512-BF16 nor AMX" in capsys.readouterr().err
        manifest = json.loads((tmp_path / "sft" / "manifest.json").read_text())
        assert manifest["config"]["sft"]["precision"] == "auto"
        assert manifest["numerics"]["precision"] == "fp32"
        assert manifest["numerics"]["device"] == "cpu"
        assert "AVX512-BF16" in manifest["numerics"]["reason"]

    def test_a_stage_without_a_precision_has_none(self, tmp_path):
        recipe = Recipe(run_dir=str(tmp_path))
        run_stage(recipe, "synthetic", lambda recipe, run, folder: {})
        assert json.loads((tmp_path / "synthetic" / "manifest.json").read_text())["numerics"] is None

    def test_another_machine_makes_nothing_stale(self, tmp_path, machine):
        assert self.make(tmp_path, "auto", machine, "amx") == "bf16"
        assert self.make(tmp_path, "auto", machine, "avx2 only") is None
        assert self.make(tmp_path, "bf16", machine, "avx2 only") is None  # what it was made in, said outright
        with pytest.raises(UserError, match=r"sft\.precision: 'auto' -> 'fp32'.*--redo sft"):
            self.make(tmp_path, "fp32", machine, "avx2 only")

    def test_runs_from_before_auto_stay_valid(self, tmp_path, machine):
        assert self.make(tmp_path, "bf16", machine, "amx") == "bf16"
        manifest = tmp_path / "sft" / "manifest.json"
        old = json.loads(manifest.read_text())
        del old["numerics"]
        manifest.write_text(json.dumps(old))
        assert self.make(tmp_path, "auto", machine, "avx2 only") is None

    def test_a_resumed_stage_keeps_its_precision(self, tmp_path, machine, capsys):
        assert self.make(tmp_path, "auto", machine, "amx", fail=True) == "bf16"
        (tmp_path / "sft" / "checkpoint").write_text("kept")
        assert self.make(tmp_path, "auto", machine, "avx2 only") == "bf16"
        assert (tmp_path / "sft" / "checkpoint").exists()
        said = " ".join(capsys.readouterr().err.split())
        assert "WARNING: sft.precision=bf16, but the CPU has neither AVX512-BF16 nor AMX" in said
        assert json.loads((tmp_path / "sft" / "manifest.json").read_text())["numerics"]["precision"] == "bf16"

    def test_every_stage_with_a_precision_is_listed(self):
        assert {stage.precision for stage in STAGES.values() if stage.precision} == {
            section for section in Recipe.__dataclass_fields__ if hasattr(getattr(Recipe(), section), "precision")
        }
        assert RL().precision == "auto"


class TestNewSettings:
    """A setting that a finished stage was made without: its default does what was done then."""

    def finished(self, folder: Path, remove: str) -> None:
        recipe = Recipe(run_dir=str(folder))
        run_stage(recipe, "synthetic", lambda recipe, run, folder: {})
        path = folder / "synthetic" / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["config"]["synthetic"][remove]
        path.write_text(json.dumps(manifest))

    def test_its_default_makes_nothing_stale(self, tmp_path):
        self.finished(tmp_path, "topics")
        assert RunFolder(Recipe(run_dir=str(tmp_path))).is_done("synthetic")

    def test_another_value_does(self, tmp_path):
        self.finished(tmp_path, "topics")
        recipe = Recipe(run_dir=str(tmp_path))
        recipe.synthetic.topics = 3
        with pytest.raises(UserError, match=r"synthetic\.topics: 12 -> 3"):
            RunFolder(recipe).is_done("synthetic")
