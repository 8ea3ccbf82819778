"""benchmarks/startup.py: what a process of its own costs, and what a failed one says."""

import json

import pytest

from benchmarks import startup


def test_the_cost_is_that_of_the_process():
    busy = "import time\nwhile time.process_time() < {}: pass"
    short, long = (startup.cpu_seconds(["-c", busy.format(seconds)], 1) for seconds in (0.1, 0.4))
    assert 0.1 <= short < long and 0.2 <= long - short <= 0.4


def test_a_failed_command_is_named():
    with pytest.raises(ValueError, match=r"`python -m mra serch` failed: mra: error: unknown verb 'serch'"):
        startup.cpu_seconds(["-m", "mra", "serch"], 1)


def test_every_command_is_timed(monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(startup, "cpu_seconds", lambda command, threads: commands.append(command) or len(commands))
    startup.main(["--gallery", "g.db", "--repeats", "2", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    count = len(commands) // 2
    assert commands[:count] == commands[count:]  # interleaved
    assert found["search with onnx"] == (count - 1 + 2 * count - 1) / 2
    assert {"mra --help", "mra index build --help", "train_pretrain.py --help", "import torch"} <= set(found)
