"""The rows of the ladder, by the names that tables, figures and results.json give them."""

from scale_model.world import TEACHERS

# how a student is asked, see scoring.py
MODES = ("sampled", "voiced", "greedy")

BEST = "best teacher"
VOTE = "vote of the teachers"
T_PLUS = "t+ itself"
ONE = "SPD, one teacher"
ALL = "SPD, all teachers"
NO_REPLAY = "SPD, all, without replay"
CONTINUED = "SPD, all, continued"
TUNED = "SPD, all + fine-tuning on t+"
LORA = "SPD, all + APO (LoRA)"
MERGER = "SPD, all + APO (merger)"
FULL = "SPD, all + APO (full)"
SHUFFLED = "APO (LoRA), t+ shuffled"
ORACLE = "APO (LoRA), t+ an oracle vote"
U_T_PLUS = "t+ itself, base untaught"
U_ALL = "SPD, all, base untaught"
U_APO = "SPD, all + APO, base untaught"

# in the order of the tables
ROWS = ("label prior", *TEACHERS, BEST, VOTE, T_PLUS, ONE, ALL, NO_REPLAY, CONTINUED, TUNED, LORA,
        MERGER, FULL, SHUFFLED, ORACLE, U_T_PLUS, U_ALL, U_APO)


def mean_accuracy(cell, mode):
    """The mean accuracy of a cell: of a student's answers in that mode, or of texts as given."""
    return cell.get(mode, cell.get("given"))["mean"]
