"""Rotary embeddings in a Hugging Face config.json: `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.models.config_json import ConfigReader, Fields
from grpo_jax.models.config_values import checked_flag, checked_number, whole_number
from grpo_jax.models.rope import Rope
from grpo_jax.models.spec import ModelError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
"""Types of rope scaling that are read."""


class RopeReader:
    """Takes the settings of one rotary embedding, each once, so that what is left is not known.

    Attributes:
        reader: of the config.json that they are part of.
        kind: the type of scaling.
        settings: what has not been taken yet.
    """

    def __init__(self, reader: ConfigReader, parameters: Any) -> None:
        if parameters is not None and not isinstance(parameters, dict):
            raise ModelError(
                f'{reader.file}: the rope settings are {show(parameters)}: use an object such as {{"rope_type": "default"}}'
            )
        self.reader, self.settings = reader, dict(parameters or {})
        self.kind: Any = self.settings.pop("rope_type", self.settings.pop("type", "default")) or "default"
        self.settings.pop("type", None)

    def need(self, name: str) -> Any:
        """A setting's value; ModelError where it is missing."""
        if name not in self.settings:
            raise ModelError(f"{self.reader.file}: rope type {self.kind!r} needs {name}")
        return self.settings.pop(name)

    def number(self, name: str, default: float | None = None) -> float:
        """A number in its range; the default where it is absent or null, ModelError where there is none."""
        value = self.need(name) if default is None else self.settings.pop(name, None)
        return checked_number(self.reader.file, name, default if value is None else value)

    def optional(self, name: str) -> float | None:
        """A number, or None where it is absent or null."""
        value = self.settings.pop(name, None)
        return None if value is None else checked_number(self.reader.file, name, value)

    def original_length(self) -> int:
        """Context length before scaling: next to the settings (Phi-3) or among them; else that of the model."""
        name, outside = "original_max_position_embeddings", self.reader.get("original_max_position_embeddings")
        within = self.settings.pop(name, None)
        value = within if outside is None else outside
        if value is None:
            return self.reader.whole("max_position_embeddings")
        return whole_number(self.reader.file, name, value)

    def scale(self, original_length: int) -> float:
        """`factor`; where it is absent, the model's context length over that before scaling."""
        return self.optional("factor") or self.reader.whole("max_position_embeddings") / original_length


def one_rope(reader: ConfigReader, theta: float = 10000.0, rotated: int | None = None) -> Fields:
    """Reads the rotary embedding of a family that uses the same one in all layers; `rotated` is as in `read_rope`."""
    base = reader.number("rope_theta", theta)
    rope = read_rope(reader, reader.get("rope_parameters", reader.get("rope_scaling")), base, rotated)
    return {"ropes": (rope,), "rope_of_layer": (0,) * reader.whole("num_hidden_layers")}


def ropes_by_window(reader: ConfigReader, windows: tuple[int | None, ...], theta: float, local: float | None = None) -> Fields:
    """Reads two rotary embeddings: of the layers that see everything, which alone is scaled, and of those with a window.

    Args:
        theta: the family's base.
        local: base of the layers with a window, where the family has another one, `rope_local_base_freq`.
    """
    both, base = reader.get("rope_parameters"), reader.number("rope_theta", theta)
    if isinstance(both, dict) and ("full_attention" in both or "sliding_attention" in both):
        of_windows = read_rope(reader, both.get("sliding_attention"), theta if local is None else local)
        ropes = (read_rope(reader, both.get("full_attention"), theta), of_windows)
    else:
        base_of_windows = base if local is None else reader.number("rope_local_base_freq", local)
        ropes = (read_rope(reader, both or reader.get("rope_scaling"), base), Rope(base_of_windows))
    reader.known.update(("rope_scaling", "rope_theta") if local is None else ("rope_scaling", "rope_theta", "rope_local_base_freq"))
    return {"ropes": ropes, "rope_of_layer": tuple(0 if window is None else 1 for window in windows)}


def partial_rotation(reader: ConfigReader, head_dim: int, share: float) -> int:
    """Reads how many dimensions of a head are rotated, of a family that may rotate only its first ones.

    Args:
        share: the family's default of `partial_rotary_factor`.
    """
    parameters = reader.get("rope_parameters", reader.get("rope_scaling"))
    outside = reader.get("partial_rotary_factor", share)
    value = parameters.get("partial_rotary_factor", outside) if isinstance(parameters, dict) else outside
    rotated = int(head_dim * checked_number(reader.file, "partial_rotary_factor", value))
    if rotated < 2 or rotated % 2:
        raise ModelError(
            f"{reader.file}: partial_rotary_factor = {show(value)} rotates {rotated} of {head_dim} dimensions of a head: rotary "
            "embeddings rotate pairs, so it must be an even number"
        )
    return rotated


def read_rope(reader: ConfigReader, parameters: Any, theta: float, rotated: int | None = None) -> Rope:
    """Reads one rotary embedding in either spelling.

    Args:
        parameters: `rope_scaling`, or an entry of `rope_parameters`.
        theta: base where `parameters` has none.
        rotated: from `partial_rotation`; None where the family rotates all of a head.
    """
    p = RopeReader(reader, parameters)
    theta = p.number("rope_theta", theta)
    if p.kind == "proportional":
        share, factor = p.number("partial_rotary_factor", 1.0), p.number("factor", 1.0)
        return finished(p, Rope(theta, "proportional", factor=factor, share=min(share, 1.0)))
    if p.number("partial_rotary_factor", 1.0) != 1.0 and rotated is None:
        raise ModelError(f"{reader.file}: partial_rotary_factor other than 1 is not supported")
    if p.kind == "default":
        rope = Rope(theta)
        # Parameters of other types are not used; a dict would be a separate rotary embedding for some of the layers.
        p.settings = {name: value for name, value in p.settings.items() if isinstance(value, dict)}
    elif p.kind == "linear":
        rope = Rope(theta, "linear", factor=p.number("factor"))
    elif p.kind == "dynamic":
        p.number("factor")
        # Up to the model's length nothing is scaled. Beyond it the base grows with every token.
        rope = Rope(theta, max_length=reader.whole("max_position_embeddings"))
    elif p.kind == "llama3":
        rope = read_llama3(p, theta)
    elif p.kind == "yarn":
        rope = read_yarn(p, theta)
    elif p.kind == "longrope":
        rope = read_longrope(p, theta)
    else:
        raise ModelError(f"{reader.file}: rope type {show(p.kind)} is not supported; supported: {', '.join(KINDS)}")
    return finished(p, rope)


def finished(p: RopeReader, rope: Rope) -> Rope:
    """The rotary embedding, once all of its settings have been taken; ModelError for one that is not known."""
    p.settings.pop("original_max_position_embeddings", None)
    if p.settings:
        raise ModelError(f"{p.reader.file}: rope settings {sorted(p.settings)} are not known for type {p.kind!r}")
    return rope


def read_llama3(p: RopeReader, theta: float) -> Rope:
    """Reads the settings of type `llama3`."""
    name = "original_max_position_embeddings"
    rope = Rope(
        theta,
        "llama3",
        factor=p.number("factor"),
        low_freq_factor=p.number("low_freq_factor"),
        high_freq_factor=p.number("high_freq_factor"),
        original_length=whole_number(p.reader.file, name, p.need(name)),
    )
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise ModelError(f"{p.reader.file}: low_freq_factor is {rope.low_freq_factor:g}: use less than high_freq_factor")
    return rope


def read_yarn(p: RopeReader, theta: float) -> Rope:
    """Reads the settings of type `yarn`; the attention factor, where it is not given, as in the paper or in DeepSeek's code."""
    if "factor" not in p.settings:  # it may be null
        p.need("factor")
    length = p.original_length()
    factor, attention = p.scale(length), p.optional("attention_factor")
    share, share_of_all = p.optional("mscale"), p.optional("mscale_all_dim")

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if attention is None:
        attention = growth(share) / growth(share_of_all) if share and share_of_all else growth(1.0)
    fast, slow = p.optional("beta_fast") or 32.0, p.optional("beta_slow") or 1.0
    if fast < slow:
        raise ModelError(f"{p.reader.file}: beta_fast is {fast:g}: use at least beta_slow ({slow:g})")
    truncate = p.settings.pop("truncate", None)
    return Rope(
        theta,
        "yarn",
        factor=factor,
        original_length=length,
        attention_factor=attention,
        beta_fast=fast,
        beta_slow=slow,
        truncate=True if truncate is None else checked_flag(p.reader.file, "truncate", truncate),
    )


def read_longrope(p: RopeReader, theta: float) -> Rope:
    """Reads the settings of type `longrope`: the short factors, exact up to the original length. The long ones are not used."""
    length = p.original_length()
    factor, attention = p.scale(length), p.optional("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    factors = {name: p.need(name) for name in ("short_factor", "long_factor")}
    for name, values in factors.items():
        if not isinstance(values, list) or not values or len(values) != len(factors["short_factor"]):
            raise ModelError(f"{p.reader.file}: {name} is {show(values)}: use a list with one number for each pair that is rotated")
    short = tuple(checked_number(p.reader.file, "short_factor", value) for value in factors["short_factor"])
    return Rope(theta, "longrope", attention_factor=attention, pair_factors=short, max_length=length)
