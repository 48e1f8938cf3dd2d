"""Resume: the same weights and metrics as a run that was never stopped, whatever failed and wherever it was killed."""

import errno
import json
import os
import pathlib
import resource
import shutil

import pytest
import torch

from tests.helpers.letters import PROMPTS
from tests.rl.conftest import dense, make_lm
from tppo.core import checkpoint as core_checkpoint
from tppo.core.common import UserError
from tppo.rl import checkpoint
from tppo.rl.checkpoint import append_rows, cut_rows_after, load_newest_checkpoint, save_checkpoint
from tppo.rl.loop import train
from tppo.rl.trainer import TokenPPOTrainer

SETTINGS = {"updates": 2, "save_every": 1, "keep_checkpoints": 2, "batch_size": 8, "minibatch_size": 4}
SETTINGS |= {"micro_batch_size": 4, "kl_target": 0.05, "kl_horizon": 32, "max_kl": 50.0, "best_metric": "good"}


def rows_of(folder, timeless):
    return [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def straight(make_trainer, tmp_path, timeless, weights):
    """Weights, metrics and samples of an uninterrupted run."""
    trainer, folder = make_trainer(**SETTINGS), tmp_path / "straight"
    train(trainer, folder)
    return weights(trainer), rows_of(folder, timeless), (folder / "samples.jsonl").read_bytes()


@pytest.fixture
def assert_as_straight(straight, timeless, weights, assert_same):
    def check(trainer, folder):
        assert_same(weights(trainer), straight[0])
        assert rows_of(folder, timeless) == straight[1]
        assert (folder / "samples.jsonl").read_bytes() == straight[2]

    return check


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"value_function": "shared"},
        {"value_function": "separate"},
        {"tuning": "lora", "lora_r": 4},
        {"kl_placement": "loss", "kl_estimator": "k3", "precision": "bf16"},
    ],
)
def test_resume_is_exact_for_every_kind_of_state(make_trainer, tmp_path, weights, assert_same, timeless, settings):
    settings = SETTINGS | settings
    straight, first, resumed = (make_trainer(**settings) for _ in range(3))
    expected = [timeless(straight.step().metrics) for _ in range(3)]
    first.step()
    save_checkpoint(first, tmp_path)
    assert load_newest_checkpoint(resumed, tmp_path)
    assert [timeless(resumed.step().metrics) for _ in range(2)] == expected[1:]
    assert_same(weights(resumed), weights(straight))
    assert resumed.kl_coef == straight.kl_coef
    for name in ("best", "last_good"):
        a, b = straight.kept[name], resumed.kept[name]
        assert (a.update, a.value) == (b.update, b.value)
        assert_same(a.weights, b.weights)


def test_old_checkpoints_go_and_a_damaged_one_is_skipped_by_name(make_trainer, tmp_path, capsys, assert_as_straight):
    trainer, folder = make_trainer(**SETTINGS | {"updates": 3}), tmp_path / "run"
    train(trainer, folder)
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-3"]
    file = folder / "checkpoint-3" / "policy.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (folder / "tmp-checkpoint-4").mkdir()
    capsys.readouterr()
    resumed = make_trainer(**SETTINGS)
    train(resumed, folder)
    said = capsys.readouterr().err.replace("\n", "")
    assert "skipping the damaged checkpoint" in said
    assert "checkpoint-3: policy.safetensors is not what was written" in said
    assert "after update 2" in said
    assert_as_straight(resumed, folder)


@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_every_kind_of_damage_is_seen(make_trainer, tmp_path, name, damage):
    trainer = make_trainer(**SETTINGS)
    trainer.step()
    file = save_checkpoint(trainer, tmp_path) / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        file.unlink()
    assert not load_newest_checkpoint(make_trainer(**SETTINGS), tmp_path)


def test_another_run_in_the_folder_is_refused(make_trainer, tmp_path):
    trainer = make_trainer(**SETTINGS)
    save_checkpoint(trainer, tmp_path)
    with pytest.raises(UserError, match=r"other settings \(clip_range: 0\.2 -> 0\.1\)"):
        load_newest_checkpoint(make_trainer(**SETTINGS, clip_range=0.1), tmp_path)
    assert load_newest_checkpoint(make_trainer(**SETTINGS | {"updates": 9}), tmp_path)


def test_rows_after_a_checkpoint_and_half_a_line_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"update": u}) + "\n" for u in (1, 2, 3)) + '{"upda')
    cut_rows_after(path, 3)
    assert path.read_text().count("\n") == 3
    cut_rows_after(path, 2)
    assert [json.loads(line)["update"] for line in path.read_text().splitlines()] == [1, 2]
    with pytest.raises(UserError, match="ends at update 2, but the checkpoint beside it is of update 5"):
        cut_rows_after(path, 5)
    path.write_text('{"update": 1}')  # whole but for its end: it may be 1 or the start of 12
    cut_rows_after(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("row", ['{"update": 0.75}', '{"loss": 1}', "[1]", '{"update": 1}'])
def test_rows_that_are_not_ours_or_too_few_cut_nothing(tmp_path, row):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text := f'{{"update": 1}}\n{{"update": 2}}\n{row}\n')
    for update in (2, 3):
        with pytest.raises(UserError, match="after update 2 that no run has written"):
            cut_rows_after(path, update)
        assert path.read_text() == text
    path.write_text(text := '{"update": 1}\n{"upda')
    with pytest.raises(UserError, match="ends at update 1"):
        cut_rows_after(path, 2)
    assert path.read_text() == text


def test_neither_file_is_cut_when_one_lacks_rows(make_trainer, tmp_path):
    train(make_trainer(**SETTINGS | {"updates": 1}), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 2}\n')
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(UserError, match=r"samples\.jsonl ends at update 0"):
        train(make_trainer(**SETTINGS), tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


class Faults:
    """Counts calls that change the disk, and fails one of them with ENOSPC; a write fails half-way."""

    def __init__(self, patch, fail_at=None):
        self.calls, self.fail_at = 0, fail_at
        for owner, name in ((os, "fsync"), (os, "mkdir"), (os, "truncate"), (shutil, "rmtree")):
            patch.setattr(owner, name, self.guarded(getattr(owner, name)))
        for name in ("rename", "replace"):
            patch.setattr(pathlib.Path, name, self.guarded(getattr(pathlib.Path, name)))
        save_file, opened = core_checkpoint.save_file, pathlib.Path.open

        def half_a_tensor_file(tensors, path):
            if self.next_fails():
                pathlib.Path(path).write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            save_file(tensors, path)

        def half_a_text(path, mode="r", *args, **kwargs):
            if mode in ("a", "w") and self.next_fails():
                with opened(path, mode, *args, **kwargs) as file:
                    file.write('{"update": 1, "ki')
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return opened(path, mode, *args, **kwargs)

        patch.setattr(core_checkpoint, "save_file", half_a_tensor_file)
        patch.setattr(pathlib.Path, "open", half_a_text)

    def next_fails(self):
        self.calls += 1
        return self.calls == self.fail_at

    def guarded(self, function):
        def call(*args, **kwargs):
            if self.next_fails():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call


def test_every_disk_operation_failed_in_turn_needs_no_repair(make_trainer, tmp_path, assert_as_straight):
    """The run stops with the disk's own error; the same call then ends as if nothing had been."""
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        train(make_trainer(**SETTINGS), tmp_path / "count")
        operations = faults.calls
    assert operations > 40
    for fail_at in range(1, operations + 1):
        folder = tmp_path / f"fail-{fail_at}"
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, fail_at)
            with pytest.raises(OSError, match="No space left on device"):
                train(make_trainer(**SETTINGS), folder)
        resumed = make_trainer(**SETTINGS)
        train(resumed, folder)
        assert_as_straight(resumed, folder)
        shutil.rmtree(folder)


def test_a_failure_inside_safetensors_is_an_os_error(tmp_path):
    """Written by Rust, for real: the system's limit on file sizes takes the place of a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            core_checkpoint._save_tensors(tmp_path / "big.safetensors", {"a": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG


class TestWhoseFolder:
    """`train` goes on in its own folder only, and deletes nothing else there."""

    def make(self, make_trainer, prompts=None, limit=8, **settings):
        trainer = make_trainer(**SETTINGS | settings)
        return TokenPPOTrainer(
            make_lm(),
            trainer.reward_fn,
            PROMPTS if prompts is None else prompts,
            trainer.config,
            tokenizer=trainer.tokenizer,
            max_response_tokens=limit,
            seed=trainer.seed,
        )

    @pytest.mark.parametrize("tuning", ["full", "lora"])
    def test_another_run_is_refused_with_what_differs(self, make_trainer, tmp_path, tuning):
        folder = tmp_path / "run"
        lora = {"tuning": tuning, "lora_r": 4}
        train(self.make(make_trainer, **lora), folder)
        kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        others = {
            "other prompts": self.make(make_trainer, prompts=PROMPTS[1:], **lora),
            "max_response_tokens: 8 -> 9": self.make(make_trainer, limit=9, **lora),
            "clip_range: 0.2 -> 0.1": self.make(make_trainer, clip_range=0.1, **lora),
        }
        weights = self.make(make_trainer, **lora)
        frozen = weights.policy if weights.reference is None else weights.reference
        with torch.no_grad():
            next(p for p in frozen.parameters() if weights.reference is not None or not p.requires_grad).mul_(1.01)
        for words, trainer in {**others, "other start weights": weights}.items():
            with pytest.raises(UserError, match=words):
                train(trainer, folder)
            with pytest.raises(UserError, match=words):
                load_newest_checkpoint(trainer, folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept
        train(self.make(make_trainer, **lora, updates=3), folder)

    def test_before_its_first_checkpoint_too(self, make_trainer, tmp_path):
        folder = tmp_path / "run"
        trainer = self.make(make_trainer, save_every=2)
        trainer.reward_fn = lambda samples: [] if trainer.update else dense(samples)
        with pytest.raises(UserError):
            train(trainer, folder)
        rows = (folder / "metrics.jsonl").read_text()
        assert rows
        with pytest.raises(UserError, match="other prompts"):
            train(self.make(make_trainer, prompts=PROMPTS[1:], save_every=2), folder)
        assert (folder / "metrics.jsonl").read_text() == rows

    @pytest.mark.parametrize("name", ["tmp-notes", "tmp-checkpoint-x", ".model-of-mine"])
    def test_what_only_looks_like_a_leftover_stays(self, make_trainer, tmp_path, name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
        train(self.make(make_trainer), tmp_path)
        checkpoint.remove_checkpoints(tmp_path)
        assert (tmp_path / name / "mine.txt").read_text() == "mine"

    @pytest.mark.parametrize("name", ["checkpoint-1", "checkpoint-99", "tmp-checkpoint-1", "metrics.jsonl"])
    def test_what_would_be_written_over_is_named_first(self, make_trainer, tmp_path, name):
        path = tmp_path / name
        if "checkpoint" in name:
            path.mkdir()
            path = path / "trainer_state.json"
        path.write_text('{"update": 1}\n')
        with pytest.raises(UserError, match=name):
            train(self.make(make_trainer), tmp_path)
        assert path.read_text() == '{"update": 1}\n'
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]

    def test_a_checkpoint_of_before_goes_on(self, make_trainer, tmp_path, weights, assert_same):
        """It neither says what it started from nor has a setting that is new since."""
        first, straight = self.make(make_trainer), self.make(make_trainer)
        first.step()
        path = save_checkpoint(first, tmp_path)
        state = json.loads((path / "state.json").read_text())
        del state["start"], state["config"]["dual_clip"]
        (path / "state.json").write_text(json.dumps(state))
        sums = {
            file.name: core_checkpoint.sha256_file(file) for file in path.iterdir() if file.name != "checksums.json"
        }
        (path / "checksums.json").write_text(json.dumps(sums))
        append_rows(tmp_path / "metrics.jsonl", [{"update": 1}])
        append_rows(tmp_path / "samples.jsonl", [{"update": 1}])
        resumed = self.make(make_trainer)
        train(resumed, tmp_path)
        straight.step()
        straight.step()
        assert_same(weights(resumed), weights(straight))
