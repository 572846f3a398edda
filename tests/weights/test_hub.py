"""Uploads against a local server that answers as the hub does where something is wrong, and model cards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from fake_hub import fake_hub

from grpo_jax.config import Config, LoraConfig
from grpo_jax.weights.hub import HubError, push_folder
from grpo_jax.weights.model_card import RunFacts, card_text
from grpo_jax.weights.usage import usage_lines

LORA = LoraConfig(rank=24, alpha=48.0)


class Hub(BaseHTTPRequestHandler):
    """Answers every request with one status, and counts them."""

    status, asked = 401, 0

    def do_POST(self) -> None:
        type(self).asked += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"me/mine: the hub does not accept the token \(401\); run `hf auth login`, or set HF_TOKEN to one that may write"),
        (403, r"me/mine: the token may not write there \(403\); make one with write access"),
        (400, r"me/mine: the hub refused \(400\)"),
    ],
)
def test_an_answer_that_refuses_is_one_clear_line(status: int, message: str, hub: type[Hub], tmp_path: Path) -> None:
    hub.status, hub.asked = status, 0
    with pytest.raises(HubError, match=message) as raised:
        push_folder(tmp_path, "me/mine", token="hf_wrong")
    assert "\n" not in str(raised.value)
    assert "hf_wrong" not in str(raised.value)
    assert hub.asked == 1


def test_no_token_no_hub_and_no_name_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HubError, match="me/mine: there is no token; run `hf auth login`, or set HF_TOKEN"):
        push_folder(tmp_path, "me/mine")
    with pytest.raises(HubError, match=r"me/mine: the upload failed: .*refused; try again"):
        push_folder(tmp_path, "me/mine", token="hf_x")
    with pytest.raises(HubError, match=r"'a/b/c' is no name of a repository; use owner/name"):
        push_folder(tmp_path, "a/b/c", token="hf_x")


def test_every_argument_of_an_upload_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = fake_hub(monkeypatch)
    (tmp_path / "a.json").write_text("{}")
    address = push_folder(tmp_path, "mine", private=True, token="hf_x", revision="dev", message="Hello")
    assert address == "https://hub/commit"
    (upload,) = uploads
    assert upload["files"] == {"a.json": "{}"}
    assert {"repo_id": "me/mine", "private": True, "token": "hf_x", "branch": "dev", "revision": "dev"}.items() <= upload.items()
    assert upload["commit_message"] == "Hello"


def facts(**summary: Any) -> RunFacts:
    config = Config.from_dict(
        {
            "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct"},
            "data": {"path": "openai/gsm8k", "name": "main", "eval_size": 0},
            "rewards": {"functions": ["number_match", {"name": "/srv/someone/mine.py:short"}], "weights": [1.0, 0.25]},
            "optim": {"learning_rate": 2e-5},
            "train": {"steps": 40, "run_dir": "/srv/someone/runs/a"},
            "lora": {"rank": 24, "alpha": 48.0},
        }
    )
    return RunFacts(config, summary, Path("curves.png"))


def test_a_card_says_base_data_rewards_settings_curves_results_and_how_to_load() -> None:
    text = card_text("Qwen/Qwen2.5-0.5B-Instruct", LORA, "adapter", facts(accuracy_before=0.25, accuracy_after=0.5), "me/mine")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
        "datasets": ["openai/gsm8k"],
        "tags": ["grpo", "grpo_jax", "lora"],
    }
    for part in (
        "# mine\n",
        "from `Qwen/Qwen2.5-0.5B-Instruct`: LoRA, rank 24, alpha 48",
        "- prompts: `openai/gsm8k`, split `train`",
        "- reward: `number_match`, weight 1\n- reward: `mine.py:short`, weight 0.25",
        "| held-out accuracy before | 0.25 |\n| held-out accuracy after | 0.5 |",
        "![curves of the run](curves.png)",
        'model = PeftModel.from_pretrained(model, "me/mine")',
        "vllm serve Qwen/Qwen2.5-0.5B-Instruct --enable-lora --max-lora-rank 32 --lora-modules mine=me/mine",
    ):
        assert part in body, part
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert (settings["optim"]["learning_rate"], settings["train"], settings["lora"]["rank"]) == (2e-5, {"steps": 40}, 24)
    assert "someone" not in text


def test_a_card_shows_no_path_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "secret" / "base").mkdir(parents=True)
    text = card_text(str(tmp_path / "secret" / "base"), None, "merged", facts(), None)
    assert str(tmp_path) not in text
    assert "from `base`: every weight trained. whole model." in text
    assert "base_model" not in text
    assert 'AutoModelForCausalLM.from_pretrained(".")' in text


def test_the_lines_that_use_an_export_are_quoted() -> None:
    assert usage_lines("merged", "my model", name="m") == [
        "vllm serve 'my model'",
        "AutoModelForCausalLM.from_pretrained('my model')",
    ]
    assert usage_lines("gguf", "out", name="m", gguf_type="q8_0") == [
        "ollama create m -f out/Modelfile",
        "llama-cli -m out/model-q8_0.gguf",
    ]
    assert usage_lines("gguf-lora", "out", name="m") == ["llama-cli -m BASE.gguf --lora out/adapter.gguf"]
    serve, load = usage_lines("adapter", "out", name="m", base="a/b", lora=LoraConfig(rank=8), template=True)
    assert serve == "vllm serve a/b --enable-lora --chat-template out/chat_template.jinja --lora-modules m=out"
    assert load == "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('a/b'), 'out')"
