import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_scripts.dad.image_checks import find_near_duplicates, load_image, measure_image, perceptual_hash
from tests.helpers.dad_readers import draw_person


def flip_bits(digits: str, number: int, seed: int) -> str:
    """A hash with some of its 256 signs turned over."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits[:64]), dtype=np.uint8))
    bits[np.random.default_rng(seed).choice(256, number, replace=False)] ^= 1
    return np.packbits(bits).tobytes().hex() + digits[64:]


def random_hashes(number: int, seed: int = 0) -> list[str]:
    rows = np.random.default_rng(seed).integers(0, 256, (number, 128), dtype=np.uint8)
    return [row.tobytes().hex() for row in rows]


def all_pairs(hashes: list[str], max_bits: int, max_colour: float) -> dict[int, int]:
    """Every picture against every earlier one that is kept."""
    raw = [np.frombuffer(bytes.fromhex(digits), dtype=np.uint8) for digits in hashes]
    found = {}
    for later in range(len(raw)):
        for earlier in range(later):
            bits = int(np.bitwise_count(raw[later][:32] ^ raw[earlier][:32]).sum())
            colour = np.abs(raw[later][32:].astype(int) - raw[earlier][32:]).mean()
            if earlier not in found and bits <= max_bits and colour <= max_colour:
                found[later] = earlier
                break
    return found


def test_measures_of_hand_drawn_pictures():
    flat = measure_image(Image.new("RGB", (30, 60), (10, 200, 30)))
    assert (flat["width"], flat["height"], flat["contrast"], flat["sharpness"], flat["colour"]) == (30, 60, 0, 0, 0)
    assert flat["brightness"] == pytest.approx(0.299 * 10 + 0.587 * 200 + 0.114 * 30, abs=1e-3)
    halves = Image.new("RGB", (64, 128))
    halves.paste((255, 255, 255), (0, 0, 32, 128))
    assert measure_image(halves)["contrast"] == 127.5 and measure_image(halves)["colour"] == 0
    red = Image.new("RGB", (64, 128))
    red.paste((100, 0, 0), (0, 0, 32, 128))
    # R - G and B - R are 100 and -100 on one half, 0 on the other; G - B is 0: (2500 + 0 + 2500) / 3
    assert measure_image(red)["colour"] == pytest.approx(5000 / 3, abs=1e-3)


def test_greyscale_and_tinted_pictures_have_no_colour():
    picture = draw_person(0)
    grey = picture.convert("L").convert("RGB")
    tinted = Image.fromarray((np.asarray(grey) // 2 + np.array([60, 30, 0])).astype(np.uint8))
    assert measure_image(picture)["colour"] > 100
    assert measure_image(grey)["colour"] == 0 and measure_image(tinted)["colour"] < 5


def test_blur_lowers_sharpness_and_detail():
    picture = draw_person(0)
    measures = [measure_image(picture.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 3)]
    for name in ("sharpness", "detail"):
        values = [each[name] for each in measures]
        assert values == sorted(values, reverse=True) and values[0] > values[2]


def test_hash_survives_scaling_and_compression_and_tells_pictures_apart():
    picture = draw_person(0, (96, 192)).filter(ImageFilter.GaussianBlur(1))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=60)
    variants = [picture.resize((48, 96)), picture.resize((200, 400)), load_image(Image.open(buffer))]
    others = [draw_person(seed, (96, 192)) for seed in range(1, 9)]
    hashes = [perceptual_hash(each) for each in (picture, *variants, *others)]
    assert find_near_duplicates(hashes) == {1: 0, 2: 0, 3: 0}


def test_colour_tells_pictures_of_one_brightness_apart():
    grey = np.asarray(draw_person(0).convert("L"), dtype=float)[..., None]
    red, blue = (
        Image.fromarray((grey * np.array(weights)).clip(0, 255).astype(np.uint8))
        for weights in ((1, 0.3, 0), (0, 0.5, 1))
    )
    hashes = [perceptual_hash(each) for each in (red, blue)]
    assert find_near_duplicates(hashes) == {} and find_near_duplicates(hashes, 31, max_colour=255) == {1: 0}


@pytest.mark.parametrize("max_bits", [0, 3, 12, 31])
def test_bands_find_what_all_pairs_find(max_bits):
    originals = random_hashes(30)
    copies = [flip_bits(originals[seed % 30], seed % (max_bits + 4), seed) for seed in range(60)]
    hashes = [*originals, *copies]
    expected = all_pairs(hashes, max_bits, 24)
    assert find_near_duplicates(hashes, max_bits) == expected and len(expected) >= 15


def test_first_of_a_chain_is_kept():
    first = random_hashes(1)[0]
    second = flip_bits(first, 10, 0)
    third = flip_bits(second, 10, 1)  # near the second, which goes, but not the first
    hashes = [first, second, third]
    assert all_pairs(hashes, 12, 24) == find_near_duplicates(hashes, 12) == {1: 0}


def test_many_pictures_take_seconds():
    hashes = random_hashes(20_000)
    hashes[15_000] = flip_bits(hashes[300], 9, 0)
    assert find_near_duplicates(hashes) == {15_000: 300}


def test_wrong_number_of_bits():
    with pytest.raises(ValueError, match="`max_bits` must be from 0 to 31, got 40"):
        find_near_duplicates(random_hashes(2), 40)
