import contextlib
import copy
import logging
import os
import signal
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from modeling_mra import MRAForPreTraining
from mra.common.environment import describe_environment
from mra.training import runtime
from mra.training.arguments import RunArguments
from mra.training.checkpointing import save_model
from mra.training.runtime import (
    Plan,
    StopSignal,
    autocast_dtype,
    check_trackers,
    configure_deepspeed,
    create_accelerator,
    describe_plan,
    group_factor,
    make_plan,
    progress_bar,
    seed_negatives,
    show_banner,
    start_trackers,
    synchronize_batchnorm,
    whole_model,
)
from tests.helpers.tiny import tiny_model, tiny_processor


def run(**changes):
    defaults = {"gradient_accumulation_steps": 1, "num_train_epochs": 30, "max_train_steps": None}
    return SimpleNamespace(**(defaults | changes))


def test_plan_counts_whole_batches_of_every_process():
    plan = make_plan(68_126, 40, 4, run())
    assert (plan.samples_per_batch, plan.steps_per_epoch, plan.total_steps) == (160, 425, 12_750)
    accumulated = make_plan(68_126, 20, 4, run(gradient_accumulation_steps=2))
    assert (accumulated.samples_per_batch, accumulated.steps_per_epoch) == (80, 426)
    short = make_plan(100, 10, 1, run(max_train_steps=25))
    assert (short.total_steps, short.num_epochs) == (25, 3)
    assert short.schedule_steps(True) == 25
    with pytest.raises(ValueError, match="`per_device_batch_size`: 7 training pairs"):
        make_plan(7, 4, 2, run())


def test_one_batch_is_enough():
    plan = make_plan(8, 4, 2, run(num_train_epochs=2))
    assert (plan.steps_per_epoch, plan.total_steps, plan.num_epochs) == (1, 2, 2)


@given(full=st.integers(1, 9), num_batches=st.integers(1, 40))
def test_every_step_takes_the_mean_of_its_batches(full, num_batches):
    """Accelerate divides each loss by the whole number; the last step of an epoch may have fewer batches."""
    accelerator = SimpleNamespace(gradient_accumulation_steps=full)
    batches = list(range(num_batches))
    for group in (batches[start : start + full] for start in range(0, num_batches, full)):
        weights = [group_factor(accelerator, index, num_batches) / full for index in group]
        assert weights == pytest.approx([1 / len(group)] * len(group))


@pytest.mark.parametrize(
    "pairs, epochs, taken, counted",
    [
        (68_126, 30, 425, 426),
        (34_674, 30, 216, 217),
        (37_010, 10, 231, 232),
        (1_217_750, 32, 7610, 7611),
        (1600, 3, 10, 10),
    ],
)
def test_the_published_schedule_counts_the_dropped_batch(pairs, epochs, taken, counted):
    plan = make_plan(pairs, 40, 4, run(num_train_epochs=epochs))
    assert plan.total_steps == plan.schedule_steps(False) == taken * epochs
    assert plan.schedule_steps(True) == counted * epochs
    accumulated = make_plan(pairs, 10, 4, run(num_train_epochs=epochs, gradient_accumulation_steps=4))
    assert accumulated.schedule_steps(True) == counted * epochs


def test_negatives_depend_on_the_place_alone():
    generator = torch.Generator()
    draw = {
        place: torch.rand(4, generator=seed_negatives(generator, *place)).tolist()
        for place in [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0), (1, 10, 0), (11, 0, 0)]
    }
    assert len({tuple(values) for values in draw.values()}) == len(draw)
    assert torch.rand(4, generator=seed_negatives(generator, 1, 0, 0)).tolist() == draw[1, 0, 0]


def test_a_second_sigterm_ends_the_process():
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop = StopSignal()
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_forked_worker_ends_at_the_first_sigterm():
    """The process that forked it waits for it and saves."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        StopSignal()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_trackers_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr("mra.training.runtime.get_available_trackers", list)
    with pytest.raises(ValueError, match=r"`log_with`: tensorboard is not installed.*mra-retrieval\[tracking\]"):
        check_trackers(["tensorboard"])
    with pytest.raises(ValueError, match="unknown tracker 'paper'"):
        check_trackers(["paper"])
    with pytest.raises(ValueError, match="`log_with`: wandb is not installed: pip install wandb"):
        check_trackers(["wandb"])
    assert check_trackers([]) == []
    monkeypatch.setattr("mra.training.runtime.get_available_trackers", lambda: ["wandb"])
    assert check_trackers(["wandb"]) == ["wandb"]


def test_environment_names_the_libraries():
    environment = describe_environment()
    assert {"torch", "transformers", "accelerate", "datasets"} <= environment["libraries"].keys()
    assert environment["python"].startswith("3.")


def test_processes_that_run_alone_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("mra.training.runtime.Accelerator", lambda **options: SimpleNamespace(num_processes=1))
    with pytest.raises(
        ValueError, match=r"`WORLD_SIZE` is 2 but the process group has 1.*accelerate_configs/cpu\.yaml"
    ):
        create_accelerator(RunArguments(output_dir=str(tmp_path)))


# ---------------------------------------------------------------- accelerator


@pytest.fixture
def created(monkeypatch, tmp_path):
    """A function that returns what `Accelerator` is asked for by a recipe and an environment."""
    alone = {"num_processes": 1, "distributed_type": DistributedType.NO}
    monkeypatch.setattr(runtime, "Accelerator", lambda **options: SimpleNamespace(**alone, **options))
    monkeypatch.setattr(runtime, "get_available_trackers", lambda: ["tensorboard"])
    for name in ("LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.delenv(name, raising=False)

    def create(has_device=False, environment=None, **recipe):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_device)
        with monkeypatch.context() as patch:
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            return create_accelerator(RunArguments(output_dir=str(tmp_path), **recipe))

    return create


def test_the_accelerator_of_a_recipe(created, tmp_path):
    accelerator = created(mixed_precision="bf16", gradient_accumulation_steps=3, log_with=["tensorboard"])
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_plugin.num_steps) == ("bf16", 3)
    assert (accelerator.log_with, accelerator.project_dir) == (["tensorboard"], str(tmp_path))
    assert accelerator.dataloader_config.dispatch_batches is False  # it resumes at another position
    assert accelerator.dataloader_config.non_blocking is True
    assert created().log_with is None
    assert logging.getLogger("accelerate").level == logging.WARNING
    with pytest.raises(ValueError, match="unknown tracker"):
        created(log_with=["paper"])


def test_a_run_tells_its_progress(created):
    """The messages of level INFO are the run's record; libraries may have set up logging before."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        root.handlers, root.level = [], logging.WARNING
        created()
        assert root.handlers and root.level == logging.INFO
    finally:
        root.handlers, root.level = handlers, level


@pytest.mark.parametrize(
    ("has_device", "environment", "backend"),
    [
        (True, {"LOCAL_RANK": "0"}, None),
        (False, {"LOCAL_RANK": "0"}, "gloo"),
        (True, {"LOCAL_RANK": "0", "ACCELERATE_TORCH_DEVICE": "cpu"}, "gloo"),
        (False, {}, None),  # one process
    ],
)
def test_processes_on_the_cpu_talk_through_gloo_and_wait_for_hours(created, has_device, environment, backend):
    (handler,) = created(has_device, environment).kwargs_handlers
    assert (handler.timeout, handler.to_kwargs().get("backend")) == (timedelta(hours=2), backend)


# ---------------------------------------------------------------- BatchNorm


def test_statistics_cannot_be_shared_on_cpus(monkeypatch, tmp_path):
    run = RunArguments(output_dir=str(tmp_path), sync_batchnorm=True)
    cases = (
        ("cpu", "MULTI_CPU", True),
        ("cpu", "DEEPSPEED", True),
        ("cpu", "NO", False),
        ("cuda", "MULTI_GPU", False),
    )
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for device, kind, is_refused in cases:
        fields = {"num_processes": 1, "device": torch.device(device), "distributed_type": DistributedType[kind]}
        made = SimpleNamespace(**fields)
        monkeypatch.setattr(runtime, "Accelerator", lambda made=made, **options: made)
        refused = pytest.raises(ValueError, match="`sync_batchnorm` is true, but the processes run on a CPU")
        with refused if is_refused else contextlib.nullcontext():
            assert create_accelerator(run) is made


def test_pytorch_refuses_to_share_statistics_on_cpus(tmp_path):
    """If this fails, PyTorch can do it now: drop the error of `create_accelerator`."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            nn.SyncBatchNorm(3)(torch.zeros(4, 3))
    finally:
        torch.distributed.destroy_process_group()


def test_model_with_shared_statistics_is_saved_as_a_plain_one(tmp_path):
    plain = tiny_model()
    expected = copy.deepcopy(plain.state_dict())
    run = RunArguments(output_dir=str(tmp_path))
    assert synchronize_batchnorm(plain, run) is plain and not _synchronized(plain)
    run.sync_batchnorm = True
    model = synchronize_batchnorm(copy.deepcopy(plain), run)
    assert len(_synchronized(model)) == 2 and list(model.state_dict()) == list(expected)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert model.mlm_head.decoder.weight is model.mra.text_model.embeddings.word_embeddings.weight
    pixels = torch.rand(4, 3, 64, 32)
    for training in (True, False):  # one process computes as before
        features = []
        for each in (plain, model):
            torch.manual_seed(0)
            features.append(each.train(training).mra.get_image_features(pixels))
        assert features[0].equal(features[1])
    save_model(Accelerator(cpu=True), model, tiny_processor(), tmp_path / "best")
    loaded, info = MRAForPreTraining.from_pretrained(tmp_path / "best", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not _synchronized(loaded)
    assert all(tensor.equal(plain.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def _synchronized(model):
    return [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]


def deepspeed(precision="bf16", config=None, **fields):
    plugin = SimpleNamespace(deepspeed_config={} if config is None else config)
    defaults = {"distributed_type": DistributedType.DEEPSPEED, "mixed_precision": precision, "num_processes": 2}
    defaults |= {"gradient_accumulation_steps": 4, "state": SimpleNamespace(deepspeed_plugin=plugin)}
    return SimpleNamespace(**defaults | fields)


def test_deepspeed_gets_clipping_accumulation_and_autocast(monkeypatch):
    unset = []
    monkeypatch.setattr("transformers.integrations.deepspeed.unset_hf_deepspeed_config", lambda: unset.append(1))
    accelerator = deepspeed()
    configure_deepspeed(accelerator, SimpleNamespace(max_grad_norm=2.5))
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (4, 2.5)
    assert config["bf16"] == {"enabled": False} and unset
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert autocast_dtype(accelerator) is torch.bfloat16 and "checkpoint" not in config
    plain = deepspeed(precision="no")
    configure_deepspeed(plain, SimpleNamespace(max_grad_norm=None))
    expected = {"gradient_accumulation_steps": 4, "gradient_clipping": 0.0}
    assert plain.state.deepspeed_plugin.deepspeed_config == expected and autocast_dtype(plain) is None


def test_without_deepspeed_nothing_is_configured():
    accelerator = deepspeed(distributed_type=DistributedType.NO)
    configure_deepspeed(accelerator, SimpleNamespace(max_grad_norm=2.5))
    assert accelerator.state.deepspeed_plugin.deepspeed_config == {}


@pytest.mark.parametrize(("parts", "is_universal"), [(0, False), (2, False), (3, True)])
def test_deepspeed_loads_what_other_processes_saved(tmp_path, parts, is_universal):
    (tmp_path / "pytorch_model").mkdir()
    for rank in range(parts):
        (tmp_path / "pytorch_model" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    accelerator = deepspeed(config={"checkpoint": {"tag_validation": "Warn"}})
    configure_deepspeed(accelerator, SimpleNamespace(max_grad_norm=None), tmp_path)
    expected = {"tag_validation": "Warn"} | ({"load_universal": True} if is_universal else {})
    assert accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] == expected


@pytest.mark.parametrize(("precision", "dtype"), [("no", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_of_other_ways(precision, dtype):
    assert autocast_dtype(deepspeed(precision, distributed_type=DistributedType.NO)) is dtype
    assert autocast_dtype(deepspeed(config={"torch_autocast": {"enabled": False, "dtype": "bfloat16"}})) is None


def test_trackers_get_plain_values():
    started = []
    accelerator = SimpleNamespace(init_trackers=lambda name, config: started.append((name, config)))
    recipe = {"seed": 1, "rate": 0.5, "on": False, "name": "a", "parts": ["b"], "absent": None}
    start_trackers(accelerator, "mra", recipe)
    assert started == [("mra", {"seed": 1, "rate": 0.5, "on": False, "name": "a", "parts": "['b']"})]


# ---------------------------------------------------------------- whole models


class Small(nn.Module):
    """A model that is built from its configuration, as those of transformers are."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config["size"], 3)


def test_a_model_that_is_not_sharded_is_its_own_whole():
    model = Small({"size": 4})
    assert whole_model(model) is model


def test_a_model_sharded_by_fsdp_is_copied_whole():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Small({"size": 4})
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        before = torch.get_rng_state()
        whole = whole_model(model)
        assert torch.equal(torch.get_rng_state(), before)  # building the copy draws weights
    finally:
        dist.destroy_process_group()
    assert type(whole) is Small and whole.config == {"size": 4} and whole.config is not model.config
    for name, tensor in whole.state_dict().items():
        assert not isinstance(tensor, DTensor) and torch.equal(tensor, expected[name])


def test_a_model_sharded_by_deepspeed_is_gathered_and_copied(monkeypatch):
    model, gathered = Small({"size": 4}), []

    class GatheredParameters:
        def __init__(self, parameters):
            gathered.extend(parameters)

        def __enter__(self):
            with torch.no_grad():
                for parameter in gathered:
                    parameter.fill_(7)

        def __exit__(self, *exception):
            pass

    monkeypatch.setitem(
        sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=GatheredParameters))
    )
    for parameter in model.parameters():
        parameter.ds_id = 0
    whole = whole_model(model)
    assert whole is not model and all((parameter == 7).all() for parameter in whole.parameters())
    assert len(gathered) == 2


# ---------------------------------------------------------------- what the user sees


def test_banner_lines_values_up(caplog):
    PartialState(cpu=True)
    try:
        with caplog.at_level(logging.INFO):
            show_banner("Training", {"pairs": "1,600", "optimizer steps": "30"})
    finally:
        PartialState._reset_state()
    (message,) = caplog.messages  # accelerate puts the rank before it
    assert message.endswith("***** Training *****\n  pairs            1,600\n  optimizer steps  30")


@pytest.mark.parametrize(("precision", "shown"), [("bf16", "bfloat16"), ("no", "float32")])
def test_facts_of_a_run(precision, shown):
    model, plan = nn.Linear(1000, 20), Plan(160, 425, 30, 12_750, 12_780)
    accelerator = SimpleNamespace(
        num_processes=4, distributed_type=DistributedType.MULTI_GPU, device="cuda:0", mixed_precision=precision
    )
    args = SimpleNamespace(gradient_accumulation_steps=2, output_dir="runs/one/")
    assert describe_plan(accelerator, model, plan, args, 20, 68_126) == {
        "training pairs": "68,126",
        "parameters": "0.02 M",
        "processes": "4 (MULTI_GPU, cuda:0)",
        "precision": shown,
        "batch": "20 x 4 processes x 2 accumulated",
        "optimizer steps": "12,750 (425 an epoch)",
        "output": "runs/one",
    }


@pytest.mark.parametrize("is_main", [True, False])
def test_one_process_shows_the_progress(is_main):
    with progress_bar(SimpleNamespace(is_main_process=is_main), 30, 10) as bar:
        assert (bar.disable, bar.total) == (not is_main, 30)
        assert not is_main or bar.n == 10
