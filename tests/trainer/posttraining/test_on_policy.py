"""On-policy distillation: the loss and its gradient against their definition, and against the policy gradient."""

import pytest
import torch

from models.parameters import WHOLE
from trainer.objectives.base import Outputs
from trainer.posttraining.data.packing import Packing, pack
from trainer.posttraining.data.sequences import TokenSequence
from trainer.posttraining.objectives import OBJECTIVES
from trainer.posttraining.policy import ADVANTAGES, SAMPLER, WEIGHTS, PolicyObjective, Terms

VOCAB, HIDDEN, TEMPERATURE = 7, 5, 0.8


class Teacher:
    """Stands for a frozen model: the objective needs to know only that there is one."""


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    sequences = []
    for prompt, answer in ((2, 4), (3, 1), (1, 5)):
        tokens = torch.randint(VOCAB, (prompt + answer,), generator=random).tolist()
        one = TokenSequence.of([(tokens[:prompt], False), (tokens[prompt:], True)])
        weights = torch.rand(len(one), generator=random).numpy() + 0.5
        zeros = 0 * weights
        sequences.append(
            TokenSequence(one.tokens, one.loss_mask, {WEIGHTS: weights, ADVANTAGES: zeros, SAMPLER: zeros})
        )
    (packed,) = pack(sequences, Packing(32, multiple=4), seed=0, step=0)
    return packed


def models(length, seed=0, same=False):
    """Hidden states [T, 1, D] and a head of a student, and of a teacher."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = (
        (torch.randn(length, 1, HIDDEN, generator=random), torch.randn(VOCAB, HIDDEN, generator=random))
        for _ in range(2)
    )
    return student, student if same else teacher


def loss_of(batch, student, teacher, direction):
    terms = Terms(OBJECTIVES["reinforce"], TEMPERATURE, distillation=direction)
    objective = PolicyObjective(terms, 3, teacher=Teacher())
    frozen = {"teacher": Outputs(*teacher, WHOLE)}
    loss, sums = objective.forward(Outputs(*student, WHOLE, frozen), batch)
    return loss, dict(zip(objective.metrics, sums, strict=True))


def log_probs_of(model):
    hidden, head = model
    return (hidden.transpose(0, 1) @ head.T / TEMPERATURE).log_softmax(-1)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_gradient_is_that_of_the_divergence(batch, direction):
    student, teacher = models(batch.tokens.shape[1])
    student[0].requires_grad_()
    loss, sums = loss_of(batch, student, teacher, direction)
    log_q, log_p = log_probs_of(student), log_probs_of(teacher)
    first, second = (log_q, log_p) if direction == "reverse" else (log_p, log_q)
    weights = torch.where(batch.loss_mask != 0, batch.extra[WEIGHTS], 0.0)
    expected = (weights * (first.exp() * (first - second)).sum(-1)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and sums["distillation/kl"] == loss
    ours, theirs = (torch.autograd.grad(one, student[0])[0] for one in (loss, expected))
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.abs().max() > 0.1
    assert sums["policy/tokens"] == batch.loss_mask.count_nonzero() and sums["policy/entropy"] > 0


def test_it_is_the_mean_policy_gradient_of_the_teachers_advantage(batch):
    """The mean over the next token of −(log p_teacher − log p) ∇ log p."""
    student, teacher = models(batch.tokens.shape[1])
    student[0].requires_grad_()
    loss, _ = loss_of(batch, student, teacher, "reverse")
    log_q, log_p = log_probs_of(student), log_probs_of(teacher)
    advantages = (log_p - log_q).detach()
    weights = torch.where(batch.loss_mask != 0, batch.extra[WEIGHTS], 0.0)
    expected = -(weights[..., None] * log_q.exp().detach() * advantages * log_q).sum()
    ours, theirs = (torch.autograd.grad(one, student[0])[0] for one in (loss, expected))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_teacher_that_is_the_student_teaches_nothing(batch, direction):
    student, teacher = models(batch.tokens.shape[1], same=True)
    student[0].requires_grad_()
    loss, _ = loss_of(batch, student, teacher, direction)
    (gradient,) = torch.autograd.grad(loss, student[0])
    assert abs(loss.item()) < 1e-6 and gradient.abs().max() < 1e-6
