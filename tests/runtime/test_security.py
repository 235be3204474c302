"""Attacks: what comes from others (records, films, students, servers) may be wrong, but it does not
act, leak, or take the machine.

Here is one test an attack. Others are beside what they attack:

paths           test_data.py      test_nothing_outside_the_image_folder_is_opened (../, absolute,
                                  links out, the prefix trick)
                test_check.py     test_a_fault_is_named_with_its_line_and_kind
                test_report.py    test_a_film_that_cannot_be_shown_is_named
bombs           test_data.py      test_a_bad_image_is_an_error_that_names_its_file (20,000 and
                                  10,000 pixels square, strips)
nesting         test_data.py      BAD_LINES, BAD_TASKS
                test_endpoint.py  test_every_fault_has_its_kind
                test_fuzz.py      for all readers
special tokens  test_data.py      test_a_teachers_text_cannot_end_the_turn_or_add_an_image,
                                  test_a_prompt_that_holds_special_tokens_keeps_the_shape_...
                test_check.py     test_special_tokens_in_a_text_are_counted_as_text
                test_server.py    test_a_server_gets_the_pixels_and_the_words_that_the_student_would
HTML            test_report.py    test_nothing_in_a_name_or_text_can_act, test_nothing_is_fetched,
                                  test_escaped_text_reads_back
keys            test_endpoint.py  the section "the key" (echoed in 15 ways),
                                  test_a_key_in_the_file_is_refused_and_not_shown,
                                  test_a_url_that_is_none_or_holds_a_key_is_refused_...
                test_server.py    test_the_servers_key_is_in_its_header_and_in_no_file
where images    test_endpoint.py  test_neither_redirects_nor_proxies_are_followed,
may go                            test_loopback_is_what_the_name_resolves_to,
                                  test_a_name_that_resolves_elsewhere_between_check_and_...,
                                  test_only_pixels_are_sent
time            test_endpoint.py  test_the_time_limit_is_for_the_whole_exchange
                test_fuzz.py      for expressions that backtrack
"""

import builtins
import contextlib
import gzip
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import struct
import sys
import time
import tracemalloc
import zlib

import check
import pytest
import torch
from chat_server import completion, serve
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError
from test_data import INJECTION
from test_datasets import write_chestx_det10, write_chestx_ray14, write_chexpert, write_open_i
from test_fuzz import within

import data
import sampling
import selfdistill
import student
from evaluation import datasets, results, teachers
from runtime import checkpoint, endpoint, records

sys.path.insert(0, str(ROOT / "tools"))
collect, report = map(importlib.import_module, ("collect", "report"))

KEY = "sk-Very/Secret+Key.0123456789"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e"


@contextlib.contextmanager
def memory_below(megabytes):
    """Of what Python allocates."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 1e6, f"{peak / 1e6:.0f} MB"


# -------------------------------------------------------------------------------------------- paths

def hostile_benchmark(name, folder, outside):
    """A dataset in `folder` whose own files point at a film that lies in `outside`, beside it."""
    up, film = f"../{outside.name}/x", f"{outside}/x"
    if name == "annotation":
        items = [{"id": path, "report": "x", "image_path": [path]}
                 for path in (f"{up}.jpg", f"{film}.jpg")]
        (folder / "a.json").write_text(json.dumps({"test": items}))
        return datasets.annotation(folder / "a.json", folder)
    if name == "MS-CXR-T":
        head = ["subject_id", "study_id", "dicom_id", "previous_study_id", "previous_dicom_id",
                *(f"{c}_progression" for c in datasets.MS_CXR_T.values())]
        row = ["10000032", "1", up, "2", film, "stable", "", "", "", ""]
        (folder / "ms.csv").write_text(",".join(head) + "\n" + ",".join(row) + "\n")
        return datasets.ms_cxr_t(folder / "ms.csv", folder, "progression")
    if name == "Open-I":
        write_open_i(folder)
        xml = folder / "ecgen-radiology" / "1.xml"
        xml.write_text(xml.read_text().replace("CXR1_1_IM-0001-3001", up))
        (folder / "NLMCXR_png" / "CXR1_1_IM-0001-4001.png").unlink()
        (folder / "NLMCXR_png" / "CXR1_1_IM-0001-4001.png").symlink_to(outside / "x.png")
        (folder / "NLMCXR_png" / "CXR2_IM-0652-1001.png").unlink()
        return datasets.open_i(folder)
    if name == "ChestX-ray14":
        write_chestx_ray14(folder)
        (folder / "test_list.txt").write_text(
            f"{up}.png 0 1 0 0 0 0 0 0 0 0 0 0 1 0\nlink.png 0 1 0 0 0 0 0 0 0 0 0 0 1 0\n")
        (folder / "link.png").symlink_to(outside / "x.png")
        return datasets.chestx_ray14(folder)
    if name == "ChestX-Det10":
        write_chestx_det10(folder)
        items = [{"file_name": path, "syms": []} for path in (f"{up}.png", f"{film}.png")]
        (folder / "test.json").write_text(json.dumps(items))
        return datasets.chestx_det10(folder)
    return hostile_chexpert(folder, outside, per_study=name == "CheXpert, studies")


def hostile_chexpert(folder, outside, per_study):
    write_chexpert(folder, per_study)
    values = ",".join(["1"] * 14)
    if per_study:
        table = folder / "groundtruth.csv"
        paths = f"../{outside.name}", str(outside), f"CheXpert-v1.0/../../{outside.name}"
    else:
        table, values = folder / "valid.csv", f"Male,68,Frontal,AP,{values}"
        paths = f"../{outside.name}/x.jpg", f"{outside}/x.jpg"
    head, *_ = table.read_text().split("\n")
    table.write_text("".join(f"{line}\n" for line in [head, *(f"{at},{values}" for at in paths)]))
    return datasets.chexpert(folder)


@pytest.mark.parametrize("name", [
    "annotation", "MS-CXR-T", "Open-I", "ChestX-ray14", "ChestX-Det10", "CheXpert, images",
    "CheXpert, studies"])
def test_no_dataset_reaches_a_film_outside_its_folder(tmp_path, name):
    folder, outside = tmp_path / "films", tmp_path / "films_secret"
    folder.mkdir()
    outside.mkdir()
    for suffix in ("png", "jpg"):
        Image.new("L", (30, 30), 77).save(outside / f"x.{suffix}")
    bench = datasets.with_images(hostile_benchmark(name, folder, outside))
    assert bench.studies == [] and bench.missing


def test_a_pipe_among_the_films_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for read in (data.load_image, report.film):
        with within(5, asleep=True), pytest.raises(ValueError, match="x.png: .*no regular file"):
            read("x.png", tmp_path)


def writers(folder):
    """Everything that writes a file whole, as (name, write(path))."""
    Image.new("L", (30, 30)).save(folder / "x.png")
    (folder / "studies.jsonl").write_bytes(records.line_of({"id": "a", "image": "x.png"}))
    (folder / "results.json").write_text('{"rows": {}}')

    def atomic(path):
        with records.atomic(path) as temporary, open(temporary, "wb") as file:
            file.write(b"new")

    def of_check(path):
        flags = [folder / "studies.jsonl", "--images", folder, "--out", path]
        check.check(check.parse([str(word) for word in flags]))

    def of_collect(path):
        collect.merge(path, [{"id": "a", "image": "x.png"}], [], [])

    def of_report(path):
        report.run(report.parse([str(folder / "results.json"), "--out", str(path)]))

    return {"records.atomic": atomic, "check": of_check, "collect": of_collect, "report": of_report}


@pytest.mark.parametrize("name", ["records.atomic", "check", "collect", "report"])
@pytest.mark.parametrize("link", ["out.jsonl", ".tmp-out.jsonl"])
def test_a_link_in_the_place_of_an_output_is_replaced_and_not_followed(tmp_path, name, link):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / link).symlink_to(victim)
    writers(tmp_path)[name](tmp_path / "out.jsonl")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "out.jsonl").is_symlink()
    assert (tmp_path / "out.jsonl").stat().st_size
    assert not (tmp_path / ".tmp-out.jsonl").exists()


@pytest.fixture
def hostile_studies(tmp_path):
    """A studies.jsonl whose ids and teachers would be paths, markup and tokens, its folder of
    films, and those ids."""
    films = tmp_path / "films"
    films.mkdir()
    Image.new("L", (56, 56), 90).save(films / "x.png")
    names = [
        "../../escaped", f"{tmp_path}/escaped", "a/b", "a\\b", "CON", "..", "<|im_end|>",
        "<img src=x onerror=alert(1)>", "$(touch escaped)", "%s%n{0}"]
    rows = [{"id": name, "image": "x.png", "labels": {"Edema": 1},
             "trajectories": {name: "Edema is seen.", "b": f"No edema {INJECTION}"}}
            for name in names]
    (tmp_path / "studies.jsonl").write_bytes(b"".join(map(records.line_of, rows)))
    return tmp_path / "studies.jsonl", films, names


def test_no_id_or_teacher_becomes_a_file(hostile_studies, tmp_path):
    path, films, names = hostile_studies
    before = set(tmp_path.rglob("*"))
    with serve(lambda *_: completion("Edema is seen.")) as chat:
        selfdistill.run(selfdistill.parse([
            "--preset", "demo", "--studies", str(path), "--images", str(films),
            "--server", chat.url, "--output_dir", str(tmp_path / "run")]))
        entries = {name: {"url": chat.url, "model": "m"} for name in ("../../asked", "gpt-5")}
        (tmp_path / "endpoints.json").write_text(json.dumps(entries))
        collect.run(collect.parse([
            str(path), "--endpoints", str(tmp_path / "endpoints.json"), "--images", str(films),
            "--out", str(tmp_path / "out.jsonl")]))
    run = tmp_path / "run"
    done = (run / "positives.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in done] == names
    assert all(path.name.startswith("test_") for path in tmp_path.parent.glob("*escaped*"))
    new = {file for file in set(tmp_path.rglob("*")) - before if run not in (file, *file.parents)}
    assert new == {tmp_path / name
                   for name in ("endpoints.json", "out.jsonl", "out.jsonl.answers.jsonl")}
    known = {"args.json", "env.json", "finished.json", ".lock", "positives.jsonl", "dropped.jsonl",
             "stats.json"}
    assert {file.name for file in run.iterdir()} <= known


def test_a_file_name_with_a_line_end_makes_no_line_of_its_own(tmp_path, capsys):
    name = f"x\nfinished: all is well {ESCAPES}.png"
    Image.new("L", (30, 30)).save(tmp_path / name)
    (tmp_path / "test.json").write_text(json.dumps([{"file_name": name, "syms": []}]))
    with pytest.raises(ValueError) as caught:
        datasets.chestx_det10(tmp_path)
    assert not records.CONTROL.search(str(caught.value))


# -------------------------------------------------------------------------------------------- bombs

def png_with(kind, content, after=False):
    """A good PNG of 32 x 32 with one more chunk, before or behind its pixels."""
    out = io.BytesIO()
    Image.new("L", (32, 32), 50).save(out, "PNG")
    whole, mark = out.getvalue(), b"IEND" if after else b"IDAT"
    at = whole.index(mark) - 4
    size, check_sum = (struct.pack(">I", n) for n in (len(content), zlib.crc32(kind + content)))
    return whole[:at] + size + kind + content + check_sum + whole[at:]


def packed_zeros(megabytes):
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1_000_000)) for _ in range(megabytes)) + packer.flush()


ZEROS = packed_zeros(200)
IMAGE_BOMBS = {
    "zTXt": png_with(b"zTXt", b"k\0\0" + ZEROS),
    "zTXt behind the pixels": png_with(b"zTXt", b"k\0\0" + ZEROS, after=True),
    "iTXt": png_with(b"iTXt", b"k\0\1\0\0\0" + ZEROS), "iCCP": png_with(b"iCCP", b"k\0\0" + ZEROS),
    "JPEG of 65,500 pixels square":
        b"\xff\xd8\xff\xc0\x00\x0b\x08" + struct.pack(">HH", 65500, 65500)
        + b"\x01\x01\x11\x00\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00",
    "BMP of 2 billion pixels":
        b"BM" + struct.pack("<IHHI", 70, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 50_000, 40_000, 1, 8, 0, 0, 0, 0, 0, 0),
    "TIFF of 4 billion pixels":
        b"II*\0\x08\0\0\0\x06\0"
        + b"".join(struct.pack("<HHII", *tag) for tag in (
            (256, 4, 1, 65000), (257, 4, 1, 65000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, 1, 8))) + b"\0\0\0\0",
    "EPS, which Ghostscript would run":
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n"
        b"(%pipe%touch owned) (w) file\n%%EOF\n",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", IMAGE_BOMBS)
def test_an_image_that_is_larger_than_it_looks_is_refused_in_little_time_and_memory(tmp_path, case):
    (tmp_path / "x.png").write_bytes(IMAGE_BOMBS[case])
    for read in (data.load_image, report.film):
        with within(3), memory_below(80):
            try:
                read("x.png", tmp_path)
                # Pillow may leave such a chunk alone; the film itself is good
                assert "zTXt" in case or "iTXt" in case or case == "iCCP"
            except ValueError as error:
                assert "x.png: " in str(error)
                assert "EPS" not in case or "cannot identify image file" in str(error)


def tiled_tiff(size, tile):
    """A grey TIFF, all of whose tiles are the same zeros."""
    (width, height), (wide, high) = size, tile
    n = -(-width // wide) * -(-height // high)
    zeros = zlib.compress(bytes(wide * high), 9)
    lists = 10 + 12 * 10 + 4
    tags = ((256, 1, width), (257, 1, height), (258, 1, 8), (259, 1, 8), (262, 1, 1), (277, 1, 1),
            (322, 1, wide), (323, 1, high), (324, n, lists), (325, n, lists + 4 * n))
    where = [lists + 8 * n] * n, [len(zeros)] * n
    if n == 1:  # a single number stands in its tag
        tags = (*tags[:8], (324, 1, lists), (325, 1, len(zeros)))
        where = ()
    head = b"II*\0\x08\0\0\0\x0a\0" + b"".join(
        struct.pack("<HHII", tag, 4, count, value) for tag, count, value in tags) + bytes(4)
    return head + b"".join(struct.pack(f"<{n}I", *numbers) for numbers in where) + zeros


def jpeg_in_scans(size, times, **more):
    """A progressive JPEG whose last scan comes again and again."""
    out = io.BytesIO()
    Image.new("L", size, 50).save(out, "JPEG", progressive=True, **more)
    whole, at = out.getvalue()[:-2], out.getvalue().rindex(b"\xff\xda")
    return whole + whole[at:] * times + b"\xff\xd9"


COSTLY_IMAGES = {
    "one large tile": (
        lambda: tiled_tiff((64, 64), (8000, 16000)),
        "64 x 64 pixels in tiles of 8000 x 16000, which are 128,000,000 pixels, expected at most "
        "64,000,000"),
    "tiles longer than the film": (
        lambda: tiled_tiff((8000, 64), (16, 262144)),
        "8000 x 64 pixels in tiles of 16 x 262144, which are 2,097,152,000 pixels, expected at "
        "most 64,000,000"),
    "a small film in thousands of scans": (
        lambda: jpeg_in_scans((112, 112), 60_000),
        "a JPEG of 112 x 112 pixels in 60006 scans, expected at most 100"),
    "a film in a thousand": (
        lambda: jpeg_in_scans((4000, 5000), 1000),
        "a JPEG of 4000 x 5000 pixels in 1006 scans, expected at most 50"),
    "a large film in a hundred": (
        lambda: jpeg_in_scans((8000, 8000), 94),
        "a JPEG of 8000 x 8000 pixels in 100 scans, expected at most 15")}


@pytest.mark.parametrize("case", COSTLY_IMAGES)
def test_an_image_that_costs_far_more_than_its_pixels_is_refused(tmp_path, case):
    make, message = COSTLY_IMAGES[case]
    (tmp_path / "x.png").write_bytes(make())
    with within(1), pytest.raises(data.LargeImage) as caught:
        data.load_image("x.png", tmp_path)
    assert str(caught.value) == f"{tmp_path}/x.png: not a readable image: {message}"


def test_tiles_and_scans_of_ordinary_films_are_read(tmp_path):
    for content in (tiled_tiff((64, 64), (1024, 1024)), tiled_tiff((640, 480), (256, 256)),
                    jpeg_in_scans((112, 112), 0), jpeg_in_scans((112, 112), 90),
                    # a preview and other things that it carries do not count by much
                    jpeg_in_scans((112, 112), 0, exif=b"Exif\0\0" + b"\xff\xda" * 5)):
        (tmp_path / "x.png").write_bytes(content)
        assert data.load_image("x.png", tmp_path).size in ((64, 64), (640, 480), (112, 112))


def test_a_table_that_was_packed_to_a_thousandth_is_refused_in_little_memory(tmp_path):
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [b"study_id,", *[b"a" * 1_000_000] * 300]
    content = b"".join(map(packer.compress, parts)) + packer.flush()
    (tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz").write_bytes(content)
    assert len(content) < 1_000_000 and gzip.open(io.BytesIO(content)).read(9) == b"study_id,"
    too_long = r"chexpert.csv.gz:1: .*a line of less than 1,000,000 bytes"
    with within(3), memory_below(20), pytest.raises(ValueError, match=too_long):
        datasets.chexpert_labels(tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz", ["Edema"])


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
REPORT = "<x><MeSH><automatic>{}</automatic></MeSH></x>"
XML_BOMBS = {
    "a billion laughs":
        f'<!DOCTYPE x [<!ENTITY l0 "pneumonia">{LAUGHS}]>' + REPORT.format("&l11;"),
    "one long entity many times":
        f'<!DOCTYPE x [<!ENTITY a "{"a" * 1_000_000}">]>' + REPORT.format("&a;" * 3000),
    "a file as an entity":
        '<!DOCTYPE x [<!ENTITY a SYSTEM "file://{secret}">]>' + REPORT.format("&a;"),
    "a file as a parameter":
        '<!DOCTYPE x [<!ENTITY % a SYSTEM "file://{secret}"> %a;]>' + REPORT.format("&b;"),
    "a page as a document type":
        '<!DOCTYPE x SYSTEM "http://127.0.0.1:{port}/x.dtd">' + REPORT.format("x"),
    "a hundred thousand levels": "<x>" * 100_000 + "</x>" * 100_000,
    "an attribute of 5 MB": f'<x><parentImage id="{"a" * 5_000_000}"/></x>',
}


@pytest.mark.parametrize("case", XML_BOMBS)
def test_an_open_i_report_cannot_grow_read_files_or_call_out(tmp_path, case):
    secret = tmp_path / "secret.txt"
    secret.write_text("pneumonia")
    write_open_i(tmp_path / "x")
    with serve(lambda *_: b"") as chat:
        _, port = chat.server_address
        content = XML_BOMBS[case].replace("{secret}", str(secret)).replace("{port}", str(port))
        (tmp_path / "x" / "ecgen-radiology" / "1.xml").write_text(content)
        with within(3), memory_below(300):
            try:
                bench = datasets.open_i(tmp_path / "x")
            except ValueError as error:
                assert "1.xml: not an XML file" in str(error) and "pneumonia" not in str(error)
            else:  # harmless: nothing of it became a label
                assert not any(study.labels["Pneumonia"] for study in bench.studies)
        assert not chat.asked


# ----------------------------------------------------------------------------- pickles, remote code

class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


@pytest.fixture
def flag(tmp_path, monkeypatch):
    """The folder that exists if an attack was carried out. Nobody may be asked whether to run code
    either."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asks whether to run the code"))
    flag = tmp_path / "owned"
    yield flag
    assert not flag.exists()


def pickles(flag):
    """Raw, and in the two formats of torch.save."""
    contents = {"raw": pickle.dumps({"model.embed": Evil(flag)})}
    for name, zipped in (("zip", True), ("old", False)):
        out = io.BytesIO()
        torch.save({"model.embed": Evil(flag)}, out, _use_new_zipfile_serialization=zipped)
        contents[name] = out.getvalue()
    return contents


def test_the_pickles_of_these_tests_would_do_their_work(tmp_path):
    contents = pickles(tmp_path / "owned")
    pickle.loads(contents["raw"])
    assert (tmp_path / "owned").exists()
    for name in ("zip", "old"):
        (tmp_path / "owned").rmdir()
        torch.load(io.BytesIO(contents[name]), weights_only=False)
        assert (tmp_path / "owned").exists()


def index_of(folder, file):
    weights = {name: file for name in ("lm_head.weight", "model.embed_tokens.weight")}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))


def adapter(folder):
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder),
        "r": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def config_names_a_pickle(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "pytorch_model.bin"}))


# what is done to a good folder beside the pickles in it; whether it still is a student
STUDENTS = {
    "beside the weights": (lambda f: None, True),
    "instead of the weights": (lambda f: (f / "model.safetensors").unlink(), False),
    "as the weights": (
        lambda f: shutil.copy(f / "pytorch_model.bin", f / "model.safetensors"), False),
    "named by an index": (
        lambda f: ((f / "model.safetensors").unlink(), index_of(f, "pytorch_model.bin")), False),
    "named by the config": (config_names_a_pickle, False),
    "as an adapter": (adapter, None),
}


@pytest.mark.parametrize("kind", ["raw", "zip", "old"])
@pytest.mark.parametrize("case", STUDENTS)
def test_nothing_in_a_students_folder_is_unpickled(base, task, tmp_path, flag, monkeypatch, case,
                                                   kind):
    change, good = STUDENTS[case]
    # also not by its careful unpickler
    monkeypatch.setattr(torch, "load", lambda file, *_, **__: pytest.fail(f"unpickles {file}"))
    folder = tmp_path / "student"
    shutil.copytree(base, folder)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt",
                 "rng_state.pth", "state.pt", "adapter_model.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(pickles(flag)[kind])
    change(folder)
    loaded = None
    with contextlib.suppress(Exception):
        loaded = student.load(folder)
    if good is not None:
        assert (loaded is not None) == good
    student.Processor(folder, task)


@pytest.mark.parametrize("kind", ["raw", "zip", "old"])
def test_nothing_in_a_checkpoint_is_unpickled(tmp_path, flag, kind):
    """Even where its manifest calls the pickle by the right sum."""
    step = tmp_path / "step-000007"
    step.mkdir()
    for name in ("trainable.safetensors", "optimizer-0.safetensors", "optimizer.pt", "state.pt"):
        (step / name).write_bytes(pickles(flag)[kind])
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in step.iterdir()}
    (step / "manifest.json").write_bytes(
        checkpoint.sealed({"step": 7, "sha256": sums, "log": {}}))
    path, _ = checkpoint.newest_checkpoint(tmp_path)
    assert path == step
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(SafetensorError):
        checkpoint.load_checkpoint(path, {"model.embed": weight}, torch.optim.AdamW([weight]))


@pytest.mark.parametrize("what", ["config", "tokenizer", "processor", "generation"])
def test_code_in_a_students_folder_is_never_imported(base, task, tmp_path, flag, what):
    folder = tmp_path / "student"
    shutil.copytree(base, folder)
    code = f"import os\nos.mkdir({str(flag)!r})\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "processing_evil",
                 "__init__", "custom_generate/generate", "sitecustomize"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(code)
    (folder / "custom_generate" / "requirements.txt").write_text("nothing-that-exists\n")

    def add(file, **more):
        known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps({**known, **more}))

    if what == "config":
        add("config.json", architectures=["EvilModel"], auto_map={
            "AutoConfig": "configuration_evil.C", "AutoModel": "modeling_evil.M",
            "AutoModelForImageTextToText": "modeling_evil.M"})
    elif what == "tokenizer":
        add("tokenizer_config.json", tokenizer_class="EvilTokenizer",
            auto_map={"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]})
    elif what == "processor":
        for file in ("preprocessor_config.json", "processor_config.json"):
            add(file, processor_class="EvilProcessor", auto_map={
                "AutoProcessor": "processing_evil.P", "AutoImageProcessor": "processing_evil.I"})
    else:
        add("generation_config.json", custom_generate="custom_generate",
            auto_map={"AutoModel": "modeling_evil.M"})
    model = student.load(folder)
    with contextlib.suppress(ValueError):  # a tokenizer of an unknown class may be refused
        processor = student.Processor(folder, task)
        (folder / "film").mkdir()
        Image.new("L", (56, 56)).save(folder / "film" / "x.png")
        processor.images = folder / "film"
        example = processor(data.Study("a", ("x.png",), {}, {}), "What?")
        sampling.sample(model, processor, [example], ["0"], max_new_tokens=2)
    check.TextLengths(folder, task)
    with contextlib.suppress(Exception):
        teachers.encode(["a text"], folder)
    assert not any("_evil" in name for name in sys.modules)


def test_a_students_chat_template_is_never_run(base, task, tmp_path, flag):
    """The chat is built by student.Processor, so a template is only carried along. A server of the
    student renders it; transformers does so in a sandbox."""
    folder = tmp_path / "student"
    shutil.copytree(base, folder)
    template = (f"{{{{ cycler.__init__.__globals__.os.mkdir('{flag}') }}}}"
                "{{ messages[0]['content'] }}")
    (folder / "chat_template.jinja").write_text(template)
    known = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**known, "chat_template": template}))
    hostile, plain = student.Processor(folder, task), student.Processor(base, task)
    grid = torch.tensor([[1, 4, 4]])
    assert hostile.prefix("What?", grid).tolist() == plain.prefix("What?", grid).tolist()
    with pytest.raises(Exception, match="unsafe|jinja2"):
        hostile.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_the_project_has_no_means_to_run_what_it_reads():
    forbidden = re.compile(
        r"\bpickle\b|torch\.load\b|\bmarshal\b|\bshelve\b|\bjoblib\b|\byaml\b|allow_pickle"
        r"|(?<![.\w])(?:eval|exec)\(|os\.system|shell=True|trust_remote_code=True"
        r"|weights_only=False|\b__import__\(|jinja|apply_chat_template")
    in_folders = (path for path in ROOT.glob("*/*.py") if path.parent.name != "tests")
    for file in (*ROOT.glob("*.py"), *in_folders):
        code = re.sub(r'"""[\s\S]*?"""|#.*', "", file.read_text(encoding="utf-8"))
        if file.name == "shared.py":  # a batch from its own loader process, and no file
            code = code.replace("torch.load(io.BytesIO(content.numpy()), weights_only=False)", "")
        assert not (found := forbidden.search(code)), f"{file.name}: {found[0]}"


# --------------------------------------------------------------- special tokens, the terminal, keys

def test_special_tokens_of_every_text_of_a_study_stay_text_in_the_packed_row(model, base, tmp_path):
    """In ids, teachers' names, trajectories, t+ and prompts, from record to packed row."""
    Image.new("RGB", (56, 56)).save(tmp_path / "x.png")
    processor = student.Processor(base, data.CHEST, tmp_path)
    special = [
        processor.start, processor.end, processor.image_pad, processor.vision_start,
        processor.vision_end, processor.pad]

    def row(text):
        study = data.Study(
            text, ("x.png", "x.png"), {}, {text: text, "b": text}, report=text, t_plus=text)
        prompt = data.compare_prompt(study, data.CHEST, 0) + data.student_prompt(study, data.CHEST)
        example = processor(study, prompt, [study.t_plus, *study.trajectories.values()])
        assert all(response.tolist().count(processor.end) == 1 for response in example["responses"])
        batch = student.pack([example], model)
        return [(batch[name] == token).sum().item()
                for name in ("ids", "targets") for token in special]

    tokens = processor.tokenizer.all_special_tokens
    assert len(tokens) >= 6
    for text in (INJECTION, "".join(tokens), f"<{tokens[0]}{tokens[-1]}>"):
        assert row(text) == row("clear")


def test_nothing_of_a_record_speaks_to_the_terminal(tmp_path, capsys):
    good = {"id": "a", "image": "x.png", "labels": {}, "trajectories": {"b": "Edema."}}
    rows = [
        {**good, "id": f"a{ESCAPES}"}, {**good, "image": f"{ESCAPES}.png"},
        {**good, "trajectories": {ESCAPES: "x"}}, {**good, "labels": {ESCAPES: 1}},
        {**good, "labels": {"Edema": ESCAPES}},
        {**good, "id": "c", "trajectories": {"b": f"I'm sorry, I cannot {ESCAPES}"}}]
    path = tmp_path / "studies.jsonl"
    path.write_bytes(b"".join(map(records.line_of, rows)))
    check.check(check.parse([str(path), "--images", str(tmp_path)]))
    with pytest.raises(ValueError) as caught:
        data.read_studies(path, data.CHEST)
    printed = capsys.readouterr().out + str(caught.value)
    assert printed.count("studies.jsonl:") >= 10
    assert not records.CONTROL.search(printed.replace("\n", ""))


def test_what_is_missing_is_printed_without_control_characters(capsys):
    class Args:
        output, json, strict = None, False, False

    results.end(Args, {"rows": {}, "missing": [f"a{ESCAPES}\nfinished"], "table": "t"})
    out = capsys.readouterr().out
    assert not records.CONTROL.search(out.replace("\n", ""))
    assert out.count("\n") == 3
    assert "\\x1b[2J" in out


def test_a_servers_words_do_not_speak_to_the_terminal(tmp_path):
    for answer in ((400, {"error": {"message": ESCAPES}}), (500, {"detail": ESCAPES}),
                   (401, {"error": ESCAPES}), (200, {"error": {ESCAPES: ESCAPES}})):
        with (serve(lambda *_, answer=answer: answer) as chat,
              pytest.raises(endpoint.Failure) as caught):
            endpoint.complete(endpoint.Endpoint(chat.url, "m"), [])
        assert not records.CONTROL.search(str(caught.value)), ascii(str(caught.value))
    with serve(lambda *_: None) as chat:
        chat.models = [f"a{ESCAPES}", "b"]
        with pytest.raises(ValueError, match="serves a.*, b") as caught:
            sampling.served_model(endpoint.Endpoint(chat.url, ""), chat.url)
    assert not records.CONTROL.search(str(caught.value))


@pytest.mark.parametrize("answer", [
    lambda body, nth: {
        **completion(f"Edema {KEY}.", usage=None, model=KEY),
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, KEY: KEY}, KEY: KEY},
    lambda body, nth: completion(KEY, finish=KEY),
    lambda body, nth: (400, {"error": {"message": f"Authorization: Bearer {KEY}"}}),
    lambda body, nth: (
        (500, KEY.encode()) if nth == 0 else (401, {"error": {"message": KEY, "code": KEY}})),
    lambda body, nth: lambda handler: handler.send(
        429, {"error": str(handler.headers)}, {"Retry-After": "0", "X-Key": KEY}),
    lambda body, nth: json.dumps(completion(KEY)).replace("s", "\\u0073").encode(),
], ids=range(6))
def test_a_key_that_a_server_gives_back_is_in_no_file_and_on_no_screen(tmp_path, monkeypatch, capfd,
                                                                       answer):
    monkeypatch.setenv("A_TEST_KEY", KEY)
    monkeypatch.setattr(endpoint.random.Random, "uniform", lambda self, low, high: 0.01)
    Image.new("L", (56, 56)).save(tmp_path / "x.png")
    (tmp_path / "studies.jsonl").write_bytes(
        records.line_of({"id": "a", "image": "x.png", "labels": {"Edema": 1}}))
    headers = []

    def hear(chat, body, nth):
        reply = answer(body, nth)
        return (200, reply) if isinstance(reply, bytes) else reply

    with serve(hear) as chat:
        do_post = chat.RequestHandlerClass.do_POST

        def listen(handler):
            headers.append(handler.headers["Authorization"])
            do_post(handler)

        monkeypatch.setattr(chat.RequestHandlerClass, "do_POST", listen)
        (tmp_path / "endpoints.json").write_text(
            json.dumps({"a": {"url": chat.url, "model": "m", "key_env": "A_TEST_KEY"}}))
        flags = [tmp_path / "studies.jsonl", "--endpoints", tmp_path / "endpoints.json",
                 "--images", tmp_path, "--out", tmp_path / "out.jsonl", "--attempts", 2, "--json"]
        collect.run(collect.parse([str(word) for word in flags]))
    assert headers and set(headers) == {f"Bearer {KEY}"}
    out, err = capfd.readouterr()
    files = [path for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".png"]
    for content in (out, err, *(path.read_text() for path in files)):
        assert KEY not in content and KEY not in content.replace("\\/", "/")


# ------------------------------------------------------------------------------------------ servers

def endless(handler):
    """A good head, then zeros for ever, in chunks."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"100000\r\n" + b"0" * 0x100000 + b"\r\n")


def ten_gigabytes(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(10 << 30))
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b'"' + b"a" * 0x100000)


def endless_head(handler):
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            handler.wfile.write(b"X-A: " + b"a" * 1000 + b"\r\n")


def endless_line(handler):
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"a" * 0x10000)


def packed(handler):
    handler.send(200, ZEROS, {"Content-Encoding": "deflate"})


def small_values(size):
    """A body of so many bytes that takes as much memory as JSON can."""
    def answer(handler):
        pairs = b'{"":0},' * (size // 7 - 4)
        with contextlib.suppress(OSError):
            handler.send(200, b'{"choices": [' + pairs + b"0]}")
    return answer


@pytest.mark.parametrize("flood", [
    endless, ten_gigabytes, endless_head, endless_line, packed, small_values(16 << 20),
    small_values(endpoint.MAX_ANSWER_BYTES)])
def test_a_server_that_never_stops_talking_is_cut(flood):
    start = time.monotonic()
    with (serve(lambda *_: flood) as chat, memory_below(150),
          pytest.raises(endpoint.Failure) as caught):
        endpoint.complete(endpoint.Endpoint(chat.url, "m", timeout=20), [])
    assert caught.value.kind == "again" and time.monotonic() - start < 15


def test_a_redirect_to_the_metadata_address_connects_to_nobody(monkeypatch):
    connect, asked = socket.socket.connect, []

    def listen(self, address):
        host, _ = address
        asked.append(host)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", listen)
    for status in (301, 302, 307, 308):
        for place in ("http://169.254.169.254/latest/meta-data/", "//169.254.169.254/",
                      "file:///etc/passwd", "http://[fd00:ec2::254]/"):
            answer = status, b"", {"Location": place}
            with (serve(lambda *_, a=answer: a) as chat,
                  pytest.raises(endpoint.Failure, match="redirects are not followed")):
                endpoint.complete(endpoint.Endpoint(chat.url, "m"), [])
    assert asked and set(asked) == {"127.0.0.1"}
    with pytest.raises(ValueError, match="169.254.169.254 is not this machine"):
        endpoint.Endpoint("http://169.254.169.254/v1", "m")


def test_nesting_of_any_depth_is_a_failure_and_no_other_exception():
    """Where Python gives up depends on how deep the caller is, so an answer just below that depth
    could break whoever writes it."""
    def written(value, below=40):
        return written(value, below - 1) if below else json.dumps(value)

    for depth in (50, 99, 101, *range(300, 1000, 10), 100_000):
        with contextlib.suppress(ValueError):
            nested = b"[" * depth + b"]" * depth
            written(endpoint._parse(b'{"choices": [], "usage": {"a": ' + nested + b"}}", KEY))


@pytest.mark.parametrize("usage", [
    {"prompt_tokens": 10 ** 400, "completion_tokens": 1},
    {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 10 ** 4000},
    {"prompt_tokens": -1, "completion_tokens": 1}, {"prompt_tokens": True, "completion_tokens": 1}])
def test_a_bill_that_no_number_holds_is_no_bill(usage):
    counted = endpoint.count(usage)
    assert counted is None or all(0 <= tokens < 1 << 53 for tokens in counted)


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(
    value=st.text(max_size=30) | st.from_regex(
        r"[A-Z][a-z]{2}, \d{1,5} [A-Z][a-z]{2} \d{1,6} \d{1,3}:\d{1,3}:\d{1,3} [A-Z+\-0-9]{0,9}",
        fullmatch=True),
    text=st.text(max_size=30) | st.from_regex(r'\{"retryDelay": "[\d.]{1,400}s"\}', fullmatch=True))
def test_no_wish_to_wait_is_an_exception(value, text):
    for headers in ({"Retry-After": value}, {}):
        wait = endpoint._wait(headers, text)
        assert wait is None or 0 <= wait < float("inf")
