"""The comparison of paired runs: what it runs, reads and reuses, mean, spread and differences; no model is trained."""

import json
import subprocess

import pytest
import yaml

from benchmarks import paired_runs


R1 = {("with", 0): 10.0, ("with", 1): 14.0, ("without", 0): 9.0, ("without", 1): 11.0}
ARMS = ["--arm", "with: --region_features paper", "--arm", "without: --region_weight 0"]


@pytest.fixture
def runs(monkeypatch):
    """Commands that were run, each leaving what train_pretrain.py leaves."""
    commands = []

    def run(command, **options):
        commands.append(command)
        recipe = resolved(command)
        folder = paired_runs.ROOT / recipe["output_dir"]
        (folder / "final").mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        arm = "without" if recipe["region_weight"] == 0 else "with"
        ranking = {"R1": R1[arm, recipe["seed"]], "R5": 50.0, "R10": 60.0, "mAP": 20.0, "mINP": 5.0}
        records = [{"step": 1, "loss": 2.0}, {"step": 2, "validation": {"similarity": ranking, "reranked": ranking}}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(paired_runs.subprocess, "run", run)
    monkeypatch.chdir(paired_runs.ROOT)
    return commands


def resolved(command):
    import train_pretrain
    from mra.common.arguments import parse_arguments, resolved_recipe

    return resolved_recipe(*parse_arguments(train_pretrain.THEMES, argv=command[command.index("--config") :]))


def test_table_and_json(runs, tmp_path, capsys):
    arguments = [*ARMS, "--seeds", "0", "1", "--common", "--num_train_epochs 3", "--output_dir", str(tmp_path)]
    paired_runs.main(arguments)
    assert len(runs) == 4 and runs[0][1:4] == ["-m", "accelerate.commands.launch", "--config_file"]
    assert [resolved(command)["num_train_epochs"] for command in runs] == [3] * 4
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["arms"]["without"] == "--region_weight 0" and result["seeds"] == [0, 1]
    assert result["results"]["with"]["similarity"]["R1"] == {
        "mean": 12.0,
        "deviation": pytest.approx(8**0.5),
        "values": [10.0, 14.0],
    }
    assert result["differences"]["with - without"]["reranked"]["R1"]["values"] == [1.0, 3.0]
    assert any(line.startswith("with - without, similarity") and "2.00 ± 1.41" in line for line in lines)


def test_only_runs_of_the_same_settings_are_reused(runs, tmp_path):
    arguments = [*ARMS, "--seeds", "0", "1", "--output_dir", str(tmp_path), "--reuse"]
    paired_runs.main(arguments)
    paired_runs.main(arguments)
    assert len(runs) == 4
    paired_runs.main([*arguments, "--common", "--data_fraction 0.5"])
    assert len(runs) == 8
    paired_runs.main([*arguments[:-1], "--common", "--data_fraction 0.5"])
    assert len(runs) == 12


def test_options_may_name_arm_and_seed(runs, tmp_path):
    common = "--validation_dataset sets/{arm}/{seed}"
    paired_runs.main([*ARMS, "--seeds", "1", "--common", common, "--output_dir", str(tmp_path)])
    assert [resolved(command)["validation_dataset"] for command in runs] == ["sets/with/1", "sets/without/1"]


@pytest.mark.parametrize("arm", ["--region_weight 0", ": --region_weight 0", "a/b: --region_weight 0"])
def test_an_arm_needs_a_name(arm, capsys):
    with pytest.raises(SystemExit):
        paired_runs.main(["--arm", arm])
    assert "expected 'NAME: OPTIONS'" in capsys.readouterr().err


def test_arms_of_one_name_are_refused(capsys):
    with pytest.raises(SystemExit):
        paired_runs.main(["--arm", "a: --region_weight 0", "--arm", "a: --region_weight 1"])
    assert "names must differ" in capsys.readouterr().err


def test_a_failed_run_ends_the_comparison(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "the reason")
    monkeypatch.setattr(paired_runs.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(SystemExit, match="the reason"):
        paired_runs.main([*ARMS, "--seeds", "0", "--output_dir", str(tmp_path)])
