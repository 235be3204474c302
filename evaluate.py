"""Leave here: what the paper measures, on a student and on its teachers. Nothing trains.

    python evaluate.py classify --student runs/apo/student --studies studies.jsonl --images files
    torchrun --nproc_per_node=4 evaluate.py classify ...                                    shared over the ranks, same numbers
    python evaluate.py teachers --studies studies.jsonl                                     how far they drift apart: teachers.py

Each study is answered in the student's own words, greedily and by sampling at temperature 1, and read back by data.read_classes.
Top-1 accuracy counts the labelled findings whose class was read; one that cannot be read is wrong, and the unread rate says how
often that was.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import data
import student
import teachers
import training

SHORT = {"Atelectasis": "Ate.", "Cardiomegaly": "Car.", "Consolidation": "Con.", "Edema": "Ede.", "Enlarged Cardiomediastinum": "ECM",
         "Fracture": "Fra.", "Lung Lesion": "LL", "Lung Opacity": "LO", "No Finding": "NF", "Pleural Effusion": "PE", "Pleural Other": "PO",
         "Pneumonia": "Pna.", "Pneumothorax": "Pnx.", "Support Devices": "SD"}
TABLE_5_FINDINGS = ("Consolidation", "Pleural Effusion", "Pneumonia", "Pneumothorax", "Edema")
TABLE_5 = {"SPD, one teacher": (0.78, 0.58, 0.70, 0.95, 0.31, 0.66), "SPD, all teachers": (0.77, 0.49, 0.69, 0.94, 0.51, 0.68),
           "SPD, all teachers + APO": (0.84, 0.67, 0.78, 0.96, 0.65, 0.78)}  # MS-CXR-T, top-1; the last column is the paper's average


def answers(model, encoder, studies, task, temperature, seed=0, batch_size=50, max_new_tokens=1024, prompt="student", num_workers=0, desc="answers"):
    """The student's text for each study, in their order: greedy at temperature 0, else one sample per study by its own seed.
    The batches are shared over the ranks; every rank returns all texts."""
    batches = [list(range(i, min(i + batch_size, len(studies)))) for i in range(0, len(studies), batch_size)]
    mine, texts = batches[training.rank()::training.world()], {}

    def encode(index):
        return encoder(studies[index], data.student_prompt(studies[index], task, prompt))

    stream = training.loader(encode, [[(index,) for index in batch] for batch in mine], num_workers)
    for batch, examples in tqdm(zip(mine, stream), total=len(mine), desc=desc, disable=training.rank() > 0):
        seeds = [f"{seed} {studies[index].id} answer" for index in batch]
        for index, (ids, _) in zip(batch, student.sample(model, encoder, examples, seeds, temperature, 1.0, max_new_tokens)):
            texts[index] = encoder.text(ids)
    for part in training.gather(texts):
        texts |= part
    return [texts[index] for index in range(len(studies))]


def score(readings, studies, task):
    """readings: {finding: class} per study. -> top-1 accuracy per finding over the studies that have its label, their unweighted
    mean, n, the unread rate, and the agreement with the teachers' plurality (None where there is none)."""
    accuracy, n, unread, labels, agree, votes = {}, {}, 0, 0, 0, 0
    for finding in task.findings:
        labelled = [(reading, study) for reading, study in zip(readings, studies) if finding in study.labels]
        if labelled:
            accuracy[finding] = sum(reading.get(finding) == study.labels[finding] for reading, study in labelled) / len(labelled)
            n[finding] = len(labelled)
            unread += sum(finding not in reading for reading, _ in labelled)
            labels += len(labelled)
    for reading, study in zip(readings, studies):
        plurality = data.vote(study.trajectories, task)
        votes += len(plurality)
        agree += sum(reading.get(finding) == value for finding, value in plurality.items())
    return {"accuracy": accuracy, "mean": sum(accuracy.values()) / len(accuracy) if accuracy else None, "n": n,
            "unread": unread / labels if labels else None, "agreement_with_vote": agree / votes if votes else None}


def prior(train, task):
    """The most frequent class of each finding in the training labels, as a reading."""
    counts = {finding: Counter(study.labels[finding] for study in train if finding in study.labels) for finding in task.findings}
    return {finding: count.most_common(1)[0][0] for finding, count in counts.items() if count}


def styles(texts, studies, words=3):
    """Whose voice the texts speak in: how many begin with the first `words` words of one teacher's trajectories (by plurality if
    several teachers begin so), and how many ('other') as none does. {teacher or 'other': count}."""
    opening = lambda text: tuple(text.lower().split()[:words])
    owners = {}
    for study in studies:
        for name, text in study.trajectories.items():
            owners.setdefault(opening(text), Counter())[name] += 1
    return dict(Counter(owners[opening(text)].most_common(1)[0][0] if opening(text) in owners else "other" for text in texts))


def classify(path, studies, task, args, name):
    """Greedy and sampled scores of one student's folder."""
    encoder = data.Encoder(path, task, args.images, args.max_pixels)
    model = student.load(path, torch.bfloat16 if args.bf16 else torch.float32, training.init())
    result = {}
    for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        texts = answers(model, encoder, studies, task, temperature, args.seed, args.batch_size, args.max_new_tokens, args.prompt,
                        args.num_workers, desc=f"{name}, {mode}")
        result[mode] = score([data.read_classes(text, task) for text in texts], studies, task)
        result[mode]["styles"] = styles(texts, studies)
        result[mode]["example"] = texts[0]
    return result


def baselines(studies, train, task):
    """Label prior, each teacher and the vote, on the same studies. {row: score}."""
    name = "label prior" if train else "label prior of these very labels"
    rows = {name: score([prior(train or studies, task)] * len(studies), studies, task)}
    for name in data.teacher_names(studies):
        rows[name] = score([data.read_classes(study.trajectories.get(name, ""), task) for study in studies], studies, task)
    if len(rows) > 1:
        rows["vote of the teachers"] = score([data.vote(study.trajectories, task) for study in studies], studies, task)
    return rows


def table(rows, findings, paper=None):
    """rows: {name: score, or {"greedy": score, "sampled": score}} -> text, one line a row; paper: {name: figures} printed below."""
    columns = [f for f in findings if any(f in s["accuracy"] for s in map(_greedy, rows.values()))]
    head = f"{'':34}" + "".join(f"{SHORT.get(f, f[:6]):>7}" for f in columns) + f"{'mean':>7}{'sampled':>9}{'unread':>8}"
    lines = [head]
    for name, row in rows.items():
        s = _greedy(row)
        sampled = f"{row['sampled']['mean']:>9.3f}" if "sampled" in row else f"{'':9}"
        lines.append(f"{name:34}" + "".join(f"{s['accuracy'].get(f, float('nan')):>7.3f}" for f in columns)
                     + f"{s['mean']:>7.3f}{sampled}{s['unread']:>8.3f}")
    for name, figures in (paper or {}).items():
        of = dict(zip(TABLE_5_FINDINGS, figures))
        lines.append(f"{'paper: ' + name:34}" + "".join(f"{of[f]:>7.2f}" if f in of else f"{'':7}" for f in columns) + f"{figures[-1]:>7.2f}")
    return "\n".join(lines)


def _greedy(row):
    return row.get("greedy", row)


def parse(argv=None):
    parser = argparse.ArgumentParser(description="What the paper measures.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("classify", help="top-1 accuracy per finding on any studies.jsonl with labels",
                            description="Top-1 accuracy per finding: greedy and sampled, beside label prior, teachers and vote.")
    p.add_argument("--studies", required=True, help="studies.jsonl with labels")
    p.add_argument("--images", default=".", help="folder that the image paths are relative to (default: %(default)s)")
    p.add_argument("--task_file", help="task.json; without it MIMIC-CXR's 14 findings")
    p.add_argument("--split", default="test", help="which studies (default: %(default)s)")
    p.add_argument("--student", action="append", required=True, help="NAME=FOLDER or FOLDER (or a hub id); may be given several times")
    p.add_argument("--prompt", choices=("student", "teacher"), default="student", help="teacher: Appendix B's, which names the diagnosis")
    p.add_argument("--max_pixels", type=int, default=1024 * 28 * 28, help="pixels per image, 784 make a token (default: %(default)s)")
    p.add_argument("--max_new_tokens", type=int, default=1024, help="tokens of an answer (default: %(default)s)")
    p.add_argument("--batch_size", type=int, default=32, help="studies per forward (default: %(default)s)")
    p.add_argument("--num_workers", type=int, default=0, help="processes per rank that load images (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the sampled answers (default: %(default)s)")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="weights in bf16")
    p.add_argument("--output", help="results.json to write")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    p = commands.add_parser("teachers", help="how far the teachers drift apart: Fig. 1a, Table 2, agreement, dependence of their errors",
                            description="The teachers' texts against labels or reports, and against each other.")
    teachers.add_arguments(p)
    return parser.parse_args(argv)


def named_students(given):
    """--student values -> {name: folder or hub id}. Raises ValueError if two have the same name."""
    folders = {}
    for value in given:
        name, equals, path = value.partition("=")
        name, path = (value, value) if Path(value).exists() or not equals else (name, path)
        if name in folders:
            raise ValueError(f"--student {value}: a second student named {name!r}, expected NAME=FOLDER with names that differ")
        folders[name] = path
    return folders


def run(args):
    """-> {row: score}; prints the table."""
    task = data.load_task(args.task_file)
    folders = named_students(args.student)
    inputs = (args.studies, *([args.task_file] if args.task_file else []), *folders.values())
    settings = {**vars(args), "sha256": [checkpoint.fingerprint(path) for path in inputs]}
    if args.output and Path(args.output).exists():
        before = json.loads(Path(args.output).read_text())
        if before["settings"] == settings:
            training.say(f"{args.output} holds these results already\n" + before["table"])
            if args.json:
                training.say(json.dumps({"rows": before["rows"]}))
            return before["rows"]
    studies = [s for s in data.read_studies(args.studies, task, args.split) if s.labels]
    if not studies:
        raise ValueError(f"{args.studies}: no study of split {args.split!r} has labels, expected some to score against")
    train = [s for s in data.read_studies(args.studies, task) if s.split == "train"]
    rows = baselines(studies, train, task)
    if twice := sorted(set(rows) & set(folders)):
        raise ValueError(f"--student {twice[0]}: names another row of the table, expected a name of its own")
    for name, path in folders.items():
        rows[name] = classify(path, studies, task, args, name)
    first = [finding for finding in TABLE_5_FINDINGS if finding in task.findings]
    text = table(rows, [*first, *(f for f in task.findings if f not in first)], TABLE_5 if first else None)
    for name in folders:
        text += f"\n{name}: voices, greedy {rows[name]['greedy']['styles']}, sampled {rows[name]['sampled']['styles']}"
    training.say(text)
    if args.output:
        results = {"settings": settings, "rows": rows, "table": text}
        training.on_rank_zero(lambda: checkpoint.write_text(Path(args.output), json.dumps(results, indent=1) + "\n"))
    if args.json:
        training.say(json.dumps({"rows": rows}))
    return rows


def main():
    args = parse()
    training.init()
    try:
        teachers.run(args, SHORT) if args.command == "teachers" else run(args)
    finally:
        training.close()


if __name__ == "__main__":
    main()
