"""Writes the programs of the README into a new folder, so that `mypy --strict` can check them."""

import pathlib, re, sys

folder = pathlib.Path(sys.argv[1])
folder.mkdir()
blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", pathlib.Path("README.md").read_text())
imports = next(re.match(r"(?s).*?\n\n\n", block)[0] for block in blocks if block.startswith("import"))
for number, block in enumerate(blocks):
    named = re.match(r"# (\S+\.py)\n", block)
    text = block if named or block.startswith("import") else imports + block
    (folder / (named[1] if named else f"block_{number}.py")).write_text(text)
