"""eval_retrieval.py through its command line, with one process and with two."""

import dataclasses
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
from mra.cli import main
from mra.common.arguments import parse_arguments
from mra.common.loading import load_model
from mra.common.weight_files import weights_digest
from mra.retrieval import RetrievalChoice, choose_retrieval, evaluate_retrieval
from mra.retrieval.arguments import EVALUATION
from mra.retrieval.evaluation_files import changed_files, read_queries
from mra.retrieval.matrix import find_unfinished, list_cells
from mra.retrieval.score_fusion import fusion_name
from tests.helpers.retrieval import tiny_dataset, tiny_model, tiny_processor
from tests.retrieval.test_retrieval_choice import OLD


ROOT = Path(__file__).parents[2]


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
    assert "8 identities, 16 images, 24 captions; top 5 re-ranked, published fusion; 1 process(es)" in printed
    assert "R@1     R@5    R@10     mAP    mINP" in printed
    report = json.loads((single_process / "metrics.json").read_text())
    for kind, label in (("similarity", "similarity"), ("reranked", "reranked (published, k 5)")):
        assert list(report[kind]) == ["R1", "R5", "R10", "mAP", "mINP"]
        assert f"{label:<25}{report[kind]['R1']:8.2f}" in printed
    assert (report["score_fusion"], report["match_weight"], report["flip"]) == ("published", None, True)
    assert report["counts"] == {"identities": 8, "images": 16, "captions": 24}
    assert report["rerank_k"] == 5 and report["arguments"]["rerank_k"] == 5
    assert report["timings"]["rerank"] > 0 and torch.__version__.startswith(report["versions"]["torch"])
    scores = load_file(single_process / "scores.safetensors")
    assert scores["reranked"].shape == scores["similarity"].shape == (24, 16)
    with Image.open(single_process / "ranking.png") as picture:
        assert picture.width > 1000 and picture.height > 600
    names = ["metrics.json", "queries.parquet", "ranking.png", "scores.safetensors"]
    assert sorted(path.name for path in single_process.iterdir()) == names
    assert list(report["files"]) == ["queries.parquet", "scores.safetensors", "ranking.png"]
    assert changed_files(single_process, report) == []


def test_writes_the_results_of_each_query(folders, single_process):
    report = json.loads((single_process / "metrics.json").read_text())
    table = read_queries(single_process, report)
    split = tiny_dataset(num_ids=8)
    assert table["query"].to_pylist() == list(range(24))
    for number, (row, caption, identity) in enumerate(
        zip(*(table[name].to_pylist() for name in ("row", "caption", "identity")), strict=True)
    ):
        assert caption in split[row]["captions"] and identity == split[row]["image_id"], number
    scores = load_file(single_process / "scores.safetensors")
    for ranking in ("similarity", "reranked"):
        order = scores[ranking].argsort(dim=1, descending=True, stable=True)
        right = scores["gallery_ids"][order] == scores["query_ids"][:, None]
        first = (right.int().argmax(dim=1) + 1).tolist()
        assert table[f"{ranking}_first_rank"].to_pylist() == first
        assert report[ranking]["R5"] == pytest.approx(100 * sum(rank <= 5 for rank in first) / 24)
        for metric, name in (("mAP", "average_precision"), ("mINP", "inverse_negative_penalty")):
            mean = sum(table[f"{ranking}_{name}"].to_pylist()) / 24
            assert report[ranking][metric] == pytest.approx(100 * mean)


def evaluate_with_two_processes(*arguments):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "eval_retrieval.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_give_the_same_choice_and_numbers(with_validation):
    """A matrix of two models, of which the second was evaluated by one process."""
    one, two, other = with_validation / "one", with_validation / "two", with_validation / "other"
    shutil.copytree(with_validation / "model", other)
    arguments = ["--matrix", *flags(with_validation, one, *OPTIONS)]
    arguments.insert(arguments.index("--dataset"), str(other))
    saved = with_validation / "model" / "retrieval.json"
    eval_retrieval.main(arguments)
    choice = saved.read_text()
    shutil.copytree(one, two)
    shutil.rmtree(two / "model" / "data")
    saved.unlink()
    done = evaluate_with_two_processes(*(str(two) if word == str(one) else word for word in arguments))
    assert saved.read_text() == choice
    assert (one / "matrix.md").read_text() == (two / "matrix.md").read_text()
    reports = [json.loads((folder / "model" / "data" / "metrics.json").read_text()) for folder in (one, two)]
    assert [report["num_processes"] for report in reports] == [1, 2]
    for name in ("similarity", "reranked", "score_fusion", "match_weight", "choice", "inputs"):
        assert reports[0][name] == reports[1][name]
    one, two = one / "model" / "data", two / "model" / "data"
    assert read_queries(one, reports[0]) == read_queries(two, reports[1])
    scores, same = (load_file(folder / "scores.safetensors") for folder in (one, two))
    assert scores.keys() == same.keys()
    for name, tensor in scores.items():
        assert torch.equal(tensor, same[name]), name
    assert done.stdout.count("mINP") == 2  # only the main process prints


@pytest.fixture
def with_validation(folders, tmp_path):
    """A model folder of one's own, and data that has a validation split."""
    shutil.copytree(folders / "model", tmp_path / "model")
    shutil.copytree(folders / "data", tmp_path / "data")
    tiny_dataset(num_ids=5, seed=1).to_parquet(str(tmp_path / "data" / "validation-00000-of-00001.parquet"))
    return tmp_path


QUICK = ("--rerank_k", "5", "--num_workers", "0", "--num_queries_in_picture", "0")


def evaluate(world, name, capsys, *more):
    """Printed lines and metrics.json of an evaluation of `world`'s model and data."""
    eval_retrieval.main(flags(world, world / name, *QUICK, *more))
    return capsys.readouterr().out, json.loads((world / name / "metrics.json").read_text())


def test_fusion_is_chosen_once_on_validation_and_kept_with_the_model(with_validation, capsys):
    first, report = evaluate(with_validation, "one", capsys)
    saved = with_validation / "model" / "retrieval.json"
    choice = RetrievalChoice.load(str(with_validation / "model"))
    validation = tiny_dataset(num_ids=5, seed=1)
    model = load_model(str(with_validation / "model"))
    result = evaluate_retrieval(model, tiny_processor(), validation, rerank_k=5)
    chosen = choose_retrieval(result, f"{with_validation / 'data'} validation")
    assert choice == dataclasses.replace(chosen, weights=weights_digest(with_validation / "model"))
    assert report["choice"] == json.loads(saved.read_text())
    assert (report["score_fusion"], report["match_weight"]) == (choice.score_fusion, choice.match_weight)
    assert f"reranked ({choice.fusion}, k 5)" in first and choice.describe() in first

    written = saved.stat().st_mtime_ns
    (with_validation / "data" / "validation-00000-of-00001.parquet").unlink()
    second, again = evaluate(with_validation, "two", capsys)  # chosen already
    assert choice.describe() in second and saved.stat().st_mtime_ns == written
    assert again["reranked"] == report["reranked"] and again["notes"] == []
    _, half = evaluate(with_validation, "half", capsys, "--dtype", "bfloat16")
    assert half["notes"] == ["score fusion and weight were chosen in float32 and are applied in bfloat16"]


def test_a_choice_of_other_weights_is_not_applied(with_validation, capsys, caplog):
    evaluate(with_validation, "one", capsys)
    tiny_model(seed=1).save_pretrained(with_validation / "model")
    (with_validation / "data" / "validation-00000-of-00001.parquet").unlink()
    _, report = evaluate(with_validation, "two", capsys)
    assert "it was chosen with other weights than the current ones of" in caplog.text
    assert report["choice"] is None and report["score_fusion"] == "published"
    assert any("was not chosen on data" in warning for warning in report["warnings"])


def test_a_named_fusion_overrules_what_is_saved(with_validation, capsys):
    evaluate(with_validation, "one", capsys)
    saved = RetrievalChoice.load(str(with_validation / "model"))
    printed, report = evaluate(with_validation, "two", capsys, "--score_fusion", "posterior", "--match_weight", "0.7")
    assert "top 5 re-ranked, posterior 0.7 fusion" in printed
    assert f"note: --score_fusion overrides the choice saved with the model: {saved.describe()}" in printed
    assert (report["score_fusion"], report["match_weight"], report["choice"]) == ("posterior", 0.7, None)
    assert RetrievalChoice.load(str(with_validation / "model")) == saved


def test_what_was_chosen_for_something_else_is_not_applied(with_validation, capsys):
    """A file of the depth alone is replaced; one for other views is kept, and the new choice goes to the output folder."""
    model = with_validation / "model"
    (model / "retrieval.json").write_text(json.dumps(OLD))
    printed, _ = evaluate(with_validation, "one", capsys)
    assert f"note: retrieval.json of {model} is not applied: its fusion single was given, not chosen" in printed
    choice = RetrievalChoice.load(str(model))
    assert choice.compares_fusions and choice.flip
    printed, report = evaluate(with_validation, "two", capsys, "--no_flip")
    assert "is not applied: it was chosen with mirror images" in printed
    assert f"the choice is saved in {with_validation / 'two' / 'retrieval.json'}" in printed
    assert report["choice"]["flip"] is False and RetrievalChoice.load(str(model)) == choice


def test_depth_is_chosen_for_the_chosen_fusion(with_validation, capsys):
    more = ("--rerank_k", "auto")
    printed, report = evaluate(with_validation, "one", capsys, *more)
    choice = RetrievalChoice.load(str(with_validation / "model"))
    assert choice.gallery_size == 10 and max(choice.tried) == 10 and choice.chosen_on.endswith("data validation")
    assert report["rerank_k"] == report["choice"]["rerank_k"] == choice.rerank_k
    assert f"top {choice.rerank_k} re-ranked" in printed and choice.describe_depth() in printed
    (with_validation / "data" / "validation-00000-of-00001.parquet").unlink()
    printed, _ = evaluate(with_validation, "two", capsys, *more)
    assert choice.describe_depth() in printed
    other = next(name for name in ("published", "single") if name != choice.score_fusion)
    with pytest.raises(
        SystemExit,
        match=f"no choice is saved with model .* for --score_fusion {other} --flip, and .*data has no valida",
    ):
        evaluate(with_validation, "three", capsys, *more, "--score_fusion", other)


def test_without_validation_the_published_fusion_is_taken_and_said_not_to_be_chosen(folders, tmp_path, capsys):
    shutil.copytree(folders / "model", tmp_path / "model")
    shutil.copytree(folders / "data", tmp_path / "data")
    printed, report = evaluate(tmp_path, "one", capsys)
    assert "warning: score fusion published was not chosen on data: no matching choice is saved" in printed
    assert (report["score_fusion"], report["choice"]) == ("published", None)
    assert report["warnings"][0].endswith("evaluate the model once on a dataset that has one, or name --score_fusion")
    assert not (tmp_path / "model" / "retrieval.json").exists()
    printed, report = evaluate(tmp_path, "two", capsys, "--score_fusion", "posterior")
    assert "score fusion posterior 1 was not chosen on data" in printed and report["match_weight"] == 1.0
    printed, _ = evaluate(tmp_path, "three", capsys, "--score_fusion", "published")
    assert "not chosen" not in printed


def test_a_model_folder_that_cannot_be_written_loses_no_choice(with_validation, capsys, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if Path(target).parent.name == "model":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    printed, report = evaluate(with_validation, "one", capsys)
    path = with_validation / "one" / "retrieval.json"
    assert f"model cannot be written (Permission denied): the choice is saved in {path}" in printed
    names = ["metrics.json", "queries.parquet", "retrieval.json"]
    assert sorted(file.name for file in (with_validation / "one").iterdir()) == names
    assert not [file for file in (with_validation / "model").iterdir() if "retrieval.json" in file.name]

    (with_validation / "data" / "validation-00000-of-00001.parquet").unlink()
    printed, again = evaluate(with_validation, "one", capsys)  # found in the output folder
    assert again["choice"] == report["choice"] | {"model": str(with_validation / "model")}
    assert again["warnings"] == report["warnings"]
    shutil.copytree(with_validation / "model", with_validation / "other")
    printed, report = evaluate(with_validation, "one", capsys, "--model", str(with_validation / "other"))
    assert "was not chosen on data" in printed  # it was another model's


def test_reranking_below_similarity_is_warned_of(with_validation, capsys):
    """On the split that the fusion is chosen on, and in the table; random weights rank by chance."""
    printed, report = evaluate(with_validation, "one", capsys, "--score_fusion", "single")
    lower = report["reranked"]["R1"] < report["similarity"]["R1"] or (
        report["reranked"]["mAP"] < report["similarity"]["mAP"]
    )
    warning = "re-ranking is below similarity alone: "
    assert lower and report["warnings"][0].startswith(warning) and f"warning: {report['warnings'][0]}" in printed
    printed, report = evaluate(with_validation, "two", capsys, "--split", "validation")
    assert "this is the split that the fusion was chosen on" in printed


def test_similarity_alone_without_picture(folders, tmp_path, capsys):
    more = ("--rerank_k", "0", "--num_queries_in_picture", "0", "--num_workers", "0", "--no_flip")
    eval_retrieval.main(flags(folders, tmp_path / "out", *more))
    assert "no re-ranking" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "reranked" not in report and report["arguments"]["flip"] is False
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "queries.parquet"]


def test_failures_are_the_worst_query_of_each_person(folders, tmp_path):
    more = ("--rerank_k", "5", "--num_workers", "0", "--num_failures_in_picture", "3", "--num_queries_in_picture", "0")
    eval_retrieval.main(flags(folders, tmp_path, *more))
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert list(report["files"]) == ["queries.parquet", "failures.png"]
    with Image.open(tmp_path / "failures.png") as picture:
        assert picture.height > 600
    split = tiny_dataset(num_ids=8)
    result = evaluate_retrieval(load_model(str(folders / "model")), tiny_processor(), split, rerank_k=5)
    precision, people = result.queries["reranked"].average_precision.tolist(), result.query_ids.tolist()
    worst = eval_retrieval.worst_queries(result, 5)
    assert len({people[query] for query in worst}) == 5 == len(worst)
    assert [precision[query] for query in worst] == sorted(precision[query] for query in worst)
    for person, query in ((people[query], query) for query in worst):
        assert precision[query] == min(
            value for value, other in zip(precision, people, strict=True) if other == person
        )
    assert len(eval_retrieval.worst_queries(result, 100)) == 8 and eval_retrieval.worst_queries(result, 0) == []


def test_image_to_text_is_reported_apart(folders, tmp_path, capsys):
    more = ("--rerank_k", "0", "--num_queries_in_picture", "0", "--num_workers", "0", "--image_to_text")
    eval_retrieval.main(flags(folders, tmp_path, *more))
    _, printed = capsys.readouterr().out.split("image to text: 16 images as queries to 24 captions\n")
    metrics = json.loads((tmp_path / "metrics.json").read_text())["image_to_text"]
    assert f"similarity{metrics['R1']:8.2f}{metrics['R5']:8.2f}" in printed
    main(["compare", f"a={tmp_path}"])
    assert len(capsys.readouterr().out.splitlines()) == 4  # the table of the standard protocol alone


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
        (("--dataset", "{}/absent"), "--dataset .*absent does not exist; expected a dataset"),
        (("--dataset", "{}/bert"), "--dataset .*bert is a folder without data"),
        (("--split", "validation"), "--dataset .* has no split validation: expected one of train, test"),
        (("--rerank_k", "many"), "`--rerank_k` must be of type int or one of auto, got 'many'"),
        (("--rerank_k", "auto"), "has no validation split to choose on"),
        (
            ("--match_weight", "0.4"),
            "`score_fusion` must be posterior with match_weight, which no other fusion has, got 'auto'",
        ),
        (
            ("--score_fusion", "posterior", "--match_weight", "-1"),
            "`match_weight` must be 0 or more, or left out, got -1",
        ),
        (("--num_failures_in_picture", "-1"), "`num_failures_in_picture` must be 0 or more, got -1"),
        (("--rerank", "3"), "unknown argument '--rerank'; did you mean '--rerank_k'"),
        (("--unknown", "3"), "unknown argument '--unknown'"),
        (("--model", "a", "b"), r"`model` must be one model, or several with --matrix, got \['a', 'b'\]"),
        (
            ("--matrix", "--dataset", "x/a", "y/a"),
            "'y/a' has the name 'a', which x/a has too: give each its own, as in NAME=y/a",
        ),
        (
            ("--matrix", "--model", "x=a", "x=b"),
            "'x=b' has the name 'x', which a has too: give each its own, as in NAME=b",
        ),
        (("--matrix", "--model", ".x=a"), "a name that does not begin with a dot"),
        (("--matrix", "--model"), "`model` must be a model or several, got"),
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
    with pytest.raises(SystemExit, match="`WORLD_SIZE` is 2 but the process group has 1"):
        eval_retrieval.main(flags(folders, tmp_path))


# ---------------------------------------------------------------- several models and datasets


@pytest.fixture
def models_and_sets(with_validation):
    """Two models in folders of training runs, and two datasets, one of them without a validation split."""
    for seed, name in enumerate(("one", "two")):
        folder = with_validation / "runs" / name / "best"
        tiny_model(seed=seed).save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
    shutil.copytree(with_validation / "data", with_validation / "other")
    (with_validation / "other" / "validation-00000-of-00001.parquet").unlink()
    tiny_dataset(num_ids=3, seed=2).to_parquet(str(with_validation / "other" / "test-00000-of-00001.parquet"))
    return with_validation


def matrix_flags(world, *more):
    models = [str(world / "runs" / name / "best") for name in ("one", "two")]
    words = ["--matrix", "--model", *models, "--dataset", str(world / "data"), f"small={world / 'other'}"]
    return [*words, "--output_dir", str(world / "matrix"), *QUICK, *more]


def evaluated(capsys):
    """The pairs that a matrix evaluated, by what it printed, and all of it."""
    printed = capsys.readouterr().out
    return re.findall(r"^(\w+ on \w+)$", printed, re.M), printed


ALL = ["one on data", "one on small", "two on data", "two on small"]


def test_matrix_is_made_of_single_evaluations(models_and_sets, capsys):
    world = models_and_sets
    eval_retrieval.main(matrix_flags(world))
    pairs, printed = evaluated(capsys)
    assert pairs == ALL
    table = (world / "matrix" / "matrix.md").read_text()
    assert table in printed and f"wrote {world / 'matrix' / 'matrix.md'}" in printed
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")
    ]
    assert rows[0] == ["model", "evaluated on", "ranking", "R@1", "R@5", "R@10", "mAP", "mINP"]
    for number, (model, dataset) in enumerate((("one", "data"), ("one", "small"), ("two", "data"), ("two", "small"))):
        alone = world / "alone"
        path = world / ("data" if dataset == "data" else "other")
        single = ["--model", str(world / "runs" / model / "best"), "--dataset", str(path), "--output_dir", str(alone)]
        eval_retrieval.main([*single, *QUICK])
        reports = [
            json.loads((folder / "metrics.json").read_text()) for folder in (alone, world / "matrix" / model / dataset)
        ]
        for report in reports:
            del report["timings"], report["arguments"]["output_dir"]
        assert reports[0] == reports[1]
        fusion = fusion_name(report["score_fusion"], report["match_weight"])
        for offset, (ranking, label) in enumerate((("similarity",) * 2, ("reranked", f"reranked ({fusion}, k 5)"))):
            figures = [f"{report[ranking][metric]:.2f}" for metric in ("R1", "R5", "R10", "mAP", "mINP")]
            assert rows[2 + 2 * number + offset] == [model, dataset, label, *figures]


def test_matrix_repeats_what_is_not_finished(models_and_sets, capsys, caplog):
    """After a stop at any point, and after a change of model, data, options, choice or written files."""
    world = models_and_sets
    eval_retrieval.main(matrix_flags(world))
    evaluated(capsys)
    cell, model, small = world / "matrix" / "two" / "data", world / "runs" / "two" / "best", world / "other"

    def unfinished(*more):
        caplog.clear()
        cells = list_cells(*parse_arguments(EVALUATION, argv=matrix_flags(world, *more)))
        return [f"{cell.model} on {cell.dataset}" for cell in find_unfinished(cells)]

    caplog.set_level("INFO")
    assert unfinished() == unfinished("--num_workers", "1") == []
    assert f"two on data: finished already in {cell}" in caplog.text
    assert (
        unfinished("--no_flip", "--rerank_k", "0") == ALL
        and "again: another --rerank_k, another --flip" in caplog.text
    )
    report = json.loads((cell / "metrics.json").read_text())
    for changes, reason in (
        ({"files": None}, "it was stopped before all files were written"),
        ({"versions": {"torch": "1.0"}}, "again: other versions of the libraries"),
        ({"similarity": report["similarity"] | {"R1": 99.0}}, "again: another metrics.json than it wrote, or none"),
        ({"choice": None}, "again: another choice of fusion or depth would be applied now"),
    ):
        changed = {name: value for name, value in (report | changes).items() if value is not None or name == "choice"}
        (cell / "metrics.json").write_text(json.dumps(changed))
        assert unfinished() == ["two on data"] and reason in caplog.text
    (cell / "metrics.json").write_text(json.dumps(report))
    for path, change, pairs, reason in (
        (cell / "metrics.json", None, ["two on data"], "two on data: to be evaluated"),
        (cell / "queries.parquet", None, ["two on data"], "again: another queries.parquet than it wrote, or none"),
        (cell / "queries.parquet", b"other", ["two on data"], "again: another queries.parquet than it wrote, or none"),
        (model / "tokenizer_config.json", b" ", ["two on data", "two on small"], "again: other model"),
        (model / "model.safetensors", b" ", ["two on data", "two on small"], "again: other model"),
        (model / "retrieval.json", None, ["two on data", "two on small"], "again: another choice of fusion or depth"),
    ):
        content = path.read_bytes()
        path.unlink()
        if change is not None:
            path.write_bytes(content + change)
        assert unfinished() == pairs and reason in caplog.text, path
        path.write_bytes(content)
    assert unfinished() == []
    tiny_dataset(num_ids=3, seed=3).to_parquet(str(small / "test-00000-of-00001.parquet"))
    assert unfinished() == ["one on small", "two on small"] and "again: other images, other captions" in caplog.text

    eval_retrieval.main(matrix_flags(world))
    assert evaluated(capsys)[0] == ["one on small", "two on small"] and unfinished() == []


def test_matrix_reads_everything_before_it_evaluates(models_and_sets, capsys):
    (models_and_sets / "other" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(SystemExit, match=r"--dataset .*other has no split test"):
        eval_retrieval.main(matrix_flags(models_and_sets))
    shutil.rmtree(models_and_sets / "runs" / "two")
    with pytest.raises(SystemExit, match=r"model .*two/best has no MRA processor"):
        eval_retrieval.main(matrix_flags(models_and_sets, "--dataset", str(models_and_sets / "data")))
    assert evaluated(capsys)[0] == [] and not (models_and_sets / "matrix").exists()


def test_recipe_names_one_model_or_several(models_and_sets, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    world = models_and_sets
    recipe.write_text(
        f"model: {world / 'model'}\ndataset: {world / 'other'}\noutput_dir: {tmp_path / 'out'}\nrerank_k: 0\n"
    )
    eval_retrieval.main(["--config", str(recipe), "--num_workers", "0", "--num_queries_in_picture", "0"])
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_models_are_compared_by_their_queries(models_and_sets, capsys):
    world = models_and_sets
    eval_retrieval.main(matrix_flags(world))
    evaluated(capsys)
    main(["compare", *(f"{name}={world / 'matrix' / name / 'data'}" for name in ("one", "two"))])
    printed = capsys.readouterr().out
    assert "| two - one | similarity |" in printed and "| two - one | reranked   |" in printed
    with pytest.raises(
        SystemExit, match=r"cannot be compared, because they were evaluated on other images .16 and 6."
    ):
        main(["compare", *(f"{name}={world / 'matrix' / 'one' / name}" for name in ("data", "small"))])
