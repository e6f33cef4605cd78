"""Steps of reinforcement learning: rollouts become micro-batches of a policy gradient.

A rollout is the answers to some prompts. It is learned from in one or several updates, each a step of the training
loop. run.dir/rollouts has every rollout as lines of JSON, to read and to replay. The answers depend on the weights, the
seed and the prompts' numbers, so a resumed run draws the same. What earlier weights have drawn, for a run that resumes
between two updates of a rollout or that draws ahead, is read from there, with the log-probabilities of the policy that
drew it, which are kept beside it.

A run that draws ahead has the answers of its next rollouts scored while it learns from the present one.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from trainer.callbacks.base import Callback
from trainer.callbacks.health import TrainingDiverged
from trainer.data.batch import EXPERTS
from trainer.errors import ConfigError
from trainer.posttraining import rollouts
from trainer.posttraining.advantages import (
    group_advantages,
    reinforce_advantages,
    reinforce_plus_plus_advantages,
)
from trainer.posttraining.config import rollout_name
from trainer.posttraining.data.packing import Packing, pack
from trainer.posttraining.data.sampler import PromptSampler
from trainer.posttraining.data.sequences import TokenSequence, load_sequences, save_sequences
from trainer.posttraining.divergences import Divergence, kl_estimate
from trainer.posttraining.gates import Coefficients, Gate, gate
from trainer.posttraining.objectives import OBJECTIVES, Correction, Estimator, KlTerm, token_weights
from trainer.posttraining.policy import (
    ADVANTAGES,
    OFF_POLICY,
    OLD,
    REFERENCE,
    REHEARSAL,
    RETURNS,
    SAMPLER,
    SUPERVISED,
    VALUES,
    WEIGHTS,
    PolicyObjective,
    Terms,
    per_token,
)
from trainer.posttraining.rehearsal import Stored
from trainer.posttraining.rollouts import Drawn, Group, Policy, Prompt, Sample, Sampler
from trainer.posttraining.scoring import Scorer
from trainer.posttraining.strict import Check, Mismatch
from trainer.posttraining.values import ValueTerm, estimate

if TYPE_CHECKING:
    from trainer.data.batch import Batch
    from trainer.engines.frozen import FrozenModel
    from trainer.loop import Trainer
    from trainer.posttraining.config import PosttrainConfig, RlConfig
    from trainer.posttraining.data.row import Row

_LOGGER = logging.getLogger("spiketrain")


def estimator_of(rl: RlConfig) -> Estimator:
    """The row of the table that a run names, with its changes.

    Raises:
        ConfigError: the changes do not go with the row.
    """
    # A teacher takes the place of the policy gradient, whose figures are those of plain REINFORCE.
    estimator = replace(OBJECTIVES["reinforce"], normalization="token_mean")
    if rl.objective != "distill":
        estimator = OBJECTIVES[rl.objective]
    changes = {
        name: value
        for name in ("clip_low", "clip_high", "dual_clip", "normalization")
        if (value := getattr(rl, name)) is not None
    }
    return replace(estimator, **changes)


def terms_of(config: PosttrainConfig) -> Terms:
    """What a step of a run minimises."""
    rl, gated, rehearsal = config.rl, config.gate, config.rehearsal
    corrections: tuple[Correction, ...] = ()
    # In strict mode all weights would be 1.
    if rl.correction != "none" and not rl.strict:
        corrections = (Correction(level=rl.correction, how=rl.correction_how, cap=rl.correction_cap),)
    takes_answers = gated.kind in ("soft", "mixed") or gated.off_policy is not None
    return Terms(
        estimator_of(rl),
        rl.temperature,
        rl.entropy,
        KlTerm(coefficient=rl.kl, estimator=rl.kl_estimator) if rl.kl and rl.kl_in == "loss" else None,
        corrections,
        has_old=config.updates > 1 or rl.ahead > 0,
        off_policy=OBJECTIVES["luffy"] if takes_answers else None,
        has_demonstrations=gated.kind != "none",
        rehearsal=Divergence(kind=rehearsal.divergence, alpha=rehearsal.alpha, doubled=rehearsal.doubled)
        if rehearsal.is_on
        else None,
        value=None if config.value_head is None else ValueTerm(coefficient=rl.value.coefficient, clip=rl.value.clip),
        distillation=rl.distillation.direction if rl.objective == "distill" else None,
    )


@dataclass(frozen=True)
class _Entry:
    """A sequence of a step.

    Attributes:
        sequence: The sequence.
        kind: Which term of the loss it belongs to.
        factor: Its coefficient.
    """

    sequence: TokenSequence
    kind: Literal["own", "off_policy", "supervised", "rehearsal"] = "own"
    factor: float = 1.0


@dataclass(frozen=True)
class _Rollout:
    """A rollout that was begun.

    Attributes:
        prompts: The prompts that were answered for it, by number.
        first: Number of prompts drawn before it.
        cursor: Number of prompts drawn with it.
        drawn: The answers, whose rewards are being computed.
        sequences: The answers' tokens, with their log-probabilities.
    """

    prompts: dict[int, Prompt]
    first: int
    cursor: int
    drawn: Drawn
    sequences: list[TokenSequence]


class Reinforcement:
    """The steps of a run of reinforcement learning.

    Args:
        config: The run's configuration.
        prompts: Draws rows with the tokens of their prompts.
        sampler: Answers prompts.
        scorer: Computes log-probabilities by the kernels of training.
        policy: How answers are drawn.
        packing: What micro-batches must look like; `tokens` is not used.
        demonstrate: Returns a row's demonstration; None for rows without one.
        stored: What the initial model has mastered; None without rehearsal.
        teacher: The teacher of rl.objective=distill.

    Attributes:
        cursor: Number of prompts that were drawn so far.
        begun: Number of rollouts that were drawn so far.
        figures: The newest rollout's entries of metrics.jsonl.
        mismatch: How the sampler's log-probabilities differ from the last step's; empty without strict mode.
    """

    def __init__(
        self,
        config: PosttrainConfig,
        prompts: PromptSampler[tuple[Row, list[int]]],
        sampler: Sampler,
        scorer: Scorer,
        policy: Policy,
        packing: Packing,
        demonstrate: Callable[[Row], TokenSequence | None],
        stored: Stored | None = None,
        teacher: FrozenModel | None = None,
    ) -> None:
        self._teacher = teacher
        self._config, self._prompts, self._sampler, self._scorer = config, prompts, sampler, scorer
        self._policy, self._packing = policy, packing
        self._demonstrate, self._stored = demonstrate, stored
        self._terms = terms_of(config)
        self._check = Check() if config.rl.strict else None
        self._rollout = -1
        self._ahead: dict[int, _Rollout] = {}
        self._sequences: list[TokenSequence] = []
        # Beside the answers, in the order of a rollout's steps.
        self._others: list[_Entry] = []
        self._factors: list[float] | None = None
        self.cursor = self.begun = 0
        self.figures: dict[str, float] = {}
        self.mismatch = Mismatch()

    def objective(self, _: object = None) -> PolicyObjective:
        """What every step minimises."""
        most = self._config.train.global_batch_size + self._config.prompts + self._config.stored_per_step
        return PolicyObjective(self._terms, most, self._check, self._teacher)

    def path(self, rollout: int) -> Path:
        """The file of a rollout."""
        return Path(self._config.run.dir) / "rollouts" / rollout_name(rollout)

    def micro_batches(self, step: int, micro_batch_size: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
        """See trainer.loop.Source. The first step of a rollout answers its prompts."""
        rollout, update = divmod(step, self._config.updates)
        self.figures = {}
        if self._check is not None:
            self._check.is_on = update == 0
        if update == 0:
            self._start(rollout, step, micro_batch_size)
        elif rollout != self._rollout:
            self._sequences = load_sequences(self._kept(rollout))
        self._rollout = rollout
        return pack(
            self._weighted(self._of_update(rollout, update)),
            self._packing_of(micro_batch_size, world),
            seed=self._config.train.seed,
            step=step,
            rank=rank,
            world=world,
        )

    def _start(self, rollout: int, step: int, micro_batch_size: int) -> None:
        """Have the answers of a rollout with their advantages, and its figures. Later ones may be drawn with it."""
        seconds, tokens = self._sampler.seconds | {"scoring": self._scorer.seconds}, self._sampler.tokens
        redrawn = self._sampler.redrawn
        for number in range(rollout, rollout + self._config.rl.ahead + 1):
            if number not in self._ahead:
                begin = self._begin if number >= self.begun else self._begun_before
                self._ahead[number] = begin(number, micro_batch_size)
        current = self._ahead.pop(rollout)
        groups = self._sampler.finish(current.drawn)
        now = self._sampler.seconds | {"scoring": self._scorer.seconds}
        taken = {name: total - seconds[name] for name, total in now.items()}
        self.figures = describe(groups) | {f"rollout/{name}_seconds": value for name, value in taken.items()}
        drawn = self._sampler.tokens - tokens
        self.figures["rollout/tokens_per_second"] = drawn / max(taken["generation"], 1e-9)
        if self._check is not None:
            self.figures["rollout/redrawn"] = float(self._sampler.redrawn - redrawn)
        if self._config.rl.ahead:
            self.figures["rollout/age"] = float(min(rollout, self._config.rl.ahead) * self._config.updates)
        self._sequences = self._with_advantages(groups, current.sequences)
        self._choose(groups, current.prompts, step)
        self._write(rollout, groups, current, is_scored=True)
        if self._config.updates > 1:
            self._keep(rollout, self._sequences)

    def metrics(self, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """See trainer.loop.Source."""
        if self._check is not None and self._check.is_on:
            self.mismatch = self._check.collect(self._scorer.engine)
            self.figures |= {
                "policy/strict_mismatches": float(self.mismatch.tokens),
                "policy/strict_difference": self.mismatch.difference,
            }
        return {**per_token(result), **self.figures}

    def _kept(self, rollout: int) -> Path:
        return self.path(rollout).with_suffix(".safetensors")

    def _keep(self, rollout: int, sequences: list[TokenSequence]) -> None:
        """Write the sequences of a rollout with what the policy that drew them gave, for runs that resume in it."""
        if self._scorer.engine.rank == 0:
            save_sequences(self._kept(rollout), sequences)

    def _write(self, number: int, groups: Sequence[Group], rollout: _Rollout, *, is_scored: bool) -> None:
        if self._scorer.engine.rank == 0:
            about = {"rollout": number, "first": rollout.first, "cursor": rollout.cursor, "is_scored": is_scored}
            rollouts.save(self.path(number), groups, **about)

    def _packing_of(self, micro_batch_size: int, world: int) -> Packing:
        train = self._config.train
        # DeepSpeed needs as many micro-batches in every step.
        fixed = self._config.engine.name == "deepspeed"
        most = train.global_batch_size + self._config.stored_per_step
        if self._config.gate.kind != "none":
            most += self._config.prompts
        count = -(-most // (micro_batch_size * world)) if fixed else None
        return replace(self._packing, tokens=train.seq_len * micro_batch_size, count=count)

    def _begin(self, number: int, micro_batch_size: int) -> _Rollout:
        """Answer the prompts of the next rollout."""
        first = self.cursor
        prompts: dict[int, Prompt] = {}
        draw = self._draw_again if self._config.rl.replay else self._draw
        drawn = draw(number, prompts)
        sequences = [self._sequence(group, sample) for group in drawn.groups for sample in group.samples]
        if self._config.rl.kl or self._terms.has_old or self._terms.value is not None:
            sequences = self._with_log_probs(sequences, micro_batch_size, number)
        self.begun = number + 1
        begun = _Rollout(prompts, first, self.cursor, drawn, sequences)
        if self._config.rl.ahead:
            self._write(number, drawn.groups, begun, is_scored=False)
            self._keep(number, sequences)
        return begun

    def _draw(self, number: int, prompts: dict[int, Prompt]) -> Drawn:
        """Answer the next prompts; of several rounds, take groups whose answers differ in reward first."""
        wanted, rounds = self._config.prompts, self._config.rl.rounds
        if rounds == 1:
            return self._sampler.begin(self._take(wanted, prompts), self._policy)
        chosen: list[Group] = []
        alike: list[Group] = []
        for _ in range(rounds):
            missing = wanted - len(chosen)
            if not missing:
                break
            for group in self._sampler.answer(self._take(missing, prompts), self._policy):
                (chosen if group.has_signal else alike).append(group)
        return Drawn((*chosen, *alike[: wanted - len(chosen)]))

    def _take(self, count: int, prompts: dict[int, Prompt]) -> list[Prompt]:
        """The next prompts, which are noted in `prompts`."""
        new = self._numbered(self.cursor, count)
        self.cursor += count
        prompts |= new
        return list(new.values())

    def _numbered(self, first: int, count: int) -> dict[int, Prompt]:
        """Prompts by their numbers in the run."""
        taken = enumerate(self._prompts.take(first, count), first)
        return {number: Prompt(number, row, tuple(ids)) for number, (row, ids) in taken}

    def _draw_again(self, number: int, prompts: dict[int, Prompt]) -> Drawn:
        """Read a rollout of another run, rewards and all.

        Raises:
            ConfigError: it answers other prompts, or has another number of answers.
        """
        path = Path(self._config.rl.replay or "") / rollout_name(number)
        groups, about = rollouts.load(path)
        self._take(int(about["cursor"]) - self.cursor, prompts)
        for group in groups:
            prompt = prompts.get(group.number)
            if prompt is None or prompt.tokens != group.prompt:
                raise ConfigError(
                    f"rl.replay: {path} answers other prompts than this run's; give the rows, train.seed and tokenizer "
                    "of the run that wrote it"
                )
        rl = self._config.rl
        if [len(group.samples) for group in groups] != [rl.samples] * self._config.prompts:
            raise ConfigError(
                f"rl.replay: {path} has not {rl.samples} answers to {self._config.prompts} prompts; give rl.samples "
                "and rl.prompts of the run that wrote it"
            )
        return Drawn(tuple(groups))

    def _begun_before(self, number: int, micro_batch_size: int) -> _Rollout:
        """Read a rollout that was drawn before the run was resumed."""
        groups, about = rollouts.load(self.path(number))
        first, cursor = int(about["first"]), int(about["cursor"])
        prompts = self._numbered(first, cursor - first)
        drawn = Drawn(tuple(groups))
        if not about["is_scored"]:
            drawn = self._sampler.score([prompts[group.number] for group in groups], groups)
        return _Rollout(prompts, first, cursor, drawn, load_sequences(self._kept(number)))

    def _with_log_probs(
        self, sequences: Sequence[TokenSequence], micro_batch_size: int, rollout: int
    ) -> list[TokenSequence]:
        """The sequences with log-probabilities under the policy that drew them and the initial one, and with values.

        Without values, and where neither ratios nor rewards ask for it, the policy is left out.
        """
        packing = self._packing_of(micro_batch_size, self._scorer.engine.data_parallel_size)
        packing, step = replace(packing, count=None), rollout * self._config.updates
        old, values = None, None
        if self._terms.value is None and not self._terms.has_old and self._config.rl.kl_in == "loss":
            reference: list[np.ndarray] | None = self._scorer.score_by_reference(sequences, packing, step=step)
        elif self._terms.value is None:
            old, reference = self._scorer.score(sequences, packing, step=step)
        else:
            old, reference, values = self._scorer.score_with_values(sequences, packing, step=step)
        columns = {OLD: old, REFERENCE: reference, VALUES: values}
        return [
            _with(one, **{name: arrays[number] for name, arrays in columns.items() if arrays is not None})
            for number, one in enumerate(sequences)
        ]

    def _with_advantages(self, groups: Sequence[Group], sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """The sequences with their advantages, in the order of groups and answers."""
        rl = self._config.rl
        rewards = torch.tensor([sample.reward for group in groups for sample in group.samples], dtype=torch.float64)
        owners = torch.tensor([number for number, group in enumerate(groups) for _ in group.samples])
        if self._terms.value is not None:
            return self._with_estimates(sequences, rewards)
        if rl.kl and rl.kl_in == "reward":
            # Both are 0 at tokens that are not learned.
            differences = [float((one.extra[OLD] - one.extra[REFERENCE]).sum()) for one in sequences]
            rewards -= rl.kl * torch.tensor(differences, dtype=torch.float64)
        advantages = self._advantages(rewards, owners, sequences)
        return [
            _with(one, **{ADVANTAGES: advantage}) for one, advantage in zip(sequences, advantages.tolist(), strict=True)
        ]

    def _with_estimates(self, sequences: Sequence[TokenSequence], rewards: torch.Tensor) -> list[TokenSequence]:
        """The same by a value head: advantages and returns of every token."""
        rl = self._config.rl
        penalties = None
        if rl.kl and rl.kl_in == "reward":
            pairs = [(torch.from_numpy(one.extra[OLD]), torch.from_numpy(one.extra[REFERENCE])) for one in sequences]
            penalties = [rl.kl * kl_estimate(old, reference, rl.kl_estimator).numpy() for old, reference in pairs]
        values = [one.extra[VALUES] for one in sequences]
        found = estimate(sequences, values, rewards, gamma=rl.value.gamma, lam=rl.value.lam, penalties=penalties)
        self.figures["value/explained_variance"] = found.explained
        return [
            _with(one, **{ADVANTAGES: advantages, RETURNS: returns})
            for one, advantages, returns in zip(sequences, found.advantages, found.returns, strict=True)
        ]

    def _sequence(self, group: Group, sample: Sample) -> TokenSequence:
        learned = sample.finished or not self._config.rl.mask_overlong
        pieces = [(tokens, learned and written) for tokens, written in sample.pieces if tokens]
        sequence = TokenSequence.of([(group.prompt, False), *pieces])
        sequence = _with(sequence, **{SAMPLER: np.concatenate([np.zeros(len(group.prompt)), sample.log_probs])})
        if sample.experts is None:
            return sequence
        # A token's entry is the choice at the position that predicts it. No position predicts the first.
        experts = np.pad(sample.experts, ((1, 0), (0, 0), (0, 0)))
        return replace(sequence, extra={**sequence.extra, EXPERTS: experts})

    def _advantages(
        self, rewards: torch.Tensor, groups: torch.Tensor, sequences: Sequence[TokenSequence]
    ) -> torch.Tensor:
        match self._terms.estimator.advantage:
            case "reward":
                return reinforce_advantages(rewards)
            case "whitened":
                lengths = torch.tensor([sequence.learned for sequence in sequences], dtype=torch.float64)
                return reinforce_plus_plus_advantages(rewards, lengths=lengths)
            case ("group" | "group_std" | "leave_one_out") as how:
                return group_advantages(rewards, groups, how)
            case other:
                raise AssertionError(f"{other} is no advantage of samples alone")

    def _choose(self, groups: Sequence[Group], prompts: Mapping[int, Prompt], step: int) -> None:
        """Decide which answers count, and what a step has beside them: demonstrations and stored answers."""
        gated, right = self._config.gate, self._config.pass_at_k.right
        self._others, self._factors = [], None
        if self._stored is not None:
            count = self._config.stored_per_step
            stored = self._stored.take(step, count, self._config.train.seed)
            self._others += [_Entry(sequence, "rehearsal", self._config.rehearsal.eta) for sequence in stored]
        if gated.kind == "none":
            return
        shown = [self._demonstrate(prompts[group.number].row) for group in groups]
        correct = np.array([sum(reward >= right for reward in group.rewards) for group in groups])
        factors = gate(
            Gate(kind=gated.kind, failed=gated.failed, off_policy=gated.off_policy),
            correct,
            self._config.rl.samples,
            has_demonstration=np.array([one is not None for one in shown]),
        )
        self._factors = [
            factor for factor, group in zip(factors.reinforcement, groups, strict=True) for _ in group.samples
        ]
        if gated.kind == "mixed":
            self._sequences = self._beside_demonstrations(groups, shown)
        self._others += self._demonstrations(groups, shown, factors)
        self.figures |= {
            "gate/demonstrations": float(np.mean(factors.demonstration > 0)),
            "gate/off_policy": float(np.mean(factors.off_policy > 0)),
        }

    def _demonstrations(
        self, groups: Sequence[Group], shown: Sequence[TokenSequence | None], factors: Coefficients
    ) -> list[_Entry]:
        entries = []
        rows = zip(groups, shown, factors.demonstration, factors.off_policy, strict=True)
        for group, sequence, supervised, off_policy in rows:
            if sequence is not None and supervised:
                entries.append(_Entry(sequence, "supervised", float(supervised) * self._config.gate.coefficient))
            if sequence is not None and off_policy:
                advantage = self._beside_a_right_answer(group)[-1]
                entries.append(_Entry(_with(sequence, **{ADVANTAGES: advantage}), "off_policy", float(off_policy)))
        return entries

    def _beside_demonstrations(
        self, groups: Sequence[Group], shown: Sequence[TokenSequence | None]
    ) -> list[TokenSequence]:
        """The answers with advantages among those of their groups and the demonstrations (LUFFY)."""
        answers, found = iter(self._sequences), []
        for group, demonstration in zip(groups, shown, strict=True):
            own = list(islice(answers, len(group.samples)))
            if demonstration is not None:
                advantages = self._beside_a_right_answer(group)[:-1]
                own = [_with(one, **{ADVANTAGES: advantage}) for one, advantage in zip(own, advantages, strict=True)]
            found += own
        return found

    def _beside_a_right_answer(self, group: Group) -> list[float]:
        """Advantages of a group's answers, and of a right one after them."""
        union = torch.tensor([*group.rewards, self._config.pass_at_k.right], dtype=torch.float64)
        advantages: list[float] = group_advantages(
            union, torch.zeros(len(union), dtype=torch.int64), "group_std"
        ).tolist()
        return advantages

    def _of_update(self, rollout: int, update: int) -> list[_Entry]:
        """The sequences of an update: a part of the rollout, which every epoch shuffles anew."""
        size, total = self._config.train.global_batch_size, len(self._sequences)
        if self._config.updates == 1:
            factors = self._factors or [1.0] * total
            own = [_Entry(one, "own", factor) for one, factor in zip(self._sequences, factors, strict=True)]
            return [*own, *self._others]
        places = range(update * size, (update + 1) * size)
        orders = {}
        for epoch in range(places[0] // total, places[-1] // total + 1):
            bits = np.random.Philox(np.random.SeedSequence([self._config.train.seed, rollout, epoch]))
            orders[epoch] = np.argsort(bits.random_raw(total), kind="stable")
        return [_Entry(self._sequences[orders[place // total][place % total]]) for place in places]

    def _weighted(self, entries: Sequence[_Entry]) -> list[TokenSequence]:
        """Give every token its weights, times the number of all tokens, by which engines divide."""
        kept = [entry for entry in entries if entry.factor]
        total = sum(entry.sequence.learned for entry in kept)
        weights = self._weights(entries, kept)
        return [self._filled(entry, weight * total) for entry, weight in zip(kept, weights, strict=True)]

    def _weights(self, entries: Sequence[_Entry], kept: Sequence[_Entry]) -> list[float]:
        """The weight of each token of the sequences that count: each term of the loss is normalised by itself."""
        rl, estimator = self._config.rl, self._terms.estimator
        lengths = np.array([entry.sequence.learned for entry in kept], np.int64)
        kinds = np.array([entry.kind for entry in kept], str)
        is_policy = np.isin(kinds, ("own", "off_policy"))
        # With a gate, the mean is over all questions, whatever their losses are.
        everyone = None if self._factors is None else float(sum(entry.kind == "own" for entry in entries))
        weights = (
            token_weights(
                torch.from_numpy(np.where(is_policy, lengths, 0)),
                estimator.normalization,
                sequences=everyone if is_policy.any() else None,
                constant=float(rl.max_new_tokens) if rl.objective == "dr_grpo" else 1.0,
            ).numpy()
            if is_policy.any()
            else np.zeros(len(kept))
        )
        for kind in ("supervised", "rehearsal"):
            of_kind = kinds == kind
            if kind == "supervised" and self._config.gate.mean == "questions":
                weights[of_kind] = 1 / (self._config.prompts * np.maximum(lengths[of_kind], 1))
            else:
                weights[of_kind] = 1 / max(int(lengths[of_kind].sum()), 1)
        return [float(weight) * entry.factor for weight, entry in zip(weights, kept, strict=True)]

    def _filled(self, entry: _Entry, weight: float) -> TokenSequence:
        name = {"own": WEIGHTS, "off_policy": OFF_POLICY, "supervised": SUPERVISED, "rehearsal": REHEARSAL}[entry.kind]
        extras: dict[str, np.ndarray | float] = dict.fromkeys(self._terms.extras, 0.0)
        extras |= {**entry.sequence.extra, name: weight}
        filled = _with(replace(entry.sequence, extra={}), **{key: extras[key] for key in self._terms.extras})
        if self._config.rl.routing_replay == "none":
            return filled
        model = self._config.model
        # Of demonstrations and stored answers nothing is recorded.
        shape = len(filled), len(model.moe_layers()), model.moe.router.top_k
        experts = entry.sequence.extra.get(EXPERTS, np.zeros(shape, np.int16))
        return replace(filled, extra={**filled.extra, EXPERTS: experts})


def _with(sequence: TokenSequence, **extra: np.ndarray | float) -> TokenSequence:
    """The sequence with further values of its tokens; a number is that of all of them."""
    arrays = {
        name: np.full(len(sequence), values, np.float32)
        if isinstance(values, float)
        else np.asarray(values, np.float32)
        for name, values in extra.items()
    }
    return replace(sequence, extra={**sequence.extra, **arrays})


def describe(groups: Sequence[Group]) -> dict[str, float]:
    """The figures of a rollout, as metrics.jsonl has them."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = [sample.reward for sample in samples]
    lengths = [sample.written for sample in samples]
    errors = Counter(sample.error for sample in samples if sample.error is not None)
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        **{f"reward/{name}": mean for name, mean in rollouts.mean_parts(samples).items()},
        **{f"reward/errors/{name}": float(count) for name, count in errors.items()},
        "answers/best_of_group": statistics.fmean(max(group.rewards) for group in groups),
        "answers/groups_with_signal": statistics.fmean(float(group.has_signal) for group in groups),
        "answers/tokens": statistics.fmean(lengths),
        "answers/most_tokens": float(max(lengths)),
        "answers/finished": statistics.fmean(float(sample.finished) for sample in samples),
        "answers/turns": statistics.fmean(1.0 + len(sample.replies) for sample in samples),
    }


class RolloutState(Callback):
    """Keeps the place among the prompts in checkpoints, and ends a run whose sampler deviates from training.

    Args:
        source: The run's steps.
        most: Largest mean k3 estimate of the divergence between sampler and training.
    """

    state_name = "rollouts"

    def __init__(self, source: Reinforcement, most: float) -> None:
        self._source, self._most = source, most

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers of prompts and rollouts drawn."""
        return {"cursor": self._source.cursor, "begun": self._source.begun}

    def load_state_dict(self, state: dict[str, Any], version: int) -> None:
        """See `state_dict`."""
        self._source.cursor, self._source.begun = state["cursor"], state.get("begun", 0)

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Look at the divergence.

        Raises:
            TrainingDiverged: it is too large, or in strict mode not nothing; on every rank together.
        """
        if self._source.mismatch.tokens:
            raise TrainingDiverged(
                f"step {metrics['step']}: {self._source.mismatch}; nothing was learned from it. A kernel does not "
                "repeat its results, or the weights have changed since the rollout; without rl.strict the run goes on"
            )
        found = metrics["policy/sampler_k3"]
        if found > self._most:
            raise TrainingDiverged(
                f"step {metrics['step']}: the sampler's probabilities differ from training's by {found:.3g} nats a "
                f"token (k3; rl.max_mismatch={self._most:g}); train in fp32, or raise rl.max_mismatch"
            )
