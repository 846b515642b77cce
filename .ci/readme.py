"""Writes the programs of the README into a new folder, so that `mypy --strict` can check them."""

import re
import sys
from pathlib import Path

folder = Path(sys.argv[1])
folder.mkdir()
blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", Path("README.md").read_text(encoding="utf-8"))
(complete,) = [block for block in blocks if block.startswith("import")]
imports = complete[: complete.index("\n\n\n")] + "\n\n\n"  # those without a file's name lack theirs
for number, block in enumerate(blocks):
    named = re.match(r"# (\S+\.py)\n", block)
    text = block if named or block == complete else imports + block
    (folder / (named[1] if named else f"block_{number}.py")).write_text(text, encoding="utf-8")
