"""Closed questions about an image: the log-probability of every option, all questions of a study in one packed row.

    "Does this chest X-ray show a pneumothorax?"    yes | no              AUC ranks images by log P(yes) - log P(no)
    "Is the edema improving, stable or worsening?"  one of the options    top-1 is the most probable one

A student that answers in free text gives no score to rank by, and an answer that cannot be read. Asked so, it has both. The
probability of an option is summed over its spellings (with and without a leading blank and a capital), each in whole, whatever number of
tokens it takes.

The image is encoded once: image and system prompt are the prefix, and each question is a branch behind it (student.pack), from the text
behind the image to the place where the answer begins. The first token of every spelling is predicted at the end of its question; the tokens
of a longer one are a branch on that branch. Equal to separate forwards (tests/test_questions.py).
"""

import torch
import torch.nn.functional as F

import student
from evaluation import results

# how a question names a finding, where its label in lower case would not do
PHRASES = {
    "Atelectasis": "atelectasis", "Calcification": "a calcification", "Calcified Granuloma": "a calcified granuloma", "Cardiomegaly": "cardiomegaly",
    "Effusion": "a pleural effusion", "Enlarged Cardiomediastinum": "an enlarged cardiomediastinum", "Fibrosis": "pulmonary fibrosis",
    "Fracture": "a fracture", "Granuloma": "a granuloma", "Hernia": "a hiatal hernia", "Infiltration": "an infiltrate", "Lesion": "a lung lesion",
    "Lung Lesion": "a lung lesion", "Lung Opacity": "a lung opacity", "Mass": "a lung mass", "No Finding": "no abnormality",
    "Nodule": "a lung nodule", "Opacity": "a lung opacity", "Pleural Effusion": "a pleural effusion", "Pleural Other": "a pleural abnormality",
    "Pleural_Thickening": "pleural thickening", "Pneumothorax": "a pneumothorax", "Support Devices": "a support device",
}
QUESTION = "Is the {finding} in this image {options}?"  # of a task.json without "question" among its prompts


def closed_questions(task):
    """-> {finding: (question, {option: class})}. The built-in task, read by metrics/findings.py, is asked for yes or no, which stand for
    its classes 1 and 0; any other task for one of its classes."""
    options = {"yes": 1, "no": 0} if task.patterns is None else {str(value): value for value in task.classes}
    *first, last = options
    template = task.prompts.get("question", QUESTION).replace("{options}", f"{', '.join(first)} or {last}")
    named = (lambda finding: PHRASES.get(finding, finding.lower())) if task.patterns is None else str.lower
    return {finding: (template.replace("{finding}", named(finding)), options) for finding in task.findings}


def spellings(option):
    return dict.fromkeys(blank + word for blank in ("", " ") for word in (option, option[:1].upper() + option[1:]))


def tokenise(encoder, questions):
    """questions: {key: (text, options)} -> {key: (text, [(option, token ids of one spelling)])}. Raises ValueError if the tokens of one option
    begin those of another, since the probability of the longer one would count for both."""
    asked = {}
    for key, (text, options) in questions.items():
        tokens = [(option, tuple(encoder.tokens(spelling))) for option in options for spelling in spellings(option)]
        for option, ids in tokens:
            if clash := [other for other, longer in tokens if other != option and longer[:len(ids)] == ids]:
                raise ValueError(f"{key}: the tokens of option {option!r} begin those of {clash[0]!r}, expected options that differ from the start")
        asked[key] = text, tokens
    return asked


def encode(encoder, study, asked):
    """asked: what `tokenise` returns -> what `option_logps` takes: the encoded study (data.Encoder) whose responses are the Q questions, and
    "spelled": for each of the K spellings (its question's number, its ids), "owners": (key, option)."""
    pixel_values, image_grid_thw = encoder.pixels(study)
    asked_ids, spelled, owners = [], [], []
    for u, (key, (text, tokens)) in enumerate(asked.items()):
        prefix = encoder.prefix(text, image_grid_thw)
        P = int((prefix == encoder.vision_end).nonzero()[-1]) + 1  # everything up to the image is the same for all questions
        asked_ids.append(prefix[P:])
        spelled += [(u, torch.tensor(ids)) for _, ids in tokens]
        owners += [(key, option) for option, _ in tokens]
    return {"id": study.id, "prefix_ids": prefix[:P], "pixel_values": pixel_values, "image_grid_thw": image_grid_thw,
            "responses": asked_ids, "spelled": spelled, "owners": owners}


def pack(example, model):
    """student.pack of the Q questions and, behind them, the spellings of several tokens; only spellings are targets. "parent" (1, S): the
    branch that a token's branch stands on; "tokens" (1, K)."""
    asked, spelled = example["responses"], example["spelled"]
    long = [k for k, (_, ids) in enumerate(spelled) if len(ids) > 1]
    # pack takes the last token of a response for a target only: a question has another one behind it
    rows = [*(F.pad(ids, (0, 1)) for ids in asked), *(spelled[k][1] for k in long)]
    batch = student.pack([{**example, "responses": rows}], model)
    sources = [batch["source"][batch["owner"] == branch] for branch in range(len(rows))]  # [0] is the end of the prefix
    batch["parent"], batch["position_ids"] = batch["branch"].clone(), batch["position_ids"].clone()
    own = {k: len(asked) + at for at, k in enumerate(long)}
    for k, branch in own.items():
        here, question = batch["branch"] == branch + 1, spelled[k][0]
        batch["parent"][here] = question + 1
        batch["position_ids"][:, here] += len(asked[question])
    first = [sources[u][-1:] for u, _ in spelled]
    batch["source"] = torch.cat([torch.cat([at, sources[own[k]][1:]]) if k in own else at for k, at in enumerate(first)])
    batch["targets"] = torch.cat([ids for _, ids in spelled])
    batch["owner"] = torch.tensor([k for k, (_, ids) in enumerate(spelled) for _ in ids])
    batch["tokens"] = torch.tensor([[len(ids) for _, ids in spelled]])
    return batch


@torch.no_grad()
def option_logps(model, example):
    """-> {key: {option: log P(option | image, question)}}, from one forward over one encoded study."""
    batch = student.to(pack(example, model), model.device)
    (logps,) = student.PackedStudent(model)(batch)
    found = {}
    for (key, option), logp in zip(example["owners"], logps[0].double().cpu()):
        found.setdefault(key, {}).setdefault(option, []).append(logp)
    return {key: {option: torch.stack(values).logsumexp(0).item() for option, values in options.items()} for key, options in found.items()}


def ask(model, encoder, studies, questions, parts=None, num_workers=0, failed=None, desc="questions"):
    """questions: {key: (text, options)} -> {study id: `option_logps`}, shared over the ranks as results.spread says."""
    by_id, asked = {study.id: study for study in studies}, tokenise(encoder, questions)
    return results.spread(list(by_id), lambda key: encode(encoder, by_id[key], asked), lambda keys, examples: [option_logps(model, examples[0])],
                  parts=parts, num_workers=num_workers, failed=failed, desc=desc)
