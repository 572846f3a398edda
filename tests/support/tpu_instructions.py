"""Counts the instructions of TPU kernels in the compiler's final schedule, on a machine without a TPU.

A TPU's core starts one bundle of instructions a cycle, and the compiler puts them into bundles ahead of time. libtpu writes the
bundles of every program that it compiles (`--xla_jf_dump_to`). Bundles count a kernel's time where its data arrive early enough;
what the chip waits for memory is not in them. libtpu reads its options once, so that kernels are compiled in a process of its own:
`python tests/support/tpu_instructions.py v6e head_logprob` prints the counts of every case whose name begins so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {
    "matmul": ("vmatmul",),
    "push": ("vmatpush", "vmatprep.subr", "vlatch", "vxpose"),
    "result": ("vpop.f32.mrf", "vpop.s32.mrf", "vmatres"),
    "load": ("vld",),
    "store": ("vst",),
    "unpack": ("vunpack",),
    "pack": ("vpack", "vmpack"),
    "convert": ("vcvt",),
    "multiply": ("vmul",),
    "add": ("vadd.f32", "vadd.bf16", "vsub.f32", "vsub.bf16"),
    "maximum": ("vmax.f32", "vmax.bf16", "vmin"),
    "exp": ("vpow2", "vrcp", "vlog2", "vtanh"),
    "select": ("vsel", "vnsel"),
    "compare": ("vcmp", "vlt", "vle", "vgt", "vge", "veq", "vne", "vmand", "vmor", "vmneg", "vmmov"),
    "permute": ("vperm", "vrot", "vcombine", "vbroadcast", "vadd.xlane", "vmax.xlane", "vgather", "vdgather"),
}
"""Instructions by what they do; those of a reduction within a register's rows count as permutations. The rest is "other"."""

INSTRUCTION = re.compile(r"(?:\{ |;;  )(?:%[0-9a-z_,% ]+ = )?(v[a-z0-9.]+)([^;]*)")
BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *: +(>*) *\{")
BRANCH = re.compile(r"sbr\.rel .*?target = \$region(\d+)")
REGION = re.compile(r"region (\d+)")


@dataclass(frozen=True)
class Counts:
    """Instructions of a kernel's grid step.

    Attributes:
        bundles: bundles of the stretches between two branches that have a product in them: those that every step runs.
        kinds: their instructions by kind (`KINDS`); "spill" counts those loads and stores again that move registers to memory.
        others: bundles of everything else: what the first and the last step do, and addresses of the next blocks.
    """

    bundles: int
    kinds: dict[str, int]
    others: int

    @property
    def vector(self) -> int:
        """Instructions of the vector units: all but products, loads and stores."""
        others = ("matmul", "push", "result", "load", "store", "spill")
        return sum(count for kind, count in self.kinds.items() if kind not in others)


def kind_of(instruction: str) -> str:
    """The kind of an instruction, by the longest of the beginnings in `KINDS` that it has."""
    found = [(len(start), kind) for kind, starts in KINDS.items() for start in starts if instruction.startswith(start)]
    return max(found)[1] if found else "other"


def count_instructions(schedule: str) -> Counts:
    """Counts the instructions in the text of a kernel's final bundles."""
    stretches: list[tuple[int, Counter[str]]] = []
    targets: set[str] = set()
    bundles, kinds = 0, Counter[str]()
    for line in schedule.splitlines():
        if not BUNDLE.match(line):
            continue
        branch = BRANCH.search(line)
        comment = line.rsplit("}", 1)[-1]
        begins = targets & set(REGION.findall(comment)) or " LB:" in line[:16]
        if begins:
            stretches.append((bundles, kinds))
            bundles, kinds = 0, Counter[str]()
        bundles += 1
        for instruction, rest in INSTRUCTION.findall(line):
            kinds[kind_of(instruction)] += 1
            kinds["spill"] += "_spill]" in rest
        if branch:
            targets.add(branch[1])
            stretches.append((bundles, kinds))
            bundles, kinds = 0, Counter[str]()
    stretches.append((bundles, kinds))
    repeated = [stretch for stretch in stretches if stretch[1]["matmul"]]
    every = sum((counts for _, counts in repeated), Counter[str]())
    steady = sum(bundles for bundles, _ in repeated)
    return Counts(steady, dict(every.most_common()), sum(bundles for bundles, _ in stretches) - steady)


def schedules_in(folder: Path, name: str) -> list[Path]:
    """Files with the final bundles of programs whose name has a part, in the order of their compilation."""
    return sorted(path for path in folder.glob(f"*{name}*-final_bundles.txt") if "schedule-analysis" not in path.name)


Case = tuple[str, Callable[..., Any], Iterable[Any]]
"""A part of the kernel's name, a program and its arguments' shapes."""


def quantized_case(form: str, rows: int, transpose: bool) -> Case:
    """x W or x Wᵀ of Llama-3.1-8B's feed-forward matrix."""
    import jax
    import jax.numpy as jnp

    from grpo_kernels import quantized_matmul, quantized_shapes

    w = quantized_shapes(form, (4096, 14336))
    x = jax.ShapeDtypeStruct((rows, 14336 if transpose else 4096), jnp.bfloat16)

    def program(x: Any, w: Any) -> Any:
        return quantized_matmul(x, w, transpose=transpose, implementation="mosaic_tpu")

    return "quantized_matmul", program, (x, w)


def head_case(with_gradient: bool) -> Case:
    """Llama-3.1-8B's head, its rows a multiple of every block, and 8,192 tokens."""
    import jax
    import jax.numpy as jnp

    from grpo_kernels import head_logprob
    from grpo_kernels.ops.head_logprob.shapes import LLAMA_3_8B as SHAPE

    vocabulary = SHAPE.vocabulary // 2048 * 2048  # the last rows have a pass of their own, which would be counted too
    x, w = (jax.ShapeDtypeStruct((rows, SHAPE.width), jnp.bfloat16) for rows in (SHAPE.tokens, vocabulary))

    def values(x: Any, w: Any, ids: Any) -> Any:
        return head_logprob(x, w, ids, implementation="mosaic_tpu")[0].sum()

    return "head_logprob", jax.grad(values) if with_gradient else values, (x, w, jax.ShapeDtypeStruct((SHAPE.tokens,), jnp.int32))


def decode_case(part: str, kv_format: str) -> Case:
    """64 slots of an 8B model that continue 8 prompts; the kernel of the prompts or of the slots' own keys."""
    import functools

    from kernel_checks import decode_shapes

    from grpo_kernels import decode_attention
    from grpo_kernels.ops.decode_attention.shapes import EIGHT_B

    given = decode_shapes(EIGHT_B, 2, kv_format=kv_format)
    names = list(given)

    def program(*values: Any) -> Any:
        return functools.partial(decode_attention, implementation="mosaic_tpu")(**dict(zip(names, values, strict=True)))

    return f"decode_attention_{part}", program, tuple(given.values())


CASES: dict[str, Callable[[], Case]] = {
    f"quantized_matmul {form} {rows}{' transposed' * transpose}": lambda form=form, rows=rows, transpose=transpose: quantized_case(
        form, rows, transpose
    )
    for form in ("int4", "nf4", "int8")
    for rows in (64, 2048)
    for transpose in (False, True)
}
CASES |= {
    f"head_logprob {name}": lambda gradient=gradient: head_case(gradient) for name, gradient in (("values", 0), ("gradient", 1))
}
CASES |= {
    f"decode_attention {part} {name}": lambda part=part, kv_format=kv_format: decode_case(part, kv_format)
    for part in ("prefix", "own")
    for name, kv_format in (("bfloat16", "auto"), ("int8", "int8"), ("int4", "int4"))
}


def compile_cases(chip: str, names: list[str], folder: Path) -> dict[str, Any]:
    """Compiles cases for a chip in this process, which libtpu was told to write schedules of; returns their counts."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from grpo_jax.fit.targets import TPUS
    from grpo_kernels.target import tracing_for

    sharding = SingleDeviceSharding(topologies.get_topology_desc({"v5e": "v5e:2x2", "v6e": "v6e:2x2"}[chip], "tpu").devices[0])
    counts = {}
    for name in names:
        part, program, shapes = CASES[name]()
        placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tuple(shapes))
        with tracing_for(TPUS[chip].target):
            jax.jit(program).lower(*placed).compile()
        written = schedules_in(folder, part)
        counts[name] = count_instructions(written[-1].read_text())
        for path in folder.iterdir():
            path.unlink()
    return {name: {"bundles": c.bundles, "vector": c.vector, "others": c.others, "kinds": c.kinds} for name, c in counts.items()}


def counts_of(chip: str, names: list[str]) -> dict[str, Any]:
    """Compiles cases in a process of its own and returns their counts by name."""
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        paths = [root, root / "kernels", root / "tests" / "support", root / "tests"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, __file__, "--here", folder, chip, *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the counts of the cases whose names begin with an argument; all without one."""
    if sys.argv[1] == "--here":
        print(json.dumps(compile_cases(sys.argv[3], sys.argv[4:], Path(sys.argv[2]))))
        return
    chip, *starts = sys.argv[1:]
    names = [name for name in CASES if not starts or name.startswith(tuple(starts))]
    for name, counts in counts_of(chip, names).items():
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts["kinds"].items())
        bundles, others = counts["bundles"], counts["others"]
        print(f"{chip} {name}: {bundles:,} bundles, {counts['vector']:,} vector; others {others:,}\n    {kinds}")


if __name__ == "__main__":
    main()
