"""The grammar of the command line: every command, its options, and the settings as options `--section.field`.

argparse splits the words and `config.load` gives the values their types, as it does for YAML: one set of rules, and errors that
name the setting. (jsonargparse would parse quoted text inside a mapping a second time, so that `{year: "2024"}` became a number.)
"""

from __future__ import annotations

import argparse
import re
import textwrap
from dataclasses import asdict

from grpo_jax import __version__
from grpo_jax.config import Config, ConfigError, Loaded, load
from grpo_jax.config.checks import describe, field_types, nearest, show
from grpo_jax.config.load import nearest_setting, setting_types
from grpo_jax.config.presets import OBJECTIVE_DEFAULTS


def loaded_settings(arguments: argparse.Namespace) -> Loaded:
    """The config of `--config` and the `--section.field` options."""
    return load(arguments.config, given_settings(arguments))


def given_settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The `--section.field` options that were given, as text."""
    return {name: value for name, value in vars(arguments).items() if name in setting_types()}


BEST = "the checkpoint of the best evaluation (train.best_metric), which train.keep_best has kept, instead of the newest"


def parser() -> argparse.ArgumentParser:
    """The whole grammar. Settings are kept as text: `config.load` gives them their types."""
    top = argparse.ArgumentParser(
        prog="grpo-jax", description="Group Relative Policy Optimization of language models in JAX.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"grpo-jax {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, says: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=says, description=says, allow_abbrev=False)

    for name, says in (("train", "train with GRPO"), ("sft", "supervised warm-up on prompt and completion rows")):
        made = command(name, says)
        made.usage = f"grpo-jax {name} [--config FILE.yaml] [--section.field VALUE ...] [--resume]"
        made.add_argument("--config", metavar="FILE.yaml", help="settings; the options below win over it")
        made.add_argument("--resume", action="store_true", help="continue the run in train.run_dir at its last checkpoint")
        add_settings(made)

    made = command("eval", "accuracy on the held-out part and eval.sets: greedy with an interval, pass@k, majority@k")
    made.usage = "grpo-jax eval (--config FILE.yaml [--section.field VALUE ...] | --run DIR) [--pass_k 8]"
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", metavar="FILE.yaml", help="evaluate the model of these settings; the options below win over it")
    which.add_argument("--run", metavar="DIR", help="evaluate the last state of a run, with its own settings")
    made.add_argument("--best", action="store_true", help=BEST)
    made.add_argument(
        "--pass_k", type=positive, default=8, metavar="K", help="samples per problem for pass@k and majority@k (default 8)"
    )
    add_settings(made)

    made = command("generate", "sample completions; a model with a chat template is talked to through it")
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR_OR_ID", help="model folder or hub id")
    which.add_argument("--run", metavar="DIR", help="the newest checkpoint of a run, with the run's data settings")
    made.add_argument("--adapter", metavar="DIR_OR_ID", help="PEFT adapter: a folder or a hub id")
    made.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="may be given several times")
    made.add_argument("--system", metavar="TEXT", help="system message")
    made.add_argument("--raw", action="store_true", help="give the model the plain text, without its chat template")
    made.add_argument("--num_generations", type=positive, metavar="G", help="completions a prompt (default 4, or 1 where greedy)")
    made.add_argument("--max_completion_length", type=positive, default=64, metavar="TOKENS", help="default 64")
    made.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    made.add_argument("--top_p", type=float, default=1.0, metavar="P", help="1, the default, is off")
    made.add_argument("--top_k", type=int, default=0, metavar="K", help="0, the default, is off")
    made.add_argument("--min_p", type=float, default=0.0, metavar="P", help="0, the default, is off")
    made.add_argument("--stop", action="append", metavar="TEXT", help="ends a completion; may be given several times")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    made.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto, the default, is the model's own"
    )

    made = command("export", "write a run's weights for other tools")
    made.add_argument("--run", required=True, metavar="DIR", help="run folder")
    made.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    made.add_argument(
        "--format",
        required=True,
        choices=("adapter", "merged", "gguf", "gguf-lora"),
        help="a PEFT adapter, the whole model with it merged in, or one of the two as GGUF, for llama.cpp and Ollama",
    )
    made.add_argument("--best", action="store_true", help=BEST)
    made.add_argument("--gguf_type", choices=("f16", "bf16", "q8_0", "q4_1"), help="of the matrices in --format gguf (default f16)")
    made.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the folder to this repository of the Hugging Face hub")
    made.add_argument("--private", action="store_const", const=True, help="make a new repository private")

    made = command("verify", "compare checkpoints, adapters and exports with their digests; status 1 where one is damaged")
    made.add_argument("paths", nargs="+", metavar="PATH", help="run folder, checkpoint, adapter or merged model")

    made = command("doctor", "what goes wrong in a run, from its metrics and completions; status 3 where something does")
    made.add_argument("--run", required=True, metavar="DIR", help="run folder; the run may still go on")
    made.add_argument("--json", action="store_true", help="one line of JSON")

    made = command("plan", "what a run needs of a chip, without the chip and without weights")
    made.usage = "grpo-jax plan --config FILE.yaml [--target v6e-8|v5p-16|h100x8|h200|...] [--json] [--section.field VALUE ...]"
    made.add_argument("--config", metavar="FILE.yaml", help="settings; the options below win over it")
    made.add_argument(
        "--target",
        metavar="CHIPS",
        help="a slice of TPUs (v4-8, v5e-16, v5p-64, v6e-8, ...: cores for v4 and v5p, else chips), "
        "1 to 8 GPUs (a100x8, h100x8, h200, l4), or cpu; default: the machine at hand",
    )
    made.add_argument("--json", action="store_true", help="one line of JSON, last on standard output")
    add_settings(made)

    made = command("bench", "time GRPO steps on made-up prompts")
    made.add_argument("--model", required=True, metavar="DIR", help="model folder; random weights where it has only a config.json")
    made.add_argument("--prompts", type=positive, default=4, metavar="B", help="prompts a step (default 4)")
    made.add_argument("--num_generations", type=positive, default=8, metavar="G", help="completions a prompt (default 8)")
    made.add_argument("--prompt_length", type=positive, default=64, metavar="TOKENS", help="default 64")
    made.add_argument("--completion_length", type=positive, default=128, metavar="TOKENS", help="default 128")
    made.add_argument("--steps", type=positive, default=6, metavar="N", help="measured steps, after two others (default 6)")
    made.add_argument("--lora_rank", type=int, default=16, metavar="R", help="default 16; 0 trains every weight")
    made.add_argument("--slots", type=positive, metavar="N", help="completions decoded at once (default: all, if they fit)")
    made.add_argument("--segment", type=positive, metavar="TOKENS", help="tokens between two looks at what has ended")
    made.add_argument("--no_refill", dest="refill", action="store_false", help="a slot that is free waits for all others")
    made.add_argument("--capacity", type=positive, metavar="TOKENS", help="make room for longer completions than there are")
    made.add_argument(
        "--kv_dtype", choices=("auto", "int8", "int4"), default="auto", help="number format of keys and values (default auto)"
    )
    made.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto is the model's own")
    remats = ("auto", "none", "selective", "layer", "offload")
    made.add_argument("--remat", choices=remats, default="auto", help="as model.remat (default auto)")
    made.add_argument("--micro_batch_prompts", type=positive, metavar="B", help="as train.micro_batch_prompts")
    made.add_argument("--micro_batch_tokens", type=positive, metavar="T", help="as train.micro_batch_tokens")
    made.add_argument("--ragged", action="store_true", help="lengths from a heavy tail, with a mean of a quarter of the longest")
    made.add_argument(
        "--lengths",
        metavar="FILE",
        help="lengths of completions, up to --completion_length: one number a line, a JSON list, or a run's completions.jsonl",
    )
    made.add_argument(
        "--prompt_lengths",
        metavar="FILE",
        help="lengths of prompts, up to --prompt_length: one number a line, or a JSON list",
    )
    made.add_argument("--json", action="store_true", help="one line of JSON, last on standard output")

    made = command("profile", "trace some steps of a training run for TensorBoard and Perfetto")
    made.usage = "grpo-jax profile [--config FILE.yaml] [--section.field VALUE ...] [--steps 3] [--out DIR]"
    made.add_argument("--config", metavar="FILE.yaml", help="settings of the run, as for train; the options below win over it")
    made.add_argument("--steps", type=positive, default=3, metavar="N", help="traced steps (default 3)")
    made.add_argument("--warmup_steps", type=positive, default=2, metavar="N", help="steps before them (default 2)")
    made.add_argument("--out", default="runs/profile", metavar="DIR", help="folder of traces (default runs/profile)")
    made.add_argument("--python", action="store_true", help="trace calls of Python functions too, which slows the host down")
    add_settings(made)

    made = command("report", "write report.html of a run: curves, completions and settings as one page without a network")
    made.add_argument("--run", required=True, metavar="DIR", help="run folder, of a finished run or one that goes on")
    made.add_argument("--out", metavar="FILE", help="page to write (default: report.html in the run folder)")

    made = command("watch", "show the report of a run while it goes on, in a browser on this machine")
    made.add_argument("--run", required=True, metavar="DIR", help="run folder")
    made.add_argument("--port", type=port_number, default=0, metavar="N", help="on 127.0.0.1 (default: a free one)")

    made = command("compare", "write a page with the curves of several runs, and print the settings that differ")
    made.add_argument("runs", nargs="+", metavar="RUN", help="run folder; at least two")
    made.add_argument("--out", default="compare.html", metavar="FILE", help="page to write (default compare.html)")

    made = command("quickstart", "make a small model and task, warm it up, and watch GRPO improve it")
    made.add_argument("--run_dir", default="runs/quickstart", metavar="DIR", help="default runs/quickstart")
    return top


def add_settings(made: argparse.ArgumentParser) -> None:
    """Adds an option for every setting, one group a section."""
    defaults = asdict(Config())
    for section, holder in field_types(Config).items():
        summary, said = documented(holder)
        group = made.add_argument_group(section, summary.replace("%", "%%"))
        for key, kind in field_types(holder).items():
            of_preset = section == "objective" and key in OBJECTIVE_DEFAULTS
            default = "" if of_preset else f"; default {show(defaults[section][key])}"
            shown = f"{said[key]} ({describe(kind)}{default})".replace("%", "%%")
            option = f"--{section}.{key}"
            if kind is bool:
                group.add_argument(option, default=argparse.SUPPRESS, metavar="VALUE", help=shown, nargs="?", const="true")
            else:
                group.add_argument(option, default=argparse.SUPPRESS, metavar="VALUE", help=shown)


def documented(holder: type) -> tuple[str, dict[str, str]]:
    """A section's docstring: its first line, and the text of each name under "Args:"."""
    lines = textwrap.dedent("    " + (holder.__doc__ or "")).splitlines()
    said: dict[str, str] = {}
    name = ""
    for line in lines[lines.index("Args:") + 1 :]:
        entry = re.match(r" {4}(\w+): (.*)", line)
        if entry:
            name = entry[1]
            said[name] = entry[2]
        elif line.strip():
            said[name] += f" {line.strip()}"
    return lines[0], said


def positive(word: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def port_number(word: str) -> int:
    """A port, or 0 for any free one, for argparse."""
    number = int(word)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is not a port: use 0 (a free one) to 65535")
    return number


def unknown_option(word: str, arguments: argparse.Namespace) -> ConfigError:
    """The error for a word that no option takes, with the nearest option."""
    name = word.partition("=")[0].lstrip("-")
    if not word.startswith("-"):
        return ConfigError(f"{show(word)} stands alone: write each setting as --section.field VALUE")
    own = [key for key in vars(arguments) if key not in ("command", "started") and key not in setting_types()]
    guess = nearest(name, own) or (nearest_setting(name) if "config" in own else None)
    if guess in field_types(Config):
        guess += ".SETTING"
    hint = f"did you mean --{guess}?" if guess else f"see grpo-jax {arguments.command} --help"
    return ConfigError(f"--{name} is not an option of grpo-jax {arguments.command}; {hint}")
