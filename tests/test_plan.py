"""The dry run: the paper's recipes pass it, a contradiction is named, nothing is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tppo.cli import main
from tppo.core.common import UserError
from tppo.core.config import Recipe
from tppo.core.recipe import parse_recipe
from tppo.plan import GIB, Planner, StagePlan, config_of, plan_text

RECIPES = Path(__file__).parents[1] / "recipes"


def load(name: str, *flags: str) -> Recipe:
    return parse_recipe("plan", [str(RECIPES / name), *flags])[0]


def plans(recipe: Recipe) -> dict[str, StagePlan]:
    return {plan.stage: plan for plan in Planner(recipe).stages()}


@pytest.mark.parametrize("name", ["paper-aol.yaml", "paper-industrial.yaml"])
def test_the_papers_recipes_pass_the_dry_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["plan", str(RECIPES / name), "--run_dir", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert "7,241,732,096 parameters" in text
    assert "1,250 updates x 32 prompts = 40,000 rollouts" in text
    assert "meta-llama/Meta-Llama-3-70B-Instruct" in text
    assert "312 TFLOP/s at 40%" in text
    assert not (tmp_path / "run").exists(), "a dry run makes nothing"


def test_the_papers_recipes_hold_the_papers_numbers():
    """Tables 1, 5 and 6, and App. H."""
    for name, queries, examples in (("paper-aol.yaml", 3, 25_000), ("paper-industrial.yaml", 10, 200_000)):
        recipe = load(name)
        assert (recipe.task.num_queries, recipe.task.max_response_tokens) == (queries, 400)
        assert (recipe.sft.max_examples, recipe.evaluate.max_examples) == (examples, 2000)
        rl, reward = recipe.rl, recipe.reward
        assert (rl.learning_rate, rl.batch_size, rl.kl_coef, rl.length_penalty_alpha) == (5e-6, 32, 0.2, 2.0)
        assert rl.updates * rl.batch_size == 2 * 20_000
        assert (reward.learning_rate, reward.batch_size, reward.max_length) == (1e-5, 32, 2048)
        assert (reward.local_weight, reward.global_weight, reward.class_ratio) == (0.4, 0.6, 3.0)
    dpo = load("paper-industrial.yaml").dpo
    assert (dpo.batch_size, dpo.learning_rate, dpo.epochs) == (64, 5e-6, 2)


def test_numbers_of_the_plan_by_hand():
    found = plans(load("paper-aol.yaml"))
    size = 7_241_732_096
    state = 18 * size  # weights 4, gradients 4, moments 8, bf16 weights 2
    assert found["rl_tppo"].memory is not None
    assert sum(found["rl_tppo"].memory.values()) > state + 2 * 2 * size  # with the rollout copy and the reference
    sft = found["sft"]
    assert sft.memory is not None
    assert sft.memory["weights"] / GIB == pytest.approx(26.98, abs=0.01)
    assert sft.seconds == pytest.approx(6 * size * 25_000 * 2 * 2048 / (312e12 * 0.4))
    assert "= 781 steps of 64" in sft.does
    # 2,000 examples: three policies and eight samples of best_of_n; the judge reads 3 + 4 + 2 rows of each. It votes on
    # three pairs of models and one of references, in both orders.
    assert "22,000 responses generated" in found["evaluate"].does
    assert found["evaluate"].notes == ["evaluate: at most 18,000 requests to meta-llama/Meta-Llama-3-70B-Instruct"]
    assert found["read_vote"].notes == ["read_vote: at most 16,000 requests to meta-llama/Meta-Llama-3-70B-Instruct"]
    some = plans(load("paper-aol.yaml", "--evaluate.readings", "[{reader: vote, examples: 100}]"))["read_vote"]
    assert some.notes == [f"read_vote: at most {2 * 4 * 100:,} requests to meta-llama/Meta-Llama-3-70B-Instruct"]


def test_an_encoder_made_a_longformer_is_counted_as_one():
    flags = ("--reward.encoder", "minilm", "--reward.to_longformer", "true", "--reward.max_length", "2048")
    planner, short = Planner(load("paper-aol.yaml", *flags)), Planner(load("tour.yaml"))
    # Per layer three more projections with bias; 2,048 positions and the padding token's in place of 512.
    added = 6 * 3 * (384 * 384 + 384) + (2048 + 1 - 512) * 384
    assert planner.encoder.parameters == short.encoder.parameters + added
    assert (planner.encoder.window, planner.encoder.positions) == (64, 2049)
    memory = {
        where: plans(load("paper-aol.yaml", *flags, "--reward.global_attention", where))["reward"].memory
        for where in ("history", "response", "cls")
    }
    activations = [found["activations"] for found in memory.values() if found]
    assert activations[0] > activations[1] > activations[2]


def test_the_gate_and_the_rivals_own_epochs_are_planned():
    found = plans(load("paper-aol.yaml", "--reward.sentence_epochs", "2"))
    # 10,000 responses, 4 and 2 passes; 1,000 held-out ones and 6 probes of 200 examples.
    assert "4 and 2 epochs = 1,875 steps of 32" in found["reward"].does
    assert "2 models x 2,200 responses of held-out users" in found["check_reward"].does
    assert found["report"].does == "writes the page"


def test_lora_takes_less_memory():
    full, lora = (plans(load("paper-aol.yaml", "--rl.tuning", tuning))["rl_ppo"].memory for tuning in ("full", "lora"))
    assert full is not None
    assert lora is not None
    assert sum(lora.values()) < 0.5 * sum(full.values())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--reward.max_length", "8192"], r"reward\.max_length=8192.*4098.*reward\.encoder"),
        (["--reward.rubric", "history"], r"reward\.rubric=history.*judge\.rubrics"),
        (["--judge.template", "sentence"], r"judge\.template=sentence"),
        (["--judge.model", ""], r"judge\.model"),
        (["--sft.batch_size", "3", "--sft.micro_batch_size", "2"], r"sft\.batch_size=3"),
        (["--rl.minibatch_size", "20"], r"rl\.minibatch_size=20"),
        (["--task.max_prompt_tokens", "40000"], r"task\.max_prompt_tokens.*sft\.model"),
        (["--prepare.eval1_share", "0.99"], r"prepare: .*no user is left"),
        (["--evaluate.splits", "[]"], r"evaluate\.splits"),
        (["--reward.epochs", "0"], r"reward\.epochs=0"),
        (["--reward.sentence_epochs", "0"], r"reward\.sentence_epochs=0"),
        (["--reward.to_longformer", "true"], r"reward\.to_longformer: the encoder is of kind longformer"),
        (["--algorithms", "[tppo, tppo]"], r"algorithms=.*twice"),
        (["--sft.model", "nobody/has-this"], r"sft\.model=nobody/has-this"),
        (["--plan.tflops", "0"], r"plan\.tflops=0"),
        (["--algorithms", "[dpo]", "--dpo.pairs", "judged"], r"sample\.samples_per_example"),
    ],
)
def test_a_contradiction_fails_with_the_settings_name(flags: list[str], named: str):
    with pytest.raises(UserError, match=named):
        plan_text(load("paper-aol.yaml", *flags))


def test_what_the_data_decide_is_unknown_until_prepare_is_done(tiny_policy: Path, tmp_path: Path):
    recipe = load("demo.yaml", "--sft.model", str(tiny_policy), "--sft.max_examples", "0")
    recipe.run_dir = str(tmp_path / "run")
    assert plans(recipe)["sft"].seconds is None
    assert "unknown before prepare" in plans(recipe)["sft"].does
    folder = tmp_path / "run" / "prepare"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"facts": {"examples": {"train": 160, "reward_eval": 10, "eval1": 9}}}')
    assert "80 examples x 2 epochs = 10 steps of 16" in plans(recipe)["sft"].does  # half of the users are SFT's
    assert plans(recipe)["sample"].does.startswith("130 responses"), "a quarter's 40, 10 held out, 80 that SFT has seen"
    recipe.parts.disjoint = False
    assert "160 examples x 2 epochs = 20 steps of 16" in plans(recipe)["sft"].does
    assert "9 examples" in plans(recipe)["evaluate"].does


def test_the_shipped_recipes_are_valid():
    for path in RECIPES.glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
        plan_text(load(path.name))


def test_a_local_folder_is_read_not_guessed(tiny_policy: Path):
    assert config_of(str(tiny_policy), "sft.model").hidden_size == 48
