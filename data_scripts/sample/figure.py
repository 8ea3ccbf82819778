"""Drawing of one person of the sample set, as polygons in figure units.

Figure units: x is 0 on the body's axis, y runs from 0 (crown) to 100 (soles). A figure seen from the side faces +x.
"""

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from data_scripts.sample.people import COLOURS, HAIR_COLOURS, SKIN_TONES, Person, Scene


Colour = tuple[int, ...]  # red, green, blue
Fill = Colour | Image.Image
Point = tuple[float, float]
Points = Sequence[Point]
Joints = Sequence[tuple[float, float, float]]  # x, y, radius


def shaded(colour: Sequence[float] | np.ndarray, factor: float) -> Colour:
    """Multiply a colour's channels (0..255) by a factor, clipped."""
    return tuple(min(255, max(0, round(channel * factor))) for channel in colour[:3])


def smooth(points: Points, rounds: int = 2) -> Points:
    """Cut the corners of a closed polygon (Chaikin's scheme)."""
    for _ in range(rounds):
        cut = []
        for (ax, ay), (bx, by) in zip(points, [*points[1:], *points[:1]], strict=True):
            cut.append((0.75 * ax + 0.25 * bx, 0.75 * ay + 0.25 * by))
            cut.append((0.25 * ax + 0.75 * bx, 0.25 * ay + 0.75 * by))
        points = cut
    return points


def rounded(left: float, top: float, right: float, bottom: float, radius: float) -> Points:
    """Outline a rectangle with round corners."""
    points = []
    corners = ((right, top, -90), (right, bottom, 0), (left, bottom, 90), (left, top, 180))
    for x, y, start in corners:
        x += radius if x == left else -radius
        y += radius if y == top else -radius
        for degrees in range(start, start + 91, 30):
            angle = math.radians(degrees)
            points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    return points


class Pen:
    """Draws in figure units on a transparent canvas and records the extent of each named part.

    `extents[part]` is [left, top, right, bottom] in canvas pixels.
    """

    def __init__(self, size: tuple[int, int], origin: Point, scale: float, mirrored: bool) -> None:
        self.image = Image.new("RGBA", size, (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.origin, self.scale, self.sign = origin, scale, -1 if mirrored else 1
        self.extents: dict[str, list[float]] = {}

    def place(self, points: Points) -> Points:
        """Map points from figure units to canvas pixels."""
        (ox, oy), s = self.origin, self.scale
        return [(ox + self.sign * s * x, oy + s * y) for x, y in points]

    def _record(self, part: str | None, pixels: Points) -> None:
        if part is None:
            return
        xs, ys = [p[0] for p in pixels], [p[1] for p in pixels]
        box = [min(xs), min(ys), max(xs), max(ys)]
        old = self.extents.get(part)
        if old:
            box = [min(old[0], box[0]), min(old[1], box[1]), max(old[2], box[2]), max(old[3], box[3])]
        self.extents[part] = box

    def polygon(self, part: str | None, points: Points, fill: Fill, rounds: int = 0) -> None:
        """Fill a polygon with a colour or, if `fill` is an image of the canvas's size, with that image."""
        pixels = self.place(smooth(points, rounds) if rounds else points)
        self._record(part, pixels)
        if not isinstance(fill, Image.Image):
            self.draw.polygon(pixels, fill=(*fill, 255))
            return
        xs, ys = [p[0] for p in pixels], [p[1] for p in pixels]
        left, top = max(0, int(min(xs)) - 1), max(0, int(min(ys)) - 1)
        right, bottom = min(fill.width, int(max(xs)) + 2), min(fill.height, int(max(ys)) + 2)
        if right <= left or bottom <= top:
            return
        mask = Image.new("L", (right - left, bottom - top), 0)
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in pixels], fill=255)
        self.image.paste(fill.crop((left, top, right, bottom)), (left, top), mask)

    def ellipse(
        self,
        part: str | None,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: Fill,
        start: float = 0,
        end: float = 360,
    ) -> None:
        """Fill an ellipse, or the arc of it between two angles (degrees, clockwise from +x)."""
        steps = 28
        angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
        self.polygon(part, [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles], fill)

    def limb(self, part: str | None, joints: Joints, fill: Fill, outline: Fill | None = None) -> None:
        """Fill a limb: joints (x, y, radius) joined by tapering segments with round ends."""
        if outline is not None:
            self.limb(None, [(x, y, r + 0.55) for x, y, r in joints], outline)
        for (ax, ay, ar), (bx, by, br) in itertools.pairwise(joints):
            length = math.hypot(bx - ax, by - ay) or 1e-6
            nx, ny = -(by - ay) / length, (bx - ax) / length
            quad = [(ax + nx * ar, ay + ny * ar), (bx + nx * br, by + ny * br)]
            quad += [(bx - nx * br, by - ny * br), (ax - nx * ar, ay - ny * ar)]
            self.polygon(part, quad, fill)
        for x, y, r in joints:
            self.ellipse(part, x, y, r, r, fill)

    def line(self, points: Points, fill: Colour, width: float) -> None:
        """Draw an open line; `width` in figure units."""
        self.draw.line(self.place(points), fill=(*fill, 255), width=max(1, round(width * self.scale)), joint="curve")


def fabric(person: Person, pen: Pen, colour: Colour) -> Fill:
    """Return the fill of the upper garment: a colour, or an image of the canvas's size for a pattern."""
    if person.pattern in ("plain", "logo"):
        return colour
    second = COLOURS[str(person.pattern_colour)]
    cloth = Image.new("RGBA", pen.image.size, (*colour, 255))
    draw = ImageDraw.Draw(cloth)
    width, height = cloth.size
    period = 5.6 * pen.scale
    rows = [pen.origin[1] + (15 + 5.6 * i) * pen.scale for i in range(math.ceil(100 / 5.6))]
    columns = [pen.origin[0] + (i - 8) * period for i in range(17)]
    if person.pattern == "striped":
        for y in rows:
            draw.rectangle((0, y, width, y + 0.46 * period), fill=(*second, 255))
    elif person.pattern == "checked":
        mixed = tuple((a + b) // 2 for a, b in zip(colour, second, strict=True))
        for y in rows:
            draw.rectangle((0, y, width, y + 0.42 * period), fill=(*mixed, 255))
        for x in columns:
            draw.rectangle((x, 0, x + 0.42 * period, height), fill=(*mixed, 255))
        for y in rows:
            for x in columns:
                draw.rectangle((x, y, x + 0.42 * period, y + 0.42 * period), fill=(*second, 255))
    else:
        radius = 0.25 * period
        for index, y in enumerate(rows):
            for x in columns:
                x += 0.5 * period * (index % 2)
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*second, 255))
    return cloth


class Figure:
    """One person in one pose: draws every part with a [`Pen`] from back to front."""

    def __init__(self, person: Person, scene: Scene, pen: Pen) -> None:
        self.person, self.scene, self.pen = person, scene, pen
        self.side = scene.view == "side"
        self.back = scene.view == "back"
        self.skin = SKIN_TONES[person.skin]
        tint = person.tint
        self.colour = lambda name: tuple(
            min(250, max(12, round(c + t))) for c, t in zip(COLOURS[name], tint, strict=True)
        )
        man = person.gender == "man"
        self.shoulder = (11.0 if man else 8.9) * person.build
        self.waist = (9.0 if man else 6.6) * person.build
        self.hip = (8.4 if man else 8.8) * person.build
        self.bulk = {"hoodie": 0.6, "jacket": 0.5, "coat": 0.6, "sweater": 0.3}.get(person.upper, 0.0)
        self.upper_colour = self.colour(person.upper_colour)
        self.cloth = fabric(person, pen, self.upper_colour)
        self.edge = shaded(self.upper_colour, 0.62)
        if sum(self.upper_colour) < 150:
            self.edge = tuple(c + 34 for c in self.upper_colour)
        self.hem = {"t-shirt": 52, "shirt": 53.5, "sweater": 52, "hoodie": 53, "jacket": 51, "coat": 72, "dress": 50}[
            person.upper
        ]
        self.hands: list[tuple[float, float]] = []

    def paint(self) -> None:
        """Draw the whole figure."""
        person = self.person
        arms = self._arm_joints()
        self.hands = [joints[2] for joints in arms]
        if person.bag == "backpack" and self.side:
            self._backpack_side()
        if not self.back:
            self._hair_behind()
        if self.side:
            self._arm(arms[0], far=True)
        if person.bag == "suitcase":
            self._suitcase()
        self._legs()
        self._neck()
        if not self.side:
            for joints in arms:
                self._arm(joints)
        self._torso()
        if person.bag == "backpack" and not self.side:
            self._backpack()
        self._head()
        if self.side:
            if person.bag == "backpack":
                self.pen.limb("bag", [(-4.5, 18, 0.9), (1.5, 19.5, 1.0), (3.4, 28, 1.0), (-2.5, 38, 0.9)], self._bag())
            self._arm(arms[1])
        if person.bag == "shoulder bag":
            self._shoulder_bag()
        if person.bag == "handbag":
            self._handbag()
        if person.lower:
            hem = self.pen.place([(0, self.hem)])[0][1]
            self.pen.extents["lower"][1] = max(self.pen.extents["lower"][1], hem)

    def _bag(self, factor: float = 1.0) -> Colour:
        return shaded(self.colour(self.person.bag_colour), factor)

    def _dark(self, colour: Colour, factor: float = 0.7) -> Colour:
        return shaded(colour, factor) if sum(colour) > 150 else tuple(c + 30 for c in colour)

    # Limbs

    def _arm_joints(self) -> list[tuple[Point, Point, Point]]:
        swing = self.scene.stride
        joints = []
        for number, sign in enumerate((-1, 1)):
            lift = self.scene.arms[number]
            if self.side:
                angle = 0.5 * swing * (1 if number == 0 else -1) + 0.06 * lift
                bend = 0.22 + 0.18 * abs(lift) + (0.2 if angle > 0 else 0.0)
                shoulder = (-0.4, 21.0)
                sin1, cos1 = math.sin(angle), math.cos(angle)
                sin2, cos2 = math.sin(angle + bend), math.cos(angle + bend)
            else:
                angle = 0.17 + 0.07 * lift
                bend = angle - 0.14 - 0.18 * max(0.0, lift)
                shoulder = (sign * (self.shoulder - 1.9), 20.6)
                sin1, cos1 = sign * math.sin(angle), math.cos(angle)
                sin2, cos2 = sign * math.sin(bend), math.cos(bend)
            elbow = (shoulder[0] + 15.0 * sin1, shoulder[1] + 15.0 * cos1)
            wrist = (elbow[0] + 13.2 * sin2, elbow[1] + 13.2 * cos2)
            joints.append((shoulder, elbow, wrist))
        return joints

    def _arm(self, joints: Sequence[Point], far: bool = False) -> None:
        (sx, sy), (ex, ey), (wx, wy) = joints
        size = self.person.build * (1.0 if self.person.gender == "man" else 0.86)
        skin = shaded(self.skin, 0.8 if far else 1.0)
        cloth = shaded(self.upper_colour, 0.75) if far else self.cloth
        edge = self._dark(self.skin, 0.72)
        dx, dy = (wx - ex) / 13.2, (wy - ey) / 13.2
        self.pen.limb(None, [(wx, wy, 1.7 * size), (wx + 2.6 * dx, wy + 2.6 * dy, 1.9 * size)], skin, edge)
        if self.person.upper in ("t-shirt", "dress"):
            skin_arm = [(sx, sy, 2.7 * size), (ex, ey, 2.3 * size), (wx, wy, 1.7 * size)]
            self.pen.limb(None, skin_arm, skin, edge)
            reach = 0.62
            mx, my = sx + reach * (ex - sx), sy + reach * (ey - sy)
            self.pen.limb("upper", [(sx, sy, 3.2 * size), (mx, my, 3.3 * size)], cloth, self.edge)
            return
        sleeve = [
            (sx, sy, (3.0 + 0.7 * self.bulk) * size),
            (ex, ey, (2.5 + self.bulk) * size),
            (wx, wy, (2.0 + self.bulk) * size),
        ]
        self.pen.limb("upper", sleeve, cloth, self.edge)
        if self.person.upper in ("sweater", "hoodie"):
            self.pen.limb(None, [(wx - 0.4 * dx, wy - 0.4 * dy, 2.1 * size), (wx, wy, 2.0 * size)], self.edge)

    def _leg_joints(self) -> list[tuple[Point, Point, Point]]:
        stride = self.scene.stride
        legs = []
        for sign in (-1, 1):
            phase = sign * stride
            if self.side:
                angle = 0.42 * phase
                bend = 0.42 * max(0.0, -phase) + 0.04
                hip = (0.0, 50.0)
                knee = (hip[0] + 22.5 * math.sin(angle), hip[1] + 22.5 * math.cos(angle))
                ankle = (knee[0] + 22.0 * math.sin(angle - bend), knee[1] + 22.0 * math.cos(angle - bend))
            else:
                hip = (sign * 4.1 * self.person.build, 50.0)
                lift = 3.6 * max(0.0, -phase)
                knee = (hip[0] + sign * 0.5, 72.8 - 0.4 * lift)
                ankle = (hip[0] + sign * (0.9 - 0.25 * lift), 94.0 - lift)
            legs.append((hip, knee, ankle))
        return legs

    def _legs(self) -> None:
        person = self.person
        build = person.build
        legs = self._leg_joints()
        for number, (hip, knee, ankle) in enumerate(legs):
            far = self.side and number == 0
            skin = shaded(self.skin, 0.82 if far else 1.0)
            bare = [(*hip, 4.4 * build), (*knee, 2.9 * build), (*ankle, 1.9 * build)]
            if person.lower not in ("trousers", "jeans"):
                self.pen.limb(None, bare, skin, self._dark(self.skin, 0.75))
            if person.lower in ("trousers", "jeans", "shorts"):
                self._trouser_leg(hip, knee, ankle, far)
            self._shoe(knee, ankle, number, far)
        if person.lower in ("trousers", "jeans", "shorts"):
            colour = self.colour(person.lower_colour)
            hip = self.hip - (2.2 if self.side else 0.2)
            self.pen.polygon("lower", [(-hip, 45), (hip, 45), (hip, 52), (0, 55.5), (-hip, 52)], colour)
        elif person.lower:
            self._skirt(person.lower_colour, person.lower, "lower")
        elif person.upper == "dress":
            self._skirt(None, "dress", "upper")

    def _trouser_leg(self, hip: Point, knee: Point, ankle: Point, far: bool) -> None:
        person, build = self.person, self.person.build
        colour = shaded(self.colour(person.lower_colour), 0.78 if far else 1.0)
        edge = self._dark(colour, 0.66)
        if person.lower == "shorts":
            end = (hip[0] + 0.86 * (knee[0] - hip[0]), hip[1] + 0.86 * (knee[1] - hip[1]))
            self.pen.limb("lower", [(*hip, 4.7 * build), (*end, 4.3 * build)], colour, edge)
            return
        narrow = 2.5 if person.lower == "jeans" else 3.1
        cuff = (ankle[0], ankle[1] - 0.6)
        self.pen.limb("lower", [(*hip, 4.7 * build), (*knee, 3.6 * build), (*cuff, narrow * build)], colour, edge)
        if person.lower == "jeans":
            light = shaded(colour, 1.18) if sum(colour) > 150 else tuple(c + 18 for c in colour)
            thigh = (0.45 * hip[0] + 0.55 * knee[0], 0.45 * hip[1] + 0.55 * knee[1])
            shin = (0.55 * knee[0] + 0.45 * ankle[0], 0.55 * knee[1] + 0.45 * ankle[1])
            self.pen.limb(None, [(*thigh, 1.3), (*shin, 0.9)], light)
            self.pen.limb(None, [(cuff[0], cuff[1] - 0.4, narrow), (cuff[0], cuff[1] + 0.4, narrow)], light)

    def _skirt(self, colour_name: str | None, kind: str, part: str) -> None:
        length = {"skirt": 70, "long skirt": 90, "dress": 74}[kind]
        flare = {"skirt": 3.6, "long skirt": 3.0, "dress": 4.2}[kind]
        sway = 1.2 * self.scene.stride
        waist, hip = self.waist + 0.4, self.hip + 0.6
        if self.side:
            waist, hip = waist - 1.2, hip - 1.6
        points = [(-waist, 42), (waist, 42), (hip, 51), (hip + flare + sway, length), (-hip - flare + sway, length)]
        points.append((-hip, 51))
        base = self.upper_colour if colour_name is None else self.colour(colour_name)
        colour = self.cloth if colour_name is None else base
        self.pen.polygon(part, points, colour)
        fold = self._dark(base, 0.74)
        for x in (-0.5, 0.05, 0.55):
            self.pen.line([(x * hip, 54), (x * (hip + flare) + sway, length - 0.6)], fold, 0.35)
        self.pen.line([points[4], points[3]], fold, 0.5)

    def _shoe(self, knee: Point, ankle: Point, number: int, far: bool) -> None:
        person = self.person
        colour = shaded(self.colour(person.shoe_colour), 0.8 if far else 1.0)
        edge = self._dark(colour, 0.6)
        x, y = ankle
        if self.side:
            toe, heel = (7.4, -2.7) if person.shoes != "sandals" else (6.6, -2.3)
            body = [(x + heel, y - 1.4), (x + 2.2, y - 1.6), (x + toe - 2, y + 0.8), (x + toe, y + 3.2)]
            body += [(x + toe - 0.4, y + 4.4), (x + heel, y + 4.4)]
            sole = [(x + heel - 0.2, y + 3.5), (x + toe, y + 3.5), (x + toe, y + 4.8), (x + heel - 0.2, y + 4.8)]
        else:
            sign = -1 if number == 0 else 1
            x += 0.7 * sign
            wide = 3.0
            low = y + (3.2 if self.back else 4.6)
            body = [(x - 2.2, y - 1.4), (x + 2.2, y - 1.4), (x + wide, low - 1.4), (x + 2.2, low), (x - 2.2, low)]
            body.append((x - wide, low - 1.4))
            sole = [
                (x - wide, low - 0.9),
                (x + wide, low - 0.9),
                (x + wide * 0.9, low + 0.3),
                (x - wide * 0.9, low + 0.3),
            ]
        if person.shoes == "boots":
            up = (ankle[0] + 0.40 * (knee[0] - ankle[0]), ankle[1] + 0.40 * (knee[1] - ankle[1]))
            self.pen.limb("shoes", [(*up, 3.3), (*ankle, 2.9)], colour, edge)
            self.pen.line([(up[0] - 3.2, up[1] - 1), (up[0] + 3.2, up[1] - 1)], edge, 0.7)
        if person.shoes == "sandals":
            self.pen.polygon(None, body, shaded(self.skin, 0.85 if far else 0.96), 2)
            self.pen.polygon("shoes", sole, colour)
            left, right = min(p[0] for p in body), max(p[0] for p in body)
            self.pen.line([(left, y + 0.6), (right - 0.6, y + 1.6)], colour, 1.1)
            self.pen.line([(left + 0.3, y + 2.8), (right, y + 3.0)], colour, 1.1)
            return
        self.pen.polygon("shoes", body, colour, 1)
        if person.shoes == "sneakers":
            white = person.shoe_colour == "white"
            self.pen.polygon(
                "shoes", sole, shaded((206, 206, 204) if white else (240, 240, 238), 0.85 if far else 1.0)
            )
            lace = shaded(colour, 0.7) if white else (236, 236, 234)
            if self.side:
                self.pen.line([(x + 1.4, y - 0.6), (x + 3.8, y + 1.6)], lace, 0.6)
            elif not self.back:
                self.pen.line([(x - 1.1, y + 0.4), (x + 1.1, y + 0.4)], lace, 0.5)
                self.pen.line([(x - 1.1, y + 1.7), (x + 1.1, y + 1.7)], lace, 0.5)
        else:
            self.pen.polygon("shoes", sole, edge)

    # Trunk

    def _neck(self) -> None:
        x = 0.2 if self.side else 0.0
        self.pen.limb(None, [(x, 11.5, 2.3), (x, 17.0, 2.5)], shaded(self.skin, 0.86))

    def _torso_outline(self) -> Points:
        hem, bulk = self.hem, self.bulk
        man = self.person.gender == "man"
        if self.side:
            depth, chest = 5.9 * self.person.build + bulk, (6.2 if man else 7.3) * self.person.build + bulk
            belly = (6.2 if man else 5.2) * self.person.build + bulk
            low = 6.6 * self.person.build + bulk + (1.8 if hem > 60 else 0)
            return [
                (-2.2, 15.8),
                (2.6, 15.8),
                (chest - 1.6, 20),
                (chest, 28),
                (belly, 38),
                (low, hem),
                (-low, hem),
                (-belly + 0.6, 38),
                (-depth, 24),
            ]
        s, w, h = self.shoulder + 0.3 * bulk, self.waist + bulk, self.hip + 0.5 + bulk
        if hem > 60:
            h += 1.6
        right = [(2.7, 15.6), (s - 2.2, 17.6), (s - 0.4, 20.4), (s - 1.6, 28), (w, 39), (h - 0.4, 47), (h, hem)]
        return right + [(-x, y) for x, y in reversed(right)]

    def _torso(self) -> None:
        person, pen = self.person, self.pen
        outline = self._torso_outline()
        grown = [(x + (0.65 if x > 0 else -0.65), y) for x, y in outline]
        pen.polygon(None, grown, self.edge)
        pen.polygon("upper", outline, self.cloth)
        left, right = min(x for x, _ in outline), max(x for x, _ in outline)
        if person.upper in ("sweater", "hoodie"):
            pen.polygon(
                "upper",
                [(left, self.hem - 2.2), (right, self.hem - 2.2), (right, self.hem), (left, self.hem)],
                self.edge,
            )
        if person.upper == "hoodie":
            hood = [(-5.6, 17.5), (-4.6, 13.6), (0, 12.6), (4.6, 13.6), (5.6, 17.5), (0, 21.5)]
            if self.side:
                hood = [(-6.4, 14.6), (-2.0, 13.0), (1.8, 16.0), (0.4, 19.4), (-5.0, 21.0)]
            pen.polygon("upper", hood, self.edge, 2)
            if self.back:
                pen.polygon("upper", [(x * 0.8, y + 0.8) for x, y in hood], self.upper_colour, 2)
            elif not self.side:
                pen.polygon(None, [(-3, 14.4), (3, 14.4), (0, 19.0)], shaded(self.skin, 0.9), 1)
                pen.line([(-1.6, 19), (-2.0, 26)], (238, 238, 236), 0.5)
                pen.line([(1.6, 19), (2.0, 26)], (238, 238, 236), 0.5)
                pen.polygon("upper", [(-5, 40), (5, 40), (7, 48), (-7, 48)], self.edge)
                pen.polygon("upper", [(-4.5, 40.6), (4.5, 40.6), (6.3, 47.4), (-6.3, 47.4)], self.upper_colour)
        if person.upper in ("jacket", "coat"):
            self._open_front(outline)
        elif person.upper == "shirt":
            self._shirt_details()
        elif person.upper in ("t-shirt", "sweater", "dress") and not (self.back or self.side):
            low = 19.6 if person.upper != "sweater" else 18.2
            pen.polygon(None, [(-3.4, 15.0), (3.4, 15.0), (2.2, low - 0.8), (0, low), (-2.2, low - 0.8)], self.edge, 1)
            pen.polygon(
                None, [(-2.8, 14.6), (2.8, 14.6), (1.7, low - 1.4), (0, low - 0.8), (-1.7, low - 1.4)], self.skin, 1
            )
        if person.pattern == "logo" and not self.back:
            self._logo()
        if person.upper == "dress":
            pen.line([(-self.waist, 41), (self.waist, 41)] if not self.side else [(-5, 41), (5, 41)], self.edge, 1.0)

    def _open_front(self, outline: Points) -> None:
        person, pen, hem = self.person, self.pen, self.hem
        inner = self.colour(person.inner_colour)
        if self.back:
            pen.polygon("upper", [(-4.4, 14.6), (4.4, 14.6), (4.0, 17.4), (-4.0, 17.4)], self.edge, 1)
            if person.upper == "coat":
                pen.line([(0, 52), (0, hem)], self.edge, 0.6)
                pen.line([(-self.waist - 1, 41), (self.waist + 1, 41)], self.edge, 1.3)
            else:
                pen.line([(-self.hip - 1, hem - 2), (self.hip + 1, hem - 2)], self.edge, 0.6)
            return
        if self.side:
            pen.polygon("upper", [(-3.4, 14.2), (3.2, 14.8), (3.4, 17.6), (-3.6, 17.4)], self.edge, 1)
            front = [p for p in outline if p[0] > 2]
            strip = [(x - 2.4, y) for x, y in front] + [(x, y) for x, y in reversed(front)]
            pen.polygon(None, strip, inner)
            return
        gap = 3.3 if person.upper == "jacket" else 2.9
        pen.polygon(
            None, [(-2.8, 15.2), (2.8, 15.2), (gap, 24), (gap + 0.7, hem), (-gap - 0.7, hem), (-gap, 24)], inner
        )
        pen.polygon(None, [(-2.2, 14.6), (2.2, 14.6), (0, 18.6)], self.skin, 1)
        for sign in (-1, 1):
            lapel = [(sign * 2.4, 14.8), (sign * 5.0, 15.8), (sign * 6.2, 23), (sign * 3.0, 29)]
            pen.polygon("upper", lapel, self.edge)
            pen.polygon("upper", [(x - sign * -0.3, y - 0.7) for x, y in lapel], self.upper_colour)
            pen.line([(sign * gap, 26), (sign * (gap + 0.7), hem)], self.edge, 0.6)
            pocket_y = 43 if person.upper == "jacket" else 52
            pen.line([(sign * (gap + 2.0), pocket_y), (sign * (gap + 4.4), pocket_y - 0.8)], self.edge, 0.6)

    def _shirt_details(self) -> None:
        pen = self.pen
        collar = shaded(self.upper_colour, 1.12) if sum(self.upper_colour) > 150 else self.edge
        if self.back:
            pen.polygon("upper", [(-3.8, 14.6), (3.8, 14.6), (3.6, 16.8), (-3.6, 16.8)], collar)
            pen.line([(-self.shoulder + 3, 23), (self.shoulder - 3, 23)], self.edge, 0.4)
            return
        if self.side:
            pen.polygon("upper", [(-2.8, 14.4), (3.0, 15.0), (4.0, 18.2), (-2.8, 16.8)], collar)
            pen.line([(5.4, 20), (5.8, self.hem)], self.edge, 0.4)
            return
        pen.polygon(None, [(-2.4, 14.8), (2.4, 14.8), (0, 20)], self.skin)
        for sign in (-1, 1):
            pen.polygon("upper", [(sign * 2.2, 14.2), (sign * 4.4, 16.4), (sign * 2.6, 20.4), (0, 18.4)], self.edge)
            pen.polygon(
                "upper", [(sign * 2.3, 14.4), (sign * 4.0, 16.4), (sign * 2.5, 19.6), (0.2 * sign, 18.0)], collar
            )
        pen.line([(0, 19.4), (0, self.hem)], self.edge, 0.5)
        for y in range(24, int(self.hem), 6):
            pen.ellipse(None, 0.9, y, 0.55, 0.55, (236, 236, 232) if sum(self.upper_colour) < 480 else (60, 60, 64))

    def _logo(self) -> None:
        pen, colour = self.pen, COLOURS[str(self.person.pattern_colour)]
        x = 1.6 if self.side else 0.0
        wide = 2.6 if self.side else 4.4
        kind = random.Random(f"{self.person.attributes}").randrange(3)
        if kind == 0:
            pen.ellipse(None, x, 29, wide, 3.9, colour)
            pen.ellipse(None, x, 29, wide * 0.45, 1.7, self.upper_colour)
        elif kind == 1:
            pen.polygon(None, [(x - wide, 26.6), (x + wide, 26.6), (x + wide, 31.4), (x - wide, 31.4)], colour)
            pen.line([(x - wide * 0.7, 29), (x + wide * 0.7, 29)], self.upper_colour, 0.8)
        else:
            pen.polygon(None, [(x, 24.6), (x + wide, 29), (x, 33.4), (x - wide, 29)], colour)

    # Head

    def _hair_behind(self) -> None:
        person, pen = self.person, self.pen
        if person.hair != "long" or self.side:
            return
        colour = HAIR_COLOURS[str(person.hair_colour)]
        points = [(-4.8, 3), (4.8, 3), (6.2, 9), (6.8, 18), (6.2, 25), (-6.2, 25), (-6.8, 18), (-6.2, 9)]
        pen.polygon("hair", points, shaded(colour, 0.85), 2)

    def _head(self) -> None:
        person = self.person
        hair = HAIR_COLOURS[person.hair_colour] if person.hair_colour else None
        if self.back:
            self._head_back(hair)
        elif self.side:
            self._head_side(hair)
        else:
            self._head_front(hair)
        if person.hat:
            self._hat()

    def _head_front(self, hair: Colour | None) -> None:
        person, pen, skin = self.person, self.pen, self.skin
        for sign in (-1, 1):
            pen.ellipse(None, sign * 4.6, 8.6, 0.9, 1.4, shaded(skin, 0.9))
        if hair is None:
            pen.ellipse(None, 0, 7.6, 4.7, 6.4, skin)
        else:
            pen.ellipse("hair", 0, 6.6, 5.3, 6.5, hair)
            pen.ellipse(None, 0, 9.0, 4.3, 5.2, skin)
            fringe = [(-4.8, 7.2), (-4.6, 3.0), (0, 1.0), (4.6, 3.0), (4.8, 7.2), (3.4, 5.4), (0.8, 4.6), (-2.8, 5.8)]
            pen.polygon("hair", fringe, hair, 2)
            if person.hair == "long":
                for sign in (-1, 1):
                    lock = [(sign * 3.8, 4.5), (sign * 5.6, 6), (sign * 6.6, 15), (sign * 6.4, 25), (sign * 3.9, 24)]
                    pen.polygon("hair", [*lock, (sign * 4.2, 13)], hair, 2)
        dark = (40, 30, 28)
        for sign in (-1, 1):
            pen.ellipse(None, sign * 1.75, 8.4, 0.62, 0.5, dark)
            pen.line([(sign * 1.0, 7.1), (sign * 2.6, 7.0)], shaded(skin, 0.45), 0.4)
        pen.line([(0, 8.8), (0.3, 10.2)], shaded(skin, 0.78), 0.4)
        lips = (176, 60, 64) if person.gender == "woman" else shaded(skin, 0.62)
        pen.line([(-1.3, 11.9), (1.3, 11.9)], lips, 0.6)

    def _head_back(self, hair: Colour | None) -> None:
        person, pen = self.person, self.pen
        for sign in (-1, 1):
            pen.ellipse(None, sign * 4.7, 8.6, 0.9, 1.4, shaded(self.skin, 0.9))
        if hair is None:
            pen.ellipse(None, 0, 7.6, 4.8, 6.4, self.skin)
            return
        pen.ellipse(None, 0, 8.2, 4.5, 6.0, self.skin)
        if person.hair == "long":
            points = [(-5.0, 2.4), (0, -0.4), (5.0, 2.4), (6.2, 10), (6.8, 20), (5.6, 29), (-5.6, 29), (-6.8, 20)]
            pen.polygon("hair", [*points, (-6.2, 10)], hair, 2)
            for x in (-2.8, 0.2, 3.0):
                pen.line([(0.7 * x, 8), (x, 27)], self._dark(hair, 0.8), 0.4)
            return
        pen.ellipse("hair", 0, 6.4, 5.3, 6.4, hair)
        if person.hair == "ponytail":
            pen.polygon(
                "hair",
                [(-1.6, 7), (1.6, 7), (2.6, 14), (2.2, 22), (0, 27), (-2.2, 22), (-2.6, 14)],
                self._dark(hair, 0.8),
                2,
            )
            pen.polygon("hair", [(-1.2, 8), (1.2, 8), (2.0, 14), (1.6, 22), (0, 26), (-1.6, 22), (-2.0, 14)], hair, 2)
            pen.line([(-1.6, 8.2), (1.6, 8.2)], (190, 40, 60), 0.9)

    def _head_side(self, hair: Colour | None) -> None:
        person, pen, skin = self.person, self.pen, self.skin
        pen.polygon(None, [(4.6, 7.4), (6.7, 9.8), (4.6, 10.6)], skin)
        if hair is None:
            pen.ellipse(None, 0.4, 7.6, 5.3, 6.4, skin)
        else:
            pen.ellipse("hair", -0.4, 6.8, 5.9, 6.7, hair)
            pen.ellipse(None, 1.7, 8.8, 4.0, 5.4, skin)
            pen.polygon(
                "hair", [(-3, 1), (3, 0.8), (5.6, 4.2), (4.4, 5.2), (1.2, 5.0), (0.2, 9.0), (-4.6, 9.6)], hair, 1
            )
            if person.hair == "long":
                points = [(-5.4, 4), (-1.0, 5), (0.4, 10), (-0.6, 18), (-1.6, 26), (-6.4, 27), (-7.0, 16)]
                pen.polygon("hair", points, hair, 2)
            elif person.hair == "ponytail":
                tail = [(-4.6, 4.6), (-7.4, 5.2), (-9.8, 11), (-9.6, 19), (-8.2, 22), (-7.0, 14), (-5.0, 8)]
                pen.polygon("hair", tail, hair, 2)
                pen.line([(-5.6, 4.2), (-5.4, 7.6)], (190, 40, 60), 0.9)
        pen.ellipse(None, -0.6, 9.0, 0.9, 1.5, shaded(skin, 0.84))
        pen.ellipse(None, 3.9, 8.0, 0.55, 0.55, (40, 30, 28))
        pen.line([(4.0, 12.0), (5.3, 11.9)], (176, 60, 64) if person.gender == "woman" else shaded(skin, 0.62), 0.6)

    def _hat(self) -> None:
        person, pen = self.person, self.pen
        colour = self.colour(person.hat_colour)
        dark = self._dark(colour, 0.72)
        x = -0.3 if self.side else 0.0
        rx = 6.1 if self.side else 5.6
        if person.hat == "beanie":
            pen.ellipse("hat", x, 5.0, rx, 6.8, colour, 180, 360)
            pen.polygon(
                "hat", [(x - rx - 0.2, 3.6), (x + rx + 0.2, 3.6), (x + rx + 0.2, 6.6), (x - rx - 0.2, 6.6)], dark
            )
            pen.ellipse("hat", x, -1.6, 1.5, 1.3, dark)
        elif person.hat == "sun hat":
            pen.ellipse("hat", x, 4.6, rx, 6.0, colour, 180, 360)
            pen.ellipse("hat", x, 5.0, 10.4, 2.0, dark)
            pen.ellipse("hat", x, 4.5, 10.4, 1.8, colour)
            pen.line([(x - rx, 3.4), (x + rx, 3.4)], dark, 0.9)
        else:
            pen.ellipse("hat", x, 5.2, rx, 6.2, colour, 180, 360)
            if self.side:
                pen.polygon("hat", [(3.8, 3.4), (11.4, 5.2), (11.0, 6.6), (3.8, 5.8)], dark, 1)
            elif self.back:
                pen.line([(-rx, 5.4), (rx, 5.4)], dark, 0.8)
            else:
                pen.ellipse("hat", 0, 5.0, 5.9, 1.9, dark)
                pen.ellipse("hat", 0, 4.6, 5.4, 1.2, shaded(colour, 0.9))

    # Bags

    def _backpack(self) -> None:
        pen, colour, dark = self.pen, self._bag(), self._dark(self._bag(), 0.68)
        if self.back:
            pack = [
                (-7.4, 20),
                (-4, 18),
                (4, 18),
                (7.4, 20),
                (8.4, 30),
                (8.2, 44),
                (6, 46),
                (-6, 46),
                (-8.2, 44),
                (-8.4, 30),
            ]
            pen.polygon("bag", [(x * 1.06, y + 0.3) for x, y in pack], dark, 1)
            pen.polygon("bag", pack, colour, 1)
            pen.polygon("bag", [(-6, 33), (6, 33), (6.2, 43.4), (-6.2, 43.4)], dark, 1)
            pen.polygon("bag", [(-5.4, 33.8), (5.4, 33.8), (5.6, 42.8), (-5.6, 42.8)], colour, 1)
            pen.line([(-5.6, 36.2), (5.6, 36.2)], dark, 0.5)
            pen.line([(-6.4, 25), (0, 23.6), (6.4, 25)], dark, 0.5)
            return
        for sign in (-1, 1):
            strap = [(sign * 5.0, 16.6, 1.35), (sign * 6.0, 27, 1.35), (sign * (self.waist - 0.4), 37, 1.2)]
            pen.limb("bag", strap, colour, dark)

    def _backpack_side(self) -> None:
        pen, colour, dark = self.pen, self._bag(), self._dark(self._bag(), 0.68)
        pack = [(-4, 18.5), (-9, 18.5), (-12.6, 22), (-14.2, 34), (-13.2, 44), (-5, 45.6)]
        pen.polygon("bag", [(x * 1.04, y + 0.3) for x, y in pack], dark, 1)
        pen.polygon("bag", pack, colour, 1)
        pen.line([(-10.6, 21), (-11, 43)], dark, 0.6)

    def _handbag(self) -> None:
        pen, colour, dark = self.pen, self._bag(), self._dark(self._bag(), 0.68)
        x, y = self.hands[1]
        y += 2.6
        if not self.side:
            x += 0.8
        pen.line([(x - 2.8, y + 6.0), (x - 1.8, y + 0.4), (x + 1.8, y + 0.4), (x + 2.8, y + 6.0)], dark, 1.0)
        body = [(x - 4.2, y + 5.2), (x + 4.2, y + 5.2), (x + 5.4, y + 14), (x - 5.4, y + 14)]
        pen.polygon("bag", [(a, b + 0.5) for a, b in body], dark)
        pen.polygon("bag", body, colour)
        pen.line([(x - 4.6, y + 8.0), (x + 4.6, y + 8.0)], dark, 0.6)

    def _shoulder_bag(self) -> None:
        pen, colour, dark = self.pen, self._bag(), self._dark(self._bag(), 0.68)
        if self.side:
            pen.line([(-1.2, 16.8), (2.6, 30), (2.4, 44)], dark, 1.5)
            x, y = 1.0, 43.5
        else:
            x, y = self.hip + 1.2, 43.5
            pen.line([(-5.4, 16.8), (0.4, 29), (x, y + 1)], dark, 1.9)
            pen.line([(-5.4, 16.8), (0.4, 29), (x, y + 1)], colour, 1.3)
        pen.polygon("bag", rounded(x - 6.1, y - 0.5, x + 6.1, y + 10.9, 1.7), dark)
        pen.polygon("bag", rounded(x - 5.6, y, x + 5.6, y + 10.4, 1.4), colour)
        pen.polygon(
            "bag", [(x - 5, y + 0.5), (x + 5, y + 0.5), (x + 4.6, y + 5), (x - 4.6, y + 5)], shaded(colour, 0.86)
        )
        pen.line([(x - 4.9, y + 5), (x + 4.9, y + 5)], dark, 0.6)

    def _suitcase(self) -> None:
        pen, colour, dark = self.pen, self._bag(), self._dark(self._bag(), 0.68)
        x = -15.5 if self.side else self.shoulder + 8.0
        hand = self.hands[0] if self.side else self.hands[1]
        pen.line(
            [(hand[0], hand[1] + 2.6), (x - 1.6, 74), (x + 1.6, 74), (hand[0] + 0.8, hand[1] + 2.6)], (92, 94, 98), 0.8
        )
        for wheel in (-4.0, 4.0):
            pen.ellipse("bag", x + wheel, 96.6, 1.5, 1.5, (40, 40, 42))
        pen.polygon("bag", rounded(x - 6.8, 71.4, x + 6.8, 96.4, 2.2), dark)
        pen.polygon("bag", rounded(x - 6.3, 72, x + 6.3, 95.8, 1.9), colour)
        for dx in (-2.8, 0.0, 2.8):
            pen.line([(x + dx, 74.5), (x + dx, 94)], dark, 0.5)
