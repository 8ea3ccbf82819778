"""People of the sample set (attributes) and scenes of its images (view, pose, camera, light)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace


COLOURS = {
    "black": (30, 30, 34),
    "white": (238, 238, 236),
    "gray": (132, 134, 138),
    "red": (198, 30, 40),
    "blue": (34, 82, 192),
    "light blue": (140, 196, 236),
    "green": (38, 134, 62),
    "yellow": (240, 206, 48),
    "orange": (236, 122, 28),
    "purple": (120, 54, 160),
    "pink": (240, 140, 176),
    "brown": (112, 68, 38),
    "beige": (218, 194, 152),
}
HAIR_COLOURS = {
    "black": (26, 22, 22),
    "brown": (96, 58, 32),
    "blond": (218, 180, 98),
    "gray": (160, 160, 162),
    "red": (168, 70, 28),
}
SKIN_TONES = {"light": (240, 204, 178), "tan": (206, 158, 120), "dark": (122, 80, 56)}

UPPER_COLOURS = tuple(COLOURS)
LOWER_COLOURS = {
    "trousers": ("black", "gray", "brown", "beige", "white", "green", "red", "blue"),
    "jeans": ("blue", "light blue", "black", "gray"),
    "shorts": ("black", "gray", "beige", "white", "blue", "green", "red", "orange"),
    "skirt": ("black", "gray", "white", "red", "blue", "green", "yellow", "pink", "purple", "brown"),
    "long skirt": ("black", "gray", "white", "red", "blue", "green", "pink", "purple", "beige"),
}
SHOE_COLOURS = {
    "sneakers": ("white", "black", "gray", "red", "blue", "green", "yellow", "orange", "pink"),
    "leather shoes": ("black", "brown"),
    "boots": ("black", "brown", "beige", "red", "gray"),
    "sandals": ("black", "brown", "white", "red"),
}
BAG_COLOURS = ("black", "brown", "red", "blue", "green", "yellow", "pink", "purple", "gray", "white", "orange")
HAT_COLOURS = ("black", "white", "red", "blue", "green", "yellow", "gray", "brown", "orange", "purple")
HATS = ("cap", "beanie", "sun hat")
BAGS = ("backpack", "handbag", "shoulder bag", "suitcase")
PATTERNS = ("plain", "striped", "checked", "dotted", "logo")
OPEN_GARMENTS = ("jacket", "coat")
CAMERAS = ("cam_a", "cam_b", "cam_c", "cam_d", "cam_e", "cam_f")
VIEWS = ("front", "back", "side")


@dataclass(frozen=True)
class Person:
    """Attributes of one person; absent parts have the colour None."""

    gender: str
    hair: str
    hair_colour: str | None
    hat: str | None
    hat_colour: str | None
    upper: str
    upper_colour: str
    pattern: str
    pattern_colour: str | None
    inner_colour: str | None
    lower: str | None
    lower_colour: str | None
    shoes: str
    shoe_colour: str
    bag: str | None
    bag_colour: str | None
    skin: str = "light"
    build: float = 1.0
    tint: tuple[float, ...] = (0.0, 0.0, 0.0)

    @property
    def attributes(self) -> tuple:
        """Attributes that captions mention, in a fixed order; two people of a split never share them all."""
        return tuple(getattr(self, name) for name in NAMED_ATTRIBUTES)


NAMED_ATTRIBUTES = tuple(field.name for field in fields(Person) if field.name not in ("skin", "build", "tint"))


@dataclass(frozen=True)
class Scene:
    """View, pose and camera of one image.

    `size` is (width, height) in pixels; `top` and `height` place the figure in shares of the crop's height, `centre` in
    shares of its width; `stride`, `arms` and `knee` are the pose in -1..1; `seed` determines all other details.
    """

    view: str
    camera: str | None
    size: tuple[int, int]
    top: float
    height: float
    centre: float
    mirrored: bool
    walking: bool
    stride: float
    arms: tuple[float, float]
    occlusion: str | None
    blur: float
    seed: str

    @property
    def shoes_visible(self) -> bool:
        """Whether the shoes are visible."""
        return self.occlusion not in ("barrier", "cut")


def _other(rng: random.Random, values: Sequence[str], value: str | None) -> str:
    return rng.choice([item for item in values if item != value])


def _draw_upper(rng: random.Random, gender: str) -> dict:
    kinds = {"t-shirt": 26, "shirt": 16, "sweater": 14, "hoodie": 14, "jacket": 16, "coat": 14}
    if gender == "woman":
        kinds["dress"] = 14
    upper = rng.choices(list(kinds), list(kinds.values()))[0]
    colour = rng.choice(UPPER_COLOURS)
    if upper in OPEN_GARMENTS:
        inner = _other(rng, ("white", "black", "gray", "red", "blue", "yellow", "green"), colour)
        return {
            "upper": upper,
            "upper_colour": colour,
            "pattern": "plain",
            "pattern_colour": None,
            "inner_colour": inner,
        }
    pattern = rng.choices(PATTERNS, (52, 16, 12, 8, 12))[0]
    second = None if pattern == "plain" else _contrasting(rng, colour)
    return {"upper": upper, "upper_colour": colour, "pattern": pattern, "pattern_colour": second, "inner_colour": None}


def _contrasting(rng: random.Random, colour: str) -> str:
    light = ("white", "yellow", "beige", "light blue", "pink")
    return _other(rng, ("black", "blue", "red", "green") if colour in light else ("white", "yellow", "black"), colour)


def draw_person(rng: random.Random) -> Person:
    """Draw a person's attributes independently of any other's."""
    gender = rng.choice(("man", "woman"))
    styles = {"short": 86, "bald": 8, "long": 6} if gender == "man" else {"long": 52, "ponytail": 26, "short": 22}
    hair = rng.choices(list(styles), list(styles.values()))[0]
    hair_colour = None if hair == "bald" else rng.choices(list(HAIR_COLOURS), (36, 28, 16, 10, 10))[0]
    hat = rng.choices((None, *HATS), (66, 16, 10, 8))[0]
    upper = _draw_upper(rng, gender)
    lower = lower_colour = None
    if upper["upper"] != "dress":
        kinds = {"trousers": 40, "jeans": 28, "shorts": 20}
        if gender == "woman":
            kinds |= {"skirt": 22, "long skirt": 12}
        if upper["upper"] == "coat":  # a coat would hide them
            kinds = {kind: weight for kind, weight in kinds.items() if kind not in ("shorts", "skirt")}
        lower = rng.choices(list(kinds), list(kinds.values()))[0]
        lower_colour = _other(rng, LOWER_COLOURS[lower], upper["upper_colour"])
    shoes = rng.choices(tuple(SHOE_COLOURS), (56, 18, 18, 8))[0]
    bag = rng.choices((None, *BAGS), (30, 24, 16, 20, 10))[0]
    return Person(
        gender=gender,
        hair=hair,
        hair_colour=hair_colour,
        hat=hat,
        hat_colour=rng.choice(HAT_COLOURS) if hat else None,
        **upper,
        lower=lower,
        lower_colour=lower_colour,
        shoes=shoes,
        shoe_colour=rng.choice(SHOE_COLOURS[shoes]),
        bag=bag,
        bag_colour=rng.choice(BAG_COLOURS) if bag else None,
        **_draw_unmentioned(rng),
    )


def _draw_unmentioned(rng: random.Random) -> dict:
    return {
        "skin": rng.choices(tuple(SKIN_TONES), (50, 30, 20))[0],
        "build": rng.uniform(0.92, 1.12),
        "tint": tuple(rng.uniform(-8, 8) for _ in range(3)),
    }


def draw_twin(rng: random.Random, person: Person) -> Person:
    """Draw a person who differs from another in one attribute that captions mention (and in build and shade)."""
    changes: list[dict[str, str | None]] = [
        {"upper_colour": _other(rng, UPPER_COLOURS, person.upper_colour)},
        {"shoe_colour": _other(rng, SHOE_COLOURS[person.shoes], person.shoe_colour)},
    ]
    if person.hair_colour:
        changes.append({"hair_colour": _other(rng, tuple(HAIR_COLOURS), person.hair_colour)})
    if person.lower:
        changes.append({"lower_colour": _other(rng, LOWER_COLOURS[person.lower], person.lower_colour)})
    if person.bag:
        changes.append({"bag_colour": _other(rng, BAG_COLOURS, person.bag_colour)})
        changes.append({"bag": _other(rng, BAGS, person.bag)})
    else:
        changes.append({"bag": rng.choice(BAGS), "bag_colour": rng.choice(BAG_COLOURS)})
    if person.hat:
        changes.append({"hat_colour": _other(rng, HAT_COLOURS, person.hat_colour)})
    else:
        changes.append({"hat": rng.choice(HATS), "hat_colour": rng.choice(HAT_COLOURS)})
    if person.upper not in OPEN_GARMENTS and person.pattern != "logo":
        pattern = _other(rng, ("plain", "striped", "checked", "dotted"), person.pattern)
        second = None if pattern == "plain" else person.pattern_colour or _contrasting(rng, person.upper_colour)
        changes.append({"pattern": pattern, "pattern_colour": second})
    change = rng.choice(changes)
    second = change.get("pattern_colour", person.pattern_colour)
    if second is not None and second == change.get("upper_colour", person.upper_colour):
        return draw_twin(rng, person)
    return replace(person, **change, **_draw_unmentioned(rng))


def draw_identities(rng: random.Random, number: int, twin_share: float) -> list[Person]:
    """Draw people who all differ in attributes that captions mention.

    Args:
        rng: source of the random draws.
        number: number of people.
        twin_share: share of people who differ from an earlier one in only one attribute.

    Returns:
        `number` people.
    """
    people: dict[tuple, Person] = {}
    first = None
    while len(people) < number:
        twin_of = first if first is not None and rng.random() < twin_share else None
        person = draw_person(rng) if twin_of is None else draw_twin(rng, twin_of)
        people.setdefault(person.attributes, person)
        if twin_of is None:
            first = person
    drawn = list(people.values())
    rng.shuffle(drawn)
    return drawn


def draw_scene(rng: random.Random, person: Person, *, view: str, camera: str | None, seed: str) -> Scene:
    """Draw the view and light of an image.

    Args:
        rng: source of the random draws.
        person: the person in the image; items at the person's side are not hidden.
        view: `front`, `back` or `side`.
        camera: one of `CAMERAS`, or `None` for the clean look of the pretraining domain.
        seed: seed of the details that the scene does not specify.

    Returns:
        The scene.
    """
    clean = camera is None
    height = rng.randint(110, 180)
    width = min(80, max(48, round(height * rng.uniform(0.41, 0.47))))
    occlusion = None
    if rng.random() < (0.03 if clean else 0.14):
        occlusion = rng.choice(("bollard", "barrier", "edge", "passer-by", "cut"))
    share = rng.uniform(0.86, 0.94)
    top = rng.uniform(0.025, 0.985 - share)
    if occlusion == "cut":
        share, top = rng.uniform(1.02, 1.08), rng.uniform(0.02, 0.04)
    walking = rng.random() < 0.7
    return Scene(
        view=view,
        camera=camera,
        size=(width, height),
        top=top,
        height=share,
        centre=0.5 + rng.uniform(-0.04, 0.04),
        mirrored=rng.random() < 0.5,
        walking=walking,
        stride=rng.uniform(0.45, 1.0) * rng.choice((-1, 1)) if walking else rng.uniform(-0.25, 0.25),
        arms=(rng.uniform(-1, 1), rng.uniform(-1, 1)),
        occlusion=occlusion,
        blur=rng.uniform(0.0, 0.35) if clean else rng.choices((0.0, rng.uniform(0.3, 0.9)), (45, 55))[0],
        seed=seed,
    )
