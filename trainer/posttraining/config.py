"""Configuration of a post-training run. Imports neither torch nor megatron."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from models.config.checks import require
from trainer.config import CheckpointConfig, EvaluationConfig, OptimConfig, PretrainConfig, RunConfig, TrainConfig
from trainer.posttraining.data.row import RowOptions
from trainer.posttraining.environments import EnvironmentConfig
from trainer.posttraining.rewards.registry import RewardConfig

Stage = Literal["sft", "dpo", "rl"]
# The rows of trainer.posttraining.objectives that learn from samples and their rewards, and distillation, which learns
# from samples and a teacher.
ObjectiveName = Literal[
    "reinforce", "rloo", "reinforce++", "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "distill"
]


@dataclass
class RowsConfig:
    """Files of rows, and how they become tokens (docs/posttraining-data.md).

    Attributes:
        train: Files of rows to learn from: .jsonl, .json, .parquet or .csv.
        weights: Share of each file of train; empty takes all rows of all files alike.
        validation: Files of held-out rows, for validations.
        options: The files' format, names of columns, and other details.
        chat: Put text prompts into the tokenizer's chat template, as messages of a user.
        max_prompt_tokens: Longest prompt of rl; null takes what train.seq_len leaves beside rl.max_new_tokens.
        overlong: What happens to longer rows. drop leaves them out; left and right cut their beginning or end; error
            refuses the data.
        turns: sft: which of an assistant's turns in a conversation are learned, all or the last.
    """

    train: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    options: RowOptions = field(default_factory=RowOptions)
    chat: bool = False
    max_prompt_tokens: int | None = None
    overlong: Literal["drop", "left", "right", "error"] = "drop"
    turns: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        for path in (*self.train, *self.validation):
            require(Path(path).expanduser().is_file(), f"rows: {path} does not exist; name a file of rows")
        require(
            not self.weights or len(self.weights) == len(self.train),
            f"rows.weights has {len(self.weights)} shares for {len(self.train)} files of rows.train; give one for each",
        )
        require(
            self.max_prompt_tokens is None or self.max_prompt_tokens > 0,
            f"rows.max_prompt_tokens is {self.max_prompt_tokens}: it must be positive",
        )


@dataclass
class ValueConfig:
    """The value head of rl.objective=ppo (docs/posttraining.md).

    Attributes:
        coefficient: Of its loss.
        clip: How far a value may move in the updates of a rollout before its loss no longer falls.
        gamma: Discount of the rewards of later tokens.
        lam: λ of the generalised advantage estimates.
        lr: Its learning rate, which follows the schedule of optim.lr; null takes optim.lr.
    """

    coefficient: float = 0.1
    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    lr: float | None = None

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"rl.value.{name} is {value}: it must be from 0 to 1")
        for name in ("coefficient", "clip", "lr"):
            value = getattr(self, name)
            require(value is None or value > 0, f"rl.value.{name} is {value}: it must be a positive number")


@dataclass
class OnPolicyConfig:
    """On-policy distillation, rl.objective=distill (docs/posttraining.md).

    Attributes:
        teacher: Weights, a Hugging Face directory, a run or one of its checkpoints, with the same tokens.
        direction: Of the KL divergence: reverse from the trained model to the teacher, forward from the teacher.
    """

    teacher: str | None = None
    direction: Literal["reverse", "forward"] = "reverse"


@dataclass
class RlConfig:
    """Reinforcement learning from verifiable rewards (docs/posttraining.md).

    Attributes:
        objective: The policy gradient, a row of trainer.posttraining.objectives; or distill, the divergence from a
            teacher on the model's own answers, for which rewards are optional.
        samples: Answers to each prompt, a group.
        prompts: Prompts of a rollout; null takes train.global_batch_size / samples, one update a rollout.
        epochs: How often each answer of a rollout is learned from.
        max_new_tokens: Longest answer.
        temperature: Of the samples, and of the policy that is trained.
        clip_low: Lower bound of the ratio is 1 - clip_low; null takes the objective's.
        clip_high: Upper bound of the ratio is 1 + clip_high; null takes the objective's.
        dual_clip: Largest ratio for answers worse than expected; null sets none.
        normalization: What the loss is the mean over; null takes the objective's.
        kl: Coefficient of the KL divergence to the initial policy, which is then kept beside the trained one.
        kl_estimator: Its estimator.
        kl_in: Whether the divergence is a term of the loss or is taken off the reward of every token.
        entropy: Coefficient of the entropy bonus.
        correction: Importance weights for what the sampler computes otherwise than training: none, or by token or
            sequence.
        correction_how: truncate bounds the weights by correction_cap, mask drops what lies above it.
        correction_cap: Bound of the weights.
        max_mismatch: End the run if the mean k3 estimate of the divergence between sampler and training is above this.
        rounds: Draw other prompts in place of groups whose answers have all the same reward, in at most this many
            rounds in all; 1 keeps all groups.
        ahead: Rollouts that are drawn before their turn, so that answers are scored while earlier ones are learned
            from. Answers are at most this many rollouts old, which the objective's ratio weighs out.
        replay: Directory of another run's rollouts, to learn from instead of drawing answers.
        mask_overlong: Learn nothing from answers that reach max_new_tokens without an end.
        slots: Answers that a rank continues at once.
        share_prompts: Train on a prompt once for all answers of its group, where that saves a micro-batch at least this
            many tokens; null never does. Only Megatron's engine does, without context or sequence parallelism, experts,
            spikes, recomputation, compression and strict. Results differ by rounding.
        strict: The sampler's log-probabilities are training's to the last bit, and the run ends if one is not. Nothing
            is left to correct: `correction` is not applied. Every answer is a micro-batch of train.seq_len tokens.
        value: The value head of objective=ppo.
        distillation: The teacher of objective=distill.
        routing_replay: rollout: training takes the experts that the sampler's routers chose (arXiv 2510.11370), with
            its own gates; none: its own choice.
    """

    objective: ObjectiveName = "grpo"
    samples: int = 8
    prompts: int | None = None
    epochs: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    normalization: Literal["token_mean", "group_token_mean", "sequence_mean", "sequence_sum"] | None = None
    kl: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    entropy: float = 0.0
    correction: Literal["none", "token", "sequence"] = "token"
    correction_how: Literal["truncate", "mask"] = "truncate"
    correction_cap: float = 3.0
    max_mismatch: float = 1.0
    rounds: int = 1
    ahead: int = 0
    replay: str | None = None
    mask_overlong: bool = False
    slots: int = 64
    share_prompts: int | None = 256
    strict: bool = False
    value: ValueConfig = field(default_factory=ValueConfig)
    distillation: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    routing_replay: Literal["none", "rollout"] = "none"

    def __post_init__(self) -> None:
        self._check_distillation()
        require(
            self.objective == "ppo" or self.value == ValueConfig(),
            f"rl.value is of rl.objective=ppo, not {self.objective}; leave it out",
        )
        for name in ("samples", "epochs", "max_new_tokens", "rounds", "slots"):
            value = getattr(self, name)
            require(value > 0, f"rl.{name} is {value}: it must be positive")
        require(self.prompts is None or self.prompts > 0, f"rl.prompts is {self.prompts}: it must be positive")
        require(
            self.share_prompts is None or self.share_prompts >= 0,
            f"rl.share_prompts is {self.share_prompts}: it must not be negative; null never shares",
        )
        for name in ("temperature", "correction_cap", "max_mismatch"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"rl.{name} is {value}: it must be a positive number")
        require(self.ahead >= 0, f"rl.ahead is {self.ahead}: it must not be negative")
        require(
            not self.ahead or self.rounds == 1,
            f"rl.rounds={self.rounds} waits for rewards before it draws other prompts; use rl.rounds=1, or rl.ahead=0",
        )
        require(
            self.replay is None or Path(self.replay).is_dir(),
            f"rl.replay: {self.replay} does not exist; name the directory of a run's rollouts",
        )
        require(
            self.replay is None or not self.ahead,
            f"rl.replay has answers with their rewards, and nothing to draw ahead; leave out rl.ahead={self.ahead}",
        )
        for name in ("kl", "entropy"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"rl.{name} is {value}: it must be 0 or a positive number")

    def _check_distillation(self) -> None:
        if self.objective != "distill":
            require(
                self.distillation == OnPolicyConfig(),
                f"rl.distillation is of rl.objective=distill, not {self.objective}; leave it out",
            )
            return
        require(self.distillation.teacher is not None, "rl.objective=distill: rl.distillation.teacher names no teacher")
        for name, default in (("clip_low", None), ("clip_high", None), ("dual_clip", None), ("rounds", 1)):
            value = getattr(self, name)
            require(value == default, f"rl.{name}={value} has no effect with rl.objective=distill; leave it out")
        for name in ("kl", "entropy"):
            value = getattr(self, name)
            require(not value, f"rl.{name}={value} has no effect with rl.objective=distill; leave it out")


@dataclass
class DpoConfig:
    """Learning from pairs of answers (trainer.posttraining.preference).

    Attributes:
        kind: sigmoid (DPO) or ipo.
        beta: How much the model may leave the initial one for a pair.
        label_smoothing: sigmoid: probability that a label is wrong.
        length_normalized: Compare means over tokens instead of sums.
    """

    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False


@dataclass
class RehearsalConfig:
    """Rehearsal of what the initial model has mastered (DPH-RL, docs/posttraining.md).

    Before the first step the initial model answers every prompt `samples` times. Prompts with at least `threshold`
    right answers are mastered: one more answer, if right, is stored and rehearsed, and they are no longer sampled.

    Attributes:
        divergence: From the stored answers: forward (KL of the initial from the trained model), js, alpha, or none,
            which turns rehearsal off.
        eta: Coefficient of the divergence.
        alpha: Of alpha.
        doubled: js: twice the Jensen-Shannon divergence, as in the paper's code.
        samples: Answers to each prompt.
        threshold: Right answers of a mastered prompt; null takes all.
        per_step: Stored answers in a step; null takes an eighth of train.global_batch_size, as the paper's code.
    """

    divergence: Literal["none", "forward", "js", "alpha"] = "none"
    eta: float = 0.01
    alpha: float = 0.2
    doubled: bool = False
    samples: int = 8
    threshold: int | None = None
    per_step: int | None = None

    def __post_init__(self) -> None:
        require(0 <= self.eta < math.inf, f"rehearsal.eta is {self.eta}: it must be 0 or a positive number")
        require(0 < self.alpha < 1, f"rehearsal.alpha is {self.alpha}: it must be above 0 and below 1")
        require(self.samples > 0, f"rehearsal.samples is {self.samples}: it must be positive")
        require(
            self.threshold is None or 0 < self.threshold <= self.samples,
            f"rehearsal.threshold is {self.threshold}: it must be from 1 to rehearsal.samples={self.samples}",
        )
        require(
            self.per_step is None or self.per_step > 0,
            f"rehearsal.per_step is {self.per_step}: it must be positive",
        )

    @property
    def is_on(self) -> bool:
        """Whether anything is rehearsed."""
        return self.divergence != "none"


@dataclass
class PromptFilterConfig:
    """Which prompts are trained on, by what the initial model answers to them before the first step.

    Attributes:
        keep: all, or failed: those of which none of the initial model's answers is right (docs/posttraining.md).
        samples: failed: answers to each prompt.
    """

    keep: Literal["all", "failed"] = "all"
    samples: int = 8

    def __post_init__(self) -> None:
        require(self.samples > 0, f"prompt_filter.samples is {self.samples}: it must be positive")


@dataclass
class GateConfig:
    """Demonstrations where the model fails (HPT, docs/posttraining.md).

    Attributes:
        kind: none: no demonstrations. switch: a question is fine-tuned on its demonstration instead of its answers if
            too few are right. soft: a mixture by the share of right answers. mixed: the demonstration is one more
            answer of its question's group (LUFFY).
        failed: switch: the largest share of right answers at which the demonstration is taken.
        off_policy: switch: up to this share, and above `failed`, the demonstration is taken as an answer instead
            (LUFFY's policy gradient); null for nowhere.
        coefficient: Of the loss on demonstrations.
        mean: The loss on demonstrations is the mean over all questions of a step (the paper), or over the tokens of
            those that are taken (its code).
    """

    kind: Literal["none", "switch", "soft", "mixed"] = "none"
    failed: float = 0.0
    off_policy: float | None = None
    coefficient: float = 1.0
    mean: Literal["questions", "tokens"] = "questions"

    def __post_init__(self) -> None:
        require(
            0 <= self.failed < 1,
            f"gate.failed is {self.failed}: it must be a share of right answers, from 0 to below 1",
        )
        require(
            self.off_policy is None or self.failed < self.off_policy < 1,
            f"gate.off_policy is {self.off_policy}: it must be above gate.failed={self.failed} and below 1",
        )
        require(
            0 <= self.coefficient < math.inf,
            f"gate.coefficient is {self.coefficient}: it must be 0 or a positive number",
        )


@dataclass
class PassAtKConfig:
    """Validation by answers to held-out prompts.

    Attributes:
        every: Steps between validations; 0 validates only before the first and after the last step.
        samples: Answers to each prompt.
        temperature: Of these answers.
        prompts: Number of prompts, the first of rows.validation; 0 takes all.
        right: An answer is right if its reward is at least this, here and wherever right answers are counted.
        show: Answers of each validation to keep in run.dir/samples and to show in TensorBoard.
    """

    every: int = 50
    samples: int = 8
    temperature: float = 1.0
    prompts: int = 64
    right: float = 1.0
    show: int = 8

    def __post_init__(self) -> None:
        for name in ("every", "prompts", "show"):
            value = getattr(self, name)
            require(value >= 0, f"pass_at_k.{name} is {value}: it must not be negative")
        require(self.samples > 0, f"pass_at_k.samples is {self.samples}: it must be positive")
        require(self.temperature >= 0, f"pass_at_k.temperature is {self.temperature}: it must not be negative")


@dataclass
class PosttrainConfig(PretrainConfig):
    """The complete configuration of a post-training run. Of `data`, only the tokenizer is read.

    Attributes:
        stage: sft: supervised fine-tuning on answers; dpo: learning from pairs of answers; rl: reinforcement learning
            from rewards of the model's own answers.
        rows: What is learned from.
        dpo: Learning from pairs.
        rl: Reinforcement learning.
        prompt_filter: rl: which prompts are trained on.
        rehearsal: rl: rehearsal of what the initial model has mastered.
        gate: rl: demonstrations where the model fails.
        rewards: What an answer is worth: the weighted sum of these.
        environment: rl: what replies to the model's turns, for answers of several.
        pass_at_k: Validation of rl.
        run: As in pretraining.
        train: As in pretraining. seq_len bounds a sequence; a micro-batch packs up to micro_batch_size times as many
            tokens; global_batch_size counts the sequences of a step.
        optim: As in pretraining, with other defaults.
        evaluation: As in pretraining; only `every` and `batches` are read, by sft.
        checkpoint: As in pretraining.
    """

    stage: Stage = "sft"
    rows: RowsConfig = field(default_factory=RowsConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    prompt_filter: PromptFilterConfig = field(default_factory=PromptFilterConfig)
    rehearsal: RehearsalConfig = field(default_factory=RehearsalConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    pass_at_k: PassAtKConfig = field(default_factory=PassAtKConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(dir="runs/posttrain"))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, global_batch_size=64))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-6, min_lr_ratio=1.0, warmup_steps=0, weight_decay=0.0, beta2=0.999)
    )
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(every=50, samples=0))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=50))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.phases, "phases are of pretraining; start a run for each stage of post-training")
        require(
            self.train.objective.name == "next_token",
            f"train.objective.name={self.train.objective.name} is of pretraining; stage says what is minimised",
        )
        require(
            self.parallel.pipeline == 1,
            f"parallel.pipeline={self.parallel.pipeline}: post-training has no pipeline stages; use tensor or expert "
            "parallelism, or ZeRO",
        )
        if self.stage != "rl":
            for name in ("prompt_filter", "rehearsal", "gate", "environment"):
                require(
                    getattr(self, name) == type(getattr(self, name))(),
                    f"{name} is of stage rl; leave it out, or set stage=rl",
                )
            return
        require(
            self.rl.objective != "distill" or (self.gate.kind == "none" and not self.rehearsal.is_on),
            "gate and rehearsal are losses beside rewards, which rl.objective=distill has not; leave them out",
        )
        require(
            self.updates == 1 or (self.gate.kind == "none" and not self.rehearsal.is_on),
            "gate and rehearsal choose the losses of a step by its rollout's answers; let a rollout be one update: "
            "rl.prompts * rl.samples = train.global_batch_size, and rl.epochs=1",
        )
        require(
            self.engine.zero_stage < 3,
            "engine.zero_stage=3 leaves no rank a model to sample from; use a lower stage, or tensor parallelism",
        )
        require(
            self.train.seq_len > self.rl.max_new_tokens,
            f"train.seq_len={self.train.seq_len} leaves no room for a prompt beside rl.max_new_tokens="
            f"{self.rl.max_new_tokens}; raise it",
        )
        require(
            self.rollout_sequences * self.rl.epochs % self.train.global_batch_size == 0,
            f"train.global_batch_size={self.train.global_batch_size} does not divide the {self.rollout_sequences} "
            f"answers of a rollout (rl.prompts * rl.samples), {self.rl.epochs} times each; choose a divisor",
        )
        if self.rl.strict:
            self._require_strict()
        if self.rl.routing_replay != "none":
            self._require_replay()

    def _require_replay(self) -> None:
        """Refuse models whose routers' choice cannot be recorded."""
        moe, key = self.model.moe, f"rl.routing_replay={self.rl.routing_replay}"
        require(moe.num_experts > 0, f"{key}: the model has no experts; set rl.routing_replay=none")
        require(
            self.environment.name is None and self.rl.replay is None,
            f"{key} records answers of one turn that the run draws itself; leave out environment.name and rl.replay, "
            "or set rl.routing_replay=none",
        )
        require(
            moe.router.gate == "top_k" and moe.spawn_step is None,
            f"{key} needs the same number of experts for every token; use model.moe.router.gate=top_k without "
            "model.moe.spawn_step, or rl.routing_replay=none",
        )
        require(
            not self.rl.strict,
            f"{key}: with rl.strict the choices are the same without a record; set rl.routing_replay=none",
        )

    def _require_strict(self) -> None:
        """Refuse what computes an answer in training otherwise than beside the sampler."""
        moe, parallel = self.model.moe, self.parallel
        require(
            not self.rl.ahead,
            f"rl.strict compares an answer with the weights that drew it, which rl.ahead={self.rl.ahead} has trained "
            "since; use rl.ahead=0",
        )
        require(
            self.environment.name is None,
            "rl.strict draws an answer in one micro-batch, and environment.name makes one of several turns; leave it "
            "out",
        )
        require(
            self.train.micro_batch_size == 1,
            f"rl.strict gives each answer a micro-batch of its own; set train.micro_batch_size=1, not "
            f"{self.train.micro_batch_size}",
        )
        require(
            parallel.context == 1,
            f"rl.strict with parallel.context={parallel.context}: context-parallel ranks sample each for itself and "
            "train together; use tensor parallelism",
        )
        if not moe.num_experts:
            return
        require(
            parallel.expert == 1,
            f"rl.strict with parallel.expert={parallel.expert}: an expert multiplies other ranks' answers together "
            "with a rank's own, and the sampler has others; set parallel.expert=1",
        )
        require(
            moe.capacity_factor is None,
            f"rl.strict with model.moe.capacity_factor={moe.capacity_factor}: training drops assignments that the "
            "sampler keeps; set model.moe.capacity_factor=null",
        )
        require(
            moe.router.gate == "top_k",
            f"rl.strict with model.moe.router.gate={moe.router.gate}: the gate depends on the step; use top_k",
        )

    @property
    def value_head(self) -> float | None:
        """See PretrainConfig."""
        if self.stage != "rl" or self.rl.objective != "ppo":
            return None
        return 1.0 if self.rl.value.lr is None else self.rl.value.lr / self.optim.lr

    @property
    def prompts(self) -> int:
        """Prompts of a rollout.

        Raises:
            ValueError: rl.prompts is not given, and the batch is not whole groups.
        """
        if self.rl.prompts is not None:
            return self.rl.prompts
        require(
            self.train.global_batch_size % self.rl.samples == 0,
            f"train.global_batch_size={self.train.global_batch_size} is not a number of groups of rl.samples="
            f"{self.rl.samples} answers; use a multiple, or give rl.prompts",
        )
        return self.train.global_batch_size // self.rl.samples

    @property
    def shared_tokens(self) -> int | None:
        """Tokens that a micro-batch with a shared prompt saves at least; None if there are none."""
        model, parallel, train = self.model, self.parallel, self.train
        can_share = (
            self.stage == "rl"
            and not self.rl.strict
            and self.engine.name == "megatron"
            and parallel.context == 1
            and not parallel.sequence
            and not model.moe.num_experts
            and not model.spiking.is_used
            and train.recompute == "none"
            and not train.compression.bits
        )
        return self.rl.share_prompts if can_share else None

    @property
    def rollout_sequences(self) -> int:
        """Answers of a rollout."""
        return self.prompts * self.rl.samples

    @property
    def stored_per_step(self) -> int:
        """Stored answers in a step."""
        if not self.rehearsal.is_on:
            return 0
        return self.rehearsal.per_step or max(self.train.global_batch_size // 8, 1)

    @property
    def updates(self) -> int:
        """Optimizer steps for each rollout."""
        return self.rollout_sequences * self.rl.epochs // self.train.global_batch_size

    @property
    def rollouts(self) -> int:
        """Rollouts that the run learns from."""
        return -(-self.train.steps // self.updates)


def rollout_name(number: int) -> str:
    """The name of a rollout's file in run.dir/rollouts."""
    return f"{number:08d}.jsonl"
