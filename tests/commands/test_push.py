"""`rlhf push` uploads what is shipped, private by default, and nothing else; no Hub is asked here."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from helpers.launches import ROOT, rlhf_here
from helpers.runs import change_lineage, make_run
from pipeline.commands.upload import Upload, push
from pipeline.errors import UserError

import httpx
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors.torch import save_file

SHIPPED = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, tokenizer: Any) -> Path:
    """A finished run with what its stages leave beside the models."""
    folder = make_run(tmp_path / "run", tokenizer)
    for stage in ("sft", "ppo"):
        for name in ("samples", "value", "optimizer"):
            (folder / stage / name).mkdir()
            (folder / stage / name / "private.json").write_text("{}")
        for name in ("samples.json", "history.jsonl", "log.txt", "metrics.json", "wandb_id", "optimizer.pt"):
            (folder / stage / name).write_text("My parcel number 1 never arrived")
    return folder


@dataclass
class Hub:
    """Stands for `HfApi`: remembers what it is told, and refuses what it is told to."""

    refuses: dict[str, Exception] = field(default_factory=dict)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def _called(self, name: str, **values: Any) -> None:
        self.calls.append((name, values))
        if name in self.refuses:
            raise self.refuses[name]

    def whoami(self) -> dict[str, Any]:
        self._called("whoami")
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, private: bool, repo_type: str) -> Any:
        self._called("create_repo", repo_id=repo_id, private=private)
        return type("RepoUrl", (), {"repo_id": repo_id if "/" in repo_id else f"me/{repo_id}"})()

    def upload_folder(self, *, repo_id: str, folder_path: Path, repo_type: str, commit_message: str) -> Any:
        self._called("upload_folder", repo_id=repo_id)
        self.files = {str(p.relative_to(folder_path)): p.read_bytes() for p in folder_path.rglob("*") if p.is_file()}
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})()


def refusal(status: int, message: str) -> HfHubHTTPError:
    return HfHubHTTPError(message, response=httpx.Response(status, request=httpx.Request("POST", "https://hub/x")))


def test_a_run_is_pushed_to_a_private_repository(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = Hub()
    push(run, Upload(repository="me/shop"), hub)
    assert hub.calls == [
        ("whoami", {}),
        ("create_repo", {"repo_id": "me/shop", "private": True}),
        ("upload_folder", {"repo_id": "me/shop"}),
    ]
    assert hub.files.keys() == SHIPPED
    for name, content in hub.files.items():
        assert b"My parcel" not in content, name
        assert str(run).encode() not in content, name
    assert b"name: shop" in hub.files["README.md"]
    assert "push: done, https://hub/me/shop/commit/1" in capsys.readouterr().out


def test_public_and_update_are_asked_for(run: Path) -> None:
    hub = Hub()
    push(run / "sft", Upload(repository="shop", public=True, dtype="bf16"), hub)
    assert hub.calls[1:] == [
        ("create_repo", {"repo_id": "shop", "private": False}),
        ("upload_folder", {"repo_id": "me/shop"}),
    ]
    hub = Hub()
    push(run / "reward", Upload(repository="me/shop", update=True), hub)
    assert [name for name, _ in hub.calls] == ["whoami", "upload_folder"]
    assert hub.files.keys() == SHIPPED - {"generation_config.json"}


def test_an_adapter_goes_along_where_its_base_is_on_the_hub(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = run / "sft" / "adapter"
    adapter.mkdir()
    save_file({"w": torch.ones(2)}, adapter / "adapter_model.safetensors")
    (adapter / "README.md").write_text("base: /home/me/cache")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/cache", "r": 2}))
    hub = Hub()
    push(run / "sft", Upload(repository="me/shop"), hub)
    assert hub.files.keys() == SHIPPED
    assert "the adapter is left out: its base is no model of the Hub" in capsys.readouterr().out
    parent = {"path": "/home/me/cache", "hub": "org/base", "revision": "abc", "weights_sha256": "a" * 64}
    change_lineage(run, "sft", parents=[parent])
    push(run / "sft", Upload(repository="me/shop"), hub)
    assert hub.files.keys() == SHIPPED | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert json.loads(hub.files["adapter/adapter_config.json"]) == {
        "base_model_name_or_path": "org/base",
        "revision": "abc",
        "r": 2,
    }
    assert b"base_model: org/base" in hub.files["README.md"]
    assert not any(b"/home/me" in content for content in hub.files.values())


def test_a_dry_run_lists_and_asks_nobody(run: Path) -> None:
    out, _ = rlhf_here("push", run, "--to", "me/shop", "--dry-run")
    assert f"push: ppo of {run}/ppo, fp32, would be uploaded to me/shop (private)" in out
    listed = re.findall(r"^ +([\d,]+) bytes  (\S+)$", out, re.MULTILINE)
    assert {name for _, name in listed} == SHIPPED
    sizes = {name: int(size.replace(",", "")) for size, name in listed}
    assert sizes["model.safetensors"] > 10_000
    assert f"{sum(sizes.values()):,} bytes in 7 files" in out
    assert "library_name: transformers" in out
    assert "pipeline_tag: text-generation" in out


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ({"whoami": LocalTokenNotFoundError("no token")}, "no token; log in with `hf auth login`, or set HF_TOKEN"),
        ({"create_repo": refusal(409, "You already created")}, "there is such a repository already; give another name"),
        ({"create_repo": refusal(403, "Forbidden\nmore")}, "Forbidden; give another name"),
        ({"upload_folder": httpx.ConnectError("no route")}, "no route; run the same command with --update"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(run: Path, refuses: Any, message: str) -> None:
    hub = Hub(refuses)
    with pytest.raises(UserError) as refused:
        push(run, Upload(repository="me/shop"), hub)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert not hub.files


def test_wrong_words_and_stages_are_refused_before_the_hub_is_asked(run: Path) -> None:
    for words, message in (
        ((run, "--to", "a/b/c"), "--to 'a/b/c' is no name of a repository"),
        ((run, "--to", "../x"), "is no name of a repository"),
        ((run, "--to", "a/b", "--public", "--update"), "--public is for a new repository"),
        ((run.parent, "--to", "a/b", "--dry-run"), "holds no finished stage"),
    ):
        _, err = rlhf_here("push", *words, code=2)
        assert message in err
        assert len(err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ the Hub's HTTP interface


class Endpoint(BaseHTTPRequestHandler):
    """As much of the Hub as `HfApi` asks for a small upload."""

    asked: list[tuple[str, Any]]  # set per test

    def do_GET(self) -> None:
        self._answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        host = self.headers["Host"]
        self.asked.append((self.path, body))
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif self.path.endswith("/commit/main"):
            self._answer({"commitOid": "1", "commitUrl": f"http://{host}/me/shop/commit/1", "success": True})
        else:
            self._answer({"url": f"http://{host}/me/shop", "name": "me/shop", "errors": [], "warnings": []})

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def _answer(self, values: Any) -> None:
        content = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    asked: list[tuple[str, Any]] = []
    handler = type("Handler", (Endpoint,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.full
def test_the_command_talks_to_an_endpoint(run: Path, endpoint: Any) -> None:
    url, asked = endpoint
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "pipeline.cli", "push", str(run), "--to", "me/shop"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    created = json.loads(dict(asked)["/api/repos/create"])
    assert created["visibility"] == "private"
    lines = dict(asked)["/api/models/me/shop/commit/main"].decode().splitlines()
    files = {row["value"]["path"]: row["value"] for row in map(json.loads, lines) if row["key"] == "file"}
    assert files.keys() == SHIPPED
    assert b"tags:" in base64.b64decode(files["README.md"]["content"])
