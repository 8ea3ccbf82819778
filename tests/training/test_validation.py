"""The choice of the best model: by the fusion chosen on its validation, never compared with a figure measured otherwise."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState
from torch import nn

from modeling_mra import MRAForPreTraining
from mra.common.weight_files import weights_digest
from mra.retrieval import RetrievalChoice
from mra.training import validation
from mra.training.arguments import EvaluationArguments
from mra.training.checkpointing import TrainingState, save_model
from mra.training.validation import count_queries, describe_selection, record_best, selection_metric, validate
from tests.helpers.retrieval import tiny_dataset, tiny_model, tiny_processor


ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
NOT_RERANKED = SimpleNamespace(rerank_k=0)


@pytest.fixture(autouse=True)
def logging_state():
    """The loggers ask which process they are in."""
    PartialState(cpu=True)
    yield
    PartialState._reset_state()


def validated(recall: float, precision: float = 0.0, sample: str | None = None):
    metrics = {"similarity": {"R1": 1.0, "mAP": 1.0}, "reranked": {"R1": recall, "mAP": precision}}
    return SimpleNamespace(metrics=metrics, sample=sample)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def test_metrics_are_those_of_the_chosen_fusion(accelerator):
    arguments = EvaluationArguments(eval_rerank_k=6)
    dataset = tiny_dataset(num_ids=8)
    result, choice = validate(accelerator, tiny_model(), tiny_processor(), dataset, arguments, "CUHK")
    assert choice.compares_fusions and choice.chosen_on == "validation data of CUHK"
    assert (result.score_fusion, result.match_weight) == (choice.score_fusion, choice.match_weight)
    assert {name: result.metrics["reranked"][name] for name in ("R1", "mAP")} == choice.tried_fusions[choice.fusion]
    arguments = EvaluationArguments(eval_rerank_k=6, eval_score_fusion="single")
    result, choice = validate(accelerator, tiny_model(), tiny_processor(), dataset, arguments, "CUHK")
    assert result.ranking == "single, k 6" and choice.fusion == "single"
    arguments = EvaluationArguments(eval_rerank_k=0)
    result, choice = validate(accelerator, tiny_model(), tiny_processor(), dataset, arguments, "CUHK")
    assert choice is None and list(result.metrics) == ["similarity"]


def test_best_is_remembered_with_how_it_was_measured(tmp_path):
    state, arguments = TrainingState(epoch=1), EvaluationArguments()
    assert record_best(ALONE, state, validated(50.0), arguments, tmp_path)
    assert (state.best_metric, state.best_epoch) == (50.0, 1)
    assert state.best_measure == describe_selection(arguments) == "R@1 with 128 images re-ranked, score fusion auto"
    state.epoch = 2
    assert not record_best(ALONE, state, validated(50.0), arguments, tmp_path)
    resumed = TrainingState()
    resumed.load_state_dict(state.state_dict())
    assert not record_best(ALONE, resumed, validated(49.0), arguments, tmp_path)
    assert record_best(ALONE, resumed, validated(51.0), arguments, tmp_path) and resumed.best_epoch == 2


@pytest.mark.parametrize(
    ("metric", "words", "best_epoch"),
    [("R1", "R@1 with", 2), ("mAP", "mAP with", 3), ("mean", "the mean of R@1 and mAP with", 1)],
)
def test_metric_that_selects_the_best(tmp_path, metric, words, best_epoch):
    state, arguments = TrainingState(), EvaluationArguments(selection_metric=metric)
    for epoch, figures in enumerate([(60.0, 52.0), (61.0, 40.0), (20.0, 53.0)], start=1):
        state.epoch = epoch
        record_best(ALONE, state, validated(*figures), arguments, tmp_path)
    assert state.best_epoch == best_epoch and state.best_measure.startswith(words)
    assert state.best_metric == {"R1": 61.0, "mAP": 53.0, "mean": 56.0}[metric]


def test_metric_without_re_ranking_is_that_of_similarity():
    assert selection_metric({"similarity": {"R1": 7.0, "mAP": 4.0}}, "mean") == 5.5
    arguments = EvaluationArguments(selection_metric="mAP", eval_rerank_k=0)
    assert describe_selection(arguments) == "mAP by similarity alone"


@pytest.mark.parametrize(
    "change",
    [{"eval_score_fusion": "single"}, {"eval_rerank_k": 0}, {"eval_flip": False}, {"selection_metric": "mAP"}],
)
def test_figures_measured_otherwise_are_not_compared(tmp_path, caplog, change):
    """The best model of before is kept aside, and stays there however often the same checkpoint is resumed."""
    state = TrainingState(epoch=3)
    record_best(ALONE, state, validated(90.0), EvaluationArguments(), tmp_path)
    checkpoint = state.state_dict()
    for attempt in ("first", "second"):
        (tmp_path / "best").mkdir(exist_ok=True)
        (tmp_path / "best" / "README.md").write_text("of before" if attempt == "first" else "of after")
        state = TrainingState()
        state.load_state_dict(checkpoint | {"epoch": 4})
        assert record_best(ALONE, state, validated(40.0, 30.0), EvaluationArguments(**change), tmp_path)
        expected = 30.0 if "selection_metric" in change else 40.0
        assert (state.best_metric, state.best_epoch) == (expected, 4)
        assert (tmp_path / "earlier_best" / "epoch-3" / "README.md").read_text() == "of before"
    assert "which is not comparable" in caplog.text and "score fusion auto" in caplog.text


def test_best_of_the_last_epochs_is_not_compared_with_that_of_a_sample(tmp_path, caplog):
    """The sample's best is kept, the best of the whole epochs is selected among these alone."""
    arguments = EvaluationArguments(eval_queries=5, eval_whole_epochs=2)
    state, best = TrainingState(), tmp_path / "best"
    for epoch, recall in enumerate([70.0, 90.0, 60.0, 65.0], start=1):
        drawn = count_queries(arguments, 4 - epoch)
        assert drawn == (5 if epoch < 3 else None)
        state.epoch = epoch
        result = validated(recall, sample=drawn and f"{drawn} captions drawn by seed 1")
        if record_best(ALONE, state, result, arguments, tmp_path):
            best.mkdir(exist_ok=True)
            (best / "README.md").write_text(str(epoch))
    assert (state.best_epoch, state.best_metric, (best / "README.md").read_text()) == (4, 65.0, "4")
    assert (tmp_path / "earlier_best" / "epoch-2" / "README.md").read_text() == "2"
    assert caplog.text.count("which is not comparable") == 1 and "auto, on 5 captions drawn by seed 1" in caplog.text


def test_averaged_weights_have_a_best_of_their_own(tmp_path):
    state, arguments = TrainingState(epoch=1), EvaluationArguments()
    assert record_best(ALONE, state, validated(50.0), arguments, tmp_path)
    assert record_best(ALONE, state, validated(40.0), arguments, tmp_path, "best_ema")
    state.epoch = 2
    assert not record_best(ALONE, state, validated(45.0), arguments, tmp_path)
    assert record_best(ALONE, state, validated(45.0), arguments, tmp_path, "best_ema")
    assert (state.best_epoch, state.best_metric) == (1, 50.0)
    assert (state.best_ema_epoch, state.best_ema_metric) == (2, 45.0)
    assert state.best_ema_measure == state.best_measure == describe_selection(arguments)
    for name in ("best", "best_ema"):
        (tmp_path / name).mkdir()
    assert record_best(ALONE, state, validated(30.0, 20.0), EvaluationArguments(eval_rerank_k=9), tmp_path, "best_ema")
    assert [path.name for path in tmp_path.glob("earlier_*/*")] == ["epoch-2"]
    assert (tmp_path / "best").is_dir() and (tmp_path / "earlier_best_ema").is_dir()


def test_number_of_queries_is_that_of_the_arguments():
    assert count_queries(EvaluationArguments(), 29) is None
    assert count_queries(EvaluationArguments(eval_queries=7, eval_whole_epochs=0), 0) == 7
    for wrong in ({"eval_queries": 0}, {"eval_whole_epochs": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EvaluationArguments(**wrong)


def test_validation_of_a_sample_says_so(accelerator):
    arguments = EvaluationArguments(eval_rerank_k=4)
    result, choice = validate(
        accelerator, tiny_model(), tiny_processor(), tiny_dataset(num_ids=8), arguments, "CUHK", 0, 3, 7
    )
    assert result.sample == "3 captions drawn by seed 7" and choice.num_queries == 3
    assert describe_selection(arguments, result.sample).endswith("score fusion auto, on 3 captions drawn by seed 7")


def test_checkpoint_of_an_older_version_is_not_compared(tmp_path, caplog):
    state = TrainingState()
    older = TrainingState(epoch=3, best_metric=90.0, best_epoch=2).state_dict()
    del older["best_measure"]
    state.load_state_dict(older)
    assert record_best(ALONE, state, validated(40.0), EvaluationArguments(), tmp_path)
    assert "R@1 in an older version, which did not record how it was measured" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_match_weight": 0.4}, "`eval_score_fusion` must be posterior with eval_match_weight"),
        ({"eval_score_fusion": "posterior", "eval_match_weight": -1.0}, "`eval_match_weight` must be 0 or more"),
    ],
)
def test_weights_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(**changes)


def test_choice_is_a_file_of_the_model(tmp_path, accelerator):
    arguments = EvaluationArguments(eval_rerank_k=6)
    model, processor = tiny_model(MRAForPreTraining), tiny_processor()
    _, choice = validate(accelerator, model, processor, tiny_dataset(num_ids=8), arguments, "CUHK")
    save_model(accelerator, model, processor, tmp_path / "best", choice=choice)
    saved = RetrievalChoice.load(str(tmp_path / "best"))
    assert saved == dataclasses.replace(choice, weights=weights_digest(tmp_path / "best"))


@pytest.mark.parametrize(
    "mixed_precision, training", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", None)]
)
@pytest.mark.parametrize("eval_dtype", ["training", "float32"])
def test_precision_of_the_evaluation(monkeypatch, mixed_precision, training, eval_dtype):
    """Published: float32 whatever training runs in."""
    asked = {}
    monkeypatch.setattr(
        validation, "evaluate_retrieval", lambda *args, **options: asked.update(options) or NOT_RERANKED
    )
    monkeypatch.setattr(validation, "broadcast", lambda tensors: tensors)
    accelerator = SimpleNamespace(
        unwrap_model=lambda model, keep_torch_compile: model, mixed_precision=mixed_precision, distributed_type="NO"
    )
    args = EvaluationArguments(eval_dtype=eval_dtype)
    validation.validate(accelerator, nn.Linear(2, 2), None, [1], args, "CUHK")
    assert asked["dtype"] == (torch.float32 if eval_dtype == "float32" else training)
