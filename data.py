"""Enter here: a study, the task, the prompts, and what the student sees of them.

A study is one line of studies.jsonl (UTF-8, one JSON object a line):

    {"id": "s50414267", "image": "files/p10/.../x.jpg", "labels": {"Edema": 1, "Pneumonia": 0, "Fracture": -1},
     "trajectories": {"gpt-5": "...", "grok-4": "..."}, "report": "...", "split": "train"}

`image` (or a list of two, for progression) is relative to --images and may not leave it; `labels` maps a finding to its
class; `report` and `split` are optional; unknown keys are kept. Which findings and classes there are is the task: the
built-in one is MIMIC-CXR's 14 findings with 1 / 0 / -1, any other one is a task.json (`load_task` gives its format).
Stage 2 adds positives.jsonl: {"id", "t_plus", "seed", "tokens", "finish"}.

In the paper's letters: v = image, l = prompt, t^u = trajectories[u], T = all of them, t+ = t_plus.
"""

import contextlib
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from metrics.findings import is_refusal as is_chest_refusal
from metrics.findings import read_findings
from runtime.records import faults, is_name, read_json, read_jsonl

MAX_IMAGE_PIXELS = 64_000_000  # a film has about 10 million; beyond this Pillow only warns, and a bomb is no film
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")  # no others: Pillow would hand some to outside programs


# ---------------------------------------------------------------------------------------------------------- the task

@dataclass(frozen=True)
class Task:
    """Findings, ordered classes, prompts. `patterns` None means that metrics/findings.py reads the texts."""
    name: str
    findings: tuple
    classes: tuple
    positive: tuple                # the classes that count as disease, for {diseases} in the teachers' prompt
    prompts: dict                  # system, student, teacher ({diseases}), compare ({readers}); evaluation: question ({finding}), report
    refusals: tuple = ()           # phrases by which a teacher declines
    patterns: tuple = field(default=None, repr=False)  # (finding, class, compiled expression)


CHEST = Task(
    name="mimic-cxr-14",
    findings=("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion",
              "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices"),
    classes=(1, 0, -1),
    positive=(1,),
    prompts={
        "system": "You are a helpful assistant.",
        "student": "This is a patient's chest DR image. Which findings does the image show, and what is the basis for each of them?",
        # Appendix B. It names the diagnosis, so only teachers get it.
        "teacher": "This is a patient's chest DR image. The patient has been diagnosed with {diseases}. "
                   "Can you find the basis for the diagnosis in the image?",
        # Eq. 7 conditions on v, l and all trajectories; the paper gives no wording.
        "compare": "This is a patient's chest DR image. Several readers have described it, each on their own.\n\n{readers}\n\n"
                   "Compare these descriptions with each other and with the image. Then describe the image yourself: keep what the "
                   "readers agree on and the image shows, leave out the rest, and do not mention the readers.",
        # evaluate.py only: the answer is yes or no; the reference is a report's findings section
        "question": "Does this chest X-ray show {finding}?",
        "report": "This is a patient's chest DR image. Write the findings section of its radiology report.",
    },
)


def load_task(path=None):
    """The built-in chest task, or the one of a task.json:

        {"name": "...", "findings": {"Pleural Effusion": ["effusion"], ...}, "positive": ["mild", "severe"],
         "classes": {"absent": ["{finding} * absent", ...], "mild": [...], "severe": [...]},
         "prompts": {"system": "", "student": "...", "teacher": "... {diseases} ...", "compare": "... {readers} ..."},
         "refusals": ["i cannot", ...]}

    findings: name -> the words that name it in a text; classes, in order: class -> phrases, in which {finding} stands for
    any of the finding's words and * (at most three) for up to four words of the same clause that name no other finding. prompts may have
    a "question" with {finding} and {options}, which evaluate.py asks. Raises ValueError naming the file and what was expected.
    """
    return CHEST if path is None else make_task(read_json(path), path)


def make_task(spec, path):
    """The task of what `load_task` reads in a task.json; errors name `path`."""
    def expect(condition, what):
        if not condition:
            raise ValueError(f"{path}: expected {what}")

    expect(isinstance(spec, dict), "a JSON object")
    for key in ("findings", "classes"):
        value = spec.get(key)
        expect(isinstance(value, dict) and value and all(isinstance(v, list) and v and all(isinstance(s, str) and s.strip() for s in v)
                                                         for v in value.values()), f'"{key}": an object of lists of words')
        expect(all(map(is_name, value)), f'names without control characters in "{key}"')
    expect(is_name(spec.get("name", "task")), '"name": a name')
    prompts = {"system": "", **spec["prompts"]} if isinstance(spec.get("prompts"), dict) else {}
    expect(all(isinstance(prompts.get(k), str) for k in ("system", "student", "teacher", "compare")),
           '"prompts": an object with the texts "student", "teacher", "compare"')
    expect("{diseases}" in prompts["teacher"], '"{diseases}" in prompts.teacher')
    expect("{readers}" in prompts["compare"], '"{readers}" in prompts.compare')
    expect(isinstance(q := prompts.get("question", "{finding}"), str) and "{finding}" in q, 'a text with {finding} as prompts.question')
    for phrases in spec["classes"].values():
        expect(all("{finding}" in phrase.split() for phrase in phrases), 'every phrase of "classes" to contain the word {finding}')
        expect(all(phrase.split().count("*") <= 3 for phrase in phrases), 'at most three * in a phrase of "classes"')  # each multiplies the search
    for key in ("positive", "refusals"):
        value = spec.get(key, [])
        expect(isinstance(value, list) and all(isinstance(s, str) and s for s in value), f'"{key}": a list of words')
    positive = tuple(spec.get("positive", ()))
    expect(set(positive) <= set(spec["classes"]), '"positive": some of the classes')

    patterns, between = [], r"[^\w.;|]+"  # a phrase does not reach over the end of a clause
    for finding, words in spec["findings"].items():
        others = [w for name, names in spec["findings"].items() if name != finding for w in names]
        gap = rf"(?:{between}(?!(?:{'|'.join(map(re.escape, others)) or '(?!)'})\b)\w+){{0,4}}?"
        alternatives = []
        for word in words:  # 'effusion' is not found inside another finding's 'pericardial effusion'
            before = "".join(rf"(?<!{re.escape(o[:-len(word)])})" for o in others if o.endswith(f" {word}"))
            after = "".join(rf"(?!{re.escape(o[len(word):])}\b)" for o in others if o.startswith(f"{word} "))
            alternatives.append(before + re.escape(word) + after)
        for value, phrases in spec["classes"].items():
            for phrase in phrases:
                expression = ""
                for token in phrase.split():
                    if token == "*":
                        expression += gap
                        continue
                    token = "(?:" + "|".join(alternatives) + ")" if token == "{finding}" else re.escape(token)
                    expression += (between if expression else "") + token
                patterns.append((finding, value, re.compile(rf"\b{expression}\b", re.IGNORECASE)))
    return Task(spec.get("name", Path(path).stem), tuple(spec["findings"]), tuple(spec["classes"]), positive, prompts,
                tuple(spec.get("refusals", ())), tuple(patterns))


def read_classes(text, task):
    """What a text says: {finding: class}; a finding that cannot be read is missing. Of several mentions the built-in task
    takes positive over uncertain over negative, a task.json the earliest. Votes, scores and filters all read through here."""
    if task.patterns is None:
        return {finding: reading.value for finding, reading in read_findings(text).items()}
    best = {}
    for finding, value, pattern in task.patterns:
        if match := pattern.search(text):
            best[finding] = min(best.get(finding, (match.span(), value)), (match.span(), value))
    return {finding: best[finding][1] for finding in task.findings if finding in best}


def is_refusal(text, task):
    """A refusing phrase and no finding about this image."""
    if task.patterns is None:
        return is_chest_refusal(text)
    return any(phrase.lower() in text.lower() for phrase in task.refusals) and not read_classes(text, task)


def vote(trajectories, task):
    """The plurality over teachers: {finding: class}. Ties go to the class that comes first in the task; unread ones abstain."""
    readings = [read_classes(text, task) for text in trajectories.values()]
    winner = {}
    for finding in task.findings:
        counts = [sum(reading.get(finding) == value for reading in readings) for value in task.classes]
        if any(counts):
            winner[finding] = task.classes[counts.index(max(counts))]
    return winner


# ------------------------------------------------------------------------------------------------------- the records

@dataclass
class Study:
    """One line of studies.jsonl; `record` is that line as it was read."""
    id: str
    images: tuple
    labels: dict
    trajectories: dict
    report: str = None
    split: str = None
    t_plus: str = None
    record: dict = field(default=None, repr=False)


def read_studies(path, task, split=None):
    """All studies of a studies.jsonl, or those of one split (a record without "split" belongs to every split).
    Raises ValueError listing every fault as 'file:line: what, and what was expected'."""
    studies, wrong, seen = [], [], {}
    for line, record in read_jsonl(path):
        found = faults(record, task)
        if not found and record["id"] in seen:
            found = [f'"id": {record["id"]!r} stands in line {seen[record["id"]]} already, expected it once']
        wrong += [f"{path}:{line}: {fault}" for fault in found]
        if found:
            continue
        seen[record["id"]] = line
        if split is None or record.get("split") in (None, split):
            image = record["image"]
            studies.append(Study(record["id"], tuple(image if isinstance(image, list) else [image]), record.get("labels", {}),
                                 record.get("trajectories", {}), record.get("report"), record.get("split"), record.get("t_plus"), record))
    if wrong:
        more = f"\n... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError("\n".join(wrong[:20]) + more)
    if not studies:
        raise ValueError(f"{path}: no study" + (f" of split {split!r}" if split else "") + ", expected at least one")
    return studies


def read_positives(path, studies):
    """Puts t+ of a positives.jsonl into the studies and returns those that have one.
    Raises ValueError where a line has no "id" and "t_plus" or a study comes twice."""
    texts = {}
    for line, record in read_jsonl(path):
        if not isinstance(record.get("id"), str) or not isinstance(record.get("t_plus"), str):
            raise ValueError(f'{path}:{line}: expected {{"id": "...", "t_plus": "..."}}')
        if record["id"] in texts:
            raise ValueError(f"{path}:{line}: a second t+ for study {record['id']!r}, expected one")
        texts[record["id"]] = record["t_plus"]
    for study in studies:
        study.t_plus = texts.get(study.id)
    chosen = [study for study in studies if study.t_plus]
    if not chosen:
        raise ValueError(f"{path}: holds t+ for none of the {len(studies)} studies, expected the positives of these studies")
    return chosen


def drop_refusals(studies, task):
    """Removes refusing trajectories, then studies without any; returns (studies, how many trajectories were dropped)."""
    dropped = 0
    for study in tqdm(studies, desc="refusals", disable=None):  # reads every text; no bar where nobody watches
        kept = {name: text for name, text in study.trajectories.items() if not is_refusal(text, task)}
        dropped += len(study.trajectories) - len(kept)
        study.trajectories = kept
    return [study for study in studies if study.trajectories], dropped


def teacher_names(studies):
    """The teachers in order of first appearance: the columns 1..N of Eq. 11."""
    return list(dict.fromkeys(name for study in studies for name in study.trajectories))


def keep_teachers(studies, chosen=None):
    """Keeps the trajectories of `chosen` ('NAME,...'; None keeps all) and returns the names in their fixed order.
    Raises ValueError for a name that no study has."""
    names = teacher_names(studies)
    if chosen:
        wanted = chosen.split(",")
        if unknown := [name for name in wanted if name not in names]:
            raise ValueError(f"--teachers {','.join(unknown)}: expected some of {', '.join(names)}")
        names = [name for name in names if name in wanted]
        for study in studies:
            study.trajectories = {name: text for name, text in study.trajectories.items() if name in names}
    return names


# ------------------------------------------------------------------------------------------- prompts, images, tokens

def student_prompt(study, task, kind="student"):
    """l. The student's own prompt names no diagnosis; kind 'teacher' is Appendix B's, with the positive labels joined by ' and '."""
    diseases = " and ".join(f for f in task.findings if study.labels.get(f) in task.positive) or "No Finding"
    return task.prompts[kind].replace("{diseases}", diseases)


def compare_prompt(study, task, seed):
    """(l, T) of Eq. 7: the trajectories as anonymous readers, their order shuffled by (seed, study)."""
    texts = [text for _, text in sorted(study.trajectories.items())]  # the order in the record shall not matter
    random.Random(f"{seed} {study.id} readers").shuffle(texts)
    readers = "\n".join(f"Reader {i}: {text}" for i, text in enumerate(texts, 1))
    return task.prompts["compare"].replace("{readers}", readers)


def image_path(path, root):
    """The file of a record's image path. Raises ValueError if it lies outside `root`."""
    try:
        root = Path(root).resolve()
        file = (root / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path!r}: no path of an image: {error}") from None
    if not file.is_relative_to(root):
        raise ValueError(f"{path}: lies outside the image folder {root}")
    return file


def doubled(path, root):
    """A hint for a missing image where the image folder's name stands in both, ' (--images ends in files/ and the path begins with it)', else ''."""
    name = Path(root).resolve().name
    return f" (--images ends in {name}/ and the path begins with it)" if str(path).startswith(f"{name}/") else ""


@contextlib.contextmanager
def open_image(path, root):
    """A PIL image whose header was read and checked; whatever goes wrong inside becomes a ValueError that names the file."""
    file = image_path(path, root)
    try:
        if file.exists() and not file.is_file():  # a pipe would keep who opens it waiting for ever
            raise ValueError("no regular file")
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, expected at most {MAX_IMAGE_PIXELS:,}")
            if max(image.size) > 200 * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels, expected an aspect ratio of at most 200")
            yield image
    except FileNotFoundError:
        raise ValueError(f"{file}: no such image{doubled(path, root)}") from None
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ValueError(f"{file}: not a readable image: {error}") from None


def require_images(studies, root):
    """Raises ValueError for the first image of the studies that is not there or no image, as far as its header tells."""
    for study in studies:
        for path in study.images:
            with open_image(path, root):
                pass


def load_image(path, root):
    """An RGB PIL image. 16-bit films are rescaled, EXIF rotation is applied. Raises ValueError naming the file if it lies
    outside `root`, cannot be read, is larger than MAX_IMAGE_PIXELS or longer than 200 times its width."""
    with open_image(path, root) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # convert("RGB") would cut a 12-bit film at 255
            pixels = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((pixels * (255 / max(pixels.max(), 1))).astype(np.uint8))
        return image.convert("RGB")


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """(height, width) at which the student sees an image: multiples of `factor`, within the two bounds."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    return smart_resize(height, width, factor, min_pixels, max_pixels)


class Encoder:  # torch and transformers are imported in here: the rest of this file runs without them, and `tools/check.py` in little memory
    """Turns a study into tensors. Needs a student's folder or hub id for its tokenizer and image processor only; the prompt is
    built here, since AutoProcessor wants torchvision. max_pixels bounds an image (28 x 28 pixels make one token), max_tokens a study's
    packed row: what is longer loses the ends of its longest responses (training.fit says beforehand which studies that is)."""

    def __init__(self, student, task, images=".", max_pixels=1024 * 28 * 28, max_tokens=None):
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.task, self.images, self.max_tokens = task, images, max_tokens
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=False)
            self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(student)
        except Exception as error:  # of a broken file they raise nearly anything
            raise ValueError(f"--student {student}: expected the tokenizer and image processor of a Qwen2.5-VL: {error}") from None
        size = self.image_processor.size
        self.image_processor.size = {"shortest_edge": size["shortest_edge"], "longest_edge": min(size["longest_edge"], max_pixels)}
        special = self.tokenizer.convert_tokens_to_ids
        self.start, self.end, self.image_pad = special("<|im_start|>"), special("<|im_end|>"), special("<|image_pad|>")
        self.vision_start, self.vision_end = special("<|vision_start|>"), special("<|vision_end|>")
        self.pad = self.tokenizer.pad_token_id

    def tokens(self, text):
        """Token ids of plain text; '<|im_end|>' inside a teacher's text stays text."""
        return self.tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]

    def text(self, ids):
        """The text of a response's token ids, without the end token."""
        return self.tokenizer.decode([int(i) for i in ids if int(i) not in (self.end, self.pad)])

    def pixels(self, study):
        """-> pixel_values (patches, 1176) fp32, image_grid_thw (images, 3)."""
        images = [load_image(path, self.images) for path in study.images]
        out = self.image_processor(images=images, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def prefix(self, prompt, image_grid_thw):
        """v and l in Qwen's chat format -> (P,) ids that end where the response begins."""
        import torch

        ids = []
        if self.task.prompts["system"]:
            ids += [self.start, *self.tokens("system\n" + self.task.prompts["system"]), self.end, *self.tokens("\n")]
        ids += [self.start, *self.tokens("user\n")]
        for t, h, w in image_grid_thw.tolist():
            pads = t * h * w // self.image_processor.merge_size ** 2
            ids += [self.vision_start, *[self.image_pad] * pads, self.vision_end]
        ids += [*self.tokens(prompt), self.end, *self.tokens("\n"), self.start, *self.tokens("assistant\n")]
        return torch.tensor(ids)

    def response(self, text):
        """t -> (n,) ids that end with the end token."""
        import torch

        return torch.tensor([*self.tokens(text), self.end])

    def __call__(self, study, prompt, responses=()):
        """One study as the packed step takes it: the prefix, its image, and K responses (None where a teacher is absent)."""
        pixel_values, image_grid_thw = self.pixels(study)
        prefix = self.prefix(prompt, image_grid_thw)
        responses = [None if text is None else self.response(text) for text in responses]
        if self.max_tokens:
            cut = iter(shares([len(r) for r in responses if r is not None], self.max_tokens - len(prefix)))
            responses = [None if r is None else r[:next(cut)] for r in responses]
        return {"id": study.id, "prefix_ids": prefix, "pixel_values": pixel_values, "image_grid_thw": image_grid_thw, "responses": responses}

    def lengths(self, study, prompt, responses):
        """(P, [n of each response]) of a study in tokens, from the texts and the image's header alone."""
        import torch

        grids = []
        for path in study.images:
            with open_image(path, self.images) as image:
                size, side = self.image_processor.size, self.image_processor.patch_size
                height, width = smart_resize(image.height, image.width, side * self.image_processor.merge_size,
                                             size["shortest_edge"], size["longest_edge"])
            grids.append([1, height // side, width // side])
        return len(self.prefix(prompt, torch.tensor(grids))), [len(self.tokens(text)) + 1 for text in responses if text is not None]


def shares(lengths, budget):
    """How many tokens each response may keep so that all fit into `budget`: the longest give way first, the short stay whole."""
    kept = dict.fromkeys(range(len(lengths)), 0)
    for left, i in zip(range(len(lengths), 0, -1), sorted(kept, key=lengths.__getitem__)):
        kept[i] = min(lengths[i], budget // left)
        budget -= kept[i]
    return list(kept.values())

