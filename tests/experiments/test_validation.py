"""Arguments of a class are held against its own parameters, whatever was checked before them."""

import pytest

from foreshock.experiments.validation import check_arguments, parameters_of


def of_a_count():
    class Thing:
        def __init__(self, size: int = 1) -> None: ...

    return Thing


def of_a_switch():
    class Thing:
        def __init__(self, size: bool = True) -> None: ...

    return Thing


def of_sizes():
    class Thing:
        def __init__(self, sizes: list[int] = [1]) -> None: ...  # noqa: B006  # as a plugin may write it

    return Thing


def test_two_classes_of_one_name_have_their_own_parameters():
    count, switch = parameters_of(of_a_count()), parameters_of(of_a_switch())
    for _ in range(2):
        assert check_arguments("Thing", {"size": count["size"]}, {"size": 3}, "fault") == {"size": 3}
        assert check_arguments("Thing", {"size": switch["size"]}, {}, "fault") == {"size": True}
        with pytest.raises(ValueError, match=r"fault\.size=3 is not allowed"):
            check_arguments("Thing", {"size": switch["size"]}, {"size": 3}, "fault")


def test_what_is_asked_of_all_parameters_is_not_asked_of_some():
    parameters = parameters_of(lambda bits, onset=3: None)
    with pytest.raises(ValueError, match=r"fault\.bits is missing"):
        check_arguments("fault", parameters, {}, "fault")
    assert check_arguments("fault", {"onset": parameters["onset"]}, {}, "fault") == {"onset": 3}


def test_a_default_that_is_changed_is_the_default_still():
    parameters = {"sizes": parameters_of(of_sizes())["sizes"]}
    check_arguments("Thing", parameters, {}, "fault")["sizes"].append(2)
    assert check_arguments("Thing", parameters, {}, "fault") == {"sizes": [1]}


def test_parameters_cannot_be_changed():
    with pytest.raises(TypeError):
        parameters_of(of_a_count())["size"] = (int, 2)
