"""Compare: the pre-distilled student samples its own reading, given all the teachers'.

Sec. 2.2:   t+ ~ pi_st( . | v, l, T),    T = {t^1, ..., t^N}                             Eq. 7

reads   studies.jsonl, pi_st (stage 1)
writes  OUTPUT_DIR/positives.jsonl: {"id", "t_plus", "seed", "tokens", "finish"}, dropped.jsonl,
        stats.json

    python selfdistill.py                                             scale model, one process
    torchrun --nproc_per_node=4 selfdistill.py --studies studies.jsonl --images files \\
             --student runs/spd/student --output_dir runs/positives
    python selfdistill.py --studies studies.jsonl --images files --server http://localhost:8000 \\
           --student runs/spd/student --output_dir runs/positives

Where the paper is silent:
  1. The prompt that holds the trajectories is ours (data.py): anonymous readers, their order
     shuffled for each study.
  2. Decoding is plain sampling at temperature 1, as Eq. 7 says; --temperature and --top_p change
     it.
  3. A t+ that quotes its readers, holds a chat marker, is empty or does not end is sampled again
     (--attempts), then its study is dropped and counted.
  4. Refusing trajectories are left out of T, and a refusing t+ is sampled again as in 3, unless
     --refusals keep.
  5. t+ is the student's answer: what it thinks before, as between <think> and </think>, is cut off.

Every study has its own random numbers, and the batches are the same whatever the number of ranks,
so 1 and 4 ranks write the same file. Each batch is on disk when it is done; the same command goes
on where it stopped.

With --server an OpenAI-compatible server that serves pi_st samples instead, and nothing is loaded
here (sampling.ServedStudent). It gets the same prompts, the films at the size that the student
would see, and a seed per study and attempt. What it makes of a seed is its own, so its samples are
others than the student's here, and may be others the next time. A "<|" in a teacher's text goes as
"< |": a server would read the student's special tokens in it. With --student, whose tokenizer and
image processor are then read, the server's first answer must be to a prompt of as many tokens as
the student's.
"""

import json
import re
from dataclasses import replace

import data
import sampling
import spd
import student
import training
from runtime import endpoint, flags, ranks
from runtime.run_folder import RunFolder
from runtime.shared import read_parts, shared_map

# 'as reader 2 says', 'the second reader' and 'description 2' quote; 'description 2 cm' is a size
QUOTES_A_READER = re.compile(
    r"\breaders\b|\breader #?\d|\b(?:the|one|each|another|first|second|third) reader\b"
    r"|\b(?:report|description) #?\d\b(?!\s*[cm]m)", re.IGNORECASE)

PRESETS = {
    "paper": dict(refusals="keep"),
    "released": dict(refusals="keep"),
    "demo": dict(max_new_tokens=96, batch_size=50),
}


def parse(argv=None):
    parser = flags.stage_parser(__doc__)
    flags.add_data_arguments(parser)
    g = parser.add_argument_group("sampling")
    g.add_argument("--temperature", type=flags.zero_or_more, default=1.0,
                   help="0 is greedy (default: %(default)s)")
    g.add_argument("--top_p", type=flags.up_to_one, default=1.0,
                   help="nucleus mass (default: %(default)s)")
    g.add_argument("--max_new_tokens", type=flags.at_least_one, default=1024,
                   help="tokens (default: %(default)s)")
    g.add_argument("--batch_size", type=flags.at_least_one, default=32,
                   help="studies per forward (default: %(default)s)")
    g.add_argument("--attempts", type=flags.at_least_one, default=4,
                   help="samples until a study is dropped (default: %(default)s)")
    g.add_argument("--resume", choices=("auto", "must", "never"), default="auto",
                   help="go on with what is written (default: %(default)s)")
    g = parser.add_argument_group("a server that samples in the student's place")
    g.add_argument("--server", help="URL of an OpenAI-compatible server of pi_st, as "
                   "http://localhost:8000 (default: --student, loaded here)")
    g.add_argument("--server_model",
                   help="the name that it serves pi_st by (default: its only model)")
    g.add_argument("--server_concurrency", type=flags.at_least_one, default=64,
                   help="requests in flight, per rank (default: %(default)s)")
    g.add_argument("--server_key_env", help="name of the environment variable that holds its key "
                   "(default: it wants none)")
    g.add_argument("--i_have_permission", action="store_true",
                   help="images may go to a server on another machine")
    return flags.parse(parser, PRESETS, argv)


def after_learn(args):
    """The flags with pi_st from stage 1, where that is asked for.

    It is with --base and on the scale model, and lies in OUTPUT_DIR/spd. Raises ValueError where an
    input is missing.
    """
    if args.base or args.studies is None:
        made = spd.run(flags.inherit(args, spd.parse))
        folder = flags.in_chain(args, "selfdistill")
        args = flags.replaced(args, **made, base=None, output_dir=folder)
    pi_st = "stage 1 makes pi_st: spd.py --studies ... --output_dir runs/spd, in runs/spd/student"
    flags.require(args, **({} if args.server else {"student": pi_st}))
    if not args.server:
        student.require_family(args.student)
    return flags.replaced(args, sampled_by="server" if args.server else "student")


def fault(text, finish, task=None):
    """Why a sample is no t+, or None.

    finish  'stop' where it ended
    task    data.Task by which a refusal is told; None keeps refusals
    """
    if finish != "stop":
        return "unfinished"
    if not text.strip():
        return "empty"
    if data.CHAT_MARKER.search(text):  # as in 'no edema<|im_start|>user'
        return "holds a chat marker"
    if task is not None and data.is_refusal(text, task):
        return "refuses"
    return "quotes its readers" if QUOTES_A_READER.search(text) else None


def open_server(args):
    """The endpoint of --server, or None. Raises ValueError for a URL or a key that is none."""
    if not args.server:
        return None
    key = endpoint.read_key(args.server_key_env) if args.server_key_env else None
    return endpoint.Endpoint(args.server, args.server_model or "", key, timeout=600,
                             only_loopback=not args.i_have_permission)


def open_sampler(args, task, server):
    """The student that samples t+: sampling.ServedStudent, or LoadedStudent without --server."""
    decoding = dict(seed=args.seed, temperature=args.temperature, top_p=args.top_p,
                    max_new_tokens=args.max_new_tokens)
    if server is None:
        return sampling.LoadedStudent(
            args.student, task, args.images, args.max_pixels, args.bf16, **decoding)
    if not server.model:
        server = replace(server, model=sampling.served_model(server, args.server))
    return sampling.ServedStudent(
        server, args.student, task, args.images, args.max_pixels, **decoding)


def sample_batch(sampler, studies, examples, task, args):
    """Samples t+ for a batch, again where a sample is none.

    sampler   what `open_sampler` returns
    examples  what sampler.encode returned for each study
    Returns one record a study, in order: a line of positives.jsonl, or {"id", "dropped": reason}.
    """
    records, todo = {}, list(zip(studies, examples))
    for attempt in range(args.attempts):
        seeds = [f"{args.seed} {study.id} {attempt}" for study, _ in todo]
        out = sampler.sample([example for _, example in todo], seeds)                        # Eq. 7
        again = []
        for (study, example), seed, (text, tokens, finish) in zip(todo, seeds, out):
            text = data.answer_of(text)
            if reason := fault(text, finish, task if args.refusals == "drop" else None):
                records[study.id] = {"id": study.id, "dropped": reason}
                again.append((study, example))
            else:
                records[study.id] = {"id": study.id, "t_plus": text, "seed": seed, "tokens": tokens,
                                     "finish": finish}
        todo = again
        if not todo:
            break
    return [records[study.id] for study in studies]


def statistics(studies, records, task):
    """How t+ agrees with the teachers' plurality and, where labels exist, with the truth.

    That quality decides stage 3. "unread" is a share of the findings that the teachers name,
    "unread_texts" of the t+, "agree_with_nothing" of the t+ that agree with the vote on no finding
    although there is one. records: {study id: record of `sample_batch`}.
    """
    agree, true, votes, labels, unread, unread_texts, nothing = 0, 0, 0, 0, 0, 0, 0
    for study in studies:
        if "t_plus" not in records[study.id]:
            continue
        read = data.read_classes(records[study.id]["t_plus"], task)
        plurality = data.vote(study.trajectories, task)
        unread += sum(finding not in read for finding in plurality)
        votes += len(plurality)
        agreed = sum(read.get(finding) == value for finding, value in plurality.items())
        agree += agreed
        unread_texts += not read
        nothing += bool(plurality) and not agreed
        labels += len(study.labels)
        true += sum(read.get(finding) == value for finding, value in study.labels.items())
    dropped = [record["dropped"] for record in records.values() if "dropped" in record]
    positives = len(studies) - len(dropped)
    return {"studies": len(studies), "positives": positives,
            "dropped": {reason: dropped.count(reason) for reason in sorted(set(dropped))},
            "agreement_with_vote": agree / votes if votes else None,
            "accuracy": true / labels if labels else None,
            "unread": unread / votes if votes else None,
            "unread_texts": unread_texts / positives if positives else None,
            "agree_with_nothing": nothing / positives if positives else None}


def nothing_said(stats, args):
    """The warning that most t+ say nothing, or None.

    stats  what `statistics` returns
    args   the flags, which name the file and the task
    """
    unread, nothing = stats["unread_texts"] or 0, stats["agree_with_nothing"] or 0
    if unread > 0.5:
        what = f"NOTHING COULD BE READ IN {unread:.0%} OF THE T+"
    elif nothing > 0.5:
        what = f"{nothing:.0%} OF THE T+ AGREE WITH THE TEACHERS' VOTE ON NO FINDING"
    else:
        return None
    task = f" --task_file {args.task_file}" if args.task_file else ""
    return (f"WARNING: {what}. Stage 3 would learn from them. See what is read in the teachers' "
            f"texts: python tools/check.py {args.studies}{task} --show 10; and in "
            "positives.jsonl what the t+ say. Other findings or words are those of a --task_file")


def write_results(folder, studies, records, task, attempts, refusals):
    """Writes positives.jsonl, dropped.jsonl and stats.json.

    records   {study id: record of `sample_batch`}
    refusals  how many trajectories were left out
    Returns what it writes as stats.json.
    """
    ordered = [records[study.id] for study in studies]
    again = sum(int(record["seed"].split()[-1]) if "seed" in record else attempts - 1
                for record in ordered)
    stats = {**statistics(studies, records, task), "refusals_left_out": refusals,
             "sampled_again": again}
    folder.write_lines("dropped.jsonl", [record for record in ordered if "dropped" in record])
    folder.write_lines("positives.jsonl", [record for record in ordered if "t_plus" in record])
    folder.write_text("stats.json", json.dumps(stats, indent=2) + "\n")
    ranks.print_once("compare:", json.dumps(stats))
    if stats["positives"] < 0.8 * stats["studies"]:
        ranks.print_once("warning: more than a fifth of the studies have no t+; dropped.jsonl says "
                         "why ('unfinished': --max_new_tokens)")
    return stats


@training.naming_the_way_on()
def run(args):
    """Stage 2: t+ for every study; with --base stage 1 before it.

    args: what `parse` returns. Returns what RunFolder.outputs says with "positives", at once where
    it is finished. Raises ValueError for bad input, OSError where writing fails, endpoint.Failure
    where a server gives no answer.
    """
    args = after_learn(args)
    server, task = open_server(args), data.load_task(args.task_file)
    studies, _, refusals = data.training_studies(
        args.studies, task, args.split, args.teachers, args.refusals)
    training.require_same_inputs(args, studies=studies)
    with RunFolder(args, ("studies", "task_file", "student")) as folder:
        made = {"student": args.student, "positives": folder.path / "positives.jsonl"}
        if folder.finished:
            return folder.outputs("compare", **made)
        if args.resume == "must" and not read_parts(folder.path):
            ranks.print_once(f"{folder.path}: --resume must, but nothing is written there")
            raise SystemExit(2)
        (studies,) = training.drop_broken(folder, args, studies)
        data.require_images(studies, args.images)
        by_id = {study.id: study for study in studies}
        ranks.print_once(f"compare: {len(studies)} studies, {refusals} refusals left out")
        sampler = open_sampler(args, task, server)
        encode = lambda key: sampler.encode(by_id[key])
        work = lambda keys, examples: sample_batch(
            sampler, [by_id[key] for key in keys], examples, task, args)
        # alike lengths share a batch; a server makes batches of its own
        keys = sorted(by_id, key=lambda key: sum(map(len, by_id[key].trajectories.values())))
        batch_size, threads = (1, args.server_concurrency) if server else (args.batch_size, 0)
        records = shared_map(keys, encode, work, batch_size, folder.path, args.num_workers, threads,
                             desc="compare")
        stats = write_results(folder, studies, records, task, args.attempts, refusals)
        folder.mark_finished(stage="self-distillation (Eq. 7)")
        outputs = folder.outputs("compare", **made)
        if warning := nothing_said(stats, args):  # last, where it is seen
            ranks.print_once(warning)
        return outputs


def main():
    args = parse()
    with ranks.process_group("compare"):
        try:
            run(args)
        except endpoint.Failure as failure:
            said = f"{failure}; what is written stays, the same command goes on"
            raise SystemExit(said) from None


if __name__ == "__main__":
    main()
