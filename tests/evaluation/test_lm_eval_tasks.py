"""Tasks of lm-evaluation-harness from local files, without a network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from pipeline.errors import UserError
from pipeline.evaluation.lm_eval_tasks import require_lm_eval, task_scores

import pytest

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}} A:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
num_fewshot: 1
fewshot_split: test
metric_list:
  - {metric: acc}
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_package_there_is_a_remedy() -> None:
    with pytest.raises(UserError, match="pip install lm-eval"):
        require_lm_eval()


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
def test_every_stage_takes_local_tasks(chain: Path, tmp_path: Path) -> None:
    rows = [{"question": f"what is {i}?", "choices": ["one", "two", "three"], "answer": i % 3} for i in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "capitals.yaml").write_text(TASK.replace("FILE", str(data)), encoding="utf-8")
    notes: list[str] = []
    found = task_scores(chain, ["sft", "ppo"], ["capitals"], str(tmp_path), notes)
    assert not notes
    assert set(found["capitals"]) == {"sft", "ppo"}
    assert all(0 <= values["acc"] <= 1 and values["acc_stderr"] > 0 for values in found["capitals"].values())
    with pytest.raises(UserError, match="lm-eval knows no 'nothing'"):
        task_scores(chain, ["sft"], ["nothing"], str(tmp_path), notes)
    data.unlink()
    silent = "task: silent\noutput_type: multiple_choice\n"
    (tmp_path / "silent.yaml").write_text(silent + "dataset_path: json\ntest_split: test\n", encoding="utf-8")
    assert task_scores(chain, ["sft"], ["silent"], str(tmp_path), notes) == {}
    assert [note for note in notes if note.startswith("lm-eval: silent of sft was not measured: ")]
