"""A study, the task, the prompts; records read and checked; what a teacher said; films.

A study is one line of studies.jsonl (UTF-8, one JSON object a line):

    {"id": "s50414267", "image": "files/p10/.../x.jpg",
     "labels": {"Edema": 1, "Pneumonia": 0, "Fracture": -1},
     "trajectories": {"gpt-5": "...", "grok-4": "..."}, "report": "...", "split": "train"}

`image` (or a list of two, for progression) is relative to --images and may not lie outside it;
`labels` maps a finding to its class; `report` and `split` are optional, and so is `prompt`, which
is asked instead of the task's prompt; unknown keys are kept. The task says which findings and
classes there are: the built-in one has MIMIC-CXR's 14 findings with 1 / 0 / -1, any other one is a
task.json (`load_task` gives its format). Stage 2 adds positives.jsonl: {"id", "t_plus", "seed",
"tokens", "finish"}.

In the paper's letters: v = image, l = prompt, t^u = trajectories[u], T = all of them, t+ = t_plus.
"""

import contextlib
import random
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from metrics.findings import is_refusal as is_chest_refusal
from metrics.findings import read_findings
from metrics.phrases import Phrases
from runtime.records import is_name, read_json, read_jsonl

# A film has about 10 million pixels. Pillow itself only warns of an image that has far too many.
MAX_IMAGE_PIXELS = 64_000_000
# Decoding a JPEG goes over all its pixels again for each of its scans, of which a film has 1 to 10.
MAX_SCANNED_PIXELS, SMALL_FILM = 1_000_000_000, 10_000_000
# Threads that decode films take turns, since a large one takes up to 2 GB while it is decoded.
DECODERS = threading.BoundedSemaphore(4)
# Only these are opened: Pillow gives files of some other formats to outside programs.
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
# Tags of a TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH, SAMPLE_FORMAT = 258, 262, 322, 323, 339


# ------------------------------------------------------------------------------------- the task

@dataclass(frozen=True)
class Task:
    """What is asked about an image, and what can be answered.

    name      a name for it
    findings  the names of the findings, in order
    classes   the classes that a finding can have, in order
    positive  the classes that count as disease, for {diseases} in the teachers' prompt
    prompts   {kind: text}: system, student, teacher with {diseases}, compare with {readers}; for
              the evaluation also question with {finding}, and report
    refusals  phrases by which a teacher declines to answer
    phrases   the compiled phrases of a task.json; None: metrics/findings.py reads the texts
    """
    name: str
    findings: tuple
    classes: tuple
    positive: tuple
    prompts: dict
    refusals: tuple = ()
    phrases: Phrases = field(default=None, repr=False)


CHEST = Task(
    name="mimic-cxr-14",
    findings=("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum",
              "Fracture", "Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion",
              "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices"),
    classes=(1, 0, -1),
    positive=(1,),
    prompts={
        "system": "You are a helpful assistant.",
        "student": "This is a patient's chest DR image. Which findings does the image show, and "
                   "what is the basis for each of them?",
        # Appendix B. It names the diagnosis, so only teachers get it.
        "teacher": "This is a patient's chest DR image. The patient has been diagnosed with "
                   "{diseases}. Can you find the basis for the diagnosis in the image?",
        # Eq. 7 conditions on v, l and all trajectories; the paper gives no wording.
        "compare": "This is a patient's chest DR image. Several readers have described it, each on "
                   "their own.\n\n{readers}\n\nCompare these descriptions with each other and with "
                   "the image. Then describe the image yourself: keep what the readers agree on "
                   "and the image shows, leave out the rest, and do not mention the readers.",
        # Both are for evaluate.py only. The answer to the question is yes or no; the report is
        # compared with the findings section of a radiologist's report.
        "question": "Does this chest X-ray show {finding}?",
        "report": "This is a patient's chest DR image. Write the findings section of its radiology "
                  "report.",
    },
)


def load_task(path=None):
    """The built-in chest task, or the one of a task.json:

        {"name": "...",
         "findings": {"Pleural Effusion": ["effusion"], ...},
         "classes": {"absent": ["{finding} * absent", ...], "mild": [...], "severe": [...]},
         "positive": ["mild", "severe"],
         "prompts": {"system": "", "student": "...", "teacher": "... {diseases} ...",
                     "compare": "... {readers} ..."},
         "refusals": ["i cannot", ...]}

    findings  name -> the words that name it in a text
    classes   in order: class -> phrases. In a phrase, {finding} matches any of the finding's words,
              and each * (at most three) matches up to four words of the same clause that name no
              other finding; a phrase has at most 20 words
    prompts   may have a "question" with {finding} and {options}, which evaluate.py asks
    path      a task.json; None: the built-in task
    Returns the Task. Raises ValueError naming the file and what was expected.
    """
    return CHEST if path is None else make_task(read_json(path), path)


def make_task(spec, path):
    """The Task of an object in the format of a task.json (see `load_task`).

    spec  the object
    path  where it was read, for the messages of errors and for a task without a name
    Raises ValueError as `load_task` does.
    """
    task_faults(spec, path)
    phrases = Phrases(spec["findings"], spec["classes"], spec.get("positive", ()))
    return Task(spec.get("name", Path(path).stem), tuple(spec["findings"]), tuple(spec["classes"]),
                tuple(spec.get("positive", ())), {"system": "", **spec["prompts"]},
                tuple(spec.get("refusals", ())), phrases)


def task_faults(spec, path):
    """Raises ValueError for the first thing in `spec` that is not as `load_task` describes it."""
    def expect(condition, what):
        if not condition:
            raise ValueError(f"{path}: expected {what}")

    expect(isinstance(spec, dict), "a JSON object")
    for key in ("findings", "classes"):
        value = spec.get(key)
        expect(isinstance(value, dict) and value and all(map(is_word_list, value.values())),
               f'"{key}": an object of lists of words')
        expect(all(map(is_name, value)), f'names without control characters in "{key}"')
    expect(is_name(spec.get("name", "task")), '"name": a name')
    prompts = {"system": "", **spec["prompts"]} if isinstance(spec.get("prompts"), dict) else {}
    needed = [prompts.get(key) for key in ("system", "student", "teacher", "compare")]
    expect(all(isinstance(text, str) for text in needed),
           '"prompts": an object with the texts "student", "teacher", "compare"')
    expect("{diseases}" in prompts["teacher"], '"{diseases}" in prompts.teacher')
    expect("{readers}" in prompts["compare"], '"{readers}" in prompts.compare')
    question = prompts.get("question", "{finding}")
    expect(isinstance(question, str) and "{finding}" in question,
           'a text with {finding} as prompts.question')
    for phrases in spec["classes"].values():
        for words in map(str.split, phrases):
            expect("{finding}" in words, 'every phrase of "classes" to contain the word {finding}')
            # every * multiplies the time of the search
            expect(words.count("*") <= 3, 'at most three * in a phrase of "classes"')
            expect(len(words) <= 20, 'at most 20 words in a phrase of "classes"')
    for key in ("positive", "refusals"):
        value = spec.get(key, [])
        expect(isinstance(value, list) and all(isinstance(s, str) and s for s in value),
               f'"{key}": a list of words')
    expect(set(spec.get("positive", ())) <= set(spec["classes"]),
           '"positive": some of the classes')


def is_word_list(value):
    """Whether `value` is a list of at least one text, and none of its texts is blank."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(word, str) and word.strip() for word in value)


# ------------------------------------------------------------------------- what a teacher said

# What a model thinks before it answers, from the first mark to the second.
THINKING = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
            ("<reasoning>", "</reasoning>"), ("<seed:think>", "</seed:think>"),
            ("◁think▷", "◁/think▷"), ("[THINK]", "[/THINK]"), ("<unused94>", "<unused95>"),
            ("<|channel|>analysis<|message|>", "<|end|>"))
# Marks around the answer itself, which stays.
ANSWER_MARKS = re.compile(
    r"<\|(?:begin|end)_of_box\|>|</?answer>"
    r"|(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>|<\|return\|>", re.IGNORECASE)
_OPENED, _CLOSED = ("|".join(map(re.escape, marks)) for marks in zip(*THINKING))
_THOUGHT = re.compile(rf"(?:{_OPENED})(?:(?!{_OPENED}).)*?(?:{_CLOSED})", re.DOTALL | re.IGNORECASE)
# by itself <|end|> ends an answer, not a thought
_ENDS_THOUGHT = "|".join(re.escape(end) for _, end in THINKING if end != "<|end|>")
_LONE_END = re.compile(rf"^.*(?:{_ENDS_THOUGHT})", re.DOTALL | re.IGNORECASE)
_LONE_START = re.compile(rf"(?:{_OPENED}).*", re.DOTALL | re.IGNORECASE)
# Marks of a chat template, which belong to no text: <|im_end|>, DeepSeek's <｜User｜>, Gemma's
# <start_of_turn>, Llama 2's [INST] and <<SYS>>, LLaVA's <image>.
CHAT_MARKER = re.compile(
    r"<[|｜][^\s<>|｜]{1,40}[|｜]>|</?(?:start|begin|end)_of_\w{1,40}>|</?s>"
    r"|<(?:bos|eos|pad|unk|image)>|\[/?INST\]|<</?SYS>>", re.IGNORECASE)


def answer_of(text):
    """A model's answer without its thinking.

    text  as a model wrote it: what stands between <think> and </think>, before a lone </think> and
          behind a lone <think> is left out, and so are the marks around an answer
    Returns the answer without blanks around it, "" where there was only thinking; a text without
    such marks is returned as it is.
    """
    if not re.search(r"[<[◁]", text):
        return text
    answer = _LONE_START.sub("", _LONE_END.sub("", _THOUGHT.sub("", text)))
    answer = ANSWER_MARKS.sub("", answer)
    return text if answer == text else answer.strip()


def read_with_words(text, task):
    """What a text says about each finding, and where.

    text  a teacher's or a student's text
    task  the Task: of several mentions of a finding the built-in task takes positive before
          uncertain before negative, a task.json takes the earliest
    Returns {finding: (class, the sentence, line or clause that decided)}; a finding that cannot be
    read is missing.
    """
    read = (read_findings if task.phrases is None else task.phrases.read)(answer_of(text))
    return {finding: tuple(read[finding]) for finding in task.findings if finding in read}


def read_classes(text, task):
    """{finding: class} of `read_with_words`. Votes, scores and filters all read texts with it."""
    return {finding: value for finding, (value, _) in read_with_words(text, task).items()}


def is_refusal(text, task):
    """Whether a text is empty without its thinking, or has a refusing phrase and says nothing about
    a finding in this image."""
    text = answer_of(text)
    if not text.strip():
        return True
    if task.phrases is None:
        return is_chest_refusal(text)
    declines = any(phrase.lower() in text.lower() for phrase in task.refusals)
    return declines and not read_classes(text, task)


def vote(trajectories, task):
    """The class of each finding that most teachers name.

    trajectories  {teacher: text}; a teacher whose text cannot be read on a finding abstains there
    task          the Task; of classes with the same number of votes its earliest wins
    Returns {finding: class}, without the findings that nobody mentions.
    """
    return plurality([read_classes(text, task) for text in trajectories.values()], task)


def plurality(readings, task):
    """`vote` of texts that were read already.

    readings  the {finding: class} of each text
    task      the Task
    Returns what `vote` returns.
    """
    winner = {}
    for finding in task.findings:
        votes = [reading.get(finding) for reading in readings]
        counts = [votes.count(value) for value in task.classes]
        if any(counts):
            winner[finding] = task.classes[counts.index(max(counts))]
    return winner


# ---------------------------------------------------------------------------------- the records

@dataclass
class Study:
    """One line of studies.jsonl: `images` are one or two paths, `record` is the line as read."""
    id: str
    images: tuple
    labels: dict
    trajectories: dict
    report: str = None
    split: str = None
    t_plus: str = None
    prompt: str = None
    record: dict = field(default=None, repr=False)


def record_faults(record, task):
    """What is wrong with one record of studies.jsonl: a list of sentences, empty if nothing is.

    record  the object of the line
    task    the Task, which knows the findings and their classes
    """
    found = []
    if not is_name(record.get("id")):
        found.append('"id": expected a non-empty string without control characters')
    image = record.get("image")
    images = image if isinstance(image, list) else [image]
    if not (1 <= len(images) <= 2 and all(map(is_name, images))):
        found.append('"image": expected a path or a list of two paths, without control characters')
    found += label_faults(record.get("labels", {}), task)
    found += trajectory_faults(record.get("trajectories", {}))
    for key in ("report", "split", "t_plus", "prompt"):
        if record.get(key) is not None and not isinstance(record[key], str):
            found.append(f'"{key}": expected a string')
    return found


def label_faults(labels, task):
    """What is wrong with the "labels" of a record, a list of sentences."""
    if not isinstance(labels, dict):
        return ['"labels": expected an object {finding: class}']
    findings, classes = ", ".join(task.findings), ", ".join(map(repr, task.classes))
    found = []
    for finding, value in labels.items():
        if finding not in task.findings:
            found.append(f'"labels": unknown finding {finding!r}, expected one of {findings}')
        elif isinstance(value, bool) or value not in task.classes:
            found.append(f'"labels": {finding} is {value!r}, expected one of {classes}')
    return found


def trajectory_faults(trajectories):
    """What is wrong with the "trajectories" of a record, a list of sentences."""
    if not isinstance(trajectories, dict):
        return ['"trajectories": expected an object {teacher: text}']
    found = [f'"trajectories": {name!r}: expected a name without control characters'
             for name in trajectories if not is_name(name)]
    for name, text in trajectories.items():
        if not isinstance(text, str) or not text.strip():
            found.append(f'"trajectories": {name!r} is empty or no text, expected words')
    return found


def read_studies(path, task, split=None):
    """Reads a studies.jsonl.

    path   the file
    task   the Task, which knows the findings and their classes
    split  only the studies of this split; a record without "split" belongs to every split
    Returns [Study]. Raises ValueError that lists the first 20 faults, each of them as
    'file:line: what is wrong, and what was expected'.
    """
    studies, wrong, seen = [], [], {}
    for line, record in read_jsonl(path):
        found = record_faults(record, task)
        if not found and record["id"] in seen:
            found = [f'"id": {record["id"]!r} is in line {seen[record["id"]]} already, '
                     "expected it once"]
        wrong += [f"{path}:{line}: {fault}" for fault in found]
        if found:
            continue
        seen[record["id"]] = line
        if split is None or record.get("split") in (None, split):
            studies.append(make_study(record))
    if wrong:
        more = f"\n... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError("\n".join(wrong[:20]) + more)
    if not studies:
        of_split = f" of split {split!r}" if split else ""
        raise ValueError(f"{path}: no study{of_split}, expected at least one")
    return studies


def make_study(record):
    """The Study of a record in which `record_faults` finds nothing.

    Its trajectories are the teachers' answers without what they thought before.
    """
    image = record["image"]
    return Study(
        id=record["id"],
        images=tuple(image if isinstance(image, list) else [image]),
        labels=record.get("labels", {}),
        trajectories={name: answer_of(text)
                      for name, text in record.get("trajectories", {}).items()},
        report=record.get("report"),
        split=record.get("split"),
        t_plus=record.get("t_plus"),
        prompt=record.get("prompt"),
        record=record)


def read_positives(path, studies):
    """Puts the t+ of a positives.jsonl into the studies.

    path     the file that stage 2 wrote
    studies  [Study], whose t_plus is set
    Returns the studies that have a t+. Raises ValueError where a line has no "id" and "t_plus", a
    study comes twice, or none of the studies has a t+.
    """
    texts = {}
    for line, record in read_jsonl(path):
        if not isinstance(record.get("id"), str) or not isinstance(record.get("t_plus"), str):
            raise ValueError(f'{path}:{line}: expected {{"id": "...", "t_plus": "..."}}')
        if record["id"] in texts:
            raise ValueError(f"{path}:{line}: a second t+ for study {record['id']!r}, expected one")
        texts[record["id"]] = answer_of(record["t_plus"])
    for study in studies:
        study.t_plus = texts.get(study.id)
    chosen = [study for study in studies if study.t_plus]
    if not chosen:
        raise ValueError(f"{path}: holds t+ for none of the {len(studies)} studies, expected the "
                         "positives of these studies")
    return chosen


def training_studies(path, task, split=None, teachers=None, refusals="drop", positives=None):
    """The studies that a stage works on.

    path       studies.jsonl
    task       the Task
    split      which of its studies; None: all
    teachers   'NAME,...': only these; None: all
    refusals   'drop' leaves out trajectories that decline to answer, 'keep' keeps them but for
               those that were nothing but thinking
    positives  positives.jsonl whose t+ each study must have; None: t+ is not needed
    Returns (studies with at least one trajectory, the teachers' names in their fixed order, how
    many refusals were dropped). Raises ValueError as the readers do, and where no study has
    trajectories.
    """
    studies = read_studies(path, task, split)
    if positives:
        studies = read_positives(positives, studies)
    names = keep_teachers(studies, teachers)
    declines = is_refusal if refusals == "drop" else lambda text, _: not text.strip()
    studies, dropped = drop_refusals(studies, task, declines)
    if not studies:
        raise ValueError(f"{path}: no study has trajectories, expected the teachers' texts")
    return studies, names, dropped


def drop_refusals(studies, task, declines=is_refusal):
    """Removes the trajectories that decline to answer, and then the studies that have none left.

    studies   [Study], whose trajectories are changed
    task      the Task, which knows what a refusal is
    declines  declines(text, task) says whether a text does
    Returns (studies, how many trajectories were removed).
    """
    dropped = 0
    # Every text is read, which takes a while; disable=None shows no bar outside a terminal.
    for study in tqdm(studies, desc="refusals", disable=None):
        kept = {name: text for name, text in study.trajectories.items()
                if not declines(text, task)}
        dropped += len(study.trajectories) - len(kept)
        study.trajectories = kept
    return [study for study in studies if study.trajectories], dropped


def teacher_names(studies):
    """The teachers in order of first appearance: the columns 1..N of Eq. 11."""
    return list(dict.fromkeys(name for study in studies for name in study.trajectories))


def keep_teachers(studies, chosen=None):
    """Keeps only the trajectories of some teachers.

    studies  [Study], whose trajectories are changed
    chosen   'NAME,...'; None keeps all
    Returns the names in their fixed order. Raises ValueError for a name that no study has.
    """
    names = teacher_names(studies)
    if chosen:
        wanted = chosen.split(",")
        if unknown := [name for name in wanted if name not in names]:
            raise ValueError(f"--teachers {','.join(unknown)}: expected some of {', '.join(names)}")
        names = [name for name in names if name in wanted]
        for study in studies:
            study.trajectories = {name: text for name, text in study.trajectories.items()
                                  if name in names}
    return names


# ---------------------------------------------------------------------------------- the prompts

def student_prompt(study, task, kind="student"):
    """The prompt l of a study.

    study  the Study; its own prompt takes the place of the task's 'student'
    task   the Task
    kind   'student' names no diagnosis; 'teacher' is Appendix B's, in which {diseases} becomes the
           study's positive labels, joined by ' and '
    """
    if kind == "student" and study.prompt is not None:
        return study.prompt
    positive = [finding for finding in task.findings
                if study.labels.get(finding) in task.positive]
    return task.prompts[kind].replace("{diseases}", " and ".join(positive) or "No Finding")


def compare_prompt(study, task, seed):
    """(l, T) of Eq. 7: a prompt that shows all trajectories of a study, as anonymous readers.

    study  the Study
    task   the Task
    seed   the readers' order is shuffled by it and the study's id
    """
    # sorted by the teachers' names first, since their order in the record must not matter
    texts = [text for _, text in sorted(study.trajectories.items())]
    random.Random(f"{seed} {study.id} readers").shuffle(texts)
    readers = "\n".join(f"Reader {i}: {text}" for i, text in enumerate(texts, 1))
    return task.prompts["compare"].replace("{readers}", readers)


# ------------------------------------------------------------------------------------ the films

class ImageError(ValueError):
    """An image cannot be read; `kind` is what tools/check.py calls that."""
    kind = "image unreadable"


class MissingImage(ImageError):
    """There is no such file."""
    kind = "image missing"


class OutsideImage(ImageError):
    """The file lies outside the folder of the images."""
    kind = "image outside"


class LargeImage(ImageError):
    """The image has too many pixels or scans, or a side is far longer than the other one."""
    kind = "image too large"


def image_path(path, root):
    """The file of an image.

    path  as a record gives it
    root  the folder of the images
    Returns a Path. Raises ImageError if it is no path, or lies outside `root`.
    """
    try:
        root = Path(root).resolve()
        file = (root / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ImageError(f"{path!r}: no path of an image: {error}") from None
    if not file.is_relative_to(root):
        raise OutsideImage(f"{path}: lies outside the image folder {root}")
    return file


def folder_twice_hint(path, root):
    """A hint for a missing image whose path begins with the image folder's own name, else ''."""
    name = Path(root).resolve().name
    if not str(path).startswith(f"{name}/"):
        return ""
    return f" (--images ends in {name}/ and the path begins with it)"


@contextlib.contextmanager
def open_image(path, root):
    """A context that gives the PIL image of a file, of which the header has been read and checked.

    path  as a record gives it
    root  the folder of the images
    Whatever goes wrong, in the context too, becomes an ImageError that names the file.
    """
    file = image_path(path, root)
    try:
        if file.exists() and not file.is_file():  # opening a pipe would wait for ever
            raise ValueError("no regular file")
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            size = f"{image.width} x {image.height} pixels"
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise LargeImage(f"{size}, expected at most {MAX_IMAGE_PIXELS:,}")
            if max(image.size) > 200 * min(image.size):
                raise LargeImage(f"{size}, expected an aspect ratio of at most 200")
            require_small_tiles(image)
            require_one_film(image)
            # with a name Pillow maps some TIFFs into memory, and garbles them if they are turned
            image.filename = ""
            yield image
    except FileNotFoundError:
        raise MissingImage(f"{file}: no such image{folder_twice_hint(path, root)}") from None
    except (LargeImage, Image.DecompressionBombError) as error:
        raise LargeImage(f"{file}: not a readable image: {error}") from None
    except Exception as error:  # a broken file can make Pillow raise nearly anything
        raise ImageError(f"{file}: not a readable image: {error}") from None


def require_small_tiles(image):
    """Raises LargeImage where a TIFF's tiles, which are decoded whole, have too many pixels.

    image  PIL image of which only the header has been read
    """
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(TILE_WIDTH, 1), tags.get(TILE_LENGTH, 1)
    decoded = -(-image.width // width) * -(-image.height // height) * width * height
    if not 0 < decoded <= MAX_IMAGE_PIXELS:
        raise LargeImage(f"{image.width} x {image.height} pixels in tiles of {width} x {height}, "
                         f"which are {decoded:,} pixels, expected at most {MAX_IMAGE_PIXELS:,}")


def require_few_scans(image):
    """Raises LargeImage where a JPEG has so many scans that decoding it would take minutes.

    image  PIL image; the whole file of a JPEG is read
    """
    if image.format not in ("JPEG", "MPO"):
        return
    scans, last = 0, b""
    image.fp.seek(0)
    while part := image.fp.read(1_000_000):
        scans += (last + part).count(b"\xff\xda")  # the mark at which each begins
        last = part[-1:]
    most = MAX_SCANNED_PIXELS // max(image.width * image.height, SMALL_FILM)
    if scans > most:
        raise LargeImage(f"a JPEG of {image.width} x {image.height} pixels in {scans} scans, "
                         f"expected at most {most}")


def require_one_film(image):
    """Raises ValueError where a file's header says that Pillow would give less than the file holds.

    image  PIL image of which only the header has been read
    """
    # the further pictures of a camera's JPEG (MPO) are previews of the first one
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError("several pages or frames, expected one film in a file")
    bits = max(getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,)))
    if image.format == "PNG" and image.tile and image.tile[0].args.endswith(";16B"):
        bits = 16
    if bits > 8 and len(image.getbands()) > 1:
        raise ValueError(f"{bits} bits a colour, of which Pillow reads only the upper 8; expected "
                         "8 bits a colour, or 16 bits of grey without alpha")


def require_images(studies, root):
    """Raises ImageError for the first image that is missing or, as its header shows, no image.

    studies  [Study]
    root     the folder of their images
    """
    for study in studies:
        for path in study.images:
            with open_image(path, root):
                pass


def load_image(path, root):
    """Reads an image; a rotation in EXIF is applied, grey deeper than 8 bits becomes 8 bits.

    path  as a record gives it
    root  the folder of the images
    Returns a PIL image in RGB. What becomes of each kind of file, docs/data.md says ("Films").
    Raises ImageError naming the file if it lies outside `root`, cannot be read, has more than
    MAX_IMAGE_PIXELS, with its tiles too, has too many scans or a side 200 times as long as the
    other one, or holds its picture in a way that would be lost.
    """
    with open_image(path, root) as image:
        require_few_scans(image)
        upright = ImageOps.exif_transpose(image)
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        signed = tags.get(SAMPLE_FORMAT, (1,))[0] == 2
        if image.mode[0] in "IF" or signed and image.mode == "L":
            inverted = tags.get(PHOTOMETRIC) == 0  # white is 0; with 8 bits Pillow sees to that
            return grey_film(np.asarray(upright), signed, inverted).convert("RGB")
        require_colours(upright)
        return upright.convert("RGB")


def grey_film(pixels, signed, inverted):
    """A film of grey values as PIL image of 8 bits.

    pixels    (height, width) of a PIL image in mode I, I;16, I;16B, F or L
    signed    whether the file's integers are signed; Pillow gives those of 8 bits as unsigned, and
              unsigned ones of 32 bits as signed
    inverted  whether 0 is white
    Raises ValueError for values that are not finite or all the same.
    """
    if pixels.dtype == np.uint8 and signed:
        pixels = pixels.view(np.int8)
    elif pixels.dtype == np.int32 and not signed:
        pixels = pixels.view(np.uint32)
    pixels = pixels.astype(np.float32)
    black, white = grey_range(pixels)
    shades = ((pixels - black) * (255 / (white - black))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - shades if inverted else shades)


def grey_range(pixels):
    """The values of a film that become black and white.

    pixels  (height, width) fp32
    That is from 0 to the largest value; from the smallest one where it is negative or more than
    half of the largest, since such a film has no 0. Where one pixel in 1,000 at each end makes more
    than half of that range, these are left out: one hot pixel would make the film black.
    Returns two floats. Raises ValueError where there is no such range.
    """
    least, most = float(pixels.min()), float(pixels.max())
    if not 1e-30 < most - least < 1e30:  # NaN and infinity too
        raise ValueError(f"its values go from {least:g} to {most:g}, expected finite ones that "
                         "differ")
    few = pixels.size // 1000
    ordered = np.partition(pixels, (few, pixels.size - 1 - few), axis=None)
    from_zero = lambda low, high: (low if low < 0 or low > high / 2 else 0.0, high)
    whole = from_zero(least, most)
    inner = from_zero(float(ordered[few]), float(ordered[-1 - few]))
    return inner if 0 < inner[1] - inner[0] < (whole[1] - whole[0]) / 2 else whole


def require_colours(image):
    """Raises ValueError where an image's colours show nothing and its alpha channel holds the film.

    image  PIL image of 8 bits, whose alpha channel will be dropped
    """
    in_palette = image.mode == "P" and "transparency" in image.info
    if image.mode not in ("LA", "PA", "RGBA") and not in_palette:
        return
    pixels = np.asarray(image.convert("RGBA"))
    visible = pixels[pixels[..., 3] > 0]
    if (visible[:, :3] == visible[:1, :3]).all() and np.ptp(pixels[..., 3]) > 0 and len(visible):
        raise ValueError("only its alpha channel holds a picture, which would be dropped; expected "
                         "the film in its colours")
