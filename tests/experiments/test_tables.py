"""The tables of the documents follow from the committed results, and every aim is met or missed."""

import json
import re
import shutil

import pytest

from experiments.reporting import tables
from experiments.reporting.markdown import VERDICTS

PAGES = {str(path.relative_to(tables.ROOT)): path.read_text() for path in tables.pages()}
WHERE = {
    name: page for page, text in PAGES.items() for name in re.findall(r"<!-- begin:(\w+) -->", text)
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_follows_from_the_results(page):
    same = tables.render(PAGES[page], page=page) == PAGES[page]
    assert same, f"{page} differs: run python -m experiments.reporting.tables"


def test_every_table_stands_on_one_page():
    everywhere = "".join(PAGES.values())
    for name in tables.TABLES:
        assert everywhere.count(f"<!-- begin:{name} -->") == 1, name
    # the README repeats none of the measurements
    assert [name for name, page in WHERE.items() if page == "README.md"] == ["number", "headlines"]


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_changed_result_changes_its_table(name, tmp_path):
    shutil.copytree(tables.RESULTS, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{tables.READS.get(name, (name,))[0]}.json"
    result = json.loads(path.read_text())
    _change(result, int | float) or _change(result, str)
    path.write_text(json.dumps(result))
    page = WHERE[name]
    assert tables.render(PAGES[page], tmp_path, page) != PAGES[page]


def _change(value, kind) -> bool:
    """Every number in it doubled, or every text longer, but for those that rows are found by; was
    there one?"""
    found = False
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(entry, dict | list):
            found |= _change(entry, kind)
        elif isinstance(entry, kind) and not isinstance(entry, bool) and key != "rank":
            value[key] = 2 * entry
            found = True
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/results/")])
def test_every_aim_is_met_or_missed_in_the_last_column(page):
    allowed = {*VERDICTS.values(), "-"}
    header = None
    for line in PAGES[page].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = cells
            assert "met or missed" not in header[:-1]
        elif header[-1] == "met or missed" and set(cells) != {"---"}:
            assert cells[-1] in allowed, line
        else:
            assert "missed" not in line, line


def test_every_page_of_results_is_in_the_index_and_names_its_command():
    index = PAGES["docs/results/README.md"]
    found = {page.split("/")[-1] for page in PAGES if page.startswith("docs/results/")}
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == found - {"README.md"}
    for page in sorted(found - {"README.md"}):
        assert re.search(r"`(python -m|make) ", PAGES[f"docs/results/{page}"]), page


def test_six_headlines_and_their_misses():
    text = re.search(r"begin:headlines -->(.*?)<!--", PAGES["README.md"], flags=re.DOTALL)[1]
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 6
    for row in rows:
        page = re.search(r"\]\((.+?)\) \|$", row)[1]
        assert page in PAGES


def test_markers_without_a_table_are_errors(tmp_path):
    with pytest.raises(ValueError, match="known ones are"):
        tables.render("<!-- begin:nothing --><!-- end:nothing -->", tmp_path)
    with pytest.raises(ValueError, match="not committed"):
        tables.render("<!-- begin:train --><!-- end:train -->", tmp_path)
    with pytest.raises(ValueError, match=r"train' of page\.md stands 0 times"):
        tables.render("<!-- begin:train -->", page="page.md")
