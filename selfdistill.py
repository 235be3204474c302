"""Compare: the pre-distilled student samples its own reading, given all the teachers' (Sec. 2.2, Eq. 7).

    t+ ~ pi_st( . | v, l, T),    T = {t^1, ..., t^N}                                                                (7)

reads   studies.jsonl, pi_st (stage 1)
writes  OUTPUT_DIR/positives.jsonl: {"id", "t_plus", "seed", "tokens", "finish"}, dropped.jsonl, stats.json

    python selfdistill.py                                                                           scale model, one process
    torchrun --nproc_per_node=4 selfdistill.py --studies studies.jsonl --images files --student runs/spd/student --output_dir runs/positives
    python selfdistill.py --studies studies.jsonl --images files --server http://localhost:8000 --output_dir runs/positives

Where the paper is silent:
  1. The prompt that holds the trajectories is ours (data.py): anonymous readers, their order shuffled for each study.
  2. Decoding is plain sampling at temperature 1, as Eq. 7 says; --temperature and --top_p change it.
  3. A t+ that quotes its readers, is empty or does not end is sampled again (--attempts), then its study is dropped and counted.
  4. Refusing trajectories are left out of T, and a refusing t+ is sampled again as in 3, unless --refusals keep.

Every study has its own random numbers, and the batches are the same whatever the number of ranks, so 1 and 4 ranks write the same
file. Each batch is on disk when it is done; the same command goes on where it stopped.

With --server an OpenAI-compatible server that serves pi_st samples instead, and nothing is loaded here. It gets the same prompts, the
films at the size that the student would see, and a seed per study and attempt; what it makes of a seed is its own, so its samples are
others than the student's here, and may be others the next time. A "<|" in a teacher's text goes as "< |": a server would read the
student's special tokens in it.
"""

import argparse
import contextlib
import hashlib
import json
import re
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import data
import student
import training
from evaluation import results
from runtime import checkpoint, endpoint, flags, ranks
from runtime.records import shown

# 'as reader 2 says' and 'the second reader' quote; 'description 2' does, 'description 2 cm' is a size
QUOTES_A_READER = re.compile(r"\breaders\b|\breader #?\d|\b(?:the|one|each|another|first|second|third) reader\b"
                             r"|\b(?:report|description) #?\d\b(?!\s*[cm]m)", re.IGNORECASE)

PRESETS = {
    "paper": dict(refusals="keep"),
    "released": dict(refusals="keep"),
    "demo": dict(max_new_tokens=96, batch_size=50),
}


def parse(argv=None):
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_data_arguments(parser)
    g = parser.add_argument_group("sampling")
    g.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    g.add_argument("--top_p", type=float, default=1.0, help="nucleus mass (default: %(default)s)")
    g.add_argument("--max_new_tokens", type=flags.at_least_one, default=1024, help="tokens (default: %(default)s)")
    g.add_argument("--batch_size", type=flags.at_least_one, default=32, help="studies per forward (default: %(default)s)")
    g.add_argument("--attempts", type=flags.at_least_one, default=4, help="samples until a study is dropped (default: %(default)s)")
    g.add_argument("--resume", choices=("auto", "must", "never"), default="auto", help="go on with what is written (default: %(default)s)")
    g = parser.add_argument_group("a server that samples in the student's place")
    g.add_argument("--server", help="URL of an OpenAI-compatible server of pi_st, as http://localhost:8000 (default: --student, loaded here)")
    g.add_argument("--server_model", help="the name that it serves pi_st by (default: its only model)")
    g.add_argument("--server_concurrency", type=flags.at_least_one, default=64, help="requests in flight, per rank (default: %(default)s)")
    g.add_argument("--server_key_env", help="name of the environment variable that holds its key (default: it wants none)")
    g.add_argument("--i_have_permission", action="store_true", help="images may go to a server on another machine")
    return flags.parse(parser, PRESETS, argv)


def fault(text, finish, task=None):
    """Why a sample is no t+, or None. task: by which a refusal is told; None keeps refusals."""
    if finish != "stop":
        return "unfinished"
    if not text.strip():
        return "empty"
    if task is not None and data.is_refusal(text, task):
        return "refuses"
    return "quotes its readers" if QUOTES_A_READER.search(text) else None


def student_sampler(args, task, device):
    """-> encode(study) and sample(encoded prompts, seeds) -> [(text, tokens, finish)], by the student loaded here."""
    encoder = data.Encoder(args.student, task, args.images, args.max_pixels)
    model = student.load(args.student, torch.bfloat16 if args.bf16 else torch.float32, device)

    def sample(examples, seeds):
        longest = max((example["prefix_ids"] for example in examples), key=len)
        with training.on_studies([example["id"] for example in examples], {"longest prompt": longest}, "--batch_size or --max_new_tokens"):
            out = student.sample(model, encoder, examples, seeds, args.temperature, args.top_p, args.max_new_tokens)
        return [(encoder.text(ids), len(ids), finish) for ids, finish in out]

    return lambda study: encoder(study, data.compare_prompt(study, task, args.seed)), sample


def server_sampler(server, args, task):
    """The same, by the server. Raises endpoint.Failure where it gives no answer."""
    if not server.model:
        names = endpoint.models(server)
        if len(names) != 1:
            raise ValueError(f"{args.server} serves {shown(', '.join(names)) or 'nothing'}: expected --server_model with the name of pi_st")
        server = replace(server, model=names[0])

    def encode(study):
        images = [data.load_image(path, args.images) for path in study.images]
        for i, image in enumerate(images):  # as Encoder would; the server's own processor finds nothing left to do
            height, width = data.smart_resize(image.height, image.width, 28, 56 * 56, args.max_pixels)
            images[i] = endpoint.image_part(image.resize((width, height), Image.Resampling.BICUBIC), "PNG")
        text = {"type": "text", "text": data.compare_prompt(study, task, args.seed).replace("<|", "< |")}
        system = [{"role": "system", "content": task.prompts["system"]}] if task.prompts["system"] else []
        return [*system, {"role": "user", "content": [*images, text]}]

    def sample(examples, seeds):
        out = []
        for messages, seed in zip(examples, seeds):
            number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "little") >> 1
            try:
                answer = endpoint.ask(server, messages, seed, temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens,
                                      seed=number)
            except endpoint.Failure as failure:
                raise endpoint.Failure(failure.kind, f"{server.url}, sample {seed!r}: {failure}") from None
            out.append((answer.text, (endpoint.count(answer.usage) or (0, None))[1], answer.finish))
        return out

    return encode, sample


def sample_batch(sample, batch, task, args):
    """batch: [(study, encoded prompt)]. -> one record a study, in order: a positive, or {"id", "dropped": reason}."""
    records, todo = {}, batch
    for attempt in range(args.attempts):
        seeds = [f"{args.seed} {study.id} {attempt}" for study, _ in todo]
        out = sample([example for _, example in todo], seeds)
        again = []
        for (study, example), seed, (text, tokens, finish) in zip(todo, seeds, out):
            if reason := fault(text, finish, task if args.refusals == "drop" else None):
                records[study.id] = {"id": study.id, "dropped": reason}
                again.append((study, example))
            else:
                records[study.id] = {"id": study.id, "t_plus": text, "seed": seed, "tokens": tokens, "finish": finish}
        todo = again
        if not todo:
            break
    return [records[study.id] for study, _ in batch]


def statistics(studies, records, task):
    """How t+ agrees with the teachers' plurality and, where labels exist, with the truth: the quality that decides stage 3."""
    agree, true, votes, labels, unread = 0, 0, 0, 0, 0
    for study in studies:
        if "t_plus" not in records[study.id]:
            continue
        read, plurality = data.read_classes(records[study.id]["t_plus"], task), data.vote(study.trajectories, task)
        unread += sum(finding not in read for finding in plurality)
        votes += len(plurality)
        agree += sum(read.get(finding) == value for finding, value in plurality.items())
        labels += len(study.labels)
        true += sum(read.get(finding) == value for finding, value in study.labels.items())
    dropped = [record["dropped"] for record in records.values() if "dropped" in record]
    return {"studies": len(studies), "positives": len(studies) - len(dropped),
            "dropped": {reason: dropped.count(reason) for reason in sorted(set(dropped))},
            "agreement_with_vote": agree / votes if votes else None, "accuracy": true / labels if labels else None,
            "unread": unread / votes if votes else None}


def run(args):
    server, hint = None, "stage 1 makes pi_st: spd.py --studies ... --output_dir runs/spd, in runs/spd/student"
    flags.require(args, **({} if args.server else {"student": hint}))
    args.sampled_by = "server" if args.server else "student"
    if args.server:
        key = endpoint.read_key(args.server_key_env) if args.server_key_env else None
        server = endpoint.Endpoint(args.server, args.server_model or "", key, timeout=600, only_loopback=not args.i_have_permission)
    folder = Path(args.output_dir)
    device = ranks.init()
    task = data.load_task(args.task_file)
    studies = data.read_studies(args.studies, task, args.split)
    data.keep_teachers(studies, args.teachers)
    dropped = 0
    if args.refusals == "drop":
        studies, dropped = data.drop_refusals(studies, task)
    studies = [study for study in studies if study.trajectories]
    if not studies:
        raise ValueError(f"{args.studies}: no study has trajectories, expected the teachers' texts")
    lock = checkpoint.open_run(args, {"studies": args.studies, "task_file": args.task_file, "student": args.student})
    if checkpoint.finished(args):
        ranks.say(f"compare: {folder} is finished")
        return
    data.require_images(studies, args.images)
    ranks.say(f"compare: {len(studies)} studies, {dropped} refusals left out")
    encode, sample = server_sampler(server, args, task) if server else student_sampler(args, task, device)

    # alike lengths share a batch; which batch a study is in does not depend on the ranks or on what is done already
    by_length = sorted(range(len(studies)), key=lambda i: sum(map(len, studies[i].trajectories.values())))
    batches = [by_length[i:i + args.batch_size] for i in range(0, len(by_length), args.batch_size)]
    done = results.read_parts(folder)
    if args.resume == "must" and not done:
        ranks.say(f"{folder}: --resume must, but nothing is written there")
        raise SystemExit(2)
    batches = [batch for batch in batches if not all(studies[i].id in done for i in batch)]
    ranks.barrier()
    mine = batches[ranks.rank()::ranks.world()]

    encoded = lambda index: (studies[index], encode(studies[index]))
    threads = ThreadPool(args.server_concurrency) if server else contextlib.nullcontext()
    with open(folder / f"part-{ranks.rank()}.jsonl", "ab") as part, threads:
        if server:  # which batches its requests make up is its own affair
            mine = [index for batch in mine for index in batch if studies[index].id not in done]
            stream = threads.imap_unordered(lambda index: sample_batch(sample, [encoded(index)], task, args), mine)
        else:
            batches = training.loader(encoded, mine, args.num_workers)
            stream = (sample_batch(sample, batch, task, args) for batch in batches)
        for records in tqdm(stream, total=len(mine), desc="compare", disable=ranks.rank() > 0):
            part.write(results.part_lines({record["id"]: record for record in records}))
            part.flush()
    ranks.barrier()

    def merge():
        records = results.read_parts(folder)
        ordered = [records[study.id] for study in studies]
        again = [int(record["seed"].split()[-1]) if "seed" in record else args.attempts - 1 for record in ordered]
        stats = {**statistics(studies, records, task), "refusals_left_out": dropped, "sampled_again": sum(again)}
        for name, key in (("dropped.jsonl", "dropped"), ("positives.jsonl", "t_plus")):
            checkpoint.write_text(folder / name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ordered if key in r))
        checkpoint.write_text(folder / "stats.json", json.dumps(stats, indent=2) + "\n")
        checkpoint.write_text(folder / "finished.json", json.dumps({"stage": "self-distillation (Eq. 7)"}) + "\n")
        for part in folder.glob("part-*.jsonl"):
            part.unlink()
        print("compare:", json.dumps(stats), flush=True)
        if stats["positives"] < 0.8 * stats["studies"]:
            print("warning: more than a fifth of the studies have no t+; dropped.jsonl says why ('unfinished': --max_new_tokens)", flush=True)

    ranks.on_rank_zero(merge)
    if lock:
        lock.close()


def main():
    args = parse()
    with ranks.process_group("compare"):
        if args.studies is None:
            from scale_model import chain

            chain.prepare(args, "selfdistill")
        try:
            run(args)
        except endpoint.Failure as failure:
            raise SystemExit(f"{failure}; what is written stays, the same command goes on") from None


if __name__ == "__main__":
    main()
