"""What a configuration says of token groups, and back."""

import pytest
from tiny_models import tiny

from tokenformer import grow
from tokenformer.growth.architectures import GroupEntry, token_groups, with_groups

ENTRIES = [
    {"name": "base", "qkv": 8, "output": 0, "ffn": 16},
    {"name": "new", "qkv": 0, "output": 0, "ffn": [4, 0, 6], "routed": True, "blocks": [1, 2]},
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_an_entry_is_read_and_written_as_it_was(entry):
    assert GroupEntry.from_config(entry).to_config() == entry


def test_counts_of_blocks():
    base, new = map(GroupEntry.from_config, ENTRIES)
    assert [base.count("ffn", block) for block in range(3)] == [16, 16, 16] and base.over("ffn") == (16,)
    assert [new.count("ffn", block) for block in range(3)] == [4, 0, 6] and new.over("ffn") == (4, 0, 6)
    assert new.count("output", 1) == 0 and new.count("of no such kind", 1) == 0


def test_an_entry_follows_its_blocks():
    _, new = map(GroupEntry.from_config, ENTRIES)
    after = new.with_blocks([0, 0, 1, 2])
    assert after.over("ffn") == (4, 4, 0, 6) and after.blocks == (2, 3) and after.routed


def test_what_all_blocks_have_alike_is_written_as_one_number():
    assert GroupEntry("new", {"ffn": (4, 4, 4)}).to_config() == {"name": "new", "ffn": 4}


def test_a_configuration_with_its_own_groups_is_the_same():
    model = tiny()
    grow(model, ffn_param_tokens="+8", num_hidden_layers="+1", name="new")
    again = with_groups(model.config, token_groups(model.config))
    assert again.to_dict() == model.config.to_dict() and again is not model.config
