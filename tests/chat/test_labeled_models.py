"""The models of a live chat on the labeling page: what is recorded of them, which are refused, and a server that is killed."""

from __future__ import annotations

import json
import shutil
import signal
import time
import uuid
from pathlib import Path
from typing import Any

from helpers.labeling import Client, add_labeler, read_jsonl, rlhf, serving
from helpers.runs import make_run
from pipeline.chat.labeled import LabeledModels, load_labeled_models
from pipeline.commands.chat import writing_stage
from pipeline.errors import UserError
from pipeline.labeling.settings import read_settings
from pipeline.training.identity import weights_sha256

import pytest
import yaml


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return make_run(tmp_path_factory.mktemp("labeled") / "run", tokenizer)


def chat_folder(folder: Path, *models: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    given = {
        "mode": "chat",
        "model": [str(model) for model in models],
        "max_tokens": 12,
        "compare_every": 1,
        **settings,
    }
    (folder / "label.yaml").write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    return folder


def load(folder: Path) -> LabeledModels:
    return load_labeled_models(folder, read_settings(folder), writing_stage)


def test_answers_come_with_the_model_its_hash_and_the_sampling_but_no_error_names_it(tmp_path: Path, run: Path) -> None:
    models = load(chat_folder(tmp_path, run, run / "sft", temperature=0.7))
    assert models.sources == [
        {"model": str(run / stage), "stage": stage, "weights_sha256": weights_sha256(run / stage), "temperature": 0.7}
        for stage in ("ppo", "sft")
    ]
    question = [{"role": "user", "content": "My parcel never arrived."}]
    texts = ["".join(models.reply(0, question, seed)) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    with pytest.raises(UserError, match="the model' reads at most 128"):
        models.reply(0, [{"role": "user", "content": "word " * 500}], 0)


def test_a_model_that_cannot_chat_is_refused_with_the_line_of_the_settings(tmp_path: Path, run: Path) -> None:
    bare, changed = tmp_path / "bare", tmp_path / "changed"
    shutil.copytree(run / "sft", bare)
    shutil.copytree(run / "sft", changed)
    for folder in (bare, changed):
        (folder / "lineage.json").unlink()
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    (changed / "lineage.json").write_text((run / "ppo" / "lineage.json").read_text())
    for model, message in (
        (bare, "has no chat template"),
        (changed, "its weights changed after the stage finished"),
        (run / "reward", "is a reward model"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load(chat_folder(tmp_path / "folder", model))
        assert str(error.value).startswith(f"{tmp_path / 'folder' / 'label.yaml'}:2: ")


def compare(client: Client) -> dict[str, Any]:
    """Ask until two different answers come (a random model may say nothing)."""
    deadline = time.monotonic() + 60
    while (work := client.item())["chat"]["state"] != "choose":
        assert time.monotonic() < deadline
        if work["chat"]["state"] == "ask":
            ask(client, work)
        time.sleep(0.05)
    return work


def ask(client: Client, work: dict[str, Any]) -> int:
    chat = work["chat"]
    body = {
        "conversation": chat["conversation"],
        "number": chat["number"],
        "request": uuid.uuid4().hex,
        "text": "Where is it?",
    }
    return client.post("/api/ask", **body).json()["turn"]


@pytest.mark.full
def test_a_kill_while_a_model_writes_loses_no_label_and_the_answers_come_after_it(tmp_path: Path, run: Path) -> None:
    folder = chat_folder(tmp_path / "chat", run, max_tokens=20)
    with serving(folder) as server:
        token = add_labeler(folder, "ana")
        client = Client(server.url, token)
        confirmed = client.label(compare(client)["item"], {"ranks": [1, 2], "strength": 1}).json()["label"]
        ask(client, client.item())
        client.item()  # which lets the model begin
        server.stop(signal.SIGKILL)
    with serving(folder) as server:
        pair = compare(Client(server.url, token))
        assert pair["prompt"][-1] == {"role": "user", "content": "Where is it?"}
        assert server.stop() in (143, -signal.SIGTERM)
    exported = rlhf("label", "export", "--folder", folder)
    assert exported.returncode == 0
    rows = read_jsonl(folder / "export" / "rankings.jsonl")
    assert [int(row["id"].split("-")[1]) for row in rows] == [confirmed]
    assert all(row["sources"][0]["weights_sha256"] == weights_sha256(run / "ppo") for row in rows)
    chat_folder(folder, run / "sft")
    refused = rlhf("label", folder, "--port", "0")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "label.yaml:2: another model than the" in refused.stderr
