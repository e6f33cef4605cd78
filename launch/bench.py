"""Benchmarks, ours against a peer alternately in one process; and studies, which test a paper's claim with our runs.

spiketrain bench train_step --json train_step.json
spiketrain bench train_step --help
"""

import importlib
import sys

from trainer.cli import entry, fail

# Each is a module PACKAGE/NAME.py with a dataclass `Config`, a `DESCRIPTION` and `main(config)`.
BENCHMARKS = {
    "train_step": "a whole optimizer step against Hugging Face transformers, dense and hybrid",
    "linear_attention": "forward and backward of every linear attention against transformers, fla-core and SDPA",
    "moe": "forward and backward of a mixture-of-experts layer against a loop over experts and Mixtral's block",
    "losses": "memory and time of linear + cross entropy or log-probabilities, fused against full logits",
    "spiking": "the spike, forward and backward, against eager torch; event-driven against dense products",
    "quantization": "activations in 8 and 4 bits and back, against a bfloat16 copy and torch.quantize_per_channel",
    "memory": "what backward keeps by policy: bytes, peak memory, time, error of the gradient",
    "compression_error": "bias and noise of gradients that read activations in 8 or 4 bits, by operator",
    "weights": "peak host memory and time of importing and exporting Hugging Face weights, against the model's size",
    "building": "peak host memory while a rank's shard of a model is built and drawn, against the shard",
    "serve": "the HTTP server: tokens a second and time to first token of several clients against one",
    "rollout": "many answers to one long prompt, against transformers.generate and without clones",
    "posttrain_step": "a GRPO step (answers, rewards, scores, one update) against TRL's GRPOTrainer, by phase",
    "decode": "a decoding step of the generation engine against transformers.generate and ctranslate2",
    "long_context": "time to first token, decoding time and state size against length, linear against softmax",
    "communication": "bytes sent by context-parallel layers, counted at the process group, against formulas",
}
STUDIES = {
    "dense_to_sparse": "the laptop recipe with dense-to-sparse gates against top-k, at equal training FLOPs",
    "spiking_training": "the laptop recipe with spikes from the first step, over k, against floats at equal steps",
    "compression_training": "the laptop recipe with compressed activations against keeping everything: final loss",
    "conversion": "a softmax model converted to hybrids, experts and spikes at a tenth of its tokens: loss and recall",
    "posttraining": "GRPO, DPH-RL, HPT and their rivals on tasks with several right answers: pass@k over seeds",
    "gate_identifiability": "error of gate parameters against sample size: which gates let a temperature be learned",
}


def main() -> None:
    """Run the benchmark named by the first argument with the remaining options."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: spiketrain bench NAME [--json FILE] [options; NAME --help lists them]\n")
        for known, description in (BENCHMARKS | STUDIES).items():
            print(f"  {known:<20} {description}")
        return
    if name not in BENCHMARKS | STUDIES:
        fail(f"no benchmark {name!r}; choose from {', '.join(BENCHMARKS | STUDIES)}")
    package = "trainer.benchmarks" if name in BENCHMARKS else "trainer.studies"
    # Imported by name: some benchmarks need peers that are not installed everywhere.
    benchmark = importlib.import_module(f"{package}.{name}")
    # Options follow the benchmark's name, and usage messages show both.
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    entry(benchmark.main, benchmark.Config, benchmark.DESCRIPTION)


if __name__ == "__main__":
    main()
