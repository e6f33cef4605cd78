"""Rotary embeddings of a config.json, in any of the places and spellings that versions of transformers read."""

from collections.abc import Mapping
from typing import Any

from models.config import RopeScalingConfig
from models.hub.values import positive

REPRESENTED = ("rope_theta", "rope_parameters", "rope_scaling")

# By rope_type: its numbers by Hugging Face's key and the field of RopeScalingConfig, besides `factor`.
_TYPES: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
# Further keys of a rotation, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1.0, None), "truncate": (True, None)}


def write(theta: float, scaling: RopeScalingConfig) -> dict[str, Any]:
    """The keys of config.json, for versions of transformers that read rope_parameters and for earlier ones."""
    return {
        "rope_parameters": {**_scaling_to_hub(scaling), "rope_theta": theta},
        "rope_theta": theta,
        "rope_scaling": None if scaling.kind == "none" else _scaling_to_hub(scaling),
    }


def read_scaling(config: Mapping[str, Any]) -> RopeScalingConfig:
    """Scaling of the rotary frequencies.

    Raises:
        ValueError: a number is missing or wrong, or two places disagree.
    """
    scaled = {name: rope for name, rope in _rotations(config).items() if _type(rope) != "default"}
    found = [_one_scaling(config, name, rope) for name, rope in scaled.items()]
    if any(scaling != found[0] for scaling in found):
        raise ValueError("rope_parameters and rope_scaling scale the rotation differently; keep the right one")
    return found[0] if found else RopeScalingConfig()


def read_theta(config: Mapping[str, Any], default: float) -> float:
    """Base of the rotary embedding, from any of the places where it may be given.

    Raises:
        ValueError: the rotation is not supported, or two places disagree.
    """
    thetas = {"rope_theta": config.get("rope_theta")}
    for name, rope in _rotations(config).items():
        thetas[f"{name}.rope_theta"] = rope.get("rope_theta")
    given = {name: positive(name, theta) for name, theta in thetas.items() if theta is not None}
    if len(set(given.values())) > 1:
        # Versions of transformers differ in which of them they read.
        values = ", ".join(f"{name}={theta:g}" for name, theta in given.items())
        raise ValueError(f"the rotary base is given differently ({values}); keep the right one")
    return next(iter(given.values()), default)


def split_share(config: Mapping[str, Any], default: float) -> tuple[float, dict[str, Any]]:
    """The share of a head's channels that are rotated, from any of its places; and the rest of config.json.

    Raises:
        ValueError: two places disagree, or it is no positive number.
    """
    key, rest = "partial_rotary_factor", dict(config)
    given = {key: rest.pop(key, None)}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(rest.get(name), dict):
            rest[name] = dict(rest[name])
            given[f"{name}.{key}"] = rest[name].pop(key, None)
    shares = {name: positive(name, value) for name, value in given.items() if value is not None}
    if len(set(shares.values())) > 1:
        values = ", ".join(f"{name}={share:g}" for name, share in shares.items())
        raise ValueError(f"the rotated share is given differently ({values}); keep the right one")
    return next(iter(shares.values()), default), rest


def _scaling_to_hub(scaling: RopeScalingConfig) -> dict[str, Any]:
    kind = "default" if scaling.kind == "none" else scaling.kind
    values = {key: getattr(scaling, name) for key, name in _TYPES[kind].items()}
    return {"rope_type": kind, **{key: value for key, value in values.items() if value is not None}}


def _rotations(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The places that describe the rotation, checked for keys that models here cannot represent.

    Raises:
        ValueError: a place is no object, or asks for a rotation that is not supported.
    """
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = {} if config.get(name) is None else config[name]
        if not isinstance(rope, dict):
            raise ValueError(f"{name}={rope!r} is not supported; an object with rope_type and rope_theta is")
        for key, value in rope.items():
            if isinstance(value, dict):
                raise ValueError(f"{name} of {key} alone is not supported; one rotation for all layers is")
        kind = _type(rope)
        if kind not in _TYPES:
            raise ValueError(f"{name}: rope_type={kind!r} is not supported; {', '.join(_TYPES)} are")
        known = {"rope_theta", "rope_type", "type", *_TYPES[kind]}
        for key, value in rope.items():
            if key not in known and value not in _NEUTRAL.get(key, (None,)):
                raise ValueError(f"{name}: {key}={value!r} is not supported with rope_type={kind!r}")
        found[name] = rope
    return found


def _type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type") or rope.get("type") or "default"


def _one_scaling(config: Mapping[str, Any], name: str, rope: Mapping[str, Any]) -> RopeScalingConfig:
    kind = _type(rope)
    values: dict[str, Any] = {}
    for key, own in _TYPES[kind].items():
        value = rope.get(key)
        if value is None and key == "original_max_position_embeddings":
            # Where older configurations have it.
            value = config.get(key) or config.get("max_position_embeddings")
        if value is not None:
            values[own] = positive(f"{name}: {key}", value)
    # llama3 has no defaults in transformers, the others only for optional keys.
    needed = _TYPES[kind] if kind == "llama3" else {"factor": "factor"}
    for key, own in needed.items():
        if own not in values:
            raise ValueError(f"{name}: {key} is missing, which rope_type={kind!r} needs")
    if "original_length" in values:
        values["original_length"] = int(values["original_length"])
    return RopeScalingConfig(kind, **values)
