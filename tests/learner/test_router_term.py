"""Routers of a mixture of experts in an update: the load-balancing loss, and the sampler's experts used again."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plain_oracles import LORA, moved, quick_compiling, tiny_policy

from goldens.folders import HERE, read_golden
from grpo_jax.config import Config, ConfigError, ObjectiveConfig, RolloutConfig, check_training
from grpo_jax.learner.batches import on_devices, train_batch
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.logprobs import row_hidden
from grpo_jax.learner.micro_batches import any_token, scan_micro_batches
from grpo_jax.learner.packing import Lengths, row_sizes
from grpo_jax.learner.router_term import RouterTerm
from grpo_jax.learner.rows import RowSize
from grpo_jax.learner.step import train_step
from grpo_jax.models.routing import RouterSums, balance_loss
from grpo_jax.models.transformer import Transformer
from grpo_jax.policy import sampler_of
from grpo_jax.rewards.protocol import ScoredBatch
from grpo_jax.types import Frozen, Params, PromptBatch, Rollout, TrainBatch

FAMILY = "qwen3_moe"
RECURRENT = "qwen3_next"
"""Recurrent layers, and an expert that every token has."""
DENSE_LAYERS = "qwen3_moe_dense"
"""Two of six layers have experts."""
PROMPTS = [[5, 6, 7], [9, 30]]
G, C = 3, 6


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def slow(*values: Any) -> Any:
    """The arguments of a test that is slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def batch_of(prompts: list[list[int]], rollout: Rollout, config: Config, sizes: tuple[RowSize, ...], rewards: Any) -> TrainBatch:
    """A batch on the device."""
    b, n = len(prompts), len(rollout.completion_ids)
    scored = ScoredBatch(rewards=np.asarray(rewards, np.float32), valid=np.ones(n, bool), per_function={}, failures=[])
    made = train_batch(PromptBatch(0, np.arange(b), [""] * b, prompts, {}), rollout, scored, config, sizes)
    return on_devices(made, None)


def report(
    model: Transformer, variables: Params, batch: TrainBatch, computed: Any = lambda part: part
) -> tuple[RouterSums, RouterTerm]:
    """The routers' sums over a batch, of which each micro-batch is changed by `computed` first."""
    term = RouterTerm.of(model, 1.0, jnp.asarray(batch.completion_mask), batch)
    assert term is not None

    @jax.jit
    def run(variables: Params) -> RouterSums:
        def add(total: RouterSums, part: Any) -> tuple[RouterSums, None]:
            own = row_hidden(model, variables, computed(part).rows, term.weights(part))[1]
            return jax.tree.map(jnp.add, total, own), None

        zeros = jnp.zeros((model.spec.experts,))
        start = RouterSums(counts=zeros, probabilities=zeros, differing=jnp.float32(0))
        return scan_micro_batches(batch.micro_batches, add, start, any_token, None)[0]

    return run(variables), term


def golden_batch(family: str) -> tuple[TrainBatch, Config, tuple[RowSize, ...]]:
    """The golden's two rows, with prompts of nine tokens; rewards that are all alike, so that there is no policy loss."""
    ids = read_golden(family)[0].tolist()
    prompts, completions = [row[:9] for row in ids], [row[9:] for row in ids]
    length = len(completions[0])
    rollout = Rollout(completions, [np.zeros(length, np.float32)] * 2, ["length"] * 2)
    settings = {"rollout": {"num_generations": 1, "max_completion_length": length}, "objective": {"beta": 0.0, "loss": "grpo"}}
    config = Config.from_dict(settings | {"train": {"prompts_per_step": 2}})
    sizes = row_sizes(Lengths(9, 9, length), 2, 1, 40)
    return batch_of(prompts, rollout, config, sizes, [1.0, 1.0]), config, sizes


@pytest.mark.parametrize("family", [FAMILY, slow("mixtral"), slow("gpt_oss"), slow(RECURRENT), slow(DENSE_LAYERS)])
def test_the_load_balancing_loss_is_that_of_transformers(family: str) -> None:
    """Over the tokens that predict the completions, in two rows of which each is a micro-batch."""
    policy, (batch, _, _) = tiny_policy(family), golden_batch(family)
    sums, _ = report(policy.model, {"params": policy.params}, batch)
    tokens = jnp.float32(np.sum(batch.completion_mask))
    assert float(jnp.sum(sums.counts)) == policy.spec.expert_layers * policy.spec.experts_per_token * float(tokens)
    got = float(balance_loss(sums.counts, sums.probabilities, tokens, policy.spec.expert_layers))
    expected = json.loads((HERE / "router_losses.json").read_text())[family]
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # float32 sums in another order


def config_of(router_replay: str, **objective: Any) -> Config:
    settings = {"rollout": {"num_generations": G, "max_completion_length": C, "router_replay": router_replay}}
    return Config.from_dict(settings | {"objective": {"beta": 0.0} | objective, "train": {"prompts_per_step": len(PROMPTS)}})


@functools.cache
def sampled(unroll: bool = True, family: str = FAMILY) -> Rollout:
    """Completions of two prompts in two slots that are refilled, with the sampler's experts."""
    policy = tiny_policy(family, LORA)
    sampler = sampler_of(dataclasses.replace(policy), records_experts=True)
    if not unroll:
        sampler = type(sampler).build(policy.model.clone(unroll=False, records_experts=True), ())
    settings = RolloutConfig(num_generations=G, max_completion_length=C, slots=2, segment=2)
    limits = [6, 3, 1, 5, 6, 4]
    assert policy.adapters is not None
    return sampler.sample({"params": policy.params, "lora": policy.adapters}, PROMPTS, settings, seed=3, limits=limits)


def rows_of(tokens: int) -> tuple[RowSize, ...]:
    return row_sizes(Lengths(2, 3, C), len(PROMPTS), G, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "unroll"), [(FAMILY, True), (RECURRENT, True), (RECURRENT, False), (DENSE_LAYERS, True)])
def test_the_samplers_experts_are_recorded_token_by_token(family: str, unroll: bool) -> None:
    """The update's routers choose the same ones with the same weights; and others where the record is one token off."""
    policy, rollout, config = tiny_policy(family, LORA), sampled(unroll, family), config_of("measure")
    model, spec = policy.model.clone(unroll=unroll), policy.spec
    assert rollout.experts is not None
    for number, (ids, experts) in enumerate(zip(rollout.completion_ids, rollout.experts, strict=True)):
        assert experts.shape == (len(PROMPTS[number // G]) + len(ids) - 1, spec.expert_layers, spec.experts_per_token)
        assert experts.dtype == np.uint8
    variables = {"params": policy.params, "lora": policy.adapters}
    batch = batch_of(PROMPTS, rollout, config, rows_of(12), np.arange(6))
    assert float(report(model, variables, batch)[0].differing) == 0
    off = dataclasses.replace(rollout, experts=[np.roll(own, 1, axis=0) for own in rollout.experts])
    assert float(report(model, variables, batch_of(PROMPTS, off, config, rows_of(12), np.arange(6)))[0].differing) > 5


@pytest.mark.slow
@pytest.mark.parametrize(("family", "unroll"), [(FAMILY, True), (RECURRENT, True), (RECURRENT, False), (DENSE_LAYERS, False)])
def test_replayed_experts_are_the_samplers_whatever_the_weights(family: str, unroll: bool) -> None:
    """The experts that the update uses are counted in NumPy from the record; the routers alone would choose others."""
    policy, rollout = tiny_policy(family, LORA), sampled(unroll, family)
    model, experts_in_all = policy.model.clone(unroll=unroll), policy.spec.experts
    changed = {"params": policy.params, "lora": moved(policy.adapters or {}, 5, 0.3)}
    expected = np.zeros(experts_in_all)
    for number, (ids, experts) in enumerate(zip(rollout.completion_ids, rollout.experts or [], strict=True)):
        first = len(PROMPTS[number // G]) - 1
        expected += np.bincount(experts[first : first + len(ids)].reshape(-1), minlength=experts_in_all)
    for mode in ("replay", "measure"):
        batch = batch_of(PROMPTS, rollout, config_of(mode), rows_of(12), np.arange(6))
        sums, _ = report(model, changed, batch)
        assert np.array_equal(np.asarray(sums.counts), expected) == (mode == "replay")
        assert float(sums.differing) > 0


def recording() -> optax.GradientTransformation:
    """Changes nothing; its state is the last gradient."""
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    return optax.GradientTransformation(zeros, lambda updates, state, params=None: (zeros(updates), updates))


def updated(config: Config, params: Params, batch: TrainBatch, model: Transformer) -> tuple[Params, dict[str, float]]:
    """Gradient of all weights, and metrics, of one update."""
    learner = Learner.of(config, model, full=True, updates=1, stop_ids=(), optimizer=recording())
    state, packed = jax.jit(functools.partial(train_step, learner))(learner.init(params), batch, Frozen({}, params))
    return state.opt_state, packed.to_dict()


@pytest.mark.slow
def test_the_gradient_of_the_load_balancing_loss_is_that_of_its_probabilities() -> None:
    """Alone in the loss, against finite differences of the last router, on which no other layer depends."""
    policy, (batch, config, _) = tiny_policy(FAMILY), golden_batch(FAMILY)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, router_aux_coef=0.5))
    gradient, metrics = updated(config, policy.params, batch, policy.model)
    expected = json.loads((HERE / "router_losses.json").read_text())[FAMILY]
    np.testing.assert_allclose([metrics["router/aux_loss"], 2 * metrics["loss"]], expected, rtol=1e-5)
    assert metrics["policy_loss"] == 0
    direction = np.random.default_rng(0).normal(size=policy.params["layers"]["router"]["kernel"].shape).astype(np.float32)
    direction[0] = 0
    slope = float(np.sum(np.asarray(gradient["layers"]["router"]["kernel"]) * direction))

    def loss_at(step: float) -> float:
        layers = dict(policy.params["layers"])
        layers["router"] = {"kernel": layers["router"]["kernel"] + jnp.float32(step) * direction}
        sums, _ = report(policy.model, {"params": policy.params | {"layers": layers}}, batch)
        counts = report(policy.model, {"params": policy.params}, batch)[0].counts
        tokens = jnp.float32(np.sum(batch.completion_mask))
        return 0.5 * float(balance_loss(counts, sums.probabilities, tokens, policy.spec.layers))

    numeric = (loss_at(2e-3) - loss_at(-2e-3)) / 4e-3
    np.testing.assert_allclose(slope, numeric, rtol=0.02)  # float32 differences
    assert abs(slope) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "family"), [("measure", FAMILY), *(("replay", family) for family in (FAMILY, RECURRENT, DENSE_LAYERS))]
)
def test_an_update_does_not_depend_on_how_rows_are_packed(mode: str, family: str) -> None:
    """One row for all, and rows so short that each group is cut and its prompt copied; stacked and unrolled layers, with remat."""
    policy, rollout, config = tiny_policy(family), sampled(family=family), config_of(mode, router_aux_coef=0.1)
    found = []
    settings: list[tuple[int, dict[str, Any]]] = [(40, {"unroll": True}), (9, {"unroll": False, "remat": "layer"})]
    for tokens, options in settings:
        batch = batch_of(PROMPTS, rollout, config, rows_of(tokens), np.arange(6))
        found.append(updated(config, policy.params, batch, policy.model.clone(**options)))
    (one, first), (other, second) = found
    for name in ("loss", "policy_loss", "router/aux_loss", "router/mismatch", "entropy"):
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, atol=1e-6)
    size = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * size)
    assert float(np.abs(one["layers"]["router"]["kernel"]).max()) > 1e-3 * size
    assert first["router/mismatch"] > 0  # the adapters that sampled are not there


@pytest.mark.slow
def test_the_loss_counts_the_experts_that_are_selected_under_the_adapters_dropout() -> None:
    """Both of its factors are those of the same forward pass, computed here from the update's own keys."""
    policy, (batch, config, _) = tiny_policy(FAMILY, LORA), golden_batch(FAMILY)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, router_aux_coef=0.5))
    model = policy.model.clone(lora_dropout=0.5)
    learner = Learner.of(config, model, full=False, updates=1, stop_ids=(), optimizer=recording())
    adapters, frozen = policy.adapters or {}, Frozen(policy.params, {})
    state = learner.init(adapters)
    found = jax.jit(functools.partial(train_step, learner))(state, batch, frozen)[1].to_dict()["router/aux_loss"]
    tokens, variables = jnp.float32(np.sum(batch.completion_mask)), {"params": policy.params, "lora": adapters}
    dropping, plain = (
        report(model, variables, batch, computed)[0]
        for computed in (lambda part: learner.with_dropout(part, state, batch), lambda part: part)
    )
    expected = [float(balance_loss(own.counts, own.probabilities, tokens, model.spec.layers)) for own in (dropping, plain)]
    np.testing.assert_allclose(found, expected[0], rtol=1e-5)
    assert abs(found - expected[1]) > 1e-3


@pytest.mark.slow
def test_a_stacked_sampler_records_what_an_unrolled_one_does() -> None:
    """But for the last layer of a prompt's tokens before the last, which an unrolled one does not compute."""
    one, other = sampled(), sampled(unroll=False)
    assert one.completion_ids == other.completion_ids
    for number, (a, b) in enumerate(zip(one.experts or [], other.experts or [], strict=True)):
        last = len(PROMPTS[number // G]) - 1
        for layer, first in ((0, 0), (1, last)):
            assert np.array_equal(np.sort(a[first:, layer]), np.sort(b[first:, layer]))


def test_what_has_no_effect_or_is_not_supported_is_refused() -> None:
    dense, mixture = tiny_policy("qwen3").spec, tiny_policy(FAMILY).spec
    with pytest.raises(ConfigError, match=r"rollout\.router_replay is 'replay': this model is no mixture of experts: use none"):
        dense.check_routers(RolloutConfig(router_replay="replay"), ObjectiveConfig())
    with pytest.raises(ConfigError, match=r"objective\.router_aux_coef is 0\.1: this model is no mixture of experts"):
        dense.check_routers(RolloutConfig(), ObjectiveConfig(router_aux_coef=0.1))
    mixture.check_routers(RolloutConfig(router_replay="measure"), ObjectiveConfig(router_aux_coef=0.1))
    with pytest.raises(ConfigError, match=r"objective\.router_aux_coef is -1"):
        ObjectiveConfig(router_aux_coef=-1.0)
    settings = {"model": {"path": "m"}, "data": {"path": "d"}, "rewards": {"functions": ["length"]}}
    settings |= {"rollout": {"router_replay": "replay"}, "environment": {"tools": ["calculator"]}}
    with pytest.raises(ConfigError, match=r"rollout\.router_replay is 'replay': use none: .* environment"):
        check_training(Config.from_dict(settings))


def test_the_weight_is_the_models_where_its_config_has_one() -> None:
    """As TRL: router_aux_loss_coef counts where output_router_logits is set, and a setting goes before it."""
    from plain_oracles import golden_config

    from grpo_jax.models.families import read_spec

    plain = golden_config(FAMILY)
    assert read_spec(plain).router_aux_coef == 0
    assert read_spec(plain | {"output_router_logits": True}).router_aux_coef == 0.001
    spec = read_spec(plain | {"output_router_logits": True, "router_aux_loss_coef": 0.02})
    model = tiny_policy(FAMILY).model.clone(spec=spec)
    for own, expected in ((None, 0.02), (0.0, 0.0), (0.3, 0.3)):
        learner = Learner.of(config_of("none", router_aux_coef=own), model, full=True, updates=1, stop_ids=())
        assert learner.router_coef == expected
        assert learner.skips == (expected == 0)
