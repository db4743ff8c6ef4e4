"""How a stage starts and ends as a program: exit codes, one line for each error, signals, terminals."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from helpers.launches import ROOT, environment, launch_command, lineage, tiny_flags
from pipeline.config.stages import STAGES
from pipeline.training.logs import accept_any_terminal
from pipeline.training.stage import launch

import pytest

OPTIONS = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", "--num_processes", "1"]


def wait_for_library(process: subprocess.Popen[Any], name: str) -> None:
    """Until a process has loaded a shared library."""
    deadline = time.monotonic() + 60
    while name not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("form", [["pipeline/sft.py"], ["-m", "pipeline.sft"]], ids=["file", "module"])
def test_ctrl_c_while_it_still_imports(form: list[str]) -> None:
    process = subprocess.Popen([sys.executable, *form], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_library(process, "_multiarray_umath")  # numpy, long before the stage handles signals itself
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_importing_the_package_changes_no_signal() -> None:
    code = "import signal, pipeline; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment())


def test_the_launcher_gives_the_exit_code_of_the_stage(tmp_path: Path) -> None:
    """accelerate's own command would say 1 and add a traceback."""
    script = tmp_path / "stage.py"
    for body, code in (
        ("print('fine')", 0),
        ("import sys; print('error: x', file=sys.stderr); sys.exit(2)", 2),
        ("import sys; sys.exit(143)", 143),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ):
        script.write_text(body)
        command = [sys.executable, "-m", "pipeline.training.launcher", *OPTIONS, str(script)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert ("error: x" in done.stderr) == (code == 2)


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_the_launcher_waits_for_stages_that_a_signal_ends(tmp_path: Path, processes: int) -> None:
    script = tmp_path / "stage.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def end(*_):\n    time.sleep(1)\n    print('saved', flush=True)\n    os._exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path(__file__).with_name(os.environ.get('RANK', '0')).touch()\ntime.sleep(60)\n"
    )
    options = [*OPTIONS[:-3], "--num_processes", str(processes), *(["--multi_gpu"] if processes > 1 else ["--cpu"])]
    command = [sys.executable, "-m", "pipeline.training.launcher", *options, "--main_process_port", "0", str(script)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not all((tmp_path / str(rank)).exists() for rank in range(processes)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert out.count("saved") == processes
    assert "Traceback" not in err


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def body(run: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flags = tiny_flags("sft", tmp_path, report_to=None)
    with pytest.raises(SystemExit) as ended:
        launch("sft", STAGES["sft"], body, flags)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {tmp_path / 'sft'}: no space left on its disk")


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    def body(run: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        launch("sft", STAGES["sft"], body, tiny_flags("sft", tmp_path, report_to=None))


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    accept_any_terminal()
    print("1 s · done", flush=True)
    assert raw.getvalue() == b"1 s \\xb7 done\n"


@pytest.mark.full
def test_a_finished_stage_in_two_processes_ends_cleanly(chain: Path, recipes: Path) -> None:
    """Processes that end while others still talk to them are aborted; so they part together."""
    flags = tiny_flags("sft", chain, config=recipes / "sft.yaml", report_to=None)
    assert lineage(chain / "sft")["status"] == "complete"
    for _ in range(5):
        done = subprocess.run(
            launch_command("sft", flags, 2), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "already complete" in done.stdout
        assert "SIGABRT" not in done.stderr
