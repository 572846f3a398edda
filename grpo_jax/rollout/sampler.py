"""Samples completions: computes each prompt once for its G completions, and refills slots as completions end.

Every random number is fixed by (seed, step, prompt index, completion index, position) and by nothing else. Lengths are rounded up
to a few sizes (`shapes.py`), and temperature, top-k, top-p and min-p are arguments of the compiled programs, so a few programs
serve a whole run.

The loop over segments is in `loop.py`, the compiled functions are in `programs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import ConfigError, RolloutConfig
from grpo_jax.models.transformer import Transformer
from grpo_jax.rollout.loop import Counts, OnEnded, RolloutLoop
from grpo_jax.rollout.programs import RolloutPrograms
from grpo_jax.rollout.prompt_feed import PromptFeed
from grpo_jax.rollout.sampling import controls_of
from grpo_jax.rollout.shapes import RolloutShapes, check_slots, choose_slots, round_up, shapes_of
from grpo_jax.rollout.stop_strings import DecodeText, PartialCompletion
from grpo_jax.rollout.turns import Turns
from grpo_jax.rollout.weights import can_join, gather_weights, prepared_shapes, with_unchanged
from grpo_jax.runtime.memory import in_device_memory, least_free_bytes
from grpo_jax.runtime.programs import Announce, no_announcement
from grpo_jax.types import Params, Rollout

__all__ = ["Sampler"]


@dataclass(frozen=True)
class Sampler:
    """Compiled sampling of one model.

    Attributes:
        model: the decoder.
        stop_ids: every id that ends a completion.
        decode_text: turns ids into text to search for stop strings; None without a tokenizer.
        programs: the compiled functions.
        joins: whether weights are joined, once the first rollout has decided it by the free memory.
    """

    model: Transformer
    stop_ids: tuple[int, ...]
    decode_text: DecodeText | None
    programs: RolloutPrograms
    joins: list[bool] = field(default_factory=list)

    @staticmethod
    def build(
        model: Transformer,
        stop_ids: tuple[int, ...],
        *,
        decode_text: DecodeText | None = None,
        announce: Announce = no_announcement,
        quantization: str = "none",
    ) -> Sampler:
        """Makes a sampler. Compiles nothing before the first call.

        Args:
            model: the decoder.
            stop_ids: every id that ends a completion.
            decode_text: turns ids into text; needed for stop strings.
            announce: a context manager around each compilation, which shows progress.
            quantization: of the model's weights.
        """
        programs = RolloutPrograms.build(model, stop_ids, announce=announce, quantization=quantization)
        return Sampler(model, stop_ids, decode_text, programs)

    @property
    def device(self) -> Any:
        """A device of this process that it runs on, whose free memory counts; None is the process's first."""
        return None if self.model.layout is None else self.model.layout.mesh.local_devices[0]

    def announcing(self, announce: Announce) -> Sampler:
        """Sets what is entered around each compilation, and returns the same sampler."""
        for program in self.programs:
            program.announce = announce
        return self

    def sample(
        self,
        variables: Params,
        prompt_ids: Sequence[Sequence[int]],
        rollout: RolloutConfig,
        *,
        seed: int,
        step: int = 0,
        indices: Sequence[int] | np.ndarray | None = None,
        limits: Sequence[int] | np.ndarray | None = None,
        shapes: RolloutShapes | None = None,
        on_segment: Callable[[list[PartialCompletion]], None] | None = None,
        on_ended: OnEnded | None = None,
        turns: Turns | None = None,
        feed: PromptFeed | None = None,
    ) -> Rollout:
        """Draws `rollout.num_generations` completions of every prompt.

        With `turns` a completion is an episode of several turns. A turn ends at a stop token, at a stop string of its own text, or
        after `turns.max_turn_tokens`; its answer is read and the next turn begins. `rollout.max_completion_length` and `limits`
        count all tokens of an episode. Where turn and answer leave no room for another token, the episode ends with "length"
        without the answer; one that is at its limit ends with its turn. Where `turns.first_ids` leave no room, a row is empty.

        Args:
            variables: {"params": ..., "lora": ...}.
            prompt_ids: B lists of ids, none empty.
            rollout: the settings.
            seed, step: parts of the key of every random number.
            indices: B prompt indices, part of the random numbers; None = 0, 1, ...
            limits: B·G maximum lengths in tokens; None = `rollout.max_completion_length` for all.
            shapes: the run's, which fit any number of prompts with at most as many completions each: slots that are not refilled
                are filled in rounds. None chooses them for these prompts, and `rollout.slots` is followed. With `turns` they
                must be made for episodes.
            on_segment: called with all completions after each segment.
            on_ended: called after each segment in which the last completion of a prompt ended, with all such prompts' completions.
            turns: answers the turns of episodes; with several processes only process 0's is asked.
            feed: decides which of the prompts are begun, while others are decoded; not with `turns`. The shapes must be made for it
                (`refills`). None begins all.

        Returns:
            B·G rows, the completions of a prompt next to each other; with `feed` those of the prompts whose completions have all
            ended.

        Raises:
            ConfigError: stop strings without a tokenizer, sequences that are too long for the model (`ModelSpec.check_length`), or
                `rollout.slots` that the row shards of the mesh do not divide.
            ValueError: `turns` with shapes that are not for episodes, `feed` with shapes whose slots are not refilled or with
                `turns`, or `turns` that break their promises.
        """
        if turns is not None:
            self.model.spec.check_episodes()
        if turns is not None and shapes is not None and not shapes.sizes.extensions:
            raise ValueError("shapes are not for episodes: choose them with decide_shapes(..., episodes=True)")
        if feed is not None and (turns is not None or (shapes is not None and shapes.sizes.fixed)):
            raise ValueError("feed: use it without turns, and choose shapes with decide_shapes(..., refills=True)")
        if rollout.stop and self.decode_text is None:
            raise ConfigError(
                f"rollout.stop: {rollout.stop}; stop strings need a tokenizer, and the model folder has none: remove them, or add "
                "the tokenizer's files"
            )
        b, g = len(prompt_ids), rollout.num_generations
        longest_text = max(map(len, prompt_ids)) + rollout.max_completion_length
        self.model.spec.check_length(longest_text, "prompt and rollout.max_completion_length")
        check_slots(rollout.slots, 1 if self.model.layout is None else self.model.layout.rows)
        weights = self.decoding_weights(variables, rollout)
        if shapes is None:
            widths = (round_up(max(map(len, prompt_ids))),)
            options = {"episodes": turns is not None, "refills": feed is not None}
            shapes = self.shapes_for(rollout, b, widths, least_free_bytes(self.device), **options)
        longest = np.full(b * g, rollout.max_completion_length) if limits is None else np.asarray(limits)
        indices = np.arange(b) if indices is None else np.asarray(indices)
        completions = [PartialCompletion(int(limit)) for limit in longest]
        counts: list[Counts] = []
        # Where slots are refilled one round takes all prompts.
        each = shapes.prompts if shapes.sizes.fixed else b
        for first in range(0, b, each):
            own_prompts = prompt_ids[first : first + each]
            loop = RolloutLoop(
                model=self.model,
                programs=self.programs,
                decode_text=self.decode_text,
                rollout=rollout,
                sizes=shapes.sizes_for(max(map(len, own_prompts))),
                completions=completions[first * g : (first + each) * g],
                prompt_ids=own_prompts,
                indices=indices[first : first + each],
                controls=controls_of(rollout, seed, step, self.model.layout),
                shards=shapes.shards,
                on_segment=None if on_segment is None else lambda _: on_segment(completions),
                on_ended=None
                if on_ended is None
                else lambda ended, first=first: on_ended({first + number: own for number, own in ended.items()}),
                turns=turns,
                feed=feed,
            )
            counts.append(loop.run(weights))
        if feed is not None:
            groups = [(prompt_ids[number], completions[number * g : (number + 1) * g]) for number in range(b)]
            whole = [(ids, own) for ids, own in groups if all(one.ended for one in own)]
            prompt_ids, completions = [ids for ids, _ in whole], [one for _, own in whole for one in own]
        found = self.rollout_of(prompt_ids, completions, episodes=turns is not None)
        near_ties, idle_tokens = sum(own.near_ties for own in counts), sum(own.idle_tokens for own in counts)
        return replace(found, near_ties=near_ties, slots=shapes.slots, idle_tokens=idle_tokens)

    def rollout_of(
        self, prompt_ids: Sequence[Sequence[int]], completions: Sequence[PartialCompletion], *, episodes: bool = False
    ) -> Rollout:
        """The completions of these prompts, which have ended; near-ties, idle tokens and slots are left out."""
        return Rollout(
            completion_ids=[own.ids for own in completions],
            logprobs=[np.concatenate(own.logps) if own.logps else np.zeros(0, np.float32) for own in completions],
            finish_reasons=[own.reason for own in completions],
            sampled=[own.sampled for own in completions] if episodes else None,
            experts=self.recorded_experts(prompt_ids, completions) if self.model.records_experts else None,
        )

    def recorded_experts(self, prompt_ids: Sequence[Sequence[int]], completions: Sequence[PartialCompletion]) -> list[np.ndarray]:
        """The experts of every prompt's and completion's tokens but the last; those behind a stop string are left out."""
        each = len(completions) // len(prompt_ids)
        lengths = [len(prompt_ids[number // each]) + max(0, len(own.ids) - 1) for number, own in enumerate(completions)]
        return [np.concatenate(own.experts)[:length] for own, length in zip(completions, lengths, strict=True)]

    def shapes_for(
        self,
        rollout: RolloutConfig,
        prompts: int,
        widths: Sequence[int],
        free_bytes: int | None,
        *,
        episodes: bool = False,
        refills: bool = False,
    ) -> RolloutShapes:
        """Chooses the shapes of rollouts of up to this many prompts.

        Args:
            rollout: the settings; `slots` is followed.
            prompts: B, of all row shards.
            widths: widths that prompts are padded to.
            free_bytes: free memory of each device next to the decoding weights; None where it is not known.
            episodes: whether completions have several turns.
            refills: whether a `PromptFeed` begins further prompts in free slots.

        Raises:
            ConfigError: `rollout.slots` that the row shards of the mesh do not divide, or episodes of a model that cannot continue
                them (`ModelSpec.check_episodes`).
        """
        layout, spec, itemsize = self.model.layout, self.model.spec, jnp.dtype(self.model.dtype).itemsize
        shards, tensor = (1, 1) if layout is None else (layout.rows, layout.tensor)
        if episodes:
            spec.check_episodes()
        split = {"shards": shards, "tensor": tensor, "episodes": episodes}
        slots = choose_slots(spec, rollout, prompts, max(widths), itemsize, free_bytes, **split)
        return shapes_of(rollout, prompts, widths, slots, shards, episodes=episodes, refills=refills)

    def decide_shapes(
        self,
        variables: Params,
        rollout: RolloutConfig,
        prompts: int,
        widths: Sequence[int],
        *,
        episodes: bool = False,
        refills: bool = False,
    ) -> RolloutShapes:
        """Chooses the shapes of a run's rollouts, from the memory that is free next to the decoding weights; see `shapes_for`."""
        variables = in_device_memory(variables)
        if not self.model.unroll:
            weights = self.decoding_weights(variables, rollout)
            free = least_free_bytes(self.device)
            del weights
        else:
            free = least_free_bytes(self.device)
            settings = self.weight_settings(variables, free, rollout)
            weights = prepared_shapes(self.model, variables, **settings)
            needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
            free = None if free is None else max(0, free - needed)
        return self.shapes_for(rollout, prompts, widths, free, episodes=episodes, refills=refills)

    def round_up_slots(self, slots: int) -> int:
        """Rounds a number of slots up to a multiple of the number of row shards."""
        shards = 1 if self.model.layout is None else self.model.layout.rows
        return -(-slots // shards) * shards

    def decoding_weights(self, variables: Params, rollout: RolloutConfig) -> Params:
        """Returns the weights as decoding reads them, in the devices' memory; `merge_adapters` and `dense_base` matter."""
        variables = in_device_memory(variables)
        settings = self.weight_settings(variables, None if self.joins else least_free_bytes(self.device), rollout)
        if self.model.unroll:
            return self.programs.prepare_weights(variables, **settings)
        shapes = prepared_shapes(self.model, variables, **settings)
        weights = with_unchanged(shapes, variables, self.programs.prepare_weights(variables, **settings))
        return gather_weights(self.model.layout, self.model.spec, weights)

    def weight_settings(self, variables: Params, free_bytes: int | None, rollout: RolloutConfig) -> dict[str, bool]:
        """Returns the settings of `prepare_weights`. The first call decides whether weights are joined, for all later ones.

        Args:
            free_bytes: of each device, with the weights loaded; None where it is not known.
        """
        merge, dense = rollout.merge_adapters, rollout.dense_base
        if not self.joins:
            self.joins.append(self.model.unroll or can_join(self.model, variables["params"], free_bytes, dense=dense))
        return {"unroll": self.model.unroll, "join": self.joins[0], "merge": merge, "dense": dense}
