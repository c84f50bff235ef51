"""A page in one file: its modules are put together, and nothing else can run in it."""

from __future__ import annotations

import re

import pytest

from swarmtrain.web import single_file as module
from swarmtrain.web.markup import Markup, element, joined
from swarmtrain.web.single_file import bundled, single_file

PAGES = ("report", "comparison")
STATIC = module._STATIC


@pytest.mark.parametrize("name", PAGES)
def test_a_script_has_all_its_modules_once_in_order(name: str) -> None:
    script = bundled(name)
    assert not re.search(r"^(import|export)\b", script, re.MULTILINE)
    order = re.findall(r"^const module_(\w+) = ", script, re.MULTILINE)
    assert order[-1] == name and len(set(order)) == len(order) and {"dom", "charts", "still"} <= set(order)
    for used, place in ((match[1], match.start()) for match in re.finditer(r"\} = module_(\w+);", script)):
        assert f"const module_{used} = " in script[:place]
    for names, of in re.findall(r"^const \{ ([\w, ]+) \} = module_(\w+);", script, re.MULTILINE):
        (given,) = re.findall(rf"const module_{of} = .*?\nreturn \{{ ([\w, ]*) \}};\n\}}\)\(\);", script, re.DOTALL)
        assert set(names.split(", ")) <= set(given.split(", ")), of


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.js")), ids=lambda path: path.stem)
def test_every_module_of_the_page_could_be_put_into_a_file(path: pytest.FixtureRequest) -> None:
    assert bundled(path.stem)  # type: ignore[attr-defined]


def test_a_form_of_import_that_cannot_be_put_into_one_file_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for text in ('import * as dom from "./dom.js";\n', "export default 3;\n", 'export * from "./dom.js";\n'):
        monkeypatch.setattr(module, "_read", lambda name, text=text: text)
        with pytest.raises(ValueError, match="cannot be put into one file"):
            bundled("odd")


def test_data_do_not_end_their_element() -> None:
    page = single_file("<title>", [], {"name": "</script><!--&"}, script="report")
    assert "<title>&lt;title&gt;</title>" in page
    assert r'{"name":"\u003c/script\u003e\u003c!--\u0026"}' in page and "</script><!--" not in page


def test_a_style_or_script_that_would_end_its_element_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_read", lambda name: "a</STYLE >")
    with pytest.raises(ValueError, match="would end it"):
        single_file("", [], {}, script="report")


def test_elements_escape_what_is_no_markup() -> None:
    assert element("p", "<b>", element("b", "&"), class_='"x"') == '<p class="&quot;x&quot;">&lt;b&gt;<b>&amp;</b></p>'
    assert element("input", checked=True, disabled=False, data_part="1%") == '<input checked data-part="1%">'
    assert joined(["<", Markup("<br>")]) == "&lt;<br>"
