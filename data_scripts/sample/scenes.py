"""Drawing of the sample set's images: a figure on a camera's background, with light, blur and occlusion."""

import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from data_scripts.sample.figure import Figure, Pen, shaded
from data_scripts.sample.people import Person, Scene


SUPERSAMPLING = 3
CAMERA_LOOKS = {
    # style, wall, floor, gain, red/green/blue cast, noise
    "cam_a": ("plaza", (176, 180, 184), (150, 148, 144), 1.00, (1.00, 1.00, 1.00), 5.0),
    "cam_b": ("park", (74, 112, 62), (118, 138, 84), 0.96, (1.02, 1.02, 0.92), 6.0),
    "cam_c": ("hall", (206, 196, 176), (142, 128, 110), 0.92, (1.06, 1.00, 0.90), 7.0),
    "cam_d": ("brick", (142, 92, 76), (126, 124, 122), 0.94, (1.03, 0.99, 0.96), 6.0),
    "cam_e": ("crossing", (116, 124, 134), (84, 86, 90), 1.04, (0.95, 1.00, 1.06), 6.0),
    "cam_f": ("shop", (92, 98, 108), (168, 164, 160), 0.88, (0.97, 0.99, 1.06), 8.0),
}


def _camera_background(rng: random.Random, scene: Scene) -> Image.Image:
    style, wall, floor, *_ = CAMERA_LOOKS[str(scene.camera)]
    width, height = scene.size
    jitter = rng.uniform(-10, 10)
    wall, floor = ([c + jitter for c in colour] for colour in (wall, floor))
    image = Image.new("RGB", scene.size, shaded(wall, 1))
    draw = ImageDraw.Draw(image)
    edge = height * rng.uniform(0.30, 0.62)
    shift = rng.uniform(0, 40)
    if style == "park":
        for _ in range(26):
            x, y, r = rng.uniform(-5, width + 5), rng.uniform(-5, edge), rng.uniform(4, 14)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=shaded(wall, rng.uniform(0.6, 1.35)))
        for _ in range(rng.randint(0, 2)):
            x = rng.uniform(0, width)
            draw.rectangle((x, 0, x + rng.uniform(3, 8), edge), fill=(78, 62, 48))
    elif style == "brick":
        for row in range(int(edge // 5) + 1):
            draw.line((0, row * 5, width, row * 5), fill=shaded(wall, 0.78))
            for x in range(-12, width, 12):
                x += 6 * (row % 2) + shift % 12
                draw.line((x, row * 5, x, row * 5 + 5), fill=shaded(wall, 0.78))
    elif style in ("shop", "plaza", "hall"):
        step = {"shop": 34, "plaza": 26, "hall": 44}[style]
        for x in range(-step, width + step, step):
            x += shift
            if style == "hall":
                draw.rectangle((x, 0, x + 3, edge), fill=shaded(wall, 0.85))
                draw.rectangle((x + 12, edge * 0.2, x + 30, edge * 0.62), fill=shaded(wall, 1.12))
            else:
                draw.rectangle(
                    (x + 3, edge * 0.05, x + step - 3, edge * 0.8), fill=shaded(wall, rng.uniform(0.55, 0.9))
                )
                if style == "shop":
                    draw.rectangle(
                        (x + 6, edge * 0.45, x + step - 8, edge * 0.7), fill=shaded(wall, rng.uniform(1.2, 1.9))
                    )
    else:
        draw.rectangle((0, 0, width, edge * 0.5), fill=shaded(wall, 1.25))
        for _ in range(rng.randint(1, 3)):
            x, w = rng.uniform(-20, width), rng.uniform(14, 34)
            draw.rectangle(
                (x, edge * 0.55, x + w, edge), fill=rng.choice(((150, 40, 40), (60, 70, 90), (190, 190, 190)))
            )
    draw.rectangle((0, edge, width, height), fill=shaded(floor, 1))
    _floor(draw, rng, style, floor, edge, scene.size)
    return image


def _floor(
    draw: ImageDraw.ImageDraw,
    rng: random.Random,
    style: str,
    floor: Sequence[float],
    edge: float,
    size: tuple[int, int],
) -> None:
    width, height = size
    if style == "park":
        x = rng.uniform(-0.3, 0.5) * width
        draw.polygon(
            [(x + 0.3 * width, edge), (x + 0.6 * width, edge), (x + width, height), (x, height)], fill=(170, 158, 134)
        )
        return
    if style == "crossing":
        for x in range(-30, width + 30, 22):
            x += rng.uniform(0, 3)
            draw.polygon(
                [(x, height), (x + 11, height), (x + 13, edge + 10), (x + 5, edge + 10)], fill=(206, 206, 202)
            )
        return
    if style == "brick":
        draw.rectangle((0, edge, width, edge + 4), fill=shaded(floor, 0.7))
    if style in ("plaza", "hall", "shop"):
        y, gap = edge, 3.0
        while y < height:
            draw.line((0, y, width, y), fill=shaded(floor, 0.86))
            y, gap = y + gap, gap * 1.35
        vanish = rng.uniform(0.2, 0.8) * width
        for k in range(-6, 7):
            draw.line((vanish + 5 * k, edge, vanish + 26 * k, height), fill=shaded(floor, 0.86))


def _clean_background(rng: random.Random, scene: Scene) -> Image.Image:
    width, height = scene.size
    base = np.array([rng.uniform(165, 235) for _ in range(3)], dtype=np.float32)
    grey = base.mean()
    wall, floor = 0.5 * base + 0.5 * grey, (0.5 * base + 0.5 * grey) * rng.uniform(0.72, 0.95)
    edge = height * rng.uniform(0.45, 0.8)
    blend = 1 / (1 + np.exp(-(np.arange(height, dtype=np.float32) - edge) / rng.uniform(2, 14)))
    rows = wall + (floor - wall) * blend[:, None]
    image = Image.fromarray(np.repeat(rows[:, None].clip(0, 255), width, 1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 3)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, edge), rng.uniform(6, 22)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=shaded(wall, rng.uniform(0.85, 1.12)))
    return image.filter(ImageFilter.GaussianBlur(4))


def _occlude(image: Image.Image, rng: random.Random, person: Person, scene: Scene) -> None:
    width, height = scene.size
    draw = ImageDraw.Draw(image)
    behind = scene.view == "side" and person.bag in ("suitcase", "backpack")
    side = 1 if scene.mirrored != behind else -1  # on the side without the bag
    if scene.occlusion == "bollard":
        x, w = width * rng.uniform(0.15, 0.72), width * rng.uniform(0.09, 0.14)
        top = height * rng.uniform(0.68, 0.8)
        colour = rng.choice(((70, 72, 76), (172, 150, 40), (150, 46, 40)))
        draw.rectangle((x, top, x + w, height), fill=colour)
        draw.ellipse((x, top - w * 0.4, x + w, top + w * 0.4), fill=shaded(colour, 1.2))
        draw.rectangle((x, top + w, x + w, top + 1.7 * w), fill=(220, 220, 214))
    elif scene.occlusion == "barrier":
        top = (scene.top + 0.86 * scene.height) * height
        colour = rng.choice(((86, 92, 98), (120, 104, 84), (60, 96, 60), (172, 172, 168)))
        draw.rectangle((0, top, width, height), fill=colour)
        draw.line((0, top, width, top), fill=shaded(colour, 1.3), width=2)
        for x in range(0, width, 14):
            draw.line((x, top, x, height), fill=shaded(colour, 0.85))
    elif scene.occlusion in ("edge", "passer-by"):
        w = width * rng.uniform(0.12, 0.2)
        x0, x1 = (0, w) if side < 0 else (width - w, width)
        if scene.occlusion == "edge":
            colour = rng.choice(((60, 60, 64), (140, 136, 130), (96, 82, 70)))
            draw.rectangle((x0, 0, x1, height), fill=colour)
            return
        colour = rng.choice(((52, 56, 70), (120, 110, 100), (90, 40, 46), (180, 180, 176)))
        x = 0 if side < 0 else width
        top = height * rng.uniform(0.12, 0.25)
        draw.ellipse((x - w, top, x + w, top + 2.6 * w), fill=colour)
        draw.rectangle((x - w, top + 1.3 * w, x + w, height * 0.6), fill=colour)
        draw.rectangle((x - w * 0.8, height * 0.55, x + w * 0.8, height), fill=shaded(colour, 0.6))


def _light(
    image: Image.Image, figure: Image.Image, rng: random.Random, noise: np.random.Generator, scene: Scene
) -> np.ndarray:
    """Compose the figure with its rim shading, then apply the camera's light, cast and noise."""
    alpha = figure.getchannel("A")
    radius = 0.022 * scene.size[1]
    soft = ImageChops.offset(alpha.filter(ImageFilter.GaussianBlur(radius)), round(rng.choice((-1, 1)) * radius), 0)
    shade = 0.70 + 0.30 * np.minimum(1.0, np.asarray(soft, dtype=np.float32) / 235)
    body = np.asarray(figure.convert("RGB"), dtype=np.float32) * shade[:, :, None]
    cover = np.asarray(alpha, dtype=np.float32)[:, :, None] / 255
    pixels = np.asarray(image, dtype=np.float32) * (1 - cover) + body * cover
    if scene.camera is None:
        gain, cast, sigma = rng.uniform(1.0, 1.12), (1.0, 1.0, 1.0), 1.0
    else:
        _, _, _, gain, cast, sigma = CAMERA_LOOKS[str(scene.camera)]
        gain *= rng.uniform(0.78, 1.18)
        cast = tuple(c * rng.uniform(0.97, 1.03) for c in cast)
    fall = np.linspace(rng.uniform(0.93, 1.06), rng.uniform(0.90, 1.03), scene.size[1], dtype=np.float32)
    pixels *= fall[:, None, None] * gain * np.asarray(cast, dtype=np.float32)
    if scene.camera is not None:
        mean = pixels.mean()
        pixels = mean + (pixels - mean) * rng.uniform(0.82, 1.04)
    return pixels + noise.standard_normal(pixels.shape, dtype=np.float32) * sigma


def render(person: Person, scene: Scene) -> tuple[Image.Image, dict[str, tuple[float, float, float, float]]]:
    """Draw one image.

    Args:
        person: the person in the image.
        scene: how it is taken; its seed determines all other details.

    Returns:
        The RGB image of `scene.size`, and the extent of each visible part (`person`, `upper`, `lower`, `shoes`, `bag`,
        `hat`, `hair`): left, top, right, bottom in 0..1.
    """
    rng = random.Random(f"{scene.seed}/light")
    noise = np.random.default_rng(rng.getrandbits(64))
    width, height = scene.size
    factor = SUPERSAMPLING
    scale = factor * scene.height * height / 100
    aside = {"suitcase": -6.0, "backpack": 3.0 if scene.view == "side" else 0.0}.get(person.bag or "", 0.0)
    if person.bag == "suitcase" and scene.view == "side":
        aside = 5.0
    x = factor * width * scene.centre + (-1 if scene.mirrored else 1) * aside * scale
    pen = Pen((factor * width, factor * height), (x, factor * height * scene.top), scale, scene.mirrored)
    Figure(person, scene, pen).paint()
    figure = pen.image.reduce(factor)
    box = figure.getchannel("A").getbbox()
    pen.extents["person"] = [factor * value for value in box or (0, 0, 0, 0)]

    image = _clean_background(rng, scene) if scene.camera is None else _camera_background(rng, scene)
    shadow = Image.new("L", scene.size, 0)
    foot = (scene.top + 0.975 * scene.height) * height
    reach = 0.17 * scene.height * height
    middle = x / factor
    ImageDraw.Draw(shadow).ellipse((middle - reach, foot - 3, middle + reach, foot + 5), fill=110)
    image.paste((20, 20, 24), (0, 0), shadow.filter(ImageFilter.GaussianBlur(2)))
    if scene.camera is not None:
        image = image.filter(ImageFilter.GaussianBlur(0.7))
    pixels = _light(image, figure, rng, noise, scene)
    result = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    _occlude(result, rng, person, scene)
    if scene.blur > 0.15:
        result = result.filter(ImageFilter.GaussianBlur(scene.blur * height / 150))
    parts = {}
    for part, (left, top, right, bottom) in pen.extents.items():
        if part == "shoes" and not scene.shoes_visible:
            continue
        edges = (
            left / (factor * width),
            top / (factor * height),
            right / (factor * width),
            bottom / (factor * height),
        )
        left, top, right, bottom = (min(1.0, max(0.0, edge)) for edge in edges)
        if right - left > 0.01 and bottom - top > 0.01:
            parts[part] = (left, top, right, bottom)
    return result, parts
