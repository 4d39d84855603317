"""What the README shows runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_example():
    examples = [block for block in blocks("python") if "import" in block]
    assert examples
    for example in examples:
        names: dict = {}
        exec(compile(example, str(README), "exec"), names)
        plain, steered, handle = names["model"](names["data"]), names["steered"], names["handle"]
        assert steered.shape == plain.shape and not steered.equal(plain)  # the handle's `with` block has ended
        assert handle.code.values.shape == (20_000, 16)


def test_the_two_commands_are_one_line_each():
    text = README.read_text()
    for name in ("demo", "test"):
        command = re.search(rf"<!-- fresh: {name} -->\n```sh\n(.*?)```", text, re.DOTALL)
        assert command and command[1].count("\n") == 1
