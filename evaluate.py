"""Evaluation: what the paper measures, on students and on their teachers. Nothing trains here.

    python evaluate.py classify --student runs/apo/student --studies studies.jsonl --images files
        your own labels, beside Table 5
    python evaluate.py classify --student S --task progression --ms_cxr_t MS_CXR_T_...csv \\
           --images mimic-cxr-jpg                                                     Tables 1, 5
    python evaluate.py reports --student S --annotation annotation.json \\
           --images mimic-cxr-jpg/files                                               Tables 3, 7
    python evaluate.py zeroshot --student S --open_i DIR --chestx_ray14 DIR --chexpert DIR \\
           --chestx_det10 DIR                                                             Table 4
    python evaluate.py teachers --studies studies.jsonl
        how far the teachers drift apart: Fig. 1a, Table 2
    python evaluate.py ablation runs/ladder/results.json
        what python -m experiment ladder measured on the scale model, beside Table 5
    python evaluate.py tables results.json ...          every table of the paper with ours beside it
    torchrun --nproc_per_node=4 evaluate.py ...              shared over the ranks, the same numbers

`classify` is in this file, the other commands are in evaluation/. It asks a student in one of two
ways. --mode options: a closed question per finding, top-1 is the option of the highest
log-probability (evaluation/questions.py). --mode parse: the student answers in its own words,
greedily and by sampling at temperature 1, and is read back by data.read_classes; what cannot be
read is wrong, and the unread rate says how often that was; a row of which nothing at all was read
has no accuracy.

With --output each study is on disk when it is answered, and the same command continues where it
stopped.
"""

import argparse
import json
from collections import Counter
from statistics import fmean

import data
import sampling
import student
from evaluation import (
    ablation,
    datasets,
    questions,
    reports,
    results,
    students,
    tables,
    teachers,
    zeroshot,
)
from evaluation.tables import FIVE, TABLE_1, TABLE_5
from metrics import scores
from runtime import flags, ranks

# ------------------------------------------------------------------------------------- the scores

def read_teachers(studies, task):
    """What the teachers' texts say; reading them takes a while, so it is done once.

    studies  list of data.Study
    task     data.Task
    Returns {study id: {teacher: {finding: class}}}.
    """
    names = data.teacher_names(studies)
    read = teachers.readings(studies, names, task)
    return {study.id: {name: read[name][at] for name in study.trajectories}
            for at, study in enumerate(studies)}


def votes_of(said, task):
    """The plurality of the teachers about each study.

    said  what `read_teachers` returns
    task  data.Task
    Returns {study id: {finding: class}}.
    """
    return {key: data.plurality(by_teacher.values(), task) for key, by_teacher in said.items()}


def score(readings, studies, task, votes):
    """Top-1 accuracy of what was read.

    readings  {finding: class} of each study; a finding that is missing could not be read
    studies   as many data.Study
    task      data.Task
    votes     what `votes_of` returns of these studies
    Returns {"accuracy": {finding: share that is right of the studies that have its label},
    "mean": unweighted over the findings, "n": {finding: how many labels}, "unread": share of the
    labels whose finding was not read, "agreement_with_vote": share of the teachers' pluralities
    that were answered too}; None where there is nothing to count.
    """
    accuracy, n, unread = {}, {}, 0
    for finding in task.findings:
        labelled = [(reading, study.labels[finding]) for reading, study in zip(readings, studies)
                    if finding in study.labels]
        if labelled:
            right = sum(reading.get(finding) == truth for reading, truth in labelled)
            accuracy[finding], n[finding] = right / len(labelled), len(labelled)
            unread += sum(finding not in reading for reading, _ in labelled)
    agreed, voted = 0, 0
    for reading, study in zip(readings, studies):
        vote = votes[study.id]
        voted += len(vote)
        agreed += sum(reading.get(finding) == value for finding, value in vote.items())
    return {"accuracy": accuracy,
            "mean": sum(accuracy.values()) / len(accuracy) if accuracy else None,
            "n": n,
            "unread": unread / sum(n.values()) if n else None,
            "agreement_with_vote": agreed / voted if voted else None}


def if_read(scored):
    """What `score` returned, without accuracies where nothing at all was read: that is not 0.000.

    scored  of a student, a teacher or the vote
    """
    return {**scored, "accuracy": {}, "mean": None} if scored["unread"] == 1 else scored


def label_counts(studies, task):
    """{finding: Counter of its classes} of the findings that have labels."""
    counts = {}
    for finding in task.findings:
        labels = [study.labels[finding] for study in studies if finding in study.labels]
        if labels:
            counts[finding] = Counter(labels)
    return counts


def prior(train, task):
    """The most frequent class of each finding in the labels of `train`, as a reading."""
    return {finding: count.most_common(1)[0][0]
            for finding, count in label_counts(train, task).items()}


def prevalence(studies, task):
    """{finding: {"n": how many labels, class as text: share of them}}."""
    shares = {}
    for finding, count in label_counts(studies, task).items():
        n = count.total()
        shares[finding] = {"n": n, **{str(value): count[value] / n for value in task.classes}}
    return shares


def styles(texts, studies, words=3):
    """Whose voice texts speak in, by how they begin.

    texts    list of texts
    studies  list of data.Study, with the teachers' trajectories
    words    how many of a trajectory's first words make a voice
    Returns {teacher: how many texts begin as its trajectories do}, 'other' for texts that begin as
    no teacher's; of several teachers it is the one that begins so most often.
    """
    opening = lambda text: tuple(text.lower().split()[:words])
    owners = {}
    for study in studies:
        for name, text in study.trajectories.items():
            owners.setdefault(opening(text), Counter())[name] += 1
    voices = {begins: teachers.most_common(1)[0][0] for begins, teachers in owners.items()}
    return dict(Counter(voices.get(opening(text), "other") for text in texts))


def mean_metric(answered, findings, metric):
    """The mean over findings of a metric.

    answered  [(study, reading)]
    findings  their names; one without a label in `answered` is left out
    metric    (labels, predictions) -> number
    Returns the mean; None where no finding has a label.
    """
    values = []
    for finding in findings:
        labelled = [(study.labels[finding], reading.get(finding)) for study, reading in answered
                    if finding in study.labels]
        if labelled:
            labels, predictions = zip(*labelled)
            values.append(metric(labels, predictions))
    return fmean(values) if values else None


def intervals(readings, studies, findings, metric, samples, seed):
    """A metric of the answers, with 95% bootstrap intervals; for a mean whole studies are drawn.

    readings  {finding: class} of each study
    studies   as many data.Study
    findings  those that have labels
    metric    scores.accuracy or scores.macro_accuracy
    samples   bootstrap samples
    seed      of the bootstrap
    Returns {"value": {key: figure}, "interval": {key: (low, high)}}; the keys are the findings,
    "mean" over them, and "mean 5" over the paper's five if there are more.
    """
    groups = {finding: (finding,) for finding in findings}
    if set(FIVE) < set(findings):
        groups["mean 5"] = FIVE
    groups["mean"] = tuple(findings)
    value, interval = {}, {}
    for key, names in groups.items():
        answered = [(study, reading) for study, reading in zip(studies, readings)
                    if any(name in study.labels for name in names)]
        statistic = lambda drawn, names=names: mean_metric(drawn, names, metric)
        value[key] = statistic(answered)
        interval[key] = scores.bootstrap_interval(statistic, answered, samples=samples, seed=seed)
    return {"value": value, "interval": interval}


def baselines(studies, train, task, said):
    """What a student is compared with, on the same studies.

    studies  list of data.Study
    train    studies whose labels are the prior; none: those of `studies`
    task     data.Task
    said     what `read_teachers` returns of these studies
    Returns {row: score} of the label prior, each teacher and the vote.
    """
    votes = votes_of(said, task)
    guesses = [prior(train or studies, task)] * len(studies)
    rows = {"label prior" if train else "majority class": score(guesses, studies, task, votes)}
    for name in data.teacher_names(studies):
        readings = [said[study.id].get(name, {}) for study in studies]
        rows[name] = if_read(score(readings, studies, task, votes))
    if len(rows) > 1:
        readings = [votes[study.id] for study in studies]
        rows["vote of the teachers"] = if_read(score(readings, studies, task, votes))
    return rows


# -------------------------------------------------------------------------------------- classify

def labelled_studies(args):
    """The studies to be classified: MS-CXR-T for --task, or those of --studies that have labels.

    Returns (datasets.Benchmark, the training studies of --studies, whose labels are the prior).
    Raises ValueError as the readers do, and where no study has labels.
    """
    if args.task:
        files = args.ms_cxr_t, args.images
        return datasets.ms_cxr_t(*files, args.task, args.chexpert_csv, args.blank), []
    task = data.load_task(args.task_file)
    studies = [s for s in data.read_studies(args.studies, task, args.split) if s.labels]
    if not studies:
        raise ValueError(f"{args.studies}: no study of split {args.split!r} has labels, "
                         "expected some to score against")
    train = [s for s in data.read_studies(args.studies, task) if s.split == "train"]
    return datasets.Benchmark(args.studies, task, args.images, studies), train


def choose(model, processor, studies, args, desc, parts, failed):
    """--mode options: the most probable option of each closed question, {study id: reading}."""
    labelled = {finding for study in studies for finding in study.labels}
    asked = {finding: question
             for finding, question in questions.closed_questions(processor.task).items()
             if finding in labelled}
    logps = questions.ask(model, processor, studies, asked, parts, args.num_workers, failed, desc)
    return {key: questions.most_probable(answers, asked) for key, answers in logps.items()}


def write(model, processor, studies, args, temperature, desc, parts, failed):
    """--mode parse: the student's own words about each study, {study id: text}."""
    texts = sampling.answers(
        model, processor, studies, processor.task, temperature, seed=args.seed,
        batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, prompt=args.prompt,
        num_workers=args.num_workers, desc=desc, parts=parts, failed=failed)
    return {study.id: text for study, text in zip(studies, texts) if text is not None}


def classify(path, bench, args, name, votes, parts=None, failed=None):
    """Asks one student about all studies and scores its answers.

    path    folder or hub id of the student
    bench   datasets.Benchmark; studies whose images turn out to be unreadable leave it
    args    flags
    name    of the student
    votes   what `votes_of` returns of these studies
    parts   folder of what was answered already; None: nothing is kept
    failed  dict that takes {study id: why} of the unreadable ones
    Returns {"options": score} or {"greedy": score, "sampled": score}, each with "top1" and "macro"
    as `intervals` gives them. Raises ValueError where no image can be read.
    """
    processor = student.Processor(path, bench.task, bench.images, args.max_pixels)
    model = student.load(path, args.bf16, ranks.init())
    answers, more = {}, {}
    if args.mode == "options":
        answers["options"] = choose(model, processor, bench.studies, args, name,
                                    parts and parts / "options", failed)
        bench.studies = [study for study in bench.studies if study.id in answers["options"]]
    else:
        for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            texts = write(model, processor, bench.studies, args, temperature, f"{name}, {mode}",
                          parts and parts / mode, failed)
            bench.studies = [study for study in bench.studies if study.id in texts]
            answers[mode] = {key: data.read_classes(text, bench.task)
                             for key, text in texts.items()}
            more[mode] = {"styles": styles(texts.values(), bench.studies),
                          "example": next(iter(texts.values()), None)}
    if not bench.studies:
        raise ValueError(f"no image could be read, the first: {next(iter(failed.values()))}")
    row = {}
    for mode, reading_of in answers.items():
        readings = [reading_of[study.id] for study in bench.studies]
        scored = if_read(score(readings, bench.studies, bench.task, votes))
        row[mode] = {**scored, **more.get(mode, {})}
        if args.bootstrap and scored["accuracy"]:
            findings = list(row[mode]["accuracy"])
            for key, metric in (("top1", scores.accuracy), ("macro", scores.macro_accuracy)):
                row[mode][key] = intervals(readings, bench.studies, findings, metric,
                                           args.bootstrap, args.seed)
    return row


def run_classify(args):
    """Tables 1 and 5, or labels of your own: scores the students and what they are compared with.

    args  flags
    Returns {row: score, or what `classify` returns}. Raises ValueError where no study has both
    labels and a readable image, and for a student that has the name of another row.
    """
    folders = students.named(args.student)
    bench, train = labelled_studies(args)
    datasets.with_images(bench)
    inputs = (args.studies, args.task_file, *folders.values())
    before, settings, parts = results.begin(args, inputs, [bench])
    if before:
        return results.end(args, before, known=True)
    if args.mode == "options":
        questions.keep_offered_labels(bench)
    if not bench.studies:
        why = [f"{bench.name}: no study has both labels and images", *bench.missing[:3]]
        raise ValueError("; ".join(why))
    others = {"label prior", "majority class", "vote of the teachers", "always no",
              *data.teacher_names(bench.studies)}
    if twice := others & set(folders):
        raise ValueError(f"--student {min(twice)}: names another row of the table, "
                         "expected a name of its own")

    said = read_teachers(bench.studies, bench.task)
    votes = votes_of(said, bench.task)
    failed, ours = {}, {}
    for at, (name, path) in enumerate(folders.items()):
        ours[name] = classify(path, bench, args, name, votes, parts and parts / str(at), failed)
    bench.missing += [f"{key}: {why}" for key, why in failed.items()]
    rows = baselines(bench.studies, train, bench.task, said)
    if args.task == "presence":
        no = dict.fromkeys(bench.task.findings, 0)
        rows["always no"] = score([no] * len(bench.studies), bench.studies, bench.task,
                                   votes)
    rows |= ours

    paper = TABLE_5 if args.studies else TABLE_1
    if set(folders) & set(TABLE_5):
        paper = paper | TABLE_5
    shares = prevalence(bench.studies, bench.task)
    lines = [tables.accuracy_table(rows, bench.task.findings, paper),
             *tables.prevalence_lines(shares)]
    for name in folders:
        lines += tables.student_lines(name, rows[name])
    return results.end(args, {"settings": settings, "rows": rows, "prevalence": shares,
                              "missing": bench.missing, "table": "\n".join([*lines, *bench.notes])})


# -------------------------------------------------------------------------------- the command line

def run_tables(args):
    """Every table of the paper with what results files hold beside it."""
    ours = tables.collect(args.results)
    ranks.print_once("\n\n".join(tables.beside(number, rows) for number, rows in ours.items()))
    if args.json:
        ranks.print_once(json.dumps({"tables": ours}))
    return ours


def add_classify_arguments(parser):
    """Adds the flags of classify."""
    parser.add_argument("--studies", help="studies.jsonl with labels")
    parser.add_argument("--task_file",
                        help="task.json of --studies; without it MIMIC-CXR's 14 findings")
    parser.add_argument("--task", choices=("progression", "presence"),
                        help="MS-CXR-T, which has no splits: the course over two films, or "
                        "presence")
    parser.add_argument("--ms_cxr_t", help="MS_CXR_T_temporal_image_classification_v1.0.0.csv")
    parser.add_argument("--chexpert_csv",
                        help="mimic-cxr-2.0.0-chexpert.csv.gz, the labels of presence")
    parser.add_argument("--blank", choices=("exclude", "negative"), default="exclude",
                        help="findings not mentioned, for presence (default: %(default)s)")
    parser.add_argument("--images", default=".",
                        help="folder that the image paths are relative to; of MIMIC-CXR-JPG for "
                        "--task (default: %(default)s)")
    parser.add_argument("--mode", choices=("options", "parse"), default="options",
                        help="options: the most probable option of a closed question; parse: "
                        "generated text, read back (default: %(default)s)")
    parser.add_argument("--prompt", choices=("student", "teacher"), default="student",
                        help="teacher: Appendix B's, which names the diagnosis")
    parser.add_argument("--bootstrap", type=flags.at_least_zero, default=1000,
                        help="resamples for the 95%% intervals, 0: none (default: %(default)s)")
    students.add_arguments(parser)
    students.add_answer_arguments(parser)


def parse(argv=None):
    """The flags of a command. Exits with status 2 for flags that do not go together."""
    parser = argparse.ArgumentParser(description="What the paper measures.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "classify", help="top-1 accuracy per finding: MS-CXR-T, or any studies.jsonl with labels",
        description="Top-1 accuracy per finding, beside the label prior, teachers and vote. One of "
                    "--studies and --task.")
    add_classify_arguments(p)
    p = commands.add_parser(
        "reports", help="report generation on MIMIC-CXR: BLEU, ROUGE-L, METEOR, CIDEr, findings",
        description="Reports written greedily, against the references' findings sections.")
    reports.add_arguments(p)
    p = commands.add_parser(
        "zeroshot", help="AUC per class on Open-I, ChestX-ray14, CheXpert, ChestX-Det10",
        description="Yes/no log-odds, all questions of an image in one forward. A dataset that is "
                    "not named is not run.")
    zeroshot.add_arguments(p)
    p = commands.add_parser("tables", help="all tables of the paper beside ours",
                            description=run_tables.__doc__)
    p.add_argument("results", nargs="*", help="--output files of classify, reports and zeroshot, "
                   "results.json of python -m experiment ladder")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    p = commands.add_parser(
        "teachers", help="how far the teachers drift apart: Fig. 1a, Table 2",
        description="The teachers' texts against labels or reports, and against each other.")
    teachers.add_arguments(p)
    p = commands.add_parser(
        "ablation", help="the scale model's ladder beside Table 5",
        description="The scale model's ladder, with its claims, beside the paper's Table 5.")
    ablation.add_arguments(p)
    args = parser.parse_args(argv)
    flags.refuse_empty(args, parser)
    if args.command == "classify":
        refuse_combinations(args, parser)
    if args.command in ("classify", "reports") and args.split is None:
        args.split = "test"
    return args


def refuse_combinations(args, parser):
    """Ends classify with status 2 where its flags do not go together."""
    if bool(args.studies) == bool(args.task):
        parser.error("classify: expected one of --studies and --task")
    if not args.task:
        return
    presence = args.task == "presence"
    if not args.ms_cxr_t or presence and not args.chexpert_csv:
        needed = "--ms_cxr_t and --chexpert_csv" if presence else "--ms_cxr_t"
        parser.error(f"--task {args.task}: expected {needed}")
    if args.prompt == "teacher":
        parser.error("--prompt teacher names the labels, expected only with --studies")
    if args.split is not None or args.task_file:
        parser.error(f"--task {args.task}: MS-CXR-T has no splits and its own findings, expected "
                     "--split and --task_file only with --studies")


def run(args):
    """Runs a command and prints its table.

    args  what `parse` returns
    Returns {row: figures}. Raises ValueError for bad input.
    """
    commands = {"classify": run_classify, "reports": reports.run, "zeroshot": zeroshot.run,
                "teachers": teachers.run, "tables": run_tables, "ablation": ablation.run}
    return commands[args.command](args)


def main():
    args = parse()
    with ranks.process_group("evaluate"):
        run(args)


if __name__ == "__main__":
    main()
