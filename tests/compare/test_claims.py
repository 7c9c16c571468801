import pytest

from tokenformer.compare.claims import Ground, doubts
from tokenformer.compare.tuning import Tuning

TUNED = Tuning(1e-2, [object()], settled=True, end=None)
SOUND = Ground(text=20.0, tuning=TUNED, drowned=[])


def but(**changes):
    return [SOUND, Ground(**{**vars(SOUND), **changes})]


def test_enough_text_a_rate_inside_and_sound_scales_make_a_claim():
    assert doubts([SOUND, SOUND]) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": 19.9}, "arms read 19.9 to 20 text tokens a parameter, where a claim about quality needs 20 or more"),
        ({"text": 4.12}, "arms read 4.12 to 20 text tokens a parameter, where"),
        ({"tuning": Tuning(1e-2, [], settled=True, end=None)}, "the learning rates of 1 of 2 arms were not tuned"),
        (
            {"tuning": Tuning(1e-2, [object()], settled=True, end="largest")},
            "the learning rates of 1 of 2 arms lie at the end of those that were tried",
        ),
        (
            {"tuning": Tuning(1e-2, [object()], settled=False, end=None)},
            "the learning rates of 1 of 2 arms are not settled",
        ),
        ({"drowned": None}, "the initial scales of 1 of 2 arms were not measured"),
        ({"drowned": ["the attention of block 1 …"]}, "parts of 1 of 2 arms drown the others at initialisation"),
    ],
)
def test_each_reason_alone_makes_a_first_look(changes, reason):
    [told] = doubts(but(**changes))
    assert told.startswith(reason)


def test_all_reasons_are_told():
    unsound = Ground(text=1.0, tuning=Tuning(1e-2, [object()], settled=True, end="smallest"), drowned=["…"])
    assert len(doubts([unsound])) == 3
