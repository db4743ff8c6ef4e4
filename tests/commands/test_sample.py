"""`rlhf sample`: several answers per prompt, as rows that `rlhf label` takes; exact after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from helpers.labeling import read_jsonl, write_rows
from helpers.launches import ROOT, kill_when, rlhf_here
from helpers.runs import make_run
from pipeline.labeling.items import read_items

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return make_run(tmp_path_factory.mktemp("sampled") / "run", tokenizer)


def prompts(folder: Path, count: int) -> Path:
    rows = [{"prompt": f"My kettle number {n} hums.", "id": f"p{n}"} for n in range(count)]
    return write_rows(folder / "prompts.jsonl", rows)


def sample(run: Path, folder: Path, *words: object, code: int = 0, count: int = 5) -> tuple[list[dict[str, Any]], str]:
    file = folder / "prompts.jsonl" if (folder / "prompts.jsonl").exists() else prompts(folder, count)
    models = [] if "--model" in words else ["--model", run / "sft", "--model", run / "ppo"]
    where = [] if "--output" in words else ["--output", folder / "out.jsonl"]
    out, err = rlhf_here("sample", file, *models, *where, "--max-response-tokens", 8, *words, code=code)
    return (read_jsonl(folder / "out.jsonl") if code == 0 else []), out + err


def test_models_answer_in_turn_and_rows_can_be_labeled(run: Path, tmp_path: Path) -> None:
    rows, said = sample(run, tmp_path, "-k", 4, "--temperature", 1.0, 0.5)
    assert "5 of 5 prompts" in said
    for row in rows:
        stages = [(source["stage"], source["temperature"]) for source in row["sources"]]
        assert stages == [("sft", 1.0), ("ppo", 0.5)] * 2
        assert len({source["weights_sha256"] for source in row["sources"]}) == 2
        assert len(row["responses"]) == len(row["sources"]) == len(set(row["responses"]))
    assert [row["id"] for row in rows] == [f"p{n}" for n in range(5)]
    assert len(list(read_items(tmp_path / "out.jsonl"))) == 5


def test_an_answer_depends_on_seed_prompt_and_draw_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    few, _ = sample(run, tmp_path, count=3)
    many, _ = sample(run, tmp_path / "more", "-k", 6, count=9)
    for row, other in zip(few, many, strict=False):
        drawn = dict(zip((s["draw"] for s in other["sources"]), other["responses"], strict=True))
        assert row["responses"] == [drawn[s["draw"]] for s in row["sources"]]
    (tmp_path / "seed").mkdir()
    assert sample(run, tmp_path / "seed", "--seed", 1, count=3)[0] != few


def test_duplicates_are_left_out_and_counted(run: Path, tmp_path: Path) -> None:
    _, said = sample(run, tmp_path, "-k", 6, "--temperature", 0.001)
    rows = read_jsonl(tmp_path / "out.jsonl")
    kept = sum(len(row["responses"]) for row in rows)
    assert all(len(row["responses"]) <= 2 for row in rows)  # one per model: nearly no chance at this temperature
    left_out = 5 - len(rows)
    assert f"{30 - kept - left_out:,} duplicates" in said or f"{30 - kept:,} duplicates" in said


@pytest.mark.full
def test_a_killed_sample_goes_on_to_the_very_same_file(run: Path, tmp_path: Path) -> None:
    file = prompts(tmp_path, 640)
    words = ["sample", str(file), "--model", str(run / "sft"), "-k", "3", "--max-response-tokens", "12"]
    out = tmp_path / "killed.jsonl"
    script = str(ROOT / "pipeline" / "cli.py")
    kill_when(script, [*words, "--output", str(out)], lambda: out.exists() and out.stat().st_size > 0)
    written = out.stat().st_size
    with out.open("ab") as rows:
        rows.write(b'{"prompt": "half a li')
    rlhf_here(*words, "--output", out)
    rlhf_here(*words, "--output", tmp_path / "whole.jsonl")
    assert 0 < written < out.stat().st_size
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    counts = [json.loads((tmp_path / f"{name}.jsonl.state.json").read_text())["counts"] for name in ("killed", "whole")]
    assert counts[0] == counts[1]


def test_finished_output_is_left_alone_and_another_request_refused(run: Path, tmp_path: Path, tokenizer: Any) -> None:
    sample(run, tmp_path)
    before = (tmp_path / "out.jsonl").read_bytes()
    sample(run, tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert "holds answers of another request (sampling)" in sample(run, tmp_path, "--seed", 3, code=2)[1]
    other = make_run(tmp_path / "other" / "run", tokenizer)
    weights = load_file(other / "sft" / "model.safetensors")
    save_file({k: v * 1.1 for k, v in weights.items()}, other / "sft" / "model.safetensors", metadata={"format": "pt"})
    assert "weights changed after the stage finished" in sample(other, tmp_path, code=2)[1]
    (other / "sft" / "lineage.json").unlink()
    assert "holds answers of another request (models)" in sample(other, tmp_path, code=2)[1]
    assert (tmp_path / "out.jsonl").read_bytes() == before
    (tmp_path / "theirs.jsonl").write_text("{}\n")
    assert "was not written by rlhf sample" in sample(run, tmp_path, "--output", tmp_path / "theirs.jsonl", code=2)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-k", "1"], "labelers compare 2 to 26 answers"),
        (["-k", "40"], "labelers compare 2 to 26 answers"),
        (["--temperature", "1", "1", "1"], "3 temperatures for 2 models"),
        (["--temperature", "0"], "between 0.001 and 100"),
        (["--model", "runs/no/such"], "does not exist"),
        (["--model", "http://127.0.0.1:9/v1"], "needs the model's name there"),
        (["--model", "http://a:b@127.0.0.1:9/v1#m"], "no keys in an address"),
    ],
)
def test_bad_requests_are_one_line(run: Path, tmp_path: Path, words: list[str], message: str) -> None:
    said = sample(run, tmp_path, *words, code=2)[1]
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_reward_model_does_not_answer(run: Path, tmp_path: Path) -> None:
    assert "comes from stage 'reward'" in sample(run, tmp_path, "--model", run / "reward", code=2)[1]


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server that answers by the seed, and sometimes nothing."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            text = "" if body["seed"] % 3 == 0 else f"Answer {body['seed']}"
            reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None: ...

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_address[1]}/v1", asked
    serving.shutdown()


def test_a_server_answers_and_its_empty_answers_are_counted(run: Path, tmp_path: Path, server: Any) -> None:
    address, asked = server
    rows, said = sample(run, tmp_path, "--model", f"{address}#m", "--temperature", 0.7, "-k", 6)
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in asked} == {("m", 0.7, 8)}
    assert len({body["seed"] for body in asked}) == 30
    empty = sum(body["seed"] % 3 == 0 for body in asked)
    assert f"{empty} empty" in said
    assert sum(len(row["responses"]) for row in rows) <= 30 - empty
    assert rows[0]["sources"][0]["server"] == address


def test_a_server_that_is_gone_is_one_line(run: Path, tmp_path: Path) -> None:
    said = sample(run, tmp_path, "--model", "http://127.0.0.1:9/v1#m", code=2)[1]
    assert "ConnectError; the same command goes on where it stopped" in said
