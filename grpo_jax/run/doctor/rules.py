"""The doctor's rules, in the order in which findings are listed."""

from __future__ import annotations

from grpo_jax.run.doctor import faults, four
from grpo_jax.run.doctor.findings import Rule, Words

RULES = (
    Rule(
        "reward_hacking",
        "reward hacking",
        four.reward_hacking,
        {
            "accuracy": Words(
                "the reward can be earned without being right",
                "read the latest completions of completions.jsonl and see what they are rewarded for; then repair that function, "
                "lower its share in rewards.weights, or raise objective.beta ({objective.beta:g})",
            ),
            "component": Words(
                "one reward function carries the gain, and another one pays for it",
                "change rewards.weights ({rewards.weights}) in favour of the function that falls, or use "
                "objective.normalize_each_reward: true",
            ),
            "length": Words(
                "longer completions earn more without being better",
                "add overlong_penalty or repetition_penalty to rewards.functions, or lower rollout.max_completion_length "
                "({rollout.max_completion_length})",
            ),
        },
    ),
    Rule(
        "kl_explosion",
        "KL explosion",
        four.kl_explosion,
        {
            "far": Words(
                "the policy has left the reference: updates are too large, or nothing holds it",
                "lower optim.learning_rate ({optim.learning_rate:g}), raise objective.beta ({objective.beta:g}; usual are 0.01 to "
                "0.1), add optim.warmup_steps ({optim.warmup_steps})",
            )
        },
    ),
    Rule(
        "no_improvement",
        "no improvement",
        four.no_improvement,
        {
            "falls": Words(
                "updates make the policy worse: they are too large or too noisy, or the reward punishes what it should not",
                "lower optim.learning_rate ({optim.learning_rate:g}), raise train.prompts_per_step ({train.prompts_per_step}) or "
                "rollout.num_generations ({rollout.num_generations}), and check the signs of rewards.weights ({rewards.weights})",
            ),
            "no_spread": Words(
                "the completions of nearly every group have the same reward, so that there is nothing to compare",
                "use prompts that are solved sometimes, a reward with partial credit, more rollout.num_generations "
                "({rollout.num_generations}), or a higher rollout.temperature ({rollout.temperature:g})",
            ),
            "flat": Words(
                "updates are too small, or their direction is noise",
                "raise optim.learning_rate ({optim.learning_rate:g}), train.prompts_per_step ({train.prompts_per_step}) or "
                "rollout.num_generations ({rollout.num_generations}); lower objective.beta ({objective.beta:g}) if it is above 0.1",
            ),
        },
    ),
    Rule(
        "mode_collapse",
        "mode collapse",
        four.mode_collapse,
        {
            "one_answer": Words(
                "the policy gives one and the same answer to different prompts",
                "see whether a reward function pays for that answer; raise objective.beta ({objective.beta:g}), lower "
                "optim.learning_rate ({optim.learning_rate:g}), use rollout.temperature 1 ({rollout.temperature:g})",
            ),
            "repeats": Words(
                "completions repeat themselves",
                "add repetition_penalty to rewards.functions, raise objective.beta ({objective.beta:g}), lower optim.learning_rate "
                "({optim.learning_rate:g})",
            ),
            "alike": Words(
                "the policy is sure of its answers although they earn no more than before",
                "raise objective.beta ({objective.beta:g}) or objective.epsilon_high ({objective.epsilon_high:g}), lower "
                "optim.learning_rate ({optim.learning_rate:g}), use rollout.temperature 1 ({rollout.temperature:g})",
            ),
        },
    ),
    Rule(
        "nothing_stops",
        "nothing stops",
        faults.nothing_stops,
        {
            "never": Words(
                "no completion ends with a stop token: the model has none, or the chat template is not the one it was trained with",
                "set eos_token_id in the model's generation_config.json, rollout.stop ({rollout.stop}), or data.chat_template "
                "({data.chat_template})",
            ),
            "hardly": Words(
                "nearly all completions are cut at the limit, often before the answer",
                "raise rollout.max_completion_length ({rollout.max_completion_length}), check data.chat_template "
                "({data.chat_template}), or use objective.mask_truncated: true",
            ),
        },
    ),
    Rule(
        "no_reward",
        "no reward",
        faults.no_reward,
        {
            "zero": Words(
                "every reward was 0 from the first step on: the task is too hard, or the reward does not find the answer",
                "compare the completions below with what rewards.functions ({rewards.functions}) expect: the format of the answer, "
                "the name of its column, rollout.max_completion_length ({rollout.max_completion_length})",
            ),
            "none": Words(
                "every reward was None from the first step on: no function applies to any row, or all of them fail",
                "see the first warnings of the run and the completions below; check what rewards.functions ({rewards.functions}) "
                "return",
            ),
        },
    ),
    Rule(
        "all_solved",
        "all groups solved",
        four.all_solved,
        {
            "easy": Words(
                "nearly every completion was right from the first step on: the task is too easy to learn from",
                "use harder prompts in data.path, or a reward that still tells such completions apart",
            )
        },
    ),
    Rule(
        "sampler_drift",
        "sampler and trainer drift apart",
        faults.sampler_drift,
        {
            "apart": Words(
                "what is sampled is no longer what is trained: rounding of the KV cache, of merged adapters or of a quantised base",
                "set objective.importance_cap: 2, rollout.kv_dtype: auto ({rollout.kv_dtype}), rollout.merge_adapters: false "
                "({rollout.merge_adapters})",
            )
        },
    ),
    Rule(
        "gradient_clipped",
        "gradient clipped at every step",
        faults.gradient_clipped,
        {
            "always": Words(
                "every update has the length of the limit, whatever the gradient says",
                "raise optim.max_grad_norm ({optim.max_grad_norm}), or lower optim.learning_rate ({optim.learning_rate:g}) if the "
                "loss is unsteady",
            )
        },
    ),
    Rule(
        "reward_fails",
        "a reward fails for some rows",
        faults.reward_fails,
        {
            "rows": Words(
                "a reward function raises, takes too long or returns no number; its rows are left out",
                "see the warnings of these steps; repair the function, raise rewards.timeout_seconds ({rewards.timeout_seconds}), "
                "or name it in rewards.row_by_row so that a failure costs one row",
            )
        },
    ),
    Rule(
        "length_runaway",
        "length running away",
        faults.length_runaway,
        {
            "longer": Words(
                "completions grow towards the limit without need",
                "add overlong_penalty to rewards.functions, use objective.loss: dr_grpo or dapo ({objective.loss}), or raise "
                "objective.beta ({objective.beta:g})",
            )
        },
    ),
    Rule(
        "held_out_falls",
        "held-out accuracy falls while training rises",
        faults.held_out_falls,
        {
            "overfitted": Words(
                "the policy learns its training prompts by heart",
                "use more rows or fewer train.steps ({train.steps}), lower optim.learning_rate ({optim.learning_rate:g}), and "
                "export the best checkpoint: grpo-jax export --best",
            )
        },
    ),
)
