"""The documentation site: every name, every error, every page and every link has its place."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "tools"))

import check_site  # noqa: E402
from docs_pages import api, messages  # noqa: E402
from docs_pages.source import Module, public_modules  # noqa: E402

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


class TestNames:
    def test_every_public_name_has_a_place(self):
        text = "\n".join(api.room_pages().values())
        lost = [
            f"{module.name}.{name}"
            for module in public_modules()
            for name in module.public
            if f"        - {name}\n" not in f"{text}\n"
            and f"{{ #{module.name}.{name} }}" not in text
            and f"::: {module.origin(name)}.{name}\n" not in text
            and f"[`{name}`][{module.origin(name)}.{name}]" not in text
        ]
        assert not lost

    def test_the_front_page_lists_what_mmlm_exports(self):
        import mmlm

        front = api.front((DOCS / "api.md").read_text(encoding="utf-8"))
        assert all(f"[`mmlm.{name}`]" in front for name in mmlm.__all__)
        assert all(f"(api/{room}.md)" in front for room in api.rooms())

    def test_a_name_is_rendered_where_it_is_defined(self):
        page = api.room_pages()["api/decoding.md"]
        assert "::: decoding.vhr\n" in page
        assert "[`VHR`][decoding.vhr.VHR]" in page


class TestErrors:
    def test_every_error_class_has_a_cure(self):
        page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
        section = page.partition("## By kind of error")[2]
        parts = re.split(r"^### (\w+)$", section, flags=re.M)[1:]
        cures = dict(zip(parts[::2], parts[1::2], strict=True))
        assert set(cures) == set(messages.error_classes())
        assert all(re.search(r"\*\*Cure:\*\* \w", text) or "**Cure:** `" in text
                   for text in cures.values())  # fmt: skip

    def test_every_error_of_ours_says_what_to_do(self):
        silent = [
            f"{found.module}:{found.line} {found.texts}"
            for found in messages.messages()
            if found.kind != "ValueError" and not found.says_what_to_do
        ]
        assert not silent

    def test_every_raise_is_read(self):
        """By another way: the number of raises of our classes in the source."""
        kinds = messages.ours()
        found = messages.messages()
        for module in public_modules():
            raised = sum(
                isinstance(node, ast.Raise)
                and isinstance(node.exc, ast.Call)
                and ast.unparse(node.exc.func).split(".")[-1] in kinds
                for node in ast.walk(module.tree)
            )
            read = sum(m.module == module.name and m.kind != "ValueError" for m in found)
            assert read >= raised, module.name

    def test_the_page_has_them_all(self):
        page = messages.messages_page()
        assert page.count("**Cure:**") == len(messages.messages())
        assert "There is no split &#60;split&#62; of the world." in page

    @pytest.mark.parametrize(
        ("source", "texts", "advice"),
        [
            ("raise InputError(f'{path!r} is no file.', advice='Give one.')",
             ("<path> is no file.",), ("Give one.",)),
            ("raise InputError('a ' 'b', advice='x' if near else 'y')", ("a b",), ("x", "y")),
            ("HINT = 'See A.'\ndef f():\n    raise InputError('b', advice=HINT)",
             ("b",), ("See A.",)),
            ("def f(why):\n    return InputError(f'No: {why}.', advice='x')\nf('cold')\nf('hot')",
             ("No: cold.", "No: hot."), ("x",)),
            ("def f(n):\n    what = 'one' if n else f'{n} of them'\n"
             "    raise InputError(f'There is {what}.', advice=g() or 'Go.')\n"
             "def g():\n    return 'Did you mean x?'",
             ("There is one.", "There is <n> of them."), ("Did you mean x?", "Go.")),
        ],
    )  # fmt: skip
    def test_reading(self, source, texts, advice):
        tree = ast.parse(source)
        module = Module("a_module", Path("a_module.py"), tree)
        ((call, inside),) = (
            pair for pair in messages._calls(tree) if ast.unparse(pair[0].func) == "InputError"
        )
        reader = messages.Reader(module, inside)
        assert reader.texts(call.args[0]) == texts
        assert reader.texts(call.keywords[0].value) == advice


class TestPages:
    def test_the_navigation_holds_every_page(self):
        def leaves(entry):
            if isinstance(entry, str):
                return [entry]
            values = entry.values() if isinstance(entry, dict) else entry
            return [leaf for value in values for leaf in leaves(value)]

        config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
        nav = leaves(yaml.safe_load(config)["nav"])
        assert sorted(nav) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))

    def test_anchors_exist(self):
        broken = []
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", text):
                other = page.parent / target if target else page
                if other.suffix == ".md" and anchor not in anchors(other):
                    broken.append(f"{page.name}: {target}#{anchor}")
        assert not broken

    def test_every_method_is_in_the_gallery_once(self):
        import mmlm

        text = (DOCS / "gallery.md").read_text(encoding="utf-8")
        titles = re.findall(r"^### (\w+)$", text, re.M)
        experiments = {"HeadAblation", "StreamingHeads"}  # they mitigate nothing
        assert sorted(titles) == sorted(set(mmlm.method_names()) - experiments)
        for part in re.split(r"^### ", text, flags=re.M)[1:]:
            code = re.search(r"```python\n(.*?)```", part, re.S)[1]
            # A table of heads as a parameter may need more lines, but no more statements.
            statements = sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(code)))
            assert statements <= 5, part[:20]
            assert "![" in part
            assert re.search(r"\[[+-]?\d", part), "no interval"

    def test_readme_is_one_screen_and_short(self):
        lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 150
        assert any(line.startswith("```python") for line in lines[:40])


def anchors(page):
    """Ids of a page's headings, as MkDocs and GitHub make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {
        re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())
        for title in re.findall(r"^#+ (.*)$", text, re.M)
    }


class TestSiteCheck:
    def site(self, tmp_path, body, other="<h1 id='here'>x</h1>"):
        (tmp_path / "index.html").write_text(f"<html><body>{body}</body></html>")
        (tmp_path / "other.html").write_text(other)
        return [fault for fault in check_site.faults(tmp_path) if not fault.startswith("no place")]

    def test_a_sound_site(self, tmp_path):
        body = "<a href='other.html#here'>x</a><a href='https://arxiv.org'>y</a><a href='.'>z</a>"
        assert self.site(tmp_path, body) == []

    @pytest.mark.parametrize(
        ("body", "told"),
        [
            ("<a href='lost.html'>x</a>", "lost.html leads nowhere"),
            ("<a href='other.html#lost'>x</a>", "other.html#lost leads nowhere"),
            ("<img src='lost.png'>", "lost.png leads nowhere"),
            ("<script src='https://cdn.example/x.js'></script>", "from elsewhere"),
            ("<link rel='stylesheet' href='//fonts.example/a.css'>", "from elsewhere"),
        ],
    )
    def test_faults(self, tmp_path, body, told):
        (fault,) = self.site(tmp_path, body)
        assert told in fault

    def test_a_name_without_a_place(self, tmp_path):
        self.site(tmp_path, "")
        assert any("decoding.vhr.VHR" in fault for fault in check_site.faults(tmp_path))


@pytest.mark.slow
def test_the_tutorials_commands_find_its_method(tmp_path):
    """Its first block saved under the name it says, then its commands as written."""
    page = (DOCS / "writing-a-method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "image_push.py").write_text(blocks[0][1], encoding="utf-8")
    (commands,) = (text for kind, text in blocks if kind == "bash")
    found = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path, env=found, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pushed = blocks[2][1].splitlines()[1]
    assert pushed in " ".join(done.stdout.split())
