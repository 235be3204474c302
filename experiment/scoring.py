"""How the rows of the ladder are scored: students by their answers, texts as they are given.

A student is asked in three ways:
    greedy
    sampled  at temperature 1
    voiced   greedy, behind the opening words of one teacher, each film another teacher's in turn.
             Which voice a greedy answer begins with is chance and decides its accuracy.
"""

from collections import Counter

import torch

import data
import evaluate
import sampling
import student
from experiment.rows import BEST, MODES
from scale_model.world import TEACHERS, VOICES

ANSWER = 96  # tokens at most; the longest report has about 70


class VoicedProcessor(student.Processor):
    """Puts the opening words of a teacher, `voice(study)`, behind the prompt."""

    def __call__(self, study, prompt, responses=()):
        example = super().__call__(study, prompt, responses)
        opening = torch.tensor(self.tokens(VOICES[voice(study)]["opening"]))
        return {**example, "prefix_ids": torch.cat([example["prefix_ids"], opening])}


def voice(study):
    """The teacher in whose voice a student is asked about a study, by the number in its id."""
    return TEACHERS[int(study.id.rpartition("-")[2]) % len(TEACHERS)]


def student_scores(folder, studies, task, images, seed):
    """Scores a student in every mode.

    folder   of the student
    studies  [data.Study] with labels and trajectories
    task     data.Task
    images   folder that image paths are relative to
    seed     of the sampled answers
    Returns {mode: what evaluate.score returns, "inherited": what `inherited` returns}; 'sampled'
    and 'greedy' also have "styles" of evaluate.styles.
    """
    model, result = student.load(folder), {}
    said = evaluate.read_teachers(studies, task)
    votes = evaluate.votes_of(said, task)
    for mode in MODES:
        make_processor = VoicedProcessor if mode == "voiced" else student.Processor
        processor = make_processor(folder, task, images)
        temperature = 1.0 if mode == "sampled" else 0.0
        texts = sampling.answers(
            model, processor, studies, task, temperature, seed, batch_size=50,
            max_new_tokens=ANSWER, desc=f"{folder.parent.name}, {mode}")
        readings = [data.read_classes(text, task) for text in texts]
        result[mode] = evaluate.score(readings, studies, task, votes)
        if mode == "voiced":
            result["inherited"] = inherited(readings, studies, said, votes)
        else:
            result[mode]["styles"] = evaluate.styles(texts, studies)
    return result


def text_scores(texts, studies, task):
    """Scores texts that are there already.

    texts  {mode: {study id: text}}; a study without a text counts as unread
    Returns {mode: what evaluate.score returns}.
    """
    votes, result = evaluate.votes_of(evaluate.read_teachers(studies, task), task), {}
    for mode, by_id in texts.items():
        readings = [data.read_classes(by_id.get(study.id, ""), task) for study in studies]
        result[mode] = evaluate.score(readings, studies, task, votes)
    return result


def inherited(readings, studies, said, votes):
    """How much of a teacher's error comes with its voice (Obs. 1.2).

    readings  {finding: class} of the 'voiced' answer to each study
    studies   [data.Study] with labels and trajectories
    said      what evaluate.read_teachers returns of them
    votes     what evaluate.votes_of returns of them
    Returns three shares, None where there is no such error:
        own     where the teacher whose voice it is errs, how often the student gives that same
                wrong class
        others  the same for the six teachers whose voice it is not
        vote    where the plurality errs, how often the student gives that wrong class
    """
    errors, repeated = Counter(), Counter()
    for reading, study in zip(readings, studies):
        given = {**said[study.id], "vote": votes[study.id]}
        kinds = {name: "own" if name == voice(study) else "others" for name in given}
        kinds["vote"] = "vote"
        for name, classes in given.items():
            for finding, truth in study.labels.items():
                if classes.get(finding) not in (None, truth):
                    errors[kinds[name]] += 1
                    repeated[kinds[name]] += reading.get(finding) == classes[finding]
    return {kind: repeated[kind] / errors[kind] if errors[kind] else None
            for kind in ("own", "others", "vote")}


def baselines(scored, train, validate, task):
    """The rows that need no student: label prior, teachers, the best of them, and their vote.

    scored    studies that they are scored on
    train     studies of the label prior
    validate  studies that decide which teacher is the best
    task      data.Task
    Returns {row: what evaluate.score returns}.
    """
    rows = evaluate.baselines(scored, train, task, evaluate.read_teachers(scored, task))
    said = evaluate.read_teachers(validate, task)
    on_validate = evaluate.baselines(validate, train, task, said)
    best = max(TEACHERS, key=lambda name: on_validate[name]["mean"])
    return {**rows, BEST: rows[best]}
