"""Writes `trl_arguments.json`: the names and defaults of the arguments of TRL's GRPOConfig and GRPOTrainer, and more of its names.

Reads the source of the packages and runs none of it, so that PyTorch is not needed:

    pip download trl==1.16.0 transformers==5.23.0 --no-deps -d wheels
    for wheel in wheels/*.whl; do unzip -q -d source $wheel; done
    python tests/goldens/make_trl_arguments.py source
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).with_name("trl_arguments.json")
NAMED_DEFAULTS = {"default_optim": "adamw_torch_fused"}
"""Defaults that the source gives by name: this one since PyTorch 2.8."""


def class_of(path: Path, name: str) -> ast.ClassDef:
    """The definition of a class in a file."""
    return next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name)


def value_of(node: ast.expr) -> Any:
    """The value of a default; a name that is not known is kept as text."""
    if isinstance(node, ast.Name):
        return NAMED_DEFAULTS.get(node.id, node.id)
    return ast.literal_eval(node)


def fields_of(path: Path, name: str) -> dict[str, Any]:
    """The fields of a dataclass and their defaults; a factory is a list's."""
    found: dict[str, Any] = {}
    for node in class_of(path, name).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert isinstance(node.value, ast.Call)
            given = {item.arg: item.value for item in node.value.keywords}
            found[node.target.id] = value_of(given["default"]) if "default" in given else []
    return found


def methods_of(path: Path, name: str, start: str) -> list[str]:
    """The methods of a class whose names begin with a text."""
    return [node.name for node in class_of(path, name).body if isinstance(node, ast.FunctionDef) and node.name.startswith(start)]


def parameters_of(path: Path, name: str) -> dict[str, Any]:
    """The parameters of a class's constructor and their defaults; "required" where there is none."""
    node = next(item for item in class_of(path, name).body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    names = [item.arg for item in node.args.args][1:]
    defaults = [value_of(item) for item in node.args.defaults]
    return dict(zip(names, ["required"] * (len(names) - len(defaults)) + defaults, strict=True))


def functions_in(folder: Path) -> list[str]:
    """The names that the package `trl.rewards` offers."""
    tree = ast.parse((folder / "__init__.py").read_text())
    table = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_import_structure"
    )
    return sorted(name for names in ast.literal_eval(table).values() for name in names)


def main(source: Path) -> None:
    """Writes the file."""
    trl, transformers = source / "trl", source / "transformers"
    inherited = fields_of(transformers / "training_args.py", "TrainingArguments")
    shared = fields_of(trl / "trainer" / "base_config.py", "_BaseConfig")
    own = fields_of(trl / "trainer" / "grpo_config.py", "GRPOConfig")
    golden = {
        "versions": sorted(path.name.removesuffix(".dist-info") for path in source.glob("*.dist-info")),
        "GRPOConfig": inherited | shared | own,
        "GRPOTrainer": parameters_of(trl / "trainer" / "grpo_trainer.py", "GRPOTrainer"),
        "ModelConfig": fields_of(trl / "trainer" / "model_config.py", "ModelConfig"),
        "ScriptArguments": fields_of(trl / "scripts" / "utils.py", "ScriptArguments"),
        "hooks": methods_of(transformers / "trainer_callback.py", "TrainerCallback", "on_"),
        "rewards": functions_in(trl / "rewards"),
    }
    TARGET.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
