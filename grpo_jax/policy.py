"""The handle that a user holds: a model, its adapters and its tokenizer. It generates, scores and saves.

Training takes a policy and returns a new one; the arrays of a policy never change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import Config, ConfigError, LoraConfig, MeshConfig, RolloutConfig
from grpo_jax.config.checks import require
from grpo_jax.data.tokenizer import Tokenizer, read_stop_ids
from grpo_jax.data.tokenizer_files import read_template_file
from grpo_jax.learner.logprobs import completion_logprobs
from grpo_jax.learner.scoring import check_rows, score_ids
from grpo_jax.models.spec import ModelError, ModelSpec
from grpo_jax.models.transformer import UNROLLED_LAYERS, Transformer
from grpo_jax.rollout.completions import Completion, completions_of
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.stop_strings import PartialCompletion
from grpo_jax.runtime.distributed import is_main
from grpo_jax.runtime.memory import in_device_memory
from grpo_jax.runtime.programs import Program
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params, Prompt
from grpo_jax.weights.adapter_modules import ratios_of
from grpo_jax.weights.axes import check_mesh, model_axes
from grpo_jax.weights.export import ReadTensor, merged_weights, save_merged
from grpo_jax.weights.gguf.export import save_gguf, save_gguf_adapter
from grpo_jax.weights.lora import save_adapter
from grpo_jax.weights.pretrained import read_pretrained
from grpo_jax.weights.publish import push_policy
from grpo_jax.weights.quantize import quantization_of
from grpo_jax.weights.usage import Kind
from grpo_kernels.target import platform


@dataclass(frozen=True)
class Policy:
    """A model with its adapters and tokenizer: it can be sampled, scored, trained and saved.

    Attributes:
        spec: sizes and switches of the model.
        dtype: number format of the computation.
        params: the model's weights.
        adapters: the `lora` collection, or None.
        lora: how the adapters were made, or None.
        tokenizer: None where the folder has none; then only what needs no text works.
        stop_ids: every id that ends a completion.
        folder: where the model was read from.
        name: the path or hub id as the user wrote it.
        layout: sharding of weights and adapters; None is one device.

    Example:
        policy = Policy.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct", lora=LoraConfig(rank=16))
        policy.generate(["Hello"], num_generations=2)[0][0].text
    """

    spec: ModelSpec
    dtype: Any
    params: Params
    adapters: Params | None
    lora: LoraConfig | None
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    folder: Path
    name: str
    layout: Layout | None = None
    _sampler: list[Sampler] = field(default_factory=list, repr=False, compare=False)
    _scorer: list[Program] = field(default_factory=list, repr=False, compare=False)

    @staticmethod
    def from_pretrained(
        path: str | Path,
        *,
        lora: LoraConfig | None = None,
        adapter: str | Path | None = None,
        dtype: str = "auto",
        quantization: str = "none",
        revision: str | None = None,
        seed: int = 0,
        mesh: MeshConfig | None = None,
    ) -> Policy:
        """Reads a model from a folder or the hub.

        Args:
            path: folder or hub id; safetensors only.
            lora: adds new adapters, or loads those of `lora.adapter`.
            adapter: folder or hub id of a PEFT adapter; the same as `lora=LoraConfig(adapter=...)`.
            dtype: `float32`, `bfloat16`, or `auto` for what config.json says.
            quantization: `int8`, `int4`, `nf4`, or `mxfp4` for experts, rounds matrices while reading; only adapters can then be
                trained.
            revision: branch, tag or commit on the hub.
            seed: fixes where new adapters start.
            mesh: devices that the weights are spread over, as the section `mesh` of the settings; None is one device. `auto` goes
                by the memory of the devices and whether there are adapters.

        Raises:
            ConfigError: the mesh does not fit the devices or the model.
            ModelError: the folder or the adapter cannot be read as it is.
        """
        start = adapter if adapter is not None else (lora.adapter if lora is not None else None)
        options: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "revision": revision, "seed": seed}
        read = read_pretrained(path, lora=lora, adapter=start, mesh=mesh, **options)
        return Policy(
            spec=read.spec,
            dtype=read.dtype,
            params=read.params,
            adapters=read.adapters,
            lora=read.lora,
            tokenizer=Tokenizer.from_folder(read.folder),
            stop_ids=read_stop_ids(read.folder),
            folder=read.folder,
            name=str(path),
            layout=read.layout,
        )

    @staticmethod
    def from_config(config: Config) -> Policy:
        """Reads the policy that a config starts from: its `model`, `lora`, `mesh` and `train.seed`. Errors as `from_pretrained`."""
        assert config.model.path is not None
        policy = Policy.from_pretrained(
            config.model.path,
            lora=config.lora,
            dtype=config.model.dtype,
            quantization=config.model.quantization,
            revision=config.model.revision,
            seed=config.train.seed,
            mesh=config.mesh,
        )
        return with_template(policy, config)

    def trainable(self) -> Params:
        """A float32 copy of what training changes: the adapters, or every weight where there are none."""
        source = in_device_memory(self.params if self.adapters is None else self.adapters)

        def copied(tree: Params) -> Params:
            return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tree)

        if self.layout is None:
            return copied(source)
        return jax.jit(copied, out_shardings=jax.tree.map(lambda x: x.sharding, source))(source)

    def with_trained(self, trainable: Params) -> Policy:
        """The policy with trained adapters, or trained weights, instead of its own."""
        trained: Any = {"params": trainable} if self.adapters is None else {"adapters": trainable}
        return replace(self, **trained, _sampler=[], _scorer=[])

    def placed(self, layout: Layout | None) -> Policy:
        """The same policy on another mesh.

        Raises:
            ConfigError: the mesh does not fit the model.
        """
        if layout == self.layout:
            return self
        check_mesh(layout, self.spec, quantization_of(self.params))

        def move(tree: Any) -> Any:
            host = self.on_host(tree)
            return jax.device_put(host) if layout is None else layout.put_tree(host, model_axes(self.spec))

        adapters = None if self.adapters is None else move(self.adapters)
        return replace(self, params=move(self.params), adapters=adapters, layout=layout, _sampler=[], _scorer=[])

    def on_host(self, tree: Any) -> Any:
        """Copies arrays of this policy to the host, unsharded. In a run of several processes, all of them make this call."""
        return jax.device_get(tree) if self.layout is None else self.layout.get(tree)

    @property
    def model(self) -> Transformer:
        """The decoder as a Flax module, without weights."""
        unroll = platform() == "cpu" and self.spec.layers <= UNROLLED_LAYERS
        model = Transformer(self.spec, self.dtype, unroll=unroll, layout=self.layout)
        if self.lora is None:
            return model
        ratios = ratios_of(self.spec, self.lora)
        return model.clone(lora_scale=self.lora.scale, lora_ratios=ratios, lora_dropout=self.lora.dropout)

    @property
    def variables(self) -> Params:
        """The variables of `model`: {"params": base} and, with adapters, {"lora": adapters}."""
        return {"params": self.params} if self.adapters is None else {"params": self.params, "lora": self.adapters}

    @property
    def sampler(self) -> Sampler:
        """The compiled sampler, made on first use."""
        if not self._sampler:
            self._sampler.append(sampler_of(self))
        return self._sampler[0]

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; ModelError where the folder has none."""
        if self.tokenizer is None:
            raise ModelError(f"{self.folder} has no tokenizer (tokenizer.json), and this needs text")
        return self.tokenizer

    def text_of(self, ids: list[int]) -> str:
        """Decodes token ids without special tokens; "" where the folder has no tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(ids)

    def generate(
        self,
        prompts: Sequence[Prompt] | Sequence[Sequence[int]],
        *,
        num_generations: int = 1,
        max_completion_length: int = 64,
        min_completion_length: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        slots: int | None = None,
        segment: int | None = None,
        kv_dtype: Literal["auto", "int8", "int4"] = "auto",
        seed: int = 0,
        template_arguments: dict[str, Any] | None = None,
        on_text: Callable[[list[str], list[bool]], None] | None = None,
    ) -> list[list[Completion]]:
        """Samples completions of prompts.

        Args:
            prompts: texts, conversations ({"role", "content"} messages, rendered by the chat template), or lists of token ids.
            num_generations: completions of each prompt; the other settings are those of `RolloutConfig`.
            seed: the same seed draws the same completions.
            template_arguments: passed to the chat template.
            on_text: called after each segment with the texts of all completions so far, a prompt's next to each other, and whether
                each has ended.

        Returns:
            One list of completions per prompt.

        Raises:
            ConfigError: no prompt, an empty prompt, or a setting out of range.
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts: one text was given; put it into a list")
        require(0 <= seed < 2**32, "seed", seed, "use 0 to 4294967295")
        settings = RolloutConfig(
            num_generations=num_generations,
            max_completion_length=max_completion_length,
            min_completion_length=min_completion_length,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            stop=list(stop),
            slots=slots,
            segment=segment,
            kv_dtype=kv_dtype,
        )
        if stop:
            self.need_tokenizer()
        ids = [self._prompt_ids(prompt, template_arguments or {}) for prompt in prompts]
        check_rows("prompts", ids, self.spec.vocab)

        def stream(rows: list[PartialCompletion]) -> None:
            if on_text is not None:
                on_text([self.text_of(row.ids) for row in rows], [row.ended for row in rows])

        rollout = self.sampler.sample(self.variables, ids, settings, seed=seed, on_segment=stream if on_text else None)
        return completions_of(rollout, self.text_of, num_generations)

    def _prompt_ids(self, prompt: Any, template_arguments: dict[str, Any]) -> list[int]:
        if not isinstance(prompt, str) and all(isinstance(token, (int, np.integer)) for token in prompt):
            return [int(token) for token in prompt]
        chat = not isinstance(prompt, str)
        return self.need_tokenizer().encode_prompt(prompt, chat=chat, template_arguments=template_arguments)

    def logprobs(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], *, temperature: float = 1.0
    ) -> list[np.ndarray]:
        """Computes the log-probability of every completion token.

        Args:
            prompt_ids: one list of ids per completion, none empty.
            completion_ids: as many lists of ids.
            temperature: divides the logits.

        Returns:
            One float32 array per completion, in nats, as long as the completion.
        """
        longest = max((len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=False)), default=0)
        self.spec.check_length(longest, "prompt_ids and completion_ids")
        if not self._scorer:
            self._scorer.append(Program("logprobs", partial(completion_logprobs, self.model)))
        return score_ids(
            self._scorer[0], self.variables, prompt_ids, completion_ids, temperature, vocab=self.spec.vocab, layout=self.layout
        )

    def save_adapter(self, folder: str | Path) -> Path:
        """Writes the adapters as a PEFT folder, which transformers, PEFT and vLLM load. Only the first of several processes writes.

        Raises:
            ModelError: the policy has no adapters.
        """
        if self.adapters is None or self.lora is None:
            raise ModelError("this policy has no adapters (every weight is trained): use save_merged")
        adapters = self.on_host(self.adapters)
        if is_main():
            save_adapter(Path(folder), self.spec, adapters, self.lora, self.name, self.tokenizer)
        return Path(folder)

    def save_merged(self, folder: str | Path) -> Path:
        """Writes the whole model with the adapters multiplied in.

        Tensor names, dtypes, shards and config are the original's; the tokenizer is the policy's, with its chat template. Adapters
        of a quantised model are added to the original's weights, which are read again: the merged model is not rounded, so its
        log-probabilities differ a little. All processes of a run make this call, and the first one writes.
        """
        save_merged(Path(folder), self.folder, self.spec, self._merged(), writes=is_main(), tokenizer=self.tokenizer)
        return Path(folder)

    def save_gguf(
        self,
        folder: str | Path,
        gguf_type: str = "f16",
        *,
        temperature: float | None = None,
        template_arguments: dict[str, Any] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Path:
        """Writes the model with the adapters multiplied in as `model-<type>.gguf`, for llama.cpp and Ollama, with a Modelfile.

        Args:
            gguf_type: `f16`, `bf16`, `q8_0` or `q4_1`: of matrices; what has one dimension is float32.
            temperature: of the Modelfile; None leaves it to Ollama.
            template_arguments: of the chat template, for the Modelfile.
            note: called with what is different in llama.cpp and Ollama.

        Raises:
            ModelError: the package gguf is missing, or llama.cpp cannot compute this model.
        """
        settings: dict[str, Any] = {"temperature": temperature, "template_arguments": template_arguments, "writes": is_main()}
        name = Path(self.name).name
        notes = save_gguf(Path(folder), self.spec, self._merged(), self.folder, self.tokenizer, gguf_type, name=name, **settings)
        for line in notes if note is not None else ():
            note(line)  # type: ignore[misc] - there is one
        return Path(folder)

    def _merged(self) -> ReadTensor:
        return merged_weights(self.spec, self.params, self.adapters, self.lora, self.folder, self.on_host)

    def push_to_hub(self, repo: str, format: Kind | None = None, **options: Any) -> str:
        """Uploads the policy to the Hugging Face hub, with a model card; returns the address of the commit.

        Args:
            repo: `owner/name`; made where it does not exist.
            format: `adapter`, `merged`, `gguf` or `gguf-lora`; None is the adapter, or the whole model where there is none.
            options: `private`, `token`, `revision`, `message`, `gguf_type` and `facts`, as of `weights.publish.push_policy`, which
                says what is raised.
        """
        return push_policy(self, repo, format, **options)

    def save_gguf_adapter(self, folder: str | Path) -> Path:
        """Writes the adapters as `adapter.gguf`, a LoRA for llama.cpp, float32.

        Raises:
            ModelError: the policy has no adapters; or as `save_gguf`.
        """
        if self.adapters is None or self.lora is None:
            raise ModelError("this policy has no adapters (every weight is trained): use save_gguf")
        adapters = self.on_host(self.adapters)
        if is_main():
            save_gguf_adapter(Path(folder), self.spec, adapters, self.lora, Path(self.name).name)
        return Path(folder)


def sampler_of(policy: Policy, *, records_experts: bool = False) -> Sampler:
    """Builds a sampler of a policy's model. Stop strings are looked for in text without special tokens, as rewards see it.

    Args:
        records_experts: rollouts have the experts of every token.
    """
    text_of = None if policy.tokenizer is None else policy.tokenizer.decode
    model = policy.model.clone(records_experts=records_experts)
    return Sampler.build(model, policy.stop_ids, decode_text=text_of, quantization=quantization_of(policy.params))


def with_template(policy: Policy, config: Config) -> Policy:
    """The policy with the chat template of `data.chat_template_file`, if one is named; its tokenizer is a new one then.

    Raises:
        ConfigError: the file cannot be read.
        ModelError: the policy has no tokenizer.
    """
    file = config.data.chat_template_file
    if file is None:
        return policy
    return replace(policy, tokenizer=policy.need_tokenizer().with_chat_template(read_template_file(file)), _sampler=[], _scorer=[])
