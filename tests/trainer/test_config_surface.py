"""The configuration keys and options, written down: whoever adds, renames or removes one says so here.

Scripts and run directories out there rely on these names. A new key should be one that cannot be derived from others.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.cli import dotted_keys
from trainer.config import PretrainConfig
from trainer.posttraining.config import PosttrainConfig

ROOT = Path(__file__).resolve().parents[2]

KEYS = {
    "run": "dir device threads deterministic timeout_seconds",
    "model": "num_layers hidden_size ffn_hidden_size vocab_size vocab_multiple tie_embeddings norm_eps "
    "zero_centered_norms init_std scale_residual_init sink_tokens mixers attention gated_delta_net "
    "gated_linear_attention retention hgrn2 delta_net kimi_delta_attention spikingbrain_gla moe spiking lora",
    "model.mixers": "pattern linear_per_full full_attention_every linear softmax",
    "model.attention": "num_heads num_kv_heads head_dim rope_theta rope_scaling partial_rotary_factor qk_norm "
    "qkv_bias output_gate window",
    "model.attention.rope_scaling": "kind factor original_length low_freq_factor high_freq_factor beta_slow beta_fast "
    "attention_factor",
    "model.gated_delta_net": "num_heads num_v_heads head_dim expand_v conv_size allow_negative_eigenvalues",
    "model.gated_linear_attention": "num_heads expand_k expand_v gate_low_rank gate_normalizer",
    "model.retention": "num_heads expand_k expand_v rope_theta",
    "model.hgrn2": "head_dim",
    "model.delta_net": "num_heads head_dim expand_v conv_size allow_negative_eigenvalues output_gate",
    "model.kimi_delta_attention": "num_heads num_v_heads head_dim expand_v conv_size allow_negative_eigenvalues gate "
    "min_log_decay",
    "model.spikingbrain_gla": "num_heads num_kv_heads head_dim qkv_bias gate_low_rank gate_normalizer",
    "model.moe": "num_experts shared_experts shared_expert_gate expert_hidden_size dense_layers activation "
    "capacity_factor pad_to_capacity recompute_above replicated_experts replicate_above spawn_step "
    "spawn_diversify router losses",
    "model.moe.router": "gate score top_k normalize num_groups group_top_k bias_update_rate dense_to_sparse",
    "model.moe.router.dense_to_sparse": "activation gumbel_noise schedule temperature_start temperature_end "
    "plateau_steps decay_steps threshold max_experts_start max_experts_end hard_top_k_after",
    "model.moe.losses": "balance scope z",
    "model.spiking": "layers k k_start anneal_steps start_step threshold momentum count_range code dead_zone gradient "
    "queries int8_keys_values weights activity",
    "model.spiking.activity": "loss weight target",
    "model.lora": "rank alpha targets scaling init",
    "data": "path blend tokenizer validation_path eod_id document_mask cache_dir vocab_size",
    "train": "steps seed precision seq_len micro_batch_size global_batch_size max_skipped_steps recompute trainable "
    "recompute_modules compression objective",
    "train.objective": "name teacher temperature kl_weight next_token_weight",
    "train.compression": "bits group min_bytes range decay check by_stage modules",
    "optim": "lr min_lr_ratio schedule warmup_steps decay_fraction weight_decay beta1 beta2 eps clip_grad",
    "engine": "name zero_stage offload",
    "parallel": "tensor sequence pipeline virtual_pipeline pipeline_layers expert context",
    "checkpoint": "every keep keep_every resume init asynchronous",
    "evaluation": "every batches seq_len stride samples sample_tokens prompt compare_compressors",
    "logging": "every measure_every progress tensorboard profile_step",
    "phases": "",
}

# Of post-training, beside all of these but for the phases' options.
POSTTRAIN_KEYS = {
    "stage": "",
    "rows": "train weights validation options chat max_prompt_tokens overlong turns",
    "rows.options": "format data_source drop_system prompt_key data_source_key target_key targets_key "
    "target_probs_key input_key output_key label_key input_template",
    "dpo": "kind beta label_smoothing length_normalized",
    "rl": "objective samples prompts epochs max_new_tokens temperature clip_low clip_high dual_clip normalization kl "
    "kl_estimator kl_in entropy correction correction_how correction_cap max_mismatch rounds ahead replay "
    "mask_overlong slots share_prompts strict value distillation routing_replay",
    "rl.distillation": "teacher direction",
    "rl.value": "coefficient clip gamma lam lr",
    "prompt_filter": "keep samples",
    "rehearsal": "divergence eta alpha doubled samples threshold per_step",
    "gate": "kind failed off_policy coefficient mean",
    "rewards": "",
    "environment": "name options turns role max_reply_tokens seconds memory_bytes",
    "pass_at_k": "every samples temperature prompts right show",
}

# Of launch/pretrain.py, beside one option for every key above.
PRETRAIN_OPTIONS = {"--help", "-h", "--config", "--print_config", "--check", "--world-size", "--init"}


def written_down(keys=KEYS):
    groups = [key for key in keys if "." not in key]
    return {*groups, *(f"{group}.{leaf}" for group, leaves in keys.items() for leaf in leaves.split())}


def test_configuration_keys():
    keys = dotted_keys(PretrainConfig)
    assert len(keys) == len(set(keys))
    assert set(keys) == written_down()


def test_keys_of_posttraining():
    keys = dotted_keys(PosttrainConfig)
    assert len(keys) == len(set(keys))
    assert set(keys) == written_down() | written_down(POSTTRAIN_KEYS)


def options_of(script: str, *command: str) -> set[str]:
    """The option strings of the parser that a script, or a command of it, builds."""
    listing = f"""
import runpy, sys
import jsonargparse
def show(self, *args, **kwargs):
    strings = [string for action in self._actions for string in action.option_strings]
    print(*strings, sep="\\n")
    sys.exit(0)
jsonargparse.ArgumentParser.parse_args = show
sys.argv = [{script!r}, *{command!r}]
runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_options_of_plan():
    keys = "name nodes devices memory usable host_memory peak_bf16 peak_fp32 efficiency intra_node inter_node"
    cluster = {"--cluster", *(f"--cluster.{key}" for key in keys.split())}
    of_pretrain = options_of("launch/pretrain.py") - {"--check", "--world-size", "--init"}
    assert options_of("launch/plan.py") == of_pretrain | cluster | {"--search", "--json"}


def test_options_of_compression():
    of_pretrain = options_of("launch/pretrain.py") - {"--check", "--world-size", "--init"}
    assert options_of("launch/compression.py") == of_pretrain | {"--cosine", "--megabytes", "--output", "--json"}


def test_options_of_pretrain():
    options = options_of("launch/pretrain.py")
    # jsonargparse gives a list a second option, to append to it.
    lists = {
        "--parallel.pipeline_layers+",
        "--train.recompute_modules+",
        "--model.moe.dense_layers+",
        "--train.trainable+",
        "--model.spiking.layers+",
        "--model.spiking.count_range+",
        "--model.lora.targets+",
        "--phases+",
        "--phases.help",
        "--train.compression.modules.help",
    }
    assert options == PRETRAIN_OPTIONS | {f"--{key}" for key in written_down()} | lists


@pytest.mark.parametrize(
    ("script", "keys"),
    [
        (
            "launch/generate.py",
            "checkpoint prompt prompt_file prompts output chat max_new_tokens samples temperature top_k top_p min_p "
            "repetition_penalty stop stop+ seed slots deterministic compile tokenizer device",
        ),
        (
            "launch/serve.py",
            "checkpoint tokenizer model_name device host port api_key slots queue max_prompt_tokens max_new_tokens "
            "max_body_bytes request_seconds drain_seconds prefixes deterministic",
        ),
        ("launch/prepare_rows.py", "task options output train validation seed"),
        ("launch/convert.py export", "checkpoint output dtype layout max_file_gb"),
        ("launch/convert.py import", "source output dtype max_file_gb"),
    ],
)
def test_options_of_the_other_commands(script, keys):
    assert options_of(*script.split()) == {"--help", "-h", "--config", "--print_config"} | {
        f"--{key}" for key in keys.split()
    }


def test_options_of_evaluation():
    own = (
        "help config print_config checkpoint data split seq_len stride batch_size compare_compressors by_position "
        "recall recall+ lengths lengths+ examples candidates depth haystack seed "
        "tasks task_dir fewshot rewards rewards+ rewards.help rows pass_at_k "
    )
    own += "tokenizer device json spiking raster neurons neurons.layers+ neurons.count_range+"
    neurons = {f"neurons.{key.removeprefix('model.spiking.')}" for key in written_down() if "model.spiking." in key}
    answers = "samples temperature max_new_tokens prompts right slots output"
    rows = {key for key in written_down(POSTTRAIN_KEYS) if key.startswith("rows.")}
    rows |= {f"rows.{name}+" for name in ("train", "weights", "validation")}
    own = (*own.split(), *neurons, *rows, *(f"pass_at_k.{key}" for key in answers.split()))
    assert options_of("launch/evaluate.py") == {"-h"} | {f"--{key}" for key in own}


def test_options_of_upcycling():
    own = "help config print_config source output router_std diversify seed dtype max_file_gb moe.dense_layers+"
    experts = {key.removeprefix("model.") for key in written_down() if key.startswith("model.moe")}
    options = options_of("launch/convert.py", "upcycle")
    assert options == {"-h"} | {f"--{key}" for key in (*own.split(), *experts)}


LINEAR = ("gated_delta_net", "gated_linear_attention", "retention", "delta_net", "kimi_delta_attention")


def linear_mixers() -> set[str]:
    """The options of the linear mixers' settings, as a configuration has them."""
    keys = {key.removeprefix("model.") for key in written_down() if key.startswith("model.")}
    return {f"--{key}" for key in keys if key.split(".")[0] in (*LINEAR, "spikingbrain_gla")}


def test_options_of_hybrids():
    own = "help config print_config source output pattern preset layers_file window drop_biases seed dtype max_file_gb"
    own += " sink_tokens"
    assert options_of("launch/convert.py", "hybrid") == {"-h"} | {f"--{key}" for key in own.split()} | linear_mixers()


def test_options_of_choices_of_layers():
    own = "help config print_config source data split align_data keep linear method align_steps align_lr output json"
    own += " align_batch_size sequences seq_len batch_size window drop_biases seed device"
    assert options_of("launch/convert.py", "layers") == {"-h"} | {f"--{key}" for key in own.split()} | linear_mixers()


def test_options_of_recipes():
    own = "help config print_config dir base steps steps+ check"
    assert options_of("launch/convert.py", "run") == {"-h"} | {f"--{key}" for key in own.split()}


def test_the_listing_sees_abbreviations_nowhere():
    """An abbreviation would be a second, unwritten name of an option."""
    from trainer.cli import make_parser

    parser: argparse.ArgumentParser = make_parser(PretrainConfig, "")
    assert parser.allow_abbrev is False
