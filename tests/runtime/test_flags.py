"""Numbers of flags: what each one refuses, in which words, and the ends that it takes."""

import ast

import collect
import drift
import pytest
from conftest import ROOT

import apo
import evaluate
import experiment.__main__ as experiment
import scale_model.__main__ as scale_model
import selfdistill
import spd

NO_NUMBER = ("nan", "inf", "-inf", "1e999", "x", "")
CLASSIFY = ("classify", "--studies", "s", "--student", "m")
REPORTS = ("reports", "--annotation", "a", "--student", "m")
TEACHERS = ("teachers", "--studies", "s")
MAKE = ("make", "--out", "w")
COLLECT = ("s", "--endpoints", "e", "--out", "o")
DRIFT = ("--studies", "s")

ABOVE_ZERO = ("a number above 0", ("0", "-1", "-0.0", *NO_NUMBER), ("1e-9", "7"))
ZERO_OR_MORE = ("a number, 0 or more", ("-1e-9", *NO_NUMBER), ("0", "2.5"))
BELOW_ONE = ("a number from 0 to less than 1", ("-0.1", "1", "2", *NO_NUMBER), ("0", "0.999"))
ZERO_TO_ONE = ("a number from 0 to 1", ("-0.1", "1.1", *NO_NUMBER), ("0", "0.5", "1"))
UP_TO_ONE = ("a number above 0, 1 at most", ("0", "-0.1", "1.01", *NO_NUMBER), ("1e-3", "0.5"))
WHOLE = ("a whole number of at least 1", ("0", "-1", "1.5", *NO_NUMBER), ("1", "32"))
COUNT = ("a whole number, 0 or more", ("-1", "1.5", *NO_NUMBER), ("0", "4"))
SEED = ("a whole number from 0 to 2**63 - 1", ("-1", "0.5", str(2**63), *NO_NUMBER),
        ("0", str(2**63 - 1)))
# (command, the words before the flag, flag) -> what it expects, what it refuses, what it takes
NUMBERS = {
    **{(command, (), "seed"): SEED for command in (spd, selfdistill, apo)},
    **{(command, (), flag): kind for command in (spd, apo) for flag, kind in {
        "lora_alpha": WHOLE, "lora_r": WHOLE, "lora_dropout": BELOW_ONE, "max_steps": WHOLE,
        "num_epochs": WHOLE, "global_batch": WHOLE, "micro_batch": COUNT, "warmup_steps": COUNT,
        "max_length": WHOLE, "max_tokens": WHOLE,
        "min_learning_rate": ("a number, 0 or more", ZERO_OR_MORE[1], ("0", "1e-9")),
        "learning_rate": ("a number above 0", ABOVE_ZERO[1], ("1e-6", "1")),
        "adam_beta1": BELOW_ONE, "adam_beta2": BELOW_ONE, "weight_decay": ZERO_OR_MORE,
        "max_grad_norm": ZERO_OR_MORE}.items()},
    # the preset's --warmup_steps excludes a ratio
    (spd, ("--warmup_steps=0",), "warmup_ratio"): ZERO_TO_ONE,
    (apo, (), "warmup_ratio"): ZERO_TO_ONE, (spd, (), "replay_weight"): ZERO_OR_MORE,
    (apo, (), "beta"): ABOVE_ZERO, (apo, (), "nll_alpha"): ZERO_OR_MORE,
    (selfdistill, (), "temperature"): ZERO_OR_MORE, (selfdistill, (), "top_p"): UP_TO_ONE,
    (evaluate, CLASSIFY, "bootstrap"): COUNT, (evaluate, CLASSIFY, "num_workers"): COUNT,
    (evaluate, CLASSIFY, "seed"): SEED, (evaluate, REPORTS, "seed"): SEED,
    (evaluate, TEACHERS, "seed"): SEED, (evaluate, TEACHERS, "num_workers"): COUNT,
    (scale_model, MAKE, "seed"): SEED, (scale_model, MAKE, "train"): COUNT,
    (scale_model, MAKE, "replay"): COUNT,
    (scale_model, MAKE, "drift"): ("a number", NO_NUMBER, ("0", "-0.5", "3")),
    (scale_model, MAKE, "change"): ZERO_TO_ONE,
    **{(experiment, ("ladder",), flag): kind for flag, kind in {
        "seeds": SEED, "jobs": WHOLE, "films": WHOLE, "max_steps": WHOLE,
        "base_steps": WHOLE}.items()},
    (collect, COLLECT, "budget"): ("a number above 0", ABOVE_ZERO[1], ("0.01", "50")),
    (drift, DRIFT, "alpha"): (UP_TO_ONE[0], UP_TO_ONE[1], ("0.01", "0.5")),
    (drift, DRIFT, "seed"): SEED,
    (drift, DRIFT, "max_pixels"): WHOLE, (drift, DRIFT, "max_tokens"): WHOLE,
    (drift, DRIFT, "num_workers"): COUNT,
}


@pytest.mark.parametrize(
    "where", NUMBERS, ids=lambda where: f"{where[0].__name__} --{where[2]}")
def test_a_number_that_makes_no_sense_is_refused_and_the_ends_are_taken(where, capsys):
    command, words, flag = where
    expected, refused, taken = NUMBERS[where]
    for value in refused:
        with pytest.raises(SystemExit) as end:
            command.parse([*words, f"--{flag}={value}"])
        said = capsys.readouterr().err
        assert end.value.code == 2 and f"--{flag}" in said, value
        # of --budget argparse itself says what is no number
        assert f"expected {expected}" in said or command is collect and "invalid float" in said
    for value in taken:
        found = getattr(command.parse([*words, f"--{flag}={value}"]), flag)
        assert found in (ast.literal_eval(value), [ast.literal_eval(value)])


@pytest.mark.parametrize("command", [spd, apo])
def test_the_learning_rate_does_not_end_above_its_peak(command, capsys):
    for words in (["--learning_rate", "1e-8"],
                  ["--learning_rate", "1e-5", "--min_learning_rate", "2e-5"]):
        with pytest.raises(SystemExit) as end:
            command.parse(words)
        assert end.value.code == 2
        assert "expected at most --learning_rate" in capsys.readouterr().err
    assert command.parse(["--learning_rate", "1e-8", "--min_learning_rate", "0"])
    assert command.parse(["--learning_rate", "1e-8", "--min_learning_rate", "1e-8"])


@pytest.mark.parametrize("command", [spd, apo])
def test_the_warm_up_is_said_once(command, capsys):
    for preset, words, said in (
            ("demo", ["--warmup_steps", "3", "--warmup_ratio", "0.1"], "3 with --warmup_ratio 0.1"),
            ("released", ["--warmup_steps", "20"], "20 with --warmup_ratio 0.05")):
        with pytest.raises(SystemExit) as end:
            command.parse(["--preset", preset, *words])
        assert end.value.code == 2
        assert (f"--warmup_steps {said}: expected one of them, and 0 for the other where --preset "
                f"{preset} sets it") in capsys.readouterr().err
    args = command.parse(
        ["--preset", "released", "--warmup_steps", "20", "--warmup_ratio", "0"])
    assert (args.warmup_steps, args.warmup_ratio) == (20, 0)
    assert command.parse(["--warmup_steps", "0", "--warmup_ratio", "0.1"]).warmup_ratio == 0.1


def test_no_flag_takes_just_any_float():
    """A bare type=float takes NaN, which is neither too small nor too large."""
    found = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        if path.parent.name == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument"):
                kinds = [word for word in node.keywords if word.arg == "type"]
                if kinds and ast.unparse(kinds[0].value) == "float":
                    found.add((path.name, ast.literal_eval(node.args[0])))
    assert found == {("collect.py", "--budget")}  # which looks at its value itself
