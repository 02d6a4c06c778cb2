"""Options are declared once: keywords of methods, options of commands and specs agree."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass

import pytest
import typer

from lark_store import Store, evaluate, specs
from lark_store.cli.app import app

SPECS = {name: kind for name in specs.__all__ if is_dataclass(kind := getattr(specs, name)) and name != "Option"}
KEYWORDS = {name: getattr(specs, name) for name in specs.__all__ if name.endswith("Options")}
LEFT_OUT = {"AttributeSpec": {"variants"}, "Compute": {"memory"}}  # options of a spec its method does not have


def types_of(keywords):
    return {name: hint.__forward_arg__ for name, hint in keywords.__annotations__.items()}


def options_of(spec):
    return {field.name: field for field in fields(spec) if "option" in field.metadata}


def test_every_option_of_a_spec_is_a_keyword_of_the_same_type():
    types = {(name, hint) for keywords in KEYWORDS.values() for name, hint in types_of(keywords).items()}
    declared = {(name, field.type) for spec in SPECS.values() for name, field in options_of(spec).items()}
    assert types == declared


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_and_its_keywords_have_the_same_fields(name):
    keywords = types_of(KEYWORDS[f"{name.removesuffix('Spec')}Options"])
    declared = {n: field.type for n, field in options_of(SPECS[name]).items() if n not in LEFT_OUT.get(name, ())}
    assert {n: kind for n, kind in keywords.items() if n in options_of(SPECS[name])} == declared


def functions():
    """Yield the public methods and evaluations whose keywords are a TypedDict, by name."""
    for place in (Store, evaluate):
        for name in dir(place):
            function = getattr(place, name)
            if inspect.isfunction(function) and "Unpack" in str(function.__annotations__.get("options")):
                yield name, function


FUNCTIONS = dict(functions())


def test_the_methods_with_many_options_have_them_from_specs():
    methods = {"top", "scores", "attribute", "ingest", "plan", "correction_fit", "sketcher_add", "source_add", "export"}
    assert methods | {"lds", "facts", "causal", "tail_patch", "format", "spearman"} <= FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_signature_lists_every_keyword_with_its_default(name):
    defaults = {(field, found.default) for spec in SPECS.values() for field, found in options_of(spec).items()}
    annotation = FUNCTIONS[name].__annotations__["options"]
    keywords = types_of(getattr(specs, annotation.removeprefix("Unpack[").removesuffix("]")))
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    assert "options" not in parameters
    assert keywords.items() <= {n: parameter.annotation for n, parameter in parameters.items()}.items()
    for keyword in keywords:
        assert (keyword, parameters[keyword].default) in defaults
        assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY


def test_an_unknown_keyword_of_an_evaluation_is_refused():
    with pytest.raises(TypeError, match=r"^lds\(\) got an unexpected keyword argument 'half_set'$"):
        evaluate.lds(None, ["bm25"], checkpoint="base", half_set=3)


def test_the_signature_of_top_is_written_out():
    signature = str(inspect.signature(Store.top))
    assert "sources: 'Sequence[str]' = ()" in signature
    assert "k: 'int' = 10" in signature
    assert "options" not in signature


def test_a_command_has_the_options_of_its_specs():
    command = typer.main.get_command(app).commands["top"]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {"--source", "-s", "--query-checkpoint", "-k", "--where", "--approximate", "--store", "-f"} <= flags
