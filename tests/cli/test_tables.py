"""Tables within 80 columns, and the same facts for machines."""

import io

import pytest
from rich.console import Console
from torch import tensor

from tokenformer.checkpoints.lineage import Event, Lineage
from tokenformer.cli.displays import TrainingDisplay
from tokenformer.cli.tables import group_table, lineage_table, tabulate, task_table, text_table
from tokenformer.cli.use_tables import activity_table
from tokenformer.growth.importance import GroupUse, Importance
from tokenformer.units import amount, counted, scientific, short

LONG = "a-name-far-longer-than-a-column-has-room-for/" * 3


def shown(table, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def use(size):
    numbers = tensor([0.5, 123.456] * (size // 2))
    return GroupUse(active=numbers / 200, weight_std=numbers, key_norm=numbers * 1e4, value_norm=numbers * 1e4)


BIG = {"tokens": 123_456_789_012, "parameters": 98_765_432_101, "bytes": 987_654_321_012_345}
COUNTS = {projection: [262_144, 1_048_576] for projection in ("qkv", "output")}
EVENT = Event(
    operation="consolidate",
    arguments={**{"k" * n: f"+{n}000%" for n in range(8, 17)}, "names": LONG},
    parent="ab" * 32,
    text_tokens_seen=15_123_456_789_012,
    training_flops=1.2345e26,
    loss=10.98765,
)
TASK = {"acc,none": 0.12345, "acc_stderr,none": 0.0123, "perplexity,strict": 123456.789}
TABLES = {
    "groups": (
        group_table(
            [
                {
                    **BIG,
                    "name": LONG,
                    "notes": ["routed", "frozen"],
                    "counts": COUNTS,
                }
            ],
            BIG,
        ),
        ["262144–1048576", "123 B", "98.8 B", "987,654,321.0"],
    ),
    "lineage": (
        lineage_table(Lineage(history=[EVENT])),
        [EVENT.date[:10], "15.1 T", "1.23e26", "10.9877", *(f"+{n}000%" for n in range(8, 17))],
    ),
    "text": (
        text_table([{"source": LONG, "text_tokens": 15e12, "loss": 10.98765, "bits_per_byte": 8.7654}], 131_072),
        ["15 T", "10.9877", "8.7654"],
    ),
    "tasks": (
        task_table({"results": {LONG: TASK}, "n-samples": {LONG: {"effective": 1_234_567}}}),
        ["0.1235", "0.0123", "123456.7890", "1234567"],
    ),
    "use": (
        activity_table(
            Importance(
                text_tokens=10**9,
                linear=frozenset(),
                uses={(99, name): {"python_extra": use(1_048_576)} for name in ("self_attn.q_proj", "mlp")},
                projections={"self_attn.q_proj": "qkv", "mlp": "ffn"},
            )
        ),
        ["6.2e+05", "1.05 M", "99"],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_no_number_is_cut_in_80_columns(name):
    table, numbers = TABLES[name]
    lines = shown(table).splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in shown(table)
    for number in numbers:
        assert any(number in line for line in lines), f"{number} is cut or wrapped in\n{shown(table)}"


def test_words_fold_where_numbers_need_the_room():
    table = tabulate(("name",), ("a", "b"), [(LONG, "1" * 30, "2" * 30), None, ("[i]", "3")])
    text = shown(table)
    assert "1" * 30 in text and "2" * 30 in text and "[i]" in text and "…" not in text


@pytest.mark.parametrize(
    ("write", "number", "text"),
    [
        (short, 999, "999"),
        (short, 999.6, "1 k"),
        (short, 1_310_000_000, "1.31 B"),
        (short, 999_999_999, "1 B"),
        (scientific, 1.4e22, "1.40e22"),
        (amount, 9.444, "9.44"),
        (amount, 5706, "5,706"),
        (amount, 987_654_321, "988 M"),
        (lambda n: counted(n, "text block"), 0, "0 text blocks"),
        (lambda n: counted(n, "text block"), 1, "1 text block"),
        (lambda n: counted(n, "text block"), 1000, "1,000 text blocks"),
    ],
)
def test_units(write, number, text):
    assert write(number) == text


def test_a_bar_tells_what_is_left_while_something_is():
    shown = {}
    for step in (1, 2):
        display = TrainingDisplay(Console(width=80, file=io.StringIO()))
        for event in (
            {"event": "stage", "steps": 2, "done": 0, "parameters": 1e4, "reads": {}},
            {"event": "progress", "step": step},
        ):
            display({"stage": 1, **event})
        display.console.print(display.bar)
        shown[step] = display.console.file.getvalue()
    assert " 50%" in shown[1] and "left" in shown[1]
    assert "100%" in shown[2] and "left" not in shown[2]
