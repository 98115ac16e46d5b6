"""Overrides that are no key=value, choose nothing or change nothing: one line that names them, before Hydra runs."""

import pytest

from foreshock.experiments.cli import check_overrides
from foreshock.experiments.overrides import _closes, check_form

FORM = "key=value, or ~key to drop one"

MALFORMED = [
    ("tr =", r"'tr =' is not allowed: 'tr ' is no key, which is names of ASCII letters with dots between; " + FORM),
    ("trian =3", "'trian =3' is not allowed: 'trian ' is no key, .*; the nearest are 'train', 'track'"),
    ("trän.steps=3", r"'trän\.steps=3' is not allowed: 'trän\.steps' is no key"),
    ("1a=3", "'1a=3' is not allowed: '1a' is no key"),
    ("train.-a=3", r"'train\.-a=3' is not allowed: 'train\.-a' is no key"),
    (" seed=1", "' seed=1' is not allowed: ' seed' is no key, .*nearest (is|are) 'seed'"),
    ("=3", "'=3' is not allowed: no key stands before '='; " + FORM),
    ("=", "'=' is not allowed: no key stands before '='"),
    ("train.=3", r"'train\.=3' is not allowed: 'train\.' is no key"),
    (".train=3", r"'\.train=3' is not allowed: '\.train' is no key"),
    ("train..steps=3", r"'train\.\.steps=3' is not allowed: 'train\.\.steps' is no key"),
    ("steps", "'steps' is not allowed: " + FORM),
    ("train.steps", r"'train\.steps' is not allowed: " + FORM),
    ("++", r"'\+\+' is not allowed: " + FORM),
    ("++=3", r"'\+\+=3' is not allowed: no key stands before '='"),
    ("~", "'~' is not allowed: no key stands before 'the end'"),
    ("~=", "'~=' is not allowed: no key stands before '='"),
    ("~ train", "'~ train' is not allowed: ' train' is no key"),
    ("train.steps=[3", r"train\.steps=\[3 cannot be read: a bracket or a quote of its value '\[3' has no partner"),
    ("train.steps=3]", r"train\.steps=3\] cannot be read: a bracket or a quote"),
    ("train.betas=[0.9,0.95)", r"train\.betas=\[0\.9,0\.95\) cannot be read: a bracket or a quote"),
    ("train={steps: 3", r"train=\{steps: 3 cannot be read: a bracket or a quote"),
    ("out='runs", "out='runs cannot be read: a bracket or a quote"),
    ('out="runs', 'out="runs cannot be read: a bracket or a quote'),
]
CHOOSES_NOTHING = [
    "fault=null", "fault=NULL", "fault=[]", "model=null", "data=", "train=null", "monitor=null", "monitor=[]",
    "monitor=[ ]",
]  # fmt: skip
CHOOSES_NOTHING_OF_AN_EXPERIMENT = ["experiment=null", "scale=null", "label=", "rule=null"]
CHANGES_NOTHING = [
    ("reproduce", "experiment.detectors={}", r"\(.*conservation laws.*\)$"),
    ("reproduce", "++experiment.detectors={ }", r"\(.*conservation laws.*\)$"),
    ("reproduce", "experiment.faults={}", r"\(attention.*\); '~experiment\.faults\.NAME' drops one$"),
    ("reproduce", "scale.seeds={}", r"\(reference, .*\); '~scale\.seeds\.NAME' drops one$"),
]


@pytest.mark.parametrize(("line", "message"), MALFORMED)
def test_a_malformed_override_is_named(line, message):
    with pytest.raises(ValueError, match=message) as error:
        check_overrides("config", [line])
    assert "\n" not in str(error.value) and "Exception" not in str(error.value)


@pytest.mark.parametrize(
    ("config_name", "line"),
    [
        *(("config", line) for line in CHOOSES_NOTHING),
        *(("reproduce", line) for line in CHOOSES_NOTHING_OF_AN_EXPERIMENT),
    ],
)
def test_a_group_of_which_nothing_is_chosen_is_named_with_its_files(config_name, line):
    with pytest.raises(ValueError, match=r"^\w+=.* is not allowed: one of \w+") as error:
        check_overrides(config_name, [line])
    assert str(error.value).startswith(f"{line} is not allowed")


@pytest.mark.parametrize(("config_name", "line", "said"), CHANGES_NOTHING)
def test_an_empty_mapping_that_drops_nothing_is_refused(config_name, line, said):
    with pytest.raises(ValueError, match="has no effect: it adds no key to those that are there " + said):
        check_overrides(config_name, [line])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fault=none,null", "fault=null is not allowed: one of "),
        ("hydra/launcher=null", "hydra/launcher=null is not allowed: hydra/launcher=NAME chooses one"),
        ("monitor=[]", "monitor=[] is not allowed: one of .*, all$"),
    ],
)
def test_nothing_chosen_of_a_group_in_a_sweep_of_hydra_or_where_all_is_one(line, said):
    with pytest.raises(ValueError, match="^" + said.replace("[]", r"\[\]")):
        check_overrides("config", ["-m", line])


@pytest.mark.parametrize(
    "line",
    [
        "data.path='a [b'", r"out=a\'b", "model.moe=null", "fault@second=none", "+model/extra=null", "seed=null",
        "train.betas=[0.9,0.95]", "out='it is \"quoted\"'", "plugins=[]",
    ],
)  # fmt: skip
def test_what_is_well_formed_passes_the_form(line):
    check_form(line, ["data", "model"])
    assert _closes(line.partition("=")[2])
