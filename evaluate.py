"""Leave here: what the paper measures, on a student and on its teachers. Nothing trains.

    python evaluate.py classify --student runs/apo/student --studies studies.jsonl --images files     labels of your own, beside Table 5
    python evaluate.py classify --student ... --task progression --ms_cxr_t MS_CXR_T_...csv --images mimic-cxr-jpg      (Tables 1, 5)
    python evaluate.py reports  --student ... --annotation annotation.json --images mimic-cxr-jpg/files                (Tables 3, 7)
    python evaluate.py zeroshot --student ... --open_i DIR --chestx_ray14 DIR --chexpert DIR --chestx_det10 DIR            (Table 4)
    python evaluate.py teachers --studies studies.jsonl                        how far they drift apart, teachers.py (Fig. 1a, Table 2)
    python evaluate.py ablation runs/ladder/results.json                        the scale model's ladder, from python -m experiment ladder (Table 5)
    python evaluate.py tables results.json ...                                          every table of the paper with ours beside it
    torchrun --nproc_per_node=4 evaluate.py ...                                             shared over the ranks, the same numbers

Two ways to ask. --mode options: a closed question per finding, top-1 is the option of the highest log-probability, AUC ranks by log P(yes) -
log P(no) (questions.py). --mode parse: the student answers in its own words, greedily and by sampling at temperature 1, and is read back
by data.read_classes; what cannot be read is wrong, and the unread rate says how often that was.

With --output each study is on disk when it is answered, and the same command goes on where it stopped.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import fmean

import torch

import data
import student
from evaluation import datasets, questions, results, tables, teachers
from evaluation.tables import FIVE, TABLE_1, TABLE_5, TEXT_METRICS, ZERO_SHOT
from metrics import scores
from metrics.findings import finding_scores
from metrics.meteor import Meteor
from metrics.text import bleu, cider, clean_r2gen, rouge_l
from runtime import flags, ranks


def answers(model, encoder, studies, task, temperature, seed=0, batch_size=50, max_new_tokens=1024, prompt="student", num_workers=0,
            desc="answers", parts=None, failed=None):
    """The student's text for each study, in their order: greedy at temperature 0, else one sample per study by its own seed. Every rank
    returns all texts; None for a study that is in `failed` (see results.spread)."""
    by_id = {study.id: study for study in studies}

    def encode(key):
        return encoder(by_id[key], data.student_prompt(by_id[key], task, prompt))

    def work(keys, examples):
        out = student.sample(model, encoder, examples, [f"{seed} {key} answer" for key in keys], temperature, 1.0, max_new_tokens)
        return [encoder.text(ids) for ids, _ in out]

    texts = results.spread(list(by_id), encode, work, batch_size, parts, num_workers, failed, desc)
    return [texts.get(study.id) for study in studies]


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


def label_counts(studies, task):
    """{finding: Counter of its classes} of the findings that have labels."""
    counts = {finding: Counter(study.labels[finding] for study in studies if finding in study.labels) for finding in task.findings}
    return {finding: count for finding, count in counts.items() if count}


def prior(train, task):
    """The most frequent class of each finding in the training labels, as a reading."""
    return {finding: count.most_common(1)[0][0] for finding, count in label_counts(train, task).items()}


def styles(texts, studies, words=3):
    """Whose voice the texts speak in: how many begin with the first `words` words of one teacher's trajectories (by plurality if
    several teachers begin so), and how many ('other') as none does. {teacher or 'other': count}."""
    opening = lambda text: tuple(text.lower().split()[:words])
    owners = {}
    for study in studies:
        for name, text in study.trajectories.items():
            owners.setdefault(opening(text), Counter())[name] += 1
    return dict(Counter(owners[opening(text)].most_common(1)[0][0] if opening(text) in owners else "other" for text in texts))


def intervals(readings, studies, findings, metric, samples, seed):
    """`metric` (scores.accuracy or scores.macro_accuracy) per finding, "mean" over findings, "mean 5" over the paper's five if there are more,
    and 95% bootstrap intervals; for a mean whole studies are drawn. -> {"value": {key: figure}, "interval": {key: (low, high)}}."""
    def mean_over(names):
        def statistic(drawn):
            values = []
            for name in names:
                pairs = [(studies[i].labels[name], readings[i].get(name)) for i in drawn if name in studies[i].labels]
                if pairs:
                    values.append(metric(*zip(*pairs)))
            return fmean(values) if values else None
        return statistic

    groups = {name: (name,) for name in findings} | ({"mean 5": FIVE} if set(FIVE) < set(findings) else {}) | {"mean": tuple(findings)}
    labelled = {name: [i for i, study in enumerate(studies) if any(f in study.labels for f in names)] for name, names in groups.items()}
    return {"value": {name: mean_over(names)(labelled[name]) for name, names in groups.items()},
            "interval": {name: scores.bootstrap_interval(mean_over(names), labelled[name], samples=samples, seed=seed)
                         for name, names in groups.items()}}


def classify(path, studies, task, args, name, parts=None, failed=None):
    """One student's scores, {"options": ...} or {"greedy": ..., "sampled": ...}. Studies that turn out to be unreadable leave the list."""
    encoder = data.Encoder(path, task, args.images, args.max_pixels)
    model = student.load(path, torch.bfloat16 if args.bf16 else torch.float32, ranks.init())
    labelled = {finding for study in studies for finding in study.labels}
    folder = lambda mode: parts and parts / mode
    readings, result = {}, {}
    if args.mode == "options":
        asked = {finding: question for finding, question in questions.closed_questions(task).items() if finding in labelled}
        out = questions.ask(model, encoder, studies, asked, folder("options"), args.num_workers, failed, name)
        studies[:] = [study for study in studies if study.id in out]
        best = lambda options: max(options, key=options.get)
        readings["options"] = [{finding: asked[finding][1][best(options)] for finding, options in out[study.id].items()} for study in studies]
    else:
        for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            texts = answers(model, encoder, studies, task, temperature, args.seed, args.batch_size, args.max_new_tokens, args.prompt,
                            args.num_workers, f"{name}, {mode}", folder(mode), failed)
            studies[:] = [study for study, answer in zip(studies, texts) if answer is not None]
            texts = [answer for answer in texts if answer is not None]
            readings[mode] = [data.read_classes(answer, task) for answer in texts]
            result[mode] = {"styles": styles(texts, studies), "example": texts[0] if texts else None}
    if not studies:
        raise ValueError(f"no image could be read, the first: {next(iter(failed.values()))}")
    for mode, read in readings.items():
        result[mode] = {**score(read, studies, task), **result.get(mode, {})}
        if args.bootstrap:
            for key, metric in (("top1", scores.accuracy), ("macro", scores.macro_accuracy)):
                result[mode][key] = intervals(read, studies, list(result[mode]["accuracy"]), metric, args.bootstrap, args.seed)
    return result


def baselines(studies, train, task):
    """Label prior, each teacher and the vote, on the same studies. {row: score}."""
    name = "label prior" if train else "majority class"
    rows = {name: score([prior(train or studies, task)] * len(studies), studies, task)}
    for name in data.teacher_names(studies):
        rows[name] = score([data.read_classes(study.trajectories.get(name, ""), task) for study in studies], studies, task)
    if len(rows) > 1:
        rows["vote of the teachers"] = score([data.vote(study.trajectories, task) for study in studies], studies, task)
    return rows


def named_students(given):
    """--student values -> {name: folder or hub id}. Raises ValueError if two have the same name, or one is no Qwen2.5-VL."""
    folders = {}
    for value in given:
        name, equals, path = value.partition("=")
        name, path = (value, value) if Path(value).exists() or not equals else (name, path)
        if name in folders:
            raise ValueError(f"--student {value}: a second student named {name!r}, expected NAME=FOLDER with names that differ")
        student.require_family(path)
        folders[name] = path
    return folders


def run_classify(args):
    folders, train = named_students(args.student), []
    if args.task:
        bench = datasets.ms_cxr_t(args.ms_cxr_t, args.images, args.task, args.chexpert_csv, args.blank)
    else:
        task = data.load_task(args.task_file)
        studies = [s for s in data.read_studies(args.studies, task, args.split) if s.labels]
        if not studies:
            raise ValueError(f"{args.studies}: no study of split {args.split!r} has labels, expected some to score against")
        train = [s for s in data.read_studies(args.studies, task) if s.split == "train"]
        bench = datasets.Benchmark(args.studies, task, args.images, studies)
    studies, task, missing = datasets.with_images(bench).studies, bench.task, bench.missing
    before, settings, parts = results.begin(args, (args.studies, args.task_file, *folders.values()), [bench])
    if before:
        return results.end(args, before, known=True)
    if args.mode == "options":  # every row is scored on the classes that a question offers
        offered = set(next(iter(questions.closed_questions(task).values()))[1].values())
        outside = sum(value not in offered for study in studies for value in study.labels.values())
        for study in studies:
            study.labels = {finding: value for finding, value in study.labels.items() if value in offered}
        if outside:
            bench.notes.append(f"{outside} labels left out that are none of {', '.join(map(str, sorted(offered)))}")
        studies = [study for study in studies if study.labels]
    if not studies:
        raise ValueError("; ".join([f"{bench.name}: no study has both labels and images", *missing[:3]]))
    if twice := {"label prior", "majority class", "vote of the teachers", "always no", *data.teacher_names(studies)} & set(folders):
        raise ValueError(f"--student {min(twice)}: names another row of the table, expected a name of its own")
    failed, ours = {}, {}
    for at, (name, path) in enumerate(folders.items()):
        ours[name] = classify(path, studies, task, args, name, parts and parts / str(at), failed)
    missing += [f"{key}: {why}" for key, why in failed.items()]
    rows = baselines(studies, train, task)
    if args.task == "presence":
        rows["always no"] = score([dict.fromkeys(task.findings, 0)] * len(studies), studies, task)
    rows |= ours
    paper = TABLE_5 if args.studies else TABLE_1 | (TABLE_5 if set(folders) & set(TABLE_5) else {})
    share = {finding: {"n": count.total(), **{str(value): count[value] / count.total() for value in task.classes}}
             for finding, count in label_counts(studies, task).items()}
    lines = [tables.table(rows, task.findings, paper), *tables.prevalence_lines(share)]
    for name in folders:
        lines += tables.student_lines(name, rows[name])
    text = "\n".join([*lines, *bench.notes])
    return results.end(args, {"settings": settings, "rows": rows, "prevalence": share, "missing": missing, "table": text})


def run_reports(args):
    folders = named_students(args.student)
    if args.annotation:
        bench = datasets.annotation(args.annotation, args.images, args.split)
    elif args.reports:
        bench = datasets.mimic_reports(args.reports, args.images, args.split, args.section)
    else:
        studies = [study for study in data.read_studies(args.studies, data.CHEST, args.split) if study.report]
        bench = datasets.Benchmark(args.studies, data.CHEST, args.images, studies)
    studies, missing = datasets.with_images(bench).studies, bench.missing
    if not studies:
        raise ValueError("; ".join([f"{bench.name}: no study has both a report and its image", *missing[:3]]))
    before, settings, parts = results.begin(args, folders.values(), [bench])
    if before:
        return results.end(args, before, known=True)
    failed, written, meteor = {}, {}, None
    try:
        meteor = Meteor(args.meteor)
    except FileNotFoundError as error:
        missing.append(str(error))
    for at, (name, path) in enumerate(folders.items()):
        encoder = data.Encoder(path, data.CHEST, args.images, args.max_pixels)
        model = student.load(path, torch.bfloat16 if args.bf16 else torch.float32, ranks.init())
        texts = answers(model, encoder, studies, data.CHEST, 0.0, args.seed, args.batch_size, args.max_new_tokens, args.prompt, args.num_workers,
                        name, parts and parts / str(at), failed)
        written[name] = dict(zip((study.id for study in studies), texts))
    missing += [f"{key}: {why}" for key, why in failed.items()]
    studies = [study for study in studies if study.id not in failed]
    if not studies:
        raise ValueError(f"no image could be read, the first: {next(iter(failed.values()))}")
    rows = {name: score_reports([texts[study.id] for study in studies], [study.report for study in studies], args.clean, meteor, args.uncertain)
            for name, texts in written.items()}
    how = (f"{len(studies)} reports; cleaning: {args.clean}, no cut at 99 words, no <unk>; findings: of the texts as written, "
           f"uncertain counts as {args.uncertain}")
    lines = tables.report_lines(rows, how)
    return results.end(args, {"settings": settings, "rows": rows, "missing": missing, "table": "\n".join([*lines, *bench.notes])})


def score_reports(texts, references, clean, meteor, uncertain):
    """Text metrics of reports, cleaned as `clean` says, and precision, recall and F1 of the positive findings in them as written."""
    cleaned = clean_r2gen if clean == "r2gen" else str
    hypotheses, others = ({str(i): [cleaned(t)] for i, t in enumerate(some)} for some in (texts, references))
    row = dict(zip(TEXT_METRICS, (*bleu(hypotheses, others).corpus, rouge_l(hypotheses, others).corpus)))
    row["METEOR"] = meteor.score(hypotheses, others).corpus if meteor else None
    row["CIDEr"] = cider(hypotheses, others).corpus
    row["findings"] = finding_scores(*([data.read_classes(t, data.CHEST) for t in some] for some in (texts, references)), uncertain)
    words = lambda some: fmean(len(t.split()) for t in some)
    return row | {"n": len(texts), "words": words(texts), "reference_words": words(references), "example": texts[0]}


def run_zeroshot(args):
    folders, benches, missing = named_students(args.student), [], []
    for folder, read in ((args.open_i, datasets.open_i), (args.chestx_ray14, datasets.chestx_ray14),
                         (args.chexpert, lambda folder: datasets.chexpert(folder, args.chexpert_labels)),
                         (args.chestx_det10, datasets.chestx_det10)):
        if folder:
            try:
                benches.append(datasets.with_images(read(folder)))
            except FileNotFoundError as error:
                missing.append(str(error))
    if not any(bench.studies for bench in benches):
        missing += [f"{bench.name}: {what}" for bench in benches for what in bench.missing[:3]]
        raise ValueError("; ".join(missing) or "expected some of --open_i, --chestx_ray14, --chexpert, --chestx_det10")
    before, settings, parts = results.begin(args, folders.values(), benches)
    if before:
        return results.end(args, before, known=True)
    rows, lines = {name: {} for name in folders}, []
    for at, (name, path) in enumerate(folders.items()):
        model = student.load(path, torch.bfloat16 if args.bf16 else torch.float32, ranks.init())
        for bench in benches:
            failed, encoder = {}, data.Encoder(path, bench.task, bench.images, args.max_pixels)
            out = questions.ask(model, encoder, bench.studies, questions.closed_questions(bench.task), parts and parts / str(at) / bench.name,
                                args.num_workers, failed, f"{name}, {bench.name}")
            bench.studies = [study for study in bench.studies if study.id in out]
            bench.missing += [f"{key}: {why}" for key, why in failed.items()]
            odds = {key: {finding: options["yes"] - options["no"] for finding, options in answer.items()} for key, answer in out.items()}
            if odds:
                rows[name][bench.name] = aucs(bench, odds, args.views)
                lines += tables.auc_lines(f"{name}, {bench.name}", rows[name][bench.name])
    missing += [f"{bench.name}: {what}" for bench in benches for what in bench.missing]
    lines += [f"{bench.name}: {note}" for bench in benches for note in bench.notes]
    lines.append(tables.beside(4, {name: [row.get(dataset, {}).get("macro") for dataset in ZERO_SHOT] for name, row in rows.items()}))
    return results.end(args, {"settings": settings, "rows": rows, "missing": missing, "table": "\n".join(lines)})


def aucs(bench, odds, views="max"):
    """odds: {study id: {finding: log P(yes) - log P(no)}} -> AUC per class and "macro", their mean over bench.headline. An image without a
    label does not count for its class. CheXpert also "per_study", the macro with one score a study: the max or mean over its `views`."""
    def columns(units):
        """units: [(labels, scores)] -> {finding: labels}, {finding: scores} over the units that have its label."""
        of = {finding: [unit for unit in units if finding in unit[0]] for finding in bench.task.findings}
        return ({finding: [given[at][finding] for given in some] for finding, some in of.items() if some} for at in (0, 1))

    def headline(labels, predicted):
        names = [finding for finding in bench.headline if finding in labels]
        return scores.macro_auc({name: labels[name] for name in names}, {name: predicted[name] for name in names})

    labels, predicted = columns([(study.labels, odds[study.id]) for study in bench.studies])
    macro = headline(labels, predicted)
    out = {"n": len(bench.studies), "macro": macro.value, "classes": len(macro.per_class) - macro.left_out, "left_out": macro.left_out,
           "auc": scores.macro_auc(labels, predicted).per_class, "labels": {name: len(values) for name, values in labels.items()},
           "positive": {name: sum(values) for name, values in labels.items()}}
    groups = {}
    for study in bench.studies:
        if study.record:
            groups.setdefault(study.record["group"], []).append(study)
    if groups:
        pool = max if views == "max" else fmean
        pooled = [(group[0].labels, {f: pool(odds[study.id][f] for study in group) for f in bench.task.findings}) for group in groups.values()]
        out |= {"per_study": headline(*columns(pooled)).value, "studies": len(groups), "views": views}
    return out


def run_tables(args):
    """Every table of the paper with what results files hold beside it."""
    ours = tables.collect(args.results)
    ranks.say("\n\n".join(tables.beside(number, rows) for number, rows in ours.items()))
    if args.json:
        ranks.say(json.dumps({"tables": ours}))
    return ours


def run_ablation(args):
    """The scale model's ladder, with its claims, beside the paper's Table 5."""
    results, text = tables.read_ladder(args.results)
    ranks.say(text)
    if args.json:
        ranks.say(json.dumps(results))
    return results


def add_student_arguments(p, answers=True):
    """The flags of all commands that ask a student, and those of its answers."""
    p.add_argument("--student", action="append", required=True, help="NAME=FOLDER or FOLDER (or a hub id); may be given several times")
    p.add_argument("--max_pixels", type=flags.at_least_one, default=1024 * 28 * 28, help="pixels per image, 784 a token (default: %(default)s)")
    p.add_argument("--num_workers", type=int, default=0, help="processes per rank that load images (default: %(default)s)")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="weights in bf16")
    p.add_argument("--strict", action="store_true", help="exit with 1 if anything is missing")
    p.add_argument("--output", help="results.json to write; the same command goes on where it stopped")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    if answers:
        p.add_argument("--max_new_tokens", type=flags.at_least_one, default=1024, help="tokens of an answer (default: %(default)s)")
        p.add_argument("--batch_size", type=flags.at_least_one, default=32, help="studies per forward of generated answers (default: %(default)s)")
        p.add_argument("--seed", type=int, default=0, help="of the sampled answers and the bootstrap (default: %(default)s)")
        p.add_argument("--split", help="which studies: train, validate, test (default: test)")


def parse(argv=None):
    parser = argparse.ArgumentParser(description="What the paper measures.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("classify", help="top-1 accuracy per finding: MS-CXR-T, or any studies.jsonl with labels",
                            description="Top-1 accuracy per finding, beside the label prior, teachers and vote. One of --studies and --task.")
    p.add_argument("--studies", help="studies.jsonl with labels")
    p.add_argument("--task_file", help="task.json of --studies; without it MIMIC-CXR's 14 findings")
    p.add_argument("--task", choices=("progression", "presence"), help="MS-CXR-T, which has no splits: the course over two films, or presence")
    p.add_argument("--ms_cxr_t", help="MS_CXR_T_temporal_image_classification_v1.0.0.csv")
    p.add_argument("--chexpert_csv", help="mimic-cxr-2.0.0-chexpert.csv.gz, the labels of presence")
    p.add_argument("--blank", choices=("exclude", "negative"), default="exclude", help="findings not mentioned, for presence (default: %(default)s)")
    p.add_argument("--images", default=".", help="folder that the image paths are relative to; of MIMIC-CXR-JPG for --task (default: %(default)s)")
    p.add_argument("--mode", choices=("options", "parse"), default="options",
                   help="options: the most probable option of a closed question; parse: generated text, read back (default: %(default)s)")
    p.add_argument("--prompt", choices=("student", "teacher"), default="student", help="teacher: Appendix B's, which names the diagnosis")
    p.add_argument("--bootstrap", type=int, default=1000, help="resamples for the 95%% intervals, 0: none (default: %(default)s)")
    add_student_arguments(p)

    p = commands.add_parser("reports", help="report generation on MIMIC-CXR: BLEU, ROUGE-L, METEOR, CIDEr, findings",
                            description="Reports written greedily, against the references' findings sections.")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--annotation", help="R2Gen's annotation.json; --images is the folder of its image_path, MIMIC-CXR-JPG's files/")
    source.add_argument("--reports", help="folder of mimic-cxr-reports; --images is MIMIC-CXR-JPG with its split and metadata csv")
    source.add_argument("--studies", help='studies.jsonl with "report"')
    p.add_argument("--images", default=".", help="see above (default: %(default)s)")
    p.add_argument("--section", choices=("findings", "impression", "both"), default="findings", help="reference of --reports (default: %(default)s)")
    p.add_argument("--clean", choices=("r2gen", "none"), default="r2gen", help="of both texts before BLEU and the others (default: %(default)s)")
    p.add_argument("--uncertain", choices=("negative", "positive", "ignore"), default="negative", help="what -1 counts as (default: %(default)s)")
    p.add_argument("--meteor", help="folder with meteor-1.5.jar and data/paraphrase-en.gz (default: that of an installed pycocoevalcap)")
    p.add_argument("--prompt", choices=("report", "student"), default="report", help="what is asked (default: %(default)s)")
    add_student_arguments(p)

    p = commands.add_parser("zeroshot", help="AUC per class on Open-I, ChestX-ray14, CheXpert, ChestX-Det10",
                            description="Yes/no log-odds, all questions of an image in one forward. A dataset that is not named is not run.")
    p.add_argument("--open_i", help="folder of Open-I: ecgen-radiology/*.xml and the PNGs")
    p.add_argument("--chestx_ray14", help="folder of ChestX-ray14: test_list.txt, Data_Entry_2017*.csv and the images")
    p.add_argument("--chexpert", help="folder of CheXpert, the one that holds valid/ or test/")
    p.add_argument("--chexpert_labels", help="its label file (default: the first below it of groundtruth.csv, test_labels.csv, valid.csv)")
    p.add_argument("--views", choices=("max", "mean"), default="max", help="CheXpert: one score of a study's views (default: %(default)s)")
    p.add_argument("--chestx_det10", help="folder of ChestX-Det10: test.json and the images")
    add_student_arguments(p, answers=False)

    p = commands.add_parser("tables", help="all tables of the paper beside ours", description=run_tables.__doc__)
    p.add_argument("results", nargs="*", help="--output files of classify, reports and zeroshot, results.json of python -m experiment ladder")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    teachers.add_arguments(commands.add_parser("teachers", help="how far the teachers drift apart: Fig. 1a, Table 2",
                                               description="The teachers' texts against labels or reports, and against each other."))
    p = commands.add_parser("ablation", help="the scale model's ladder beside Table 5", description=run_ablation.__doc__)
    p.add_argument("results", help="results.json of python -m experiment ladder")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args(argv)
    if args.command == "classify":
        if bool(args.studies) == bool(args.task):
            parser.error("classify: expected one of --studies and --task")
        if args.task and not args.ms_cxr_t or args.task == "presence" and not args.chexpert_csv:
            parser.error(f"--task {args.task}: expected --ms_cxr_t" + (" and --chexpert_csv" if args.task == "presence" else ""))
        if args.task and args.prompt == "teacher":
            parser.error("--prompt teacher names the labels, expected only with --studies")
        if args.task and (args.split is not None or args.task_file):
            parser.error(f"--task {args.task}: MS-CXR-T has no splits and its own findings, expected --split and --task_file only with --studies")
    if args.command in ("classify", "reports") and args.split is None:
        args.split = "test"
    return args


def run(args):
    """Runs a command and prints its table -> {row: figures}."""
    commands = {"classify": run_classify, "reports": run_reports, "zeroshot": run_zeroshot, "teachers": teachers.run, "tables": run_tables,
                "ablation": run_ablation}
    return commands[args.command](args)


def main():
    args = parse()
    with ranks.process_group("evaluate"):
        run(args)


if __name__ == "__main__":
    main()
