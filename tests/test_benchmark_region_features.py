"""The comparison of region features: what it runs and reads, mean, spread and differences; no model is trained."""

import json
import subprocess

import pytest
import yaml

from benchmarks import region_features


R1 = {("paper", 0): 10.0, ("paper", 1): 14.0, ("none", 0): 9.0, ("none", 1): 11.0}


@pytest.fixture
def runs(monkeypatch):
    """Commands that were run, each leaving what train_pretrain.py leaves."""
    commands = []

    def run(command, **options):
        commands.append(command)
        themes = resolved(command)
        folder = region_features.ROOT / themes["output_dir"]
        (folder / "final").mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(themes))
        choice = "none" if themes["region_weight"] == 0 else themes["region_features"]
        ranking = {"R1": R1[choice, themes["seed"]], "R5": 50.0, "R10": 60.0, "mAP": 20.0, "mINP": 5.0}
        records = [{"step": 1, "loss": 2.0}, {"step": 2, "validation": {"similarity": ranking, "reranked": ranking}}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(region_features.subprocess, "run", run)
    return commands


def resolved(command):
    import train_pretrain
    from mra_training.arguments import parse_arguments, resolved_recipe

    return resolved_recipe(*parse_arguments(train_pretrain.THEMES, argv=command[command.index("--config") :]))


def test_table_and_json(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(region_features.ROOT)
    arguments = ["--choices", "paper", "none", "--seeds", "0", "1", "--epochs", "3", "--output_dir", str(tmp_path)]
    region_features.main(arguments)
    assert len(runs) == 4 and runs[0][1:4] == ["-m", "accelerate.commands.launch", "--config_file"]
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["settings"]["num_train_epochs"] == 3 and result["seeds"] == [0, 1]
    paper = result["results"]["paper"]["similarity"]["R1"]
    assert paper == {"mean": 12.0, "deviation": pytest.approx(8**0.5), "values": [10.0, 14.0]}
    assert result["differences"]["paper - none"]["reranked"]["R1"]["values"] == [1.0, 3.0]
    assert any(line.startswith("paper - none, similarity") and "2.00 ± 1.41" in line for line in lines)

    region_features.main([*arguments, "--reuse"])
    assert len(runs) == 4
    region_features.main([*arguments, "--reuse", "--data_fraction", "0.5"])
    assert len(runs) == 8


def test_a_failed_run_ends_the_comparison(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "the reason")
    monkeypatch.setattr(region_features.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(SystemExit, match="the reason"):
        region_features.main(["--seeds", "0", "--output_dir", str(tmp_path)])
