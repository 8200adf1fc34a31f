"""The docstring data set: what goes in and what stays out, on files small enough to read, then on the real library."""

import ast
import sysconfig
import textwrap
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from packsft import stdlib_docstrings


@pytest.fixture(scope="module")
def stdlib():
    return stdlib_docstrings()


def write(folder: Path, name: str, source: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")


def test_pair_is_the_source_without_the_docstring_and_the_docstring(tmp_path):
    write(
        tmp_path,
        "area.py",
        '''
        class Square:
            def area(self):  # a comment
                """
                The area in square metres.

                Never below 0.
                """
                return self.side ** 2
        ''',
    )
    assert stdlib_docstrings(tmp_path).to_list() == [
        {
            "prompt": "def area(self):\n    return self.side ** 2\n\nDocstring of area:\n",
            "completion": "The area in square metres.\n\nNever below 0.",
        }
    ]


def test_inner_docstring_is_in_no_prompt_and_is_a_pair_of_its_own(tmp_path):
    write(
        tmp_path,
        "outer.py",
        '''
        def outer():
            """The docstring of outer."""
            if True:
                async def inner():
                    """The docstring of inner."""
            return inner
        ''',
    )
    outer, inner = stdlib_docstrings(tmp_path)
    assert "docstring" not in outer["prompt"]
    # a body that was only a docstring is still a function
    assert inner["prompt"].startswith("async def inner():\n    pass\n")
    assert inner["completion"] == "The docstring of inner."


def test_docstring_of_19_characters_is_left_out_and_of_20_taken(tmp_path):
    write(tmp_path, "a.py", f'def f():\n    """{"x" * 19}"""\ndef g():\n    """{"y" * 20}"""')
    assert stdlib_docstrings(tmp_path)["completion"] == ["y" * 20]


def test_tests_and_foreign_packages_are_left_out(tmp_path):
    source = 'def f():\n    """A docstring that is long enough."""'
    left_out = ["test", "x/tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"]
    for number, folder in enumerate(left_out):
        write(tmp_path, f"{folder}/a.py", source + f"\n    return {number}")
    write(tmp_path, "unittest/a.py", source)
    assert len(stdlib_docstrings(tmp_path)) == 1


def test_pairs_come_by_path_and_line_and_equal_ones_once(tmp_path):
    function = 'def {0}():\n    """The docstring of {0}, in full."""\n'
    write(tmp_path, "b.py", function.format("third") + function.format("first"))
    write(tmp_path, "a.py", function.format("first") + function.format("second"))
    names = [completion.split()[3] for completion in stdlib_docstrings(tmp_path)["completion"]]
    assert names == ["first,", "second,", "third,"]


def test_file_of_another_python_is_skipped(tmp_path):
    write(tmp_path, "old.py", 'def f():\n    """A docstring that is long enough."""\n    print 1')
    write(tmp_path, "new.py", 'def g():\n    """A docstring that is long enough."""')
    assert len(stdlib_docstrings(tmp_path)) == 1


def test_library_without_sources_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no Python source"):
        stdlib_docstrings(tmp_path)


def test_standard_library_gives_thousands_of_different_pairs(stdlib):
    assert stdlib.column_names == ["prompt", "completion"]
    assert len(stdlib) > 4000  # 5,853 on Python 3.11; the versions differ by hundreds
    assert len(set(zip(stdlib["prompt"], stdlib["completion"], strict=True))) == len(stdlib)


def test_reading_twice_gives_the_same_rows():
    folder = Path(sysconfig.get_path("stdlib"), "email")  # some 20 files: the whole library takes seconds
    assert stdlib_docstrings(folder).to_list() == stdlib_docstrings(folder).to_list()


def test_no_docstring_of_the_standard_library_is_left_in_its_prompt(stdlib):
    for row in stdlib:
        source = row["prompt"].rpartition("\n\nDocstring of ")[0]
        (function,) = ast.parse(source).body
        assert ast.get_docstring(function) != row["completion"]
        assert len(row["completion"]) >= 20


def test_prompt_ends_on_a_token_boundary(stdlib):
    words = ByteLevel(add_prefix_space=False)  # GPT-2's: no token crosses the words that it finds

    def split(text: str) -> list[str]:
        return [word for word, _ in words.pre_tokenize_str(text)]

    for row in stdlib.select(range(0, len(stdlib), 10)):
        assert split(row["prompt"] + row["completion"]) == split(row["prompt"]) + split(row["completion"])
