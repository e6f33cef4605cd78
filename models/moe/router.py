"""Routers choose a token's experts and their weights (axes: N tokens, E experts).

The router computes in float32. Its behaviour at a training step is a function of the step, the parameters, and two
small states that follow from the whole batch of the previous step: the selection bias and the load.

A layer's auxiliary losses are sums over tokens, like the loss itself: E sum_e p_e f_e and the squared log-sum-exp of
the logits. Given the load f, each is linear in a token's contribution. Their gradient is therefore the same for any
split of the batch into micro-batches and over ranks. Each layer adds its gradient in its backward pass. The reported
loss does not include these losses.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.autograd import derive
from kernels.moe import dense_to_sparse_gate, top_k_gate
from kernels.moe.routing import gates_of, largest
from models.auxiliary_loss import add_loss
from models.config import MoEConfig
from models.parallel import sum_counts
from models.parameters import Drawing, Module, Placement, zeros
from models.saved_activations import is_recomputing

# Init std of a router whose experts begin as copies. Small, so that its gates begin near their average.
SPAWNED_ROUTER_STD = 1e-3


def _start_weight(block: Tensor, drawing: Drawing) -> None:
    spawns = drawing.config.moe.spawn_step is not None
    block.normal_(std=SPAWNED_ROUTER_STD if spawns else drawing.config.init_std, generator=drawing.generator)


def _start_temperature(block: Tensor, drawing: Drawing) -> None:
    """Initialise a learned temperature to the schedule's first value."""
    block.fill_(math.log(drawing.config.moe.router.dense_to_sparse.temperature_start))


def _even_load(block: Tensor, drawing: Drawing) -> None:
    block.fill_(1 / drawing.shape[0])


class Routing(NamedTuple):
    """The experts that tokens go to.

    Attributes:
        gates: Factor of each expert's output, float32 [N, E]. Zero where a token does not go.
        routing_map: The experts that a token goes to, bool [N, E]. With padding it includes tokens with a zero gate.
        rows: The sum of the map, if it follows from the configuration. None if it depends on the logits.
    """

    gates: Tensor
    routing_map: Tensor
    rows: int | None


class Router(Module):
    """The router of a layer. Weight [E, D].

    Attributes:
        step: Number of steps taken before this one, for the schedules. None once training is over.
        loss_scale: Factor of a micro-batch's loss before backward.
        seed: Seed of the noise.
        statistics: Counters since the start of the step, see `models.moe.statistics`. None if nobody collects them.
        replicated: The experts that are replicated on every rank in this step, in ascending order.
        bias: Added to the scores for the selection of experts only, float32 [E]. None if not configured.
        load: Each expert's share of the previous step's batch, float32 [E]. None if not configured.
        recorded: Where to put the experts of the tokens that are routed, `recorded_experts`. None to record nothing.
    """

    # The router reads the residual stream, so its gradient is whole on ranks that see all tokens.
    placements: ClassVar = {
        "weight": Placement(_start_weight, float32=True),
        "log_temperature": Placement(_start_temperature, float32=True, decayed=False),
        "bias": Placement(zeros, float32=True),
        "load": Placement(_even_load, float32=True),
    }
    step: int | None = None
    loss_scale: float = 1.0
    seed: int = 0
    replicated: tuple[int, ...] = ()
    recorded: list[Tensor] | None = None

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        experts, router, losses = config.num_experts, config.router, config.losses
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        learns = router.gate == "dense_to_sparse" and router.dense_to_sparse.schedule == "learned"
        self.log_temperature: nn.Parameter | None
        self.register_parameter("log_temperature", nn.Parameter(torch.empty(1)) if learns else None)
        self.bias: Tensor | None
        self.load: Tensor | None
        self.register_buffer("bias", torch.zeros(experts) if router.bias_update_rate else None)
        follows_load = (losses.balance and losses.scope == "global") or config.replicated_experts
        self.register_buffer("load", torch.full((experts,), 1 / experts) if follows_load else None)
        self.statistics: Tensor | None = None

    def forward(
        self,
        x_TBD: Tensor,
        token_keys_TB: Tensor | None = None,
        are_sinks: bool = False,
        experts_TBK: Tensor | None = None,
    ) -> Routing:
        """Route the tokens of x [T, B, D], in the row-major order of [T * B, D].

        token_keys, int64 [T, B], identify tokens for the noise. Without them there is no noise. Sinks are routed as in
        evaluation: without losses, counts and a limit of capacity. experts, of gate=top_k, takes the place of the
        router's own choice, see `recorded_experts`; the gates are its own in any case.
        """
        x_ND = x_TBD.flatten(0, 1)
        wide = x_ND.float()
        derive(wide, Tensor.float, (x_ND,))
        logits = F.linear(wide, self.weight.float())
        training = self.training and torch.is_grad_enabled() and not are_sinks
        temperature = self._temperature()
        if not self.config.is_spawned(self.step):
            return self._to_the_first(logits, temperature, training)
        if self.config.router.gate == "top_k":
            probabilities, gates, keep = self._top_k(logits)
            if experts_TBK is not None:
                gates, keep = self._replay(logits, keep, experts_TBK.flatten(0, 1))
            if self.recorded is not None and not are_sinks:
                self.recorded.append(recorded_experts(keep, self.config.router.top_k))
        else:
            probabilities, gates, keep = self._dense_to_sparse(logits, temperature, token_keys_TB if training else None)
        # Each token keeps exactly k experts, so the host knows the sum without asking the device.
        rows = len(keep) * self.config.router.top_k if self.config.router.gate == "top_k" else None
        # Evaluation has neither auxiliary losses nor a capacity limit.
        if not training:
            return Routing(gates, keep, rows)
        balance, z = self._losses(logits, probabilities, keep, x_TBD.shape[:2])
        gates = add_loss(gates, balance + z, self.loss_scale)
        gates, routing_map, dropped = self._fit(gates, keep)
        # The recomputation must not count a micro-batch twice.
        if not is_recomputing():
            self._count(probabilities, keep, dropped, balance, z, temperature)
        return Routing(gates, routing_map, rows if self.config.capacity_factor is None else None)

    def choose_replicated(self) -> None:
        """Choose the previous step's busiest experts for replication, if expert parallelism is on.

        All ranks know the same load and choose alike. Before the first step the load is even, so none is chosen.
        """
        number = self.config.replicated_experts
        if not number or self.groups.expert is None or self.load is None:
            return
        if self.config.is_spawned(self.step):
            self.replicated = busiest(self.load.tolist(), number, self.config.replicate_above)
        else:
            # All tokens go to the first expert.
            self.replicated = (0,)

    def _to_the_first(self, logits: Tensor, temperature: Tensor | float, training: bool) -> Routing:
        """Send every token to the first expert, as to a dense feed-forward: no auxiliary losses, no capacity limit."""
        keep = torch.zeros_like(logits, dtype=torch.bool)
        keep[:, 0] = True
        # The zero term gives the router's parameters a gradient, which gradient reductions may wait for.
        gates = keep.float() + 0.0 * (logits + temperature)
        if training and not is_recomputing():
            nothing = logits.new_zeros(())
            self._count(keep.float(), keep, nothing, nothing, nothing, temperature)
        return Routing(gates, keep, len(keep))

    def _top_k(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router = self.config.router
        return top_k_gate(
            logits,
            router.top_k,
            score=router.score,
            normalize=router.normalize,
            num_groups=router.num_groups,
            group_top_k=router.group_top_k,
            bias_E=self.bias,
        )

    def _replay(self, logits: Tensor, keep: Tensor, experts_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The router's gates for recorded experts, and which experts these are."""
        known_N1 = experts_NK[:, :1] > 0
        recorded = torch.zeros_like(keep).scatter(1, (experts_NK.long() - 1).clamp(min=0), True)
        keep = torch.where(known_N1, recorded, keep)
        router = self.config.router
        return gates_of(logits, keep, score=router.score, normalize=router.normalize), keep

    def _dense_to_sparse(
        self, logits: Tensor, temperature: Tensor | float, token_keys_TB: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        sparse, noise, step = self.config.router.dense_to_sparse, None, self.config.gate_step(self.step)
        if sparse.gumbel_noise and token_keys_TB is not None:
            noise = gumbel_noise(token_keys_TB.flatten(), self.config.num_experts, self.seed, self.step or 0)
        return dense_to_sparse_gate(
            logits,
            temperature,
            0.0 if sparse.is_hard(step) else sparse.threshold,
            activation=sparse.activation,
            noise_TE=noise,
            max_experts=self.config.experts_at(self.step),
            renormalize=self.config.router.normalize == "after",
        )

    def _temperature(self) -> Tensor | float:
        sparse = self.config.router.dense_to_sparse
        if self.config.router.gate == "top_k":
            return 1.0
        if self.log_temperature is not None:
            return self.log_temperature.float().exp()
        return sparse.temperature(self.config.gate_step(self.step))

    def _losses(
        self, logits: Tensor, probabilities: Tensor, keep: Tensor, shape_TB: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Return balance loss and z-loss, summed over this rank's tokens and multiplied by their coefficients."""
        losses = self.config.losses
        balance = z = logits.new_zeros(())
        if losses.balance:
            p_TBE = probabilities.view(*shape_TB, -1)
            share = self._share(keep.view(*shape_TB, -1))
            # arXiv 2101.03961, as a sum over tokens.
            balance = losses.balance * self.config.num_experts * (p_TBE * share).sum()
        if losses.z:
            # arXiv 2202.08906, as a sum over tokens.
            z = losses.z * logits.logsumexp(-1).square().sum()
        return balance, z

    def _share(self, keep_TBE: Tensor) -> Tensor:
        """Return each expert's share of the kept assignments, float32 [E], or [B, E] with the scope `sequence`."""
        if self.load is not None and self.config.losses.scope == "global":
            return self.load.float()
        by_sequence = self.config.losses.scope == "sequence"
        counts = sum_counts(keep_TBE.float().sum(0 if by_sequence else (0, 1)), self.groups)
        return counts / counts.sum(-1, keepdim=True)

    def _fit(self, gates: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Enforce the experts' capacity. Return gates, the routing map, and the number of dropped assignments."""
        config = self.config
        if config.capacity_factor is None:
            return gates, keep, gates.new_zeros(())
        mean = len(keep) * config.experts_at(self.step) / config.num_experts
        within = fit_capacity(gates, keep, min(math.ceil(config.capacity_factor * mean), len(keep)))
        kept = keep & within
        return gates * kept, within if config.pad_to_capacity else kept, (keep & ~within).sum()

    @torch.no_grad()
    def _count(
        self,
        probabilities: Tensor,
        keep: Tensor,
        dropped: Tensor,
        balance: Tensor,
        z: Tensor,
        temperature: Tensor | float,
    ) -> None:
        """Add a micro-batch to the step's counters."""
        if self.statistics is None:
            return
        tokens = len(keep)
        entropy = torch.special.entr(probabilities).sum()
        rest = [dropped, entropy, balance, z, temperature * tokens, len(self.replicated) * tokens, tokens]
        counted = [torch.as_tensor(value, dtype=torch.float64, device=keep.device).reshape(1) for value in rest]
        self.statistics += torch.cat([keep.sum(0).double(), *counted])


def recorded_experts(keep_NE: Tensor, top_k: int) -> Tensor:
    """The experts of each token as numbers from 1, int16 [N, top_k], ascending; 0 stands for no record."""
    return (keep_NE.nonzero()[:, 1].view(-1, top_k) + 1).to(torch.int16)


def busiest(load: Sequence[float], number: int, above: float) -> tuple[int, ...]:
    """Return up to `number` of the most loaded experts above `above` times the mean load, in ascending order.

    Ties go to the lower index.
    """
    limit = above * sum(load) / len(load)
    busy = [expert for expert, share in enumerate(load) if share > limit]
    return tuple(sorted(sorted(busy, key=lambda expert: -load[expert])[:number]))


def fit_capacity(gates: Tensor, keep: Tensor, capacity: int) -> Tensor:
    """Select the `capacity` tokens with the largest gates of each expert, bool [N, E]. Ties go to the first token.

    Tokens outside `keep` rank last. With zero capacity nothing is selected.
    """
    weight = gates.detach().masked_fill(~keep, -1.0)
    return largest(weight.T, capacity).T if capacity else torch.zeros_like(keep)


def token_keys(tokens: Tensor, positions: Tensor) -> Tensor:
    """Return int64 keys that identify tokens for the noise, made of the token and its position in its document.

    Every rank of every layout knows them, and so does the recomputation. Tokens that agree in both share their noise
    within a step.
    """
    return _mix(tokens * 0x1_0000_0000 + positions)


def gumbel_noise(keys_N: Tensor, experts: int, seed: int, step: int) -> Tensor:
    """Return standard Gumbel noise [N, E], float32. A function of its arguments, equal on every device."""
    # A counter-based generator: torch's own would depend on the device and on the order of the tokens.
    counters = keys_N[:, None] + torch.arange(experts, device=keys_N.device)
    bits = _mix(_mix(counters) ^ _signed(seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 1))
    return gumbel(bits)


def gumbel(bits: Tensor) -> Tensor:
    """Convert random int64 to standard Gumbel numbers, float32."""
    # 23 bits: with one more, float32 would round the largest uniform up to 1, and the noise to infinity.
    uniform = ((bits & 0x7FFFFF).float() + 0.5) / 0x800000
    return -(-uniform.log()).log()


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 with the finalizer of splitmix64 (Steele et al. 2014)."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros. torch's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Return the signed 64-bit integer with the same bits."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value
