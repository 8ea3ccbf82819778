"""mra/retrieval/encoders.py: what a fingerprint depends on."""

from transformers import BertTokenizer

from mra.retrieval.encoders import model_fingerprint
from processing_mra import MRAProcessor
from tests.helpers.retrieval import tiny_model, tiny_processor


def test_the_fingerprint_depends_on_weights_and_vocabulary():
    model, processor = tiny_model(), tiny_processor()
    fingerprint = model_fingerprint(model, processor)
    assert fingerprint == model_fingerprint(tiny_model(), tiny_processor())
    words = processor.tokenizer.get_vocab()
    first, second = list(words)[-2:]
    swapped = BertTokenizer(vocab=words | {first: words[second], second: words[first]})
    other = MRAProcessor(processor.image_processor, swapped, processor.max_text_length, processor.caption_style)
    assert model_fingerprint(model, other) != fingerprint
    model.mra.match_head[0].bias.data += 1
    assert model_fingerprint(model, processor) != fingerprint
