"""The command line: `grpo-jax train | sft | eval | generate | export | verify | plan | bench | profile | quickstart`.

Each command parses its options, builds the config and calls one function of the package. JAX is imported when a command runs,
never for `--help`. Every setting is an option `--section.field`, whose help is the entry in the section's docstring. Exit status:
0; 2 for a mistake of the user's (one block on standard error, no traceback); 1 where `verify` finds damage; 130, 143 or 129 for
Ctrl-C, SIGTERM or SIGHUP.

argparse splits the words and `config.load` gives the values their types, as it does for YAML: one set of rules, and errors that
name the setting. (jsonargparse would parse quoted text inside a mapping a second time, so that `{year: "2024"}` became a number.)
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_jax import __version__
from grpo_jax.config import Config, ConfigError, Loaded, RolloutConfig, load
from grpo_jax.config.checks import describe, field_types, nearest, show
from grpo_jax.config.load import nearest_setting, setting_types
from grpo_jax.config.presets import OBJECTIVE_DEFAULTS
from grpo_jax.run.resume import holds_checkpoint, holds_run
from grpo_jax.runtime.safe_text import safe_text
from grpo_jax.runtime.stop_signals import RunInterruptedError

DAMAGED, USER_ERROR, INTERRUPTED = 1, 2, 130
RESUMABLE = ("train", "sft")


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        words: The command line without the program's name; None takes the process's.

    Returns:
        The exit status.
    """
    started = time.perf_counter()
    words = sys.argv[1:] if words is None else list(words)
    arguments, rest = parser().parse_known_args(words, argparse.Namespace(started=started))
    try:
        if rest:
            raise unknown_option(rest[0], arguments)
        return arguments.action(arguments) or 0
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):  # after SIGHUP there is no terminal
            print(interrupted(words, arguments), file=sys.stderr, flush=True)
        return status_of(error)
    except Exception as error:
        if not is_users(error):
            raise
        print(error_block(error), file=sys.stderr)
        return USER_ERROR


def train(arguments: argparse.Namespace) -> None:
    """`grpo-jax train`."""
    loaded = loaded_settings(arguments)
    arguments.writes_to = loaded.config.train.run_dir
    from grpo_jax.runtime.distributed import joined_processes
    from grpo_jax.trainer import train as run

    with joined_processes(loaded.config.distributed, ending):
        run(loaded.config, resume=arguments.resume, sources=loaded.sources, started=arguments.started)


def sft(arguments: argparse.Namespace) -> None:
    """`grpo-jax sft`."""
    loaded = loaded_settings(arguments)
    arguments.writes_to = loaded.config.train.run_dir
    from grpo_jax.runtime.distributed import joined_processes
    from grpo_jax.trainer import sft as run

    with joined_processes(loaded.config.distributed, ending):
        run(loaded.config, resume=arguments.resume, sources=loaded.sources, started=arguments.started)


def evaluate(arguments: argparse.Namespace) -> None:
    """`grpo-jax eval`."""
    given = given_settings(arguments)
    if arguments.run is not None and given:
        name = next(iter(given))
        raise ConfigError(f"{name} is {show(given[name])}: a run is evaluated with its own settings; use --config to choose others")
    config = None if arguments.run is not None else loaded_settings(arguments).config
    from grpo_jax.evaluation import evaluate as run

    run(config, run_dir=arguments.run, pass_k=arguments.pass_k)


def generate(arguments: argparse.Namespace) -> None:
    """`grpo-jax generate`."""
    if arguments.run is not None and arguments.adapter is not None:
        raise ConfigError(f"--adapter is {show(arguments.adapter)}: a run has its own adapter; use --model to choose another")
    rollout = RolloutConfig(
        num_generations=arguments.num_generations or (4 if arguments.temperature > 0 else 1),
        max_completion_length=arguments.max_completion_length,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        stop=arguments.stop or [],
    )
    from grpo_jax.tools.generate import GenerateOptions
    from grpo_jax.tools.generate import generate as run

    names = ("model", "run", "adapter", "dtype", "system", "raw", "seed")
    run(GenerateOptions(arguments.prompt, rollout, **{name: vars(arguments)[name] for name in names}))


def export(arguments: argparse.Namespace) -> None:
    """`grpo-jax export`."""
    from grpo_jax.run.saved import export_run

    export_run(arguments.run, arguments.out, arguments.format)
    print(f"wrote {arguments.format} to {safe_text(arguments.out, one_line=True)}")


def verify(arguments: argparse.Namespace) -> int:
    """`grpo-jax verify`; returns the exit status."""
    from grpo_jax.run.verify import verify as run

    verdicts = [verdict for path in arguments.paths for verdict in run(path)]
    for verdict in verdicts:
        print(safe_text(str(verdict), one_line=True))
    damaged = sum(bool(verdict.damage) for verdict in verdicts)
    print(f"{len(verdicts)} verified, {damaged or 'none'} damaged")
    return DAMAGED if damaged else 0


def quickstart(arguments: argparse.Namespace) -> None:
    """`grpo-jax quickstart`."""
    from grpo_jax.tools.quickstart import quickstart as run

    run(arguments.run_dir)


def plan(arguments: argparse.Namespace) -> None:
    """`grpo-jax plan`."""
    import json
    import os

    # Two processes may compile for a TPU at the same time, and no cloud machine is asked which TPU it has. Compiling for a GPU
    # needs neither driver nor CUDA's libraries. A chip that is named need not be attached.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if arguments.target is not None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    loaded = loaded_settings(arguments)
    from grpo_jax.run.display import Display
    from grpo_jax.tools.plan import advice_lines, json_of, make_plan, rows_of

    display = Display(quiet=loaded.config.train.quiet or arguments.json)
    made = make_plan(loaded.config, arguments.target, announce=display.compiling, show=display.note)
    display.table("plan", rows_of(made), {})
    for line in advice_lines(made):
        print(line)
    if arguments.json:
        print(json.dumps(json_of(made)))


def bench(arguments: argparse.Namespace) -> None:
    """`grpo-jax bench`."""
    import json
    import os

    if os.environ.get("JAX_PLATFORMS") == "cpu":  # compiling for a GPU, to count kernels, needs neither driver nor CUDA's libraries
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from grpo_jax.run.display import Display
    from grpo_jax.tools.bench import BenchOptions, rows_of
    from grpo_jax.tools.bench import bench as run

    options = BenchOptions(**{key: value for key, value in vars(arguments).items() if key in BENCH_OPTIONS})
    display = Display(quiet=arguments.json)
    result = run(options, display)
    if arguments.json:
        print(json.dumps(result))
    else:
        display.table("medians over the steps", rows_of(result), {})


BENCH_OPTIONS = (
    "model", "prompts", "num_generations", "prompt_length", "completion_length", "steps", "lora_rank", "slots", "segment", "refill",
    "capacity", "kv_dtype", "dtype", "remat", "micro_batch_prompts",
    "micro_batch_tokens", "ragged", "lengths", "prompt_lengths",
)  # fmt: skip


def profile(arguments: argparse.Namespace) -> None:
    """`grpo-jax profile`."""
    loaded = loaded_settings(arguments)
    from grpo_jax.tools.profile import profile as run

    names = ("steps", "warmup_steps", "python")
    run(loaded.config, arguments.out, sources=loaded.sources, **{name: vars(arguments)[name] for name in names})


def loaded_settings(arguments: argparse.Namespace) -> Loaded:
    """The config of `--config` and the `--section.field` options."""
    return load(arguments.config, given_settings(arguments))


def given_settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The `--section.field` options that were given, as text."""
    return {name: value for name, value in vars(arguments).items() if name in setting_types()}


def parser() -> argparse.ArgumentParser:
    """The whole grammar. Settings are kept as text: `config.load` gives them their types."""
    top = argparse.ArgumentParser(
        prog="grpo-jax", description="Group Relative Policy Optimization of language models in JAX.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"grpo-jax {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, action: Any, says: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=says, description=says, allow_abbrev=False)
        made.set_defaults(action=action)
        return made

    for name, action, says in (
        ("train", train, "train with GRPO"),
        ("sft", sft, "supervised warm-up on prompt and completion rows"),
    ):
        made = command(name, action, says)
        made.usage = f"grpo-jax {name} [--config FILE.yaml] [--section.field VALUE ...] [--resume]"
        made.add_argument("--config", metavar="FILE.yaml", help="settings; the options below win over it")
        made.add_argument("--resume", action="store_true", help="continue the run in train.run_dir at its last checkpoint")
        add_settings(made)

    made = command("eval", evaluate, "accuracy on the held-out part, greedy and pass@k")
    made.usage = "grpo-jax eval (--config FILE.yaml [--section.field VALUE ...] | --run DIR) [--pass_k 8]"
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", metavar="FILE.yaml", help="evaluate the model of these settings; the options below win over it")
    which.add_argument("--run", metavar="DIR", help="evaluate the last state of a run, with its own settings")
    made.add_argument("--pass_k", type=positive, default=8, metavar="K", help="samples per problem for pass@k (default 8)")
    add_settings(made)

    made = command("generate", generate, "sample completions; a model with a chat template is talked to through it")
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

    made = command("export", export, "write a run's weights for other tools")
    made.add_argument("--run", required=True, metavar="DIR", help="run folder")
    made.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    made.add_argument(
        "--format", required=True, choices=("adapter", "merged"), help="a PEFT adapter, or the whole model with it merged in"
    )

    made = command("verify", verify, "compare checkpoints, adapters and exports with their digests; status 1 where one is damaged")
    made.add_argument("paths", nargs="+", metavar="PATH", help="run folder, checkpoint, adapter or merged model")

    made = command("plan", plan, "what a run needs of a chip, without the chip and without weights")
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

    made = command("bench", bench, "time GRPO steps on made-up prompts")
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

    made = command("profile", profile, "trace some steps of a training run for TensorBoard and Perfetto")
    made.usage = "grpo-jax profile [--config FILE.yaml] [--section.field VALUE ...] [--steps 3] [--out DIR]"
    made.add_argument("--config", metavar="FILE.yaml", help="settings of the run, as for train; the options below win over it")
    made.add_argument("--steps", type=positive, default=3, metavar="N", help="traced steps (default 3)")
    made.add_argument("--warmup_steps", type=positive, default=2, metavar="N", help="steps before them (default 2)")
    made.add_argument("--out", default="runs/profile", metavar="DIR", help="folder of traces (default runs/profile)")
    made.add_argument("--python", action="store_true", help="trace calls of Python functions too, which slows the host down")
    add_settings(made)

    made = command("quickstart", quickstart, "make a small model and task, warm it up, and watch GRPO improve it")
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


def unknown_option(word: str, arguments: argparse.Namespace) -> ConfigError:
    """The error for a word that no option takes, with the nearest option."""
    name = word.partition("=")[0].lstrip("-")
    if not word.startswith("-"):
        return ConfigError(f"{show(word)} stands alone: write each setting as --section.field VALUE")
    own = [key for key in vars(arguments) if key not in ("action", "command", "started") and key not in setting_types()]
    guess = nearest(name, own) or (nearest_setting(name) if "config" in own else None)
    if guess in field_types(Config):
        guess += ".SETTING"
    hint = f"did you mean --{guess}?" if guess else f"see grpo-jax {arguments.command} --help"
    return ConfigError(f"--{name} is not an option of grpo-jax {arguments.command}; {hint}")


def is_users(error: Exception) -> bool:
    """Whether an exception is a message to the user: this package's own kinds, and a run folder that exists already."""
    ours = any(kind.__module__.partition(".")[0] == __package__ for kind in type(error).__mro__)
    return ours or isinstance(error, FileExistsError)


def error_block(error: Exception) -> str:
    """The message and the notes that were added to it, all lines but the first indented."""
    text = "\n".join([str(error) or type(error).__name__, *vars(error).get("__notes__", [])])
    first, *more = safe_text(text).splitlines()
    return "\n".join([f"error: {first}", *(f"       {line}" for line in more)])


def ending(error: BaseException) -> tuple[str, int]:
    """What one of several processes says of the error that ends it, and its exit status."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command with --resume continues from what was saved last", status_of(error)
    if isinstance(error, Exception) and is_users(error):
        return error_block(error), USER_ERROR
    return "".join(traceback.format_exception(error)), 1


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status of a command that a signal has ended."""
    return int(error.code or 1) if isinstance(error, RunInterruptedError) else INTERRUPTED


def interrupted(words: Sequence[str], arguments: argparse.Namespace) -> str:
    """What to say after a signal: for a training run, the command that continues it, or starts it again where nothing was saved."""
    folder = vars(arguments).get("writes_to")
    if arguments.command not in RESUMABLE or folder is None:
        return "interrupted"
    saved, taken = holds_checkpoint(Path(folder)), holds_run(Path(folder))
    again = shlex.join(["grpo-jax", *words, *(["--resume"] if taken and "--resume" not in words else [])])
    if saved:
        return f"interrupted; what was saved last is kept, and this continues from it:\n    {again}"
    return f"interrupted before anything was saved; this starts at step 0 again:\n    {again}"
