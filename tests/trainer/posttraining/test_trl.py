"""Our losses against TRL's, computed by its own trainers on the same weights and the same batch."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch.nn.utils.rnn import pad_sequence

from models.config import AttentionConfig, ModelConfig
from models.decoder import Decoder, initialize
from models.hub.llama_family import stored_name
from trainer.benchmarks.transformers_peer import build_peer, copy_weights
from trainer.config import TrainConfig
from trainer.engines.frozen import FrozenModel
from trainer.objectives.base import Outputs
from trainer.posttraining.config import PosttrainConfig, RlConfig
from trainer.posttraining.data.packing import Packing, pack
from trainer.posttraining.data.sequences import TokenSequence
from trainer.posttraining.policy import ADVANTAGES, OLD, REFERENCE, PolicyObjective, PreferenceObjective
from trainer.posttraining.preference import Preference
from trainer.posttraining.reinforcement import Reinforcement, terms_of
from trainer.posttraining.rollouts import Drawn, Group, Sample

# Both import their parts when these are first used.
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

VOCABULARY, PAD = 96, 0
# Four groups of three answers; a group's rewards differ, and so do prompts and answers in length.
SAMPLES, MOST_TOKENS = 3, 9
REWARDS = (0.0, 1.0, 0.5)


@dataclass
class Both:
    """The same weights twice.

    Attributes:
        ours: Our model.
        theirs: A directory that transformers reads.
        tokenizer: One of the same vocabulary, for TRL.
    """

    ours: Decoder
    theirs: str
    tokenizer: object


def build(seed, folder):
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        init_std=0.2,
        attention=AttentionConfig(4, 2, qkv_bias=True),
        tie_embeddings=False,
    )
    ours = Decoder(config, VOCABULARY)
    initialize(ours, seed)
    peer = build_peer(config, VOCABULARY, 64)
    copy_weights(ours, peer)
    peer.save_pretrained(folder)
    words = models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w1")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="w1", eos_token="w2", pad_token=f"w{PAD}"
    )
    return Both(ours, str(folder), tokenizer)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return build(0, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
    """Another model, for the reference."""
    return build(1, tmp_path_factory.mktemp("initial"))


def draw(random, count):
    return tuple(random.integers(3, VOCABULARY, count).tolist())


def groups_of(random):
    groups = []
    for number in range(4):
        answers = [draw(random, int(random.integers(1, MOST_TOKENS + 1))) for _ in REWARDS]
        samples = [Sample(tokens, (-1.0,) * len(tokens), True, reward=r) for tokens, r in zip(answers, REWARDS)]
        groups.append(Group(number, f"row {number}", draw(random, 2 + number), tuple(samples)))
    return groups


class FixedScorer:
    """Log-probabilities of another policy than the one in training, and of the reference."""

    engine = SimpleNamespace(rank=1, data_parallel_size=1)
    seconds = 0.0

    def __init__(self, random):
        self._random = random

    def score(self, sequences, packing, *, step):
        def drawn():
            return [
                (sequence.loss_mask * self._random.uniform(-8, -3, len(sequence))).astype(np.float32)
                for sequence in sequences
            ]

        return drawn(), drawn()


def our_batches(rl, model, importance=False):
    """The micro-batches of the first of two updates, as a run makes them, and what it minimises."""
    random = np.random.default_rng(0)
    groups = groups_of(random)
    config = PosttrainConfig(
        model=model,
        stage="rl",
        rl=rl,
        train=TrainConfig(steps=2, seq_len=20, micro_batch_size=2, global_batch_size=len(groups) * SAMPLES),
    )
    sampler = SimpleNamespace(
        seconds={"generation": 0.0, "rewards": 0.0},
        tokens=0,
        redrawn=0,
        begin=lambda prompts, policy: Drawn(tuple(groups)),
        finish=lambda drawn: list(drawn.groups),
    )
    prompts = SimpleNamespace(take=lambda first, count: [(None, list(group.prompt)) for group in groups])
    packing = Packing(20, pad_id=PAD)
    source = Reinforcement(config, prompts, sampler, FixedScorer(random), None, packing, lambda row: None)
    batches, objective = source.micro_batches(0, 2), source.objective()
    if importance:
        terms = terms_of(config)
        objective = PolicyObjective(replace(terms, kl=replace(terms.kl, importance=True)), len(groups) * SAMPLES)
    return batches, objective


THEIR_NAMES = {OLD: "old_per_token_logps", REFERENCE: "ref_per_token_logps"}


def their_batch(batches):
    """The same sequences as TRL's trainer gets them: prompts padded on the left, answers on the right."""
    rows = {name: [] for name in ("prompt_ids", "completion_ids", OLD, REFERENCE)}
    advantages = []
    for batch in batches:
        for start, stop in zip(batch.documents.bounds, batch.documents.bounds[1:]):
            learned = batch.loss_mask[0, start:stop] > 0
            if not learned.any():
                continue
            first = int(learned.nonzero()[0]) + 1
            rows["prompt_ids"].append(batch.tokens[0, start : start + first])
            rows["completion_ids"].append(batch.tokens[0, start + first : stop])
            for name in (OLD, REFERENCE):
                if name in batch.extra:
                    rows[name].append(batch.extra[name][0, start:stop][learned])
            advantages.append(batch.extra[ADVANTAGES][0, start:stop][learned][0])

    rows["prompt_mask"], rows["completion_mask"] = (
        [torch.ones_like(ids) for ids in rows[name]] for name in ("prompt_ids", "completion_ids")
    )
    padded = {
        THEIR_NAMES.get(name, name): pad_sequence(
            tensors, batch_first=True, padding_value=PAD, padding_side="left" if "prompt" in name else "right"
        )
        for name, tensors in rows.items()
        if tensors
    }
    count = torch.tensor(sum(map(len, rows["completion_ids"])))
    return {**padded, "advantages": torch.stack(advantages), "num_items_in_batch": count}


def options_of(folder):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_dropout": True,
    }


def dataset(**row):
    """One row, which trainers want to see; the batches are given them."""
    from datasets import Dataset

    return Dataset.from_list([row])


def outputs_of(model, batch, frozen=None):
    hidden = model.hidden_states(batch.tokens, batch.positions, batch.documents)
    return Outputs(hidden, model.head_weight, model.groups, frozen or {})


def our_gradients(model, objective, batches, frozen=None):
    """Loss and gradients as an engine computes them: the sums over micro-batches, divided by the count."""
    model.zero_grad()
    total = sum(objective.forward(outputs_of(model, batch, frozen and frozen(batch)), batch)[0] for batch in batches)
    loss = total / sum(objective.count(batch) for batch in batches)
    loss.backward()
    return loss.item(), {stored_name(name): parameter.grad for name, parameter in model.named_parameters()}


def their_gradients(trainer, inputs):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


def compare(ours, theirs):
    (loss, gradients), (expected, expected_gradients) = ours, theirs
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        wanted = expected_gradients[name]
        assert wanted.norm() > 0, name
        assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5, name


# TRL multiplies the estimate by the ratio unless told otherwise.
PLAIN_KL = {"use_bias_correction_kl": False}

# Our options, and TRL's for the same.
CASES = {
    "grpo": ({"objective": "grpo"}, {"loss_type": "grpo", "epsilon": 0.2}),
    "grpo, KL": (
        {"objective": "grpo", "kl": 0.04},
        {"loss_type": "grpo", "epsilon": 0.2, "beta": 0.04} | PLAIN_KL,
    ),
    "grpo, KL with importance weights": (
        {"objective": "grpo", "kl": 0.04},
        {"loss_type": "grpo", "epsilon": 0.2, "beta": 0.04, "use_bias_correction_kl": True},
    ),
    "dapo": ({"objective": "dapo"}, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "dapo, dual clip, KL": (
        {"objective": "dapo", "dual_clip": 1.5, "kl": 0.1},
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "delta": 1.5, "beta": 0.1} | PLAIN_KL,
    ),
    "dapo, entropy, temperature": (
        {"objective": "dapo", "entropy": 0.05, "temperature": 0.7},
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "entropy_coef": 0.05, "temperature": 0.7},
    ),
    "dr_grpo": ({"objective": "dr_grpo"}, {"loss_type": "dr_grpo", "epsilon": 0.2}),
    "gspo": (
        {"objective": "gspo", "clip_low": 0.2, "clip_high": 0.3},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.2, "epsilon_high": 0.3},
    ),
    # TRL's bound is 1 + ours.
    "cispo": ({"objective": "cispo", "clip_high": 1.0}, {"loss_type": "cispo", "epsilon_high": 2.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_policy_losses_and_their_gradients(trained, tmp_path, case):
    """With an old policy, so that ratios are clipped on both sides."""
    ours, theirs = CASES[case]
    rl = RlConfig(samples=SAMPLES, epochs=2, max_new_tokens=MOST_TOKENS, correction="none", **ours)
    importance = bool(theirs.get("use_bias_correction_kl"))
    batches, objective = our_batches(rl, trained.ours.model_config, importance)
    assert len(batches) > 1, "the loss is normalised over the micro-batches of a step"
    found = our_gradients(trained.ours, objective, batches)
    trainer = trl.GRPOTrainer(
        trained.theirs,
        lambda completions, **_: [0.0] * len(completions),
        trl.GRPOConfig(
            **options_of(tmp_path),
            per_device_train_batch_size=12,
            num_generations=SAMPLES,
            max_completion_length=MOST_TOKENS,
            model_init_kwargs={"dtype": "float32"},
            **theirs,
        ),
        dataset(prompt="w3"),
        processing_class=trained.tokenizer,
    )
    compare(found, their_gradients(trainer, their_batch(batches)))
    names = ["cispo_clip_ratio"] if case == "cispo" else ["clip_ratio/low_mean", "clip_ratio/high_mean"]
    assert all(0 < trainer._metrics["train"][name][0] < 1 for name in names)


@pytest.mark.parametrize(
    ("preference", "theirs"),
    [
        (Preference(beta=0.3), {"loss_type": ["sigmoid"], "beta": 0.3}),
        # TRL compares means over tokens here, as the authors of IPO say they did.
        (Preference(kind="ipo", beta=0.2, length_normalized=True), {"loss_type": ["ipo"], "beta": 0.2}),
    ],
    ids=["sigmoid", "ipo"],
)
def test_preference_losses_and_their_gradients(trained, initial, tmp_path, preference, theirs):
    random = np.random.default_rng(0)
    prompts = [draw(random, 3 + number) for number in range(3)]
    answers = [(draw(random, 4), draw(random, 2 + 3 * number)) for number in range(3)]
    sequences = [
        TokenSequence.of([(prompt, False), (answer, True)]) for prompt, pair in zip(prompts, answers) for answer in pair
    ]
    batches = pack(sequences, Packing(40, pad_id=PAD), seed=0, step=0, together=2)
    assert len(batches) > 1
    reference = FrozenModel(
        [initial.ours], lambda batches, after: [outputs_of(initial.ours, batch).hidden for batch in batches]
    )
    objective = PreferenceObjective(preference, reference)
    found = our_gradients(trained.ours, objective, batches, lambda batch: {"reference": reference.outputs([batch])[0]})
    trainer = trl.DPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(trained.theirs),
        transformers.AutoModelForCausalLM.from_pretrained(initial.theirs),
        trl.DPOConfig(**options_of(tmp_path), **theirs),
        train_dataset=dataset(prompt="w3", chosen="w4", rejected="w5"),
        processing_class=trained.tokenizer,
    )
    rows = [
        {"prompt_ids": list(prompt), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}
        for prompt, (chosen, rejected) in zip(prompts, answers)
    ]
    compare(found, their_gradients(trainer, trainer.data_collator(rows)))
