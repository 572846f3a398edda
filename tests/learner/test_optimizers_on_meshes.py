"""Updates by every optimiser on a mesh of eight CPU devices are those of one device; of DoRA's adapters with replayed experts too.

The mesh needs a process of its own: `mesh_optimizers.py`. `test_mesh_update.py` compares gradients.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OPTIMIZERS = ("muon", "adafactor", "lion", "factored", "int8")
MODEL = "dora, replay, int8"


@pytest.fixture(scope="module")
def results(repository: Path) -> dict[str, dict[str, Any]]:
    """The program's results by case."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(repository / part) for part in ("", "kernels", "tests", "tests/support"))
    }
    program = [sys.executable, str(repository / "tests" / "support" / "mesh_optimizers.py"), *OPTIMIZERS, MODEL]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print("\n".join(f"{row['case']}: {row['change']:.1e} {row['state']:.1e} {row['cpu_seconds']:.1f} s" for row in found))
    return {row["case"]: row for row in found}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*OPTIMIZERS, MODEL])
def test_updates_on_a_mesh_are_those_of_one_device(case: str, results: dict[str, dict[str, Any]]) -> None:
    """To 1e-5 of the norm, as gradients: sums in another order, in float32. All that is trained moves."""
    found = results[case]
    assert found["moved"] > 1e-3
    assert found["change"] <= 1e-5
    assert found["state"] <= 1e-5
    for own, expected in found["metrics"]:
        for name, value in expected.items():
            assert math.isclose(own[name], value, rel_tol=1e-5, abs_tol=1e-6), name


@pytest.mark.slow
def test_experts_are_replayed_in_the_update_on_a_mesh(results: dict[str, dict[str, Any]]) -> None:
    """The drawn experts are not those that the routers select."""
    assert all(own["router/mismatch"] > 0.5 for own, _ in results[MODEL]["metrics"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["int8", MODEL])
def test_codes_of_moments_are_sharded_as_their_matrices(case: str, results: dict[str, dict[str, Any]]) -> None:
    codes = [sharded for dtype, _, sharded in results[case]["arrays"] if dtype in ("int8", "uint8")]
    assert codes
    assert all(codes)
