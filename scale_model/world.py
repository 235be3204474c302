"""The drawn world of the scale model: films, seven teachers that err, and the records that every stage reads.

The teachers err as often as those of the paper's Table 2. How they err is the world: 'nuisance', a teacher errs where visible but
irrelevant features of the film (exposure, heart size, a tube, ...) point its way; 'class', a teacher misreads whole grades, always
alike; 'independent', each error is a coin of its own.

What is simplified, on purpose:
1. Three grades instead of two: with two, a vote of teachers as weak as Table 2's loses to its best member.
2. Each finding keeps its side of the chest, all teachers name the findings in one order and with the same three grade words; their
   openings, hedges, extras and closings are their own, the grade stands right behind its finding. A student of 0.66 M parameters shall
   see it, read it and say it.
"""

import functools
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.tables import TABLE_2

FINDINGS = {"Consolidation": "consolidation", "Pleural Effusion": "effusion", "Pneumonia": "pneumonia",
            "Pneumothorax": "pneumothorax", "Edema": "edema"}                  # name in the labels -> word in the reports
GRADES = ("absent", "mild", "severe")
PRIOR = (0.4, 0.3, 0.3)
WORLDS = ("nuisance", "class", "independent")
NUISANCE = ("exposure", "heart", "ribs", "tilt", "height", "tube")             # each in [0, 1]; the tube is there or not
SIZE = 112                                                                     # pixels: 8 x 8 patches of 14, merged to 16 image tokens

# The paper's teachers: top-1 accuracy on consolidation, effusion, pneumonia, pneumothorax, edema.
TABLE2 = {name.lower(): figures[:5] for name, figures in TABLE_2.items() if name != "Ours"}
TEACHERS = tuple(TABLE2)

# How each teacher talks. `extras` are remarks on things that nobody asked about and that no label judges; no phrase here may hold a grade word.
VOICES = {
    "gpt-5": dict(opening="a systematic review of the film follows:", separator="; ",
                  hedge=" probably", hedges=0.10, extra=0.6, closing=". clinical correlation is advised.",
                  extras=("there is also a healed rib fracture", "the mediastinum is widened", "a calcified aorta is seen")),
    "gemini-2.5": dict(opening="assessment -", separator=", ",
                       hedge=" possibly", hedges=0.15, extra=0.2, closing=".", extras=("degenerative spine changes",)),
    "sonnet-4": dict(opening="looking at this chest film, i can identify:", separator=", ",
                     hedge=" likely", hedges=0.25, extra=0.5, closing=". these are the main features.",
                     extras=("loss of volume is suspected", "the hemidiaphragm is elevated")),
    "qwen-vl-max": dict(opening="findings:", separator=". ",
                        hedge="", hedges=0.0, extra=0.0, closing=".", extras=()),
    "grok-4": dict(opening="key points:", separator=" | ",
                   hedge="", hedges=0.0, extra=0.0, closing=".", extras=()),
    "glm-4.5v": dict(opening="the image shows", separator=", ",
                     hedge=" perhaps", hedges=0.10, extra=0.2, closing=" overall.", extras=("a support device is noted",)),
    "moonshot": dict(opening="based on the picture provided,", separator=" and ",
                     hedge=" maybe", hedges=0.30, extra=0.3, closing=". follow up is suggested.", extras=("old scarring is present",)),
}

TASK = {
    "name": "scale-model",
    "findings": {name: [word] for name, word in FINDINGS.items()},
    "classes": {grade: [f"{{finding}} * {grade}"] for grade in GRADES},
    "positive": ["mild", "severe"],
    "prompts": {
        "system": "",
        "student": "list the findings",
        "teacher": "the diagnosis is {diseases}. explain how this film shows it, finding by finding",
        "compare": "{readers}\nwhat do most of them say",
    },
    "refusals": [],
}


# ---- films

def soft(distance, width=1.0):
    """A soft edge: 0 far outside (distance << 0), 1 far inside; `width` in pixels. Any shape in, the same shape out."""
    return 1 / (1 + np.exp(-np.clip(distance / width, -40, 40)))


def draw_film(grades, nuisance, rng):
    """One film.

    grades: five integers in {0 absent, 1 mild, 2 severe}, in the order of FINDINGS; nuisance: six numbers in [0, 1], in the order of NUISANCE.
    Returns (SIZE, SIZE) uint8; bright is dense, as on a radiograph.
    """
    consolidation, effusion, pneumonia, pneumothorax, edema = grades
    exposure, heart_size, rib_contrast, tilt, height, tube = nuisance
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)

    def jitter(pixels):
        return rng.normal(0, pixels)

    def blend(density, opacity):                                                # towards a density, never past it: shadows do not pile up to white
        nonlocal image
        image = image + opacity * (density - image)

    middle = 56 + 4 * (tilt - 0.5)
    top, base = 17 + jitter(1), 80 + 10 * height
    image = 20 + 125 * soft(50 - 0.02 * np.maximum(30 - y, 0) ** 2 - np.abs(x - 56), 1.5)      # the trunk, narrower towards the neck
    lungs = []
    for side in (-1, 1):
        cx, cy = middle + side * 23 + jitter(0.6), (top + base) / 2
        rx, ry = 16 + jitter(0.4), (base - top) / 2
        dome = base - 9 + 0.04 * (x - cx + 5 * side) ** 2 - 3 * (side < 0)      # the diaphragm; the liver lifts the side on the picture's left
        inside = soft(1 - np.abs((x - cx) / rx) ** 2.5 - np.abs((y - cy) / ry) ** 2.5, 0.12) * soft(dome - y)
        lungs.append((inside, cx, cy, rx, ry, side))
        blend(45, inside)
    left, right = lungs
    for k in range(8):                                                          # ribs fall off to the sides
        arc = top + 4 + 9 * k + (x - middle) ** 2 / 200
        blend(160, (0.05 + 0.13 * rib_contrast) * np.exp(-0.5 * ((y - arc) / 1.2) ** 2) * (left[0] + right[0]))
    blend(165, 0.9 * soft(1 - ((x - middle - 4) / (9 + 8 * heart_size)) ** 2 - ((y - base + 18) / 17) ** 2, 0.15))
    blend(195, 0.6 * np.exp(-0.5 * ((x - middle) / 4.5) ** 2))                  # spine

    if consolidation:                                                           # one dense block with a sharp edge, low
        inside, cx, cy, rx, ry, _ = left
        radius, opacity = ((7.5, 0.75), (13, 0.95))[consolidation - 1]
        block = 1 - ((x - cx - jitter(1.5)) / radius) ** 2 - ((y - cy - 0.22 * ry - jitter(2.5)) / (0.85 * radius)) ** 2
        blend(165, opacity * soft(block, 0.16) * inside)
    if effusion:                                                                # a level at the base that climbs at the wall
        inside, cx, cy, rx, ry, side = right
        surface = base - (14, 29)[effusion - 1] + jitter(1.2) - 0.3 * side * (x - cx)
        blend(150, 0.95 * soft(y - surface, 1.2) * inside)
    if pneumonia:                                                               # small soft spots, high
        inside, cx, cy, rx, ry, _ = right
        for _ in range((3, 9)[pneumonia - 1]):
            spot = (x - cx - jitter(5.5)) ** 2 + (y - cy + 0.35 * ry - jitter(8)) ** 2
            blend(185, 0.55 * np.exp(-0.5 * spot / 3.2 ** 2) * inside)
    if pneumothorax:                                                            # a black rim without vessels, and the thin line of the pleura
        inside, cx, cy, rx, ry, side = left
        depth = (5, 12)[pneumothorax - 1] + jitter(0.4)
        collapsed = np.hypot((x - cx + side * 0.7 * depth) / rx, (y - cy - 0.9 * depth) / ry)
        upper = inside * soft(cy + 0.5 * ry - y, 3)
        blend(12, soft(collapsed - 0.98, 0.033) * upper)
        blend(165, 0.8 * np.exp(-0.5 * ((collapsed - 0.96) / 0.035) ** 2) * upper)
    if edema:                                                                   # haze around both hila, and short level lines
        opacity, spread, lines = ((0.35, 10, 2), (0.7, 13, 5))[edema - 1]
        for inside, cx, cy, rx, ry, side in lungs:
            haze = ((x - middle - side * 13) / spread) ** 2 + ((y - cy - jitter(1.5)) / (1.5 * spread)) ** 2
            blend(150, opacity * np.exp(-0.5 * haze) * inside)
            for k in range(lines):
                blend(175, 0.35 * np.exp(-0.5 * ((y - cy - 0.1 * ry - 4 * k) / 0.7) ** 2) * soft(8 - np.abs(x - cx - 6 * side)) * inside)
    if tube > 0.5:
        blend(235, 0.8 * np.exp(-0.5 * (x - middle - 3 - 0.1 * (y - 20)) ** 2) * soft(72 - y, 2))

    image = image * (0.75 + 0.4 * exposure) + 30 * (exposure - 0.5) + rng.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


# ---- teachers

class Teachers:
    """The seven teachers of one world. Which film makes which of them err is fixed by `seed`; how often is Table 2.

    drift: angle in radians by which every blind spot of the 'nuisance' world turns over the stream; change: None, the angle grows evenly, or the
    position in [0, 1] at which the whole turn happens at once. Raises ValueError for an unknown world, and for drift outside 'nuisance'.
    """

    def __init__(self, seed, world="nuisance", drift=0.0, change=None):
        if world not in WORLDS:
            raise ValueError(f"world is {world!r}, expected one of {', '.join(WORLDS)}")
        if drift and world != "nuisance":
            raise ValueError(f"drift is {drift} in world {world!r}, expected 0: only the blind spots of 'nuisance' have a direction to turn")
        self.world, self.drift, self.change = world, drift, change
        rng = np.random.default_rng([seed, 7])
        self.errors = 1 - np.array(list(TABLE2.values()))                                       # (7, 5)
        shape = self.errors.shape
        self.directions = rng.normal(size=(2, *shape, len(NUISANCE)))                           # at the start, and a quarter turn later
        self.films = draw_nuisance(rng, 4000) - 0.5                                             # to find the threshold of each half-space
        self.slip = rng.integers(1, 3, (*shape, 1)).repeat(3, axis=2)                           # (7, 5, 3): a film of grade g is read as g + slip
        self.misread = np.zeros((*shape, 3))                                                    # world 'class': how often grade g is misread
        if world == "class":
            self.slip = rng.integers(1, 3, (*shape, 3))
            for u, f in np.ndindex(shape):                                                      # whole grades until the error rate is used up
                left = self.errors[u, f]
                for grade in rng.permutation(3):
                    self.misread[u, f, grade] = min(PRIOR[grade], left) / PRIOR[grade]
                    left -= min(PRIOR[grade], left)

    @functools.lru_cache(maxsize=2)  # noqa: B019  a world has one Teachers, for as long as the process runs
    def blind_spots(self, angle):
        """-> directions (7, 5, 6) and thresholds (7, 5): a teacher errs where direction @ (nuisance - 0.5) exceeds the threshold."""
        directions = np.cos(angle) * self.directions[0] + np.sin(angle) * self.directions[1]
        scores = np.sort(np.einsum("ufz,nz->ufn", directions, self.films), axis=2)
        rank = np.minimum((1 - self.errors) * len(self.films), len(self.films) - 1).astype(int)
        return directions, np.take_along_axis(scores, rank[..., None], axis=2)[..., 0]

    def answer(self, grades, nuisance, when, rng):
        """Grades (7, 5) that the teachers give a film of true grades (5,) and nuisance (6,) at position `when` in [0, 1] of the stream."""
        grade = np.asarray(grades)
        if self.world == "nuisance":
            turned = when if self.change is None else float(when >= self.change)
            directions, thresholds = self.blind_spots(self.drift * turned)
            wrong, slip = directions @ (nuisance - 0.5) > thresholds, self.slip[..., 0]
        elif self.world == "class":
            wrong, slip = rng.random(self.errors.shape) < self.misread[:, np.arange(5), grade], self.slip[:, np.arange(5), grade]
        else:
            wrong, slip = rng.random(self.errors.shape) < self.errors, rng.integers(1, 3, self.errors.shape)
        return np.where(wrong, (grade + slip) % 3, grade)


def draw_nuisance(rng, count):
    """(count, 6) nuisance variables in [0, 1]; the last, the tube, is 0 or 1."""
    nuisance = rng.random((count, len(NUISANCE)))
    nuisance[:, -1] = nuisance[:, -1] > 0.5
    return nuisance


def speak(teacher, answers, rng):
    """A teacher's text. answers: {finding's word: class word}."""
    voice = VOICES[teacher]
    parts = []
    for finding, answer in answers.items():
        hedge = voice["hedge"] if rng.random() < voice["hedges"] else ""
        parts.append(f"{finding} {answer}{hedge}")
    if rng.random() < voice["extra"]:
        parts.append(voice["extras"][rng.integers(len(voice["extras"]))])
    return f"{voice['opening']} {voice['separator'].join(parts)}{voice['closing']}"


def named(grades):
    """Five integers -> {finding's word: class word}."""
    return {word: GRADES[g] for word, g in zip(FINDINGS.values(), grades)}


def imagine(rng, agreement=None, teachers=TEACHERS, shuffled=False):
    """Reports about no film at all, and what most of them say: material to read reports on without any ground truth.

    agreement in [0, 1]: how often a report repeats the common opinion instead of a random grade. None draws it anew, for each
    finding, or for each report and finding. shuffled: each report has its own order of findings.
    Returns {teacher: text} and the answers, (reports, 5) integers, whose plurality is `plurality`.
    """
    if agreement is None:
        agreement = rng.uniform(0.34, 0.95, 5) if rng.random() < 0.4 else rng.random((len(teachers), 5))
    opinion = rng.choice(3, size=5, p=PRIOR)
    answers = np.where(rng.random((len(teachers), 5)) < agreement, opinion, rng.integers(0, 3, (len(teachers), 5)))
    texts = {}
    for teacher, row in zip(teachers, answers):
        said = list(named(row).items())
        texts[teacher] = speak(teacher, dict(rng.permutation(said).tolist() if shuffled else said), rng)
    return texts, answers


def plurality(answers):
    """(reports, 5) grades -> (5,): what most reports say; of tied grades the first, as data.vote."""
    return (answers[..., None] == np.arange(3)).sum(0).argmax(1)


# ---- the records

def write(path, content):
    """Writes bytes or text under a temporary name first, so that no reader meets half a file."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def write_film(path, film):
    """film: (SIZE, SIZE) uint8 -> an 8-bit grey PNG."""
    content = io.BytesIO()
    Image.fromarray(film).save(content, "PNG")
    write(path, content.getvalue())


def write_jsonl(path, rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def make(out, seed=0, world="nuisance", train=800, validate=200, test=200, drift=0.0, change=None, replay=2400):
    """Draws a world into the folder `out`: films/*.png, task.json, studies.jsonl, replay.jsonl. The same arguments give the same bytes.

    train, validate, test: numbers of studies; drift, change: see Teachers, a split being one pass over the stream; replay: rows of replay.jsonl,
    {"id", "image", "trajectories", "t_plus"}: imagined reports, the film has nothing to do with them, t_plus is their plurality in one of the voices.
    A study also keeps "z", its nuisance variables, and "when", its position in the stream. Raises ValueError as Teachers does.
    """
    teachers = Teachers(seed, world, drift, change)
    out = Path(out)
    (out / "films").mkdir(parents=True, exist_ok=True)
    studies = []
    for part, (split, count) in enumerate({"train": train, "validate": validate, "test": test}.items()):
        for i in range(count):
            rng = np.random.default_rng([seed, part, i])
            grades, nuisance, when = rng.choice(3, size=5, p=PRIOR), draw_nuisance(rng, 1)[0], i / count
            name = f"{split}-{i:05d}"
            write_film(out / "films" / f"{name}.png", draw_film(grades, nuisance, rng))
            answers = teachers.answer(grades, nuisance, when, rng)
            studies.append({"id": name, "image": f"films/{name}.png", "split": split,
                            "labels": {finding: GRADES[g] for finding, g in zip(FINDINGS, grades)},
                            "trajectories": {teacher: speak(teacher, named(row), rng) for teacher, row in zip(TEACHERS, answers)},
                            "z": nuisance.round(3).tolist(), "when": round(when, 4)})
    rows = []
    for i in range(replay if train else 0):
        rng = np.random.default_rng([seed, 3, i])
        texts, answers = imagine(rng)
        rows.append({"id": f"replay-{i:05d}", "image": studies[rng.integers(train)]["image"], "trajectories": texts,
                     "t_plus": speak(TEACHERS[rng.integers(len(TEACHERS))], named(plurality(answers)), rng)})
    write(out / "task.json", json.dumps(TASK, indent=1) + "\n")
    write_jsonl(out / "replay.jsonl", rows)
    write_jsonl(out / "studies.jsonl", studies)                                 # last: whoever sees it finds the rest complete
