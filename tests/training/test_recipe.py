import pytest
import yaml
from pydantic import BaseModel

from tokenformer.data import section as data_module
from tokenformer.errors import RecipeError
from tokenformer.sections import fields
from tokenformer.training import recipe as module
from tokenformer.training.recipe import EXAMPLE, Recipe, TrainingSection, load_recipe, parse_recipe

MINIMAL = {"model": {"preset": "1m-ffn"}, "data": {"source": "x"}, "stages": [{"text_tokens": 10}]}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def changed(**sections):
    """The minimal recipe with sections updated, or taken out where None."""
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in MINIMAL.items()}
    for key, value in sections.items():
        if value is None:
            del content[key]
        elif isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key] = content[key] | value
        else:
            content[key] = value
    return content


def refusal(content):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content)
    return str(caught.value)


def test_the_example_is_a_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path / "r.yaml", EXAMPLE))
    assert recipe.model.preset == "1m-modern" and recipe.data.source == "shakespeare"
    assert (recipe.training.batch_size, recipe.training.sequence_length) == (16, 128)
    assert [stage.text_tokens for stage in recipe.stages] == [1_000_000, 1_000_000]
    assert recipe.stages[0].growth == {}
    assert recipe.stages[1].growth == {"ffn_param_tokens": "+100%", "name": None}
    assert parse_recipe(recipe.model_dump(mode="json", exclude_unset=True)) == recipe


@pytest.mark.parametrize(
    ("written", "read"),
    [("+256", "+256"), ('"+256"', "+256"), ("+50%", "+50%"), ("+1_000", "+1_000"), ("256", 256), ("1_024", 1024)],
)
def test_additions_survive_yaml(tmp_path, written, read):
    """YAML's own +256 is the integer 256: a total, where an addition was meant."""
    assert yaml.safe_load("+256") == 256
    recipe = load_recipe(write(tmp_path / "r.yaml", f"{EXAMPLE}  - {{ffn_param_tokens: {written}, text_tokens: 1}}\n"))
    value = recipe.stages[2].ffn_param_tokens
    assert value == read and type(value) is type(read)


def test_a_plus_is_harmless_where_a_number_is_wanted(tmp_path):
    text = EXAMPLE.replace("1_000_000", "+2_000").replace("batch_size: 16", "learning_rate: +2e-3")
    recipe = load_recipe(write(tmp_path / "r.yaml", text))
    assert recipe.stages[0].text_tokens == 2000 and recipe.training.learning_rate == 2e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(stages=[{"text_tokens": 1}, {"txt_tokens": 1}]), "'stages.1.txt_tokens'; did you mean 'text_tokens'?"),
        (changed(stages=[{"text_tokens": 1}, {"batch_size": 1}]), "'stages.1.text_tokens' is missing"),
        (changed(training={"batchsize": 1}), "unknown key 'training.batchsize'; did you mean 'batch_size'?"),
        (changed(modell={}), "unknown key 'modell'; did you mean 'model'?"),
        (
            changed(data={"zzz": 1}),
            "unknown key 'data.zzz'; known keys: source, mixture, validation_source, validation_split, text_column",
        ),
        (changed(model=None), "'model' is missing"),
        (changed(data={"source": None}), "data: name one text as source, or several with their weights as mixture"),
        (changed(stages=None), "'stages' is missing"),
        (changed(stages=[]), "stages is []: list should have at least 1 item"),
        (changed(stages={"text_tokens": 1}), "stages is {'text_tokens': 1}: input should be a valid list"),
        (changed(stages=[{"text_tokens": "many"}]), "stages.0.text_tokens is 'many': input should be a valid integer"),
        (changed(stages=[{"text_tokens": 0}]), "stages.0.text_tokens is 0: input should be greater than 0"),
        (changed(stages=[{"text_tokens": 1.5}]), "stages.0.text_tokens is 1.5: input should be a valid integer"),
        (changed(training={"sequence_length": 1}), "training.sequence_length is 1: input should be greater than 1"),
        (
            changed(training={"schedule": "linear"}),
            "training.schedule is 'linear': input should be 'wsd', 'cosine' or 'constant'",
        ),
        (changed(data={"validation_fraction": 0.9}), "data.validation_fraction is 0.9: input should be less than 0.5"),
        (changed(model={"preset": "9m"}), "model: there is no preset '9m'; did you mean 900m or 8m or 4m?"),
        (
            changed(stages=[{"text_tokens": 1, "ffn_param_tokens": "+50%"}]),
            "\n  stages.0 grows, but the first stage trains `model`: put its sizes there",
        ),
        (
            changed(stages=[{"text_tokens": 1}, {"text_tokens": 1, "name": "new"}]),
            "\n  stages.1 names a token group 'new' but adds no parameter tokens",
        ),
        (
            changed(stages=[{"text_tokens": 1, "group": "new"}]),
            "unknown key 'stages.0.group'; it is called 'name' now",
        ),
        (
            changed(stages=[{"text_tokens": 1, "token_group_norm": "joint"}]),
            "unknown key 'stages.0.token_group_norm'; it is called 'norm' now",
        ),
        (
            changed(model={"preset": "1m-ffn", "hidden_size": 64, "checkpoint": "c"}),
            "model: checkpoint brings its own sizes; take out hidden_size, preset, or grow in a stage",
        ),
    ],
)
def test_refusals(content, message):
    assert message in refusal(content)


def test_every_problem_is_told_at_once_with_the_file(tmp_path):
    text = EXAMPLE.replace("batch_size: 16", "batch_size: -1").replace("tokenizer", "tokeniser")
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).splitlines() == [
        f"{path}:",
        "  unknown key 'data.tokeniser'; did you mean 'tokenizer'?",
        "  training.batch_size is -1: input should be greater than 0",
    ]


def test_the_first_stage_may_grow_a_checkpoint():
    recipe = parse_recipe(changed(model={"checkpoint": "c"}) | {"model": {"checkpoint": "c"}})
    assert recipe.model.checkpoint == "c"
    grown = [{"text_tokens": 1, "ffn_param_tokens": "+50%", "name": "new"}]
    recipe = parse_recipe(changed(stages=grown) | {"model": {"checkpoint": "c"}})
    assert recipe.stages[0].growth == {"ffn_param_tokens": "+50%", "name": "new"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "r.yaml is not valid YAML: "),
        ("data:\n  mixture: {a: 1, b: 2, a: 3}", r"not valid YAML: 'a' is written twice\n.*line 2, column 12"),
        ("a: \x07", "r.yaml is not valid YAML: "),
        ("model: !!python/name:os.system", "r.yaml is not valid YAML: "),
        ("é: 1".encode("latin1"), "cannot read recipe .*r.yaml: not UTF-8 text"),
        ("- model", "r.yaml holds list, not keys such as model, data, images, training, stages, seed"),
        ("", "r.yaml holds nothing, not keys"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path / "r.yaml", text))


def test_missing_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read recipe .*nope.yaml: No such file"):
        load_recipe(tmp_path / "nope.yaml")
    with pytest.raises(RecipeError, match=r"cannot read recipe .*: Is a directory"):
        load_recipe(tmp_path)


def test_sizes_that_make_no_model():
    with pytest.raises(ValueError, match=r"make no model: hidden_size 65 is not a multiple of num_attention_heads 4$"):
        parse_recipe(changed(model={"hidden_size": 65, "num_attention_heads": 4})).model.config(vocab_size=8)
    config = parse_recipe(changed(model={"ffn_param_tokens": 99})).model.config(vocab_size=8)
    assert (config.ffn_param_tokens, config.vocab_size) == (99, 8)


def test_every_field_is_explained():
    explained = {key: meaning for key, _, _, meaning in fields(Recipe)}
    here = [*vars(module).values(), *vars(data_module).values()]
    sections = [s for s in here if isinstance(s, type) and issubclass(s, BaseModel)]
    names = {name for s in sections for name in s.model_fields}
    assert names == {key.rpartition(".")[2] for key in explained} and len(names) > 40
    assert {key: meaning for key, meaning in explained.items() if not meaning.strip().endswith(".")} == {}


def test_explained_types_and_defaults():
    rows = {key: (kind, default) for key, kind, default, _ in fields(Recipe)}
    assert rows["stages"] == ("section", "")
    assert rows["stages[].text_tokens"] == ("integer", "")
    assert rows["stages[].ffn_param_tokens"] == ("integer or text", "")
    assert rows["training.schedule"] == ("wsd or cosine or constant", "wsd")
    assert rows["data.streaming"] == ("true or false", "False")
    assert rows["training.learning_rate"] == ("number", "0.001")


@pytest.mark.parametrize("key", [key for key, kind, _, _ in fields(Recipe) if kind != "section"])
def test_a_slip_in_any_key_is_answered_with_that_key(key):
    section, _, name = key.replace("[]", ".0").rpartition(".")
    slip = name + "x"
    content = {"model": {}, "data": {"source": "x"}, "training": {}, "stages": [{"text_tokens": 1}]}
    at = content
    for part in section.split(".") if section else []:
        at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
    at[slip] = 1
    assert f"did you mean {name!r}?" in refusal(content)


def test_recipes_are_frozen():
    recipe = parse_recipe(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    assert isinstance(recipe, Recipe)


def test_defaults_follow_the_optimizer():
    """A comparison's arm may ask for another optimizer, and then has that one's; what was asked for stays."""
    muon = TrainingSection(optimizer="muon", head_rate=0.5)
    assert (muon.learning_rate, muon.embedding_rate, muon.head_rate, muon.weight_decay) == (0.02, 5.0, 0.5, 0.0)
    given = muon.model_dump(exclude_unset=True)
    assert given == {"optimizer": "muon", "head_rate": 0.5}
    adamw = TrainingSection(**{**given, "optimizer": "adamw"})
    assert (adamw.learning_rate, adamw.embedding_rate, adamw.head_rate, adamw.weight_decay) == (1e-3, 1.0, 0.5, 0.1)
    assert muon.model_copy(update={"batch_size": 4}).learning_rate == 0.02
