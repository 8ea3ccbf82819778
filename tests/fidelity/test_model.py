"""The model against the numbers of the published code (tests/reference/README.md)."""

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import nn

from configuration_mra import MRAConfig
from losses_mra import contrastive_loss
from modeling_mra import MRAForPreTraining
from mra.training.published_layout import from_published, infer_config, to_mra_name, to_published
from tests.helpers.gathering import make_pair, run_contrastive
from tests.reference.fill_rule import TIED, fill_, make_images


REFERENCE = Path(__file__).resolve().parents[1] / "reference"
TOKENS = 1e-4  # absolute: tokens, features, logits
LOSSES = 1e-5  # relative
GRADIENTS = 1e-3  # relative
MASKED_SLOTS = 10


def read(name):
    return json.loads((REFERENCE / f"{name}.json").read_text())


def synthetic_checkpoint(vector) -> dict[str, torch.Tensor]:
    """The released layout of a vector's model, filled by `fill_rule.py`."""
    vision, text = vector["vision_config"], vector["text_config"]
    window = vision["window_size"]
    config = MRAConfig(
        vision_config={
            "image_size": [vision["h"], vision["w"]],
            "depths": vision["depths"],
            "window_size": [window, window, window, 4 if window == 8 else window],
        },
        text_config={
            "num_hidden_layers": text["num_hidden_layers"],
            "num_fusion_layers": text["num_hidden_layers"] - text["fusion_layer"],
        },
        projection_dim=vector["embed_dim"],
    )
    with torch.device("meta"):
        layout = to_published(MRAForPreTraining(config))
    state_dict = {n: torch.zeros_like(t, device="cpu") if t.is_meta else t.clone() for n, t in layout.items()}
    state_dict["temp"].fill_(0.07)
    fill_(state_dict, vector.get("fill_scale", 0.02))
    weight, bias = TIED
    state_dict[weight] = state_dict["text_encoder.bert.embeddings.word_embeddings.weight"]
    state_dict[bias] = state_dict["text_encoder.cls.predictions.bias"]
    return state_dict


def make_inputs(vector) -> dict[str, torch.Tensor]:
    """Keyword arguments of `MRAForPreTraining.forward`."""
    inputs = {name: torch.tensor(value) for name, value in vector["inputs"].items()}
    vision = vector["vision_config"]
    labels = torch.full_like(inputs["text_ids"], -100)
    for row, (positions, tokens) in enumerate(zip(inputs["masked_pos"], inputs["masked_ids"], strict=True)):
        labels[row, positions[tokens != -100]] = tokens[tokens != -100]
    batch = {
        "pixel_values": make_images(vector["seeds"]["images"], 2, vision["h"], vision["w"]),
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_atts"],
        "mlm_input_ids": inputs["text_ids_masked"],
        "labels": labels,
        "identity_ids": inputs["idx"],
    }
    if vector["eda"]:
        batch |= {
            "augmented_input_ids": inputs["text_ids_eda"],
            "augmented_attention_mask": inputs["text_atts_eda"],
        }
    if vector["region"]:
        batch |= {
            "phrase_input_ids": inputs["text_ids_box"],
            "phrase_attention_mask": inputs["text_atts_box"],
            "region_attention_mask": 1 - inputs["box_atts"],  # the published mask is 1 where a token is hidden
            "phrase_ids": inputs["label"],
        }
    return batch


class Case:
    """One vector: its description, tensors, inputs and model."""

    def __init__(self, name):
        self.vector = read(f"forward_{name}")
        self.tensors = load_file(REFERENCE / f"forward_{name}.safetensors")
        self.batch = make_inputs(self.vector)
        state_dict = synthetic_checkpoint(self.vector)
        self.config = infer_config(state_dict, self.vector)
        weights = from_published(state_dict, self.config)
        self.model = MRAForPreTraining.from_pretrained(None, config=self.config, state_dict=weights).eval()


@pytest.fixture(scope="module", params=["a", "b", "f"])
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def encoded(case):
    """Hidden states and losses in one pass, with gradients where the vector has them."""
    names = ("pixel_values", "input_ids", "attention_mask")
    with torch.no_grad():
        return encode(case.model, *(case.batch[name] for name in names))


def encode(model, pixel_values, input_ids, attention_mask):
    image = model.get_image_hidden_states(pixel_values)
    text = model.get_text_hidden_states(input_ids, attention_mask)
    return {"image_embeds": image, "text_embeds": text, "cross_embeds": model.fuse(text, attention_mask, image)}


def assert_close(actual, expected, absolute=TOKENS):
    torch.testing.assert_close(actual, expected, rtol=0, atol=absolute)


def assert_normalised(actual, expected):
    """The vectors hold features before their normalisation."""
    assert_close(actual, F.normalize(expected, dim=-1))


def check_tokens(case, encoded):
    for name, tokens in encoded.items():
        positions = json.loads(case.vector["slices"][name].split("], ")[0].removeprefix("[:, ") + "]")
        assert_close(tokens[:, positions, :256], case.tensors[name])


def test_fidelity_inputs(case):
    expected = case.vector["image_check"]
    images = case.batch["pixel_values"]
    assert list(images.shape) == expected["shape"]
    assert images.flatten()[:5].tolist() == pytest.approx(expected["first5"])


def test_fidelity_architecture_is_read_off_the_tensors(case):
    vision, text = case.vector["vision_config"], case.vector["text_config"]
    last = 4 if vision["window_size"] == 8 else 7
    assert case.config.vision_config.image_size == [vision["h"], vision["w"]]
    assert case.config.vision_config.depths == vision["depths"]
    assert case.config.vision_config.num_heads == vision["num_heads"]
    assert case.config.vision_config.window_size == [vision["window_size"]] * 3 + [last]
    assert case.config.text_config.num_text_layers == text["fusion_layer"]
    assert case.config.text_config.num_attention_heads == text["num_attention_heads"]
    assert case.config.label_smoothing == case.vector["LabelSmooth"]


def test_fidelity_tokens(case, encoded):
    check_tokens(case, encoded)


@torch.no_grad()
def test_fidelity_features(case, encoded):
    assert_normalised(
        case.model.get_image_features(image_hidden_states=encoded["image_embeds"]), case.tensors["image_feat"]
    )
    assert_normalised(
        case.model.get_text_features(text_hidden_states=encoded["text_embeds"]), case.tensors["text_feat"]
    )
    if case.vector["eda"]:
        augmented = case.model.get_text_features(
            case.batch["augmented_input_ids"], case.batch["augmented_attention_mask"]
        )
        assert_normalised(augmented, case.tensors["text_feat_eda"])


@torch.no_grad()
def test_fidelity_matching_logits(case, encoded):
    text, image, mask = encoded["text_embeds"], encoded["image_embeds"], case.batch["attention_mask"]
    assert_close(case.model.match_logits(text, mask, image), case.tensors["itm_logits_pos"])
    assert_close(case.model.match_logits(text, mask, image.flip(0)), case.tensors["itm_logits_neg"])


@torch.no_grad()
def test_fidelity_masked_language_logits(case, encoded):
    mask = case.batch["attention_mask"]
    states = case.model.get_text_hidden_states(case.batch["mlm_input_ids"], mask)
    logits = case.model.mlm_head(case.model.fuse(states, mask, encoded["image_embeds"]))
    slots = torch.tensor(case.vector["inputs"]["masked_pos"])
    rows = torch.arange(2)[:, None].expand(-1, MASKED_SLOTS)
    assert_close(logits[rows, slots][..., ::61], case.tensors["mlm_logits"])


@torch.no_grad()
def test_fidelity_regions(case, encoded):
    if not case.vector["region"]:
        pytest.skip("no regions in this vector")
    batch, model, tensors = case.batch, case.model, case.tensors
    mask = batch["region_attention_mask"]
    patches = encoded["image_embeds"][:, 1:]
    mean = (patches * mask[:, 1:, None]).sum(1) / mask[:, 1:].sum(1, keepdim=True)
    region = torch.cat([mean[:, None], patches], dim=1)
    phrase = model.get_text_hidden_states(batch["phrase_input_ids"], batch["phrase_attention_mask"])
    assert_close(mean, tensors["box_cls"])
    assert_normalised(model.get_image_features(image_hidden_states=region), tensors["box_feat"])
    assert_normalised(model.get_text_features(text_hidden_states=phrase), tensors["text_feat_box"])
    assert_close(
        model.match_logits(phrase, batch["phrase_attention_mask"], region, mask), tensors["itm_logits_box_pos"]
    )


@pytest.fixture(scope="module")
def output(case):
    """Every loss, and the gradients where the vector has them."""
    has_gradients = "grad_norms_fp32" in case.vector
    case.model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(has_gradients):
        output = case.model(**case.batch)
        if has_gradients:
            output.loss.backward()
    return output


def published_losses(output) -> dict[str, float]:
    """Our terms under the names and sums of the published code."""
    value = {name: float(term.detach()) for name, term in output.items() if term.ndim == 0}

    def with_augmentation(name):
        return value[f"{name}_loss"] + 0.8 * value.get(f"augmented_{name}_loss", 0.0)

    return {
        "loss_itc": with_augmentation("itc"),
        "loss_itm": with_augmentation("itm"),
        "loss_mlm": value["mlm_loss"],
        "loss_region": 0.8 * (value.get("region_itc_loss", 0.0) + value.get("region_itm_loss", 0.0)),
        "total_train": value["loss"],
    }


def check_losses(output, expected):
    actual = published_losses(output)
    for name in actual.keys() & expected.keys():
        assert actual[name] == pytest.approx(expected[name], rel=LOSSES, abs=0), name


def test_fidelity_losses(case, output):
    check_losses(output, case.vector["losses_fp32"])


def test_fidelity_gradients(case, output):
    if "grad_norms_fp32" not in case.vector:
        pytest.skip("no gradients in this vector")
    text_layers = case.config.text_config.num_text_layers
    norms = case.vector["grad_norms_fp32"]
    gradients = {name: case.model.get_parameter(to_mra_name(name, text_layers)).grad for name in norms}
    wrong = {n: float(g.norm()) for n, g in gradients.items() if abs(g.norm() / norms[n] - 1) > GRADIENTS}
    assert not wrong
    assert float(case.model.temperature.grad) == pytest.approx(case.vector["temp_grad_fp32"], rel=GRADIENTS)
    words = case.model.get_input_embeddings().weight.grad
    for row, norm in case.vector["word_embedding_grad_rows_fp32"].items():
        assert float(words[int(row)].norm()) == pytest.approx(norm, rel=GRADIENTS)
    every = [p.grad.norm() for p in case.model.parameters()]
    assert float(torch.stack(every).norm()) == pytest.approx(case.vector["grad_total_norm_fp32"], rel=GRADIENTS)


@torch.no_grad()
def test_fidelity_eager_attention(case, output):
    case.model.set_attn_implementation("eager")
    names = ("pixel_values", "input_ids", "attention_mask")
    check_tokens(case, encode(case.model, *(case.batch[name] for name in names)))
    check_losses(case.model(**case.batch), case.vector["losses_fp32"])
    case.model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_fidelity_training_mode(case, output):
    """Comes last: it moves the running statistics."""
    expected = read("train_bn").get(case.vector["variant"])
    if expected is None:
        pytest.skip("no statistics for this vector")
    case.model.train()
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    check_losses(case.model(**case.batch), expected["losses_fp32"])
    buffers = dict(case.model.named_buffers())
    for name, statistics in expected["bn"].items():
        buffer = buffers[to_mra_name(name, case.config.text_config.num_text_layers)]
        if isinstance(statistics, int):
            assert int(buffer) == statistics
        else:
            assert float(buffer.norm()) == pytest.approx(statistics["norm"], rel=LOSSES)
            assert_close(buffer[:8], torch.tensor(statistics["first8"]), absolute=1e-6)


# ---------------------------------------------------------------- contrastive loss


@pytest.mark.parametrize("row", read("itc_only")["cases"], ids=lambda row: f"{row['seed']}-{row['LabelSmooth']}")
def test_fidelity_contrastive_loss(row):
    image, text = (x.requires_grad_() for x in make_pair(row["seed"], row["dim"]))
    temperature = torch.tensor(0.07, requires_grad=True)
    identities = torch.tensor(row["ids"])
    features = (F.normalize(image, dim=-1), F.normalize(text, dim=-1))
    loss = contrastive_loss(*features, identities, temperature, row["LabelSmooth"])
    loss.backward()
    assert loss.item() == pytest.approx(row["loss"], rel=LOSSES)
    assert temperature.grad.item() == pytest.approx(row["grad_temp"], rel=LOSSES)
    assert image.grad.norm().item() == pytest.approx(row["grad_img_norm"], rel=LOSSES)
    assert text.grad.norm().item() == pytest.approx(row["grad_txt_norm"], rel=LOSSES)


@pytest.fixture(scope="module")
def two_processes():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=run_contrastive, args=(rank, 2, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = dict(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return results


@pytest.mark.parametrize("row", read("itc_distributed")["rows"], ids=lambda r: f"{r['world']}-{r['rank']}-{r['eps']}")
def test_fidelity_published_gather(row, two_processes):
    """Each process's gradient is that of its own slice, as the published gather leaves it."""
    if row["world"] == 1:
        image, text = (x.requires_grad_() for x in make_pair(21, 2048))
        temperature = torch.tensor(0.07, requires_grad=True)
        features = (F.normalize(x, dim=-1) for x in (image, text))
        loss = contrastive_loss(*features, torch.tensor([0, 1, 0, 2]), temperature, row["eps"])
        loss.backward()
        loss, temperature_gradient, gradient = loss.item(), temperature.grad.item(), image.grad
    else:
        loss, temperature_gradient, gradient = two_processes[row["rank"]]["published", row["eps"]]
        gradient = torch.tensor(gradient)
    assert loss == pytest.approx(row["loss"], rel=LOSSES)
    assert temperature_gradient == pytest.approx(row["grad_temp"], rel=LOSSES)
    assert gradient.norm().item() == pytest.approx(row["grad_img_norm"], rel=LOSSES)
    assert gradient[0, :4].tolist() == pytest.approx(row["grad_img_first"], rel=1e-4)


@pytest.mark.parametrize("smoothing", [0, 0.2])
def test_fidelity_exact_gather_is_the_full_batch_gradient(smoothing, two_processes):
    """Averaged over the processes, as data-parallel training does, the gradient is that of one process's whole batch."""
    image, text = (x.requires_grad_() for x in make_pair(21, 2048))
    features = (F.normalize(x, dim=-1) for x in (image, text))
    contrastive_loss(*features, torch.tensor([0, 1, 0, 2]), torch.tensor(0.07), smoothing).backward()
    exact = torch.tensor([two_processes[rank]["exact", smoothing][2] for rank in range(2)]).flatten(0, 1) / 2
    published = torch.tensor([two_processes[rank]["published", smoothing][2] for rank in range(2)]).flatten(0, 1) / 2
    torch.testing.assert_close(exact, image.grad, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(published, image.grad / 2, rtol=1e-4, atol=1e-8)
