"""eval_retrieval.py through its command line, with one process and with two."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import eval_retrieval
from modeling_mra import MRAForPreTraining
from mra_retrieval import RerankDepth
from tests.retrieval_helpers import tiny_dataset, tiny_model, tiny_processor


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model saved from pretraining with its processor, and a Parquet dataset with two splits."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model(MRAForPreTraining).save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    tiny_dataset(num_ids=8).to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    tiny_dataset(num_ids=2).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return folder


def flags(folders, output, *more):
    return ["--model", str(folders / "model"), "--dataset", str(folders / "data"), "--output_dir", str(output), *more]


OPTIONS = ("--rerank_k", "5", "--batch_size", "3", "--rerank_batch_size", "4", "--num_workers", "0", "--save_scores")


@pytest.fixture(scope="module")
def single_process(folders):
    output = folders / "one"
    eval_retrieval.main(flags(folders, output, *OPTIONS))
    return output


def test_writes_table_metrics_and_picture(folders, single_process, capsys):
    eval_retrieval.main(flags(folders, single_process, *OPTIONS, "--num_queries_in_picture", "3"))
    printed = capsys.readouterr().out
    assert "8 identities, 16 images, 24 captions; top 5 re-ranked, single fusion; 1 process(es)" in printed
    assert "R@1     R@5    R@10     mAP    mINP" in printed
    report = json.loads((single_process / "metrics.json").read_text())
    for kind in ("similarity", "reranked"):
        assert list(report[kind]) == ["R1", "R5", "R10", "mAP", "mINP"]
        assert f"{kind:<10}{report[kind]['R1']:8.2f}" in printed
    assert report["counts"] == {"identities": 8, "images": 16, "captions": 24}
    assert report["rerank_k"] == 5 and report["arguments"]["rerank_k"] == 5
    assert report["timings"]["rerank"] > 0 and torch.__version__.startswith(report["versions"]["torch"])
    scores = load_file(single_process / "scores.safetensors")
    assert scores["reranked"].shape == scores["similarity"].shape == (24, 16)
    with Image.open(single_process / "ranking.png") as picture:
        assert picture.width > 1000 and picture.height > 600
    assert sorted(path.name for path in single_process.iterdir()) == [
        "metrics.json",
        "ranking.png",
        "scores.safetensors",
    ]


def test_two_processes_give_the_same_numbers(folders, single_process):
    output = folders / "two"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "eval_retrieval.py", *flags(folders, output, *OPTIONS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (single_process, output))
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert (one["similarity"], one["reranked"]) == (two["similarity"], two["reranked"])
    scores, same = (load_file(folder / "scores.safetensors") for folder in (single_process, output))
    assert scores.keys() == same.keys()
    for name, tensor in scores.items():
        assert torch.equal(tensor, same[name]), name
    assert done.stdout.count("mINP") == 1  # only the main process prints


@pytest.fixture
def with_validation(folders, tmp_path):
    """A model folder of one's own, and data that has a validation split."""
    shutil.copytree(folders / "model", tmp_path / "model")
    shutil.copytree(folders / "data", tmp_path / "data")
    tiny_dataset(num_ids=5, seed=1).to_parquet(str(tmp_path / "data" / "validation-00000-of-00001.parquet"))
    return tmp_path


def test_depth_is_chosen_once_on_validation_and_kept_with_the_model(with_validation, capsys):
    more = ("--rerank_k", "auto", "--num_workers", "0", "--num_queries_in_picture", "0")
    eval_retrieval.main(flags(with_validation, with_validation / "one", *more))
    first = capsys.readouterr().out
    depth = RerankDepth.load(str(with_validation / "model"))
    assert depth.gallery_size == 10 and max(depth.tried) == 10 and depth.chosen_on.endswith("data validation")
    report = json.loads((with_validation / "one" / "metrics.json").read_text())
    assert report["rerank_k"] == report["rerank_depth"]["rerank_k"] == depth.rerank_k
    assert f"top {depth.rerank_k} re-ranked" in first and depth.describe() in first

    (with_validation / "data" / "validation-00000-of-00001.parquet").unlink()
    eval_retrieval.main(flags(with_validation, with_validation / "two", *more))  # chosen already
    assert depth.describe() in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match="no choice is saved for --score_fusion published --flip, and there is no valida"
    ):
        eval_retrieval.main(flags(with_validation, with_validation / "three", *more, "--score_fusion", "published"))


def test_similarity_alone_without_picture(folders, tmp_path, capsys):
    more = ("--rerank_k", "0", "--num_queries_in_picture", "0", "--num_workers", "0", "--no_flip")
    eval_retrieval.main(flags(folders, tmp_path / "out", *more))
    assert "no re-ranking" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "reranked" not in report and report["arguments"]["flip"] is False
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_attention_and_precision(folders, single_process, tmp_path, attn_implementation):
    more = ("--attn_implementation", attn_implementation, "--dtype", "bfloat16", "--score_fusion", "published")
    eval_retrieval.main(flags(folders, tmp_path, *OPTIONS, *more))
    half, exact = (load_file(folder / "scores.safetensors")["similarity"] for folder in (tmp_path, single_process))
    torch.testing.assert_close(half, exact, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "{}/absent"), "model .*absent is neither a folder with a config"),
        (("--model", "{}/bert"), "model_type 'bert', expected 'mra_retrieval'"),
        (("--model", "{}/bare"), "model .*bare has no MRA processor"),
        (("--dataset", "{}/absent"), "--dataset .*absent is neither a folder nor a dataset on the Hub"),
        (("--dataset", "{}/bert"), "--dataset .*bert is a folder that load_dataset cannot read"),
        (("--split", "validation"), "--split validation is not in .*: expected one of train, test"),
        (("--rerank_k", "many"), "--rerank_k must be a number, 0 or more, or auto, got 'many'"),
        (("--rerank_k", "auto"), "there is no validation split to choose on"),
        (("--rerank", "3"), "not used by the HfArgumentParser"),
        (("--unknown", "3"), "not used by the HfArgumentParser"),
    ],
)
def test_mistakes_are_named(folders, tmp_path, capsys, change, message):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    if "bare" in change[1]:
        tiny_model().save_pretrained(tmp_path / "bare")
    change = [part.format(tmp_path) for part in change]
    with pytest.raises(SystemExit) as stopped:
        eval_retrieval.main(flags(folders, tmp_path / "out", *change))
    assert re.search(message, f"{stopped.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


def test_interrupted_write_leaves_the_old_file(folders, single_process, monkeypatch):
    before = (single_process / "metrics.json").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        eval_retrieval.main(flags(folders, single_process, *OPTIONS))
    assert (single_process / "metrics.json").read_bytes() == before
    assert not [path for path in single_process.iterdir() if path.name.startswith(".")]


def test_unconnected_processes_are_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched but 1 is connected"):
        eval_retrieval.main(flags(folders, tmp_path))
