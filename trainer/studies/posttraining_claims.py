"""The study of post-training: its models, their figures, what papers claim of them, tables and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.evaluation.pass_at_k import pass_at_k
from trainer.figures import pyplot, save
from trainer.planning.report import table
from trainer.studies.runs import interval

MOST_K = 64
LEVELS = ("all", "easy", "hard")


@dataclass(frozen=True)
class Model:
    """A model of the study.

    Attributes:
        title: What it is called in tables.
        options: What sets its reinforcement learning apart from GRPO: sections of a recipe.
    """

    title: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _rehearsal(divergence: str) -> dict[str, Any]:
    return {"rehearsal": {"divergence": divergence, "eta": 0.2, "samples": 8, "threshold": 4, "per_step": 32}}


MODELS = {
    "initial": Model("initial policy"),
    "sft": Model("SFT"),
    "grpo": Model("GRPO"),
    "sft_grpo": Model("SFT, then GRPO"),
    "luffy": Model("LUFFY", {"gate": {"kind": "mixed"}}),
    "dph_forward": Model("DPH-RL, forward KL", _rehearsal("forward")),
    "dph_js": Model("DPH-RL, JS", _rehearsal("js")),
    "dph_alpha": Model("DPH-RL, alpha", _rehearsal("alpha")),
    "hpt": Model("HPT", {"gate": {"kind": "switch"}}),
    "hpt_dph": Model("HPT x DPH-RL", {"gate": {"kind": "switch"}, **_rehearsal("forward")}),
    "failed_only": Model("GRPO on failed questions", {"prompt_filter": {"keep": "failed", "samples": 8}}),
}


class Figures(NamedTuple):
    """How often a model answers held-out questions right.

    Attributes:
        samples: Answers to each question.
        right: Number of right ones, by level [P].
        different: Number of different right ones, by level [P].
    """

    samples: int
    right: dict[str, np.ndarray]
    different: dict[str, np.ndarray]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Figures:
        """Read the content of a model's figures.json."""
        found: list[dict[str, np.ndarray]] = []
        for name in ("right", "different"):
            found.append(
                {
                    level: np.array([row[name] for row in values["prompts"] if level in ("all", row["level"])])
                    for level in LEVELS
                }
            )
        return cls(values["samples"], *found)

    @property
    def ks(self) -> list[int]:
        """The k of pass@k."""
        most = min(MOST_K, self.samples)
        return [1 << power for power in range(most.bit_length()) if 1 << power <= most]

    def pass_at(self, k: int, level: str = "all") -> float:
        """The mean of pass@k over the questions of a level."""
        return float(np.mean(pass_at_k(self.samples, self.right[level], k)))

    def distinct(self, level: str = "all") -> float:
        """Different right answers a question."""
        return float(np.mean(self.different[level]))


class Claim(NamedTuple):
    """A claim about pass@k of two models of the same seed: ours is at least, or is below, the peer's.

    Attributes:
        words: What is claimed, of whom.
        ours: The model.
        peer: What it is compared with.
        k: Of pass@k.
        below: Whether ours is claimed to be below.
    """

    words: str
    ours: str
    peer: str
    k: int
    below: bool = False

    def judge(self, found: Mapping[str, Sequence[Figures]]) -> dict[str, Any]:
        """Whether the claim holds of the mean over seeds, and whether the interval leaves a doubt."""
        k = min(self.k, found[self.ours][0].ks[-1])
        pairs = zip(found[self.ours], found[self.peer], strict=True)
        mean, half = interval([ours.pass_at(k) - peer.pass_at(k) for ours, peer in pairs])
        return {
            "claim": self.words,
            "measure": f"pass@{k}, {self.ours} less {self.peer}",
            "difference": mean,
            "half": None if math.isnan(half) else half,
            "holds": mean < 0 if self.below else mean >= 0,
            "certain": not math.isnan(half) and abs(mean) > half,
        }


_KEEPS = "DPH-RL (2509.07430): keeps pass@64 at or above the initial policy's"
_RISES = "DPH-RL (2509.07430): pass@1 rises as much as GRPO's, or more"
_BOTH = "HPT x DPH-RL is at least as good as each"
_FILTERED = "2512.05962: an alpha-divergence covers more than the others"
CLAIMS = (
    Claim("GRPO raises pass@1", "grpo", "initial", 1),
    Claim("GRPO lowers pass@64", "grpo", "initial", MOST_K, below=True),
    Claim(_KEEPS, "dph_forward", "initial", MOST_K),
    Claim(_KEEPS, "dph_js", "initial", MOST_K),
    Claim(_RISES, "dph_forward", "grpo", 1),
    Claim(_RISES, "dph_js", "grpo", 1),
    Claim("DPH-RL keeps more of pass@64 than GRPO", "dph_forward", "grpo", MOST_K),
    Claim("DPH-RL keeps more of pass@64 than GRPO", "dph_js", "grpo", MOST_K),
    *(
        Claim("HPT (2509.04419) is above SFT, GRPO, both in turn, and LUFFY", "hpt", peer, 1)
        for peer in ("sft", "grpo", "sft_grpo", "luffy")
    ),
    *(Claim(_BOTH, "hpt_dph", peer, k) for peer in ("hpt", "dph_forward") for k in (1, MOST_K)),
    Claim("2606.15455: prompts without a right answer alone lift pass@64", "failed_only", "initial", MOST_K),
    Claim(_FILTERED, "dph_alpha", "dph_forward", MOST_K),
    Claim(_FILTERED, "dph_alpha", "dph_js", MOST_K),
    Claim("2512.11470, against HPT: SFT, then RL is better at equal samples", "sft_grpo", "hpt", 1),
)

Found = Mapping[str, Mapping[str, Sequence[Figures]]]


def report(found: Found, seeds: Sequence[int], path: str | None) -> None:
    """Print the tables and the claims of the seeds that are complete, and write the JSON file."""
    claims = {task: judged(models) for task, models in found.items()}
    parts = [f"seeds {', '.join(map(str, seeds))}"]
    for task, models in found.items():
        parts += [pass_table(task, models), claim_table(task, claims[task])]
    print("\n\n".join(parts), flush=True)
    if path:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(_values(found, seeds, claims)) + "\n")


def judged(models: Mapping[str, Sequence[Figures]]) -> list[dict[str, Any]]:
    """The claims about models that were trained."""
    return [claim.judge(models) for claim in CLAIMS if {claim.ours, claim.peer} <= models.keys()]


def pass_table(task: str, models: Mapping[str, Sequence[Figures]]) -> str:
    """pass@1 and pass@k of all questions and by level, and the number of different right answers to a question."""
    most = next(iter(models.values()))[0].ks[-1]
    cells = [(k, level) for level in LEVELS for k in (1, most)]
    header = [task, *(f"pass@{k}, {level}" for k, level in cells), "different right answers"]
    rows = [
        [
            MODELS[name].title,
            *(_figure([100 * one.pass_at(k, level) for one in own], ".1f") for k, level in cells),
            _figure([one.distinct() for one in own], ".2f"),
        ]
        for name, own in models.items()
    ]
    return table(header, rows)


def claim_table(task: str, claims: Sequence[Mapping[str, Any]]) -> str:
    """Each claim with the difference in points and the verdict."""
    rows = []
    for claim in claims:
        half = "" if claim["half"] is None else f" ± {100 * claim['half']:.1f}"
        verdict = ("holds" if claim["holds"] else "does not hold") + ("" if claim["certain"] else ", not certain")
        rows.append([claim["claim"], claim["measure"], f"{100 * claim['difference']:+.1f}{half}", verdict])
    return table([f"claim, {task}", "measure", "points", "verdict"], rows)


def _figure(values: Sequence[float], form: str) -> str:
    mean, half = interval(values)
    return f"{mean:{form}}" + ("" if math.isnan(half) else f" ± {half:{form}}")


def _values(found: Found, seeds: Sequence[int], claims: Mapping[str, Any]) -> dict[str, Any]:
    """All figures by task, model and seed, as JSON has them; pass@k in the order of `k`."""
    ks = next(iter(next(iter(found.values())).values()))[0].ks
    tasks = {
        task: {
            "models": {
                name: {
                    str(seed): {level: [round(one.pass_at(k, level), 4) for k in ks] for level in LEVELS}
                    | {"different": round(one.distinct(), 3)}
                    for seed, one in zip(seeds, own, strict=True)
                }
                for name, own in models.items()
            },
            "claims": claims[task],
        }
        for task, models in found.items()
    }
    return {"seeds": list(seeds), "k": ks, "tasks": tasks}


def draw(found: Found, path: Path) -> None:
    """Draw pass@k of every model, with intervals over seeds: a row for each task, a column for each level."""
    figure, grid = pyplot().subplots(
        len(found), len(LEVELS), figsize=(14, 4 * len(found)), constrained_layout=True, squeeze=False
    )
    for row, (task, models) in zip(grid, found.items(), strict=True):
        for axes, level in zip(row, LEVELS, strict=True):
            for number, (name, own) in enumerate(models.items()):
                points = [interval([100 * one.pass_at(k, level) for one in own]) for k in own[0].ks]
                means, halves = (np.array(part) for part in zip(*points, strict=True))
                style = {"color": "black", "linestyle": "--"} if name == "initial" else {"color": f"C{number - 1}"}
                # Side by side, so that intervals do not hide one another.
                places = np.array(own[0].ks) * 1.025 ** (number - len(models) / 2)
                axes.errorbar(places, means, halves, elinewidth=0.5, linewidth=1.2, label=MODELS[name].title, **style)
            axes.set_ylim(0, 102)
            axes.set_xscale("log", base=2)
            axes.set_title(f"{task}, {level} questions")
            axes.set_xlabel("k")
            axes.grid(alpha=0.2)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("pass@k, %")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    save(figure, path, dpi=72)
