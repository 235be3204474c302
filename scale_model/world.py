"""The drawn world of the scale model: seven teachers that err, and the records of all stages.

The teachers err as often as those of the paper's Table 2. How they err is the world:
    nuisance     a teacher errs where visible but irrelevant features of the film (exposure, heart
                 size, a tube, ...) exceed a threshold
    class        a teacher misreads whole grades, always in the same way
    independent  each error is drawn by itself

What is simplified, on purpose:
1. There are three grades instead of two: with two, a vote of teachers as weak as Table 2's loses
   to its best member.
2. Each finding keeps its side of the chest. All teachers name the findings in one order and with
   the same three grade words, and the grade is right behind its finding; openings, hedges, extras
   and closings are each teacher's own. A student of 0.66 M parameters must be able to see it, read
   it and say it.
"""

import functools
import json
from pathlib import Path

import numpy as np
from PIL import Image

import data
from evaluation.tables import TABLE_2
from runtime.records import write_jsonl, write_text
from scale_model.films import NUISANCE, draw_film, draw_nuisance

# name in the labels -> word in the reports
FINDINGS = {"Consolidation": "consolidation", "Pleural Effusion": "effusion",
            "Pneumonia": "pneumonia", "Pneumothorax": "pneumothorax", "Edema": "edema"}
GRADES = ("absent", "mild", "severe")
PRIOR = (0.4, 0.3, 0.3)
WORLDS = ("nuisance", "class", "independent")

# The paper's teachers: top-1 accuracy on consolidation, effusion, pneumonia, pneumothorax, edema.
TABLE2 = {name.lower(): figures[:5] for name, figures in TABLE_2.items() if name != "Ours"}
TEACHERS = tuple(TABLE2)

# How each teacher talks. `extras` are remarks on things that nobody asked about and that no label
# judges; no phrase here may hold a grade word.
VOICES = {
    "gpt-5": dict(
        opening="a systematic review of the film follows:", separator="; ",
        hedge=" probably", hedges=0.10, extra=0.6, closing=". clinical correlation is advised.",
        extras=("there is also a healed rib fracture", "the mediastinum is widened",
                "a calcified aorta is seen")),
    "gemini-2.5": dict(
        opening="assessment -", separator=", ",
        hedge=" possibly", hedges=0.15, extra=0.2, closing=".",
        extras=("degenerative spine changes",)),
    "sonnet-4": dict(
        opening="looking at this chest film, i can identify:", separator=", ",
        hedge=" likely", hedges=0.25, extra=0.5, closing=". these are the main features.",
        extras=("loss of volume is suspected", "the hemidiaphragm is elevated")),
    "qwen-vl-max": dict(
        opening="findings:", separator=". ",
        hedge="", hedges=0.0, extra=0.0, closing=".", extras=()),
    "grok-4": dict(
        opening="key points:", separator=" | ",
        hedge="", hedges=0.0, extra=0.0, closing=".", extras=()),
    "glm-4.5v": dict(
        opening="the image shows", separator=", ",
        hedge=" perhaps", hedges=0.10, extra=0.2, closing=" overall.",
        extras=("a support device is noted",)),
    "moonshot": dict(
        opening="based on the picture provided,", separator=" and ",
        hedge=" maybe", hedges=0.30, extra=0.3, closing=". follow up is suggested.",
        extras=("old scarring is present",)),
}

TASK = {
    "name": "scale-model",
    "findings": {name: [word] for name, word in FINDINGS.items()},
    "classes": {grade: [f"{{finding}} * {grade}"] for grade in GRADES},
    "positive": ["mild", "severe"],
    "prompts": {
        "system": "",
        "student": "list the findings",
        "teacher": "the diagnosis is {diseases}. "
                   "explain how this film shows it, finding by finding",
        "compare": "{readers}\nwhat do most of them say",
    },
    "refusals": [],
}


# ------------------------------------------------------------------------------------- teachers

class Teachers:
    """The seven teachers of one world.

    seed    decides which film makes which of them err; how often they err is Table 2
    world   one of WORLDS, how they err
    drift   angle in radians by which every blind spot of 'nuisance' turns over the stream of films
    change  None: the angle grows evenly; or the position in [0, 1] at which the whole turn happens
    Raises ValueError for an unknown world, and for a drift in another world than 'nuisance'.
    """

    def __init__(self, seed, world="nuisance", drift=0.0, change=None):
        if world not in WORLDS:
            raise ValueError(f"world is {world!r}, expected one of {', '.join(WORLDS)}")
        if drift and world != "nuisance":
            raise ValueError(f"drift is {drift} in world {world!r}, expected 0: only the blind "
                             "spots of 'nuisance' have a direction to turn")
        self.world, self.drift, self.change = world, drift, change
        rng = np.random.default_rng([seed, 7])
        self.errors = 1 - np.array(list(TABLE2.values()))                                 # (7, 5)
        shape = self.errors.shape
        # (2, 7, 5, 6): at the start, and a quarter turn later
        self.directions = rng.normal(size=(2, *shape, len(NUISANCE)))
        self.films = draw_nuisance(rng, 4000) - 0.5  # to find the threshold of each half-space
        # a film of grade g is read as g + slip
        self.slip = rng.integers(1, 3, (*shape, 1)).repeat(3, axis=2)                  # (7, 5, 3)
        if world == "class":
            self.slip = rng.integers(1, 3, (*shape, 3))
            self.misread = misread_rates(self.errors, rng)

    @functools.lru_cache(maxsize=2)  # noqa: B019  a world has one Teachers while the process runs
    def blind_spots(self, angle):
        """The half-spaces of the nuisance variables in which the teachers err.

        angle  in radians, by which they have turned
        Returns directions (7, 5, 6) and thresholds (7, 5): a teacher errs where
        direction @ (nuisance - 0.5) exceeds the threshold.
        """
        directions = np.cos(angle) * self.directions[0] + np.sin(angle) * self.directions[1]
        scores = np.sort(np.einsum("ufz,nz->ufn", directions, self.films), axis=2)
        count = len(self.films)
        rank = np.minimum((1 - self.errors) * count, count - 1).astype(int)
        return directions, np.take_along_axis(scores, rank[..., None], axis=2)[..., 0]

    def answer(self, grades, nuisance, when, rng):
        """What the teachers say of a film.

        grades    five integers, its true grades
        nuisance  (6,), its nuisance variables
        when      its position in [0, 1] of the stream
        rng       np.random.Generator of the errors that the film does not decide
        Returns grades (7, 5).
        """
        grade = np.asarray(grades)
        if self.world == "nuisance":
            turned = when if self.change is None else float(when >= self.change)
            directions, thresholds = self.blind_spots(self.drift * turned)
            wrong, slip = directions @ (nuisance - 0.5) > thresholds, self.slip[..., 0]
        elif self.world == "class":
            finding = np.arange(5)
            wrong = rng.random(self.errors.shape) < self.misread[:, finding, grade]
            slip = self.slip[:, finding, grade]
        else:
            wrong = rng.random(self.errors.shape) < self.errors
            slip = rng.integers(1, 3, self.errors.shape)
        return np.where(wrong, (grade + slip) % 3, grade)


def misread_rates(errors, rng):
    """How often the teachers of the world 'class' misread each grade.

    errors  (7, 5), how often they err
    rng     np.random.Generator, of the order in which grades are chosen
    Returns (7, 5, 3): whole grades are misread until the error rate is used up, the last in part.
    """
    rates = np.zeros((*errors.shape, 3))
    for teacher, finding in np.ndindex(errors.shape):
        left = errors[teacher, finding]
        for grade in rng.permutation(3):
            misread = min(PRIOR[grade], left)
            rates[teacher, finding, grade] = misread / PRIOR[grade]
            left -= misread
    return rates


# ---------------------------------------------------------------------------------- their texts

def speak(teacher, answers, rng):
    """A teacher's text.

    teacher  a name of VOICES
    answers  {finding's word: class word}
    rng      np.random.Generator, of hedges and extras
    """
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
    """Reports about no film at all: material to learn reading from, without any ground truth.

    rng        np.random.Generator
    agreement  in [0, 1], a number or an array that broadcasts to (reports, 5): how often a report
               repeats the common opinion instead of a random grade; None draws it anew, for each
               finding, or for each report and finding
    teachers   whose voices the reports have
    shuffled   each report has its own order of findings
    Returns {teacher: text} and the answers, (reports, 5) integers; what most of them say is their
    `plurality`.
    """
    if agreement is None:
        by_finding = rng.random() < 0.4
        agreement = rng.uniform(0.34, 0.95, 5) if by_finding else rng.random((len(teachers), 5))
    opinion = rng.choice(3, size=5, p=PRIOR)
    repeats = rng.random((len(teachers), 5)) < agreement
    answers = np.where(repeats, opinion, rng.integers(0, 3, (len(teachers), 5)))
    texts = {}
    for teacher, row in zip(teachers, answers):
        said = list(named(row).items())
        if shuffled:
            said = rng.permutation(said).tolist()
        texts[teacher] = speak(teacher, dict(said), rng)
    return texts, answers


def plurality(answers):
    """Grades (reports, 5) -> (5,), what most reports say; of ties the first, as data.vote."""
    return (answers[..., None] == np.arange(3)).sum(0).argmax(1)


# ---------------------------------------------------------------------------------- the records

def make(out, seed=0, world="nuisance", train=800, validate=200, test=200, drift=0.0, change=None,
         replay=2400):
    """Draws a world: films/*.png, task.json, studies.jsonl, replay.jsonl.

    out     folder to write
    seed    of films and teachers
    world   how the teachers err, one of WORLDS
    train, validate, test  numbers of studies
    drift   radians by which the teachers' blind spots turn over each split; see Teachers
    change  position in [0, 1] of a split at which they turn; see Teachers
    replay  rows of replay.jsonl
    The same arguments give the same bytes. Raises ValueError as Teachers does.
    """
    teachers = Teachers(seed, world, drift, change)
    out = Path(out)
    (out / "films").mkdir(parents=True, exist_ok=True)
    studies, counts = [], {"train": train, "validate": validate, "test": test}
    for part, (split, count) in enumerate(counts.items()):
        for i in range(count):
            rng = np.random.default_rng([seed, part, i])
            film, study = make_study(teachers, f"{split}-{i:05d}", split, i / count, rng)
            Image.fromarray(film).save(out / study["image"])
            studies.append(study)
    films = [study["image"] for study in studies[:train]]
    write_text(out / "task.json", json.dumps(TASK, indent=1) + "\n")
    write_jsonl(out / "replay.jsonl", make_replay(films, replay if films else 0, seed))
    write_jsonl(out / "studies.jsonl", studies)


def make_study(teachers, name, split, when, rng):
    """Draws a film and lets the teachers speak of it.

    teachers  Teachers
    name      the study's id
    split     train, validate or test
    when      its position in [0, 1] of the split
    rng       np.random.Generator of this study
    Returns the film, (SIZE, SIZE) uint8, and its line of studies.jsonl, which also has "z", the
    nuisance variables, and "when".
    """
    grades = rng.choice(3, size=5, p=PRIOR)
    (nuisance,) = draw_nuisance(rng, 1)
    film = draw_film(grades, nuisance, rng)
    answers = teachers.answer(grades, nuisance, when, rng)
    texts = {teacher: speak(teacher, named(row), rng) for teacher, row in zip(TEACHERS, answers)}
    return film, {
        "id": name, "image": f"films/{name}.png", "split": split,
        "labels": {finding: GRADES[g] for finding, g in zip(FINDINGS, grades)},
        "trajectories": texts, "z": nuisance.round(3).tolist(), "when": round(when, 4)}


def make_replay(films, count, seed):
    """The lines of replay.jsonl, {"id", "image", "prompt", "trajectories": {"reading": text}}.

    films  image paths of the training studies
    count  number of lines
    seed   of the world
    The prompt is that of Eq. 7 with imagined reports, with which the film has nothing to do; the
    reading is what most of them say, in the voice of one teacher.
    """
    task, rows = data.make_task(TASK, "the scale model"), []
    for i in range(count):
        rng = np.random.default_rng([seed, 3, i])
        texts, answers = imagine(rng)
        image = films[rng.integers(len(films))]
        reading = speak(TEACHERS[rng.integers(len(TEACHERS))], named(plurality(answers)), rng)
        study = data.Study(f"replay-{i:05d}", (image,), {}, texts)
        prompt = data.compare_prompt(study, task, seed)
        rows.append({"id": study.id, "image": image, "prompt": prompt,
                     "trajectories": {"reading": reading}})
    return rows
