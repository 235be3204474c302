"""Closed questions about an image: the log-probability of every option, one forward a study.

    "Does this chest X-ray show a pneumothorax?"    yes | no
        AUC ranks images by log P(yes) - log P(no)
    "Is the edema improving, stable or worsening?"  one of the options
        top-1 is the most probable one

A student that answers in free text gives no score to rank by, and some of its answers cannot be
read. A closed question gives both a score and an answer. The probability of an option is summed
over its spellings (with and without a leading blank and a capital), each of them whole, whatever
number of tokens it takes.

The image is encoded once: image and system prompt are the prefix, and each question is a branch
behind it (student.pack), from the text behind the image to the place where the answer begins. The
first token of every spelling is predicted at the end of its question; the tokens of a longer one
are a branch on that branch. This equals separate forwards (tests/evaluation/test_questions.py).
"""

import torch

import student
from runtime.shared import shared_map

# how a question names a finding, where its label in lower case would not do
PHRASES = {
    "Atelectasis": "atelectasis",
    "Calcification": "a calcification",
    "Calcified Granuloma": "a calcified granuloma",
    "Cardiomegaly": "cardiomegaly",
    "Effusion": "a pleural effusion",
    "Enlarged Cardiomediastinum": "an enlarged cardiomediastinum",
    "Fibrosis": "pulmonary fibrosis",
    "Fracture": "a fracture",
    "Granuloma": "a granuloma",
    "Hernia": "a hiatal hernia",
    "Infiltration": "an infiltrate",
    "Lesion": "a lung lesion",
    "Lung Lesion": "a lung lesion",
    "Lung Opacity": "a lung opacity",
    "Mass": "a lung mass",
    "No Finding": "no abnormality",
    "Nodule": "a lung nodule",
    "Opacity": "a lung opacity",
    "Pleural Effusion": "a pleural effusion",
    "Pleural Other": "a pleural abnormality",
    "Pleural_Thickening": "pleural thickening",
    "Pneumothorax": "a pneumothorax",
    "Support Devices": "a support device",
}
# of a task.json without "question" among its prompts
QUESTION = "Is the {finding} in this image {options}?"


def closed_questions(task):
    """The question of each finding, with its options.

    task  data.Task; the built-in one, read by metrics/findings.py, is asked for yes or no, which
          mean its classes 1 and 0; any other task is asked for one of its classes
    Returns {finding: (question, {option: class})}.
    """
    built_in = task.phrases is None
    options = {"yes": 1, "no": 0} if built_in else {str(value): value for value in task.classes}
    *first, last = options
    template = task.prompts.get("question", QUESTION)
    template = template.replace("{options}", f"{', '.join(first)} or {last}")
    asked = {}
    for finding in task.findings:
        name = PHRASES.get(finding, finding.lower()) if built_in else finding.lower()
        asked[finding] = template.replace("{finding}", name), options
    return asked


def keep_offered_labels(bench):
    """Leaves out the labels that no question offers, then the studies without labels, so that all
    rows of a table are scored on the same classes.

    bench  datasets.Benchmark, changed in place; a note says how many labels were left out
    """
    _, options = next(iter(closed_questions(bench.task).values()))
    offered, outside = set(options.values()), 0
    for study in bench.studies:
        kept = {finding: value for finding, value in study.labels.items() if value in offered}
        outside += len(study.labels) - len(kept)
        study.labels = kept
    if outside:
        classes = ", ".join(map(str, sorted(offered)))
        bench.notes.append(f"{outside} labels left out that are none of {classes}")
    bench.studies = [study for study in bench.studies if study.labels]


def most_probable(logps, questions):
    """What a student answered.

    logps      {finding: {option: log-probability}}, of one study
    questions  {finding: (text, {option: class})}
    Returns {finding: class of the most probable option}.
    """
    reading = {}
    for finding, of_option in logps.items():
        _, class_of = questions[finding]
        reading[finding] = class_of[max(of_option, key=of_option.get)]
    return reading


def spellings(option):
    """The ways to write an option, each once: with and without a leading blank and a capital."""
    words = (option, option[:1].upper() + option[1:])
    return dict.fromkeys(blank + word for blank in ("", " ") for word in words)


def tokenise(processor, questions):
    """Turns the options of questions into tokens.

    processor  student.Processor
    questions  {key: (text, options)}
    Returns {key: (text, [(option, token ids of one spelling)])}. Raises ValueError if the tokens of
    one option begin those of another, since the probability of the longer one would count for both.
    """
    asked = {}
    for key, (text, options) in questions.items():
        tokens = [(option, tuple(processor.tokens(spelling)))
                  for option in options for spelling in spellings(option)]
        for option, ids in tokens:
            for other, longer in tokens:
                if other != option and longer[:len(ids)] == ids:
                    raise ValueError(f"{key}: the tokens of option {option!r} begin those of "
                                     f"{other!r}, expected options that differ from the start")
        asked[key] = text, tokens
    return asked


def encode(processor, study, asked):
    """Encodes a study with its closed questions.

    processor  student.Processor
    study      data.Study
    asked      what `tokenise` returns: Q questions with K spellings of their options
    Returns what student.pack takes: the image as the prefix, a branch for each question, and for
    each spelling a branch on its question; columns K; and "owners" [(key, option)], one a spelling.
    """
    pixel_values, image_grid_thw = processor.pixels(study)
    branches, owners = [], []
    for key, (text, tokens) in asked.items():
        prefix = processor.prefix(text, image_grid_thw)
        # everything up to the image is the same for all questions
        P = int((prefix == processor.vision_end).nonzero()[-1]) + 1
        question = len(branches)
        branches.append(student.Branch(prefix[P:], torch.tensor([], dtype=torch.long), 0))
        for option, ids in tokens:
            ids = torch.tensor(ids)
            branches.append(student.Branch(ids[:-1], ids, len(owners), question))
            owners.append((key, option))
    return {"id": study.id, "prefix_ids": prefix[:P], "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw, "branches": branches, "columns": len(owners),
            "owners": owners}


@torch.no_grad()
def option_logps(model, example):
    """The log-probability of every option, from one forward.

    model    the student
    example  what `encode` returns
    Returns {key: {option: log P(option | image, question)}}, in nats.
    """
    (batch,) = student.to_device(model.device, student.pack([example], model))
    (logps,) = student.PackedStudent(model)(batch)                                          # (1, K)
    found = {}
    for (key, option), logp in zip(example["owners"], logps[0].double().cpu()):
        found.setdefault(key, {}).setdefault(option, []).append(logp)
    return {key: {option: torch.stack(values).logsumexp(0).item()
                  for option, values in options.items()} for key, options in found.items()}


def ask(model, processor, studies, questions, parts=None, num_workers=0, failed=None,
        desc="questions"):
    """Asks the student about many studies, shared over the ranks.

    model      the student
    processor  student.Processor
    studies    list of data.Study
    questions  {key: (text, options)}
    parts, num_workers, failed, desc  as runtime.shared.shared_map takes them
    Returns {study id: what `option_logps` returns}, without the studies in `failed`.
    """
    by_id, asked = {study.id: study for study in studies}, tokenise(processor, questions)

    def encode_one(key):
        return encode(processor, by_id[key], asked)

    def work(keys, examples):
        return [option_logps(model, example) for example in examples]

    return shared_map(list(by_id), encode_one, work, parts=parts, num_workers=num_workers,
                      failed=failed, desc=desc)
