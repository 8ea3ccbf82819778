"""`where`: the same records on a row test and in Milvus, errors that name the part, and nothing is ever evaluated."""

import math
import random
from types import CodeType

import numpy as np
import pytest

from mra.gallery.milvus import EmbeddedStore, MilvusStore
from mra.gallery.store import MemoryStore, Record
from mra.gallery.where import MAX_DEPTH, MAX_LENGTH, is_field_name, is_unicode, parse_where, quote, read_time


FIELDS = {"key": "text", "camera": "text", "time": "time", "speed": "number", "place": "text"}


def make_records() -> list[Record]:
    """Records of which some lack camera, time, speed or place; texts with quotes, a backslash and no ASCII."""
    pick = random.Random(0)
    records = []
    for number in range(60):
        metadata = {}
        if pick.random() < 0.7:
            metadata["speed"] = pick.choice([-2, 0, 1, 2.5, 7])
        if pick.random() < 0.7:
            metadata["place"] = pick.choice(["gate", 'the "gate"', "back\\slash", "Straße", "it's"])
        camera, time = (
            pick.choice(["", "c1", "c2", "c3"]),
            pick.choice(["", "2026-01-01T00:00:00", "2026-02-03T04:05:06"]),
        )
        embedding = np.eye(4, dtype=np.float32)[number % 4]
        records.append(Record(f"k{number:02d}", f"{number:064x}", "/x", "/", camera, time, metadata, embedding))
    return records


@pytest.fixture(scope="module", params=["embedded", pytest.param("server", marks=pytest.mark.server)])
def stores(request, tmp_path_factory):
    if request.param == "server":
        server = request.getfixturevalue("milvus_server")
        milvus = MilvusStore(server.uri, "filters", server.token)
    else:
        milvus = EmbeddedStore(tmp_path_factory.mktemp("store") / "g.db", "people")
    stores = MemoryStore(), milvus
    for store in stores:
        store.create(4)
        store.upsert(make_records())
    yield stores
    milvus.close()


def random_where(pick: random.Random, depth: int = 0) -> str:
    if depth < 3 and pick.random() < 0.6:
        word = pick.choice(["and", "or", "not"])
        if word == "not":
            return f"not ({random_where(pick, depth + 1)})"
        return f"({random_where(pick, depth + 1)} {word} {random_where(pick, depth + 1)})"
    field = pick.choice(list(FIELDS))
    constants = {
        "key": ['"k10"', '"k33"'],
        "camera": ['"c1"', '"c2"', '"none"'],
        "time": ['"2026-01-01"', '"2026-02-03T04:05:06"', '"2026-01-15"'],
        "speed": ["0", "-2", "2.5", "1.0"],
        "place": ['"gate"', "'the \"gate\"'", '"back\\\\slash"', '"Straße"', '"it\'s"'],
    }[field]
    if pick.random() < 0.3:
        return f"{field} {pick.choice(['in', 'not in'])} [{', '.join(pick.sample(constants, 2))}]"
    symbols = ["==", "!=", "<", "<=", ">", ">="]
    if pick.random() < 0.3:
        return (
            f"{pick.choice(constants)} {pick.choice(symbols)} {field} {pick.choice(symbols)} {pick.choice(constants)}"
        )
    return f"{field} {pick.choice(symbols)} {pick.choice(constants)}"


def oracle(text: str | CodeType, record: Record) -> bool:
    """Python itself, on values that answer False to every comparison where they are unknown."""

    class Unknown:
        __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda self, other: False
        __hash__ = None

    values = {name: record.value(name) for name in FIELDS}
    return bool(eval(text, {}, {name: Unknown() if value is None else value for name, value in values.items()}))


def test_random_filters_mean_the_same_in_memory_and_in_milvus(stores):
    pick, sizes = random.Random(1), set()
    for _ in range(150):
        where = parse_where(random_where(pick), FIELDS)
        in_memory, in_milvus = (sorted(record.key for record in store.records(where)) for store in stores)
        assert in_memory == in_milvus, where
        sizes.add(len(in_memory))
    assert len(sizes) > 15  # not all of them empty or full


def test_random_filters_mean_what_python_means_where_everything_is_known():
    times = ["2026-01-01T00:00:00", "2026-01-15T00:00:00", "2026-02-03T04:05:06"]
    records = [
        Record(key, "0", "/x", "/", camera, times[number % 3], {"speed": speed, "place": place})
        for number, (key, camera, speed, place) in enumerate(
            (key, camera, speed, place)
            for key in ("k10", "k20")
            for camera in ("c1", "c2", "c3")
            for speed in (-2, 0, 1.0, 2.5)
            for place in ("gate", 'the "gate"', "back\\slash", "Straße", "it's")
        )
    ]
    pick, sizes = random.Random(2), set()
    for _ in range(300):
        text = random_where(pick).replace('"2026-01-01"', f'"{times[0]}"').replace('"2026-01-15"', f'"{times[1]}"')
        where = parse_where(text, FIELDS)
        chosen, code = [where.matches(record.value) for record in records], compile(text, "", "eval")
        assert chosen == [oracle(code, record) for record in records], text
        sizes.add(sum(chosen))
    assert len(sizes) > 30


def test_exists_stands_in_parentheses_of_its_own():
    """A server reads `exists a and b` as `exists (a and b)` and refuses it; milvus-lite would take it."""
    assert parse_where("speed > 1", FIELDS).to_milvus() == '((exists metadata["speed"]) and metadata["speed"] > 1)'


@pytest.mark.parametrize(
    "text",
    [
        'camera == "c1"',
        'speed > 1 and camera != "c2"',
        "speed == 0 or speed == 7",
        "-2 < speed <= 1",
        'camera in ["c1", "c3"] and speed >= 2.5',
        'place == "Straße" or key < "k10"',
        '"c1" == camera and 1 < speed',
        'camera in ("c1", "c3") and -2.5 <= speed',
    ],
)
def test_filters_mean_what_python_means(text):
    where = parse_where(text, FIELDS)
    assert [where.matches(record.value) for record in make_records()] == [oracle(text, r) for r in make_records()]


def test_a_value_that_is_unknown_answers_no_to_a_question_and_to_its_opposite():
    records = make_records()
    for text in ('camera == "c1"', "speed < 2", 'time > "2026-01-15"'):
        where, opposite = parse_where(text, FIELDS), parse_where(f"not {text}", FIELDS)
        field = text.split()[0]
        for record in records:
            answers = where.matches(record.value), opposite.matches(record.value)
            assert answers == (False, False) if record.value(field) is None else sum(answers) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("colour == 1", "'colour' is not a field of this gallery: it has key, camera, time, speed, place"),
        ('camera = "c1"', "cannot be parsed"),
        ('camera == "c1" and', "cannot be parsed"),
        ("camera", "is not a comparison"),
        ("camera == 3", """where: '3' does not fit the field camera: expected a text in quotes, as in "c3\""""),
        ('speed > "3"', """where: '"3"' does not fit the field speed: expected a number, as in 12 or 0.5"""),
        ("time > 3", "where: '3' does not fit the field time: expected a text in quotes"),
        ('time > "yesterday"', "is not a time: expected a time like 2026-01-31"),
        ("camera in []", "is not a list of constants"),
        ('camera in "c1"', "is not a list of constants"),
        ("camera in {1}", "is not a list of constants"),
        ('"c1" in ["c1"]', "is not a list of constants"),
        ("camera not in place", "is not a list of constants"),
        ('camera in ["c1", 2]', "where: '2' does not fit the field camera"),
        ('place == -"gate"', "is neither a text nor a number"),
        ("speed > --1", "is neither a text nor a number"),
        ("speed > -place", "is neither a text nor a number"),
        ("speed > +1", "is neither a text nor a number"),
        ('place == b"gate"', "is neither a text nor a number"),
        ("camera == place", "is neither a text nor a number"),
        ("speed == True", "is neither a text nor a number"),
        ("speed < 1e999", "is neither a text nor a number"),
        ("speed < -1e999", "is neither a text nor a number"),
        (f"speed < {2**63}", "is neither a text nor a number"),
        (f"speed < -{2**63}", "is neither a text nor a number"),
        ('__import__("os").system("touch /tmp/owned") == 0', "is not a field"),
        ('camera.upper() == "C1"', "is not a field"),
        ("speed + 1 > 2", "is not a field"),
        ("camera is None", "has an unknown comparison"),
        ("lambda: 1", "is not a comparison"),
        ("(" * 300 + "speed > 1" + ")" * 300, "cannot be parsed"),
        ("speed > 1 )", "cannot be parsed (unmatched ')' at character 11)"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(ValueError, match=r"^where") as caught:
        parse_where(text, FIELDS)
    assert message in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), ValueError("null bytes")])
def test_other_errors_of_the_parser_are_a_reason(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("ast.parse", fail)
    reason = str(error) or "it is nested too deeply"
    with pytest.raises(ValueError, match=rf"^where 'speed > 1' cannot be parsed \({reason}\)"):
        parse_where("speed > 1", FIELDS)


def test_length_and_depth_are_limited():
    longest = "speed > 1".ljust(MAX_LENGTH)
    assert MAX_LENGTH == 4000 and parse_where(longest, FIELDS) == parse_where("speed > 1", FIELDS)
    with pytest.raises(ValueError, match="where is 4001 characters long: expected at most 4000"):
        parse_where(longest + " ", FIELDS)
    assert MAX_DEPTH == 50
    for opening, closing in (("not ", ""), ("key > '' and (", ")"), ("speed in [1] or (", ")"), ("not (", ")")):
        parse_where(opening * 50 + "speed > 1" + closing * 50, FIELDS)
        with pytest.raises(ValueError, match="is nested deeper than 50 levels: use fewer parentheses"):
            parse_where(opening * 51 + "speed > 1" + closing * 51, FIELDS)
    wide = " or ".join(["speed > 1"] * 200)
    assert len(parse_where(wide, FIELDS).parts) == 200


@pytest.mark.parametrize("number", [0, 1, 2**53 + 1, 2**62, 2**62 + 1, 2**63 - 1, 0.5, 1e300])
def test_numbers_are_compared_exactly(number):
    for value in (number, -number):
        where = parse_where(f"speed == {value!r}", FIELDS)
        assert where.value == value and type(where.value) is type(value)
        assert where.matches({"speed": value}.get)
        neighbours = [math.nextafter(value, 2e300)] if isinstance(value, float) else [value - 1, value + 1]
        assert not any(where.matches({"speed": neighbour}.get) for neighbour in neighbours)


def test_texts_are_quoted_for_milvus():
    assert quote('a"b\\c\nd\re\tf') == r'"a\"b\\c\nd\re' + '\tf"'


def test_a_column_needs_a_name_that_a_filter_can_use():
    assert all(map(is_field_name, ("speed", "_x", "Speed2", "keys")))
    reserved = ["key", "camera", "time", "path", "image", "captions", "embedding", "content", "source", "metadata"]
    for name in (*reserved, "and", "or", "not", "in", "is", "", "2x", "a b", "größe", 7, None):
        assert not is_field_name(name)


def test_lone_surrogates_are_no_unicode():
    assert is_unicode("") and is_unicode("a人😀\ud7ff\ue000")
    for character in ("\ud800", "\udbff", "\udc00", "\udfff"):
        assert not is_unicode(character) and not is_unicode(f"ab{character}c")


def test_times_have_one_form():
    assert read_time("2026-01-31") == "2026-01-31T00:00:00"
    assert read_time(" 2026-01-31 08:15 ") == "2026-01-31T08:15:00"
    assert read_time("2026-01-31T08:15:00+02:00") == read_time("2026-01-31T06:15:00Z") == "2026-01-31T06:15:00"
    assert read_time("2026-01-31T08:15:00") < read_time("2026-01-31T08:15:00.5") < read_time("2026-01-31T08:15:01")
    with pytest.raises(ValueError, match="expected a time"):
        read_time("31.1.2026")
    where = parse_where('time >= "2026-01-31T08:15:00+02:00"', FIELDS)
    assert where.matches({"time": "2026-01-31T06:15:00"}.get) and not where.matches(
        {"time": "2026-01-31T06:14:59"}.get
    )


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"])
def test_times_at_the_edge_are_refused(text):
    with pytest.raises(ValueError, match="years 1 to 9999"):
        read_time(text)


def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="is not valid Unicode"):
        parse_where('place == "\\ud800"', FIELDS)
