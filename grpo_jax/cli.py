"""The command line: `grpo-jax train | sft | eval | generate | export | verify | doctor | plan | bench | profile | report | ...`.

Each command parses its options, builds the config and calls one function of the package. JAX is imported when a command runs,
never for `--help`. `config/command_line.py` has the grammar. Exit status: 0; 2 for a mistake of the user's (one block on standard
error, no traceback); 1 where `verify` finds damage; 3 where `doctor` has findings; 130, 143 or 129 for Ctrl-C, SIGTERM or SIGHUP.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from grpo_jax.config import ConfigError, RolloutConfig
from grpo_jax.config.checks import show
from grpo_jax.config.command_line import given_settings, loaded_settings, parser, unknown_option
from grpo_jax.run.resume import holds_checkpoint, holds_run
from grpo_jax.runtime.output import drop_what_nobody_reads
from grpo_jax.runtime.safe_text import safe_text
from grpo_jax.runtime.stop_signals import RunInterruptedError

DAMAGED, USER_ERROR, FOUND, INTERRUPTED = 1, 2, 3, 130
RESUMABLE = ("train", "sft")


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        words: The command line without the program's name; None takes the process's.

    Returns:
        The exit status.
    """
    started = time.perf_counter()
    drop_what_nobody_reads()
    words = sys.argv[1:] if words is None else list(words)
    arguments, rest = parser().parse_known_args(words, argparse.Namespace(started=started))
    try:
        if rest:
            raise unknown_option(rest[0], arguments)
        return COMMANDS[arguments.command](arguments) or 0
    except KeyboardInterrupt as error:
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
    from grpo_jax.training import train as run

    with joined_processes(loaded.config.distributed, ending):
        run(loaded.config, resume=arguments.resume, sources=loaded.sources, started=arguments.started)


def sft(arguments: argparse.Namespace) -> None:
    """`grpo-jax sft`."""
    loaded = loaded_settings(arguments)
    arguments.writes_to = loaded.config.train.run_dir
    from grpo_jax.runtime.distributed import joined_processes
    from grpo_jax.training import sft as run

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

    if arguments.best and arguments.run is None:
        raise ConfigError("--best is given without --run: only a run has a best checkpoint")
    run(config, run_dir=arguments.run, best=arguments.best, pass_k=arguments.pass_k)


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

    def say(line: str) -> None:
        print(safe_text(line, one_line=True))

    names = ("best", "gguf_type", "private")
    options = {name: vars(arguments)[name] for name in names}
    lines = export_run(arguments.run, arguments.out, arguments.format, repo=arguments.push_to_hub, note=say, **options)
    say(f"wrote {arguments.format} to {arguments.out}")
    for line in lines:
        say(f"    {line}")


def verify(arguments: argparse.Namespace) -> int:
    """`grpo-jax verify`; returns the exit status."""
    from grpo_jax.run.verify import verify as run

    verdicts = [verdict for path in arguments.paths for verdict in run(path)]
    for verdict in verdicts:
        print(safe_text(str(verdict), one_line=True))
    damaged = sum(bool(verdict.damage) for verdict in verdicts)
    print(f"{len(verdicts)} verified, {damaged or 'none'} damaged")
    return DAMAGED if damaged else 0


def doctor(arguments: argparse.Namespace) -> int:
    """`grpo-jax doctor`; returns the exit status."""
    import json

    from grpo_jax.run.doctor.report import diagnose_folder

    found = diagnose_folder(arguments.run)
    for line in [json.dumps(found.to_json())] if arguments.json else found.lines():
        print(line)
    return FOUND if found.findings else 0


def report(arguments: argparse.Namespace) -> None:
    """`grpo-jax report`."""
    from grpo_jax.run.report import write_report

    print(f"wrote {safe_text(str(write_report(arguments.run, arguments.out)), one_line=True)}")


def watch(arguments: argparse.Namespace) -> None:
    """`grpo-jax watch`."""
    from grpo_jax.tools.watch import watch as run

    run(arguments.run, arguments.port)


def compare(arguments: argparse.Namespace) -> None:
    """`grpo-jax compare`."""
    from grpo_jax.tools.compare import compare as run

    for line in run(arguments.runs, arguments.out):
        print(safe_text(line, one_line=True))


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


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "train": train,
    "sft": sft,
    "eval": evaluate,
    "generate": generate,
    "export": export,
    "verify": verify,
    "doctor": doctor,
    "plan": plan,
    "bench": bench,
    "profile": profile,
    "report": report,
    "watch": watch,
    "compare": compare,
    "quickstart": quickstart,
}
"""The function of each command."""


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
