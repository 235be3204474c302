"""The drawn films of the scale model: a chest of 112 x 112 pixels, five findings in three grades.

Each finding has a sign and a side of its own, so that a student of 0.66 M parameters can see it.
The nuisance variables change the film and mean nothing; world.py lets teachers err by them.
"""

from typing import NamedTuple

import numpy as np

SIZE = 112  # pixels: 8 x 8 patches of 14, merged to 16 image tokens
# each in [0, 1]; the tube is there or not
NUISANCE = ("exposure", "heart", "ribs", "tilt", "height", "tube")


def draw_nuisance(rng, count):
    """Draws the nuisance variables of films.

    rng    np.random.Generator
    count  number of films
    Returns (count, 6) in [0, 1], in the order of NUISANCE; the last, the tube, is 0 or 1.
    """
    nuisance = rng.random((count, len(NUISANCE)))
    nuisance[:, -1] = nuisance[:, -1] > 0.5
    return nuisance


def draw_film(grades, nuisance, rng):
    """Draws one film.

    grades    five integers in {0 absent, 1 mild, 2 severe}, in the order of world.FINDINGS
    nuisance  six numbers in [0, 1], in the order of NUISANCE
    rng       np.random.Generator, of shapes and noise
    Returns (SIZE, SIZE) uint8; bright is dense, as on a radiograph.
    """
    consolidation, effusion, pneumonia, pneumothorax, edema = grades
    exposure, heart_size, rib_contrast, tilt, height, tube = nuisance
    middle = 56 + 4 * (tilt - 0.5)
    film = Film(rng)
    top, base = 17 + film.jitter(1), 80 + 10 * height
    left, right = draw_chest(film, middle, top, base, rib_contrast, heart_size)
    if consolidation:
        draw_consolidation(film, left, consolidation)
    if effusion:
        draw_effusion(film, right, base, effusion)
    if pneumonia:
        draw_pneumonia(film, right, pneumonia)
    if pneumothorax:
        draw_pneumothorax(film, left, pneumothorax)
    if edema:
        draw_edema(film, (left, right), middle, edema)
    if tube > 0.5:
        line = np.exp(-0.5 * (film.x - middle - 3 - 0.1 * (film.y - 20)) ** 2)
        film.blend(235, 0.8 * line * soft(72 - film.y, 2))
    noise = rng.normal(0, 4, film.image.shape)
    image = film.image * (0.75 + 0.4 * exposure) + 30 * (exposure - 0.5) + noise
    return np.clip(image, 0, 255).astype(np.uint8)


def soft(distance, width=1.0):
    """A soft edge: 0 far outside (distance << 0), 1 far inside.

    distance  array of any shape
    width     of the edge, in the unit of `distance`
    Returns an array of the same shape.
    """
    return 1 / (1 + np.exp(-np.clip(distance / width, -40, 40)))


class Film:
    """A film that is being drawn.

    `image` (SIZE, SIZE) is in grey levels, `x` and `y` (SIZE, SIZE) are in pixels.
    """

    def __init__(self, rng):
        self.rng = rng
        self.y, self.x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
        # the trunk, narrower towards the neck
        trunk = 50 - 0.02 * np.maximum(30 - self.y, 0) ** 2 - np.abs(self.x - 56)
        self.image = 20 + 125 * soft(trunk, 1.5)

    def jitter(self, pixels):
        """A random shift with this standard deviation."""
        return self.rng.normal(0, pixels)

    def blend(self, density, opacity):
        """Moves the image towards a grey level and never past it: shadows do not add up to white.

        density  the grey level
        opacity  (SIZE, SIZE) in [0, 1]; 1 reaches it
        """
        self.image = self.image + opacity * (density - self.image)


class Lung(NamedTuple):
    """One lung.

    inside  (SIZE, SIZE) in [0, 1], with soft edges
    cx, cy  its centre, in pixels
    rx, ry  half its width and height, in pixels
    side    -1 on the picture's left, 1 on its right
    """
    inside: np.ndarray
    cx: float
    cy: float
    rx: float
    ry: float
    side: int


def draw_chest(film, middle, top, base, rib_contrast, heart_size):
    """Draws lungs, ribs, heart and spine. Returns the two lungs, the picture's left one first."""
    left = draw_lung(film, -1, middle, top, base)
    right = draw_lung(film, 1, middle, top, base)
    x, y = film.x, film.y
    lungs = left.inside + right.inside
    for k in range(8):  # ribs fall off to the sides
        arc = top + 4 + 9 * k + (x - middle) ** 2 / 200
        rib = np.exp(-0.5 * ((y - arc) / 1.2) ** 2)
        film.blend(160, (0.05 + 0.13 * rib_contrast) * rib * lungs)
    across = (x - middle - 4) / (9 + 8 * heart_size)
    film.blend(165, 0.9 * soft(1 - across ** 2 - ((y - base + 18) / 17) ** 2, 0.15))  # heart
    film.blend(195, 0.6 * np.exp(-0.5 * ((x - middle) / 4.5) ** 2))  # spine
    return left, right


def draw_lung(film, side, middle, top, base):
    """Draws the lung of a side above its half of the diaphragm, and returns it."""
    x, y = film.x, film.y
    cx, cy = middle + side * 23 + film.jitter(0.6), (top + base) / 2
    rx, ry = 16 + film.jitter(0.4), (base - top) / 2
    # the diaphragm; the liver lifts the side on the picture's left
    dome = base - 9 + 0.04 * (x - cx + 5 * side) ** 2 - 3 * (side < 0)
    oval = 1 - np.abs((x - cx) / rx) ** 2.5 - np.abs((y - cy) / ry) ** 2.5
    inside = soft(oval, 0.12) * soft(dome - y)
    film.blend(45, inside)
    return Lung(inside, cx, cy, rx, ry, side)


def draw_consolidation(film, lung, grade):
    """One dense block with a sharp edge, low."""
    radius, opacity = ((7.5, 0.75), (13, 0.95))[grade - 1]
    across = (film.x - lung.cx - film.jitter(1.5)) / radius
    down = (film.y - lung.cy - 0.22 * lung.ry - film.jitter(2.5)) / (0.85 * radius)
    film.blend(165, opacity * soft(1 - across ** 2 - down ** 2, 0.16) * lung.inside)


def draw_effusion(film, lung, base, grade):
    """A level at the base that climbs at the wall."""
    surface = base - (14, 29)[grade - 1] + film.jitter(1.2) - 0.3 * lung.side * (film.x - lung.cx)
    film.blend(150, 0.95 * soft(film.y - surface, 1.2) * lung.inside)


def draw_pneumonia(film, lung, grade):
    """Small soft spots, high."""
    for _ in range((3, 9)[grade - 1]):
        across = film.x - lung.cx - film.jitter(5.5)
        down = film.y - lung.cy + 0.35 * lung.ry - film.jitter(8)
        film.blend(185, 0.55 * np.exp(-0.5 * (across ** 2 + down ** 2) / 3.2 ** 2) * lung.inside)


def draw_pneumothorax(film, lung, grade):
    """A black rim without vessels, and the thin line of the pleura."""
    depth = (5, 12)[grade - 1] + film.jitter(0.4)
    across = (film.x - lung.cx + lung.side * 0.7 * depth) / lung.rx
    down = (film.y - lung.cy - 0.9 * depth) / lung.ry
    collapsed = np.hypot(across, down)
    upper = lung.inside * soft(lung.cy + 0.5 * lung.ry - film.y, 3)
    film.blend(12, soft(collapsed - 0.98, 0.033) * upper)
    film.blend(165, 0.8 * np.exp(-0.5 * ((collapsed - 0.96) / 0.035) ** 2) * upper)


def draw_edema(film, lungs, middle, grade):
    """Haze around both hila, and short level lines."""
    opacity, width, lines = ((0.35, 10, 2), (0.7, 13, 5))[grade - 1]
    for lung in lungs:
        across = (film.x - middle - lung.side * 13) / width
        down = (film.y - lung.cy - film.jitter(1.5)) / (1.5 * width)
        film.blend(150, opacity * np.exp(-0.5 * (across ** 2 + down ** 2)) * lung.inside)
        short = soft(8 - np.abs(film.x - lung.cx - 6 * lung.side))
        for k in range(lines):
            level = np.exp(-0.5 * ((film.y - lung.cy - 0.1 * lung.ry - 4 * k) / 0.7) ** 2)
            film.blend(175, 0.35 * level * short * lung.inside)
